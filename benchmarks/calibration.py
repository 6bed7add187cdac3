"""Stage-1 loss with the authors' start and with the calibrated one, for the Delta projector and for a pooling MLP: paired by seed, one run.

    python benchmarks/calibration.py            # writes runs/calibration.json
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from einops import rearrange, reduce
from torch import nn
from tqdm.auto import tqdm

from delta_llava import quickstart as qs
from delta_llava.config import check_tokens
from delta_llava.evaluate import naming, right_and_shuffled, see
from delta_llava.train import write_record


class PoolingMLP(nn.Module):
    "LLaVA's two layers on the standardised levels, averaged over the window of each visual token."
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(nn.Linear(config.d_levels, config.d_llm), nn.GELU(), nn.Linear(config.d_llm, config.d_llm))
        for name in ("feature_mean", "feature_std"): self.register_buffer(name, torch.zeros(config.d_levels))

    def measure(self, levels):
        self.feature_mean, self.feature_std = levels.mean((0, 1)), levels.std((0, 1)).clamp_min(1e-6)

    def forward(self, features, *, tokens=None, text=None):
        x = (getattr(features, "levels", features) - self.feature_mean) / self.feature_std
        g = check_tokens(tokens or self.config.tokens, self.config.grid)
        return self.mlp(reduce(rearrange(x, "b (i j) c -> b i j c", i=self.config.grid), "b (i a) (j e) c -> b (i j) c", "mean", i=g, j=g))


@dataclass
class Benchmark:
    seeds: tuple[int, ...] = (0, 1, 2)  # Each is one start, one order of the pictures, one set of scenes
    steps: int = 30  # Optimizer steps of each run
    train_pictures: int = 400  # Half with one thing
    test_pictures: int = 32  # Held-out scenes with one thing
    tokens: int = 4  # Budget V
    record: Path = Path("runs/calibration.json")

    def __call__(self):
        cells = [(seed, name, start) for seed in self.seeds for name in ("delta", "mlp") for start in ("authors", "calibrated")]
        results = [self.one(*cell) for cell in tqdm(cells, desc="runs")]
        recipe = qs.Recipe()
        write_record(self.record, self.seeds, results, steps=self.steps, batch_size=recipe.batch_size, tokens=self.tokens, lr=recipe.lr, train_pictures=self.train_pictures)

    def one(self, seed, name, start):
        recipe = qs.Recipe(seed=seed, steps=self.steps, train_pictures=self.train_pictures, test_pictures=self.test_pictures, tokens=self.tokens,
                           train_budgets=(self.tokens,), test_budgets=(self.tokens,), calibrated=start == "calibrated")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as checkpoints:
            model, processor = qs.build(recipe)
            if name == "mlp": model.model.multi_modal_projector = PoolingMLP(model.model.multi_modal_projector.config)
            rows, held = qs.make_pictures(recipe, folder)
            test = held["heldout_scenes, one thing"]
            log = qs.train(recipe, model, processor, rows, qs.read_features(model, processor, rows), checkpoints, logging_steps=1, save_strategy="no")
            visual = see(model, qs.read_features(model, processor, test), self.tokens)
            scores = right_and_shuffled(model, processor, list(test), visual) | dict(naming=naming(model, processor, list(test), visual))
        return dict(projector=name, start=start, seed=seed, losses=[e["loss"] for e in log if "loss" in e], **scores)


if __name__ == "__main__": tyro.cli(Benchmark)()
