"""Does Grad-CAM tell the truth? Maps of trained projectors on planted scenes, against attention, destroyed
models, the centre of the picture, and chance.

    python benchmarks/gradcam.py                                             # trains what is not
           there; writes runs/gradcam.json
    python benchmarks/gradcam.py --compressors delta --seeds 0 --pictures 16  # a look

The word is the name of one thing in the true caption (the first thing in the first picture, the second
in the second, and so on), given the true words before it. Every method makes one map for it:

- `gradcam`, and `attention` of the LLM;
- `shuffled projector`, `shuffled LLM`: Grad-CAM of the same model after the weights of that part were
  put in random order (sanity check);
- `other image`: the Grad-CAM that the same model made for the word of another picture, which knows where
  things mostly stand;
- `centre`: the same for all, highest in the middle of the picture, where a large thing nearly always is;
- `box`: the true box. No method can know it; it shows what the erasing curves can give at all;
- `chance`: an even map.

Scores: the pointing game's hit and the energy in the box, and, if there are several things, the energy
in the box of *another* one (`other`; its even share is `other_area`); deletion and insertion by
`deletion_insertion`, at the recipe's main budget, in nats above the same curve in a random order of the
same cells; and the rank correlation with `gradcam`. `empty` counts the maps that are zero everywhere.
The interval is the 95 % bootstrap over the pictures; a picture's values are averaged over seeds first,
since all models see the same pictures. `gradcam minus` is the difference to Grad-CAM on the same
pictures, with its own interval.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.stats import bootstrap, spearmanr
from tqdm.auto import tqdm

from delta_llava.compare import possible
from delta_llava.config import dinov2_s14
from delta_llava.collator import Collator
from delta_llava.evaluate import derangement
from delta_llava.gradcam import (
    answer_cam,
    attention_map,
    deletion_insertion,
    infer_grid,
    mark_phrases,
    pointing_game,
    shuffled_weights,
)
from delta_llava.quickstart import Quickstart, fit, held_out_images
from delta_llava.runs import load
from delta_llava.tower import vision_features
from delta_llava.runs import commit, write_record

METHODS = (
    "gradcam",
    "attention",
    "shuffled projector",
    "shuffled LLM",
    "other picture",
    "centre",
    "box",
    "chance",
)
ERASED = (
    "gradcam",
    "attention",
    "shuffled projector",
    "box",
    "chance",
)  # The methods with curves: those are slow


def centre(v):
    "A map of `v` cells that is highest in the middle."
    h, w = infer_grid(v)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, 2 * h + 1)[1::2], torch.linspace(-1, 1, 2 * w + 1)[1::2], indexing="ij"
    )
    return torch.exp(-2 * (x**2 + y**2)).flatten().round(decimals=5)  # equal cells stay equal


def covered(boxes, v, size):
    "The share of each cell that the box covers."
    cells = torch.eye(v)
    energy = torch.stack([pointing_game(cells, box.expand(v, 4), size).energy for box in boxes])
    return energy / energy.amax(-1, keepdim=True)


def maps(model, batch, marks, things, size, seed):
    "A map of each method for each row."
    cam = lambda: answer_cam(model, batch, marks[None])[0].cpu()
    found = {"gradcam": cam(), "attention": attention_map(model, batch, marks[None])[0].cpu()}
    for name, part in (("projector", model.multi_modal_projector), ("LLM", model.get_decoder().layers)):
        with shuffled_weights(part, seed):
            found[f"shuffled {name}"] = cam()
    b, v = found["gradcam"].shape
    return found | {
        "other picture": found["gradcam"][derangement(b, seed)],
        "centre": centre(v).expand(b, v),
        "box": covered(things, v, size),
        "chance": torch.ones(b, v),
    }


def interval(values, seed=0):
    "Mean and its 95 % interval by the bootstrap."
    values = np.asarray(values, float)
    if np.ptp(values) < 1e-9:
        return [round(float(values.mean()), 4)] * 3
    ends = bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return [round(float(x), 4) for x in (values.mean(), *ends)]


@dataclass
class Truth:
    compressors: tuple[str, ...] = (
        "delta",
        "m3",
        "tokenpacker",
    )  # Those whose tokens have a place in the picture
    seeds: tuple[int, ...] = (0, 1)  # Of scenes, start and order
    one_seed: tuple[str, ...] = ()  # Compressors that have the first seed alone
    budgets: tuple[int, ...] = (9, 16, 36)  # V; a compressor that cannot have one is left out there
    sets: tuple[str, ...] = (
        "heldout_scenes, one thing",
        "heldout_scenes, several things",
    )  # Held-out sets, of `quickstart.SETS`
    images: int = 24  # Of each set
    erased: int = 12  # Of these, as many have deletion and insertion curves; 0 leaves them out
    steps: int = 4  # Points of a curve
    batch_size: int = 12  # Pictures in one pass
    train_steps: int = 300  # Of the quickstart's recipe, for those that have to be trained
    llm_dtype: str = "bfloat16"  # Of the frozen LLM
    folder: Path = Path(
        "runs/gradcam"
    )  # Holds `COMPRESSOR-SEED/`, each with a trained projector; those that lack are trained
    record: Path = Path("runs/gradcam.json")

    def __call__(self):
        if self.erased > self.images:
            raise ValueError(f"erased={self.erased} must be at most pictures={self.images}.")
        rows, self.parts = [], []
        for name in self.compressors:
            for seed in self.seeds if name not in self.one_seed else self.seeds[:1]:
                recipe = Quickstart(seed=seed, steps=self.train_steps, compressor=name, llm_dtype=self.llm_dtype)
                if not (self.folder / f"{name}-{seed}" / "projector.safetensors").exists():
                    fit(recipe, self.folder / f"{name}-{seed}")
                rows += self.score(name, seed)
        result = [
            self.cell(name, v, kind, rows)
            for name in self.compressors
            for v in self.budgets
            for kind in self.sets
            if any(self.of(r, name, v, kind) for r in rows)
        ]
        for cell in result:
            self.say(cell)
        settings = {k: v for k, v in asdict(self).items() if k not in ("folder", "record", "seeds")}
        scored = dict(
            scored_by=sorted({p["commit"] for p in self.parts}), seconds=sum(p["seconds"] for p in self.parts)
        )
        print(f"wrote {write_record(self.record, self.seeds, result, **scored, **settings)}")

    def score(self, name, seed):
        "One row of scores for each picture, budget and method of one trained model; kept in the folder, so that a broken run goes on."
        folder, found = self.folder / f"{name}-{seed}", []
        model, processor, recipe = load(folder)
        held = held_out_images(
            replace(recipe, test_images=self.images), self.folder / f"held-out-{self.images}"
        )
        for kind in self.sets:
            listed = list(held[kind])
            for v in (v for v in self.budgets if possible(name, dinov2_s14(recipe.image_size), v)):
                kept = (
                    folder
                    / f"scores-{kind.replace(', ', '-').replace(' ', '_')}-{v}-{self.images}-{self.erased}-{self.steps}.json"
                )
                if not kept.exists():
                    began = time.perf_counter()
                    batches = [
                        listed[i : i + self.batch_size] for i in range(0, len(listed), self.batch_size)
                    ]
                    part = [
                        self.batch(model, processor, some, v, n * self.batch_size, recipe)
                        for n, some in enumerate(tqdm(batches, desc=f"{name}-{seed}, {kind}, {v} tokens"))
                    ]
                    kept.write_text(
                        json.dumps(
                            dict(
                                rows=sum(part, []),
                                commit=commit(),
                                seconds=round(time.perf_counter() - began),
                            )
                        )
                    )
                one = json.loads(kept.read_text())
                self.parts.append({k: one[k] for k in ("commit", "seconds")})
                found += [
                    dict(compressor=name, seed=seed, steps=recipe.steps, set=kind, tokens=v, **r)
                    for r in one["rows"]
                ]
        return found

    def batch(self, model, processor, rows, v, first, recipe):
        "The scores of some pictures."
        chosen = [row["objects"][(first + i) % len(row["objects"])] for i, row in enumerate(rows)]
        others = [row["objects"][(first + i + 1) % len(row["objects"])] for i, row in enumerate(rows)]
        batch = {
            k: x if isinstance(x, int) else x.to(model.device)
            for k, x in Collator(processor=processor, tokens=v)(rows).items()
        }
        marks = mark_phrases(batch["input_ids"], [t["name"] for t in chosen], processor.tokenizer)
        size = tuple(batch["pixel_values"].shape[-2:])
        with torch.no_grad():
            features = vision_features(
                model.vision_tower,
                batch["pixel_values"],
                model.config.vision_feature_layer,
                attention="attention" in model.multi_modal_projector.requires,
            )
        seen = {k: x for k, x in batch.items() if k != "pixel_values"} | dict(
            vision_features=features
        )  # the tower sees each picture once
        things, strangers = (
            torch.tensor([t["box"] for t in o]).float() * size[0] / recipe.image_size
            for o in (chosen, others)
        )
        erased, scores = (
            max(0, min(self.erased - first, len(rows))) * (v == recipe.tokens),
            [dict() for _ in rows],
        )
        found = maps(model, seen, marks, things, size, recipe.seed)
        curves = {m: self.curves(model, batch, marks, found[m], erased) for m in ERASED} if erased else {}
        for method in METHODS:
            game, other = (
                pointing_game(found[method], things, size),
                pointing_game(found[method], strangers, size),
            )
            for i, row in enumerate(scores):
                row[method] = dict(
                    hit=game.hit[i].item(),
                    energy=game.energy[i].item(),
                    empty=float(not found[method][i].any()),
                )
                if chosen[i] != others[i]:
                    row[method] |= dict(other=other.energy[i].item(), other_area=other.area[i].item())
                like = (
                    spearmanr(found[method][i], found["gradcam"][i]).statistic
                    if all(np.ptp(found[m][i].numpy()) > 0 for m in (method, "gradcam"))
                    else 0.0
                )
                row[method]["correlation"] = float(like)
                if i < erased and method in curves:
                    row[method] |= {
                        k: (c[i] - curves["chance"][k][i]).item() for k, c in curves[method].items()
                    }
        return [dict(image=first + i, scores=s) for i, s in enumerate(scores)]

    def curves(self, model, batch, marks, found, n):
        "Areas under the curves of the first rows."
        some = {k: x if isinstance(x, int) else x[:n] for k, x in batch.items()}
        return deletion_insertion(model, some, marks[:n], found[:n], steps=self.steps).areas()

    @staticmethod
    def of(row, name, v, kind):
        return (row["compressor"], row["tokens"], row["set"]) == (name, v, kind)

    def cell(self, name, v, kind, rows):
        "Every method at one budget, on one set."
        mine = [r for r in rows if self.of(r, name, v, kind)]
        images, seeds = sorted({r["picture"] for r in mine}), sorted({r["seed"] for r in mine})
        values = {
            m: self.by_picture([dict(image=r["picture"], **r["scores"][m]) for r in mine]) for m in METHODS
        }
        methods = {m: {k: interval(x) for k, x in scores.items()} for m, scores in values.items()}
        for method, scores in values.items():
            methods[method]["gradcam minus"] = {
                k: interval(values["gradcam"][k] - x)
                for k, x in scores.items()
                if k in ("hit", "energy", "deletion", "insertion")
            }
            methods[method]["hit by seed"] = [
                round(float(np.mean([r["scores"][method]["hit"] for r in mine if r["seed"] == s])), 3)
                for s in seeds
            ]
        return dict(
            compressor=name,
            trained_steps=sorted({r["steps"] for r in mine}),
            tokens=v,
            set=kind,
            images=len(images),
            seeds=seeds,
            methods=methods,
        )

    @staticmethod
    def by_picture(rows):
        "Each score, averaged over seeds, of each picture that has it."
        images = {p: [r for r in rows if r["picture"] == p] for p in sorted({r["picture"] for r in rows})}
        return {
            k: np.array([np.mean([r[k] for r in some]) for some in images.values() if k in some[0]])
            for k in images[min(images)][0]
            if k != "picture"
        }

    def say(self, cell):
        tqdm.write(f"\n{cell['compressor']}, {cell['tokens']} tokens, {cell['set']}")
        for method, s in cell["methods"].items():
            shown = {k: s[k] for k in ("hit", "energy", "deletion", "insertion", "correlation") if k in s}
            tqdm.write(
                f"  {method:20}"
                + "  ".join(f"{k} {m:.2f} [{low:.2f}, {high:.2f}]" for k, (m, low, high) in shown.items())
            )


if __name__ == "__main__":
    tyro.cli(Truth)()
