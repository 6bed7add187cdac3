"PruMerge and PruMerge+: the selection of its reference, and what holds for it alone."

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import cases, info, tensors
from references import PRUMERGE_REFERENCE, prumerge_features
from torch import nn
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.mlp import MLP
from delta_llava.compressors.prumerge import (
    PruMerge,
    PruMergeConfig,
    merge_matrix,
    select_adaptive,
    select_fixed,
    spaced_patches,
)
from delta_llava.config import CompressorConfig
from delta_llava.grid import VisionFeatures


def pytest_generate_tests(metafunc):
    wanted = {"stored_case": False, "refused_case": True}
    for name, refused in wanted.items():
        if name in metafunc.fixturenames:
            found = cases(metafunc, "prumerge", where=lambda n, case, r=refused: ("error" in case) == r)
            metafunc.parametrize(name, found)


# ---- the reference's selection
def test_every_kind_has_a_case(pytestconfig):
    found = set()
    for case in info(pytestconfig.getoption("--parity-dir"), "prumerge")["cases"]:
        if "error" not in case:
            found.add(("plus" in case["name"], case["args"]["if_adaptive"]))
    assert found == {(False, False), (False, True), (True, False), (True, True)}


def test_tokens_without_padding(stored_case):
    folder, _, case = stored_case
    model = PRUMERGE_REFERENCE.load(folder, case)
    x = prumerge_features(folder, case)
    out, mask = model.forward_with_mask(x)
    assert mask.all() and torch.equal(model(x), out)


def test_selection(stored_case):
    folder, name, case = stored_case
    model = PRUMERGE_REFERENCE.load(folder, case)
    x = prumerge_features(folder, case)
    kept, mask = model.select(x)
    stored = {key: tensors(folder, name)[f"mid.{case['name']}.{key}"] for key in ("idx", "compl")}
    assert torch.equal(kept, stored["idx"]) and mask.all()
    assert kept.shape[1] == case["kept"]
    assert [len(row.unique()) for row in kept] == case["distinct"]
    if model.config.adaptive:
        order = select_adaptive(x.cls_attention, model.config.plus, batch_statistics=True)[0]
    else:
        order = select_fixed(x.cls_attention, case["kept"], model.config.plus)
    rest = order[:, case["kept"] :]
    assert torch.equal(rest, stored["compl"]) and rest.shape[1] == case["complement"]


def test_selection_notices_a_swap(stored_case):
    folder, name, case = stored_case
    x = prumerge_features(folder, case)
    attention = x.cls_attention.clone()
    strongest = attention.argsort(dim=1, descending=True)[:, :2]
    attention.scatter_(1, strongest, attention.gather(1, strongest).flip(1))
    swapped = VisionFeatures(x.levels, x.grid, attention, x.keys)
    kept, _ = PRUMERGE_REFERENCE.load(folder, case).select(swapped)
    assert not torch.equal(kept, tensors(folder, name)[f"mid.{case['name']}.idx"])


def test_what_the_reference_cannot_do(refused_case):
    "Adaptive PruMerge+ of a batch: here it is that of each image."
    folder, _, case = refused_case
    x = prumerge_features(folder, case)
    model = PruMerge(levels=(0,), d_vision=16, d_llm=8, plus=True, adaptive=True).eval()
    out, mask = model.forward_with_mask(x)
    assert len(x.levels) > 1 and mask.shape == out.shape[:2]
    for i, v in enumerate(mask.sum(1)):
        assert_close(model(image(x, i)), out[i : i + 1, :v], rtol=0, atol=1e-5)


# ---- its own rules
def some(b=3, grid=6, c=8, levels=2) -> VisionFeatures:
    "Random features whose attention has outliers, more of them in later images."
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(b, grid**2 + 1, generator=random) * (1 + torch.arange(b)[:, None])
    patches = torch.randn(b, grid**2, levels * c, generator=random)
    keys = torch.randn(b, grid**2, c, generator=random)
    return VisionFeatures(patches, grid, scores.softmax(-1)[:, 1:], keys)


def image(x: VisionFeatures, i: int) -> VisionFeatures:
    "One image of a batch."
    return VisionFeatures(x.levels[i : i + 1], x.grid, x.cls_attention[i : i + 1], x.keys[i : i + 1])


def tiny(grid=6, c=8, tokens=5, **fields) -> PruMerge:
    torch.manual_seed(0)
    return PruMerge(grid=grid, tokens=tokens, levels=(0, 1), d_vision=c, d_llm=12, **fields).eval()


def plain_tokens(x: VisionFeatures, tokens: int, plus: bool, c: int, neighbors=32) -> torch.Tensor:
    "Tokens before the MLP of one image, patch by patch as the paper and the code describe them."
    attention = x.cls_attention[0]
    keys = nn.functional.normalize(x.keys[0], dim=-1)
    patches = x.levels[0, :, -c:]
    n = x.grid**2
    spaced = []
    if plus and tokens > 2:
        step = n // ((tokens - 1) // 2)
        spaced = list(range(step // 2, n - 1, step))
    kept = attention.argsort(descending=True).tolist()[: tokens - 1 - len(spaced)] + spaced
    rest = sorted(set(range(n)) - set(kept))
    rest = rest[len(kept) - len(set(kept)) :]
    out = []
    for position, i in enumerate(kept):
        others = kept[:position] + kept[position + 1 :] + rest
        nearest = (keys[others] @ keys[i]).topk(min(neighbors, len(others))).indices.tolist()
        out.append(patches[i] + sum(attention[others[j]] * patches[others[j]] for j in nearest))
    out.append(sum((attention[j] * patches[j] for j in rest), torch.zeros(c)))
    return torch.stack(out)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("grid,neighbors", [(2, 32), (3, 3), (3, 8), (5, 32), (6, 3)])
def test_every_budget_equals_the_plain_form(grid, neighbors, plus):
    model = tiny(grid, plus=plus, tokens=2, neighbors=neighbors)
    x = some(2, grid)
    assert model.config.budgets(grid) == list(range(2, grid * grid + 1))
    for tokens in model.config.budgets(grid):
        out, mask = model.forward_with_mask(x, tokens=tokens)
        assert out.shape == (2, tokens, 12) and mask.all()
        for i in range(2):
            expected = model.mlp(plain_tokens(image(x, i), tokens, plus, 8, neighbors))
            assert_close(out[i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "share", [1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 7, 1 / 8, 1 / 9, 1 / 16, 1 / 18, 0.3, 0.4, 0.15, 0.09]
)
def test_spaced_patches_are_the_references(share):
    "Its call has a share of the patches where ours has a budget."
    step = int(1 / share)
    spaced = list(range(step // 2, 575, step))
    assert spaced_patches(576, int(576 * share) + len(spaced)).tolist() == spaced


def test_a_patch_that_is_kept_twice_costs_another():
    attention = torch.zeros(1, 36)
    attention[0, [3, 9, 20]] = torch.tensor([0.3, 0.2, 0.1])
    order = select_fixed(attention, 6, plus=True)[0].tolist()  # spaced: 6, 18, 30
    assert order[:6] == [3, 9, 20, 6, 18, 30]
    attention[0, 6] = 0.4
    order = select_fixed(attention, 6, plus=True)[0].tolist()
    assert order[:6] == [6, 3, 9, 6, 18, 30] and 0 not in order and len(order) == 36
    keys = torch.randn(1, 36, 4)
    matrix = merge_matrix(attention, keys, torch.tensor([order]), torch.tensor([6]), 6)[0]
    assert not matrix[:, 0].any()


@pytest.mark.parametrize("plus", [False, True])
def test_images_of_a_batch_are_independent(plus):
    x = some(5)
    model = tiny(adaptive=True, plus=plus)
    out, mask = model.forward_with_mask(x)
    kept, kept_mask = model.select(x)
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 1, "a test of padding needs images that differ"
    assert torch.equal(lengths, kept_mask.sum(1) + 1) and mask.shape[1] == lengths.max()
    assert not out[~mask].any() and torch.equal(model(x), out)
    for i, v in enumerate(lengths.tolist()):
        assert mask[i, :v].all() and not mask[i, v:].any()
        alone, alone_mask = model.forward_with_mask(image(x, i))
        assert alone_mask.all()
        assert_close(alone[0], out[i, :v], rtol=0, atol=1e-5)
        assert torch.equal(model.select(image(x, i))[0][0], kept[i, : v - 1])
        if not plus:  # the same number as a fixed budget
            assert_close(tiny()(image(x, i), tokens=v)[0], out[i, :v], rtol=0, atol=1e-5)


def test_the_adaptive_number_is_that_of_the_rule():
    x = some(5)
    numbers = tiny(adaptive=True).select(x)[1].sum(1).tolist()
    for attention, number in zip(x.cls_attention.numpy(), numbers, strict=True):
        q1, q3 = np.percentile(attention, [25, 75])
        assert number == max(1, int((attention > q3 + 1.5 * (q3 - q1)).sum()))
    pooled = x.cls_attention.numpy().ravel()
    q1, q3 = np.percentile(pooled, [25, 75])
    share = (pooled > q3 + 1.5 * (q3 - q1)).mean()
    of_the_batch = tiny(adaptive=True, batch_statistics=True).select(x)[1].sum(1)
    assert (of_the_batch == int(36 * share)).all()


def test_spaced_patches_of_an_adaptive_number():
    x = some(5, grid=12)
    outliers, outlier_mask = tiny(12, adaptive=True).select(x)
    kept, kept_mask = tiny(12, adaptive=True, plus=True).select(x)
    for i, k in enumerate(outlier_mask.sum(1).tolist()):
        top = outliers[i, :k].tolist()
        step = int(int(1 / (k / 144)) / 3)
        spaced = [p for p in range(0, 143, step) if p not in top]
        assert kept[i][kept_mask[i]].tolist() == top + spaced


def test_without_an_outlier_one_patch_is_kept():
    x = replace(some(2), cls_attention=torch.full((2, 36), 1 / 37))
    for plus in (False, True):
        kept, mask = tiny(adaptive=True, plus=plus).select(x)
        assert kept[:, 0].tolist() == [0, 0] and mask.any(1).all()
    assert select_adaptive(x.cls_attention, batch_statistics=True)[1].tolist() == [1, 1]


def test_a_budget_in_the_call_overrides_adaptive():
    assert tiny(adaptive=True)(some(), tokens=7).shape[1] == 7


def test_gradients_reach_the_query_level_and_every_weight():
    x = some()
    model = tiny(plus=True, tokens=9)
    levels = x.levels.requires_grad_()
    model(x).square().sum().backward()
    assert levels.grad[..., -8:].any() and not levels.grad[..., :8].any()
    for name, p in model.named_parameters():
        assert p.grad.any(), name


def test_half_precision_keeps_the_same_patches():
    x = some()
    model = tiny(plus=True, tokens=9)
    exact = model(x)
    expected, _ = model.select(x)
    half = replace(x, levels=x.levels.bfloat16())
    out = model.bfloat16()(half)
    assert out.dtype == torch.bfloat16 and torch.equal(model.select(half)[0], expected)
    assert_close(out.float(), exact, rtol=0.1, atol=0.1)


def test_a_fixed_budget_needs_no_values():
    "It runs on the meta device, so it never waits for a GPU."
    with torch.device("meta"):
        model = tiny(plus=True)
        x = VisionFeatures(torch.empty(2, 36, 16), 6, torch.empty(2, 36), torch.empty(2, 36, 8))
        assert model(x, tokens=9).shape == (2, 9, 12)


def test_its_weights_are_llavas():
    model = tiny()
    reference_state = {
        f"model.mm_projector.{k}": torch.randn_like(v) for k, v in model.mlp.state_dict().items()
    }
    model.load_state_dict(from_reference(reference_state, PruMerge.state_dict_map, PruMerge.prefix))
    back = to_reference(model.state_dict(), PruMerge.state_dict_map, PruMerge.prefix)
    assert back.keys() == reference_state.keys() and all(
        torch.equal(back[k], reference_state[k]) for k in reference_state
    )
    with torch.device("meta"):
        for cls in (PruMerge, MLP):
            assert sum(p.numel() for p in cls().parameters()) == 20_979_712


def test_by_name():
    like = CompressorConfig(grid=6, tokens=9, levels=(0, 1), d_vision=8, d_llm=12)
    for name, plus in (("prumerge", False), ("prumerge+", True)):
        model = build_compressor(name, compressor_config(name, like).to_dict())
        assert type(model) is PruMerge and model.config.plus is plus and model.requires == ("attention",)
        assert model(some()).shape == (3, 9, 12)


def test_the_spelling_of_an_earlier_version_loads():
    old = tiny().config.to_dict()
    old["neighbours"] = old.pop("neighbors")
    assert PruMergeConfig.from_dict(old) == tiny().config


@pytest.mark.parametrize("tokens", [0, 1, 37, -3, True])
def test_impossible_budgets(tokens):
    with pytest.raises(ValueError, match=r"use one of 2\.\.36"):
        tiny()(some(), tokens=tokens)


def test_features_without_attention_are_refused():
    x = some()
    for lacking in (x.levels, replace(x, cls_attention=None), replace(x, keys=None)):
        with pytest.raises(ValueError, match="attention=True"):
            tiny()(lacking)
    with pytest.raises(ValueError, match="neighbors=0"):
        PruMergeConfig(neighbors=0)
