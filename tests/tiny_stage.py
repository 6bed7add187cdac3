"""A tower, an LLM and conversations small enough to train both stages in seconds, as folders; and a program
that trains them, alone or on several processes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tiny_vlm import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from delta_llava.train import Finetune, Pretrain, run_stage
from delta_llava.trainer import COMPLETE, StageTrainer, TimeLimit, TrainingInterrupted

COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "grey": (128, 128, 128)}


def chatml_tokenizer():
    "One token for each byte, and the marks of ChatML."
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    spelling = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    marks = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    return PreTrainedTokenizerFast(tokenizer_object=spelling, **marks)


def write_models(folder):
    "A CLIP-like tower with a 4×4 grid, and a two-layer Llama with one token for each byte."
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder / "tower")
    llm = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    byte_tokenizer().save_pretrained(folder / "llm")


def write_parts(folder):
    "The models, 24 images of one color, 4 rows of text alone."
    write_models(folder)
    rows = []
    for i in range(24):
        name = list(COLORS)[i % 4]
        Image.new("RGB", (56, 40 + i), COLORS[name]).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        rows.append(dict(id=f"picture-{i}", image=f"{i}.png", conversations=turns))
    for i in range(4):
        turns = [{"from": "human", "value": f"{i}+1?"}, {"from": "gpt", "value": f"{i + 1}" * 9}]
        rows.append(dict(id=f"text-{i}", conversations=turns))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def stage(kind, parts, folder, **options):
    "A stage on these parts, 6 steps of 4 rows in float32."
    parts = Path(parts)
    same = dict(
        data=parts / "data.json",
        output_dir=Path(folder),
        tower=str(parts / "tower"),
        llm=str(parts / "llm"),
        tokens=4,
        batch_size=4,
        per_device_batch_size=4,
        max_steps=6,
        seed=0,
        max_length=512,
        bf16=False,
        num_workers=0,
        save_steps=2,
        gradient_checkpointing=False,
        learning_rate=1e-3,
    )
    if kind == "finetune":
        same |= dict(projector=None, sharding="none", group_by_length=False)
    for name in ("data", "projector"):
        if isinstance(options.get(name), str):
            options[name] = Path(options[name])
    for name in ("train_budgets", "eval_budgets"):
        if name in options:
            options[name] = tuple(options[name])
    return (Finetune if kind == "finetune" else Pretrain)(**same | options)


class EachStep(TrainerCallback):
    "Keep loss and learning rate of every step, the budget of every pass, and the precision of weights."

    def __init__(self):
        self.losses, self.rates, self.budgets, self.sharded = [], [], [], False
        self.kept, self.computed = set(), set()  # precision between the steps, and in a layer's pass
        self.gradients = set()  # after a pass that is not the last of its step: of a part, or none

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        args.logging_steps = state.logging_steps = 1
        model.register_forward_pre_hook(self.note, with_kwargs=True)
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(self.note_precision)

    def note(self, module, args, kwargs):
        self.budgets.append(kwargs.get("tokens"))

    def note_precision(self, module, args):
        self.computed.add(str(module.down_proj.weight.dtype))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.get_decoder().layers.parameters()]
        self.gradients |= {type(gradient).__name__ for gradient in gradients}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self.kept |= {str(p.dtype) for p in model.parameters()}
        for moments in optimizer.state.values():
            self.kept |= {str(moment.dtype) for moment in moments.values()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.rates.append(logs["learning_rate"])


class DieAt(TrainerCallback):
    "The process is killed after a step."

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Announce(TrainerCallback):
    "From a step on, a file says that the run can be stopped; steps take some time then."

    def __init__(self, step, file):
        self.step, self.file = step, Path(file)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            self.file.touch()
            time.sleep(0.2)


def die_while_saving(step, place):
    "The process is killed while it writes the checkpoint of `step`; its newest file is cut in half."

    def die(folder):
        newest = max((f for f in Path(folder).iterdir() if f.is_file()), key=lambda f: f.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def renamed(event, args):
        if event == "os.rename" and str(args[1]).endswith(f"checkpoint-{step}/{COMPLETE}"):
            die(Path(args[1]).parent)

    if place == 4:
        return sys.addaudithook(renamed)
    name = ("_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")[place]
    original = getattr(StageTrainer, name)

    def dying(self, folder=None, *args, **kwargs):
        original(self, folder, *args, **kwargs)
        if self.state.global_step == step and f"checkpoint-{step}" in str(folder):
            die(folder)

    setattr(StageTrainer, name, dying)
    return None


def clock_ahead(seconds):
    "The clock of the second process is ahead of that of the first."
    elapsed = TimeLimit.elapsed
    if os.environ["RANK"] == "1":
        TimeLimit.elapsed = lambda self: elapsed(self) + seconds


def allow_fsdp_on_cpu():
    "accelerate refuses FSDP on CPUs by the name of the distributed type alone; torch's FSDP2 works there."
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import TrainingArguments

    device = TrainingArguments.device

    def patched(self):
        found = device.fget(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return found

    TrainingArguments.device = property(patched)


def main(kind, parts, folder, options):
    "`tiny_stage.py KIND PARTS FOLDER '{\"die_at\": 3, …}'`: prints whether weights were sharded."
    options = json.loads(options)
    torch.set_num_threads(1)
    if options.pop("fsdp_on_cpu", False):
        allow_fsdp_on_cpu()
    each = EachStep()
    callbacks = [each]
    if "die_at" in options:
        callbacks.append(DieAt(options.pop("die_at")))
    if "announce" in options:
        callbacks.append(Announce(*options.pop("announce")))
    if "clock_ahead" in options:
        clock_ahead(options.pop("clock_ahead"))
    if "die_saving" in options:
        die_while_saving(*options.pop("die_saving"))
    try:
        run_stage(stage(kind, parts, folder, **options), callbacks=callbacks)
    except TrainingInterrupted as e:
        print(e, file=sys.stderr)
        sys.exit(128 + e.signal)
    rank = os.environ.get("RANK", "0")
    Path(f"{folder}.budgets.{rank}").write_text(json.dumps(each.budgets))
    Path(f"{folder}.rates.{rank}").write_text(json.dumps(each.rates))
    precision = {name: sorted(getattr(each, name)) for name in ("kept", "computed", "gradients")}
    Path(f"{folder}.precision.{rank}").write_text(json.dumps(precision))
    if rank == "0":
        print("sharded" if each.sharded else "whole")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
