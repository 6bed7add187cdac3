"Maps and scores of `benchmarks/gradcam.py`."

import json
import runpy
from pathlib import Path

import numpy as np
import torch
from tiny_vlm import byte_tokenizer, tiny
from transformers import CLIPImageProcessorPil

from delta_llava.conversations import load_conversations
from delta_llava.processor import build_processor
from delta_llava.quickstart import Quickstart
from delta_llava.scenes import write_scenes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_maps_of_no_method():
    truth = runpy.run_path(str(BENCHMARKS / "gradcam.py"))
    assert (
        truth["centre"](9).argmax() == 4
        and len(truth["centre"](36).unique()) == 6
        and (truth["centre"](36) == truth["centre"](36).max()).sum() == 4
    )
    cells = truth["covered"](torch.tensor([[25.0, 0.0, 100.0, 60.0]]), 16, (100, 100)).view(4, 4)
    torch.testing.assert_close(
        cells, torch.tensor([1.0, 1.0, 0.4, 0.0])[:, None] * torch.tensor([0.0, 1.0, 1.0, 1.0])
    )
    mean, low, high = truth["interval"](np.random.default_rng(0).normal(3, 1, 400))
    assert low < 3 < high and abs(high - low - 4 * 0.05) < 0.05 and truth["interval"]([0.5, 0.5]) == [0.5] * 3


def test_scores_of_a_map_that_knows_the_box(tmp_path):
    "Random weights: the true box wins the pointing game, and an even map scores chance."
    module = runpy.run_path(str(BENCHMARKS / "gradcam.py"))
    model, processor = (
        tiny("clip_b32_224"),
        build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=16, template="v1"),
    )
    rows = list(
        load_conversations(
            write_scenes(
                tmp_path,
                6,
                "heldout_scenes",
                0,
                (2, 3),
                168,
                tasks=("caption",),
                paraphrase=False,
                min_side=56,
            )
        )
    )
    truth, before = module["Truth"](images=6, erased=4), {k: v.clone() for k, v in model.state_dict().items()}
    found = sum((truth.batch(model, processor, rows[i : i + 3], 16, i, Quickstart()) for i in (0, 3)), [])
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )  # the shuffled parts are whole again
    assert [r["picture"] for r in found] == list(range(6)) and [
        "deletion" in r["scores"]["box"] for r in found
    ] == [True] * 4 + [False] * 2
    for r in found:
        even, box = r["scores"]["chance"], r["scores"]["box"]
        assert (
            even.get("deletion", 0) == even.get("insertion", 0) == even["correlation"] == 0
            and box["energy"] > even["energy"] > 0
        )
        assert abs(even["other"] - even["other_area"]) < 1e-6 and box["other"] < box["energy"]
        assert abs(r["scores"]["gradcam"]["correlation"] - (not r["scores"]["gradcam"]["empty"])) < 1e-6
    cell = truth.cell(
        "delta",
        16,
        "heldout_scenes, several things",
        [
            dict(compressor="delta", seed=s, steps=300, set="heldout_scenes, several things", tokens=16, **r)
            for r in found
            for s in (0, 1)
        ],
    )
    assert (
        cell["pictures"] == 6 and cell["seeds"] == [0, 1] and list(cell["methods"]) == list(module["METHODS"])
    )
    energy = [r["scores"]["attention"]["energy"] for r in found]
    assert (
        abs(cell["methods"]["attention"]["energy"][0] - np.mean(energy)) < 1e-3
        and cell["methods"]["box"]["hit"][0] > 0.5
    )
    minus = cell["methods"]["attention"]["gradcam minus"]["energy"]
    assert (
        abs(minus[0] - np.mean([r["scores"]["gradcam"]["energy"] for r in found]) + np.mean(energy)) < 1e-3
        and minus[1] <= minus[0] <= minus[2]
    )
    assert (
        cell["methods"]["gradcam"]["gradcam minus"]["hit"] == [0] * 3
        and "deletion" not in cell["methods"]["centre"]
        and cell["trained_steps"] == [300]
    )
    json.dumps(cell, allow_nan=False)
