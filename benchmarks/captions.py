"""Captions at small budgets, Delta against FastV (the paper's Table 6 and Fig. 4), on held-out scenes.

    python benchmarks/captions.py                      # runs what is missing; writes runs/captions.json
    python benchmarks/captions.py --seeds 0 --steps 20 --folder look --record look.json   # a short trial

For each seed two trainings have the same images, order, steps, vision tower and LLM: one Delta whose
steps use all budgets, as in the quickstart, and LLaVA-1.5's projector, which keeps all patches. FastV is
then applied to the second one, with its default of two full layers, at the same budgets and without any
training. At all patches it drops nothing and is LLaVA-1.5. The paper compares them in the same way: one side
was trained for its budgets, the other was not. `cider_reference` is the CIDEr of the reference captions, an
upper limit.

Each training and its scores stay in the folder, so a benchmark that was interrupted can be continued.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro

from delta_llava.captions import CaptionTraining, evaluate_run
from delta_llava.compressors.fastv import FastVConfig
from delta_llava.config import dinov2_s14
from delta_llava.runs import add_results, commit, read_run, write_record
from delta_llava.train import run_stage

RUN = ("seed", "compressor", "tokens", "set")
SCORES = ("precision", "recall", "f1", "exact_match", "cider", "cider_reference")
EXAMPLES = 3  # captions of each set in the record


@dataclass
class Captions:
    seeds: tuple[int, ...] = (0, 1, 2)  # Of scenes, initialization and order
    budgets: tuple[int, ...] = (16, 4, 1)  # V
    steps: int = 200  # Optimizer steps of each training
    batch_size: int = 8  # Images in a step
    train_images: int = 1600  # Half with one object, half with two or three
    test_images: int = 64  # In each of the four held-out sets
    image_size: int = 112  # Side of an image, px: 8×8 patches
    llm_dtype: str = "bfloat16"  # Of the frozen LLM
    folder: Path = Path("runs/captions")  # Gets `COMPRESSOR-SEED/`
    record: Path = Path("runs/captions.json")

    @property
    def patches(self):
        "Patch tokens of the vision tower, all of which LLaVA-1.5 keeps."
        return dinov2_s14(self.image_size).grid ** 2

    def settings(self):
        "Two trainings for each seed."
        names = ("batch_size", "train_images", "test_images", "image_size", "llm_dtype")
        common = {name: getattr(self, name) for name in names} | dict(max_steps=self.steps)
        every = self.patches
        delta = dict(tokens=max(self.budgets), train_budgets=self.budgets, eval_budgets=self.budgets)
        fastv = dict(tokens=every, train_budgets=(every,), eval_budgets=(every, *self.budgets))
        runs = []
        for seed in self.seeds:
            for compressor, budgets in (("delta", delta), ("fastv", fastv)):
                run = dict(output_dir=self.folder / f"{compressor}-{seed}", seed=seed, compressor=compressor)
                runs.append(CaptionTraining(**run, **budgets, **common))
        return runs

    def train_and_evaluate(self, settings):
        "The scores of one training, and its origin. Both stay in the training's `run.json`."
        run_stage(settings)
        run = read_run(settings.output_dir)
        if "captions" not in run["result"]:
            captions = evaluate_run(settings.output_dir)
            run = add_results(settings.output_dir, captions=captions, evaluated_by=commit())
        origin = dict(
            seed=settings.seed,
            compressor=settings.compressor,
            trained_by=run["commit"],
            scored_by=run["result"]["evaluated_by"],
            train_seconds=round(run["seconds"]),
            losses=run["result"]["losses"],
        )
        return run["result"]["captions"], origin

    def __call__(self):
        rows, trainings = [], []
        for settings in self.settings():
            scored, origin = self.train_and_evaluate(settings)
            rows += [summary(row) for row in scored]
            trainings.append(origin)
        own = [f.name for f in fields(self) if f.name not in ("folder", "record", "seeds")]
        common = json.loads(json.dumps(asdict(self.settings()[0]), default=str))
        parts = {name: common[name] for name in ("tower", "llm", "learning_rate", "closed_form_init")}
        write_record(
            self.record,
            self.seeds,
            rows,
            patches=self.patches,
            fastv_layer=FastVConfig().layer,
            **{name: getattr(self, name) for name in own},
            **parts,
            trainings=trainings,
        )
        print(f"wrote {self.record}")


def summary(row):
    "The scores of one set and budget, rounded, with a few examples."
    scores = {name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in SCORES}
    run = {name: row[name] for name in RUN}
    return run | scores | {name: row[name][:EXAMPLES] for name in ("captions", "references")}


if __name__ == "__main__":
    tyro.cli(Captions)()
