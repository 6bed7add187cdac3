"""What limits a trained model: size of the objects, photographic backgrounds, the vision tower's features,
and the odd one out.

    python benchmarks/limits.py                   # the model of the package; writes runs/limits.json
    python benchmarks/limits.py --n 24 --probe-images 200 --tokens 36 --out limits.json          # a rehearsal

Scenes have one to three objects (three or four for the odd one out), in pairs that no training scene has.
`painted` and `photographs` show the same scenes on other backgrounds. The probe is a logistic regression on
the mean of the patch tokens in an object's box: it knows where the object is, and shows what the features
tell about its name.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.cbook
import numpy as np
import sklearn.datasets
import torch
import tyro
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from delta_llava.answerer import Answerer, Request
from delta_llava.evaluate import mentioned_objects
from delta_llava.gradcam import infer_grid
from delta_llava.questions import odd_name, write_questions
from delta_llava.recipe import QuestionSet, SceneSet, binomial_interval, scene_rows, score_tasks
from delta_llava.runs import load, write_record
from delta_llava.tower import features_in_memory
from delta_llava.train import fast_bfloat16

SIDES = dict(small=(1 / 8, 1 / 5), middle=(1 / 4, 1 / 3), large=(1 / 3, 2 / 5))  # of the image's side


def photographs() -> list[Image.Image]:
    "Three photographs that come with scikit-learn (CC BY 2.0) and matplotlib (public domain)."
    pixels = sklearn.datasets.load_sample_images().images
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [*map(Image.fromarray, pixels), Image.open(path).convert("RGB")]


def accuracy(hits: Sequence[bool]) -> dict:
    "A fraction with its interval."
    if not hits:
        return dict(n=0)
    low, high = binomial_interval(sum(hits), len(hits))
    return dict(n=len(hits), accuracy=sum(hits) / len(hits), low=low, high=high)


def box_features(scenes: SceneSet, size: int) -> tuple[np.ndarray, list[str]]:
    "For each object the mean of the patch tokens in its box, and its name."
    found, names = [], []
    for row, features in zip(scenes.rows, scenes.features, strict=True):
        side = infer_grid(len(features))[0]
        centers = (torch.arange(side) + 0.5) * size / side
        for o in row["objects"]:
            inside = [patches_within(centers, *o["box"][axis::2]) for axis in (0, 1)]
            cells = features.view(side, side, -1)[inside[1]][:, inside[0]]
            found.append(cells.float().mean((0, 1)).numpy())
            names.append(o["name"])
    return np.stack(found), names


def patches_within(centers: Tensor, start: float, end: float) -> Tensor:
    "Rows or columns whose centers lie in a range; the nearest one if there is none."
    inside = ((centers >= start) & (centers < end)).nonzero()[:, 0]
    return inside if len(inside) else (centers - (start + end) / 2).abs().argmin()[None]


@dataclass(kw_only=True)
class Limits:
    "Score a trained model under harder conditions, and its vision tower without it."

    pretrained: Path | None = None  # Folder of a trained model; None is the package's own
    tokens: tuple[int, ...] = (36, 4)  # Budgets
    n: int = 100  # Scenes of each condition; twice as many for the odd one out
    probe_images: int = 1500  # Training scenes of the probe
    seed: int = 6_000_000  # Of the scenes
    out: Path = Path("runs/limits.json")  # The record

    def __call__(self):
        model, processor = load(self.pretrained)
        self.image_size = processor.image_processor.size["height"]
        self.features = partial(
            features_in_memory,
            tower=model.vision_tower,
            processor=processor.image_processor,
            levels=model.config.projector_config().levels,
        )
        with TemporaryDirectory() as folder:
            sets = self.scene_sets(Path(folder))
            if model.device.type == "cpu" and fast_bfloat16():
                model.to(torch.bfloat16)
            result = dict(precision=str(model.dtype).removeprefix("torch."))
            train = sets.pop("probe")
            result["probe"] = self.probe(train, sets)
            three_or_four = sets.pop("three_or_four")
            result["odd"] = {str(t): self.odd(model, processor, three_or_four, t) for t in self.tokens}
            result["scores"] = {}
            for name, scenes in sets.items():
                questions = QuestionSet(processor, scenes, batch_size=16)
                result["scores"][name] = {str(t): score_tasks(model, questions, t) for t in self.tokens}
                print(name, *result["scores"][name].items(), sep="\n  ", flush=True)
                settings = dict(n=self.n, probe_images=self.probe_images, image_size=self.image_size)
                print(write_record(self.out, [self.seed], result, settings=settings), flush=True)

    def scene_sets(self, folder: Path) -> dict[str, SceneSet]:
        "Scenes of all conditions, and those that the probe learns from."
        write = partial(write_questions, n=self.n, seed=self.seed, n_objects=(1, 3), size=self.image_size)
        unseen = partial(write, split="heldout_scenes")
        files = dict(
            painted=unseen(folder / "painted"),
            photographs=unseen(folder / "photographs", photographs=photographs()),
            artist=write(folder / "artist", split="heldout_artist"),
            three_or_four=unseen(folder / "three_or_four", n=2 * self.n, n_objects=(3, 4)),
            probe=write(folder / "probe", n=self.probe_images),
        )
        for name, ends in SIDES.items():
            sides = tuple(round(self.image_size * end) for end in ends)
            files[name] = unseen(folder / name, sides=sides)
        rows = {name: scene_rows(file) for name, file in files.items()}
        return {name: SceneSet(r, self.features(r["image"])) for name, r in rows.items()}

    def probe(self, train: SceneSet, sets: dict[str, SceneSet]) -> dict:
        "How well a linear classifier names the objects, and finds the odd one from these names."
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
        classifier.fit(*box_features(train, self.image_size))
        scores = {}
        for name, scenes in sets.items():
            features, names = box_features(scenes, self.image_size)
            found = classifier.predict(features)
            scores[name] = dict(names=accuracy([a == b for a, b in zip(found, names, strict=True)]))
            rows = list(scenes.rows)
            numbers = [len(row["objects"]) for row in rows]
            parts = np.split(found, np.cumsum(numbers)[:-1])
            hits = []
            for row, guesses in zip(rows, parts, strict=True):
                if "odd" in row["task"].split(","):
                    true_odd = odd_name([o["name"] for o in row["objects"]])
                    hits.append(odd_name(list(guesses)) == true_odd)
            scores[name]["odd"] = accuracy(hits)
        print("probe", *scores.items(), sep="\n  ", flush=True)
        return scores

    def odd(self, model, processor, scenes: SceneSet, tokens: int) -> dict:
        "What the answers about the odd one name, where the caption names all objects and where it does not."
        requests, captions, objects = [], [], []
        for row, features in zip(scenes.rows, scenes.features, strict=True):
            tasks = row["task"].split(",")
            if "odd" not in tasks:
                continue
            turns = row["conversations"]
            for task, found in (("odd", requests), ("caption", captions)):
                question = turns[2 * tasks.index(task)]["value"].removeprefix("<image>\n")
                found.append(Request(question, vision_features=features[None].to(model.dtype)))
            objects.append([o["name"] for o in row["objects"]])
        generate = partial(Answerer(model, processor).generate, tokens=tokens, batch_size=16)
        answers = generate(requests, max_new_tokens=12)
        captions = generate(captions, max_new_tokens=40)
        kinds = {True: Counter(), False: Counter()}
        for answer, caption, names in zip(answers, captions, objects, strict=True):
            all_named = mentioned_objects(caption) == set(names)
            kinds[all_named][self.kind(mentioned_objects(answer), names)] += 1
        found = dict(all_objects_named=dict(kinds[True]), others=dict(kinds[False]))
        print("odd", tokens, found, flush=True)
        return found

    @staticmethod
    def kind(answered: set[str], names: list[str]) -> str:
        "What an answer names."
        if answered == {odd_name(names)}:
            return "the odd object"
        return "another object of the scene" if answered & set(names) else "something else"


if __name__ == "__main__":
    tyro.cli(Limits)()
