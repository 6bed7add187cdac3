"TokenPacker: what holds for it alone; the comparison with its reference is in `test_parity_compressors.py`."
from dataclasses import replace

import pytest
import torch
from references import SIZES, small_module
from torch.testing import assert_close

from delta_llava.compressors import tokenpacker
from delta_llava.compressors.base import build_compressor
from delta_llava.compressors.tokenpacker import TokenPacker, TokenPackerConfig

SMALL = SIZES["tokenpacker"].config


def small(**fields) -> TokenPacker:
    torch.manual_seed(0)
    return build_compressor("tokenpacker", replace(SMALL, **fields)).eval()


@pytest.mark.parametrize("grid,levels,d_vision,heads,d_llm", [
    (6, (3,), 16, 1, 40), (7, (1, 2), 32, 4, 24), (12, (0, 5, 9), 24, 8, 8)])
def test_every_budget_of_any_grid_and_width(grid, levels, d_vision, heads, d_llm):
    model = small(grid=grid, tokens=4, levels=levels, d_vision=d_vision, heads=heads, d_llm=d_llm)
    x = torch.randn(2, grid**2, len(levels)*d_vision)
    assert model.config.budgets(grid) == [g*g for g in range(1, grid+1)]
    for tokens in model.config.budgets(grid):
        out = model(x, tokens=tokens)
        assert out.shape == (2, tokens, d_llm) and out.isfinite().all()
    assert model(torch.randn(2, 9, x.shape[-1])).shape == (2, 4, d_llm), "another grid than the config's"


def test_forward_computes_queries_from_the_last_level():
    model = small()
    x = torch.randn(2, 36, 64)
    assert_close(model(x), model.project(x, x[..., 32:], 3))
    assert not torch.allclose(model(x), model.project(x, x[..., :32], 3), atol=1e-6)


def test_one_patch_for_each_token_leaves_queries_and_keys_without_effect():
    model = small()
    model(torch.randn(2, 36, 64), tokens=36).square().sum().backward()
    assert not any(p.grad.any() for part in (model.q, model.k) for p in part.parameters())
    assert model.v[0].weight.grad.any()


def test_the_query_level_is_downsampled_in_float32(monkeypatch):
    dtypes = []

    def record(x, g):
        dtypes.append(x.dtype)
        return x[:, :g*g]
    monkeypatch.setattr(tokenpacker, "interpolate", record)
    small().bfloat16()(torch.randn(1, 36, 64).bfloat16())
    assert dtypes == [torch.float32]


def test_initialization_of_the_reference():
    model = small(d_vision=256, heads=8)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.)
    model.reset_parameters()
    for name, p in model.named_parameters():
        norm = name in ("q.1.weight", "k.3.weight", "v.3.weight")
        if norm or name.endswith("bias"):
            assert (p == int(norm)).all(), name
        elif name != "attend.qkv.weight":
            assert abs(p.std() - .02) < .001 and abs(p.mean()) < .001, name
    limit = (6/(256 + 3*256))**.5  # Xavier over the stacked q, k and v
    assert .99*limit < model.attend.qkv.weight.abs().max() <= limit


def test_sizes_of_the_reference():
    with torch.device("meta"):
        model = build_compressor("tokenpacker", TokenPackerConfig())
    assert sum(p.numel() for p in model.parameters()) == 36_722_688
    assert model(torch.empty(2, 576, 4096, device="meta"), tokens=36).shape == (2, 36, 4096)


def test_refusals():
    model = small_module("tokenpacker", SMALL)
    message = r"not possible for TokenPackerConfig on a 6×6 grid; use one of \[1, 4, 9, 16, 25, 36\]"
    for tokens in (0, 8, 49, True):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 36, 64), tokens=tokens)
    with pytest.raises(ValueError, match="heads=3 must divide d_vision=32"):
        small(heads=3)
    with pytest.raises(ValueError, match="heads=0 must be a positive int"):
        small(heads=0)
