"Qwen-VL's resampler: what holds for it alone; see `test_parity_compressors.py` for the comparison."

from dataclasses import replace

import pytest
import torch
from parity import cases, tensors
from references import QWEN_REFERENCE, SIZES, small_inputs, small_module
from torch.testing import assert_close

from delta_llava.compressors.base import from_reference, to_reference
from delta_llava.compressors.qwen import QwenConfig, QwenResampler

SMALL = SIZES["qwen"].config


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc, "qwen_resampler"))


def features(**options) -> torch.Tensor:
    return small_inputs("qwen", SMALL, **options)["features"]


def test_positions_are_those_of_the_reference(case):
    folder, name, case = case
    module = QwenResampler(QWEN_REFERENCE.config(folder, case))
    assert_close(module.resample.pos_embed, tensors(folder, name)["state.pos_embed"], rtol=0, atol=1e-7)


def test_what_follows_the_resampler():
    module = small_module("qwen", SMALL)
    bare = QwenResampler(replace(SMALL, post=False)).eval()
    state = {k: v for k, v in module.state_dict().items() if not k.startswith(("ln_post", "out_proj"))}
    bare.load_state_dict(state)
    assert_close(module(features()), module.out_proj(module.ln_post(bare(features()))))
    reference_state = to_reference(module.state_dict(), module.state_dict_map, module.prefix)
    inner = ("ln_post.weight", "proj", "attn_pool.attn.in_proj_weight")
    assert {f"transformer.visual.{key}" for key in inner} <= set(reference_state)
    assert_close(reference_state["transformer.visual.proj"], module.out_proj.weight.T, rtol=0, atol=0)


def test_the_square_matrix_of_an_earlier_version_is_transposed():
    "Its shape does not tell; its name does."
    module = small_module("qwen", SMALL)
    old = dict(module.state_dict())
    old["proj.weight"] = old.pop("out_proj.weight").T
    for state in (old, from_reference(old, module.legacy_state_dict_map)):
        again = QwenResampler(SMALL).eval()
        again.load_state_dict(state)
        assert_close(again(features()), module(features()), rtol=0, atol=0)


def test_attention_weights_depend_on_the_image():
    module = small_module("qwen", SMALL)
    q, k, _ = module.queries_keys_values(features()[..., -32:], 6)
    with torch.no_grad():
        weights = module.resample.attend.attention_weights(q, k)
    assert weights.shape == (2, 3, 9, 36)
    assert (weights[0] - weights[1]).abs().max() > 1e-2
    assert_close(weights.sum(-1), torch.ones(2, 3, 9))


def test_positions_are_constants():
    assert "resample.pos_embed" not in dict(small_module("qwen", SMALL).named_parameters())


def test_heads_of_the_reference():
    widths = (4096, 5120, 2048, 960, 576, 100)
    assert [QwenConfig(d_llm=d).n_heads for d in widths] == [32, 40, 16, 6, 4, 1]


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(tokens=10), "tokens=10 must be a square"),
        (dict(tokens=0), "tokens=0 must be a positive"),
        (dict(tokens=True), "tokens=True"),
        (dict(heads=5), "heads=5 must divide d_llm=24"),
        (dict(heads=0), "heads=0 must be a positive"),
        (dict(d_llm=30), "d_llm=30 must be a multiple of 4"),
    ],
)
def test_refused_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


def test_another_budget_is_refused():
    with pytest.raises(ValueError, match=r"use one of \[9\]"):
        small_module("qwen", SMALL)(features(), tokens=4)
