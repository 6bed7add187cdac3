"MQT: what holds for it alone; the comparison with its reference is in `test_parity_compressors.py`."

from dataclasses import replace

import pytest
import torch
from parity import cases, close, info, tensors
from references import MQT_REFERENCE, SIZES, small_inputs, small_module
from torch import nn
from torch.testing import assert_close

from delta_llava.compressors.base import from_reference
from delta_llava.compressors.mqt import MQT, MQTConfig, QueryAttention

NAME = "mqt_resampler"
SMALL = SIZES["mqt"].config


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc, NAME))


def features(config=SMALL, **options) -> torch.Tensor:
    return small_inputs("mqt", config, **options)["features"]


# ---- the reference's numbers
def test_folded_output(case):
    folder, _, case = case
    folded = MQT_REFERENCE.load(folder, case).fold()
    out = folded(MQT_REFERENCE.inputs(folder, case)["x"])
    close(out, tensors(folder, NAME)[f"out.{case['name']}"], "output")


def test_positions_start_as_the_reference_stores_them(case):
    folder, _, case = case
    stored = tensors(folder, NAME)["state.pos_embed"]
    assert stored.dtype == torch.float16
    module = MQT(MQT_REFERENCE.config(folder, case))
    assert_close(module.resample.pos_embed, stored.float(), rtol=0, atol=0)


def test_the_reference_draws_from_the_training_budgets(pytestconfig):
    "The order of Python's draws is not the same in all its versions."
    drawn = info(pytestconfig.getoption("--parity-dir"), NAME)["training_m_first_20_seed0"]
    budgets = MQTConfig().train_budgets()
    assert len(drawn) == 20 and set(drawn) <= set(budgets)
    assert budgets == list(range(2, 258, 2))


# ---- names
@pytest.mark.parametrize("key", ["proj", "proj.weight"])
def test_the_matrix_of_the_reference_and_of_an_earlier_version(key):
    "Both store it from input to output."
    module = small_module("mqt", SMALL)
    state = dict(module.state_dict())
    state[key] = state.pop("out_proj.weight").T
    again = MQT(SMALL).eval()
    again.load_state_dict(from_reference(state, MQT.state_dict_map))
    assert_close(again(features()), module(features()), rtol=0, atol=0)


# ---- nested budgets
@pytest.mark.parametrize("grid", (1, 3, 4, 6, 7))
def test_budgets_are_nested(grid):
    module = small_module("mqt", SMALL)
    x = features(grid=grid)
    whole = module(x, tokens=16)
    for v in range(1, 17):
        assert_close(module(x, tokens=v), whole[:, :v])


def test_unused_queries_get_no_gradient():
    module = small_module("mqt", SMALL)
    module(features(), tokens=3).sum().backward()
    rows = module.resample.query.grad.abs().sum(1)
    assert (rows[:3] > 0).all() and not rows[3:].any()


# ---- folded
@pytest.mark.parametrize("fields", [{}, dict(standardize=True), dict(heads=1), dict(d_llm=64)], ids=str)
@pytest.mark.parametrize("grid", (4, 6, 7))
def test_folded_is_equal(fields, grid):
    config = replace(SMALL, **fields)
    module = small_module("mqt", config)
    x = features(config, grid=grid)
    folded = module.fold(grid)
    for v in range(1, 17):
        assert_close(folded(x, tokens=v), module(x, tokens=v), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in folded.parameters()) and not folded(x).requires_grad


def test_folded_uses_both_orders():
    "Few tokens average first; many project first."
    config = replace(SMALL, grid=4, tokens=16, heads=2)
    n, c, heads = 16, config.d_vision, config.heads
    assert {v * (heads * n + c) < n * (v + c) for v in range(1, 17)} == {True, False}
    folded = small_module("mqt", config).fold()
    with pytest.raises(ValueError, match=r"fold\(grid=5\) makes others"):
        folded(features(grid=5))


# ---- attention
def test_attention_weights_do_not_depend_on_the_image():
    module = small_module("mqt", SMALL)
    weights = []
    hook = module.resample.attend.register_forward_pre_hook(
        lambda attend, args: weights.append(attend.attention_weights(*args[:2]))
    )
    for seed in (1, 2):
        module(features(seed=seed))
    hook.remove()
    assert weights[0].shape == (1, 4, 9, 36)
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert (weights[0][0, 0, 0] - weights[0][0, 0, 1]).abs().max() > 1e-3, "they differ between queries"


def test_attention_is_that_of_pytorch():
    attend = QueryAttention(32, 4)
    nn.init.normal_(attend.qkv.bias)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": attend.qkv.weight,
            "in_proj_bias": attend.qkv.bias,
            "out_proj.weight": attend.out.weight,
            "out_proj.bias": attend.out.bias,
        }
    )
    q, k, v = torch.randn(1, 5, 32), torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    assert_close(attend(q, k, v), reference(q.expand(3, -1, -1), k, v)[0])
    shared = k[:1].expand(3, -1, -1)
    assert_close(attend(q, k[:1], v), reference(q.expand(3, -1, -1), shared, v)[0])


def test_the_softmax_cancels_the_bias_of_the_keys():
    module = small_module("mqt", SMALL).train()
    module(features(), tokens=16).square().sum().backward()
    q, k, v = module.resample.attend.qkv.bias.grad.chunk(3)
    assert k.abs().max() < 1e-5 < min(q.abs().max(), v.abs().max())
    assert module.ln_k.bias.grad.abs().max() < 1e-5
    assert "resample.pos_embed" not in dict(module.named_parameters()), "positions are constants"


def test_initialization_of_the_reference():
    torch.manual_seed(0)
    module = MQT(replace(SMALL, d_vision=256, d_llm=400, queries=64))
    attend = module.resample.attend
    expected = {
        module.resample.query: 0.02,
        module.out_proj.weight: 400**-0.5,
        attend.out.weight: 0.02,
        attend.qkv.weight: (2 / (256 + 768)) ** 0.5,
    }
    for tensor, std in expected.items():
        assert abs(tensor.std().item() / std - 1) < 0.05
    assert not attend.qkv.bias.any() and not attend.out.bias.any()


# ---- config
def test_train_budgets():
    assert replace(SMALL, queries=9).train_budgets() == [2, 4, 6, 8, 9]
    assert replace(SMALL, queries=1, tokens=1).train_budgets() == [1]


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(tokens=17), "one of 1..16"),
        (dict(tokens=0), "one of 1..16"),
        (dict(tokens=True), "tokens=True"),
        (dict(queries=12), "queries=12 must be a square"),
        (dict(queries=0), "queries=0 must be a positive"),
        (dict(heads=5), "heads=5 must divide d_vision=32"),
        (dict(d_vision=6, heads=2), "multiple of 4"),
    ],
)
def test_refused_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
