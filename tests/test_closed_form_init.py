"Closed-form initialization: moments of the visual tokens, budgets, layers that do not run, errors."

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import delta_llava.closed_form_init as module
from delta_llava.closed_form_init import _RidgeRegression, answer_embeddings, closed_form_init
from delta_llava.compressors.m3 import M3, M3Config
from delta_llava.config import dinov2_s14
from delta_llava.projector import DeltaProjector

SMALL = replace(dinov2_s14(56, tokens=4, d_llm=32), d_vision=128, levels=(1, 2), heads=4)
CASES = {
    "plain": replace(SMALL, standardize=False),
    "standardize": SMALL,
    "share_base": replace(SMALL, share_base=True),
    "m3": M3Config(grid=4, tokens=4, levels=(0, 1), d_vision=128, d_llm=32),
}
CHANGED = {
    "share_base": {"base.weight", "mlp.2.weight", "mlp.2.bias"},
    "m3": {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"},
}
DEFAULT_CHANGED = {"k.base.weight", "v.base.weight", "mlp.2.weight", "mlp.2.bias"}


def planted(n=48, seed=0):
    "Features of images with one of four objects, and the target of each image."
    g = torch.Generator().manual_seed(seed)
    objects = torch.arange(n) % 4
    directions = 3 * torch.randn(4, 1, 256, generator=g)
    noise = torch.randn(n, 16, 256, generator=torch.Generator().manual_seed(seed + 1))
    targets = 0.3 + 0.1 * torch.randn(4, 32, generator=g)
    return 0.5 + noise + directions[objects], targets[objects]


def compressor(case, **changes):
    torch.manual_seed(0)
    cls = M3 if case == "m3" else DeltaProjector
    return cls(replace(CASES[case], **changes))


def changed_names(projector, before):
    old = before.state_dict()
    return {name for name, tensor in projector.state_dict().items() if not tensor.equal(old[name])}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_tokens_have_the_mean_and_standard_deviation_of_the_embeddings(case):
    features, targets = planted()
    before, projector, again = (compressor(case) for _ in range(3))
    if case == "standardize":
        for p in (before, projector, again):
            p.fit_statistics(features)
    closed_form_init(projector, features, targets, batch_size=20)
    assert projector.training
    out = projector.eval()(features)
    assert_close(out.mean((0, 1)), targets.mean(0), atol=1e-4, rtol=0)
    std = (out - out.mean((0, 1))).square().mean().sqrt()
    assert_close(std, (targets - targets.mean(0)).std(), atol=0, rtol=0.02)
    nearest = torch.cdist(out.mean(1), targets[:4]).argmin(1)
    assert nearest.equal(torch.arange(48) % 4)
    assert changed_names(projector, before) == CHANGED.get(case, DEFAULT_CHANGED)
    closed_form_init(again, features, targets, batch_size=20)
    assert same(again.state_dict(), projector.state_dict())


def test_with_a_residual_the_last_layer_is_fitted():
    features, targets = planted()
    torch.manual_seed(0)
    projector = DeltaProjector(replace(SMALL, residual_mlp=True))
    projector.fit_statistics(features)
    closed_form_init(projector, features, targets)
    outputs = []
    projector.mlp.mlp[-1].register_forward_hook(lambda module, args, out: outputs.append(out))
    projector.eval()(features)
    assert_close(outputs[0].mean((0, 1)), targets.mean(0), atol=1e-4, rtol=0)  # before the residual


def test_several_budgets():
    features, targets = planted()
    one, several = compressor("standardize"), compressor("standardize")
    for p in (one, several):
        p.fit_statistics(features)
    closed_form_init(one, features, targets)
    closed_form_init(several, features, targets, tokens=(1, 4, 16))
    assert not same(one.state_dict(), several.state_dict())
    several.eval()
    out = torch.cat([several(features, tokens=t).flatten(0, 1) for t in (1, 4, 16)])
    assert_close(out.mean(0), targets.mean(0), atol=1e-4, rtol=0)  # over all budgets together


# ---- layers that do not run


def test_at_the_full_grid_the_keys_stay_and_the_rest_is_fitted():
    features, targets = planted()
    projector, before = compressor("plain", tokens=16), compressor("plain", tokens=16)
    closed_form_init(projector, features, targets)
    assert projector.training
    assert changed_names(projector, before) == DEFAULT_CHANGED - {"k.base.weight"}
    assert_close(projector.eval()(features).mean((0, 1)), targets.mean(0), atol=1e-4, rtol=0)


def test_keys_that_do_not_run_at_the_own_budget_are_fitted_at_another():
    features, targets = planted()
    projector, before = compressor("plain", tokens=16), compressor("plain", tokens=16)
    closed_form_init(projector, features, targets, tokens=(16, 4))
    assert changed_names(projector, before) == DEFAULT_CHANGED
    own = compressor("plain", tokens=4)
    closed_form_init(own, features, targets)
    assert_close(projector.k.base.weight, own.k.base.weight)  # the same patches are read


def test_an_output_layer_that_never_runs_is_refused():
    class Wrong(DeltaProjector):
        def input_output_layers(self):
            return [], nn.Linear(4, 32)

    features, targets = planted()
    with pytest.raises(ValueError, match="output layer of Wrong never ran"):
        closed_form_init(Wrong(CASES["plain"]), features, targets)


# ---- the regression


def test_ridge_is_in_units_of_the_mean_variance():
    x, y = torch.randn(40, 2, 5) * torch.arange(1, 6), torch.randn(40, 3)
    y -= y.mean(0)
    regression, scaled = _RidgeRegression(), _RidgeRegression()
    regression.add(x, y)
    scaled.add(1000 * x, y)
    weight = regression.weight(0.5)
    assert_close(1000 * scaled.weight(0.5), weight)
    rows = x.flatten(0, 1).double()
    covariance = rows.T @ rows / 80 - torch.outer(rows.mean(0), rows.mean(0))
    damping = 0.5 * covariance.diagonal().mean() * torch.eye(5)
    expected = torch.linalg.solve(covariance + damping, x.double().sum(1).T @ y.double() / 80).T
    assert_close(weight, expected, atol=1e-5, rtol=1e-4)
    without = regression.weight(0.0)
    assert (weight - without).norm() > 0.1 * without.norm()  # λ matters at this size


def test_answer_embeddings_have_the_mean_and_standard_deviation_of_the_table():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return type("Ids", (), dict(input_ids=[int(token) for token in text.split()]))

    table = 1 + torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    embeddings = answer_embeddings(["1 2", "3", "4 5 6"], Tokenizer(), table)
    centered = embeddings - embeddings.mean(0)
    assert_close(embeddings.mean(0), table.mean(0))
    assert_close(centered.std(), table.std())
    raw = torch.stack([table[[1, 2]].mean(0), table[3], table[[4, 5, 6]].mean(0)])
    cosine = nn.functional.cosine_similarity(centered, raw - raw.mean(0))
    assert_close(cosine, torch.ones(3))


# ---- errors and progress


def test_errors_come_before_any_change():
    features, targets = planted()
    projector = compressor("plain")
    with pytest.raises(ValueError, match="48 features for 47 embeddings"):
        closed_form_init(projector, features, targets[1:])
    with pytest.raises(ValueError, match="tokens=5 must be the square"):
        closed_form_init(projector, features, targets, tokens=(4, 5))
    with pytest.raises(ValueError, match="all 48 embeddings are the same"):
        closed_form_init(projector, features, targets[:1].expand(48, -1))
    assert projector.training and same(projector.state_dict(), compressor("plain").state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_an_interrupted_initialization_leaves_the_projector_as_it_was(training, monkeypatch):
    features, targets = planted()
    projector = compressor("plain").train(training)
    projector.mlp.eval()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_init_output_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        closed_form_init(projector, features, targets)
    assert projector.training is training and not projector.mlp.training
    assert same(projector.state_dict(), compressor("plain").state_dict())
    assert not any(m._forward_pre_hooks for m in projector.modules())


def test_progress_counts_every_pass(monkeypatch):
    bars = []

    class Bar(module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | dict(disable=False, file=open("/dev/null", "w")))
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", Bar)
    features, targets = planted()
    closed_form_init(compressor("plain"), features, targets, batch_size=20)
    assert [(bar.n, bar.total) for bar in bars] == [(96, 96)]
