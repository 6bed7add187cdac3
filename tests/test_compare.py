"The comparison: its plan, a run that is not repeated, one record of all runs."

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_stage import write_models

from delta_llava import compare
from delta_llava.captions import HELD_OUT_SETS, CaptionTraining
from delta_llava.compare import plan_runs, run_label, run_name, score_table
from delta_llava.compressors.base import COMPRESSORS, VARIANTS
from delta_llava.runs import read_record

RUNS = Path(__file__).parent.parent / "runs"
TINY = CaptionTraining(max_steps=2, batch_size=2, train_images=8, test_images=2)


def test_each_system_is_trained_as_its_authors_do():
    systems = ["delta", "delta-elastic", "mlp", "m3", "mqt", "fastv", "quecc", "small-image", "random"]
    runs = plan_runs(systems, (36, 4), (0,), (True,))
    assert [(run_label(run), run.train_budgets, run.eval_budgets) for run in runs] == [
        ("delta", (36,), (36,)),
        ("delta", (4,), (4,)),
        ("delta-elastic", (36, 4), (36, 4)),
        ("mlp", (144,), (144,)),
        ("m3", (36, 4), (36, 4)),
        ("mqt", (36, 4), (36, 4)),
        ("fastv", (144,), (36, 4)),
        ("quecc", (36,), (36,)),
        ("quecc", (4,), (4,)),
        ("small-image", (36,), (36,)),
        ("small-image", (4,), (4,)),
        ("random", (36,), (36,)),
        ("random", (4,), (4,)),
    ]
    assert all(run.tokens == run.eval_budgets[0] for run in runs)


def test_plan_has_every_seed_and_initialization_and_every_name():
    names = [*COMPRESSORS, *VARIANTS, *compare.REGISTRY_NAMES]
    runs = plan_runs(names, (16, 4), (0, 1), (True, False))
    assert len({run_name(run) for run in runs}) == len(runs)
    expected = {(name, seed, init) for name in names for seed in (0, 1) for init in (True, False)}
    assert {(run_label(run), run.seed, run.closed_form_init) for run in runs} == expected
    seeds = [run.seed for run in runs]
    assert seeds == sorted(seeds)  # seed by seed: an interrupted comparison has whole seeds


def test_impossible_budgets_are_left_out():
    assert [run.tokens for run in plan_runs(["tokenpacker"], (36, 20, 4), (0,), (True,))] == [36, 4]
    large = CaptionTraining(tower="hub:openai/clip-vit-large-patch14-336", image_size=336)  # a grid of 24×24
    runs = plan_runs(["tokenpacker", "mlp"], (64, 36), (0,), (True,), large)
    assert [run.tokens for run in runs] == [64, 36, 576]
    with pytest.raises(ValueError, match="'perceiver' is unknown"):
        plan_runs(["perceiver"], (16,), (0,), (True,))
    with pytest.raises(ValueError, match=r"can have one of budgets=\[10\]: tokens=10 must be the square"):
        plan_runs(["delta"], (10,), (0,), (True,))
    with pytest.raises(ValueError, match="need more than one of budgets=\\[16\\]"):
        plan_runs(["delta-elastic"], (16,), (0,), (True,))


@pytest.mark.parametrize("empty", ["compressors", "budgets", "seeds", "closed_form_init"])
def test_empty_comparison_is_refused(empty, tmp_path):
    given = dict(compressors=["delta"], budgets=(16,), seeds=(0,), closed_form_init=(True,))
    with pytest.raises(ValueError, match=f"{empty} is empty; name at least one"):
        plan_runs(**given | {empty: ()})
    with pytest.raises(ValueError, match="runs is empty"):
        compare.compare([], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    runs = plan_runs(["delta", "m3"], (4,), (0,), (True, False), TINY)
    names = [run_name(run) for run in runs]
    done = []

    def train_and_evaluate(config):
        done.append(run_name(config))
        if len(done) == 3:
            raise KeyboardInterrupt
        config.output_dir.mkdir(parents=True)
        scores = {"set": {"4": dict(forced_choice_accuracy=0.5)}}
        result = dict(
            label=run_label(config),
            scores=scores,
            flops={"4": 7},
            parameters=3,
            losses=[2.0, 1.0],
            matmul_precision="highest",
        )
        run = dict(kind="quickstart", commit="c", hardware="h", versions={}, settings=asdict(config))
        run["result"] = result
        (config.output_dir / "run.json").write_text(json.dumps(run, default=str))

    monkeypatch.setattr(compare, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(compare, "prepare_data", lambda runs: None)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(runs, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        compare.compare([replace(run, max_steps=9) for run in runs], tmp_path)
    first = done[:2]
    half = read_record(tmp_path / "record.json")  # written after an interruption, too
    assert len(half["result"]) == 2 and half["hardware"] == "h"
    assert half["not_run"] == [name for name in names if name not in first]
    record = read_record(compare.compare(runs, tmp_path))
    assert done[3:] == [name for name in names if name not in first] and len(done) == 5
    assert [r["compressor"] for r in record["result"]] == ["delta", "delta", "m3", "m3"]
    assert record["seeds"] == [0]
    values = {(row["label"], row["closed_form_init"]): row["values"] for row in score_table(record)}
    assert values == {(name, init): [0.5] for name in ("delta", "m3") for init in (True, False)}


def test_a_comparison_stopped_before_its_scores_goes_on_under_another_path(tmp_path, monkeypatch):
    write_models(tmp_path)
    models = dict(tower=str(tmp_path / "tower"), llm=str(tmp_path / "llm"), image_size=56, template="plain")
    runs = plan_runs(["mlp"], (16,), (0,), (False,), replace(TINY, standardize=False, **models))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    steps = []
    monkeypatch.setattr(compare, "evaluate_sets", stop)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(runs, tmp_path / "c")
    assert compare.read_run(tmp_path / "c" / "runs" / run_name(runs[0]))["result"]["losses"]
    monkeypatch.setattr(compare, "evaluate_sets", lambda *args, **kwargs: {})
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *args, **kwargs: steps.append(1))
    monkeypatch.chdir(tmp_path)
    record = read_record(compare.compare(runs, "c"))
    assert len(record["result"]) == 1 and not record["not_run"] and not steps


def test_comparison_of_an_earlier_version_is_not_continued(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match="earlier version"):
        compare.compare(plan_runs(["delta"], (4,), (0,), (True,), TINY), tmp_path)


def test_committed_records_are_read_with_the_new_names():
    for name in ("compare", "compare-short"):
        rows = score_table(read_record(RUNS / f"{name}.json"))
        assert {row["images"] for row in rows} == HELD_OUT_SETS.keys()
        assert all(0 <= value <= 1 for row in rows for value in row["values"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPRESSORS, *VARIANTS, *compare.REGISTRY_NAMES])
def test_every_compressor_is_trained_and_evaluated(name, tmp_path):
    budgets = (16, 4) if name == "delta-elastic" else (16,)
    (run,) = plan_runs([name], budgets, (0,), (True,), replace(TINY, max_steps=4, train_images=16))
    record = read_record(compare.compare([run], tmp_path))
    (r,) = record["result"]
    assert all(0 < loss < 20 for loss in r["losses"]) and r["parameters"] > 1e5
    for budgets in r["scores"].values():
        for t, s in budgets.items():
            assert 0 <= s["forced_choice_accuracy"] <= 1 and s["matched_loss"] > 0 and r["flops"][t] > 1e9
