"""Seconds of a training step of both stages against visual tokens (the paper's Table 4), on one thread of a
CPU: DINOv2-S/14 at 336 px and SmolLM2-135M on planted scenes. 576 tokens are LLaVA's MLP, all other budgets
are Delta. `benchmarks/steps.py` measures the paper's model on a GPU.

    python benchmarks/stage.py      # writes runs/stage_tokens.json

A step is forward, backward, clipping and AdamW, as in training: it begins with pixels, so that the vision
tower is part of it, and it uses gradient checkpointing. The learning rate is 0: the work is the same, and
every step starts from the same weights. Each repeat times every budget once, in an order that rotates; a
ratio is taken within its repeat. The ceiling is the fastest of some large matrix products, and the fraction
of it counts the operations of the step, recomputation included. The time is CPU time of the process, which
other work on the machine affects only through caches and clock rates.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from steps import paper_ratio, timed_step
from tqdm.auto import tqdm

from delta_llava.assets import default_llm, default_tower
from delta_llava.collator import Collator
from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.conversations import load_conversations
from delta_llava.flops import pretrained_config
from delta_llava.launch import RowLengths, image_side, meta_model, row_flops
from delta_llava.runs import write_record
from delta_llava.scenes import write_scenes
from delta_llava.speed import measured_device, median_and_quartiles
from delta_llava.tower import open_image
from delta_llava.train import Finetune, Pretrain, build_stage_model
from delta_llava.trainer import freeze

CPU = torch.device("cpu")
STAGES = dict(pretrain=Pretrain, finetune=Finetune)


def merge_conversations(rows: list[dict]) -> list[dict]:
    "One row for each scene, with all questions about it in one conversation."
    merged: dict[str, dict] = {}
    for row in rows:
        name = row["id"].rsplit("-", 2)[0]
        if name not in merged:
            merged[name] = row | dict(conversations=list(row["conversations"]))
        else:
            turns = [
                turn | dict(value=turn["value"].replace("<image>\n", "")) for turn in row["conversations"]
            ]
            merged[name]["conversations"] += turns
    return [*merged.values()]


@dataclass
class StageSteps:
    tokens: tuple[int, ...] = (576, 144, 64, 16, 4, 1)  # Budgets V; all patches of the tower are the MLP's
    tower: str | None = None  # Without it the embedded one
    llm: str | None = None  # Likewise
    image_size: int | None = 336  # Side of an image, px
    batch_size: int = 4  # Rows of a step
    repeats: int = 8  # Steps at each budget
    seed: int = 0  # Of weights and rows
    record: Path = Path("runs/stage_tokens.json")

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1.")
        if len(self.tokens) < 2:
            raise ValueError(f"tokens={self.tokens} must be two budgets or more: ratios are to the first.")
        self.tower = self.tower or default_tower()
        self.llm = self.llm or default_llm()
        self.n_patches = (
            image_side(self.stage("pretrain", 1)) // pretrained_config(self.tower).patch_size
        ) ** 2

    def compressor(self, tokens: int) -> str:
        return "mlp" if tokens == self.n_patches else "delta"

    def stage(self, kind: str, tokens: int, compressor: str = "delta"):
        "The settings of a stage; nothing is read from its paths."
        return STAGES[kind](
            data=Path(),
            output_dir=Path(),
            tower=self.tower,
            llm=self.llm,
            compressor=compressor,
            tokens=tokens,
            projector=None,
            image_size=self.image_size,
            batch_size=self.batch_size,
            per_device_batch_size=self.batch_size,
            bf16=False,
            gradient_checkpointing=True,
            sharding="none",
            seed=self.seed,
        )

    # ------------------------------------------------------------ model and batches

    def rows(self) -> dict[str, list[dict]]:
        "Rows of each stage: captions, and conversations with all questions. Images are held in memory."
        with TemporaryDirectory() as folder:
            rows = load_conversations(write_scenes(folder, self.batch_size, seed=self.seed))
            rows = [{**row, "image": open_image(row["image"])} for row in rows]
        captions = [row for row in rows if row["task"] == "caption"]
        found = dict(pretrain=captions, finetune=merge_conversations(rows))
        return {kind: some[: self.batch_size] for kind, some in found.items()}

    def build(self):
        "The model, both projectors, and the batch of each stage and budget."
        torch.manual_seed(self.seed)
        model, processor = build_stage_model(self.stage("pretrain", min(self.tokens)))
        delta = model.multi_modal_projector
        mlp = build_compressor("mlp", compressor_config("mlp", delta.config, tokens=self.n_patches))
        projectors = dict(delta=delta, mlp=mlp)
        for projector in projectors.values():
            projector.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        rows = self.rows()
        batches = {}
        for tokens in self.tokens:
            projectors[self.compressor(tokens)].config.check_budget(tokens, delta.config.grid)
            collator = Collator(processor=processor, tokens=tokens)
            for kind in STAGES:
                batches[kind, tokens] = collator(rows[kind])
        return model.train(), projectors, batches

    # ------------------------------------------------------------ timing

    def time_stage(self, kind: str, model, projectors, batches) -> dict[int, list[float]]:
        "Seconds of each step, by budget."
        seconds = {tokens: [] for tokens in self.tokens}
        model.multi_modal_projector = projectors["delta"]
        freeze(model, kind)
        trained = {}
        for module in (model, *projectors.values()):
            module_trained = [p for p in module.parameters() if p.requires_grad]
            trained |= dict.fromkeys(module_trained)
        optimizer = torch.optim.AdamW(list(trained), lr=0.0, weight_decay=0.0, fused=True)
        for repeat in tqdm(range(self.repeats + 1), desc=kind):  # the first one warms up
            turn = repeat % len(self.tokens)
            for tokens in self.tokens[turn:] + self.tokens[:turn]:
                model.multi_modal_projector = projectors[self.compressor(tokens)]
                parts, _ = timed_step(model, optimizer, batches[kind, tokens], CPU, bf16=False)
                if repeat:
                    seconds[tokens].append(parts["step"])
        return seconds

    def entry(self, kind: str, tokens: int, batch: dict, seconds: list[float], base: list[float]) -> dict:
        "One entry of the record."
        n = len(batch["input_ids"])
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        length = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
        rows = RowLengths(count=n, text=length // n - tokens, answer=supervised // n)
        settings = self.stage(kind, tokens, self.compressor(tokens))
        flops = n * sum(row_flops(settings, meta_model(settings), rows).values())
        middle = statistics.median(seconds)
        return dict(
            stage=kind,
            tokens=tokens,
            projector=self.compressor(tokens),
            batch=n,
            text=rows.text,
            answer=rows.answer,
            seconds=median_and_quartiles(seconds),
            ratio=median_and_quartiles([s / b for s, b in zip(seconds, base, strict=True)]),
            paper_ratio=paper_ratio(tokens, self.tokens[0], kind),
            tokens_per_second=round(length / middle, 1),
            flops=flops,
            of_ceiling=float(f"{flops / middle / self.peak:.3g}"),
        )

    def report(self, entry: dict):
        "Print one entry."
        middle, low, high = entry["ratio"]
        tqdm.write(
            f"{entry['stage']:8} V={entry['tokens']:3} {entry['seconds'][0]:8.3f} s  "
            f"{middle:.3f} [{low:.3f}–{high:.3f}] of V={self.tokens[0]}; paper's epochs "
            f"{entry['paper_ratio']};  {entry['tokens_per_second']:.0f} tokens/s, "
            f"{entry['of_ceiling']:.0%} of {self.peak / 1e12:.3g} TFLOP/s"
        )

    def __call__(self):
        torch.set_num_threads(1)
        self.peak = measured_device(CPU, torch.float32).peak
        model, projectors, batches = self.build()
        results = []
        for kind in STAGES:
            seconds = self.time_stage(kind, model, projectors, batches)
            for tokens in self.tokens:
                batch = batches[kind, tokens]
                entry = self.entry(kind, tokens, batch, seconds[tokens], seconds[self.tokens[0]])
                self.report(entry)
                results.append(entry)
        path = write_record(
            self.record,
            [self.seed],
            results,
            ceiling_tflops=round(self.peak / 1e12, 3),
            paper="Table 4, hours of an epoch on 8 H100",
            clock="CPU time of the process, one thread",
            tower=self.tower,
            llm=self.llm,
            image_size=self.image_size,
            repeats=self.repeats,
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(StageSteps)()
