"""Captions at small budgets, Delta against FastV (the paper's Table 6 and Fig. 4), on held-out planted scenes.

    python benchmarks/captions.py                                    # trains and scores what is not there; writes runs/captions.json
    python benchmarks/captions.py --seeds 0 --steps 20 --folder look --record look.json   # a look

For each seed two trainings that share pictures, order, steps, tower and LLM: one Delta whose steps draw from all budgets, as the quickstart trains it, and LLaVA-1.5's projector, which hands all
patches on. FastV is then applied to the second one: with its default of two full layers, at the same budgets, without any training; at all patches it drops nothing and is LLaVA-1.5. That one side
was trained for its budgets and the other was not is how the paper compares them. `cider_truth` is the CIDEr of the true captions, the most that is worth hoping for.

Each training and its scores stay in the folder, so a broken run goes on.
"""
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tqdm.auto import tqdm

from delta_llava.cli import Train
from delta_llava.compressors.fastv import FastVConfig
from delta_llava.config import dinov2_s14
from delta_llava.evaluate import score_captions, generate_captions, encode_images
from delta_llava.quickstart import QUESTION, Recipe, held_out_images, load_trained, read_features
from delta_llava.train import commit, write_record

KEPT = ("seed", "compressor", "tokens", "set", "precision", "recall", "f1", "all_right", "cider", "cider_truth")


def score_run(folder):
    "What a trained model says of every held-out picture at each budget of its recipe, with its scores."
    model, processor, recipe = load_trained(folder)
    rows = []
    for name, part in tqdm(held_out_images(recipe, folder/"scenes").items(), desc=str(folder), unit="set"):
        features, true = read_features(model, processor, part), [row["conversations"][1]["value"] for row in part]
        for t in recipe.test_budgets:
            said = generate_captions(model, processor, encode_images(model, features, t), t, f"<image>\n{QUESTION}")
            rows.append(dict(seed=recipe.seed, compressor=recipe.compressor, tokens=t, set=name, said=said, true=true) | score_captions(said, list(part)))
    return rows


@dataclass
class Captions:
    seeds: tuple[int, ...] = (0, 1, 2)  # Of scenes, start and order
    budgets: tuple[int, ...] = (16, 4, 1)  # V
    steps: int = 200  # Of each training
    batch_size: int = 8  # Pictures in a step
    train_images: int = 1600  # Half with one thing, half with two or three
    test_images: int = 64  # In each of the four held-out sets
    image_size: int = 112  # Side of a picture, px: 8×8 patches
    llm_dtype: str = "bfloat16"  # Of the frozen LLM
    folder: Path = Path("runs/captions")  # Gets `COMPRESSOR-SEED/`
    record: Path = Path("runs/captions.json")

    @property
    def patches(self):
        "What the tower gives, and LLaVA-1.5 hands on."
        return dinov2_s14(self.image_size).grid**2

    def recipes(self):
        "Two trainings for each seed."
        same = {k: v for k, v in asdict(self).items() if k not in ("seeds", "budgets", "folder", "record")}
        delta, every = dict(tokens=max(self.budgets), train_budgets=self.budgets, test_budgets=self.budgets), self.patches
        fastv = dict(tokens=every, train_budgets=(every,), test_budgets=(every, *self.budgets))
        return [Recipe(seed=seed, compressor=name, **budgets, **same) for seed in self.seeds for name, budgets in (("delta", delta), ("fastv", fastv))]

    def cell(self, recipe):
        "Scores and loss of one training, kept in its folder."
        folder, began = self.folder/f"{recipe.compressor}-{recipe.seed}", time.perf_counter()
        if not (folder/"record.json").exists(): Train(**asdict(recipe), folder=folder)()
        trained = json.loads((folder/"record.json").read_text())
        if trained["recipe"] != json.loads(json.dumps(asdict(recipe))): raise ValueError(f"{folder} holds a training of another recipe; name another --folder, or delete this one.")
        if not (kept := folder/"scores.json").exists():
            rows = score_run(folder)
            kept.write_text(json.dumps(dict(rows=rows, commit=commit(), seconds=time.perf_counter() - began)))
        scored = json.loads(kept.read_text())
        about = dict(seed=recipe.seed, compressor=recipe.compressor, trained_by=trained["commit"], scored_by=scored["commit"], train_seconds=round(trained["seconds"]), losses=trained["result"]["losses"])
        return scored["rows"], about

    def __call__(self):
        rows, trainings = zip(*(self.cell(recipe) for recipe in self.recipes()))
        rows = sum(rows, [])
        result = [{k: round(v, 4) if isinstance(v := r[k], float) else v for k in KEPT} | {k: r[k][:3] for k in ("said", "true")} for r in rows]
        settings = {k: v for k, v in asdict(self).items() if k not in ("folder", "record", "seeds")}
        same = asdict(self.recipes()[0])
        parts = {k: same[k] for k in ("tower", "llm", "lr", "calibrated")}
        write_record(self.record, self.seeds, result, patches=self.patches, fastv_layer=FastVConfig().layer, **settings, **parts, trainings=trainings)
        print(f"wrote {self.record}")


if __name__ == "__main__": tyro.cli(Captions)()
