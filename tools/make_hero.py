"""Draw nbs/images/hero.png, the first image of the README, and write its record, runs/hero.json.

It shows one image (nbs/images/scene.png), a question, the answers of the model in the package at three
budgets, and the maps of one word of the answer. The image is chosen by a rule and not by the answers: it is
the first held-out scene with a question of the task.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from make_card import BACKGROUND
from PIL import Image

from delta_llava import Answerer, load
from delta_llava.gradcam import (
    AnswerCams,
    draw_box,
    most_visual_word,
    pointing_game,
    relative,
    upsample,
    visual_effects,
    word_cams,
)
from delta_llava.questions import make_questions, plan_question_scene
from delta_llava.runs import write_record
from delta_llava.scenes import Scene, draw_scene

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs" / "images"
RECORD = ROOT / "runs" / "hero.json"
BUDGETS = (144, 36, 1)
METHODS = {"gradcam": "Grad-CAM", "saliency": "saliency"}
SPLIT = "heldout_scenes"
SEED = 8_000_000  # of scenes that neither training nor its scores used
TASK = "odd"  # the question of the paper's Figure 1
INK = "#e8ecf2"
LEFT, WIDTH = 0.435, 0.17  # of the columns of maps, parts of the figure


def first_scene() -> tuple[int, Scene, str, str]:
    "Number, scene, question and true answer of the first held-out scene with a question of the task."
    number = 0
    while True:
        scene = plan_question_scene(number, SPLIT, SEED, (3, 4))
        for task, question, truth in make_questions(scene):
            if task == TASK:
                return number, scene, question, truth
        number += 1


def maps_of(model, processor, image: Image.Image, question: str, answer: str) -> tuple[str, dict]:
    "The word of an answer that the image raises most, and its maps by method and budget."
    effects = visual_effects(model, processor, image, question, answer=answer, tokens=BUDGETS[0])
    word = most_visual_word(effects)
    maps = {}
    for method in METHODS:
        options = dict(answer=answer, method=method)
        for tokens in BUDGETS:
            cams = word_cams(model, processor, image, question, [word], tokens=tokens, **options)
            maps[method, tokens] = cams
    return word, maps


def budgets_on_the_object(maps: dict, box: tuple) -> dict[str, list[int]]:
    "By method, the budgets above one token at which the map's maximum lies in the box."
    found: dict[str, list[int]] = {method: [] for method in METHODS}
    for (method, tokens), cams in maps.items():
        size = (cams.image.height, cams.image.width)
        game = pointing_game(cams.cams[:1].detach().cpu(), torch.tensor([box]).float(), size)
        if tokens > 1 and game.hit.item() == 1:
            found[method].append(tokens)
    return found


def draw_map(ax: plt.Axes, cams: AnswerCams, top: float):
    "The map of the first word over the gray image, one square for each visual token."
    image = cams.image
    extent = (0, image.width, image.height, 0)
    values = upsample(relative(cams.cams[0].detach().cpu().float()), (image.height, image.width)).numpy()
    ax.imshow(image.convert("L"), extent=extent, cmap="gray", vmin=-120, vmax=255)
    alpha = 0.9 * (values / top).clip(0, 1) ** 0.7
    return ax.imshow(values, extent=extent, alpha=alpha, vmin=0, vmax=top, cmap="plasma")


def write(fig: plt.Figure, x: float, y: float, text: str, size: int = 12, **style):
    "Centered text."
    fig.text(x, y, text, fontsize=size, ha="center", **dict(color=INK) | style)


def draw_row(fig: plt.Figure, bottom: float, label: str, maps: dict, box: tuple):
    "The maps of one method at all budgets, on one color scale."
    top = max(relative(cams.cams[0]).max().item() for cams in maps.values())
    for column, cams in enumerate(maps.values()):
        ax = fig.add_axes([LEFT + WIDTH * column, bottom, 0.162, 0.324])
        shown = draw_map(ax, cams, top)
        draw_box(ax, box)
        ax.set(xticks=[], yticks=[])
        if column == 0:
            ax.set_ylabel(label, color=INK, fontsize=11)
    bar = fig.colorbar(shown, cax=fig.add_axes([0.945, bottom, 0.01, 0.324]))
    bar.solids.set_alpha(1)
    bar.ax.tick_params(colors=INK, labelsize=9)


def draw_hero(question: str, answers: dict[int, str], word: str, maps: dict, box: tuple) -> Image.Image:
    "The whole figure, on a background of its own, which suits light and dark pages."
    fig = plt.figure(figsize=(11, 5.5), dpi=100, facecolor=BACKGROUND)
    ax = fig.add_axes([0.025, 0.08, 0.36, 0.72])
    ax.imshow(maps["gradcam", BUDGETS[0]].image)
    ax.set(xticks=[], yticks=[])
    write(fig, 0.205, 0.86, f"“{question}”", 15, color="w", weight="bold")
    for column, (tokens, answer) in enumerate(answers.items()):
        center = LEFT + WIDTH * column + 0.081
        write(fig, center, 0.93, f"{tokens} tokens" if tokens > 1 else "1 token")
        write(fig, center, 0.86, f"“{answer}”", 15, color="w", weight="bold")
    for row, (method, label) in enumerate(METHODS.items()):
        of_method = {tokens: maps[method, tokens] for tokens in BUDGETS}
        draw_row(fig, 0.476 - 0.396 * row, f"{label} of\n“{word}”", of_method, box)
    write(
        fig,
        0.66,
        0.025,
        "weight of each visual token for the word, relative to uniform; dotted: the object",
        11,
    )
    fig.canvas.draw()
    return Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")


def main(folder: Path = IMAGES, record: Path = RECORD) -> None:
    number, scene, question, truth = first_scene()
    image = draw_scene(scene)
    model, processor = load()
    answerer = Answerer(model, processor)
    answers = {t: answerer.answer(image, question, tokens=t) for t in BUDGETS}
    word, maps = maps_of(model, processor, image, question, answers[BUDGETS[0]])
    box = next(o.box for o in scene.objects if o.name.casefold() == truth.casefold())
    image.save(folder / "scene.png", optimize=True)
    draw_hero(question, answers, word, maps, box).quantize(255).save(folder / "hero.png", optimize=True)
    names = [o.name for o in scene.objects]
    result = dict(scene=number, objects=names, question=question, truth=truth, answers=answers, word=word)
    result["peak_on_object"] = budgets_on_the_object(maps, box)
    write_record(record, [SEED], result, split=SPLIT, task=TASK)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
