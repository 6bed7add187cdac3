"The programs in `benchmarks/`, on sizes that take seconds."

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import tyro
from datasets import Dataset
from tiny_stage import chatml_tokenizer, write_models

from delta_llava import speed
from delta_llava.runs import write_run
from delta_llava.settings import LongRecipe, SpeedSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RUNS = BENCHMARKS.parent / "runs"


@pytest.fixture(autouse=True)
def benchmarks_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load_benchmark(name):
    "Names of a benchmark, without running it."
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


@pytest.fixture
def small_products(monkeypatch):
    "Peak rates from products that take no time, in bfloat16 on a CPU as well."
    original = speed.measured_device

    def measured_device(device, dtype, sides=None):
        return original(device, dtype, (128, 256))

    monkeypatch.setattr(speed, "measured_device", measured_device)


@pytest.fixture
def parts(tmp_path):
    write_models(tmp_path)
    return dict(tower=str(tmp_path / "tower"), llm=str(tmp_path / "llm"), image_size=56)


# ---------------------------------------------------------------- packing.py


def test_counted_tokens_are_those_of_the_batches():
    packing = load_benchmark("packing")
    lengths = np.random.default_rng(0).integers(2, 60, 400)
    counts = packing["count"](lengths, 8, 3, 100)["tokens"]
    collators = packing["collators"](100)
    for grouped in (False, True):
        batches = list(packing["in_batches"](lengths.tolist(), 8, grouped, 3))
        assert sorted(sum(batches, [])) == list(range(400))
        for way in ("padded", "packed"):
            total = 0
            for batch in batches:
                rows = [dict(id=i, image=None, conversations=int(lengths[i])) for i in batch]
                total += collators[way](rows)["input_ids"].numel()
            names = {"padded": "grouped", "packed": "grouped, packed"} if grouped else {}
            assert counts[names.get(way, way)] == total
    assert counts["rows"] == lengths.sum() < counts["packed"] < counts["padded"]
    assert counts["grouped"] < counts["padded"]


def test_assumed_lengths_have_the_parts_of_the_mix():
    packing = load_benchmark("packing")
    text, has_image, part = packing["assumed"](40_000, 0)
    parts = packing["PARTS"]
    total = sum(thousands for thousands, _, _ in parts.values())
    assert total == 624  # all rows but those of text alone
    assert abs((~has_image).mean() - packing["TEXT_ONLY"] / packing["ROWS"]) < 0.005
    assert text.min() > packing["PROMPT"]
    for name, (thousands, median, _) in parts.items():
        expected = 40_000 * has_image.mean() * thousands / total
        five_sigma = 5 * (40_000 * thousands / total) ** 0.5
        assert abs((part == name).sum() - expected) < five_sigma
        assert abs(np.median(text[part == name]) - packing["PROMPT"] - median) < 0.1 * median


# ---------------------------------------------------------------- stage.py


@pytest.mark.slow
def test_stage_steps_run_on_tiny_parts(tmp_path, parts):
    record = tmp_path / "record.json"
    StageSteps = load_benchmark("stage")["StageSteps"]
    StageSteps(tokens=(16, 4, 1), batch_size=2, repeats=2, record=record, **parts)()
    rows = json.loads(record.read_text())["result"]
    expected = []
    for stage in ("pretrain", "finetune"):
        expected += [(stage, 16, "mlp"), (stage, 4, "delta"), (stage, 1, "delta")]
    assert [(row["stage"], row["tokens"], row["projector"]) for row in rows] == expected
    for row in rows:
        assert min(row["seconds"]) > 0 and row["of_ceiling"] > 0
        assert row["tokens"] != 16 or row["ratio"][0] == 1
    for first in (0, 3):  # Delta at 4 tokens needs more operations than at 1
        assert rows[first + 1]["flops"] > rows[first + 2]["flops"]


# ---------------------------------------------------------------- quickstart_steps.py


def test_all_ways_of_a_quickstart_step_have_one_loss(tmp_path, parts):
    chatml_tokenizer().save_pretrained(tmp_path / "llm")
    QuickstartSteps = load_benchmark("quickstart_steps")["QuickstartSteps"]
    record = tmp_path / "record.json"
    QuickstartSteps(stage1_steps=2, stage2_steps=1, train_budgets=(4, 1), record=record, **parts)()
    stage1, stage2 = json.loads(record.read_text())["result"]
    for row, stage, steps in ((stage1, "pretrain", 2), (stage2, "finetune", 1)):
        assert row["stage"] == stage and row["ways"]["float32"]["speedup"] == [1, 1, 1]
        losses = [way["losses"] for way in row["ways"].values()]
        assert [len(each) for each in losses] == 3 * [steps]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        assert losses[2] == pytest.approx(losses[0], rel=1e-3)


# ---------------------------------------------------------------- limits.py


def test_features_of_an_object_are_those_in_its_box():
    limits = load_benchmark("limits")
    features = torch.arange(144.0).view(1, 144, 1)  # on a 12×12 grid of cells of 14 px
    rows = [dict(objects=[dict(name="fox", box=[14, 28, 42, 42]), dict(name="owl", box=[1, 1, 5, 5])])]
    found, names = limits["box_features"](limits["SceneSet"](Dataset.from_list(rows), features), 168)
    assert names == ["fox", "owl"]
    assert found[:, 0].tolist() == [
        pytest.approx((25 + 26) / 2),
        0,
    ]  # row 2, columns 1 and 2; the nearest cell


def test_kinds_of_answers_about_the_odd_one():
    kind = load_benchmark("limits")["Limits"].kind
    names = ["fox", "owl", "bus"]
    assert kind({"bus"}, names) == "the odd object"
    assert kind({"fox"}, names) == kind({"bus", "fox"}, names) == "another object of the scene"
    assert kind(set(), names) == kind({"kite"}, names) == "something else"
    assert load_benchmark("limits")["accuracy"]([]) == dict(n=0)


# ---------------------------------------------------------------- gpu.py


def common_keys(rows):
    "Keys that all rows have, with those of dictionaries in them."
    found = None
    for row in rows:
        keys = set()
        for name, value in row.items():
            inner = common_keys([value]) if isinstance(value, dict) else {()}
            keys |= {(name, *path) for path in inner}
        found = keys if found is None else found & keys
    return found or {()}


def entries(record):
    "The rows of a result."
    return record["result"] if isinstance(record["result"], list) else [record["result"]]


def test_the_gpu_command_at_tiny_sizes(tmp_path, monkeypatch, small_products):
    "A part that fails does not stop the others; records have the keys of the committed ones."
    GPU = load_benchmark("gpu")["GPU"]

    def fail(self):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(GPU, "tests", fail)
    threads = torch.get_num_threads()
    GPU(tiny=True, isolated=False, out=tmp_path)()
    torch.set_num_threads(threads)
    ended = {row["part"]: row["ended"] for row in json.loads((tmp_path / "gpu.json").read_text())["result"]}
    assert ended.pop("tests") == "RuntimeError: no such kernel"
    assert list(ended.values()) == ["complete"] * 7
    names = ["benchmark_projector_gpu", "packing_gpu", "speed_full", "steps_full"]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted([*names, "gpu"])
    for name in names:
        old = json.loads((RUNS / f"{name}.json").read_text())
        new = json.loads((tmp_path / f"{name}.json").read_text())
        assert common_keys(entries(old)) <= common_keys(entries(new)), name
        assert old.keys() <= new.keys()
    sweep = json.loads((tmp_path / "speed_full.json").read_text())["result"]
    assert {row["cache"] for row in sweep} == {"dynamic", "static"}
    steps = json.loads((tmp_path / "steps_full.json").read_text())["result"]
    assert {row["plan"] for row in steps} == {"switches", "budgets", "finetune"}
    assert not any("error" in row for row in steps)


def test_a_part_of_the_gpu_command_is_stopped_when_its_time_is_over(tmp_path):
    GPU = load_benchmark("gpu")["GPU"]
    gpu = GPU(tiny=True, out=tmp_path)

    def run(code, seconds):
        command = [sys.executable, "-S", "-c", f"import sys, time; sys.stdin.readline(); {code}"]
        return gpu.run_isolated(subprocess.Popen(command, stdin=subprocess.PIPE), seconds)

    assert run("pass", 60) == ""
    assert run("sys.exit(3)", 60) == "exit code 3, see gpu.log"
    assert run("time.sleep(60)", 0.2) == "stopped after its 0 s; cells before that are recorded"
    with pytest.raises(ValueError, match=r"only=\['other'\]"):
        GPU(only=("other",))


def test_what_does_not_fit_into_the_minutes_is_said(tmp_path):
    GPU = load_benchmark("gpu")["GPU"]
    gpu = GPU(tiny=True, isolated=False, minutes=0.1, only=("tests", "packing"), out=tmp_path)
    gpu.run_all(io.StringIO())
    assert {row["ended"] for row in gpu.results} == {"not started: the minutes are used up"}


def test_outcomes_of_gpu_tests_are_recorded(tmp_path):
    path = tmp_path / "gpu_tests.json"
    outcomes = load_benchmark("gpu")["Outcomes"](path)
    report = dict(when="call", outcome="passed", nodeid="tests/test_gpu.py::test_a", duration=1.234)
    outcomes.pytest_runtest_logreport(SimpleNamespace(**report, longrepr=None))
    outcomes.pytest_runtest_logreport(SimpleNamespace(**report | dict(when="setup"), longrepr=None))
    failed = report | dict(outcome="failed", nodeid="tests/test_gpu.py::test_b")
    outcomes.pytest_runtest_logreport(SimpleNamespace(**failed, longrepr="E  assert 1 == 2"))
    found = json.loads(path.read_text())["result"]
    assert [(row["test"], row["outcome"], row["message"]) for row in found] == [
        ("test_a", "passed", ""),
        ("test_b", "failed", "E  assert 1 == 2"),
    ]


# ---------------------------------------------------------------- steps.py


def test_counted_operations_are_those_of_the_record():
    "The shapes of the paper's model need no memory."
    steps = load_benchmark("steps")
    times = steps["StepTimes"](device="cpu")
    for row in json.loads((RUNS / "steps_full.json").read_text())["result"]:
        if row["tokens"] == 144:
            cell = steps["Cell"](**{name: row[name] for name in steps["Cell"].__dataclass_fields__})
            every, useful = times.flops(cell)
            assert row["flops"] == cell.rows * every
            assert abs(row["of_ceiling_useful"] / row["of_ceiling"] - useful / every) < 1e-3


def test_a_cell_that_does_not_fit_is_repeated_with_half_of_its_rows(monkeypatch):
    steps = load_benchmark("steps")
    times = steps["StepTimes"](device="cpu")

    def measure(cell):
        if cell.rows > 4:
            raise torch.OutOfMemoryError
        return dict(rows=cell.rows)

    monkeypatch.setattr(times, "measure", measure)
    halved = times.entry(steps["Cell"](rows=16, halve=True))
    assert halved == dict(rows=4, out_of_memory_at=[16, 8])
    kept = times.entry(steps["Cell"](rows=16))
    assert kept["out_of_memory_at"] == [16] and "does not fit with 16 rows" in steps["summary"](kept)


def test_time_with_all_layers_is_a_line_through_two_depths():
    rows = [dict(float32=True, rows=8, layers=n, seconds=[0.5 + 0.1 * n]) for n in (8, 4)]
    load_benchmark("steps")["add_scaled"](rows, 32)
    assert [row["scaled_seconds"] for row in rows] == [3.7, 3.7]


# ---------------------------------------------------------------- speed.py


@pytest.mark.parametrize("full", [False, True], ids=["pretrained", "random"])
def test_speed_is_recorded(tmp_path, parts, full, small_products):
    "With `full`, settings given beside it are kept, and the others are the paper's."
    path = tmp_path / "record.json"
    RecordedSweep = load_benchmark("speed")["RecordedSweep"]
    options = dict(tokens=(16, 4), text=6, answer=4, repeats=3, batch=(2,), device="cpu")
    RecordedSweep(full=full, record=path, **options, **parts)()
    record = json.loads(path.read_text())
    expected = []
    for cache in ("dynamic", "static") if full else ("dynamic",):
        expected += [(cache, 16, "mlp", 2), (cache, 4, "delta", 2)]
    rows = [(row["cache"], row["tokens"], row["compressor"], row["batch"]) for row in record["result"]]
    assert rows == expected
    settings = tuple(record[name] for name in ("dtype", "random_weights", "warm_up"))
    assert settings == (("bfloat16", True, 2) if full else ("float32", False, 1))
    assert record["llm"] == parts["llm"] and record["answer"] == 4
    assert record["peak"] > 0 and record["bandwidth"] > 0
    assert record["clock"] == "CPU time of the process, one thread"


def test_full_changes_defaults_only():
    RecordedSweep = load_benchmark("speed")["RecordedSweep"]
    settings = RecordedSweep(full=True, batch=(4,)).settings()
    assert settings.batch == (4,) and settings.dtype == "bfloat16" and settings.random_weights
    assert RecordedSweep().settings() == SpeedSettings()


# ---------------------------------------------------------------- projector.py


def test_the_compared_projectors_agree_and_ratios_are_recorded(tmp_path):
    "Outputs and gradients are compared by the benchmark itself, which stops if they differ."
    path = tmp_path / "record.json"
    ProjectorTimes = load_benchmark("projector")["ProjectorTimes"]
    sizes = dict(batch=(1,), dtype=("float32",), tokens=(4,), d_vision=128, d_llm=64)
    threads = torch.get_num_threads()
    ProjectorTimes(**sizes, rounds=2, device="cpu", threads=1, record=path)()
    torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    (row,) = record["result"]
    assert record["clock"] == "CPU time of the process"
    assert list(row["forward_ms"]) == ["straightforward", "tokenpacker", "module", "folded", "floor"]
    assert list(row["training_ms"]) == ["straightforward", "tokenpacker", "module"]
    assert row["kept_mib"].keys() == row["training_ms"].keys()
    assert set(row["forward_over_module"]) == set(row["forward_ms"]) - {"module"}
    assert set(row["forward_over_folded"]) == set(row["forward_ms"]) - {"folded"}
    assert set(row["training_over_module"]) == {"straightforward", "tokenpacker"}
    with pytest.raises(ValueError, match=r"tokens=\[25\]"):
        ProjectorTimes(tokens=(25, 4))


def test_an_output_that_differs_stops_the_projector_benchmark():
    check_close = load_benchmark("projector")["check_close"]
    outputs = dict(straightforward=torch.zeros(3), module=torch.ones(3))
    with pytest.raises(AssertionError, match="module has another output"):
        check_close(outputs, dict(rtol=0, atol=1e-4))


# ---------------------------------------------------------------- cli.py


def test_calls_of_the_command_line_are_timed(tmp_path, capsys):
    module = load_benchmark("cli")
    assert module["cpu_seconds"](("-c", "sum(range(10**6))"), 0) > 0
    with pytest.raises(RuntimeError, match="ended with status 3, not 0"):
        module["cpu_seconds"](("-c", "raise SystemExit(3)"), 0)
    path = tmp_path / "cli.json"
    times = module["CommandLineTimes"](repeats=2, record=path)
    scope = times.__call__.__func__.__globals__
    scope["CALLS"] = {"empty": (("-c", ""), 0)}
    times()
    (row,) = json.loads(path.read_text())["result"]
    assert row["call"] == "empty" and row["cpu_seconds"] > 0
    assert "| empty" in capsys.readouterr().out


# ---------------------------------------------------------------- recipe.py


def test_finished_trainings_become_one_record(tmp_path, monkeypatch):
    recipe = load_benchmark("recipe")
    scores = {"heldout_scenes": {"36": {"count": [0.956, 0.25]}}}
    logs = dict(
        stage1=[dict(step=3, loss=2.0)],
        stage2=[
            dict(step=4, loss=0.5, seconds=1.0),
            dict(step=4, scores=scores),
            dict(step=5, train_loss=1.0),
        ],
    )
    for seed in (0, 2):  # seed 1 was stopped
        write_run(
            tmp_path / f"delta-{seed}",
            "recipe",
            {},
            seeds=[seed],
            result=dict(scores={}, logs=logs),
            seconds=9,
        )
    benchmark = recipe["RecipeSeeds"](folder=tmp_path, record=tmp_path / "r.json", merge_only=True)
    benchmark()
    record = json.loads((tmp_path / "r.json").read_text())
    first, last = record["result"]["trainings"]
    assert (record["seeds"], first["seed"], last["seed"]) == ([0, 2], 0, 2)
    assert (first["stage1_steps"], first["stage2_steps"]) == (3, 5)
    assert first["losses"] == [dict(step=4, loss=0.5)]
    (curve,) = first["curves"]
    assert (curve["step"], curve["percent"], curve["mismatched_percent"]) == (4, {"count": 96}, {"count": 25})
    with pytest.raises(ValueError, match="systems=.*must be among"):
        recipe["RecipeSeeds"](systems=("resampler",))


def test_few_trainings_of_the_recipe_run_at_once(tmp_path):
    "The third begins when one of two has ended; one that fails stops none of the others."
    options = dict(folder=tmp_path, record=tmp_path / "r.json", at_once=2, pause=0.05)
    benchmark = load_benchmark("recipe")["RecipeSeeds"](**options)
    started = []

    def start(training):
        ended = [process.poll() is not None for _, process in started]
        started.append((training, subprocess.Popen(["sh", "-c", f"sleep 0.3; exit {training[-1]}"])))
        assert len(ended) - sum(ended) < 2, "two were running"
        return started[-1][1]

    with patch.object(benchmark, "start", start), patch.object(benchmark, "last_line", str):
        assert benchmark.train() == ["delta-1", "delta-2"]
    assert [training for training, _ in started] == ["delta-0", "delta-1", "delta-2"]
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        type(benchmark)(at_once=0)


def test_the_systems_of_the_recipe_are_options_that_it_has():
    for options in load_benchmark("recipe")["SYSTEMS"].values():
        recipe = tyro.cli(LongRecipe, args=[*options, "--seed", "3"])
        assert recipe.seed == 3
        assert recipe.stage1().compressor == recipe.stage2().compressor == recipe.compressor
