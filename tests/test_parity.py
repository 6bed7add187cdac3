"""The authors' code, number by number: all cases of the fixtures in `--parity-dir` (data/parity/README.md).

Which tensors a case compares (outputs, intermediates, gradients) is discovered from the fixtures."""

from functools import cache

import pytest
import torch
from einops import rearrange
from hashfill import fill
from parity import cases, close, gradient, info, tensors, under
from torch import nn
from torch.testing import assert_close

from delta_llava.delta import DeltaProjection
from delta_llava.grid import VisionFeatures, interpolate, pos_embed, sincos_2d, to_grid, to_windows
from delta_llava.mixing import EMHSA, MHCA, NTB, round_channels
from delta_llava.projector import DeltaProjector, from_authors_state, part_state_dict_map, to_authors_state

PROJECTORS = ("delta_llava", "delta_llava_hd16")  # fixtures of the whole projector


def pytest_generate_tests(metafunc):
    wanted = {
        "projector": (PROJECTORS, lambda name, case: True),
        "gradient": (PROJECTORS, lambda name, case: case.get("grads")),
        "intermediate": (PROJECTORS, lambda name, case: case.get("mid")),
        "block": (["delta_blocks"], lambda name, case: True),
        "geometry": (["delta_posembed_windows"], lambda name, case: True),
        "real": (["real_shapes"], lambda name, case: case["name"].startswith("delta")),
        "selection": (["clip_feature_select"], lambda name, case: True),
    }
    for kind, (names, where) in wanted.items():
        if f"{kind}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{kind}_case", cases(metafunc, *names, where=where))


# ---- the whole projector
def authors_state(folder, name) -> dict:
    "State of a fixture; tensors that it does not store come from the main one."
    state = under(folder, name, "state.")
    missing = set(info(folder, name)["state_keys"]) - set(state)
    return state | {k: v for k, v in under(folder, "delta_llava", "state.").items() if k in missing}


def build(folder, name, case, times=1.0) -> DeltaProjector:
    "Our projector with the sizes of a fixture and its state, scaled by `times`."
    ctor = info(folder, name)["ctor"]
    fixed = (ctor["kv_dim"], ctor["qproj_ln_eps"], ctor["ntb_ln_eps"])
    assert fixed == (ctor["embed_dim"], 1e-6, 1e-5), "fixed in the authors' code, and here"
    levels, rest = divmod(ctor["multi_dim"], ctor["embed_dim"])
    assert rest == 0, "levels are concatenated whole"
    projector = DeltaProjector(
        grid=case["raw_grid"],
        tokens=(case["raw_grid"] // case["scale_factor"]) ** 2,
        levels=tuple(range(levels)),
        d_vision=ctor["embed_dim"],
        d_llm=ctor["hidden_size"],
        heads=ctor["num_heads"],
        rank=ctor["rank"],
        head_dim=ctor["ntb_head_dim"],
        mlp_ratio=ctor["ntb_mlp_ratio"],
        mix_ratio=ctor["mix_block_ratio"],
        drop_path=ctor["path_dropout"],
    )
    state = from_authors_state(authors_state(folder, name))
    projector.load_state_dict({k: v * times for k, v in state.items()})
    return projector.eval()


def inputs(folder, name, case) -> list:
    "Single- and multi-level features of a case; what its fixture does not store comes from the main one."
    own, main = tensors(folder, name), tensors(folder, "delta_llava")
    return [(own if k in own else main)[k].clone().requires_grad_() for k in case["inputs"]]


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
    out = projector.project(multi, single, projector.config.g)
    (out * tensors(folder, name)[f"cot.{case['name']}"]).sum().backward()
    for key, stored in under(folder, name, f"gin.{case['name']}.").items():
        close(gradient(dict(single=single, multi=multi)[key]), stored, f"gradient of {key}")
    ours = to_authors_state({k: gradient(p) for k, p in projector.named_parameters()})
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
    mixed = rearrange(mixed, "b row col c -> b c row col")
    ours = dict(
        interp=to_grid(x),
        ntb=mixed,
        query=q,
        key=k,
        value=v,
        attn=rearrange(projector.attend(q, k, v), "b v c -> 1 (v b) c"),
    )
    assert set(stored) == set(case["mid"]) <= set(ours)
    for key in stored:
        close(ours[key], stored[key], key)


def test_projector_notices_one_percent(projector_case):
    "A comparison that a wrong state could pass would prove nothing."
    folder, name, case = projector_case
    projector = build(folder, name, case, times=1.01)
    single, multi = inputs(folder, name, case)
    out = projector.project(multi, single, projector.config.g)
    with pytest.raises(AssertionError):
        close(out, tensors(folder, name)[f"out.{case['name']}"], "output")


def test_authors_state_round_trip(projector_case):
    folder, name, case = projector_case
    reference_state = authors_state(folder, name)
    back = to_authors_state(build(folder, name, case).state_dict())
    assert set(back) == set(reference_state) and len(back) == 45
    for key in reference_state:
        assert_close(back[key], reference_state[key], rtol=0, atol=0)


def test_a_missing_gradient_counts_as_zero():
    "At s=1 the authors' queries get exact zeros; a projector that does not compute them may give none."
    layer = nn.Linear(2, 2)
    layer.weight.sum().backward()
    assert gradient(layer.bias).eq(0).all() and gradient(layer.weight).eq(1).all()


# ---- its parts
BLOCKS = {  # where each is in the projector
    "MHCA": "mix.mhca.",
    "E_MHSA": "mix.emhsa.",
    "NTB": "mix.",
    "DeltaProjection": "q.",
    "Mlp": "mix.mlp.",
}


class OnImages(nn.Module):
    "A module on maps, called with images `[b, c, row, col]`."

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        y = self.module(rearrange(x, "b c row col -> b row col c"))
        return rearrange(y, "b row col c -> b c row col")


class OnRaster(nn.Module):
    "EMHSA on a list of tokens: for raster pooling it is a map with one row."

    def __init__(self, module, reduction):
        super().__init__()
        self.module = module
        self.reduction = reduction

    def forward(self, x):
        return self.module(x[:, None], self.reduction)[:, 0]


def build_block(case):
    "One part with the sizes of a case, and what calls it with the fixture's input."
    ctor = case["ctor"]
    if case["cls"] == "MHCA":
        module = MHCA(ctor["out_channels"], ctor["head_dim"])
        return module, OnImages(module)
    if case["cls"] == "E_MHSA":
        module = EMHSA(ctor["dim"], ctor["head_dim"])
        return module, OnRaster(module, ctor["sr_ratio"])
    if case["cls"] == "NTB":
        module = NTB(
            ctor["in_channels"],
            ctor["out_channels"],
            ctor["head_dim"],
            ctor.get("mix_block_ratio", 0.75),
            ctor.get("mlp_ratio", 2),
            ctor["path_dropout"],
            ctor.get("stride", 1),
        )
        return module, OnImages(module)
    if case["cls"] == "DeltaProjection":
        module = DeltaProjection(ctor["in_features"], ctor["out_features"], ctor["rank"])
        return module, module
    if case["cls"] == "Mlp":
        width = ctor["in_features"]
        hidden = int(width * ctor["mlp_ratio"])
        module = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        return module, OnImages(module)
    pytest.fail(f"none of our parts corresponds to {case['cls']}")


def run_block(folder, case, times=1.0):
    "Output of one part for the stored input, and that input."
    name = case["name"]
    state = {k: v * times for k, v in under(folder, "delta_blocks", f"state.{name}.").items()}
    module, call = build_block(case)
    module.load_state_dict(from_authors_state(state, part_state_dict_map(BLOCKS[case["cls"]])))
    module.eval()
    assert sum(p.numel() for p in module.parameters()) == case["param_count"]
    x = tensors(folder, "delta_blocks")[f"in.{name}.x"].clone().requires_grad_()
    return call(x), x


def test_block(block_case):
    folder, _, case = block_case
    out, x = run_block(folder, case)
    assert list(out.shape) == case["out_shape"]
    close(out, tensors(folder, "delta_blocks")[f"out.{case['name']}"], "output")
    (out * tensors(folder, "delta_blocks")[f"cot.{case['name']}"]).sum().backward()
    close(x.grad, tensors(folder, "delta_blocks")[f"gin.{case['name']}.x"], "gradient of x")


def test_block_notices_one_percent(block_case):
    folder, _, case = block_case
    out, _ = run_block(folder, case, 1.01)
    with pytest.raises(AssertionError):
        close(out, tensors(folder, "delta_blocks")[f"out.{case['name']}"], "output")


def test_geometry(geometry_case):
    folder, name, case = geometry_case
    kind, *numbers = case["name"].split("_")
    stored = tensors(folder, name)
    if kind == "win":
        patches = rearrange(stored[f"in.{case['name']}"], "n b c -> b n c")
        windows = to_windows(patches, case["token_grid"] // case["kernel"])
        close(rearrange(windows, "b v m c -> m (v b) c"), stored[f"out.{case['name']}"], case["name"])
    elif kind == "interp":
        grid, scale = map(int, numbers)
        patches = rearrange(stored[f"in.{case['name']}"], "b c row col -> b (row col) c")
        close(to_grid(interpolate(patches, grid // scale)), stored[f"out.{case['name']}"], case["name"])
    elif kind == "posembed":
        tables = [k for k in stored if k.startswith(("out.sincos", "out.abs_pos"))]
        assert tables
        for key in tables:
            close(table(key), stored[key], key)
    else:
        pytest.fail(f"none of our functions corresponds to {case['name']}")


def table(key: str) -> torch.Tensor:
    "The positions that a key describes, as `abs_pos_64_24_to_12` or `sincos_1024_24_rows0_1_cols_every16`."
    kind, _, rest = key.removeprefix("out.").replace("abs_pos", "abspos").partition("_")
    words = rest.split("_")
    channels, grid = int(words[0]), int(words[1])
    out = pos_embed(grid, int(words[3]), channels) if kind == "abspos" else sincos_2d(grid, channels)
    if "cls" in words:
        out = torch.cat([torch.zeros(1, channels), out])
    if "rows" in rest:
        rows = rest.partition("rows")[2].partition("_cols")[0].split("_")
        out = out[[int(row) for row in rows]]
    if "first_last" in rest:
        out = out[[0, -1]]
    if "every" in rest:
        out = out[:, :: int(rest.partition("every")[2])]
    return out


def test_rounding_of_channels(geometry_case):
    folder, name, case = geometry_case
    for key, want in info(folder, name).get("make_divisible", {}).items():
        channels, step = map(int, key.split(","))
        assert round_channels(channels, step) == want


def test_level_selection(selection_case):
    folder, name, case = selection_case
    stored = tensors(folder, name)
    skip = 0 if case["name"] == "cls_patch" else 1  # CLS stays or goes
    states = stored["in.hidden_states"][:, :, skip:]
    single, multi = states[case["select_layer"]], torch.cat([states[i] for i in case["layers"]], dim=-1)
    close(multi, stored[f"out.{case['name']}.multi"], "levels")
    query_level = multi[..., -single.shape[-1] :]  # as the projector takes it
    close(query_level, stored[f"out.{case['name']}.single"], "query level")
    if skip:
        assert VisionFeatures.of(multi).grid ** 2 == multi.shape[1]


# ---- true widths, filled by a closed form
@cache
def real_projector(d_llm: int, times: float = 1.0) -> DeltaProjector:
    with torch.device("meta"):
        projector = DeltaProjector(d_llm=d_llm)
    shapes = {k: tuple(v.shape) for k, v in to_authors_state(projector.state_dict()).items()}
    state = {k: torch.from_numpy(fill(f"delta/{k}", shape)) * times for k, shape in shapes.items()}
    projector.load_state_dict(from_authors_state(state), assign=True)
    return projector.eval()


def real_output(case, times=1.0):
    single = torch.from_numpy(fill("delta/in.single", (1, 576, 1024), kind="input"))
    multi = torch.from_numpy(fill("delta/in.multi", (1, 576, 4096), kind="input"))
    projector = real_projector(case.get("hidden_size", 4096), times)
    with torch.no_grad():
        return projector.project(multi, single, 24 // case["scale_factor"])


def test_real_widths(real_case):
    folder, name, case = real_case
    if "scale_factor" not in case:  # only counted
        with torch.device("meta"):
            projector = DeltaProjector(d_llm=case["hidden_size"])
        assert sum(p.numel() for p in projector.parameters()) == case["param_count"]
        return
    out = real_output(case)
    stored = under(folder, name, f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    projector = real_projector(case.get("hidden_size", 4096))
    assert sum(p.numel() for p in projector.parameters()) == case["param_count"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # float32 steps by 4e-6 at 43
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and std")
