"""Seconds of a training step of both stages against visual tokens (the paper's Table 4); 576 is LLaVA's
MLP, all other budgets are Delta.

    python benchmarks/stage.py      # DINOv2-S/14 at 336 px and SmolLM2-135M, planted scenes
    python benchmarks/stage.py --full --record runs/stage_full.json --tokens 576 144 64 16 1
                                    # one large GPU: CLIP-L/14-336 and Vicuna-7B, random weights, bfloat16

A step is forward, backward, clipping and AdamW, as in training: it begins with pixels, so that the
vision tower is part of it, and it uses gradient checkpointing. The learning rate is 0: the work is the
same, and every step starts from the same weights. Each repeat times every budget once, in an order that
rotates; a ratio is taken within its repeat. With `--full` the trained part of the LLM is bfloat16 with
its moments, so that one GPU holds all of it; rows are as long as `delta_llava.launch` assumes. The
ceiling is the fastest of some large matrix products, and the fraction of it counts the operations of the
step, recomputation included. On a CPU the time is that of the process on one thread, which other work on
the machine affects only through caches and clock rates.
"""

import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Literal

import torch
import tyro
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from delta_llava.assets import default_llm, default_tower
from delta_llava.collator import Collator
from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.conversations import load_conversations
from delta_llava.launch import (
    PAPER_TIMES,
    ROWS,
    RowLengths,
    image_side,
    meta_model,
    pretrained_config,
    row_flops,
)
from delta_llava.runs import write_record
from delta_llava.scenes import write_scenes
from delta_llava.speed import measured_device, median_and_quartiles
from delta_llava.tower import open_image
from delta_llava.train import Finetune, Pretrain, build_stage_model
from delta_llava.trainer import freeze

CUDA = torch.cuda.is_available()
read_clock = perf_counter if CUDA else process_time


def seconds_of(text):
    "Seconds of `h:mm:ss`."
    h, m, s = map(int, text.split(":"))
    return 3600 * h + 60 * m + s


def paper_ratio(tokens, base, kind):
    "Table 4's time at a budget relative to another one; `None` if the paper has no such row."
    if tokens not in PAPER_TIMES or base not in PAPER_TIMES:
        return None
    column = int(kind == "finetune")
    return round(seconds_of(PAPER_TIMES[tokens][column]) / seconds_of(PAPER_TIMES[base][column]), 3)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def timed_step(model, optimizer, batch, bf16):
    "Seconds and peak memory (GiB) of one step."
    device = next(model.parameters()).device.type
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = read_clock()
    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return read_clock() - start, torch.cuda.max_memory_allocated() / 2**30 if CUDA else None


def merge_conversations(rows):
    "One row for each scene, with all questions about it in one conversation."
    merged = {}
    for row in rows:
        name = row["id"].rsplit("-", 2)[0]
        if name not in merged:
            merged[name] = row | dict(conversations=list(row["conversations"]))
        else:
            turns = [t | dict(value=t["value"].replace("<image>\n", "")) for t in row["conversations"]]
            merged[name]["conversations"] += turns
    return [*merged.values()]


def random_batch(config, kind, tokens, n, side):
    "Random images, text and answers; an image, then text."
    lengths, image = ROWS[kind], config.image_token_id
    text = torch.randint(image, (n, lengths.text))
    ids = torch.cat([text[:, :1], torch.full((n, tokens), image), text[:, 1:]], 1)
    unsupervised = torch.full((n, ids.shape[1] - lengths.answer), -100)
    labels = torch.cat([unsupervised, ids[:, -lengths.answer :]], 1)
    return dict(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(n, 3, side, side),
        tokens=tokens,
    )


@dataclass
class StageSteps:
    tokens: tuple[int, ...] = (576, 144, 64, 16, 4, 1)  # Budgets V; all patches of the tower are the MLP's
    stages: tuple[Literal["pretrain", "finetune"], ...] = ("pretrain", "finetune")
    full: bool = False  # Random weights in the shapes of tower and LLM, random rows, bfloat16
    tower: str | None = None  # Without it the embedded one, or with `full` the paper's
    llm: str | None = None  # The same
    image_size: int | None = 336  # Side of an image, px
    batch_size: int | None = None  # Rows of a step; without it 4, or with `full` the paper's 32 and 16
    repeats: int = 8  # Steps at each budget
    bf16: bool = False  # Compute in bfloat16; with `full` always
    gradient_checkpointing: bool = True  # As in training
    seed: int = 0  # Of weights and rows
    record: Path = Path("runs/stage_tokens.json")

    def __post_init__(self):
        if self.repeats < 1 or len(self.tokens) < 2:
            raise ValueError(
                f"repeats={self.repeats} must be at least 1, and tokens={self.tokens} two "
                f"budgets or more: ratios are to the first."
            )
        self.bf16 |= self.full
        self.tower = self.tower or ("hub:openai/clip-vit-large-patch14-336" if self.full else default_tower())
        self.llm = self.llm or ("hub:lmsys/vicuna-7b-v1.5" if self.full else default_llm())
        self.device = torch.device("cuda" if CUDA else "cpu")
        patch = pretrained_config(self.tower).patch_size
        self.n_patches = (image_side(self.stage("pretrain", 1)) // patch) ** 2

    def rows_per_step(self, kind):
        if self.batch_size:
            return self.batch_size
        return {"pretrain": 32, "finetune": 16}[kind] if self.full else 4

    def compressor(self, tokens):
        return "mlp" if tokens == self.n_patches else "delta"

    def stage(self, kind, tokens, compressor="delta"):
        "The settings of a stage; nothing is read from its paths."
        size = self.rows_per_step(kind)
        return (Finetune if kind == "finetune" else Pretrain)(
            data=Path(),
            output_dir=Path(),
            tower=self.tower,
            llm=self.llm,
            compressor=compressor,
            tokens=tokens,
            projector=None,
            image_size=self.image_size,
            template="v1",
            batch_size=size,
            per_device_batch_size=size,
            bf16=False,
            sharding="none",
            seed=self.seed,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def build_model(self):
        "The model with Delta, and a function that makes the batch of a stage and a budget."
        torch.manual_seed(self.seed)
        first = self.stage("pretrain", min(self.tokens))
        if not self.full:
            model, processor = build_stage_model(first)
            rows = self.scenes()
            return model, lambda kind, tokens: Collator(processor=processor, tokens=tokens)(rows[kind])
        config = meta_model(first).config
        with self.device:
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=False
            )
        side = self.image_size or config.vision_config.image_size

        def make_batch(kind, tokens):
            return random_batch(model.config, kind, tokens, self.rows_per_step(kind), side)

        return model, make_batch

    def build(self):
        "The model, Delta and LLaVA's MLP, and the batches of each stage and budget."
        model, make_batch = self.build_model()
        delta = model.multi_modal_projector
        mlp = build_compressor("mlp", compressor_config("mlp", delta.config, tokens=self.n_patches))
        projectors = dict(delta=delta, mlp=mlp)
        for tokens in self.tokens:
            projectors[self.compressor(tokens)].config.check_budget(tokens, delta.config.grid)
        if self.bf16:
            for part in (model.vision_tower, model.language_model):
                part.to(torch.bfloat16)
        for projector in projectors.values():
            projector.to(self.device, torch.float32).train()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        batches = {}
        for kind in self.stages:
            for tokens in self.tokens:
                batch = make_batch(kind, tokens)
                batches[kind, tokens] = {
                    k: b.to(self.device) if isinstance(b, torch.Tensor) else b for k, b in batch.items()
                }
        return model.to(self.device).train(), projectors, batches

    def scenes(self):
        "Rows of each stage: captions, and conversations with all questions. Images are held in memory."
        with TemporaryDirectory() as folder:
            rows = load_conversations(
                write_scenes(folder, max(map(self.rows_per_step, self.stages)), seed=self.seed)
            )
            rows = [{**row, "image": open_image(row["image"])} for row in rows]
        captions = [row for row in rows if row["task"] == "caption"]
        return dict(
            pretrain=captions[: self.rows_per_step("pretrain")],
            finetune=merge_conversations(rows)[: self.rows_per_step("finetune")],
        )

    def time_stage(self, kind, model, projectors, batches):
        "Seconds of each step, and peak memory, by budget."
        seconds, gib = {v: [] for v in self.tokens}, {}
        for projector in projectors.values():
            projector.requires_grad_(True)
        model.multi_modal_projector = projectors["delta"]
        freeze(model, kind)
        modules = (model, *projectors.values())
        trained = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(list(trained), lr=0.0, weight_decay=0.0, fused=True)
        for repeat in tqdm(range(self.repeats + 1), desc=kind):  # the first one warms up
            turn = repeat % len(self.tokens)
            for tokens in self.tokens[turn:] + self.tokens[:turn]:
                model.multi_modal_projector = projectors[self.compressor(tokens)]
                took, gib[tokens] = timed_step(model, optimizer, batches[kind, tokens], self.bf16)
                if repeat:
                    seconds[tokens].append(took)
        return seconds, gib

    def result(self, kind, tokens, batch, seconds, base, gib, peak):
        "One entry of the record."
        n, supervised = len(batch["input_ids"]), int((batch["labels"][:, 1:] != -100).sum())
        length = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        rows = RowLengths(count=n, text=length // n - tokens, answer=supervised // n)
        settings = self.stage(kind, tokens, self.compressor(tokens))
        flops = n * sum(row_flops(settings, meta_model(settings), rows).values())
        middle = statistics.median(seconds)
        ratio = median_and_quartiles([s / b for s, b in zip(seconds, base, strict=True)])
        return dict(
            stage=kind,
            tokens=tokens,
            projector=self.compressor(tokens),
            batch=n,
            text=rows.text,
            answer=rows.answer,
            seconds=median_and_quartiles(seconds),
            ratio=ratio,
            paper_ratio=paper_ratio(tokens, self.tokens[0], kind),
            tokens_per_second=round(length / middle, 1),
            peak_gib=gib and round(gib, 2),
            flops=flops,
            of_ceiling=float(f"{flops / middle / peak:.3g}"),
        )

    def report(self, entry, peak):
        "Print one entry."
        middle, low, high = entry["ratio"]
        memory = f", {entry['peak_gib']} GiB" if entry["peak_gib"] else ""
        tqdm.write(
            f"{entry['stage']:8} V={entry['tokens']:3} {entry['seconds'][0]:8.3f} s  "
            f"{middle:.3f} [{low:.3f}–{high:.3f}] of V={self.tokens[0]}; paper's epochs "
            f"{entry['paper_ratio']};  {entry['tokens_per_second']:.0f} tokens/s, "
            f"{entry['of_ceiling']:.0%} of {peak / 1e12:.3g} TFLOP/s{memory}"
        )

    def __call__(self):
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        peak = measured_device(self.device, torch.bfloat16 if self.bf16 else torch.float32).peak
        model, projectors, batches = self.build()
        results = []
        for kind in self.stages:
            seconds, gib = self.time_stage(kind, model, projectors, batches)
            base = seconds[self.tokens[0]]
            for tokens in self.tokens:
                entry = self.result(
                    kind, tokens, batches[kind, tokens], seconds[tokens], base, gib[tokens], peak
                )
                self.report(entry, peak)
                results.append(entry)
        path = write_record(
            self.record,
            [self.seed],
            results,
            ceiling_tflops=round(peak / 1e12, 3),
            paper="Table 4, hours of an epoch on 8 H100",
            clock="wall" if CUDA else "CPU time of the process, one thread",
            tower=self.tower,
            llm=self.llm,
            image_size=self.image_size,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            random_weights=self.full,
            repeats=self.repeats,
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(StageSteps)()
