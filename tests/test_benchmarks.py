"The programs in `benchmarks/`, on sizes that take seconds."
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from tiny_stage import write_parts

BENCHMARKS = Path(__file__).parents[1]/"benchmarks"


def test_counted_tokens_are_those_of_the_batches():
    packing = runpy.run_path(str(BENCHMARKS/"packing.py"))
    lengths = np.random.default_rng(0).integers(2, 60, 400)
    found, collators = packing["count"](lengths, 8, 3, 100)["tokens"], packing["collators"](100)
    for way, grouped, packed in (("padded", False, False), ("packed", False, True), ("grouped", True, False), ("grouped, packed", True, True)):
        batches = list(packing["in_batches"](lengths.tolist(), 8, grouped, 3))
        assert sorted(sum(batches, [])) == list(range(400))
        collate = collators["packed" if packed else "padded"]
        assert found[way] == sum(collate([dict(id=i, image=None, conversations=int(lengths[i])) for i in b])["input_ids"].numel() for b in batches)
    assert found["rows"] == lengths.sum() < found["packed"] < found["padded"] and found["grouped"] < found["padded"]


def test_assumed_lengths_have_the_parts_of_the_mix():
    packing = runpy.run_path(str(BENCHMARKS/"packing.py"))
    text, picture, part = packing["assumed"](40_000, 0)
    assert sum(n for n, _, _ in packing["PARTS"].values()) == 624  # thousands: all rows but those of text alone
    assert abs((~picture).mean() - packing["TEXT_ONLY"]/packing["ROWS"]) < .005 and text.min() > packing["PROMPT"]
    for name, (n, median, _) in packing["PARTS"].items():
        assert abs((part == name).sum() - 40_000*picture.mean()*n/624) < 5*(40_000*n/624)**.5
        assert abs(np.median(text[part == name]) - packing["PROMPT"] - median) < .1*median


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["pretrained", "random"])
def test_stage_steps_run_on_tiny_parts(tmp_path, full):
    parts = write_parts(tmp_path)
    StageSteps = runpy.run_path(str(BENCHMARKS/"stage.py"))["StageSteps"]
    StageSteps(tokens=(16, 4, 1), tower=str(parts/"tower"), llm=str(parts/"llm"), image_size=56, batch_size=2, repeats=2, full=full, record=tmp_path/"record.json")()
    rows = json.loads((tmp_path/"record.json").read_text())["result"]
    assert [(r["stage"], r["tokens"], r["projector"]) for r in rows] == [(k, v, "mlp" if v == 16 else "delta") for k in ("pretrain", "finetune") for v in (16, 4, 1)]
    assert all(r["ratio"][0] == 1 for r in rows if r["tokens"] == 16) and all(min(r["seconds"]) > 0 and r["of_ceiling"] > 0 for r in rows)
    assert all(rows[i + 1]["flops"] > rows[i + 2]["flops"] for i in (0, 3))  # Delta at 4 tokens and at 1


@pytest.mark.parametrize("full", [False, True], ids=["pretrained", "random"])
def test_speed_is_recorded(tmp_path, full):
    "With `full`, what is given beside it is kept, and the rest is the paper's."
    parts, speed = write_parts(tmp_path), runpy.run_path(str(BENCHMARKS/"speed.py"))
    speed["RecordedSweep"](tokens=(16, 4), tower=str(parts/"tower"), llm=str(parts/"llm"), image_size=56, text=6, answer=4, repeats=3, full=full, batch=(2,), record=tmp_path/"record.json", device="cpu")()
    record = json.loads((tmp_path/"record.json").read_text())
    assert [(r["cache"], r["tokens"], r["compressor"], r["batch"]) for r in record["result"]] == [(c, V, by, 2) for c in (("dynamic", "static") if full else ("dynamic",)) for V, by in ((16, "mlp"), (4, "delta"))]
    assert (record["dtype"], record["random_weights"], record["warm_up"], record["llm"]) == (("bfloat16", True, 2) if full else ("float32", False, 1)) + (str(parts/"llm"),)
    assert record["clock"] == "CPU time of the process, one thread" and record["peak"] > 0 and record["bandwidth"] > 0 and record["answer"] == 4
