"QueCC: what holds for it alone; the comparison with its reference is in `test_parity_compressors.py`."
from dataclasses import replace

import pytest
import torch
from references import SIZES, small_inputs, small_module
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.compressors.quecc import QueCC, QueCCConfig
from delta_llava.config import clip_b32_384

SMALL = SIZES["quecc"].config


def small(**fields) -> QueCC:
    torch.manual_seed(0)
    return build_compressor("quecc", replace(SMALL, **fields)).eval()


def given(batch=2, grid=6, channels=64, d_text=24):
    "Features and question embeddings."
    torch.manual_seed(1)
    features = torch.randn(batch, grid**2, channels)
    return features, torch.randn(batch, 1, d_text)


@pytest.mark.parametrize("grid,levels,d_vision,heads,d_llm,d_text", [
    (6, (3,), 16, 1, 40, None), (7, (1, 2), 32, 4, 24, 10), (12, (0, 5, 9), 24, 8, 8, None)])
def test_every_budget_of_any_grid_and_width(grid, levels, d_vision, heads, d_llm, d_text):
    x, text = given(grid=grid, channels=len(levels)*d_vision, d_text=d_text or d_llm)
    fields = dict(grid=grid, levels=levels, d_vision=d_vision, heads=heads, d_llm=d_llm, d_text=d_text)
    for g in range(1, grid+1):
        if grid % g:
            with pytest.raises(ValueError, match="as the kernel of QueCCConfig requires; use one of"):
                small(tokens=g*g, **fields)
            continue
        model = small(tokens=g*g, **fields)
        assert model.config.budgets(grid) == [g*g] and model.config.kernel == grid//g
        for out in (model(x, text=text), model(x, tokens=g*g, text=text)):
            assert out.shape == (2, g*g, d_llm) and out.isfinite().all()


def test_another_grid_has_the_budget_that_the_kernel_makes_of_it():
    model = small()
    x, text = given(grid=8)
    message = r"tokens=9 is not possible for QueCCConfig on a 8×8 grid; use one of \[16\]"
    with pytest.raises(ValueError, match=message):
        model(x, text=text)
    assert model(x, tokens=16, text=text).shape == (2, 16, 24)
    with pytest.raises(ValueError, match="a kernel of 2×2 patches does not divide a 7×7 grid"):
        model(x[:, :49], text=text)


def test_forward_computes_queries_from_the_last_level():
    model = small()
    x, text = given()
    assert_close(model(x, text=text), model.mlp(model.compress(x, x[..., 32:], text)))
    other = model.mlp(model.compress(x, x[..., :32], text))
    assert not torch.allclose(model(x, text=text), other, atol=1e-6)


def test_tokens_depend_on_the_question_of_their_row():
    model = small()
    x, text = given()
    change = (model(x, text=text) - model(x, text=text.flip(0))).abs().amax((1, 2))
    assert change.min() > 1e-4
    other_second_row = torch.cat([text[:1], torch.randn(1, 1, 24)])
    assert_close(model(x, text=other_second_row)[0], model(x, text=text)[0])


def test_a_question_of_another_precision():
    model = small_module("quecc", SMALL)
    inputs = small_inputs("quecc", SMALL)
    x, text = inputs["features"], inputs["text"]
    exact = model(x, text=text)
    model.bfloat16()
    for question in (text, text.bfloat16()):
        out = model(x.bfloat16(), text=question)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < .03*exact.norm()


def test_initialization_of_the_reference():
    "PyTorch's: uniform up to 1/√fan_in; Xavier for the attention's q, k, v; no biases in the attention."
    model = small(d_vision=128, heads=8)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.)
    model.reset_parameters()
    fan_in = {
        model.text[0]: 24, model.q[0]: 128, model.k[0]: 256, model.v[2]: 128, model.shrink: 4,
        model.attend.out: 128, model.mlp[0]: 128, model.mlp[2]: 24,
    }
    for module, inputs in fan_in.items():
        limit = inputs**-.5
        assert module.weight.abs().max() <= limit
        assert abs(module.weight.std()*3**.5/limit - 1) < .06, "uniform, not normal"
        if module is not model.attend.out:
            assert 0 < module.bias.abs().max() <= limit
    xavier = (6/(128 + 3*128))**.5
    assert .99*xavier < model.attend.qkv.weight.abs().max() <= xavier
    assert not model.attend.qkv.bias.any() and not model.attend.out.bias.any()
    for norm in (model.text[1], model.q[3], model.k[3], model.v[3]):
        assert (norm.weight == 1).all() and not norm.bias.any()


def test_sizes_of_the_reference():
    with torch.device("meta"):
        model = build_compressor("quecc", QueCCConfig(tokens=36))
        out = model(torch.empty(2, 576, 4096), text=torch.empty(2, 1, 4096))
    assert sum(p.numel() for p in model.parameters()) == 41_988_096
    assert out.shape == (2, 36, 4096)


def test_config_by_name():
    config = compressor_config("quecc", clip_b32_384(tokens=16))
    assert (config.kernel, config.budgets(12)) == (3, [16])


def test_refusals():
    model = small()
    x, text = given()
    message = r"QueCC reads the question, so it needs a question embedding \(2, 1, 24\)"
    for wrong in (None, text[:, 0], text[:1], text[..., :8], torch.cat([text, text], 1)):
        with pytest.raises(ValueError, match=message):
            model(x, text=wrong)
    for tokens in (0, 4, 36, True):
        with pytest.raises(ValueError, match=r"not possible for QueCCConfig on a 6×6 grid; use one of \[9\]"):
            model(x, tokens=tokens, text=text)
    with pytest.raises(ValueError, match=r"tokens=16 .* use one of \[1, 4, 9, 36\]"):
        small(tokens=16)
    for wrong in (dict(grid=0), dict(d_text=0), dict(heads=3), dict(tokens=0), dict(tokens=True)):
        with pytest.raises(ValueError):
            small(**wrong)
