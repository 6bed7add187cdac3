"Trainings on captions at a small scale, with the real vision tower, LLM and images; refused settings."

import json
import re
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_vlm import byte_tokenizer, tiny
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from delta_llava.answerer import Answerer
from delta_llava.captions import (
    HELD_OUT_SETS,
    QUESTION,
    CaptionTraining,
    evaluate_run,
    evaluate_sets,
    held_out_images,
    meets_target,
    read_caption_training,
    training_images,
)
from delta_llava.processor import build_processor
from delta_llava.runs import load, read_run
from delta_llava.tower import open_image
from delta_llava.train import run_stage

TINY = CaptionTraining(
    max_steps=2, batch_size=2, train_images=8, test_images=2, train_budgets=(16,), eval_budgets=(4, 16)
)
SCORES = {
    "matched_loss",
    "mismatched_loss",
    "p",
    "forced_choice_accuracy",
    "pointing_accuracy",
    "pointing_chance",
    "energy",
    "box_area",
}
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same run twice, in two folders."
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    for folder in folders:
        run_stage(replace(TINY, output_dir=folder))
    return folders, [read_run(folder) for folder in folders]


def reproducible(run):
    "A run without what depends on the folder, the clock and the command."
    settings = {k: v for k, v in run["settings"].items() if k != "output_dir"}
    return settings, run["result"]["losses"], run["fingerprints"], run["seeds"]


def count_optimizer_steps(monkeypatch):
    "A list that grows with each optimizer step from now on."
    steps = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        steps.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return steps


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_two_runs_give_the_same_numbers(runs):
    (one, two), (first, second) = runs
    assert reproducible(first) == reproducible(second)
    assert (one / "projector.safetensors").read_bytes() == (two / "projector.safetensors").read_bytes()
    settings = json.loads(json.dumps(asdict(replace(TINY, output_dir=one)), default=str))
    assert first["kind"] == "captions" and first["seeds"] == [0]
    assert {k: first["settings"][k] for k in settings} == settings
    assert read_caption_training(one) == replace(TINY, output_dir=one)


@pytest.mark.slow
def test_model_card_tells_how_to_load_it(runs):
    (folder, _), _ = runs
    scope = dict(folder=folder)
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1], scope)
    loaded, trained = (m.multi_modal_projector.state_dict() for m in (load(folder)[0], scope["model"]))
    assert loaded.keys() == trained.keys() and all(loaded[k].equal(trained[k]) for k in loaded)


@pytest.mark.slow
def test_finished_run_is_not_trained_again_and_other_settings_are_refused(runs, monkeypatch):
    (_, folder), (_, run) = runs
    steps = count_optimizer_steps(monkeypatch)
    run_stage(replace(TINY, output_dir=folder))
    assert reproducible(read_run(folder)) == reproducible(run) and not steps
    with pytest.raises(ValueError, match="seed"):
        run_stage(replace(TINY, seed=1, output_dir=folder))
    assert read_run(folder)["settings"]["seed"] == 0


@pytest.mark.slow
def test_run_is_evaluated_with_captions_that_the_answerer_gives(runs):
    (folder, _), _ = runs
    rows = evaluate_run(folder)
    expected = [(name, t) for name in HELD_OUT_SETS for t in TINY.eval_budgets]
    assert [(r["set"], r["tokens"]) for r in rows] == expected
    model, processor = load(folder)
    assert not model.training
    sets = held_out_images(TINY, folder / "held-out-2")
    for r in rows:
        assert len(r["captions"]) == len(r["references"]) == 2
        if r["tokens"] == 16:
            image = open_image(sets[r["set"]][0]["image"])
            answer = Answerer(model, processor).answer(image, QUESTION, tokens=16, max_new_tokens=24)
            assert r["captions"][0] == answer
    assert evaluate_run(folder) == rows
    few = evaluate_run(folder, (9,), 3)
    assert {r["tokens"] for r in few} == {9} and len(few[0]["captions"]) == 3
    assert 0 <= few[0]["recall"] <= 1


@pytest.mark.slow
def test_full_grid(tmp_path):
    "All 144 patches as visual tokens, as in `delta-llava train --tokens 144`."
    config = replace(TINY, tokens=144, train_budgets=(), eval_budgets=(), output_dir=tmp_path)
    run_stage(config)
    losses = read_run(tmp_path)["result"]["losses"]
    assert all(0 < loss < 20 for loss in losses)
    model, _ = load(tmp_path)
    assert not model.multi_modal_projector.training


# ---------------------------------------------------------------- parts


def test_evaluation_of_a_tiny_model(tmp_path):
    "Random weights: every score, without a training."
    config = replace(TINY, output_dir=tmp_path)
    processor = build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=16, template="v1")
    model, name = tiny("clip_b32_224").eval(), "heldout_artist, several objects"
    sets = {name: held_out_images(config, tmp_path)[name]}
    scores = evaluate_sets(model, processor, sets, config.evaluation_budgets, progress=False, captions=True)
    assert scores[name].keys() == {"4", "16"}
    for s in scores[name].values():
        assert SCORES <= s.keys() and len(s["captions"]) == len(s["references"]) == 2
        assert 0 <= s["pointing_accuracy"] <= 1 and 0 < s["box_area"] < 1


def test_held_out_images_differ_from_training_images(tmp_path):
    rows, held_out = training_images(TINY, tmp_path), held_out_images(TINY, tmp_path)
    assert len(rows) == 8 and held_out.keys() == HELD_OUT_SETS.keys()
    for name, part in held_out.items():
        assert len(part) == 2
        fewest, most = HELD_OUT_SETS[name][1]
        assert {len(row["objects"]) for row in part} <= set(range(fewest, most + 1))
    captions = [row["conversations"][1]["value"] for row in rows]
    again = training_images(TINY, tmp_path / "again")
    assert [row["conversations"][1]["value"] for row in again] == captions
    other = training_images(replace(TINY, seed=1), tmp_path / "other")
    objects = {tuple(map(str, row["objects"])) for row in rows}
    assert not {tuple(map(str, row["objects"])) for row in other} & objects  # seeds share no scene


@pytest.mark.parametrize(
    "name,p,accuracy,expected",
    [
        ("heldout_scenes, one object", 0.001, 0.32, True),
        ("heldout_scenes, one object", 0.001, 0.30, False),
        ("heldout_artist, several objects", 0.001, 0.19, True),
        ("heldout_artist, several objects", 0.001, 0.18, False),
        ("heldout_artist, several objects", 0.02, 0.9, False),
    ],
)
def test_target(name, p, accuracy, expected):
    assert meets_target(name, dict(p=p, forced_choice_accuracy=accuracy)) is expected


@pytest.mark.parametrize(
    "fields,error",
    [
        (dict(scene_size=0), "scene_size=0 must be at least 1"),
        (dict(max_steps=0), "max_steps=0 must be at least 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(train_images=0), "train_images=0"),
        (dict(test_images=1), "test_images=1 must be at least 2"),
        (dict(tokens=4), "tokens=4 must be one of eval_budgets"),
        (dict(data=Path("rows.json")), "data=rows.json"),
        (dict(tokens=25, train_budgets=()), "tokens=25 must be one of eval_budgets"),
    ],
)
def test_settings_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        CaptionTraining(**fields)


@pytest.mark.parametrize(
    "fields,error",
    [
        (dict(image_size=100), "image_size=100 must be a multiple of the tower's patch size 14"),
        (dict(train_budgets=(5,)), "tokens=5 must be the square"),
        (dict(eval_budgets=(16, 169)), "tokens=169 must be the square"),
    ],
)
def test_settings_that_do_not_fit_the_tower(fields, error, tmp_path):
    with pytest.raises(ValueError, match=re.escape(error)):
        run_stage(replace(TINY, output_dir=tmp_path / "q", **fields))
    assert not (tmp_path / "q" / "scenes").exists()


def test_empty_budgets_are_the_main_one():
    config = CaptionTraining(tokens=1, train_budgets=(), eval_budgets=())
    assert config.evaluation_budgets == (1,)
    assert replace(config, tokens=4).evaluation_budgets == (4,)


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_caption_training(tmp_path)


def test_recipe_of_an_earlier_version_is_read(tmp_path):
    record = json.loads((Path(__file__).parent.parent / "runs" / "captions-seed0.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(record["recipe"]))
    (tmp_path / "record.json").write_text(json.dumps(record))
    config = read_caption_training(tmp_path)
    assert config == CaptionTraining(output_dir=tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(record["recipe"] | dict(colour="red")))
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        read_caption_training(tmp_path)


# ---------------------------------------------------------------- benchmarks


def test_caption_benchmark_trains_and_evaluates_once(tmp_path, monkeypatch):
    module = runpy.run_path(str(BENCHMARKS / "captions.py"))
    scope = module["Captions"].train_and_evaluate.__globals__
    trained, evaluated = [], []

    def run_stage(config):
        if (config.output_dir / "run.json").exists():
            return
        trained.append(config.output_dir.name)
        config.output_dir.mkdir(parents=True)
        run = dict(kind="quickstart", settings=asdict(config), commit="c", seconds=1.0)
        run["result"] = dict(losses=[3.0, 2.0])
        (config.output_dir / "run.json").write_text(json.dumps(run, default=str))

    def evaluate_run(folder):
        evaluated.append(folder.name)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        name, seed = folder.name.split("-")
        row = dict.fromkeys(module["SCORES"], 0.5) | dict(seed=int(seed), compressor=name, set="one")
        row |= dict(captions=["A fox."] * 5, references=["A key."] * 5)
        return [row | dict(tokens=t) for t in read_caption_training(folder).eval_budgets]

    monkeypatch.setitem(scope, "run_stage", run_stage)
    monkeypatch.setitem(scope, "evaluate_run", evaluate_run)
    captions = module["Captions"](seeds=(0, 1), folder=tmp_path / "c", record=tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        captions()
    captions()
    assert trained == [f"{name}-{seed}" for seed in (0, 1) for name in ("delta", "fastv")]
    assert evaluated == ["delta-0", "fastv-0", "fastv-0", "delta-1", "fastv-1"]
    record = json.loads((tmp_path / "r.json").read_text())
    expected = []
    for seed in (0, 1):
        expected += [(seed, "delta", t) for t in (16, 4, 1)] + [(seed, "fastv", t) for t in (64, 16, 4, 1)]
    assert [(r["seed"], r["compressor"], r["tokens"]) for r in record["result"]] == expected
    assert record["patches"] == 64 and record["seeds"] == [0, 1] and len(record["trainings"]) == 4
    assert len(record["result"][0]["captions"]) == 3 and record["fastv_layer"] == 2


def test_caption_benchmark_trains_both_systems_alike():
    settings = runpy.run_path(str(BENCHMARKS / "captions.py"))["Captions"]().settings()
    assert {(s.compressor, s.train_budgets, s.tokens) for s in settings} == {
        ("delta", (16, 4, 1), 16),
        ("fastv", (64,), 64),
    }
    differ = ("compressor", "tokens", "train_budgets", "eval_budgets", "seed", "output_dir")
    common = [{k: v for k, v in vars(s).items() if k not in differ} for s in settings]
    assert all(c == common[0] for c in common)


def test_initialization_benchmark_compares_equal_settings(tmp_path):
    benchmark = runpy.run_path(str(BENCHMARKS / "closed_form_init.py"))["Benchmark"]()
    authors = benchmark.settings(0, "delta", "authors", tmp_path)
    closed_form = benchmark.settings(0, "delta", "closed_form", tmp_path)
    assert replace(authors, closed_form_init=True) == closed_form and not authors.closed_form_init
