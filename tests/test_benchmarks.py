"The programs in `benchmarks/`, on sizes that take seconds."

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stage import write_parts
from tiny_vlm import byte_tokenizer, tiny
from transformers import CLIPImageProcessorPil

from delta_llava.conversations import load_conversations
from delta_llava.scenes import write_scenes
from delta_llava.processor import build_processor
from delta_llava.quickstart import Quickstart

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_counted_tokens_are_those_of_the_batches():
    packing = runpy.run_path(str(BENCHMARKS / "packing.py"))
    lengths = np.random.default_rng(0).integers(2, 60, 400)
    found, collators = packing["count"](lengths, 8, 3, 100)["tokens"], packing["collators"](100)
    for way, grouped, packed in (
        ("padded", False, False),
        ("packed", False, True),
        ("grouped", True, False),
        ("grouped, packed", True, True),
    ):
        batches = list(packing["in_batches"](lengths.tolist(), 8, grouped, 3))
        assert sorted(sum(batches, [])) == list(range(400))
        collate = collators["packed" if packed else "padded"]
        assert found[way] == sum(
            collate([dict(id=i, image=None, conversations=int(lengths[i])) for i in b])["input_ids"].numel()
            for b in batches
        )
    assert (
        found["rows"] == lengths.sum() < found["packed"] < found["padded"]
        and found["grouped"] < found["padded"]
    )


def test_assumed_lengths_have_the_parts_of_the_mix():
    packing = runpy.run_path(str(BENCHMARKS / "packing.py"))
    text, image, part = packing["assumed"](40_000, 0)
    assert (
        sum(n for n, _, _ in packing["PARTS"].values()) == 624
    )  # thousands: all rows but those of text alone
    assert (
        abs((~image).mean() - packing["TEXT_ONLY"] / packing["ROWS"]) < 0.005
        and text.min() > packing["PROMPT"]
    )
    for name, (n, median, _) in packing["PARTS"].items():
        assert abs((part == name).sum() - 40_000 * image.mean() * n / 624) < 5 * (40_000 * n / 624) ** 0.5
        assert abs(np.median(text[part == name]) - packing["PROMPT"] - median) < 0.1 * median


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["pretrained", "random"])
def test_stage_steps_run_on_tiny_parts(tmp_path, full):
    parts = write_parts(tmp_path)
    StageSteps = runpy.run_path(str(BENCHMARKS / "stage.py"))["StageSteps"]
    StageSteps(
        tokens=(16, 4, 1),
        tower=str(parts / "tower"),
        llm=str(parts / "llm"),
        image_size=56,
        batch_size=2,
        repeats=2,
        full=full,
        record=tmp_path / "record.json",
    )()
    rows = json.loads((tmp_path / "record.json").read_text())["result"]
    assert [(r["stage"], r["tokens"], r["projector"]) for r in rows] == [
        (k, v, "mlp" if v == 16 else "delta") for k in ("pretrain", "finetune") for v in (16, 4, 1)
    ]
    assert all(r["ratio"][0] == 1 for r in rows if r["tokens"] == 16) and all(
        min(r["seconds"]) > 0 and r["of_ceiling"] > 0 for r in rows
    )
    assert all(rows[i + 1]["flops"] > rows[i + 2]["flops"] for i in (0, 3))  # Delta at 4 tokens and at 1


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
    "Random weights: the true box wins the pointing game, an even map scores chance, and no score is lost on the way to the table."
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


@pytest.mark.parametrize("full", [False, True], ids=["pretrained", "random"])
def test_speed_is_recorded(tmp_path, full):
    "With `full`, what is given beside it is kept, and the rest is the paper's."
    parts, speed = write_parts(tmp_path), runpy.run_path(str(BENCHMARKS / "speed.py"))
    speed["RecordedSweep"](
        tokens=(16, 4),
        tower=str(parts / "tower"),
        llm=str(parts / "llm"),
        image_size=56,
        text=6,
        answer=4,
        repeats=3,
        full=full,
        batch=(2,),
        record=tmp_path / "record.json",
        device="cpu",
    )()
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(r["cache"], r["tokens"], r["compressor"], r["batch"]) for r in record["result"]] == [
        (c, V, by, 2)
        for c in (("dynamic", "static") if full else ("dynamic",))
        for V, by in ((16, "mlp"), (4, "delta"))
    ]
    assert (record["dtype"], record["random_weights"], record["warm_up"], record["llm"]) == (
        ("bfloat16", True, 2) if full else ("float32", False, 1)
    ) + (str(parts / "llm"),)
    assert (
        record["clock"] == "CPU time of the process, one thread"
        and record["peak"] > 0
        and record["bandwidth"] > 0
        and record["answer"] == 4
    )


def test_captions_are_trained_and_scored_once_with_one_recipe(tmp_path, monkeypatch):
    module = runpy.run_path(str(BENCHMARKS / "captions.py"))
    scope, trained, scored = module["Captions"].cell.__globals__, [], []

    def train(folder, **recipe):
        trained.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(
            json.dumps(dict(recipe=recipe, commit="c", seconds=1.0, result=dict(losses=[3.0, 2.0])))
        )
        return lambda: None

    def score(folder):
        scored.append(folder.name)
        if len(scored) == 2:
            raise KeyboardInterrupt
        name, seed = folder.name.split("-")
        about = dict.fromkeys(module["KEPT"], 0.5) | dict(seed=int(seed), compressor=name, set="one")
        return [
            about | dict(tokens=t, said=["A fox."] * 5, true=["A key."] * 5)
            for t in json.loads((folder / "record.json").read_text())["recipe"]["test_budgets"]
        ]

    monkeypatch.setitem(scope, "Train", train)
    monkeypatch.setitem(scope, "score_captions", score)
    captions = module["Captions"](seeds=(0, 1), folder=tmp_path / "c", record=tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        captions()
    captions()
    assert trained == [f"{name}-{seed}" for seed in (0, 1) for name in ("delta", "fastv")] and scored == [
        "delta-0",
        "fastv-0",
        "fastv-0",
        "delta-1",
        "fastv-1",
    ]
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(r["seed"], r["compressor"], r["tokens"]) for r in record["result"]] == [
        (s, n, t)
        for s in (0, 1)
        for n, budgets in (("delta", (16, 4, 1)), ("fastv", (64, 16, 4, 1)))
        for t in budgets
    ]
    assert (
        record["patches"] == 64
        and record["seeds"] == [0, 1]
        and len(record["result"][0]["said"]) == 3
        and record["fastv_layer"] == 2
        and len(record["trainings"]) == 4
    )
    recipes = captions.recipes()
    assert {(r.compressor, r.train_budgets, r.tokens) for r in recipes} == {
        ("delta", (16, 4, 1), 16),
        ("fastv", (64,), 64),
    }
    same = lambda r: {
        k: v
        for k, v in vars(r).items()
        if k not in ("compressor", "tokens", "train_budgets", "test_budgets", "seed")
    }
    assert all(same(r) == same(recipes[0]) for r in recipes)  # the rest is shared
    with pytest.raises(ValueError, match="training of another recipe"):
        module["Captions"](seeds=(0,), steps=9, folder=tmp_path / "c", record=tmp_path / "r.json")()
