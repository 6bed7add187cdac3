"One stage with a small reader: its folder, a loss that falls, stored features, a comparison's record."

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_stage import write_models

from delta_llava import compare, question_training
from delta_llava.assets import load_llm
from delta_llava.compare import plan_runs, run_label, run_name
from delta_llava.processor import TEMPLATES
from delta_llava.question_training import (
    HELD_OUT,
    question_scenes,
    question_sets,
    question_texts,
    train_on_questions,
    unpack_bits,
    with_reader,
    write_reader,
)
from delta_llava.recipe import run_recipe
from delta_llava.runs import read_record, read_run
from delta_llava.settings import QuestionTraining, Recipe


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder)
    return str(folder / "tower")


@pytest.fixture
def tiny(tower, tmp_path):
    return QuestionTraining(
        output_dir=tmp_path / "run",
        tower=tower,
        image_size=56,
        train_images=8,
        test_images=3,
        curve_images=2,
        curve_steps=2,
        reader_width=32,
        reader_layers=1,
        tokens=4,
        train_budgets=(4, 1),
        eval_budgets=(4, 1),
        max_steps=12,
        batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
    )


def test_reader_is_an_llm_like_any_other(tmp_path):
    texts = ["Is there a fox in the picture?", "Yes", "A fox and a bus."]
    llm, tokenizer = load_llm(write_reader(tmp_path / "reader", texts, width=64, layers=2))
    assert llm.config.hidden_size == 64 and llm.config.num_hidden_layers == 2
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    ids = tokenizer("A fox and a bus.<|im_end|>")["input_ids"]
    assert len(ids) == 7 and ids[-1] == tokenizer.eos_token_id == llm.config.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a fox and a bus."
    same, other = (write_reader(tmp_path / str(seed), texts, 64, 2, seed) for seed in (0, 1))
    assert torch.equal(load_llm(same)[0].lm_head.weight, llm.lm_head.weight)
    assert not torch.equal(load_llm(other)[0].lm_head.weight, llm.lm_head.weight)


def test_reader_knows_every_word_of_its_scenes(tiny):
    config = with_reader(tiny)
    _, tokenizer = load_llm(config.llm)
    for rows in question_scenes(tiny).values():
        for text in question_texts(rows):
            known_names = "A" if len(text) == 1 else text  # letters of choice are not all in eight scenes
            assert tokenizer.unk_token_id not in tokenizer(known_names)["input_ids"], text
    assert with_reader(config) is config


def test_the_loss_falls_and_all_weights_of_the_llm_are_trained(tiny):
    model, _, sets, results = train_on_questions(tiny)
    run = read_run(tiny.output_dir)
    losses = run["result"]["losses"]
    assert run["kind"] == "questions" and losses[-1] < 0.8 * losses[0]
    trained, total = run["parameter_counts"]["llm"]
    assert trained == total > 0
    untrained, _ = load_llm(with_reader(tiny).llm)
    before = untrained.state_dict()
    for name, weight in model.language_model.state_dict().items():
        assert not torch.equal(weight, before[name]), name
    assert [step for step, _ in results["curve"]] == [2, 4, 6, 8, 10, 12]
    for split in HELD_OUT:
        assert list(results["scores"][split]) == ["4", "1"]
        for tokens, tasks in results["scores"][split].items():
            n = sum(score["n"] for score in tasks.values())
            hits = sum(round(score["n"] * score["accuracy"]) for score in tasks.values())
            assert unpack_bits(results["bits"][split][tokens], n).sum() == hits
            assert n == sum(len(turns) // 2 for turns in sets[split].rows["conversations"])


def test_features_are_computed_once_and_mapped(tiny, monkeypatch):
    first = question_sets(tiny)
    assert (
        isinstance(first["train"].features.numpy().base, np.memmap) or first["train"].features.shape[0] == 8
    )

    def no_tower(*args, **kwargs):
        raise AssertionError("the features are there")

    monkeypatch.setattr(question_training, "load_tower", no_tower)
    again = question_sets(replace(tiny, compressor="meanpool"))
    for split, scenes in first.items():
        assert torch.equal(scenes.features, again[split].features)
    with pytest.raises(AssertionError, match="the features are there"):
        question_sets(replace(tiny, image_size=28, scene_size=56))


def test_the_recipe_takes_a_reader(tiny, tmp_path):
    folder = write_reader(tmp_path / "reader", question_texts(question_scenes(tiny)["train"]), 32, 1)
    recipe = Recipe(
        output_dir=tmp_path / "recipe",
        tower=tiny.tower,
        llm=str(folder),
        image_size=56,
        train_images=4,
        test_images=2,
        curve_steps=0,
        tokens=4,
        train_budgets=(4,),
        eval_budgets=(4,),
        stage1_steps=1,
        stage2_steps=1,
        stage1_batch_size=2,
        stage2_batch_size=2,
        lora_rank=0,
    )
    assert run_recipe(recipe)["result"]["scores"].keys() == set(HELD_OUT)


SYSTEMS = ["delta-elastic", "meanpool-elastic", "small-image", "pixelshuffle"]


def test_a_comparison_on_questions_resumes_and_leaves_one_record(tiny, tmp_path, monkeypatch):
    base = replace(tiny, max_steps=2, train_budgets=(), eval_budgets=(), bf16=False)
    runs = plan_runs(SYSTEMS, (4, 1), (0,), (True,), base)
    assert [run_label(run) for run in runs] == [*SYSTEMS[:2], *["small-image"] * 2, *["pixelshuffle"] * 2]
    started = []

    def stop_at_third(config):
        started.append(run_name(config))
        if len(started) == 3:
            raise KeyboardInterrupt
        return train_on_questions(config)

    monkeypatch.setattr(compare, "train_on_questions", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(runs, tmp_path / "c")
    half = read_record(tmp_path / "c" / "record.json")
    assert [r["label"] for r in half["result"]] == SYSTEMS[:2] and len(half["not_run"]) == 4
    record = read_record(compare.compare(runs, tmp_path / "c"))
    assert len(started) == 3 + 4 and record["not_run"] == []
    assert {r["label"] for r in record["result"]} == set(SYSTEMS)
    assert record["settings"]["llm"] == "reader" and record["settings"]["image_size"] == 56
    for result in record["result"]:
        budgets = ["4", "1"] if result["label"].endswith("-elastic") else [str(result["tokens"])]
        assert list(result["scores"]["heldout_scenes"]) == list(result["flops"]) == budgets
        assert result["converged"] is False and len(result["curve"]) == 1
    assert not list((tmp_path / "c").rglob("runs/*/model*.safetensors"))  # the tower is in them


def test_every_system_with_the_same_weights_at_all_budgets_can_be_elastic(tiny):
    base = replace(tiny, image_size=56)
    for name in ("delta", "tokenpacker", "cabstractor", "random", "spaced", "meanpool", "delta-no-tb"):
        (run,) = plan_runs([f"{name}-elastic"], (4, 1), (0,), (True,), base)
        assert (run.compressor, run.train_budgets, run_label(run)) == (name, (4, 1), f"{name}-elastic")
    with pytest.raises(ValueError, match="need more than one of budgets"):
        plan_runs(["pixelshuffle-elastic"], (4, 1), (0,), (True,), base)


@pytest.mark.parametrize("compressor", ["quecc", "fastv", "prumerge", "fastervlm", "evit", "dynamicvit"])
def test_compressors_that_read_more_than_patch_tokens_are_refused(compressor):
    with pytest.raises(ValueError, match=f"compressor=.{compressor}."):
        QuestionTraining(compressor=compressor)
