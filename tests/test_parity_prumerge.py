"""PruMerge and PruMerge+: every case of the fixture `prumerge` in `--parity-dir`, and what a fixture cannot tell."""
from dataclasses import replace

import pytest
import torch
from parity import cases, close, info, tensors
from torch import nn
from torch.testing import assert_close

from delta_llava.compressors.base import build_compressor, compressor_config, from_reference, to_reference
from delta_llava.compressors.mlp import MLP, MLPConfig
from delta_llava.compressors.prumerge import PruMerge, PruMergeConfig, select_fixed, select_adaptive, merge_matrix, spaced_patches
from delta_llava.config import CompressorConfig
from delta_llava.grid import VisionFeatures
from delta_llava.tower import _cls_attention


def pytest_generate_tests(metafunc):
    wanted = {"stored": lambda n, c: "error" not in c, "refused": lambda n, c: "error" in c}
    for kind, where in wanted.items():
        if f"{kind}_case" in metafunc.fixturenames: metafunc.parametrize(f"{kind}_case", cases(metafunc, "prumerge", where=where))


def test_cases_were_found(request):
    "A folder without this fixture must not pass empty."
    found = [c for c in info(request.config.getoption("--parity-dir"), "prumerge")["cases"] if "error" not in c]
    assert {("plus" in c["name"], c["args"]["if_adaptive"]) for c in found} == {(plus, adaptive) for plus in (False, True) for adaptive in (False, True)}


class Block(nn.Module):
    "A block whose projections are the stored queries and keys."
    def __init__(self, q, k):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.Identity(), nn.Module()
        self.self_attn.q_proj, self.self_attn.k_proj = (Given(x) for x in (q[:, 0], k))


class Given(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x
    def forward(self, _): return self.x


def features(folder, case, times=1.) -> VisionFeatures:
    "Patch tokens, attention and keys of a case, by our own attention from the stored queries and keys."
    stored, b = tensors(folder, "prumerge"), case["name"].split("_")[0]
    q, k = stored[f"in.{b}.q"], stored[f"in.{b}.k"]
    attention, keys = _cls_attention(Block(q, k), k, k.shape[1] - 1)
    close(attention, stored[f"mid.{b}.cls_attn"], "attention")
    return VisionFeatures(stored[f"in.{b}.feats"]*times, 24, attention, keys)


def build(case, width) -> PruMerge:
    "PruMerge whose MLP is an identity, so that its output is what the reference stores: tokens before the MLP."
    adaptive = case["args"]["if_adaptive"]
    config = PruMergeConfig(levels=(0,), d_vision=width, d_llm=width, depth=1, plus="plus" in case["fn"], adaptive=adaptive, batch_statistics=True,
                            tokens=73 if adaptive else case["out_shape"][1])
    model = PruMerge(config).eval()
    model.load_state_dict({"mlp.0.weight": torch.eye(width), "mlp.0.bias": torch.zeros(width)})
    return model


def test_tokens(stored_case):
    folder, name, case = stored_case
    x = features(folder, case)
    model = build(case, x.levels.shape[-1])
    out, real = model.forward_with_mask(x)
    assert list(out.shape) == case["out_shape"] and real.all()
    close(out, tensors(folder, name)[f"out.{case['name']}"], "tokens")
    assert torch.equal(model(x), out)


def test_selection(stored_case):
    folder, name, case = stored_case
    x = features(folder, case)
    model = build(case, x.levels.shape[-1])
    kept, real = model.select(x)
    stored = {what: tensors(folder, name)[f"mid.{case['name']}.{what}"] for what in ("idx", "compl")}
    assert torch.equal(kept, stored["idx"]) and real.all()
    assert kept.shape[1] == case["kept"] and [len(row.unique()) for row in kept] == case["distinct"]
    order = model._select(x, None if model.config.adaptive else model.config.tokens)[0]
    rest = order[:, case["kept"]:]
    assert torch.equal(rest, stored["compl"]) and rest.shape[1] == case["complement"]


def test_tokens_notice_one_percent(stored_case):
    "There is no state; the features are scaled instead."
    folder, name, case = stored_case
    x = features(folder, case, 1.01)
    with pytest.raises(AssertionError): close(build(case, x.levels.shape[-1])(x), tensors(folder, name)[f"out.{case['name']}"], "tokens")


def test_selection_notices_a_swap(stored_case):
    folder, name, case = stored_case
    x = features(folder, case)
    a = x.cls_attention.clone()
    strongest = a.argsort(dim=1, descending=True)[:, :2]
    a.scatter_(1, strongest, a.gather(1, strongest).flip(1))
    kept, _ = build(case, x.levels.shape[-1]).select(replace(x, cls_attention=a))
    assert not torch.equal(kept, tensors(folder, name)[f"mid.{case['name']}.idx"])


def test_what_the_reference_cannot_do(refused_case):
    "Adaptive PruMerge+ of a batch: here it is that of each picture."
    folder, name, case = refused_case
    x = features(folder, {"name": case["name"]})
    model = PruMerge(PruMergeConfig(levels=(0,), d_vision=16, d_llm=8, plus=True, adaptive=True)).eval()
    out, real = model.forward_with_mask(x)
    assert len(x.levels) > 1 and real.shape == out.shape[:2]
    for i, v in enumerate(real.sum(1)): assert_close(model(image(x, i)), out[i:i+1, :v], rtol=0, atol=1e-5)


# ---- its own rules

def some(b=3, grid=6, c=8, levels=2, seed=0, peaks=4.) -> VisionFeatures:
    "Random features whose attention has outliers, as many as the picture likes."
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(b, grid**2 + 1, generator=random) * (1 + torch.arange(b)[:, None]) * peaks/4
    return VisionFeatures(torch.randn(b, grid**2, levels*c, generator=random), grid, scores.softmax(-1)[:, 1:], torch.randn(b, grid**2, c, generator=random))


def image(x, i) -> VisionFeatures:
    return VisionFeatures(*(t[i:i+1] if torch.is_tensor(t) else t for t in (x.levels, x.grid, x.cls_attention, x.keys)))


def tiny(grid=6, c=8, tokens=5, **kwargs) -> PruMerge:
    torch.manual_seed(0)
    return PruMerge(PruMergeConfig(grid=grid, tokens=tokens, levels=(0, 1), d_vision=c, d_llm=12, **kwargs)).eval()


def by_hand(x, tokens, plus, c, neighbors=32) -> torch.Tensor:
    "Tokens before the MLP of one picture, patch by patch as the paper and the code say."
    a, keys, f, n = x.cls_attention[0], nn.functional.normalize(x.keys[0], dim=-1), x.levels[0, :, -c:], x.grid**2
    every = []
    if plus and tokens > 2:
        step = n // ((tokens - 1)//2)
        every = list(range(step//2, n - 1, step))
    kept = a.argsort(descending=True).tolist()[:tokens - 1 - len(every)] + every
    rest = sorted(set(range(n)) - set(kept))
    rest = rest[len(kept) - len(set(kept)):]
    out = []
    for slot, i in enumerate(kept):
        others = kept[:slot] + kept[slot+1:] + rest
        near = (keys[others] @ keys[i]).topk(min(neighbors, len(others))).indices.tolist()
        out.append(f[i] + sum(a[others[j]]*f[others[j]] for j in near))
    return torch.stack([*out, sum((a[j]*f[j] for j in rest), torch.zeros(c))])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("grid,neighbors", [(2, 32), (3, 3), (3, 8), (5, 32), (6, 3)])
def test_every_budget_of_every_grid(grid, neighbors, plus):
    model, x = tiny(grid, plus=plus, tokens=2, neighbors=neighbors), some(2, grid)
    for tokens in model.config.budgets(grid):
        out, real = model.forward_with_mask(x, tokens=tokens)
        assert out.shape == (2, tokens, 12) and real.all()
        for i in range(2): assert_close(out[i], model.mlp(by_hand(image(x, i), tokens, plus, 8, neighbors)), rtol=0, atol=1e-5)
    assert model.config.budgets(grid) == list(range(2, grid*grid + 1))


@pytest.mark.parametrize("share", [1/2, 1/3, 1/4, 1/5, 1/7, 1/8, 1/9, 1/16, 1/18, .3, .4, .15, .09])
def test_spaced_patches_are_the_references(share):
    "Its call has a share of the patches where ours has a budget."
    step, top = int(1/share), int(576*share)
    theirs = list(range(step//2, 575, step))
    assert spaced_patches(576, top + len(theirs)).tolist() == theirs


def test_a_patch_that_is_there_twice_costs_another():
    a = torch.zeros(1, 36)
    a[0, [3, 9, 20]] = torch.tensor([.3, .2, .1])
    order = select_fixed(a, 6, plus=True)[0].tolist()  # spaced: 6, 18, 30
    assert order[:6] == [3, 9, 20, 6, 18, 30]
    a[0, 6] = .4
    order = select_fixed(a, 6, plus=True)[0].tolist()
    assert order[:6] == [6, 3, 9, 6, 18, 30] and 0 not in order and len(order) == 36
    matrix = merge_matrix(a, torch.randn(1, 36, 4), torch.tensor([order]), torch.tensor([6]), 6)[0]
    assert not matrix[:, 0].any()


@pytest.mark.parametrize("plus", [False, True])
def test_each_picture_of_a_batch_stands_for_itself(plus):
    x, model = some(5), tiny(adaptive=True, plus=plus)
    out, real = model.forward_with_mask(x)
    kept, mask = model.select(x)
    assert len(set(real.sum(1).tolist())) > 1, "a test of padding needs pictures that differ"
    assert torch.equal(real.sum(1), mask.sum(1) + 1) and real.shape[1] == real.sum(1).max()
    assert not out[~real].any() and torch.equal(model(x), out)
    for i, v in enumerate(real.sum(1).tolist()):
        assert real[i, :v].all() and not real[i, v:].any()
        alone, own = model.forward_with_mask(image(x, i))
        assert own.all()
        assert_close(alone[0], out[i, :v], rtol=0, atol=1e-5)
        assert torch.equal(model.select(image(x, i))[0][0], kept[i, :v-1])
    if plus: return
    for i, v in enumerate(real.sum(1).tolist()): assert_close(tiny()(image(x, i), tokens=v)[0], out[i, :v], rtol=0, atol=1e-5)  # the same number, asked for


def test_adaptive_number_is_that_of_the_rule():
    import numpy as np
    x = some(5)
    for a, kept in zip(x.cls_attention.numpy(), tiny(adaptive=True).select(x)[1].sum(1).tolist()):
        q1, q3 = np.percentile(a, [25, 75])
        assert kept == max(1, int((a > q3 + 1.5*(q3 - q1)).sum()))
    pooled = x.cls_attention.numpy().ravel()
    q1, q3 = np.percentile(pooled, [25, 75])
    share = (pooled > q3 + 1.5*(q3 - q1)).mean()
    assert (tiny(adaptive=True, batch_statistics=True).select(x)[1].sum(1) == int(36*share)).all()


def test_spaced_patches_of_an_adaptive_number():
    x = some(5, grid=12)
    plain, plus = (tiny(12, adaptive=True, plus=plus).select(x) for plus in (False, True))
    for i, k in enumerate(plain[1].sum(1).tolist()):
        top = plain[0][i, :k].tolist()
        every = [p for p in range(0, 143, int(int(1/(k/144))/3)) if p not in top]
        assert plus[0][i][plus[1][i]].tolist() == top + every


def test_nothing_stands_out():
    x = replace(some(2), cls_attention=torch.full((2, 36), 1/37))
    for plus in (False, True):
        kept, real = tiny(adaptive=True, plus=plus).select(x)
        assert kept[:, 0].tolist() == [0, 0] and real.any(1).all()
    assert select_adaptive(x.cls_attention, batch_statistics=True)[1].tolist() == [1, 1]


def test_a_budget_in_the_call_ends_adaptivity():
    assert tiny(adaptive=True)(some(), tokens=7).shape[1] == 7


def test_gradients_reach_patches_and_every_weight():
    x, model = some(), tiny(plus=True, tokens=9)
    levels = x.levels.requires_grad_()
    model(x).square().sum().backward()
    assert levels.grad[..., -8:].any() and not levels.grad[..., :8].any()  # the query level alone is read
    for name, p in model.named_parameters(): assert p.grad.any(), name


def test_half_precision_keeps_the_same_patches():
    x, model = some(), tiny(plus=True, tokens=9)
    exact = model(x)
    half = replace(x, levels=x.levels.bfloat16())
    out = model.bfloat16()(half)
    assert out.dtype == torch.bfloat16
    assert torch.equal(model.select(half)[0], model.select(x)[0])
    assert_close(out.float(), exact, rtol=.1, atol=.1)


def test_standardized_features():
    x, model = some(), tiny(standardize=True)
    model.fit_statistics(x.levels)
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("mlp")})
    assert_close(model(x), plain(replace(x, levels=(x.levels - x.levels.flatten(0, 1).mean(0)) / x.levels.flatten(0, 1).std(0))), rtol=0, atol=1e-5)


def test_no_sync_and_no_data_on_meta():
    "A fixed budget never looks at a number: it runs where there are none."
    with torch.device("meta"):
        model = tiny(plus=True)
        assert model(VisionFeatures(torch.empty(2, 36, 16), 6, torch.empty(2, 36), torch.empty(2, 36, 8)), tokens=9).shape == (2, 9, 12)


def test_its_weights_are_llavas():
    theirs = {f"model.mm_projector.{k}": torch.randn_like(v) for k, v in tiny().mlp.state_dict().items()}
    model = tiny()
    model.load_state_dict(from_reference(theirs, PruMerge.state_dict_map, PruMerge.prefix))
    back = to_reference(model.state_dict(), PruMerge.state_dict_map, PruMerge.prefix)
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    with torch.device("meta"):
        assert sum(p.numel() for p in PruMerge().parameters()) == sum(p.numel() for p in MLP(MLPConfig()).parameters()) == 20_979_712


def test_reset_is_llavas_start():
    fresh, again = tiny(standardize=True), tiny(standardize=True)
    again.fit_statistics(some().levels)
    for p in again.parameters(): nn.init.constant_(p, 3)
    torch.manual_seed(0)
    again.reset_parameters()
    for key, value in fresh.state_dict().items(): assert torch.equal(again.state_dict()[key], value), key


def test_by_name():
    like = CompressorConfig(grid=6, tokens=9, levels=(0, 1), d_vision=8, d_llm=12)
    for name, plus in (("prumerge", False), ("prumerge+", True)):
        config = compressor_config(name, like)
        model = build_compressor(name, config.to_dict())
        assert type(model) is PruMerge and model.config.plus is plus and model.requires == ("attention",) and model(some()).shape == (3, 9, 12)


@pytest.mark.parametrize("tokens", [0, 1, 37, -3, True])
def test_impossible_budgets(tokens):
    with pytest.raises(ValueError, match=r"use one of 2\.\.36"): tiny()(some(), tokens=tokens)


def test_features_without_attention():
    x = some()
    for lacking in (x.levels, replace(x, cls_attention=None), replace(x, keys=None)):
        with pytest.raises(ValueError, match="attention=True"): tiny()(lacking)
    with pytest.raises(ValueError, match="neighbors=0"): PruMergeConfig(neighbors=0)
