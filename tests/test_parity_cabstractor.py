"Honeybee's C-Abstractor against its reference's code, and what must hold whatever its sizes."
from dataclasses import replace
from functools import cache

import pytest
import torch
from hashfill import fill
from parity import cases, close, info, tensors, under
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.cabstractor import CAbstractor, CAbstractorConfig
from delta_llava.config import clip_b32_224, dinov2_s14

NAME = "honeybee_cabstractor"
SMALL = CAbstractorConfig(grid=6, tokens=9, levels=(1, 2), d_vision=32, d_llm=24, depth=2)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames: metafunc.parametrize("case", cases(metafunc, NAME))
    if "real_case" in metafunc.fixturenames: metafunc.parametrize("real_case", cases(metafunc, "real_shapes", where=lambda n, c: c["name"].startswith("cabs_")))


# ---- the reference's numbers
def build(folder, case, times=1.) -> CAbstractor:
    ctor = case["ctor"]
    assert ctor["pos_emb"], "always there"
    module = CAbstractor(CAbstractorConfig(
        grid=round(case["num_input_tokens"]**.5), tokens=ctor["num_query_tokens"] + ctor["num_eos_tokens"], levels=(24,), d_vision=ctor["encoder_hidden_size"],
        d_llm=ctor["output_hidden_size"], depth=ctor["depth"], hidden=ctor["hidden_size"], mlp_depth=ctor["mlp_depth"], prenorm=ctor["prenorm"], eos=ctor["num_eos_tokens"]))
    state = {f"{module.outer}{k}": v*times for k, v in under(folder, NAME, f"state.{case['name']}.").items()}
    module.load_state_dict(from_reference(state, module.state_dict_map, module.prefix))
    return module.eval()


def run(folder, case, times=1.):
    with torch.no_grad(): return build(folder, case, times)(tensors(folder, NAME)[f"in.{case['name']}.x"].clone())


def test_the_fixture_has_cases(pytestconfig):
    assert info(pytestconfig.getoption("--parity-dir"), NAME)["cases"]


def test_output(case):
    folder, _, case = case
    out = run(folder, case)
    assert list(out.shape) == case["out_shape"]
    close(out, tensors(folder, NAME)[f"out.{case['name']}"], "output")


def test_one_percent_is_noticed(case):
    folder, _, case = case
    with pytest.raises(AssertionError): close(run(folder, case, 1.01), tensors(folder, NAME)[f"out.{case['name']}"], "output")


def test_state_round_trip_and_count(case):
    folder, _, case = case
    module, theirs = build(folder, case), under(folder, NAME, f"state.{case['name']}.")
    back = to_reference(module.state_dict(), module.state_dict_map, module.prefix)
    assert set(back) == {module.prefix + k for k in theirs}
    for k, v in theirs.items(): assert_close(back[module.prefix + k], v, rtol=0, atol=0)
    assert sum(p.numel() for p in module.parameters()) == case["param_count"]


@cache
def real(times=1.) -> CAbstractor:
    with torch.device("meta"): module = CAbstractor()
    shapes = to_reference(module.state_dict(), module.state_dict_map)
    state = {k: torch.from_numpy(fill(f"cabs/{k}", tuple(v.shape)))*times for k, v in shapes.items()}
    module.load_state_dict(from_reference(state, module.state_dict_map), assign=True)
    return module.eval()


def real_output(case, times=1.):
    x = torch.from_numpy(fill("cabs/in.x", (1, 576, 1024), kind="input"))
    with torch.no_grad(): return real(times)(torch.cat([torch.zeros(1, 576, 3072), x], -1), tokens=case["num_query_tokens"])


def test_real_widths(real_case):
    folder, name, case = real_case
    out, stored = real_output(case), under(folder, name, f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    assert sum(p.numel() for p in real().parameters()) == case["param_count"]
    close(out[0, :4, :64], stored["head"], "head")
    assert_close(out[0].norm(dim=-1), stored["norms"], rtol=1e-6, atol=1e-5)  # up to 70, where float32 itself has steps of 8e-6
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")
    with pytest.raises(AssertionError): close(real_output(case, 1.01)[0, :4, :64], stored["head"], "head")


# ---- whatever the sizes
def shaken(config=SMALL) -> CAbstractor:
    "Every parameter random, so that none hides behind a 0 or a 1."
    torch.manual_seed(0)
    module = CAbstractor(config).eval()
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn_like(p)*.1)
    if config.standardize: module.fit_statistics(torch.randn(8, config.grid**2, config.d_levels)*2 + 1)
    return module


def features(config=SMALL, batch=2, grid=6): return torch.randn(batch, grid**2, config.d_levels, generator=torch.Generator().manual_seed(1))


CONFIGS = {"as Honeybee": SMALL, "other width": replace(SMALL, hidden=20), "no block": replace(SMALL, depth=0), "prenorm": replace(SMALL, prenorm=True),
           "end tokens": replace(SMALL, eos=2, tokens=11), "one layer": replace(SMALL, mlp_depth=1), "three layers": replace(SMALL, mlp_depth=3),
           "standardized": replace(SMALL, standardize=True), "one level": replace(SMALL, levels=(4,))}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each
@pytest.mark.parametrize("grid", (1, 4, 6, 7))
def test_every_budget_on_every_grid(config, grid):
    module, x = shaken(config), features(config, grid=grid)
    for v in config.budgets(grid):
        out = module(x, tokens=v)
        assert out.shape == (2, v, 24)
        places = out[:, :v - config.eos]
        assert (places[0] - places[1]).abs().max() > 1e-3
    assert len(config.budgets(grid)) == grid


def test_end_tokens_come_last_and_know_no_picture():
    module = shaken(CONFIGS["end tokens"])
    out = module(features())
    assert_close(out[:, 9:], module.eos_tokens.expand(2, -1, -1))


def test_input_stays_as_it_came():
    module, x = shaken(), features()
    before = x.clone()
    module(x)
    assert_close(x, before, rtol=0, atol=0)


def test_positions_of_another_grid_are_resized():
    module = shaken()
    x = torch.zeros(1, 16, 64)
    assert (module(x, tokens=16)[0, 0] - module(x, tokens=16)[0, -1]).abs().max() > 1e-3, "only the positions tell the places apart"


def test_pictures_of_a_batch_do_not_meet():
    module, x = shaken(), features(batch=3)
    assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-4, atol=1e-5)


@each
def test_every_parameter_learns(config):
    module = shaken(config).train()
    out = module(features(config), tokens=36 + config.eos)
    (out * torch.randn_like(out)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7] == []


def test_bfloat16_is_near():
    module, x = shaken(), features(grid=7)
    want = module(x)
    got = module.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, rtol=0, atol=.05*want.abs().max().item())


@each
def test_reset_redoes_the_whole_start(config):
    module, fresh = CAbstractor(config), CAbstractor(config)
    with torch.no_grad():
        for t in module.state_dict().values(): t.fill_(float("nan"))
    for m in (module, fresh):
        torch.manual_seed(3)
        m.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert_close(module.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_by_name_with_another_tower():
    for like in (clip_b32_224(d_llm=64), dinov2_s14(d_llm=64)):
        config = compressor_config("cabstractor", like, depth=1)
        assert build_compressor("cabstractor", config)(torch.randn(1, like.grid**2, like.d_levels)).shape == (1, like.tokens, 64)


def test_config():
    assert CAbstractorConfig.from_dict(SMALL.to_dict()) == SMALL
    for message, fields in (("use one of \\[1, 4, 9, 16, 25, 36\\]", dict(tokens=8)), ("use one of \\[3, 6, 11, 18, 27, 38\\]", dict(eos=2)), ("depth=-1", dict(depth=-1)),
                            ("eos=-1", dict(eos=-1)), ("hidden=0 must be a positive", dict(hidden=0)), ("mlp_depth=0", dict(mlp_depth=0)), ("hidden=8 with depth=0", dict(hidden=8, depth=0))):
        with pytest.raises(ValueError, match=message): replace(SMALL, **fields)
