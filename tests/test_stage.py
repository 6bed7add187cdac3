"Both stages from end to end: what is trained, stopped and killed runs, full disks, NaN, several processes."

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_stage
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_stage import EachStep, stage, write_parts
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from delta_llava import passes, trainer
from delta_llava.closed_form_init import closed_form_init
from delta_llava.compressors.m3 import M3Config
from delta_llava.launch import accelerate_cmd, slurm_script, write_launch
from delta_llava.runs import load, read_run
from delta_llava.tower import cache_features
from delta_llava.train import (
    Finetune,
    build_stage_model,
    nested_budgets,
    run_stage,
    train_run,
    training_budgets,
)
from delta_llava.trainer import (
    StageTrainer,
    TrainingInterrupted,
    draw_budget,
    freeze,
    last_checkpoint,
    merge_lora,
)
from delta_llava.vlm import load_projector

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def weights(folder):
    whole = Path(folder) / "model.safetensors"
    return load_file(whole if whole.exists() else Path(folder) / "projector.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def losses(path):
    return json.loads(Path(path).read_text())["result"]["losses"]


def open_whole(folder):
    "As transformers opens a model."
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def in_llm_layers(name):
    return ".layers." in name and "vision_tower" not in name


class Signal(TrainerCallback):
    "A signal arrives in the middle of a step."

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def stop_at(stage, step):
    "Train up to a step, and stop."
    with pytest.raises(TrainingInterrupted, match=f"after step {step} of"):
        run_stage(stage, callbacks=[Signal(step)])


# ---------------------------------------------------------------- what is trained


def test_both_stages_one_after_the_other(parts, tmp_path):
    one = run_stage(stage("pretrain", parts, tmp_path / "one"))
    run = json.loads(one.read_text())
    counts = run["parameter_counts"]
    assert counts["tower"][0] == counts["llm"][0] == 0 < counts["projector"][0]
    assert run["rows"] == 28 and run["settings"]["learning_rate"] == 1e-3 and run["kind"] == "pretrain"
    assert run["resumed"] is False and {"data", "tower", "llm", "projector"} == run["fingerprints"].keys()
    two = stage("finetune", parts, tmp_path / "two", projector=tmp_path / "one", pad=True)
    start, _ = build_stage_model(two)
    trained = load_projector(tmp_path / "one").state_dict()
    assert equal(start.multi_modal_projector.state_dict(), trained)  # stage 2 begins where stage 1 ended
    run_stage(two)
    model, processor = open_whole(tmp_path / "two")
    moved = {
        n: not p.equal(q) for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    assert not any(m for n, m in moved.items() if "vision_tower" in n)
    assert all(m for n, m in moved.items() if in_llm_layers(n))
    assert any(m for n, m in moved.items() if "projector" in n)
    assert processor.tokens == 4
    assert type(processor.image_processor).__name__.startswith("LlavaImageProcessor")
    assert not list(tmp_path.glob("*/training_args.bin"))
    before = (tmp_path / "two" / "run.json").stat().st_mtime_ns
    assert run_stage(two) == tmp_path / "two" / "run.json"  # nothing is left to do
    assert (tmp_path / "two" / "run.json").stat().st_mtime_ns == before


def test_what_a_stage_wrote_is_loaded(parts, tmp_path):
    image = Image.new("RGB", (56, 56), "red")
    one = stage("pretrain", parts, tmp_path / "one", max_steps=2)
    trained, _, log = train_run(one)
    model, processor = load(tmp_path / "one", device="cpu")
    assert not model.training and len([e for e in log if "loss" in e]) == 1
    assert equal(model.multi_modal_projector.state_dict(), trained.multi_modal_projector.state_dict())
    inputs = processor(image, "<image>\nColour?")
    with torch.no_grad():
        assert_close(model(**inputs).logits, trained(**inputs).logits)
    again, _, log_again = train_run(one)  # finished: loaded, not trained
    assert equal(again.multi_modal_projector.state_dict(), trained.multi_modal_projector.state_dict())
    assert log_again == log
    trained, _, _ = train_run(
        stage("finetune", parts, tmp_path / "two", projector=tmp_path / "one", max_steps=2)
    )
    model, processor = load(tmp_path / "two", device="cpu")
    with torch.no_grad():
        assert_close(model(**inputs).logits, trained(**inputs).logits)


def test_lora_changes_the_llm_through_its_updates_alone(parts, tmp_path):
    lora = stage("finetune", parts, tmp_path, lora_rank=4, learning_rate=1e-2)
    start, _ = build_stage_model(lora)
    run_stage(lora)
    kept = load_file(tmp_path / "checkpoint-6" / "lora.safetensors")
    assert len(kept) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").exists()
    model, _ = open_whole(tmp_path)
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    changed = {n for (n, p), q in pairs if not p.equal(q)}
    matrices = {n for n, _ in start.named_parameters() if in_llm_layers(n) and "_proj" in n}
    assert {n for n in changed if "projector" not in n} == matrices
    name = next(n for n in matrices if "layers.1.mlp.up_proj" in n).removesuffix(".weight")
    update = kept[f"{name}.lora_B.default.weight"] @ kept[f"{name}.lora_A.default.weight"] * 2
    assert_close(model.get_parameter(f"{name}.weight"), start.get_parameter(f"{name}.weight") + update)
    assert update.abs().max() > 1e-4


def test_merging_low_rank_updates_keeps_the_logits(parts, tmp_path):
    half, _ = build_stage_model(stage("finetune", parts, tmp_path, lora_rank=4, bf16=True))
    freeze(half, "finetune", lora_rank=4)
    kinds = {(p.requires_grad, p.dtype) for p in half.get_decoder().parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}  # what is trained stays in float32
    model, _ = build_stage_model(stage("finetune", parts, tmp_path, lora_rank=4))
    plan = freeze(model, "finetune", lora_rank=4)
    assert 0 < plan["llm"][0] < plan["llm"][1]
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        merge_lora(model)
        assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not any("lora" in n for n, _ in model.named_modules())
    with pytest.raises(ValueError, match="lora_rank=4 in stage 'pretrain'"):
        freeze(model, "pretrain", lora_rank=4)


@pytest.mark.slow
def test_four_bits_for_what_is_frozen(parts, tmp_path):
    "QLoRA: trained against rounded matrices, and written in full precision."
    pytest.importorskip("bitsandbytes")
    options = dict(lora_rank=4, load_in_4bit=True, learning_rate=1e-2, max_steps=20)
    qlora = stage("finetune", parts, tmp_path / "a", save_steps=20, **options)
    rounded, _ = build_stage_model(qlora)
    matrices = [p for n, p in rounded.named_parameters() if in_llm_layers(n) and "_proj" in n]
    assert len(matrices) == 14 and {p.dtype for p in matrices} == {torch.uint8}
    assert {p.dtype for p in rounded.multi_modal_projector.parameters()} == {torch.float32}
    found = losses(run_stage(qlora))
    assert found[1] < found[0] - 0.05
    ids, (model, _) = torch.tensor([[1, 2, 3]]), open_whole(tmp_path / "a")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "quantization_config" not in model.config.text_config.to_dict()
    freeze(rounded, "finetune", lora_rank=4)
    state = load_file(tmp_path / "a" / "checkpoint-20" / "lora.safetensors")
    assert not rounded.load_state_dict(state, strict=False).unexpected_keys
    for m in rounded.modules():
        m.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50 packs matrices this small to nothing there
    with torch.no_grad():
        assert_close(model(input_ids=ids).logits, rounded.eval()(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    stop_at(stage("finetune", parts, tmp_path / "b", save_steps=10, **options), 10)
    run_stage(stage("finetune", parts, tmp_path / "b", save_steps=10, **options))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))  # rounded alike when it goes on
    with pytest.raises(ValueError, match="load_in_4bit=True with lora_rank=0"):
        stage("finetune", parts, tmp_path, load_in_4bit=True)


# ---------------------------------------------------------------- a folder belongs to one run


def test_a_folder_belongs_to_one_run(parts, tmp_path, monkeypatch):
    stop_at(stage("pretrain", parts, tmp_path), 2)
    differ = r"holds a run with other settings \(tokens=4 there, 1 here; learning_rate=0.001 there, 0.002"
    with pytest.raises(ValueError, match=differ):
        run_stage(stage("pretrain", parts, tmp_path, learning_rate=2e-3, tokens=1))
    with pytest.raises(ValueError, match="resume=False, but"):
        run_stage(stage("pretrain", parts, tmp_path, resume=False))
    monkeypatch.chdir(parts)  # where and how may change, and from where
    run_stage(
        replace(
            stage("pretrain", parts, tmp_path, per_device_batch_size=2, num_workers=1),
            data=Path("data.json"),
            tower="tower",
            llm="llm",
        )
    )
    assert last_checkpoint(tmp_path).name == "checkpoint-6" and read_run(tmp_path)["resumed"] is True
    for done in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(done)  # they are large
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="seed=0 there, 1 here"):
        run_stage(stage("pretrain", parts, tmp_path, seed=1))
    assert run_stage(stage("pretrain", parts, tmp_path)) == tmp_path / "run.json"
    assert equal(weights(tmp_path), before) and last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("finished", [False, True])
def test_other_data_are_another_run(parts, tmp_path, finished):
    "As many rows, but other content: of the conversations, or of the images."
    here = shutil.copytree(parts, tmp_path / "data")
    run = stage("pretrain", here, tmp_path / "run", max_steps=2, save_steps=1)
    if finished:
        run_stage(run)
    else:
        stop_at(run, 1)
    before = (tmp_path / "run" / "run.json").read_bytes()
    text = (here / "data.json").read_text()
    (here / "other.json").write_text(text.replace("Colour?", "Which one?"))
    with pytest.raises(ValueError, match="the data have other content"):
        run_stage(replace(run, data=here / "other.json"))
    kept = (here / "3.png").read_bytes()
    Image.effect_noise((56, 56), 90).convert("RGB").save(here / "3.png")
    with pytest.raises(ValueError, match="the data have other content"):
        run_stage(run)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    (here / "3.png").write_bytes(kept)
    (here / "copy.json").write_text(text)
    path = run_stage(replace(run, data=here / "copy.json"))  # the same content
    name = "data.json" if finished else "copy.json"
    assert read_run(tmp_path / "run")["settings"]["data"] == str(here / name)
    assert (path.read_bytes() == before) == finished


def test_one_projector_by_two_paths_is_one_and_another_one_is_not(parts, tmp_path, monkeypatch):
    for seed in (0, 1):
        run_stage(stage("pretrain", parts, tmp_path / f"one-{seed}", max_steps=1, save_steps=1, seed=seed))
    monkeypatch.chdir(tmp_path)
    two = stage("finetune", parts, tmp_path / "two", projector=Path("one-0"), max_steps=2, save_steps=1)
    stop_at(two, 1)
    with pytest.raises(ValueError, match="the projector has other weights"):
        run_stage(replace(two, projector=Path("one-1")))
    run_stage(replace(two, projector=tmp_path / "one-0"))
    other = shutil.copytree(parts / "tower", tmp_path / "tower")
    tensors = load_file(other / "model.safetensors")
    name = next(k for k in tensors if "patch_embedding" in k)
    tensors[name] = tensors[name] + 1
    torch.manual_seed(1)
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the vision tower has other weights"):
        run_stage(replace(two, tower=str(other)))


def test_a_resumed_run_saves_as_often_as_its_new_settings_say(parts, tmp_path):
    stop_at(stage("pretrain", parts, tmp_path, save_steps=4), 4)
    run = json.loads(run_stage(stage("pretrain", parts, tmp_path, save_steps=1)).read_text())
    assert run["resumed"] and run["settings"]["save_steps"] == 1
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_the_second_stage_takes_the_projector_of_its_settings(parts, tmp_path):
    run_stage(stage("pretrain", parts, tmp_path / "packer", compressor="tokenpacker", max_steps=2))
    run_stage(stage("pretrain", parts, tmp_path / "one", max_steps=2))
    others = (
        (dict(projector=tmp_path / "packer"), "compressor='tokenpacker'"),
        (dict(projector=tmp_path / "one", standardize=True), "standardize=False"),
    )
    for other, name in others:
        with pytest.raises(ValueError, match=f"was trained with {name}, but here"):
            run_stage(stage("finetune", parts, tmp_path / "two", **other))
    run_stage(stage("finetune", parts, tmp_path / "two", projector=tmp_path / "one", tokens=1, max_steps=2))
    model, processor = open_whole(tmp_path / "two")
    assert model.config.projector_config().tokens == processor.tokens == model.config.image_seq_length == 1
    inputs = processor(Image.new("RGB", (56, 56)), "<image>\nColour?")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("options", [{}, dict(lora_rank=4)], ids=["whole", "LoRA"])
def test_an_llm_that_samples_without_saying_so_is_saved(parts, tmp_path, options):
    "As Vicuna's generation_config.json: temperature and top_p, no do_sample."
    llm = shutil.copytree(parts / "llm", tmp_path / "llm")
    settings = dict(bos_token_id=256, eos_token_id=257, pad_token_id=257, temperature=0.9, top_p=0.6)
    (llm / "generation_config.json").write_text(json.dumps(settings))
    run_stage(stage("finetune", parts, tmp_path / "two", llm=str(llm), max_steps=2, **options))
    model, _ = open_whole(tmp_path / "two")
    assert model.generation_config.temperature == 0.9
    assert bool(options) != (tmp_path / "two" / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "two" / "projector.json").exists()


# ---------------------------------------------------------------- options

OPTIONS = [
    dict(packing=True),
    dict(train_budgets=(1, 4)),
    dict(compressor="m3", train_budgets=(1, 4)),
    dict(compressor="mqt", train_budgets=(2, 4)),
    dict(bf16=True, gradient_checkpointing=True),
    dict(group_by_length=True, batch_size=8),
    dict(standardize=True),
    dict(packing=True, compressor="quecc"),
    dict(lora_rank=8, bf16=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_train(parts, tmp_path, options):
    long = dict(learning_rate=1e-2, max_steps=20, save_steps=20)
    found = losses(run_stage(stage("finetune", parts, tmp_path, **long, **options)))
    least = 0.1 if "lora_rank" in options else 0.5  # updates of a random LLM learn slowly
    assert len(found) == 2 and found[1] < found[0] - least


def test_packing_and_checkpointing_change_no_loss(parts, tmp_path):
    "With a projector that has no DropPath, which would draw anew."
    ways = dict(
        plain={},
        packing=dict(packing=True),
        checkpointed=dict(gradient_checkpointing=True),
        accumulated=dict(per_device_batch_size=2),
        one_pass=dict(per_device_batch_size=None),
    )
    logs = {}
    for name, options in ways.items():
        each = EachStep()
        run = stage("finetune", parts, tmp_path / name, save_steps=6, compressor="tokenpacker", **options)
        run_stage(run, callbacks=[each])
        logs[name] = each.losses
    assert len(logs["plain"]) == 6
    for name in logs:
        assert_close(logs[name], logs["plain"], rtol=1e-4, atol=1e-5)


def losses_of_ways(parts, folder, ways, **same):
    "The loss of each step, for several ways to compute the same."
    logs = {}
    for name, options in ways.items():
        each = EachStep()
        options = dict(save_steps=6, compressor="tokenpacker") | same | options
        run_stage(stage("finetune", parts, folder / name, **options), callbacks=[each])
        logs[name] = each.losses
    return logs


def test_compiled_layers_and_recomputing_long_passes_change_no_loss(parts, tmp_path, monkeypatch):
    "The graphs are traced, and run without a compiler."
    monkeypatch.setattr(passes, "COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    compiled = dict(torch_compile=True)
    again = dict(gradient_checkpointing=True, checkpoint_above=4 * 64)
    ways = dict(plain={}, compiled=compiled, packed=compiled | dict(packing=True), long=again)
    logs = losses_of_ways(parts, tmp_path, ways)
    assert len(logs["plain"]) == 6
    for name in logs:
        assert_close(logs[name], logs["plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stage_trains_with_the_real_compiler(parts, tmp_path):
    torch._dynamo.reset()
    compiled = dict(torch_compile=True)
    again = dict(gradient_checkpointing=True, checkpoint_above=4 * 64)
    ways = dict(plain={}, compiled=compiled, recomputed=compiled | again)
    logs = losses_of_ways(parts, tmp_path, ways, max_steps=3)
    lora = losses_of_ways(parts, tmp_path / "lora", ways, max_steps=3, lora_rank=4, lora_dropout=0.0)
    for found in (logs, lora):
        for name in ways:
            assert_close(found[name], found["plain"], rtol=1e-4, atol=1e-5)


def test_a_trained_model_is_eager_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "COMPILE_BACKEND", "eager")
    model, _, _ = train_run(stage("pretrain", parts, tmp_path, torch_compile=True, max_steps=1))
    assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)


@pytest.mark.parametrize(
    "options",
    [dict(checkpoint_above=-1), dict(torch_compile=True, sharding="fsdp2")],
    ids=str,
)
def test_passes_that_cannot_be(parts, tmp_path, options):
    with pytest.raises(ValueError, match="must not be negative|take torch_compile=False"):
        stage("finetune", parts, tmp_path, **options)


def test_the_budget_of_a_step_does_not_depend_on_the_device(parts, tmp_path):
    expected = [draw_budget((1, 4), 0, step) for step in range(6)]
    assert len(set(expected)) == 2
    for size in (4, 2, 1):
        each = EachStep()
        options = dict(train_budgets=(1, 4), per_device_batch_size=size, compressor="tokenpacker")
        run_stage(stage("pretrain", parts, tmp_path / str(size), **options), callbacks=[each])
        assert each.budgets == [v for v in expected for _ in range(4 // size)]


def test_nested_budgets_reach_the_second_stage(parts, tmp_path):
    "Each step of M3 has a pass at every budget."
    each = EachStep()
    run = stage("finetune", parts, tmp_path, compressor="m3")
    run_stage(run, callbacks=[each])
    assert training_budgets(run, load_config(tmp_path)) == (16, 4, 1)
    assert each.budgets == [16, 4, 1] * 6
    assert nested_budgets(replace(M3Config(), grid=24, tokens=144)) == (576, 144, 36, 9, 1)


def test_drawn_budgets_of_a_compressor_reach_the_second_stage(parts, tmp_path):
    options = dict(compressor="mqt", tokens=16, max_length=600)
    for kind in ("pretrain", "finetune"):
        run = stage(kind, parts, tmp_path / kind, **options)
        each = EachStep()
        run_stage(run, callbacks=[each])
        config = load_config(tmp_path / kind)
        own = training_budgets(run, config)
        assert own == ((16,) if kind == "pretrain" else tuple(config.train_budgets()))
        assert each.budgets == [draw_budget(own, 0, step) for step in range(6)]
    assert len(set(each.budgets)) > 3 and all(v % 2 == 0 for v in each.budgets)


def load_config(folder):
    return load(folder, device="cpu")[0].config.projector_config()


def test_a_validation_set_is_scored_and_recorded(parts, tmp_path):
    eval_data = parts / "eval.json"
    eval_data.write_text(json.dumps(json.loads((parts / "data.json").read_text())[:7]))
    run = stage("pretrain", parts, tmp_path, eval_data=eval_data, eval_steps=3, eval_budgets=(4, 1))
    result = json.loads(run_stage(run).read_text())["result"]
    assert len(result["eval_losses"]) == 2 and result["eval_losses"][1] < result["eval_losses"][0]
    assert [e["step"] for e in result["log"] if "eval_1_loss" in e] == [3, 6]


# ---------------------------------------------------------------- a fresh projector


def test_closed_form_init_and_cached_features(parts, tmp_path):
    "The images are read once; statistics and initialization are those of the functions themselves."
    rows = json.loads((parts / "data.json").read_text())[:24]
    (parts / "images.json").write_text(json.dumps(rows))
    same = dict(
        data=parts / "images.json",
        standardize=True,
        closed_form_init=True,
        cache_features=True,
        train_budgets=(1, 4),
        statistics_images=0,
        max_steps=1,
        save_steps=1,
        learning_rate=0.0,
    )
    run = stage("pretrain", parts, tmp_path / "a", **same)
    model, processor, log = train_run(run)
    expected, _ = build_stage_model(run)
    projector = expected.multi_modal_projector
    paths = [str(parts / row["image"]) for row in rows]
    features = cache_features(
        paths, expected.vision_tower, processor.image_processor, expected.config.vision_feature_layer
    )
    projector.fit_statistics(features)
    from delta_llava.closed_form_init import answer_embeddings

    answers = [row["conversations"][1]["value"] for row in rows]
    table = expected.get_input_embeddings().weight
    closed_form_init(
        projector, features, answer_embeddings(answers, processor.tokenizer, table), tokens=(1, 4)
    )
    assert equal(model.multi_modal_projector.state_dict(), projector.state_dict())
    without, _, other = train_run(replace(run, output_dir=tmp_path / "b", cache_features=False))
    assert [e["loss"] for e in log if "loss" in e] == pytest.approx(
        [e["loss"] for e in other if "loss" in e], rel=1e-3
    )


@pytest.mark.parametrize("tokens", [16, 1])
def test_closed_form_init_at_the_full_grid_of_the_tower(parts, tmp_path, tokens):
    run = stage("pretrain", parts, tmp_path, tokens=tokens, closed_form_init=True, max_steps=2, save_steps=2)
    model, _, log = train_run(run)
    assert all(p.isfinite().all() for p in model.multi_modal_projector.parameters())


def test_a_trained_projector_is_not_initialized_again(parts, tmp_path):
    with pytest.raises(ValueError, match="closed_form_init=True would overwrite projector="):
        stage("finetune", parts, tmp_path, projector=tmp_path, closed_form_init=True)


# ---------------------------------------------------------------- bad input


def test_settings_that_cannot_be_divided(parts, tmp_path):
    with pytest.raises(ValueError, match=r"lora_rank=4 with sharding='fsdp2'"):
        stage("finetune", parts, tmp_path, lora_rank=4, sharding="fsdp2")
    with pytest.raises(
        ValueError, match="cannot be divided among 6 processes; use 4 of them, or batch_size=258"
    ):
        stage("pretrain", parts, tmp_path, batch_size=256, per_device_batch_size=32).accumulate(6)


def test_what_cannot_work_fails_before_the_model_is_loaded(parts, tmp_path):
    with pytest.raises(ValueError, match="holds no projector.safetensors"):
        run_stage(stage("finetune", parts, tmp_path, projector=tmp_path))
    with pytest.raises(ValueError, match="must be a multiple of the tower's patch size 14"):
        run_stage(stage("pretrain", parts, tmp_path, image_size=60))
    with pytest.raises(ValueError, match="tokens=5 must be the square"):
        run_stage(stage("pretrain", parts, tmp_path, tokens=5))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    rows = json.loads((parts / "data.json").read_text()) + [
        dict(id="lost", image="lost.png", conversations=turns)
    ]
    (parts / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="delta-llava doctor"):
        run_stage(stage("pretrain", parts, tmp_path, data=parts / "bad.json"))
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("options", [{}, dict(group_by_length=True), dict(train_budgets=(1, 4))], ids=str)
def test_a_row_that_is_too_long_is_named(parts, tmp_path, options):
    "Its question alone is longer than max_length, so that nothing of the answer is left."
    rows = json.loads((parts / "data.json").read_text())
    turns = [{"from": "human", "value": "why? " * 80}, {"from": "gpt", "value": "x"}]
    rows.insert(9, dict(id="much too long", conversations=turns))
    (parts / "long.json").write_text(json.dumps(rows))
    run = stage("finetune", parts, tmp_path, data=parts / "long.json", max_length=200, max_steps=7, **options)
    with pytest.raises(ValueError, match="row 'much too long': nothing is supervised"):
        run_stage(run)


# ---------------------------------------------------------------- NaN


class Poison(TrainerCallback):
    "After a step a weight becomes NaN, or gradients infinite."

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step:
            return
        if self.what == "loss":
            with torch.no_grad():
                next(model.get_decoder().parameters()).fill_(float("nan"))
        else:
            next(model.multi_modal_projector.parameters()).register_hook(lambda g: g * float("inf"))


class Keep(TrainerCallback):
    "The model, and the projector's weights before each step."

    def __init__(self):
        self.states, self.model = {}, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.states[state.global_step] = {
            k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()
        }


@pytest.mark.parametrize(
    "what,after,options",
    [
        ("loss", 3, {}),
        ("gradient norm", 3, {}),
        ("loss", 2, {}),  # found a step later, before the checkpoint
        ("gradient norm", 2, {}),
        ("loss", 2, dict(optim="adamw_torch")),  # cannot skip a step, so it is read at once
    ],
)
def test_what_is_not_finite_ends_the_run_before_it_reaches_a_weight(parts, tmp_path, what, after, options):
    keep = Keep()
    message = rf"step {after + 1}: the {what} is (nan|inf), on rows \['.*-\d+', .*\].*checkpoint-2"
    with pytest.raises(FloatingPointError, match=message) as error:
        run_stage(stage("pretrain", parts, tmp_path), callbacks=[Poison(after, what), keep], **options)
    assert str(error.value).count("picture-") + str(error.value).count("text-") == 4
    assert equal(keep.states[after], keep.model.multi_modal_projector.state_dict())
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert max(keep.states) == (3 if not options else after)


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("where", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_keeps_the_last_good_checkpoint(parts, tmp_path, monkeypatch, where):
    original = getattr(StageTrainer, where)

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, where, full)
    message = r"checkpoint-4 could not be written \(.*No space left.*Make room.*goes on from .*checkpoint-2"
    with pytest.raises(OSError, match=message):
        run_stage(stage("pretrain", parts, tmp_path))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    run_stage(stage("pretrain", parts, tmp_path))
    run_stage(stage("pretrain", parts, tmp_path / "unbroken"))
    assert equal(weights(tmp_path), weights(tmp_path / "unbroken"))


def test_room_on_the_disk_is_checked_first(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 2**20))
    with pytest.raises(OSError, match="has 0.0 GiB free, but three checkpoints"):
        run_stage(stage("pretrain", parts, tmp_path))
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- stopped


STOPPED = [(dict(num_workers=1), (3, 7)), (dict(group_by_length=True), (9,))]


@pytest.mark.parametrize("options, steps", STOPPED, ids=str)
def test_stopped_in_any_epoch_a_run_ends_bit_for_bit_as_an_unbroken_one(parts, tmp_path, options, steps):
    "Seven steps are an epoch. DropPath shows when anything draws more or less from the random state."
    same = dict(max_steps=12, save_steps=12) | options
    run_stage(stage("pretrain", parts, tmp_path / "unbroken", **same))
    for step in steps:
        stop_at(stage("pretrain", parts, tmp_path / str(step), **same), step)
        run_stage(stage("pretrain", parts, tmp_path / str(step), **same | dict(num_workers=0)))
        assert equal(weights(tmp_path / str(step)), weights(tmp_path / "unbroken")), step


class OrderOfRows(TrainerCallback):
    "The order of all rows at the beginning of each epoch."

    def __init__(self, disturbed):
        self.disturbed, self.orders = disturbed, []

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        torch.rand(self.disturbed)  # as DropPath of another process
        self.orders.append(list(train_dataloader.batch_sampler.sampler))


def test_all_processes_group_rows_in_one_order_that_is_new_in_each_epoch(parts, tmp_path):
    "Each draws random numbers of its own: with one order each, they would miss rows and repeat others."
    orders = []
    for disturbed in (0, 1):
        watch = OrderOfRows(disturbed)
        run = stage("pretrain", parts, tmp_path / str(disturbed), max_steps=8, group_by_length=True)
        run_stage(run, callbacks=[watch])
        orders.append(watch.orders)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 and orders[0][0] != orders[0][1]
    assert all(sorted(order) == list(range(28)) for order in orders[0])


# ---------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def fork():
    "Run a stage in a process of its own, forked from one that has imported everything; its exit code."
    context = get_context("forkserver")
    context.set_forkserver_preload(["tiny_stage"])

    def run(kind, parts, folder, **options):
        process = context.Process(
            target=tiny_stage.main, args=(kind, str(parts), str(folder), json.dumps(options))
        )
        process.start()
        process.join()
        return process.exitcode

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_killed_at_twenty_steps_a_run_ends_bit_for_bit_as_an_unbroken_one(parts, tmp_path, fork, kind):
    steps = dict(max_steps=40, save_steps=2)
    assert fork(kind, parts, tmp_path / "unbroken", **steps) == 0
    draw = random.Random(0)
    kills = sorted(draw.sample(range(2, 40), 20))  # in rising order: a resumed run is past the earlier ones
    for i, step in enumerate(kills):
        how = dict(die_at=step) if i % 2 else dict(die_saving=(step + step % 2, draw.randrange(5)))
        assert fork(kind, parts, tmp_path / "killed", **steps, **how) == -signal.SIGKILL, (step, how)
        done = last_checkpoint(tmp_path / "killed")  # what was written to its end is never lost
        assert done is None and step < 4 or int(done.name.split("-")[1]) >= step - 3
    assert fork(kind, parts, tmp_path / "killed", **steps) == 0
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))
    assert losses(tmp_path / "killed" / "run.json") == losses(tmp_path / "unbroken" / "run.json")


# ---------------------------------------------------------------- several processes


def launch(kind, parts, folder, **options):
    "A stage on two processes, running."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | dict(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600",  # torchrun kills after 30 s, too early on a busy machine
        PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
    )
    program = [HERE / "tiny_stage.py", kind, parts, folder, json.dumps(options, default=str)]
    return subprocess.Popen(
        [*command, *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    "Exit code, output and errors of a process."
    out, err = process.communicate(timeout=600)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


PROCESSES = pytest.mark.parametrize(
    "kind, options",
    [("pretrain", {}), ("finetune", {}), ("finetune", dict(sharding="fsdp2", fsdp_on_cpu=True))],
    ids=["DDP, stage 1", "DDP, stage 2", "FSDP2, stage 2"],
)


@pytest.fixture(scope="module")
def mixed(parts):
    "As many rows without an image as with one: one process has an image, the other none, or both have none."
    rows = json.loads((parts / "data.json").read_text())
    text = [dict(id=f"t{i}", conversations=r["conversations"]) for i, r in enumerate(rows[-4:] * 6)]
    pairs = zip(rows[:24], text, strict=True)
    (parts / "mixed.json").write_text(json.dumps([row for pair in pairs for row in pair]))
    # without DropPath, which each process draws for itself
    return dict(data=parts / "mixed.json", batch_size=2, max_steps=8, save_steps=4, compressor="tokenpacker")


@PROCESSES
@pytest.mark.slow  # starts processes that load torch and transformers each
def test_two_processes_train_as_one(parts, mixed, tmp_path, kind, options):
    "The two recompute activations of passes with an image: often one of them has an image, the other none."
    again = dict(gradient_checkpointing=True, checkpoint_above=188)
    elastic = dict(train_budgets=(1, 4)) if kind == "pretrain" else {}
    one = run_stage(
        stage(kind, parts, tmp_path / "one", per_device_batch_size=2, **mixed, **elastic),
        callbacks=[EachStep()],
    )
    two = finish(
        launch(kind, parts, tmp_path / "two", per_device_batch_size=1, **mixed, **options, **elastic, **again)
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.split()[-1] == ("sharded" if options else "whole")
    assert len(losses(one)) == 8
    assert_close(losses(tmp_path / "two" / "run.json"), losses(one), rtol=1e-6, atol=1e-6)
    if elastic:  # every process has the budget of the step
        expected = [draw_budget((1, 4), 0, step) for step in range(8)]
        assert [json.loads((tmp_path / f"two.budgets.{rank}").read_text()) for rank in (0, 1)] == [
            expected
        ] * 2
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for k in a:
        assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)
    states = sorted(p.name for p in (tmp_path / "two" / "checkpoint-8").glob("rng_state_*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.slow
def test_sharded_weights_and_moments_are_float32_and_gradients_are_reduced_after_each_pass(
    parts, mixed, tmp_path
):
    "Two passes of one row in a step: a gradient that waits for the last one would be that of a whole layer."
    options = mixed | dict(batch_size=4, max_steps=2, save_steps=2, bf16=True, sharding="fsdp2")
    two = finish(
        launch("finetune", parts, tmp_path / "two", per_device_batch_size=1, fsdp_on_cpu=True, **options)
    )
    assert two.returncode == 0, two.stderr[-3000:]
    precision = json.loads((tmp_path / "two.precision.1").read_text())
    expected = dict(kept=["torch.float32"], computed=["torch.bfloat16"], gradients=["DTensor"])
    assert precision == expected
    assert {w.dtype for w in weights(tmp_path / "two").values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_with_a_token_budget_train_as_one_without(parts, mixed, tmp_path):
    "The processes make different numbers of passes, and average their gradients once."
    options = mixed | dict(batch_size=8, max_length=256)
    one = run_stage(
        stage("pretrain", parts, tmp_path / "one", per_device_batch_size=8, **options), callbacks=[EachStep()]
    )
    two = finish(launch("pretrain", parts, tmp_path / "two", max_tokens_per_device=256, **options))
    assert two.returncode == 0, two.stderr[-3000:]
    assert_close(losses(tmp_path / "two" / "run.json"), losses(one), rtol=1e-5, atol=1e-5)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in a:
        assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@PROCESSES
def test_two_killed_processes_go_on_bit_for_bit(parts, mixed, tmp_path, kind, options):
    same = dict(per_device_batch_size=1, **mixed | dict(compressor="delta"), **options)
    first = finish(launch(kind, parts, tmp_path / "unbroken", **same))
    assert first.returncode == 0, first.stderr[-6000:]
    assert finish(launch(kind, parts, tmp_path / "killed", die_at=6, **same)).returncode != 0
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    done = finish(launch(kind, parts, tmp_path / "killed", **same))
    assert done.returncode == 0, done.stderr[-3000:]
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))
    assert losses(tmp_path / "killed" / "run.json") == losses(tmp_path / "unbroken" / "run.json")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_at_the_same_step_and_go_on(parts, mixed, tmp_path, number):
    "The signal goes to torchrun, which passes it on; a run with workers, whose next batches are loaded"
    "already."
    same = dict(
        per_device_batch_size=1,
        num_workers=1,
        **mixed | dict(compressor="delta", max_steps=40, save_steps=40),
    )
    process = launch("pretrain", parts, tmp_path / "stopped", announce=(2, str(tmp_path / "running")), **same)
    while not (tmp_path / "running").exists():
        assert process.poll() is None
    process.send_signal(number)
    stopped = finish(process)
    assert stopped.returncode != 0
    assert "is complete: the same command goes on from there" in stopped.stderr, stopped.stderr[-6000:]
    step = int(last_checkpoint(tmp_path / "stopped").name.split("-")[1])
    assert 2 <= step < 40
    states = sorted(p.name for p in (tmp_path / "stopped" / f"checkpoint-{step}").glob("rng_state_*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    assert finish(launch("pretrain", parts, tmp_path / "stopped", **same)).returncode == 0
    assert finish(launch("pretrain", parts, tmp_path / "unbroken", **same)).returncode == 0
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "unbroken"))


@pytest.mark.slow
def test_two_processes_whose_clocks_differ_share_their_time(parts, mixed, tmp_path):
    "One learning rate and one last step, or the second process would stop while the first waits for it."
    limits = dict(per_device_batch_size=1, max_minutes=0.1)
    done = finish(
        launch("pretrain", parts, tmp_path / "run", clock_ahead=3, **mixed | dict(max_steps=10_000) | limits)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rates = [json.loads((tmp_path / f"run.rates.{rank}").read_text()) for rank in (0, 1)]
    assert len(rates[0]) > 3
    assert rates[0] == rates[1]
    assert rates[0][-1] < 0.5 * max(rates[0])  # the schedule came near its end
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] < 60


# ---------------------------------------------------------------- the commands that are printed


def from_here(**variables):
    "A shell without an activated environment, on a machine without a GPU."
    return os.environ | dict(
        PATH="/usr/bin:/bin",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(HERE.parent),
        **variables,
    )


@pytest.fixture(scope="module")
def one_process(parts, mixed, tmp_path_factory):
    "What one process makes of a stage with two rows in a pass."
    found = {}

    def train(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("one") / kind
            run_stage(stage(kind, parts, folder, per_device_batch_size=2, **mixed, logging_steps=1))
            found[kind] = folder
        return found[kind]

    return train


def assert_trained_as_one(folder, one):
    "The same losses and the same weights."
    record, wanted = (json.loads((path / "run.json").read_text()) for path in (folder, one))
    assert (record["processes"], wanted["processes"]) == (2, 1)
    assert len(wanted["result"]["losses"]) == 8
    assert_close(record["result"]["losses"], wanted["result"]["losses"], rtol=1e-5, atol=1e-5)
    a, b = weights(one), weights(folder)
    assert a.keys() == b.keys()
    for k in a:
        assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)


def free_port():
    "A port of this machine that nothing uses."
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_batch_script_trains_on_two_nodes_as_one_process(parts, mixed, tmp_path, one_process, kind):
    "Slurm's programs are replaced: `srun` starts the printed command twice, and both nodes are this machine."
    two = stage(kind, parts, tmp_path / "two", per_device_batch_size=1, **mixed, logging_steps=1)
    script = slurm_script(two, gpus=1, nodes=2).replace(":29500", f":{free_port()}")
    programs = dict(
        scontrol="echo 127.0.0.1",
        srun='shift; "$@" & a=$!; "$@" & b=$!; code=0; wait $a || code=$?; wait $b || code=$?; exit $code',
    )
    for name, body in programs.items():
        (path := tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    env = from_here(SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="77", SLURM_CPUS_PER_TASK="1")
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run(["bash"], input=script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_trained_as_one(tmp_path / "two", one_process(kind))


ON_CPU = "import tiny_stage\n\ntiny_stage.allow_fsdp_on_cpu()\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind,sharding", [("pretrain", "none"), ("finetune", "none"), ("finetune", "fsdp2")])
def test_accelerate_trains_on_two_processes_as_one(parts, mixed, tmp_path, one_process, kind, sharding):
    "The command and the files of `write_launch`, unchanged."
    options = mixed | dict(per_device_batch_size=1, sharding=sharding, logging_steps=1)
    two = stage(kind, parts, tmp_path / "two", **options)
    write_launch(two, tmp_path / "launch", gpus=2)
    env = from_here()
    if sharding == "fsdp2":
        (tmp_path / "sitecustomize.py").write_text(ON_CPU)
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(HERE), env["PYTHONPATH"]])
    command = accelerate_cmd(two, "launch/accelerate.yaml")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert_trained_as_one(tmp_path / "two", one_process(kind))


def test_finetune_asks_for_the_projector_of_stage_one(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="projector=runs/stage1 holds no projector.safetensors"):
        run_stage(Finetune(data=parts / "data.json", tower=str(parts / "tower"), llm=str(parts / "llm")))
