"A calibrated start that keeps its promises."

from dataclasses import replace

import pytest
import torch
from test_train import SMALL, same
from torch import nn
from torch.testing import assert_close

from delta_llava.closed_form_init import answer_embeddings, closed_form_init
from delta_llava.compressors.m3 import M3, M3Config
from delta_llava.projector import DeltaProjector


def planted(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    things = torch.arange(n) % 4
    features = 0.5 + torch.randn(n, 16, 256, generator=g) + 3 * torch.randn(4, 1, 256, generator=g)[things]
    return features, (0.3 + 0.1 * torch.randn(4, 32, generator=g))[things]


CASES = {
    "plain": replace(SMALL, standardize=False),
    "standardize": SMALL,
    "share_base": replace(SMALL, share_base=True),
    "m3": M3Config(grid=4, tokens=4, levels=(0, 1), d_vision=128, d_llm=32),
}


def compressor(case):
    torch.manual_seed(0)
    return (M3 if case == "m3" else DeltaProjector)(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_calibrated_tokens_have_the_mean_and_spread_of_the_words(case):
    features, words = planted()
    before, projector = compressor(case), compressor(case)
    if case == "standardize":
        for p in (before, projector):
            p.fit_statistics(features)
    closed_form_init(projector, features, words, batch_size=20)
    assert projector.training
    out = projector.eval()(features)
    away = words - words.mean(0)
    assert_close(out.mean((0, 1)), words.mean(0), atol=1e-4, rtol=0)
    spread = (out - out.mean((0, 1))).square().mean().sqrt()
    assert_close(spread, away.std(), atol=0, rtol=0.02)
    assert (
        torch.cdist(out.mean(1), words[:4]).argmin(1).equal(torch.arange(48) % 4)
    )  # each picture lies at its own word
    changed = {k for k, v in projector.state_dict().items() if not v.equal(before.state_dict()[k])}
    ends = {
        "share_base": {"base.weight", "mlp.2.weight", "mlp.2.bias"},
        "m3": {f"mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")},
    }
    assert changed == ends.get(case, {"k.base.weight", "v.base.weight", "mlp.2.weight", "mlp.2.bias"})
    again = compressor(case)
    if case == "standardize":
        again.fit_statistics(features)
    closed_form_init(again, features, words, batch_size=20)
    assert same(again.state_dict(), projector.state_dict())


def test_calibration_with_residual_writes_through_its_last_layer():
    features, words = planted()
    torch.manual_seed(0)
    projector, written = DeltaProjector(replace(SMALL, residual_mlp=True)), []
    projector.fit_statistics(features)
    closed_form_init(projector, features, words)
    projector.mlp.mlp[-1].register_forward_hook(lambda module, args, out: written.append(out))
    projector.eval()(features)
    assert_close(written[0].mean((0, 1)), words.mean(0), atol=1e-4, rtol=0)  # what it adds to the residual


def test_calibration_for_several_budgets():
    features, words = planted()
    one, all_ = compressor("standardize"), compressor("standardize")
    for p in (one, all_):
        p.fit_statistics(features)
    closed_form_init(one, features, words)
    closed_form_init(all_, features, words, tokens=(1, 4, 16))
    assert not same(one.state_dict(), all_.state_dict())
    out = torch.cat([all_.eval()(features, tokens=t).flatten(0, 1) for t in (1, 4, 16)])
    assert_close(out.mean(0), words.mean(0), atol=1e-4, rtol=0)  # over all budgets together


def test_calibration_refuses():
    features, words = planted()
    with pytest.raises(ValueError, match="48 features for 47 embeddings"):
        closed_form_init(compressor("plain"), features, words[1:])
    projector = compressor("plain")
    with pytest.raises(ValueError, match="tokens=5 must be the square"):
        closed_form_init(projector, features, words, tokens=(4, 5))
    assert same(
        projector.state_dict(), compressor("plain").state_dict()
    )  # refused before anything was changed


def test_answer_embeddings_have_the_mean_and_spread_of_the_table():
    class Words:
        def __call__(self, text, add_special_tokens):
            return type("Ids", (), dict(input_ids=[int(w) for w in text.split()]))

    table = 1 + torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = answer_embeddings(["1 2", "3", "4 5 6"], Words(), table)
    assert_close(found.mean(0), table.mean(0))
    assert_close((found - found.mean(0)).std(), table.std())
    raw = torch.stack([table[[1, 2]].mean(0), table[3], table[[4, 5, 6]].mean(0)])
    assert_close(nn.functional.cosine_similarity(found - found.mean(0), raw - raw.mean(0)), torch.ones(3))
