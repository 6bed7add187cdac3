"""The authors' code, number by number: every case of the fixtures in `--parity-dir` (see data/parity/README.md). Which tensors a case compares
(outputs, intermediates, gradients) is discovered from the tensors."""
from functools import cache
import pytest
import torch
from einops import rearrange
from hashfill import fill
from parity import cases, close, info, tensors, under
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from delta_llava.config import ProjectorConfig
from delta_llava.delta import DeltaProjection
from delta_llava.grid import VisionFeatures, interpolate, pos_embed, sincos_2d, to_grid, to_windows
from delta_llava.mixing import EMHSA, MHCA, NTB, round_channels
from delta_llava.projector import AUTHORS_STATE_DICT_MAP, DeltaProjector, from_authors_state, part_state_dict_map, to_authors_state

PROJECTORS = ("delta_llava", "delta_llava_hd16")  # fixtures of the whole projector


def pytest_generate_tests(metafunc):
    of = lambda *names, where=lambda name, case: True: cases(metafunc, *names, where=where)
    wanted = {"projector": lambda: of(*PROJECTORS), "gradient": lambda: of(*PROJECTORS, where=lambda n, c: c.get("grads")),
              "intermediate": lambda: of(*PROJECTORS, where=lambda n, c: c.get("mid")), "block": lambda: of("delta_blocks"), "geometry": lambda: of("delta_posembed_windows"),
              "real": lambda: of("real_shapes", where=lambda n, c: c["name"].startswith("delta")), "selection": lambda: of("clip_feature_select")}
    for kind, found in wanted.items():
        if f"{kind}_case" in metafunc.fixturenames: metafunc.parametrize(f"{kind}_case", found())


# ---- the whole projector
def authors_state(folder, name) -> dict:
    "State of a fixture; tensors that it does not store come from the main one."
    state = under(folder, name, "state.")
    missing = set(info(folder, name)["state_keys"]) - set(state)
    return state | {k: v for k, v in under(folder, "delta_llava", "state.").items() if k in missing}


def build(folder, name, case, times=1.) -> DeltaProjector:
    "Our projector with the sizes of a fixture and its state, scaled by `times`."
    ctor = info(folder, name)["ctor"]
    assert (ctor["kv_dim"], ctor["qproj_ln_eps"], ctor["ntb_ln_eps"]) == (ctor["embed_dim"], 1e-6, 1e-5), "fixed in the authors' code, and here"
    levels, rest = divmod(ctor["multi_dim"], ctor["embed_dim"])
    assert rest == 0, "levels are joined whole"
    config = ProjectorConfig(
        grid=case["raw_grid"], tokens=(case["raw_grid"]//case["scale_factor"])**2, levels=tuple(range(levels)), d_vision=ctor["embed_dim"],
        d_llm=ctor["hidden_size"], heads=ctor["num_heads"], rank=ctor["rank"], head_dim=ctor["ntb_head_dim"], mlp_ratio=ctor["ntb_mlp_ratio"],
        mix_ratio=ctor["mix_block_ratio"], drop_path=ctor["path_dropout"])
    projector = DeltaProjector(config)
    projector.load_state_dict({k: v*times for k, v in from_authors_state(authors_state(folder, name)).items()})
    return projector.eval()


def inputs(folder, name, case) -> tuple:
    "Single- and multi-level features of a case; what its fixture does not store comes from the main one."
    return tuple((tensors(folder, name) if k in tensors(folder, name) else tensors(folder, "delta_llava"))[k].clone().requires_grad_() for k in case["inputs"])


def test_projector_output(projector_case):
    folder, name, case = projector_case
    projector = build(folder, name, case)
    single, multi = inputs(folder, name, case)
    out = projector.project(multi, single, projector.config.g)
    assert list(out.shape) == case["out_shape"]
    close(out, tensors(folder, name)[f"out.{case['name']}"], "output")
    assert sum(p.numel() for p in projector.parameters()) == info(folder, name)["param_count"]


def test_projector_gradients(gradient_case):
    folder, name, case = gradient_case
    projector = build(folder, name, case)
    single, multi = inputs(folder, name, case)
    (projector.project(multi, single, projector.config.g) * tensors(folder, name)[f"cot.{case['name']}"]).sum().backward()
    for key, stored in under(folder, name, f"gin.{case['name']}.").items():
        close(dict(single=single, multi=multi)[key].grad, stored, f"gradient of {key}")
    ours = to_authors_state({k: p.grad for k, p in projector.named_parameters()})
    for key, stored in under(folder, name, f"gp.{case['name']}.").items():
        close(ours[key], stored, f"gradient of {key}")
    if "zero_grad_params" in case:
        assert {k for k, g in ours.items() if not g.any()} == set(case["zero_grad_params"])


def test_projector_intermediates(intermediate_case):
    folder, name, case = intermediate_case
    stored = under(folder, name, f"mid.{case['name']}.")
    projector = build(folder, name, case)
    single, multi = inputs(folder, name, case)
    g = projector.config.g
    x = interpolate(single, g)
    mixed = projector.mix(rearrange(x, "b (row col) c -> b row col c", row=g))
    q, k, v = projector.queries(single, g), projector.k(multi), projector.v(multi)
    ours = dict(interp=to_grid(x), ntb=rearrange(mixed, "b row col c -> b c row col"), query=q, key=k, value=v,
                attn=rearrange(projector.attend(q, k, v), "b v c -> 1 (v b) c"))
    assert set(stored) == set(case["mid"]) <= set(ours)
    for key in stored: close(ours[key], stored[key], key)


def test_projector_notices_one_percent(projector_case):
    "A comparison that a wrong state could pass would prove nothing."
    folder, name, case = projector_case
    projector = build(folder, name, case, times=1.01)
    single, multi = inputs(folder, name, case)
    with pytest.raises(AssertionError): close(projector.project(multi, single, projector.config.g), tensors(folder, name)[f"out.{case['name']}"], "output")


def test_authors_state_round_trip(projector_case):
    folder, name, case = projector_case
    theirs = authors_state(folder, name)
    back = to_authors_state(build(folder, name, case).state_dict())
    assert set(back) == set(theirs) and len(back) == 45
    for key in theirs: assert_close(back[key], theirs[key], rtol=0, atol=0)


# ---- its parts
BLOCKS = {"MHCA": "mix.mhca.", "E_MHSA": "mix.emhsa.", "NTB": "mix.", "DeltaProjection": "q.", "Mlp": "mix.mlp."}  # where each sits in the projector


def run_block(folder, case, times=1.):
    "Output of one part for the stored input, and that input."
    name, ctor = case["name"], case["ctor"]
    state = {k: v*times for k, v in under(folder, "delta_blocks", f"state.{name}.").items()}
    state = from_authors_state(state, part_state_dict_map(BLOCKS[case["cls"]]))
    x = tensors(folder, "delta_blocks")[f"in.{name}.x"].clone().requires_grad_()
    as_map, as_image = (lambda t: rearrange(t, "b c row col -> b row col c")), (lambda t: rearrange(t, "b row col c -> b c row col"))
    if case["cls"] == "MHCA":
        module = MHCA(ctor["out_channels"], ctor["head_dim"])
        run = lambda: as_image(module(as_map(x)))
    elif case["cls"] == "E_MHSA":
        module = EMHSA(ctor["dim"], ctor["head_dim"])
        run = lambda: module(x[:, None], ctor["sr_ratio"])[:, 0]  # the raster is all that this pooling knows
    elif case["cls"] == "NTB":
        module = NTB(ctor["in_channels"], ctor["out_channels"], ctor["head_dim"], ctor.get("mix_block_ratio", .75), ctor.get("mlp_ratio", 2),
                     ctor["path_dropout"], ctor.get("stride", 1))
        run = lambda: as_image(module(as_map(x)))
    elif case["cls"] == "DeltaProjection":
        module = DeltaProjection(ctor["in_features"], ctor["out_features"], ctor["rank"])
        run = lambda: module(x)
    elif case["cls"] == "Mlp":
        hidden = int(ctor["in_features"]*ctor["mlp_ratio"])
        module = nn.Sequential(nn.Linear(ctor["in_features"], hidden), nn.ReLU(), nn.Linear(hidden, ctor["in_features"]))
        run = lambda: as_image(module(as_map(x)))
    else: pytest.fail(f"no part of ours answers to {case['cls']}")
    module.load_state_dict(state)
    module.eval()
    assert sum(p.numel() for p in module.parameters()) == case["param_count"]
    return run(), x


def test_block(block_case):
    folder, _, case = block_case
    out, x = run_block(folder, case)
    assert list(out.shape) == case["out_shape"]
    close(out, tensors(folder, "delta_blocks")[f"out.{case['name']}"], "output")
    (out * tensors(folder, "delta_blocks")[f"cot.{case['name']}"]).sum().backward()
    close(x.grad, tensors(folder, "delta_blocks")[f"gin.{case['name']}.x"], "gradient of x")


def test_block_notices_one_percent(block_case):
    folder, _, case = block_case
    with pytest.raises(AssertionError): close(run_block(folder, case, 1.01)[0], tensors(folder, "delta_blocks")[f"out.{case['name']}"], "output")


def test_geometry(geometry_case):
    folder, name, case = geometry_case
    kind, *numbers = case["name"].split("_")
    stored = tensors(folder, name)
    if kind == "win":
        out = rearrange(to_windows(rearrange(stored[f"in.{case['name']}"], "n b c -> b n c"), case["token_grid"]//case["kernel"]), "b v m c -> m (v b) c")
        close(out, stored[f"out.{case['name']}"], case["name"])
    elif kind == "interp":
        grid, scale = map(int, numbers)
        out = interpolate(rearrange(stored[f"in.{case['name']}"], "b c row col -> b (row col) c"), grid//scale)
        close(to_grid(out), stored[f"out.{case['name']}"], case["name"])
    elif kind == "posembed":
        tables = [k for k in stored if k.startswith(("out.sincos", "out.abs_pos"))]
        assert tables
        for key in tables: close(table(key), stored[key], key)
    else: pytest.fail(f"no geometry of ours answers to {case['name']}")


def table(key: str) -> torch.Tensor:
    "The positions that a fixture's key describes, such as `abs_pos_64_24_to_12` or `sincos_1024_24_rows0_1_cols_every16`."
    kind, _, rest = key.removeprefix("out.").replace("abs_pos", "abspos").partition("_")
    words = rest.split("_")
    channels, grid = int(words[0]), int(words[1])
    out = pos_embed(grid, int(words[3]), channels) if kind == "abspos" else sincos_2d(grid, channels)
    if "cls" in words: out = torch.cat([torch.zeros(1, channels), out])
    if "rows" in rest: out = out[[int(r) for r in rest.partition("rows")[2].partition("_cols")[0].split("_")]]
    if "first_last" in rest: out = out[[0, -1]]
    return out[:, ::int(rest.partition("every")[2])] if "every" in rest else out


def test_rounding_of_channels(geometry_case):
    folder, name, case = geometry_case
    for key, want in info(folder, name).get("make_divisible", {}).items(): assert round_channels(*map(int, key.split(","))) == want


def test_level_selection(selection_case):
    folder, name, case = selection_case
    stored = tensors(folder, name)
    skip = 0 if case["name"] == "cls_patch" else 1  # CLS stays or goes
    states = stored["in.hidden_states"][:, :, skip:]
    single, multi = states[case["select_layer"]], torch.cat([states[i] for i in case["layers"]], dim=-1)
    close(multi, stored[f"out.{case['name']}.multi"], "levels")
    close(multi[..., -single.shape[-1]:], stored[f"out.{case['name']}.single"], "query level")  # what the projector takes for its queries
    if skip: assert VisionFeatures.of(multi).grid**2 == multi.shape[1]


# ---- true widths, filled by a closed form
@cache
def real_projector(d_llm: int, times: float = 1.) -> DeltaProjector:
    with torch.device("meta"): shapes = to_authors_state(DeltaProjector(ProjectorConfig(d_llm=d_llm)).state_dict())
    state = {k: torch.from_numpy(fill(f"delta/{k}", tuple(v.shape)))*times for k, v in shapes.items()}
    with torch.device("meta"): projector = DeltaProjector(ProjectorConfig(d_llm=d_llm))
    projector.load_state_dict(from_authors_state(state), assign=True)
    return projector.eval()


def real_output(case, times=1.):
    single, multi = (torch.from_numpy(fill(f"delta/in.{k}", (1, 576, c), kind="input")) for k, c in (("single", 1024), ("multi", 4096)))
    with torch.no_grad(): return real_projector(case.get("hidden_size", 4096), times).project(multi, single, 24//case["scale_factor"])


def test_real_widths(real_case):
    folder, name, case = real_case
    if "scale_factor" not in case:  # only counted
        with torch.device("meta"): projector = DeltaProjector(ProjectorConfig(d_llm=case["hidden_size"]))
        assert sum(p.numel() for p in projector.parameters()) == case["param_count"]
        return
    out = real_output(case)
    stored = under(folder, name, f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    assert sum(p.numel() for p in real_projector(case.get("hidden_size", 4096)).parameters()) == case["param_count"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 43, where float32 itself has steps of 4e-6
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")
