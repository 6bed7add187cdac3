"""Maps of words on planted scenes, by Grad-CAM, by two other maps of the same gradient, by attention, with
shuffled weights, and by chance.

    python benchmarks/gradcam.py                            # the model in the package
    python benchmarks/gradcam.py --runs runs/seeds/delta-*  # trainings of benchmarks/recipe.py
    python benchmarks/gradcam.py --images 4 --budgets 16    # a first look

The word is the name of one object in the true answer (in captions the first object in the first image, the
second in the second, and so on), given the true words before it. Every method makes one map for it:

- `gradcam`, `hirescam`, `saliency`: the methods of `answer_cam`;
- `attention` of the LLM;
- `gradcam, shuffled projector`, `saliency, shuffled LLM`, …: the same with the weights of that part in random
  order (sanity check);
- `gradcam, other image`, `saliency, other image`: the map of the word of another image, which shows where
  objects are usually placed;
- `center`: one map for all images, highest in the middle, where a large object nearly always is;
- `box`: the true box, an upper bound: it shows how far deletion and insertion can come;
- `chance`: a uniform map.

Scores: the pointing game's hit and the energy in the box; with several objects also the energy in the box of
another one (`other`, beside `other_area`, the energy of a uniform map there); deletion and insertion by
`deletion_insertion`, at the main budget of the training, in nats above the same curve for a random order of
the same cells; the rank correlation with `gradcam`; `empty`, the share of maps that are zero everywhere.
Intervals are 95 % bootstrap intervals over the images. An image's values are averaged over seeds first,
because all models are evaluated on the same images. `gradcam minus` and `saliency minus` are the score of
Grad-CAM and of saliency minus that of the method, on the same images, with their own intervals.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.stats import bootstrap, spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from delta_llava.collator import Collator
from delta_llava.conversations import load_conversations
from delta_llava.evaluate import derangement
from delta_llava.files import shipped_folder
from delta_llava.gradcam import (
    CAM_METHODS,
    PointingGame,
    attention_map,
    deletion_insertion,
    infer_grid,
    mark_phrases,
    pointing_game,
    shuffled_weights,
    token_map,
    word_gradients,
)
from delta_llava.questions import write_questions
from delta_llava.runs import commit, load, read_run, write_record
from delta_llava.tower import vision_features

CHECKED = (
    "gradcam",
    "saliency",
)  # methods that are compared with all others, and repeated on shuffled weights
METHODS = (
    *CAM_METHODS,
    "attention",
    *(f"{method}, {check}" for method in CHECKED for check in ("shuffled projector", "shuffled LLM")),
    *(f"{method}, other image" for method in CHECKED),
    "center",
    "box",
    "chance",
)
CURVE_METHODS = (*CHECKED, "attention", "box", "chance")  # curves are slow
COMPARED_SCORES = ("hit", "energy", "deletion", "insertion")  # in `gradcam minus`
SETS = dict(  # fewest and most objects in a scene, and the kind of question whose answer names the object
    one=(1, 1, "caption"), several=(2, 4, "caption"), odd=(3, 4, "odd")
)
SCENES_SEED = 9_000_000  # of scenes that neither training nor its scores used


# --- maps -----------------------------------------------------------------------------------------


def center_map(v):
    "A map of `v` cells that is highest in the middle."
    h, w = infer_grid(v)
    y = torch.linspace(-1, 1, 2 * h + 1)[1::2]
    x = torch.linspace(-1, 1, 2 * w + 1)[1::2]
    square_distance = y[:, None] ** 2 + x**2
    return torch.exp(-2 * square_distance).flatten().round(decimals=5)  # rounded: equal cells stay equal


def box_map(boxes, v, size):
    "The share of each cell that the box covers."
    cells = torch.eye(v)
    energy = torch.stack([pointing_game(cells, box.expand(v, 4), size).energy for box in boxes])
    return energy / energy.amax(-1, keepdim=True)


def method_maps(model, batch, marks, boxes, size, seed):
    "A map of each method for each row."

    def cams():
        (tokens, grads), *_ = word_gradients(model, batch, marks[None])
        return {method: token_map(tokens, grads, method).cpu() for method in CAM_METHODS}

    maps = cams() | dict(attention=attention_map(model, batch, marks[None])[0].cpu())
    b, v = maps["gradcam"].shape
    parts = {"projector": model.multi_modal_projector, "LLM": model.get_decoder().layers}
    for part, module in parts.items():
        with shuffled_weights(module, seed):
            shuffled_maps = cams()
        maps |= {f"{method}, shuffled {part}": shuffled_maps[method] for method in CHECKED}
    for method in CHECKED:
        maps[f"{method}, other image"] = maps[method][derangement(b, seed)]
    maps["center"] = center_map(v).expand(b, v)
    maps["box"] = box_map(boxes, v, size)
    maps["chance"] = torch.ones(b, v)
    return maps


# --- scores of one batch --------------------------------------------------------------------------


@dataclass
class Targets:
    "What is scored in each row of a batch: the word, its object's box, and the box of another object."

    names: list[str]
    boxes: Tensor  # px of the image as the vision tower receives it
    other_boxes: Tensor  # the same as `boxes` where the image has one object
    has_other: list[bool]


def choose_targets(rows, first, scale):
    "The object whose name is mapped: the only one that the answer names, or another one for each new image."
    chosen, others = [], []
    for i, row in enumerate(rows, start=first):
        objects, answer = row["objects"], row["conversations"][1]["value"].casefold()
        named = [k for k, o in enumerate(objects) if o["name"].casefold() in answer]
        k = named[0] if len(named) == 1 else i % len(objects)
        chosen.append(objects[k])
        others.append(objects[(k + 1) % len(objects)])

    def boxes(objects):
        return torch.tensor([o["box"] for o in objects]).float() * scale

    has_other = [a != b for a, b in zip(chosen, others, strict=True)]
    return Targets([o["name"] for o in chosen], boxes(chosen), boxes(others), has_other)


def with_features(model, batch):
    "The batch with patch tokens instead of pixels, so that the vision tower runs once for all methods."
    projector = model.multi_modal_projector
    with torch.no_grad():
        features = vision_features(
            model.vision_tower,
            batch["pixel_values"],
            model.config.vision_feature_layer,
            attention="attention" in projector.requires,
        )
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    return rest | dict(vision_features=features)


def curve_areas(model, batch, marks, maps, n, steps):
    "Areas under the curves of the first `n` rows, for each method that has curves."
    if not n:
        return {}
    part = {name: value if isinstance(value, int) else value[:n] for name, value in batch.items()}
    areas = {}
    for method in CURVE_METHODS:
        areas[method] = deletion_insertion(model, part, marks[:n], maps[method][:n], steps=steps).areas()
    return areas


def rank_correlation(a, b):
    "Spearman's correlation of two maps; 0 if one of them is constant."
    if min(np.ptp(a.numpy()), np.ptp(b.numpy())) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def row_scores(cam, gradcam, i, game: PointingGame, other: PointingGame, has_other):
    "The scores of one map, without its curves."
    scores = dict(hit=game.hit[i].item(), energy=game.energy[i].item(), empty=float(not cam.any()))
    if has_other:
        scores |= dict(other=other.energy[i].item(), other_area=other.box_area[i].item())
    return scores | dict(correlation=rank_correlation(cam, gradcam))


def score_batch(model, processor, rows, tokens, settings, *, first=0, curve_images=0, steps=4):
    "Scores of some images, by method; the first `curve_images` of all have curves at the main budget."
    batch = {}
    for name, value in Collator(processor=processor, tokens=tokens)(rows).items():
        batch[name] = value if isinstance(value, int) else value.to(model.device)
    height, width = batch["pixel_values"].shape[-2:]
    size = (height, width)
    targets = choose_targets(rows, first, height / settings["image_size"])
    marks = mark_phrases(batch["input_ids"], targets.names, processor.tokenizer)
    maps = method_maps(model, with_features(model, batch), marks, targets.boxes, size, settings["seed"])
    n_curves = max(0, min(curve_images - first, len(rows))) if tokens == settings["tokens"] else 0
    areas = curve_areas(model, batch, marks, maps, n_curves, steps)
    scores = [dict() for _ in rows]
    for method in METHODS:
        game = pointing_game(maps[method], targets.boxes, size)
        other = pointing_game(maps[method], targets.other_boxes, size)
        for i, row in enumerate(scores):
            cam = maps[method][i]
            row[method] = row_scores(cam, maps["gradcam"][i], i, game, other, targets.has_other[i])
            if i < n_curves and method in areas:
                for name, area in areas[method].items():
                    row[method][name] = (area[i] - areas["chance"][name][i]).item()
    return [dict(image=first + i, scores=row) for i, row in enumerate(scores)]


# --- means and intervals --------------------------------------------------------------------------


def interval(values, seed=0):
    "Mean and its 95 % bootstrap interval."
    values = np.asarray(values, float)
    if np.ptp(values) < 1e-9:
        return [round(float(values.mean()), 4)] * 3
    options = dict(n_resamples=2000, method="percentile", rng=np.random.default_rng(seed))
    ends = bootstrap((values,), np.mean, **options).confidence_interval
    return [round(float(x), 4) for x in (values.mean(), *ends)]


def values_by_image(rows, method):
    "Each score of a method for each image that has it, averaged over seeds."
    images = {}
    for row in rows:
        images.setdefault(row["image"], []).append(row["scores"][method])
    numbers = sorted(images)
    values = {}
    for score in images[numbers[0]][0]:
        with_score = [images[i] for i in numbers if score in images[i][0]]
        values[score] = np.array([np.mean([s[score] for s in seeds]) for seeds in with_score])
    return values


def hit_by_seed(rows, method, seeds):
    "The mean hit of each seed."
    means = []
    for seed in seeds:
        hits = [row["scores"][method]["hit"] for row in rows if row["seed"] == seed]
        means.append(round(float(np.mean(hits)), 3))
    return means


def summarize(rows):
    "All methods of one compressor at one budget on one set, from the rows of all seeds."
    seeds = sorted({row["seed"] for row in rows})
    values = {method: values_by_image(rows, method) for method in METHODS}
    methods = {}
    for method, scores in values.items():
        methods[method] = {score: interval(x) for score, x in scores.items()}
        for checked in CHECKED:
            minus = {}
            for score in COMPARED_SCORES:
                if score in scores:
                    minus[score] = interval(values[checked][score] - scores[score])
            methods[method][f"{checked} minus"] = minus
        methods[method]["hit by seed"] = hit_by_seed(rows, method, seeds)
    return dict(
        compressor=rows[0]["compressor"],
        tokens=rows[0]["tokens"],
        set=rows[0]["set"],
        images=len({row["image"] for row in rows}),
        seeds=seeds,
        methods=methods,
    )


def summarize_all(rows):
    "One summary for each compressor, budget and set, in the order of the rows."
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["compressor"], row["tokens"], row["set"]), []).append(row)
    return [summarize(group) for group in groups.values()]


def print_summary(summary):
    "The main scores of each method."
    print(f"\n{summary['compressor']}, {summary['tokens']} tokens, {summary['set']}")
    for method, scores in summary["methods"].items():
        texts = []
        for score in (*COMPARED_SCORES, "correlation"):
            if score in scores:
                mean, low, high = scores[score]
                texts.append(f"{score} {mean:.2f} [{low:.2f}, {high:.2f}]")
        print(f"  {method:28}" + "  ".join(texts))


# --- the benchmark --------------------------------------------------------------------------------


def write_set(folder: Path, name: str, images: int, size: int):
    "Rows of one set: a question, its answer, and the objects with their boxes."
    fewest, most, task = SETS[name]
    scenes = 8 * images if task == "odd" else images  # not every scene has an odd object
    file = folder / name / "heldout_scenes.json"
    if not file.exists():
        write_questions(file.parent, scenes, "heldout_scenes", SCENES_SEED, (fewest, most), size)
    rows = []
    for row in load_conversations(file):
        tasks = row["task"].split(",")
        if task in tasks:
            at = 2 * tasks.index(task)
            question, answer = (dict(turn) for turn in row["conversations"][at : at + 2])
            question["value"] = "<image>\n" + question["value"].removeprefix("<image>\n")
            rows.append(row | dict(conversations=[question, answer]))
    if len(rows) < images:
        raise ValueError(
            f"images={images}: only {len(rows)} of {scenes} scenes have a question of kind {task}."
        )
    return rows[:images]


@dataclass
class GradcamBenchmark:
    runs: tuple[Path, ...] = ()  # Folders of trainings; without them the model in the package
    budgets: tuple[int, ...] = (144, 36, 16)  # V
    sets: tuple[str, ...] = tuple(SETS)  # Names in SETS
    images: int = 48  # Of each set
    curve_images: int = 12  # Of these, how many have deletion and insertion curves; 0 leaves them out
    steps: int = 4  # Points of a curve
    batch_size: int = 12  # Images in one pass
    output_dir: Path = Path("runs/gradcam")  # Gets the scenes, and the scores of each run
    record: Path = Path("runs/gradcam.json")

    def __post_init__(self):
        if self.curve_images > self.images:
            raise ValueError(f"curve_images={self.curve_images} must be at most images={self.images}.")
        if unknown := [name for name in self.sets if name not in SETS]:
            raise ValueError(f"sets={unknown} must be among {list(SETS)}.")

    def __call__(self):
        rows: list[dict] = []
        parts: list[dict] = []
        for folder in self.runs or (shipped_folder(),):
            self.score_run(folder, rows, parts)
        result = summarize_all(rows)
        for summary in result:
            print_summary(summary)
        settings = {k: v for k, v in asdict(self).items() if k not in ("output_dir", "record", "runs")}
        commits = sorted({part["commit"] for part in parts})
        settings |= dict(scored_by=commits, seconds=sum(part["seconds"] for part in parts))
        seeds = sorted({row["seed"] for row in rows})
        print(f"wrote {write_record(self.record, seeds, result, **settings)}")

    def score_run(self, folder, rows, parts):
        "Append the scores of one trained model: a row for each image, budget and set."
        model, processor = load(folder)
        run = read_run(folder)
        settings = run["settings"]
        about = dict(compressor=settings["compressor"], seed=run["seeds"][0])
        for name in self.sets:
            held_out = write_set(self.output_dir / "scenes", name, self.images, settings["image_size"])
            for tokens in self.budgets:
                part = self.score_set(model, processor, held_out, name, tokens, settings | about)
                parts.append(part)
                rows += [about | dict(set=name, tokens=tokens) | row for row in part["rows"]]

    def score_set(self, model, processor, rows: Sequence[dict], name, tokens, settings):
        "Scores of one set at one budget; kept in `output_dir`, so that a stopped run can continue."
        label = f"{settings['compressor']}-{settings['seed']}-{name}-{tokens}"
        path = self.output_dir / f"{label}-{self.images}-{self.curve_images}-{self.steps}.json"
        if path.exists():
            return json.loads(path.read_text())
        start = time.perf_counter()
        found = []
        for first in tqdm(range(0, len(rows), self.batch_size), desc=label):
            part = rows[first : first + self.batch_size]
            counts = dict(first=first, curve_images=self.curve_images, steps=self.steps)
            found += score_batch(model, processor, part, tokens, settings, **counts)
        content = dict(rows=found, commit=commit(), seconds=round(time.perf_counter() - start))
        path.write_text(json.dumps(content))
        return content


if __name__ == "__main__":
    tyro.cli(GradcamBenchmark)()
