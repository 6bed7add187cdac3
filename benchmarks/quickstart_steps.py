"""Training steps of the quickstart in float32, in bfloat16, and with attention by matrix products.

    python benchmarks/quickstart_steps.py            # writes runs/quickstart_steps.json

Every batch is trained by all ways, one after the other, each with its own model and optimizer, in an order
that rotates. All begin with the same weights, on one thread. `seconds` is the processor time of this process:
it does not count what other processes use. The record is written after every step.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import process_time

import torch
import tyro
from tqdm.auto import tqdm

from delta_llava.passes import Passes
from delta_llava.recipe import read_scene_sets, write_recipe_scenes
from delta_llava.runs import write_record
from delta_llava.settings import Quickstart, Stage
from delta_llava.speed import median_and_quartiles
from delta_llava.train import build_stage_model, image_paths, initialize_projector, stage_collator
from delta_llava.trainer import draw_budget, freeze

WAYS = ("float32", "bfloat16", "bfloat16, eager attention")


class Training:
    "A model that is trained in one way."

    def __init__(self, stage: Stage, way: str, rows, features: torch.Tensor):
        self.way, self.half = way, way != "float32"
        self.stage = replace(stage, projector=None, bf16=self.half)
        self.model, processor = build_stage_model(self.stage)
        initialize_projector(self.stage, self.model, processor, rows, features)
        freeze(self.model, stage.stage, stage.lora_rank, 0.0)
        if way == WAYS[-1]:
            Passes(self.model, self.stage)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=stage.learning_rate, weight_decay=0, fused=True)
        self.collator = stage_collator(
            self.stage, processor, stage.train_budgets, features, image_paths(rows)
        )

    def step(self, rows: list[dict], number: int) -> tuple[float, float]:
        "Loss and processor seconds of an optimizer step."
        tokens = draw_budget(self.stage.train_budgets, self.stage.seed, number)
        batch = self.collator.at_budget(self.collator(rows), tokens)
        torch.manual_seed(number)  # DropPath
        start = process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), process_time() - start


@dataclass
class QuickstartSteps:
    stage1_steps: int = 24  # Optimizer steps of stage 1, in each way
    stage2_steps: int = 12  # Likewise of stage 2, from a new projector
    tower: str = Quickstart.tower  # Vision tower: pypi:…, hub:… or a folder
    llm: str = Quickstart.llm  # LLM: pypi:…, hub:… or a folder
    image_size: int = Quickstart.image_size  # Side of an image, px
    train_budgets: tuple[int, ...] = Quickstart.train_budgets  # Budgets V
    record: Path = Path("runs/quickstart_steps.json")

    def __call__(self):
        torch.set_num_threads(1)
        self.results: list[dict] = []
        self.load_average = os.getloadavg()
        with tempfile.TemporaryDirectory() as folder:
            recipe = self.recipe(Path(folder))
            scenes = read_scene_sets(recipe, dict(train=write_recipe_scenes(recipe)["train"]))["train"]
            for stage in (recipe.stage1(), recipe.stage2()):
                self.compare(stage, scenes.features)

    def recipe(self, folder: Path) -> Quickstart:
        "The quickstart with as many scenes as the steps need."
        recipe = Quickstart(tower=self.tower, llm=self.llm, image_size=self.image_size, output_dir=folder)
        images = max(
            self.stage1_steps * recipe.stage1_batch_size, self.stage2_steps * recipe.stage2_batch_size
        )
        budgets = dict(train_budgets=self.train_budgets, eval_budgets=self.train_budgets)
        budgets["tokens"] = self.train_budgets[0]
        steps = dict(stage1_steps=self.stage1_steps, stage2_steps=self.stage2_steps)
        return replace(recipe, train_images=images, test_images=2, **steps, **budgets)

    def compare(self, stage: Stage, features: torch.Tensor):
        "All ways of a stage, step by step."
        rows = stage.load_rows()
        trainings = [Training(stage, way, rows, features) for way in WAYS]
        steps: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        self.results.append({})
        for number in tqdm(range(stage.max_steps), desc=stage.stage):
            start = number * stage.batch_size
            batch = list(rows.select(range(start, start + stage.batch_size)))
            first = number % len(WAYS)
            for training in trainings[first:] + trainings[:first]:
                steps[training.way].append(training.step(batch, number))
            self.results[-1] = summary(stage, steps)
            self.write()

    def write(self):
        "The record so far."
        write_record(self.record, [0], self.results, threads=1, load_average=self.load_average)


def summary(stage: Stage, steps: dict[str, list[tuple[float, float]]]) -> dict:
    "Losses, seconds, and how many times as long float32 takes, by pairs; the first step is a warm-up."
    counted = slice(1, None) if len(steps[WAYS[0]]) > 1 else slice(None)
    seconds = {way: [step[1] for step in steps[way]][counted] for way in WAYS}
    losses = {way: [round(step[0], 4) for step in steps[way]] for way in WAYS}
    result = dict(stage=stage.stage, rows=stage.batch_size, ways={})
    for way in WAYS:
        ratios = [slow / fast for slow, fast in zip(seconds[WAYS[0]], seconds[way], strict=True)]
        result["ways"][way] = dict(
            seconds=round(median(seconds[way]), 3),
            speedup=median_and_quartiles(ratios),
            mean_loss=round(mean(losses[way]), 4),
            losses=losses[way],
        )
    return result


if __name__ == "__main__":
    tyro.cli(QuickstartSteps)()
