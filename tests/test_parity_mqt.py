"MQT against its reference's code, and what must hold whatever its sizes."
from dataclasses import replace
from functools import cache

import pytest
import torch
from hashfill import fill
from parity import cases, close, info, tensors, under
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.mqt import MQT, MQTConfig, QueryAttention
from delta_llava.config import clip_b32_224, dinov2_s14
from delta_llava.grid import sincos_2d

NAME = "mqt_resampler"
SMALL = MQTConfig(grid=6, tokens=9, queries=16, heads=4, levels=(1, 2), d_vision=32, d_llm=24)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames: metafunc.parametrize("case", cases(metafunc, NAME))
    if "real_case" in metafunc.fixturenames: metafunc.parametrize("real_case", cases(metafunc, "real_shapes", where=lambda n, c: c["name"].startswith("mqt_")))


# ---- the reference's numbers
def config_of(folder, case) -> MQTConfig:
    ctor = info(folder, NAME)["ctor"]
    assert ctor["ln_eps"] == 1e-6, "fixed in the reference, and here"
    return MQTConfig(grid=case.get("tgt_size", [24])[0], tokens=case["num_visual_tokens"], queries=ctor["grid_size"]**2, heads=ctor["num_heads"],
                     levels=(23,), d_vision=ctor["kv_dim"], d_llm=ctor["embed_dim"])


def build(folder, case, times=1.) -> MQT:
    module = MQT(config_of(folder, case))
    state = {f"{MQT.outer}{k}": v*times for k, v in under(folder, NAME, "state.").items()}
    module.load_state_dict(from_reference(state, MQT.state_dict_map, MQT.prefix))
    return module.eval()


def run(folder, case, times=1., fold=False):
    module = build(folder, case, times)
    x = tensors(folder, NAME)["in.x_12" if "tgt_size" in case else "in.x"]
    with torch.no_grad(): return (module.fold() if fold else module)(x)


def test_the_fixture_has_cases(pytestconfig):
    assert info(pytestconfig.getoption("--parity-dir"), NAME)["cases"]


@pytest.mark.parametrize("fold", (False, True), ids=("as trained", "folded"))
def test_output(case, fold):
    folder, _, case = case
    out, stored = run(folder, case, fold=fold), tensors(folder, NAME)[f"out.{case['name']}"]
    assert list(out.shape) == case.get("out_shape", list(stored.shape))
    close(out, stored, "output")


def test_one_percent_is_noticed(case):
    folder, _, case = case
    with pytest.raises(AssertionError): close(run(folder, case, 1.01), tensors(folder, NAME)[f"out.{case['name']}"], "output")


def test_state_round_trip_and_counts(case):
    folder, _, case = case
    module, theirs = build(folder, case), under(folder, NAME, "state.")
    assert theirs["pos_embed"].dtype == torch.float16, "read as it is"
    back = to_reference(module.state_dict(), MQT.state_dict_map, MQT.prefix)
    assert set(back) == {MQT.prefix + k for k in theirs}
    for k, v in theirs.items(): assert_close(back[MQT.prefix + k], v.float(), rtol=0, atol=0)
    assert sum(t.numel() for t in module.state_dict().values()) == info(folder, NAME)["param_count"]
    assert sum(p.numel() for p in module.parameters()) == info(folder, NAME)["trainable"]


def test_places_start_as_the_reference_keeps_them(case):
    folder, _, case = case
    assert_close(MQT(config_of(folder, case)).resample.pos_embed, tensors(folder, NAME)["state.pos_embed"].float(), rtol=0, atol=0)


def test_the_reference_draws_from_the_training_budgets(pytestconfig):
    drawn, budgets = info(pytestconfig.getoption("--parity-dir"), NAME)["training_m_first_20_seed0"], MQTConfig().train_budgets()
    assert len(drawn) == 20 and set(drawn) <= set(budgets)  # the order of Python's draws is not the same in all its versions
    assert budgets == list(range(2, 258, 2))


@cache
def real(times=1.) -> MQT:
    with torch.device("meta"): module = MQT()
    shapes = to_reference(module.state_dict(), MQT.state_dict_map)
    state = {k: torch.from_numpy(fill(f"mqt/{k}", tuple(v.shape)))*times for k, v in shapes.items() if k != "pos_embed"}
    state["pos_embed"] = sincos_2d(16, 1024).half()
    module.load_state_dict(from_reference(state, MQT.state_dict_map), assign=True)
    return module.eval()


def real_output(case, times=1.):
    x = torch.from_numpy(fill("mqt/in.x", (1, 576, 1024), kind="input"))
    with torch.no_grad(): return real(times)(torch.cat([torch.zeros(1, 576, 3072), x], -1), tokens=case["num_visual_tokens"])


def test_real_widths(real_case):
    folder, name, case = real_case
    out, stored = real_output(case), under(folder, name, f"out.{case['name']}.")
    assert list(out.shape) == case["out_shape"]
    assert (sum(t.numel() for t in real().state_dict().values()), sum(p.numel() for p in real().parameters())) == (case["param_count"], case["trainable"])
    close(out[0, :4, :64], stored["head"], "head")
    close(out[0].norm(dim=-1), stored["norms"], "norms")
    close(torch.stack([out.mean(), out.std()]), torch.tensor([case["mean"], case["std"]]), "mean and deviation")
    with pytest.raises(AssertionError): close(real_output(case, 1.01)[0, :4, :64], stored["head"], "head")


# ---- whatever the sizes
def shaken(config=SMALL) -> MQT:
    "Every parameter random, so that none hides behind a 0 or a 1."
    torch.manual_seed(0)
    module = MQT(config).eval()
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn_like(p)*.1)
    if config.standardize: module.fit_statistics(torch.randn(8, config.grid**2, config.d_levels)*2 + 1)
    return module


def features(config=SMALL, batch=2, grid=6, seed=1): return torch.randn(batch, grid**2, config.d_levels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", (1, 3, 4, 6, 7))
def test_every_budget_on_every_grid(grid):
    module, x = shaken(), features(grid=grid)
    whole = module(x, tokens=16)
    for v in range(1, 17): assert_close(module(x, tokens=v), whole[:, :v])
    assert whole.shape == (2, 16, 24)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


@pytest.mark.parametrize("config", (SMALL, replace(SMALL, standardize=True), replace(SMALL, heads=1), replace(SMALL, d_llm=64)), ids=str)
@pytest.mark.parametrize("grid", (4, 6, 7))
def test_folded_is_equal(config, grid):
    module, x = shaken(config), features(config, grid=grid)
    folded = module.fold(grid)
    for v in range(1, 17): assert_close(folded(x, tokens=v), module(x, tokens=v), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in folded.parameters()) and not folded(x).requires_grad


def test_folded_takes_both_orders():
    "Few tokens look first and map later; many map first."
    folded = shaken(replace(SMALL, grid=4, tokens=16, heads=2)).fold()
    n, c, heads = 16, 32, 2
    assert {v*(heads*n + c) < n*(v + c) for v in range(1, 17)} == {True, False}
    with pytest.raises(ValueError, match="fold\\(grid=5\\) makes others"): folded(features(grid=5))


def test_maps_know_no_picture():
    module = shaken()
    seen = []
    hook = module.resample.attend.register_forward_pre_hook(lambda m, args: seen.append(m.attention_weights(*args[:2])))
    for seed in (1, 2): module(features(seed=seed))
    hook.remove()
    assert seen[0].shape == (1, 4, 9, 36)
    assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert (seen[0][0, 0, 0] - seen[0][0, 0, 1]).abs().max() > 1e-3, "maps of different queries differ"


def test_attention_is_that_of_pytorch():
    attend, theirs = QueryAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(attend.qkv.bias)
    theirs.load_state_dict({"in_proj_weight": attend.qkv.weight, "in_proj_bias": attend.qkv.bias, "out_proj.weight": attend.out.weight, "out_proj.bias": attend.out.bias})
    q, k, v = torch.randn(1, 5, 32), torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    assert_close(attend(q, k, v), theirs(q.expand(3, -1, -1), k, v)[0])
    assert_close(attend(q, k[:1], v), theirs(q.expand(3, -1, -1), k[:1].expand(3, -1, -1), v)[0])


def test_pictures_of_a_batch_do_not_meet():
    module, x = shaken(), features(batch=3)
    assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    module = shaken().train()
    module(features(), tokens=16).square().sum().backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert silent == ["ln_k.bias"], "a softmax ignores what all keys share"
    third = module.resample.attend.qkv.bias.grad.chunk(3)
    assert third[1].abs().max() < 1e-5 < min(third[0].abs().max(), third[2].abs().max())
    assert not dict(module.named_parameters()).keys() & {"resample.pos_embed"}, "places are constants"


def test_unused_queries_get_no_gradient():
    module = shaken()
    module(features(), tokens=3).sum().backward()
    rows = module.resample.query.grad.abs().sum(1)
    assert (rows[:3] > 0).all() and not rows[3:].any()


def test_bfloat16_is_near():
    module, x = shaken(), features()
    want = module(x)
    got = module.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, rtol=0, atol=.05*want.abs().max().item())


def test_reset_redoes_the_whole_start():
    module, fresh = MQT(SMALL), MQT(SMALL)
    with torch.no_grad():
        for t in module.state_dict().values(): t.fill_(float("nan"))
    for m in (module, fresh):
        torch.manual_seed(3)
        m.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert_close(module.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_start_of_the_reference():
    torch.manual_seed(0)
    module = MQT(replace(SMALL, d_vision=256, d_llm=400, queries=64))
    attend = module.resample.attend
    for tensor, std in ((module.resample.query, .02), (module.out_proj.weight, 400**-.5), (attend.out.weight, .02), (attend.qkv.weight, (2/(256 + 768))**.5)):
        assert abs(tensor.std().item()/std - 1) < .05
    assert not attend.qkv.bias.any() and not attend.out.bias.any()


def test_by_name_with_another_tower():
    for like in (clip_b32_224(d_llm=64), dinov2_s14(d_llm=64)):
        module = build_compressor("mqt", compressor_config("mqt", like))
        assert module(torch.randn(1, like.grid**2, like.d_levels)).shape == (1, like.tokens, 64)


def test_config():
    assert MQTConfig.from_dict(SMALL.to_dict()) == SMALL
    assert replace(SMALL, queries=9).train_budgets() == [2, 4, 6, 8, 9] and replace(SMALL, queries=1, tokens=1).train_budgets() == [1]
    for message, fields in (("one of 1..16", dict(tokens=17)), ("one of 1..16", dict(tokens=0)), ("tokens=True", dict(tokens=True)), ("queries=12 must be a square", dict(queries=12)),
                            ("queries=0 must be a positive", dict(queries=0)), ("heads=5 must divide d_vision=32", dict(heads=5)), ("multiple of 4", dict(d_vision=6, heads=2))):
        with pytest.raises(ValueError, match=message): replace(SMALL, **fields)
