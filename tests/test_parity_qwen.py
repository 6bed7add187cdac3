"Qwen-VL's resampler against its reference's code, and what must hold whatever its sizes."
from dataclasses import replace

import pytest
import torch
from parity import cases, close, info, tensors, under
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.qwen import QwenConfig, QwenResampler
from delta_llava.config import clip_b32_224, dinov2_s14

NAME = "qwen_resampler"
SMALL = QwenConfig(grid=6, tokens=9, levels=(1, 2), d_vision=32, d_llm=24, heads=3)
PLACE = QwenResampler.prefix + "attn_pool."  # where the resampler sits in the reference's checkpoint


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames: metafunc.parametrize("case", cases(metafunc, NAME))


# ---- the reference's numbers
def build(folder, case, times=1., **kwargs) -> QwenResampler:
    ctor = info(folder, NAME)["ctor"]
    assert ctor["ln_eps"] == 1e-6, "fixed in the reference, and here"
    module = QwenResampler(QwenConfig(grid=round(case["tokens"]**.5), tokens=ctor["grid_size"]**2, heads=ctor["num_heads"], levels=(48,),
                                      d_vision=ctor["kv_dim"], d_llm=ctor["embed_dim"], post=False))
    state = {f"{PLACE}{k}": v*times for k, v in under(folder, NAME, "state.").items()}
    module.load_state_dict(from_reference(state, module.state_dict_map, module.prefix))
    return module.eval()


def run(folder, case, times=1.):
    with torch.no_grad(): return build(folder, case, times)(tensors(folder, NAME)[f"in.{case['name']}"])


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
    module, theirs = build(folder, case), under(folder, NAME, "state.")
    back = to_reference(module.state_dict(), module.state_dict_map, module.prefix)
    assert set(back) == {PLACE + k for k in theirs}
    for k, v in theirs.items(): assert_close(back[PLACE + k], v, rtol=0, atol=0)
    assert sum(t.numel() for t in module.state_dict().values()) == info(folder, NAME)["param_count"]
    assert_close(QwenResampler(module.config).resample.pos_embed, theirs["pos_embed"], rtol=0, atol=1e-7)


# ---- whatever the sizes
def shaken(config=SMALL) -> QwenResampler:
    "Every parameter random, so that none hides behind a 0 or a 1."
    torch.manual_seed(0)
    module = QwenResampler(config).eval()
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn_like(p)*.1)
    if config.standardize: module.fit_statistics(torch.randn(8, config.grid**2, config.d_levels)*2 + 1)
    return module


def features(config=SMALL, batch=2, grid=6): return torch.randn(batch, grid**2, config.d_levels, generator=torch.Generator().manual_seed(1))


CONFIGS = {"post": SMALL, "bare": replace(SMALL, post=False), "standardized": replace(SMALL, standardize=True), "as wide as the LLM": replace(SMALL, d_vision=24)}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each
@pytest.mark.parametrize("grid", (1, 2, 6, 7))
def test_every_grid(config, grid):
    module, x = shaken(config), features(config, grid=grid)
    out = module(x)
    assert out.shape == (2, 9, 24)
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert_close(module(x, tokens=9), out)


def test_what_follows_the_resampler():
    module = shaken()
    bare = QwenResampler(replace(SMALL, post=False)).eval()
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith(("ln_post", "out_proj"))})
    assert_close(module(features()), module.out_proj(module.ln_post(bare(features()))))
    names = to_reference(module.state_dict(), module.state_dict_map, module.prefix)
    assert {"transformer.visual.ln_post.weight", "transformer.visual.proj", "transformer.visual.attn_pool.attn.in_proj_weight"} <= set(names)


def test_maps_know_the_picture():
    module = shaken()
    with torch.no_grad(): maps = module.resample.attend.attention_weights(*module.queries_keys_values(features()[..., -32:], 6)[:2])
    assert maps.shape == (2, 3, 9, 36)
    assert (maps[0] - maps[1]).abs().max() > 1e-2
    assert_close(maps.sum(-1), torch.ones(2, 3, 9))


def test_pictures_of_a_batch_do_not_meet():
    module, x = shaken(), features(batch=3)
    assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-4, atol=1e-5)


@each
def test_every_parameter_learns(config):
    module = shaken(config).train()
    (module(features(config)) * torch.randn(2, 9, 24)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6] == []
    assert "resample.pos_embed" not in dict(module.named_parameters()), "places are constants"


def test_bfloat16_is_near():
    module, x = shaken(), features()
    want = module(x)
    got = module.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, rtol=0, atol=.05*want.abs().max().item())


@each
def test_reset_redoes_the_whole_start(config):
    module, fresh = QwenResampler(config), QwenResampler(config)
    with torch.no_grad():
        for t in module.state_dict().values(): t.fill_(float("nan"))
    for m in (module, fresh):
        torch.manual_seed(3)
        m.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert_close(module.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_by_name_with_another_tower():
    for like in (clip_b32_224(d_llm=64), dinov2_s14(d_llm=64)):
        module = build_compressor("qwen", compressor_config("qwen", like))
        assert module(torch.randn(1, like.grid**2, like.d_levels)).shape == (1, like.tokens, 64)


def test_config():
    assert QwenConfig.from_dict(SMALL.to_dict()) == SMALL
    assert [QwenConfig(d_llm=d).n_heads for d in (4096, 5120, 2048, 960, 576, 100)] == [32, 40, 16, 6, 4, 1]
    for message, fields in (("tokens=10 must be a square", dict(tokens=10)), ("tokens=0 must be a positive", dict(tokens=0)), ("tokens=True", dict(tokens=True)),
                            ("heads=5 must divide d_llm=24", dict(heads=5)), ("heads=0 must be a positive", dict(heads=0)), ("d_llm=30 must be a multiple of 4", dict(d_llm=30))):
        with pytest.raises(ValueError, match=message): replace(SMALL, **fields)
    with pytest.raises(ValueError, match="use one of \\[9\\]"): shaken()(features(), tokens=4)
