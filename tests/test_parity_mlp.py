"""LLaVA's MLP and M3 against their references' numbers (fixtures in `--parity-dir`): the MLP by its own checkpoint, M3's pooling of what an MLP gives."""
from functools import cache

import pytest
import torch
from hashfill import fill
from parity import cases, close, info, tensors, under
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, from_reference, to_reference
from delta_llava.compressors.m3 import M3, M3Config
from delta_llava.compressors.mlp import MLP, MLPConfig

DEPTHS = {"linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}  # LLaVA's name -> linear layers
KINDS = {"mlp": lambda m: cases(m, "llava_mlp"), "real": lambda m: cases(m, "real_shapes", where=lambda n, c: c["name"].startswith("llava_mlp")),
         "m3": lambda m: cases(m, "m3_pooling", where=lambda n, c: c["scale"] == c["out_tokens"]),
         "floored": lambda m: cases(m, "m3_pooling", where=lambda n, c: c["scale"] != c["out_tokens"])}


def pytest_generate_tests(metafunc):
    for kind, found in KINDS.items():
        if f"{kind}_case" in metafunc.fixturenames: metafunc.parametrize(f"{kind}_case", found(metafunc))


def test_every_kind_has_a_case(request):
    for kind, found in KINDS.items(): assert found(request), f"no case of kind {kind!r}: a fixture that is missing proves nothing"


# ---- the MLP

def build(folder, case, times=1.) -> MLP:
    "Ours with the sizes of the fixture and the reference's state, scaled by `times`, under the names of its checkpoint."
    n = tensors(folder, "llava_mlp")["in.x"].shape[1]
    model = MLP(MLPConfig(grid=round(n**.5), tokens=n, levels=(23,), d_vision=case["mm_hidden_size"], d_llm=case["hidden_size"], depth=DEPTHS[case["name"]]))
    state = {MLP.prefix + k: v*times for k, v in under(folder, "llava_mlp", f"state.{case['name']}.").items()}
    model.load_state_dict(from_reference(state, model.state_dict_map, MLP.prefix))
    return model.eval()


def run(folder, case, times=1.): return build(folder, case, times)(tensors(folder, "llava_mlp")["in.x"])


def test_mlp_output(mlp_case):
    folder, name, case = mlp_case
    close(run(folder, case), tensors(folder, name)[f"out.{case['name']}"], "output")
    assert sum(p.numel() for p in build(folder, case).parameters()) == case["param_count"]


def test_mlp_notices_one_percent(mlp_case):
    folder, name, case = mlp_case
    with pytest.raises(AssertionError): close(run(folder, case, 1.01), tensors(folder, name)[f"out.{case['name']}"], "output")


@pytest.mark.parametrize("outer", ["", MLP.prefix])
def test_reference_round_trip(mlp_case, outer):
    folder, name, case = mlp_case
    theirs = {outer + k: v for k, v in under(folder, name, f"state.{case['name']}.").items()}
    model = build(folder, case)
    model.load_state_dict(from_reference(theirs, model.state_dict_map, MLP.prefix))
    back = to_reference(model.state_dict(), model.state_dict_map, outer)
    assert set(back) == set(theirs)
    for key in theirs: assert_close(back[key], theirs[key], rtol=0, atol=0)


@cache
def real_model(times=1.) -> MLP:
    "True widths, filled by a closed form under the reference's names."
    with torch.device("meta"): model = MLP()
    theirs = {k: torch.from_numpy(fill(f"llava/{k}", tuple(v.shape)))*times for k, v in to_reference(model.state_dict(), MLP.state_dict_map).items()}
    model.load_state_dict(from_reference(theirs, MLP.state_dict_map), assign=True)
    return model.eval()


def close_to_real(out, folder, case):
    stored = under(folder, "real_shapes", f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 46, where float32 itself has steps of 4e-6
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")


def test_real_widths(real_case):
    folder, _, case = real_case
    x = torch.from_numpy(fill("llava/in.x", (1, 576, 1024), kind="input"))
    with torch.no_grad(): out, off = (real_model(times)(torch.cat([torch.zeros(1, 576, 3072), x], -1)) for times in (1., 1.01))
    assert sum(p.numel() for p in real_model().parameters()) == case["param_count"]
    close_to_real(out, folder, case)
    with pytest.raises(AssertionError): close_to_real(off, folder, case)


# ---- M3
def pooled(folder, tokens, times=1.):
    "The stored features through an MLP that leaves them as they are (times `times`), and M3's pooling."
    x = tensors(folder, "m3_pooling")["in.x"]
    n, width = x.shape[1:]
    model = M3(M3Config(grid=round(n**.5), tokens=n, levels=(23,), d_vision=width, d_llm=width, depth=1))
    model.load_state_dict(from_reference({"weight": torch.eye(width)*times, "bias": torch.zeros(width)}, model.state_dict_map))
    return model.eval()(x, tokens=tokens)


def test_m3_output(m3_case):
    folder, name, case = m3_case
    out = pooled(folder, case["scale"])
    assert out.shape[1] == case["out_tokens"]
    close(out, tensors(folder, name)[f"out.{case['name']}"], "output")


def test_m3_notices_one_percent(m3_case):
    folder, name, case = m3_case
    with pytest.raises(AssertionError): close(pooled(folder, case["scale"], 1.01), tensors(folder, name)[f"out.{case['name']}"], "output")


def test_a_scale_that_the_reference_floors_is_refused(floored_case):
    "It returns another number of tokens than was asked for, and says nothing; here that number has to be asked for."
    folder, name, case = floored_case
    with pytest.raises(ValueError, match=rf"tokens={case['scale']} .*use one of \[1, 4, .*{case['out_tokens']}"): pooled(folder, case["scale"])
    close(pooled(folder, case["out_tokens"]), tensors(folder, name)[f"out.{case['name']}"], "output")


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_m3_pools_what_the_mlp_gives(mlp_case, tokens):
    "One checkpoint for both."
    folder, name, case = mlp_case
    mlp = build(folder, case)
    m3 = build_compressor("m3", M3Config.from_dict(mlp.config.to_dict()))
    m3.load_state_dict(mlp.state_dict())
    stored = tensors(folder, name)[f"out.{case['name']}"]
    cells = avg_pool2d(stored.mT.unflatten(-1, (4, 4)), 4//round(tokens**.5))
    close(m3(tensors(folder, name)["in.x"], tokens=tokens), cells.flatten(2).mT, "output")


def test_the_mlp_refuses_any_other_budget():
    for tokens in (0, 1, 144, True):
        with pytest.raises(ValueError, match=r"not possible for MLPConfig on a 24×24 grid; use one of \[576\]"): MLP(MLPConfig(d_vision=8, d_llm=8))(torch.zeros(1, 576, 32), tokens=tokens)
