"""Stage-1 loss with the authors' initialization and with the closed form, for the Delta projector and for
M3's averaged MLP, paired by seed.

    python benchmarks/closed_form_init.py            # writes runs/calibration.json
"""

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from tqdm.auto import tqdm

from delta_llava.captions import CaptionTraining, extract_features, held_out_images
from delta_llava.evaluate import encode_images, forced_choice_accuracy, matched_mismatched_loss
from delta_llava.runs import write_record
from delta_llava.train import train_run

TEST_SET = "heldout_scenes, one object"


@dataclass
class Benchmark:
    seeds: tuple[int, ...] = (0, 1, 2)  # Each sets the scenes, their order, and the initialization
    steps: int = 30  # Optimizer steps of each run
    train_images: int = 400  # Half with one object
    test_images: int = 32  # Held-out scenes with one object
    tokens: int = 4  # Budget V
    record: Path = Path("runs/calibration.json")

    def __call__(self):
        runs = list(product(self.seeds, ("delta", "m3"), ("authors", "closed_form")))
        results = [self.train(*run) for run in tqdm(runs, desc="runs")]
        settings = CaptionTraining()
        write_record(
            self.record,
            self.seeds,
            results,
            max_steps=self.steps,
            batch_size=settings.batch_size,
            tokens=self.tokens,
            learning_rate=settings.learning_rate,
            train_images=self.train_images,
        )

    def settings(self, seed, compressor, start, folder):
        "Settings of one run."
        return CaptionTraining(
            output_dir=Path(folder),
            seed=seed,
            compressor=compressor,
            closed_form_init=start == "closed_form",
            max_steps=self.steps,
            logging_steps=1,
            train_images=self.train_images,
            test_images=self.test_images,
            tokens=self.tokens,
            train_budgets=(),
            eval_budgets=(),
        )

    def train(self, seed, compressor, start):
        "Losses and held-out scores of one run."
        with tempfile.TemporaryDirectory() as folder:
            settings = self.settings(seed, compressor, start, folder)
            model, processor, log = train_run(settings, save_strategy="no")
            rows = held_out_images(settings, settings.scenes_folder)[TEST_SET]
            visual = encode_images(model, extract_features(model, processor, rows), self.tokens)
            scores = matched_mismatched_loss(model, processor, list(rows), visual)
            scores["forced_choice_accuracy"] = forced_choice_accuracy(model, processor, list(rows), visual)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        return dict(projector=compressor, start=start, seed=seed, losses=losses, **scores)


if __name__ == "__main__":
    tyro.cli(Benchmark)()
