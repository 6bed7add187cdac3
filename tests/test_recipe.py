"Both stages on planted scenes with tiny parts: scores, weights to share, time limits, resuming."

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_stage import chatml_tokenizer, write_models
from torch import nn
from transformers import TrainerCallback

from delta_llava import recipe as recipe_module
from delta_llava.answerer import Answerer, Request
from delta_llava.processor import JOIN_PARTS, TEMPLATES
from delta_llava.recipe import QuestionSet, binomial_interval, caption_rows, run_recipe, scene_rows
from delta_llava.runs import load, read_run
from delta_llava.settings import QUICKSTART_OBJECTS, LongRecipe, Recipe
from delta_llava.shared_image import SharedImageCollator, TurnTokenizer, question_pairs
from delta_llava.train import build_stage_model, fast_bfloat16
from delta_llava.trainer import StageTrainer, TimeLimit, stage_arguments


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder)
    chatml_tokenizer().save_pretrained(folder / "llm")
    return folder


@pytest.fixture
def tiny(parts, tmp_path):
    return Recipe(
        output_dir=tmp_path / "run",
        train_images=6,
        test_images=3,
        curve_images=2,
        curve_steps=2,
        curve_budgets=(4,),
        tower=str(parts / "tower"),
        llm=str(parts / "llm"),
        image_size=56,
        tokens=4,
        train_budgets=(4, 1),
        eval_budgets=(4, 1),
        stage1_steps=4,
        stage2_steps=4,
        stage1_batch_size=2,
        stage2_batch_size=2,
        lora_rank=2,
        save_steps=2,
        logging_steps=1,
    )


def test_a_run_leaves_scores_curves_and_small_weights(tiny):
    run = run_recipe(tiny)
    assert run == read_run(tiny.output_dir)
    assert set(run["result"]["scores"]) == {"heldout_scenes", "heldout_artist"}
    for budgets in run["result"]["scores"].values():
        assert list(budgets) == ["4", "1"]
        for tasks in budgets.values():
            for s in tasks.values():
                assert s["low"] <= s["accuracy"] <= s["high"] and 0 <= s["mismatched_accuracy"] <= 1
            assert {"f1", "mismatched_f1"} <= tasks["existence"].keys()
    for stage in ("stage1", "stage2"):
        steps = [entry["step"] for entry in run["result"]["logs"][stage] if "scores" in entry]
        assert steps == [2, 4]
    assert run["fingerprints"].keys() == {"projector.safetensors", "lora.safetensors"}
    shared, exact = load(tiny.output_dir)[0], load(tiny.work_folder / "stage2")[0]
    assert not [name for name, _ in shared.named_parameters() if "lora_" in name]  # merged
    for (name, a), (_, b) in zip(shared.named_parameters(), exact.named_parameters(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-3, msg=name)
    llm = load(tiny.work_folder / "stage1")[0].language_model.state_dict()
    assert any(not w.equal(llm[k]) for k, w in exact.language_model.state_dict().items())
    assert run_recipe(tiny)["result"]["scores"] == run["result"]["scores"]  # nothing is trained again


def test_each_log_is_printed_once_with_the_time_that_is_left(tiny, capsys):
    run_recipe(replace(tiny, curve_steps=0))
    printed = capsys.readouterr().out
    lines = re.findall(r"step (\d) of 4: loss [\d.]+, rate \S+, \d+ s, [\d.]+ steps/s, (\S+) left", printed)
    assert [int(step) for step, _ in lines] == [1, 2, 3, 4] * 2  # both stages
    assert lines[3][1] == lines[7][1] == "00:00"
    assert "{'loss'" not in printed and "scored in" not in printed  # nothing of transformers, no curves


@pytest.mark.parametrize("change", [dict(train_images=7), dict(most_objects=2), dict(image_size=70)])
def test_scenes_of_other_settings_are_not_taken(tiny, change):
    recipe_module.write_recipe_scenes(tiny)
    with pytest.raises(ValueError, match=f"holds scenes with {next(iter(change))}="):
        recipe_module.write_recipe_scenes(replace(tiny, **change))
    assert recipe_module.write_recipe_scenes(tiny)["train"].exists()


def test_scenes_show_the_objects_that_are_named(tiny):
    recipe = replace(tiny, objects=QUICKSTART_OBJECTS, most_objects=2, train_images=12)
    for file in recipe_module.write_recipe_scenes(recipe).values():
        rows = json.loads(file.read_text())
        assert {len(row["objects"]) for row in rows} <= {1, 2}
        assert {o["name"] for row in rows for o in row["objects"]} <= set(QUICKSTART_OBJECTS)


def test_a_stopped_recipe_goes_on_to_the_same_weights(tiny, tmp_path, monkeypatch):
    whole = run_recipe(tiny)["fingerprints"]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "stage2" in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    class Both(recipe_module.PrintLog, Stop):
        pass

    other = replace(tiny, output_dir=tmp_path / "other")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe_module, "PrintLog", Both)
        run_recipe(other)
    assert run_recipe(other)["fingerprints"] == whole


@pytest.mark.parametrize("fast", [True, False])
def test_the_processor_chooses_the_precision(tiny, monkeypatch, capsys, fast):
    monkeypatch.setattr(recipe_module, "fast_bfloat16", lambda: fast)
    assert tiny.bf16 is None and LongRecipe().bf16
    run = run_recipe(tiny)
    stages = [read_run(tiny.work_folder / stage) for stage in ("stage1", "stage2")]
    assert [r["settings"]["bf16"] for r in (run, *stages)] == [fast] * 3
    assert f"computing in {'bfloat16' if fast else 'float32'} on cpu, " in capsys.readouterr().out
    with pytest.raises(ValueError, match="bf16"):  # another precision is another run
        run_recipe(replace(tiny, bf16=not fast))


@pytest.mark.parametrize(
    "has, fast", [({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)]
)
def test_what_the_processor_says_decides(monkeypatch, has, fast):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert fast_bfloat16() is fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_bfloat16() is False


def test_losses_in_bfloat16_are_near_those_in_float32(tiny, tmp_path):
    losses = {}
    for bf16 in (True, False):
        run = run_recipe(replace(tiny, bf16=bf16, curve_steps=0, output_dir=tmp_path / str(bf16)))
        logs = run["result"]["logs"].values()
        losses[bf16] = torch.tensor([entry["loss"] for log in logs for entry in log if "loss" in entry])
    assert len(losses[True]) == 8 and not losses[True].equal(losses[False])
    torch.testing.assert_close(losses[True], losses[False], rtol=0.03, atol=0)


def test_the_llm_itself_can_be_trained(tiny):
    recipe = replace(tiny, lora_rank=0)
    run_recipe(recipe)
    model, processor = load(recipe.output_dir)
    assert processor.tokens == 4
    before = load(recipe.work_folder / "stage1")[0].language_model.state_dict()
    assert any(not w.equal(before[k]) for k, w in model.language_model.state_dict().items())


def test_right_answers_are_those_that_greedy_decoding_writes(tiny):
    "A model that was trained on four scenes until it answers some questions."
    recipe = replace(
        tiny, lora_rank=0, train_images=4, stage2_steps=120, curve_steps=1000, stage2_batch_size=4,
        stage2_learning_rate=5e-3, train_budgets=(4,), logging_steps=60,
    )  # fmt: skip
    run_recipe(recipe)
    model, processor = load(recipe.output_dir)
    files = recipe_module.write_recipe_scenes(recipe)
    scenes = recipe_module.read_scene_sets(recipe, files)["train"]
    hits = QuestionSet(processor, scenes, batch_size=3).exact_matches(model, 4)
    requests, expected = [], []
    for row, features in zip(scenes.rows, scenes.features, strict=True):
        for question, answer in question_pairs(row["conversations"]):
            requests.append(Request(question, vision_features=features[None].float()))
            expected.append(answer)
    written = Answerer(model, processor).generate(requests, tokens=4, max_new_tokens=60)
    flat = [hit for row in hits for hit in row]
    assert flat == [a == b for a, b in zip(written, expected, strict=True)]
    assert 5 < sum(flat) < len(flat)


def test_another_order_shows_other_images(tiny):
    files = recipe_module.write_recipe_scenes(tiny)
    scenes = recipe_module.read_scene_sets(tiny, files)["heldout_scenes"]
    model, processor = build_stage_model(tiny.stage1())
    shown = []
    model.register_forward_pre_hook(
        lambda m, args, inputs: shown.append(inputs["vision_features"]), with_kwargs=True
    )
    questions = QuestionSet(processor, scenes, batch_size=2)
    questions.exact_matches(model, 4)
    questions.exact_matches(model, 4, torch.tensor([1, 2, 0]))
    assert torch.cat(shown[:2]).equal(scenes.features)
    assert torch.cat(shown[2:]).equal(scenes.features[[1, 2, 0]])


def test_stage_1_reads_captions_alone(tiny):
    files = recipe_module.write_recipe_scenes(tiny)
    rows, captions = scene_rows(files["train"]), caption_rows(scene_rows(files["train"]))
    assert [row["conversations"][:2] for row in rows] == list(captions["conversations"])
    assert all(len(turns) == 2 and "<image>" in turns[0]["value"] for turns in captions["conversations"])


# ---------------------------------------------------------------- batches


def processor_with(tiny, template):
    processor = recipe_module.recipe_processor(tiny)
    processor.chat_template = JOIN_PARTS + TEMPLATES[template]
    return processor


def test_a_template_without_the_question_is_refused(tiny):
    with pytest.raises(ValueError, match="template='chatml'"):
        TurnTokenizer(processor_with(tiny, "plain"))


@pytest.mark.parametrize("template", ["chatml", "v1"])
def test_tokens_of_a_question_are_those_of_its_conversation(tiny, template):
    processor = processor_with(tiny, template)
    turns = TurnTokenizer(processor)
    pairs = [("Is there a fox in the picture?", "Yes"), ("Where?\nAnswer.", "Upper left"), ("A", "B")]
    for (ids, labels), (question, answer) in zip(turns(pairs), pairs, strict=True):
        row = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        expected = processor.tokenize_conversation(row)
        before = len(turns.prefix_ids) + 1
        assert [*turns.prefix_ids, processor.image_token_id, *ids] == expected["input_ids"]
        assert [-100] * before + labels == expected["labels"]


def test_lengths_are_multiples_and_long_rows_are_cut(tiny):
    files = recipe_module.write_recipe_scenes(tiny)
    rows = list(scene_rows(files["train"]))
    for row in rows:
        row["image"] = str(files["train"].parent / "images" / f"{row['id']}.png")
    processor = recipe_module.recipe_processor(tiny)
    for tokens in (4, 1):
        batch = SharedImageCollator(processor=processor, pad_to_multiple_of=16)(rows, tokens)
        assert batch["input_ids"].shape[1] % 16 == 0
        assert ((batch["input_ids"] == processor.image_token_id).sum(1) == tokens).all()
    cut = SharedImageCollator(processor=processor, max_length=100)(rows, 4)
    assert cut["input_ids"].shape == (6, 100)
    assert cut["input_ids"].equal(SharedImageCollator(processor=processor)(rows, 4)["input_ids"][:, :100])


# ---------------------------------------------------------------- time limits


def test_a_time_limit_ends_the_run_with_the_rate_at_zero(tmp_path, monkeypatch):
    "The clock of the test goes one second for each step."
    model = nn.Linear(1, 1)
    clock = SimpleNamespace(now=0.0)
    limit = TimeLimit(minutes=10 / 60)
    monkeypatch.setattr("delta_llava.trainer.time.monotonic", lambda: clock.now)

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.now += 1

    class Plain(StageTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(torch.ones(1, 1)).sum() ** 2

        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)

    args = stage_arguments(tmp_path, max_steps=1000, batch_size=1, save_steps=1000, warmup_ratio=0.001)
    args.logging_steps = 1
    args.use_cpu = True
    rows = [dict(id=str(i)) for i in range(8)]
    trainer = Plain(
        model, args, data_collator=lambda rows: dict(x=torch.ones(1)), train_dataset=rows, callbacks=[Tick()]
    )
    trainer.time_limit = limit
    trainer.add_callback(limit)
    trainer.train()
    assert trainer.state.global_step == 10
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == 0 and rates[1:] == sorted(rates[1:], reverse=True)  # one step of warm-up
    assert rates[-1] < 0.1 * args.learning_rate  # of ten steps, each a tenth of the time
    assert [entry["seconds"] for entry in trainer.state.log_history if "seconds" in entry][:3] == [
        1.0,
        2.0,
        3.0,
    ]


def test_settings_of_both_stages_agree(tmp_path):
    for recipe in (Recipe(output_dir=tmp_path), LongRecipe(output_dir=tmp_path, work_dir=tmp_path / "w")):
        one, two = recipe.stage1(), recipe.stage2()
        assert two.projector == one.output_dir and one.data == two.data
        assert one.standardize == two.standardize and one.template == two.template and one.tower == two.tower
        assert set(recipe.eval_budgets) >= set(recipe.train_budgets) >= {recipe.tokens}
        json.dumps(recipe_module.recipe_settings(recipe), default=str)
    with pytest.raises(ValueError, match="curve_images=1"):
        Recipe(curve_images=1)


def test_intervals_hold_the_truth():
    for n in range(1, 60):  # exactly, so that none is printed as -0%
        assert str(binomial_interval(0, n)[0]) == "0.0" and binomial_interval(n, n)[1] == 1
    low, high = binomial_interval(40, 50)
    assert low < 0.8 < high and math.isclose(high - low, 0.22, abs_tol=0.02)


@pytest.mark.parametrize("compressor", ["prumerge", "fastervlm", "evit"])
def test_compressors_that_read_more_than_patch_tokens_are_refused_at_once(compressor):
    with pytest.raises(ValueError, match=f"compressor='{compressor}' reads more of the vision tower"):
        Recipe(compressor=compressor)
