"""Stage-1 loss with the authors' start and with the calibrated one, for the Delta projector and for M3's averaged MLP: paired by seed, one run.

    python benchmarks/calibration.py            # writes runs/calibration.json
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm.auto import tqdm

from delta_llava import quickstart as qs
from delta_llava.evaluate import forced_choice_accuracy, matched_mismatched_loss, encode_images
from delta_llava.train import write_record


@dataclass
class Benchmark:
    seeds: tuple[int, ...] = (0, 1, 2)  # Each is one start, one order of the pictures, one set of scenes
    steps: int = 30  # Optimizer steps of each run
    train_images: int = 400  # Half with one thing
    test_images: int = 32  # Held-out scenes with one thing
    tokens: int = 4  # Budget V
    record: Path = Path("runs/calibration.json")

    def __call__(self):
        cells = [(seed, name, start) for seed in self.seeds for name in ("delta", "m3") for start in ("authors", "calibrated")]
        results = [self.one(*cell) for cell in tqdm(cells, desc="runs")]
        recipe = qs.Recipe()
        write_record(self.record, self.seeds, results, steps=self.steps, batch_size=recipe.batch_size, tokens=self.tokens, lr=recipe.lr, train_images=self.train_images)

    def one(self, seed, name, start):
        recipe = qs.Recipe(seed=seed, steps=self.steps, train_images=self.train_images, test_images=self.test_images, tokens=self.tokens,
                           train_budgets=(self.tokens,), test_budgets=(self.tokens,), compressor=name, calibrated=start == "calibrated")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as checkpoints:
            model, processor = qs.build(recipe)
            rows, test = qs.training_images(recipe, folder), qs.held_out_images(recipe, folder)["heldout_scenes, one thing"]
            log = qs.train(recipe, model, processor, rows, qs.read_features(model, processor, rows), checkpoints, logging_steps=1, save_strategy="no")
            visual = encode_images(model, qs.read_features(model, processor, test), self.tokens)
            scores = matched_mismatched_loss(model, processor, list(test), visual) | dict(naming=forced_choice_accuracy(model, processor, list(test), visual))
        return dict(projector=name, start=start, seed=seed, losses=[e["loss"] for e in log if "loss" in e], **scores)


if __name__ == "__main__": tyro.cli(Benchmark)()
