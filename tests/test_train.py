"The trainer: what learns, budgets of a step, checkpoints, killed and stopped runs, room on the disk."

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close
from transformers import Dinov2Config, LlamaConfig, ProcessorMixin, TrainerCallback

from delta_llava import trainer as trainer_module
from delta_llava.collator import Collator
from delta_llava.config import dinov2_s14
from delta_llava.mixing import DropPath
from delta_llava.trainer import (
    COMPLETE,
    STOP_SIGNALS,
    ElasticCollator,
    StageTrainer,
    TrainingInterrupted,
    check_disk_space,
    checkpoint_bytes,
    draw_budget,
    freeze,
    last_checkpoint,
    stage_arguments,
    train_stage,
)
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

SMALL = replace(dinov2_s14(56, tokens=4, d_llm=32), d_vision=128, levels=(1, 2), heads=4)


class TinyProcessor(ProcessorMixin):
    "An image, then the letters of the answer."

    questions = False
    placeholders = None
    image_token_id = 1

    class tokenizer:
        pad_token_id = 0

    def __init__(self):
        pass

    def num_image_tokens(self, tokens=None):
        return tokens

    def tokenize_conversation(self, conversation):
        answer = [3 + ord(c) % 20 for c in conversation[1]["value"]]
        return dict(input_ids=[1, 2, *answer], labels=[-100, -100, *answer])


def tiny_model(seed=0):
    torch.manual_seed(seed)
    vision = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = DeltaLlavaConfig(
        vision_config=vision, text_config=text, projector=SMALL.to_dict(), image_token_index=1
    )
    return DeltaLlavaForConditionalGeneration(config)


def tiny_rows(n=32):
    def turns(i):
        return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "abcd"[i % 4] * 3}]

    return [dict(id=str(i), image=f"{i}.png", conversations=turns(i)) for i in range(n)]


def tiny_collator(rows, budgets=(1, 4), seed=0, nested=False):
    g = torch.Generator().manual_seed(1)
    features = torch.randn(len(rows), 16, 256, generator=g)
    features += torch.randn(4, 1, 256, generator=g)[torch.arange(len(rows)) % 4]
    collator = Collator(processor=TinyProcessor(), features=features, paths=[r["image"] for r in rows])
    return ElasticCollator(collator, budgets, seed, nested)


def tiny_arguments(folder, max_steps=6, **more):
    quiet = dict(save_steps=2, disable_tqdm=True, logging_steps=1)
    return stage_arguments(folder, max_steps=max_steps, **dict(batch_size=4) | quiet | more)


def projector_of(model):
    return model.multi_modal_projector.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def losses_of(log):
    return [e["loss"] for e in log if "loss" in e]


class Break(TrainerCallback):
    "The run dies after a step."

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


# ---------------------------------------------------------------- passes of few tokens


def uneven_rows(n=24):
    "Answers of 1 to 14 letters; every fifth row has no image."
    rows = tiny_rows(n)
    for i, row in enumerate(rows):
        row["conversations"][1]["value"] = "abcd"[i % 4] * (1 + 5 * i % 14)
        if i % 5 == 4:
            row["image"] = None
    return rows


class TextOrImage(TinyProcessor):
    "No image token in a row without image."

    def tokenize_conversation(self, conversation):
        row = super().tokenize_conversation(conversation)
        return row if "<image>" in conversation[0]["value"] else {k: v[1:] for k, v in row.items()}


def token_budget_collator(rows, max_tokens, budgets=(1, 4), nested=False):
    with_image = [row["image"] for row in rows if row["image"]]
    for row in rows:
        row["conversations"][0]["value"] = "<image>" if row["image"] else "?"
    features = torch.randn(len(with_image), 16, 256, generator=torch.Generator().manual_seed(1))
    collator = Collator(processor=TextOrImage(), features=features, paths=with_image)
    return ElasticCollator(collator, budgets, 0, nested, max_tokens)


@pytest.mark.parametrize("budgets,nested", [((1, 4), False), ((4, 1), True)], ids=["elastic", "nested"])
def test_passes_of_few_tokens_have_the_loss_and_gradients_of_the_batch(
    budgets, nested, tmp_path, monkeypatch
):
    rows, logs, models, sizes = uneven_rows(), [], [], []
    forward = DeltaLlavaForConditionalGeneration.forward

    def record(self, *args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DeltaLlavaForConditionalGeneration, "forward", record)
    for max_tokens in (None, 40):
        sizes.clear()
        collator = token_budget_collator(rows, max_tokens, budgets, nested)
        models.append(tiny_model())
        for module in models[-1].modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        folder = tmp_path / str(max_tokens)
        logs.append(
            train_stage(models[-1], rows, collator, tiny_arguments(folder, batch_size=8, max_steps=4))
        )
    assert max(sizes) <= 40 and len(sizes) > 4 * (2 if nested else 1)
    assert_close(losses_of(logs[1]), losses_of(logs[0]), rtol=1e-5, atol=1e-5)
    norms = [[entry["grad_norm"] for entry in log if "grad_norm" in entry] for log in logs]
    assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-5)


def test_passes_of_few_tokens_are_resumed_bit_for_bit(tmp_path):
    rows = uneven_rows()
    unbroken, resumed = tiny_model(), tiny_model()
    arguments = dict(batch_size=8, max_steps=6)
    log = train_stage(
        unbroken, rows, token_budget_collator(rows, 40), tiny_arguments(tmp_path / "one", **arguments)
    )
    with pytest.raises(InterruptedError):
        collator = token_budget_collator(rows, 40)
        train_stage(
            tiny_model(), rows, collator, tiny_arguments(tmp_path / "two", **arguments), callbacks=[Break(5)]
        )
    again = train_stage(
        resumed, rows, token_budget_collator(rows, 40), tiny_arguments(tmp_path / "two", **arguments)
    )
    assert same(projector_of(resumed), projector_of(unbroken))
    assert losses_of(again) == losses_of(log)


def test_an_error_names_all_rows_of_the_passes(tmp_path):
    rows = uneven_rows()
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="on rows") as error:
        train_stage(model, rows, token_budget_collator(rows, 40), tiny_arguments(tmp_path, batch_size=8))
    assert str(error.value).count("'") == 2 * 8


# ---------------------------------------------------------------- killed and resumed


def test_half_written_checkpoint_is_ignored_and_the_run_ends_the_same(tmp_path):
    rows = tiny_rows()
    unbroken, broken, resumed = tiny_model(), tiny_model(), tiny_model()
    log = train_stage(unbroken, rows, tiny_collator(rows), tiny_arguments(tmp_path / "one"))
    with pytest.raises(InterruptedError):
        train_stage(broken, rows, tiny_collator(rows), tiny_arguments(tmp_path / "two"), callbacks=[Break(5)])
    (tmp_path / "two" / "checkpoint-4" / COMPLETE).unlink()  # as if killed while it was saved
    (tmp_path / "two" / "checkpoint-4" / "projector.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path / "two").name == "checkpoint-2"
    again = train_stage(resumed, rows, tiny_collator(rows), tiny_arguments(tmp_path / "two"))
    assert same(projector_of(resumed), projector_of(unbroken))
    assert not same(projector_of(broken), projector_of(unbroken))
    assert losses_of(again) == losses_of(log) and len(log) == 7
    with pytest.raises(InterruptedError):
        train_stage(
            tiny_model(),
            rows,
            tiny_collator(rows),
            tiny_arguments(tmp_path / "two"),
            resume=False,
            callbacks=[Break(1)],
        )


def test_a_finished_run_is_not_trained_further(tmp_path):
    rows, one, two = tiny_rows(), tiny_model(), tiny_model(seed=1)
    log = train_stage(one, rows, tiny_collator(rows), tiny_arguments(tmp_path))
    again = train_stage(two, rows, tiny_collator(rows), tiny_arguments(tmp_path), callbacks=[Break(7)])
    assert same(projector_of(two), projector_of(one)) and not two.training
    assert losses_of(again) == losses_of(log)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_last_checkpoint_goes_by_number_and_completeness(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "none") is None
    for n in (9, 10, 11):
        (tmp_path / f"checkpoint-{n}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for n in (9, 10):
        (tmp_path / f"checkpoint-{n}" / COMPLETE).write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "marker"])
def test_a_checkpoint_counts_only_with_every_file_at_its_size(tmp_path, damage):
    for n in (1, 2):
        folder = tmp_path / f"checkpoint-{n}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"1234")
        (folder / COMPLETE).write_text(json.dumps({"weights": 4}))
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    newest = tmp_path / "checkpoint-2"
    if damage == "missing":
        (newest / "weights").unlink()
    elif damage == "marker":
        (newest / COMPLETE).write_text('{"weights": ')
    else:
        (newest / "weights").write_bytes(b"123" if damage == "shorter" else b"12345")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_complete_is_written_after_all_processes_have_saved(tmp_path, monkeypatch):
    "The barrier lies between the last file of a checkpoint and its marker."
    rows, model = tiny_rows(), tiny_model()
    saved_files = []
    save = StageTrainer._save_checkpoint

    def watched(self, *args):
        folder = tmp_path / f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone

        def barrier():
            names = {p.name for p in folder.iterdir()}
            saved_files.append(
                ("projector.safetensors" in names and "rng_state.pth" in names, COMPLETE in names)
            )
            wait()

        monkeypatch.setattr(self.accelerator, "wait_for_everyone", barrier)
        save(self, *args)
        monkeypatch.setattr(self.accelerator, "wait_for_everyone", wait)

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", watched)
    train_stage(model, rows, tiny_collator(rows), tiny_arguments(tmp_path, max_steps=2))
    assert saved_files[-1] == (True, False) and (tmp_path / "checkpoint-2" / COMPLETE).exists()


SCRIPT = """
    import os, signal, sys, time
    import torch
    from delta_llava import trainer
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_train import *
    how, *folders = sys.argv[1:]
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): time.sleep(.2)
    if how == "die-while-saving":
        whole = trainer.save_projector
        def save_projector(model, folder, *rest):
            whole(model, folder, *rest)
            if str(folder).endswith("checkpoint-4"): os.kill(os.getpid(), signal.SIGKILL)
        trainer.save_projector = save_projector
    for folder in folders:
        rows, model = tiny_rows(), tiny_model()
        slow = [Slow()] if how == "slow" else []
        train_stage(model, rows, tiny_collator(rows), tiny_arguments(folder, max_steps=20), callbacks=slow)
        trainer.save_projector(model, folder)
"""


@pytest.fixture
def start(tmp_path):
    "Start the script above in a process of its own."
    script = tmp_path / "stage.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__)))

    def run(*args):
        return subprocess.Popen(
            [sys.executable, script, *args],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def wait_for_checkpoint(folder, process):
    while not list(folder.glob(f"checkpoint-*/{COMPLETE}")):
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_runs_end_with_the_weights_of_an_unbroken_one(tmp_path, start):
    saving, killed = start("die-while-saving", "saving"), start("slow", "killed")
    wait_for_checkpoint(tmp_path / "killed", killed)
    killed.send_signal(signal.SIGKILL)
    assert (killed.wait(), saving.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert (tmp_path / "saving" / "checkpoint-4" / "projector.safetensors").exists()
    assert last_checkpoint(tmp_path / "saving").name == "checkpoint-2"
    for name in ("killed", "saving"):
        assert not (tmp_path / name / "projector.safetensors").exists()
    assert start("run", "killed", "saving", "unbroken").wait() == 0
    unbroken = (tmp_path / "unbroken" / "projector.safetensors").read_bytes()
    for name in ("killed", "saving"):
        assert (tmp_path / name / "projector.safetensors").read_bytes() == unbroken


# ---------------------------------------------------------------- stopped by a signal


class Signal(TrainerCallback):
    "A signal arrives in the middle of a step."

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    rows, stopped, resumed, unbroken = tiny_rows(), tiny_model(), tiny_model(), tiny_model()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    often = dict(save_steps=50)
    with pytest.raises(TrainingInterrupted) as stop:
        train_stage(
            stopped,
            rows,
            tiny_collator(rows),
            tiny_arguments(tmp_path / "a", **often),
            callbacks=[Signal(3, number)],
        )
    assert stop.value.signal == number and isinstance(stop.value, KeyboardInterrupt)
    expected = f"Stopped by {number.name} after step 3 of 6. {tmp_path / 'a' / 'checkpoint-3'} is complete"
    assert str(stop.value).startswith(expected)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    log = train_stage(resumed, rows, tiny_collator(rows), tiny_arguments(tmp_path / "a", **often))
    full = train_stage(unbroken, rows, tiny_collator(rows), tiny_arguments(tmp_path / "b", **often))
    assert same(projector_of(resumed), projector_of(unbroken)) and losses_of(log) == losses_of(full)


class SignalsInWorkers(list):
    "Rows; a worker process sends itself SIGINT and SIGTERM before its first row."

    sent = False

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None and not self.sent:
            self.sent = True
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return super().__getitem__(i)


def test_workers_get_no_signals_even_before_their_first_batch(tmp_path):
    "In training and in validation; afterwards the process itself receives signals as before."
    rows = SignalsInWorkers(tiny_rows(8))
    log = train_stage(
        tiny_model(),
        rows,
        tiny_collator(rows),
        tiny_arguments(tmp_path, max_steps=4, dataloader_num_workers=1, eval_strategy="steps", eval_steps=2),
        eval_rows=rows,
        eval_budgets=(1, 4),
    )
    assert len(losses_of(log)) == 4 and sum("eval_loss" in entry for entry in log) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_signal_while_workers_are_started_is_not_lost(tmp_path, monkeypatch):
    rows = tiny_rows()
    unblock = trainer_module.unblock_stop_signals
    blocked = []

    def signal_then_unblock():
        if not blocked:
            blocked.append(set(STOP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            os.kill(os.getpid(), signal.SIGTERM)
        unblock()

    monkeypatch.setattr(trainer_module, "unblock_stop_signals", signal_then_unblock)
    with pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM after step 1 of 6"):
        train_stage(tiny_model(), rows, tiny_collator(rows), tiny_arguments(tmp_path))
    assert blocked == [True]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path):
    rows = tiny_rows()
    log = train_stage(
        tiny_model(),
        rows,
        tiny_collator(rows),
        tiny_arguments(tmp_path),
        callbacks=[Signal(6, signal.SIGTERM)],
    )
    assert len(losses_of(log)) == 6


def test_a_run_without_checkpoints_does_not_claim_one(tmp_path):
    rows = tiny_rows()
    with pytest.raises(TrainingInterrupted, match="after step 2 of 6. Nothing was saved"):
        train_stage(
            tiny_model(),
            rows,
            tiny_collator(rows),
            tiny_arguments(tmp_path, save_strategy="no"),
            callbacks=[Signal(2, signal.SIGINT)],
        )
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- budgets, freezing


def test_budgets_are_uniform_and_depend_on_seed_and_step_alone():
    rows = tiny_rows(8)
    collator, other = tiny_collator(rows), tiny_collator(rows, seed=1)
    drawn = [draw_budget((1, 4, 9), 0, step) for step in range(3000)]
    assert all(900 < drawn.count(v) < 1100 for v in (1, 4, 9))
    one, two = collator(rows[:4]), collator([row | dict(id="null") for row in rows[4:]])
    for step in range(20):
        expected = draw_budget((1, 4), 0, step)  # whatever the rows and their ids
        assert collator.at_step(one, step)["tokens"] == collator.at_step(two, step)["tokens"] == expected
    drawn = [draw_budget((1, 4), 0, step) for step in range(20)]
    assert [other.at_step(one, step)["tokens"] for step in range(20)] != drawn
    assert {tiny_collator(rows, (4,)).at_step(one, s)["tokens"] for s in range(9)} == {4}
    with pytest.raises(ValueError, match="budgets is empty"):
        tiny_collator(rows, ())


class Budgets(TrainerCallback):
    "Keep the budget of every pass, by step."

    def __init__(self, model):
        self.passes = {}
        model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.step = 0

    def note(self, module, args, kwargs):
        self.passes.setdefault(self.step, []).append(kwargs["tokens"])

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_the_passes_of_a_step_share_its_budget_however_it_is_split(tmp_path, batch_size):
    rows, model = tiny_rows(), tiny_model()
    recorder = Budgets(model)
    arguments = tiny_arguments(tmp_path, batch_size=batch_size, gradient_accumulation_steps=4 // batch_size)
    train_stage(model, rows, tiny_collator(rows), arguments, callbacks=[recorder])
    expected = {step: [draw_budget((1, 4), 0, step)] * (4 // batch_size) for step in range(6)}
    assert recorder.passes == expected and len(set(map(tuple, expected.values()))) == 2


def test_only_the_projector_learns(tmp_path):
    rows, model = tiny_rows(), tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = freeze(model)
    assert plan["tower"][0] == plan["llm"][0] == 0 < plan["tower"][1]
    assert plan["projector"][0] == plan["projector"][1]
    train_stage(model, rows, tiny_collator(rows), tiny_arguments(tmp_path, max_steps=2))
    inside = {k for k in before if "multi_modal_projector" in k}
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed and changed <= inside
    frozen = [p for k, p in model.named_parameters() if k not in inside]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not model.training


def test_bad_rows_fail_before_training(tmp_path):
    rows = tiny_rows()

    class Never(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match="no features for"):
        train_stage(
            tiny_model(),
            [rows[0] | dict(image="lost.png"), *rows],
            tiny_collator(rows),
            tiny_arguments(tmp_path),
            callbacks=[Never()],
        )
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "save_steps"])
def test_arguments_refuse(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        stage_arguments(tmp_path, **dict(max_steps=1) | {name: 0})


# ---------------------------------------------------------------- several budgets in one step


def test_nested_batches_average_the_losses_of_all_budgets(tmp_path):
    rows, model = tiny_rows(4), tiny_model()
    nested = tiny_collator(rows, nested=True)
    batch = nested.at_step(nested(rows), 0)
    assert [b["tokens"] for b in batch["batches"]] == [1, 4]
    trainer = StageTrainer(
        model.eval(), stage_arguments(tmp_path, max_steps=1, use_cpu=True), data_collator=nested
    )
    losses = [model(**b).loss for b in batch["batches"]]
    assert_close(trainer.compute_loss(model, batch), sum(losses) / 2)
    assert abs(losses[0] - losses[1]) > 1e-4  # else the mean would prove nothing
    assert batch["labels"] is batch["batches"][0]["labels"]  # what `Trainer` counts for gradient accumulation
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert_close(
        trainer.compute_loss(model, batch, num_items_in_batch=2 * counted),
        sum(losses) / 4,
        msg="a loss that knows the number of tokens is divided by it",
    )


# ---------------------------------------------------------------- validation


def test_validation_loss_at_each_budget_changes_nothing(tmp_path):
    rows, plain, watched = tiny_rows(), tiny_model(), tiny_model()
    train_stage(plain, rows, tiny_collator(rows), tiny_arguments(tmp_path / "a"))
    arguments = tiny_arguments(tmp_path / "b", eval_strategy="steps", eval_steps=3)
    log = train_stage(watched, rows, tiny_collator(rows), arguments, eval_rows=rows[:10], eval_budgets=(4, 1))
    assert same(projector_of(plain), projector_of(watched))
    for key, tokens in (("eval_loss", 4), ("eval_1_loss", 1)):
        found = {e["step"]: e[key] for e in log if key in e}
        assert sorted(found) == [3, 6] and found[6] < found[3]
        collator = tiny_collator(rows)
        with torch.no_grad():
            parts = [rows[:4], rows[4:8], rows[8:10]]
            means = [watched(**collator.at_budget(collator(p), tokens)).loss.item() for p in parts]
        assert found[6] == pytest.approx((4 * means[0] + 4 * means[1] + 2 * means[2]) / 10, rel=1e-4)


# ---------------------------------------------------------------- room on the disk, and other errors


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_checkpoint_takes_what_is_announced(tmp_path, stage):
    rows, model = tiny_rows(), tiny_model()
    freeze(model, stage)
    announced, result = checkpoint_bytes(model)
    train_stage(model, rows, tiny_collator(rows), tiny_arguments(tmp_path, max_steps=2), stage=stage)
    files = {p.name: p.stat().st_size for p in last_checkpoint(tmp_path).iterdir()}
    weights = files.get("model.safetensors") or files["projector.safetensors"]
    assert weights + files["optimizer.pt"] == pytest.approx(announced, rel=0.2)  # headers of tiny tensors
    assert result == (sum(p.nbytes for p in model.parameters()) if stage == "finetune" else 0)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_checkpoints_and_the_result_must_fit_to_the_byte(tmp_path, monkeypatch, stage):
    model = tiny_model()
    freeze(model, stage)
    checkpoint, result = checkpoint_bytes(model)
    need = 3 * checkpoint + result
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_bytes(bytes(1000))  # will be replaced
    (tmp_path / "other").write_bytes(bytes(5000))  # will not

    def free(n):
        monkeypatch.setattr(trainer_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=n))

    free(need - 1000)
    check_disk_space(model, tmp_path)
    free(need - 1001)
    with pytest.raises(OSError, match="three checkpoints of"):
        check_disk_space(model, tmp_path)


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(28, "No space left on device"), OSError),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            OSError,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), OSError),
        (RuntimeError("CUDA error: out of memory"), RuntimeError),
        (SafetensorError("Some tensors share memory"), SafetensorError),
        (KeyError("projector"), KeyError),
        (AssertionError("a bug"), AssertionError),
    ],
    ids=lambda x: type(x).__name__,
)
def test_only_errors_of_the_file_system_are_called_so(tmp_path, monkeypatch, error, expected):
    rows = tiny_rows()

    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(StageTrainer, "_save_rng_state", fail)
    with pytest.raises(expected) as caught:
        train_stage(tiny_model(), rows, tiny_collator(rows), tiny_arguments(tmp_path))
    assert ("could not be written" in str(caught.value)) == (expected is OSError)
    assert last_checkpoint(tmp_path) is None
