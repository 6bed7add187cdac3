"Planted scenes: the plan is kept to the pixel, answers are true, held-out pairs stay held out."

import hashlib
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delta_llava.conversations import load_conversations
from delta_llava.scenes import (
    SPLITS,
    TASKS,
    concept_names,
    crop_background,
    draw_scene,
    drawing_index,
    group_of,
    load_cutout,
    make_conversation,
    paint_background,
    plan_scene,
    write_scenes,
)

DRAWINGS = Path(__file__).parents[1] / "delta_llava" / "drawings"


# ---------------------------------------------------------------- drawings


def test_sheets_are_those_of_the_index_and_small():
    credits = (DRAWINGS / "ATTRIBUTION.md").read_text()
    for artist, entry in drawing_index()["artists"].items():
        sheet = (DRAWINGS / f"{artist}.webp").read_bytes()
        assert hashlib.sha256(sheet).hexdigest() == entry["sha256"]
        assert (DRAWINGS / f"LICENSE-{artist}.txt").stat().st_size > 1000
        assert entry["credit"] in credits
    assert sum(file.stat().st_size for file in DRAWINGS.iterdir()) < 2.5e6


def test_every_artist_drew_every_object_to_its_outline():
    assert len(set(concept_names())) == 64
    for artist, entry in drawing_index()["artists"].items():
        assert tuple(entry["boxes"]) == concept_names()
        for name in concept_names():
            alpha = np.asarray(load_cutout(name, artist).getchannel("A"))
            assert max(alpha.shape) >= 44 and 0.1 < (alpha > 127).mean() <= 1
            for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
                assert edge.max() >= 32, (name, artist)


# ---------------------------------------------------------------- plans and images


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size,min_side", [(168, 36), (112, 40), (336, 60)])
def test_plans_keep_their_promises(split, size, min_side):
    for index in range(60):
        scene = plan_scene(index, split, seed=3, size=size, min_side=min_side)
        assert scene == plan_scene(index, split, seed=3, size=size, min_side=min_side)
        centers = [o.box[0] + o.box[2] for o in scene.objects]
        assert centers == sorted(centers)
        for o in scene.objects:
            x0, y0, x1, y1 = o.box
            width, height = load_cutout(o.name, o.artist).size
            assert o.artist in SPLITS[split] and 0 < x0 < x1 < size and 0 < y0 < y1 < size
            assert max(x1 - x0, y1 - y0) >= min_side
            assert abs((x1 - x0) * height - (y1 - y0) * width) <= max(width, height)  # the shape is kept
        for a, b in combinations(scene.objects, 2):
            horizontally = a.box[2] < b.box[0] or b.box[2] < a.box[0]
            assert horizontally or a.box[3] < b.box[1] or b.box[3] < a.box[1]
            assert (group_of(a.name) == group_of(b.name)) == (split == "heldout_scenes")


def test_every_object_is_planted_and_every_count_occurs():
    for split in SPLITS:
        scenes = [plan_scene(i, split) for i in range(600)]
        assert {o.name for scene in scenes for o in scene.objects} == set(concept_names())
        assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}


def test_held_out_artist_is_never_in_another_split():
    assert "twemoji" not in SPLITS["train"] + SPLITS["heldout_scenes"]
    assert SPLITS["heldout_artist"] == ("twemoji",)


def test_outside_its_boxes_an_image_is_background():
    for index in range(20):
        scene = plan_scene(index)
        background = np.asarray(paint_background(scene.rng(1), scene.size))
        changed = (np.asarray(draw_scene(scene)) != background).any(-1)
        for x0, y0, x1, y1 in (o.box for o in scene.objects):
            assert changed[y0:y1, x0:x1].mean() > 0.1
            changed[y0:y1, x0:x1] = False
        assert not changed.any()


@pytest.mark.parametrize("n_objects", [(1, 1), (2, 4)])
def test_longest_side_of_objects(n_objects):
    for index in range(30):
        scene = plan_scene(index, n_objects=n_objects, min_side=36, max_side=42)
        assert all(36 <= max(x1 - x0, y1 - y0) <= 42 for x0, y0, x1, y1 in (o.box for o in scene.objects))
    assert plan_scene(3, max_side=168) == plan_scene(3)


def test_scenes_on_photographs():
    "The same plan, and outside the boxes nothing but a part of one of the photographs."
    shades = np.arange(200, dtype=np.uint8)
    photographs = [Image.fromarray(np.stack([np.tile(shades, (120, 1))] * 3, -1)) for _ in range(2)]
    for index in range(8):
        scene = plan_scene(index)
        image = np.asarray(draw_scene(scene, photographs)).astype(int)
        background = np.asarray(crop_background(photographs, scene.rng(1), 168)).astype(int)
        changed = (image != background).any(-1)
        for x0, y0, x1, y1 in (o.box for o in scene.objects):
            assert changed[y0:y1, x0:x1].mean() > 0.1
            changed[y0:y1, x0:x1] = False
        assert not changed.any()
        assert (background[0] == background[-1]).all() and (np.diff(background[0, :, 0]) >= 0).all()
        width = background[0, -1, 0] - background[0, 0, 0]  # as many shades as the part has columns
        assert 55 <= width <= 120


def test_images_are_the_same_everywhere():
    "Whole-number painting: another result means that stored experiments cannot be repeated with this Pillow."
    backgrounds = [paint_background(plan_scene(i).rng(1), 168).tobytes() for i in range(12)]
    digest = hashlib.sha256(b"".join(backgrounds)).hexdigest()
    assert digest == "954f4df9abb9ba939fe73d00f71709ab5e52f9fbceb4d8c08e2d8b5b8d3114b8"


def test_plans_and_questions_are_the_same_everywhere():
    "Stored experiments are repeated with these sets."
    content = []
    for split in SPLITS:
        for index in range(40):
            scene = plan_scene(index, split, seed=5)
            content.append([[o.name, o.artist, o.mirrored, list(o.box)] for o in scene.objects])
            content.append([make_conversation(scene, task) for task in TASKS])
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digest == "4e4b124b84e418db67b14075bd2861727e78394efc6ad3f073b3c258a7b967f4"


# ---------------------------------------------------------------- questions


def mentioned_objects(*texts):
    return {word for text in texts for word in re.findall(r"\w+", text.lower())} & set(concept_names())


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split):
    for index in range(150):
        scene = plan_scene(index, split)
        present = {o.name for o in scene.objects}
        [(_, caption)] = make_conversation(scene, "caption")
        words = [word for word in re.findall(r"\w+", caption.lower()) if word in concept_names()]
        assert words == [o.name for o in scene.objects]
        yes, no = make_conversation(scene, "existence")
        assert yes[1] == "Yes" and mentioned_objects(yes[0]) <= present
        assert no[1] == "No" and not mentioned_objects(no[0]) & present
        assert make_conversation(scene, "count")[0][1] == str(len(scene.objects))
        [(question, letter)] = make_conversation(scene, "choice")
        options = dict(re.findall(r"^([A-D])\. (\w+)$", question, re.M))
        assert len(set(options.values())) == 4
        assert [k for k, name in options.items() if name in present] == [letter]


@pytest.mark.parametrize("split", SPLITS)
def test_relations_are_true(split):
    for index in range(150):
        scene = plan_scene(index, split)
        boxes = {o.name: o.box for o in scene.objects}
        for question, answer in make_conversation(scene, "relation"):
            pattern = r"Is the (\w+) (left or right of|above or below) the (\w+)\?"
            a, relation, b = re.fullmatch(pattern, question).groups()
            ax0, ay0, ax1, ay1 = boxes[a]
            bx0, by0, bx1, by1 = boxes[b]
            truth = {"Left": ax1 < bx0, "Right": bx1 < ax0, "Above": ay1 < by0, "Below": by1 < ay0}
            assert truth[answer] and answer.lower() in relation


def test_training_rows_never_join_a_held_out_pair():
    for index in range(300):
        scene = plan_scene(index)
        present = {o.name for o in scene.objects}
        pairs = [pair for task in TASKS for pair in make_conversation(scene, task)]
        mentioned = mentioned_objects(*(text for pair in pairs for text in pair))
        assert len(mentioned - present) >= 3  # absent objects are mentioned
        for name in present:
            others = (present | mentioned) - {name}
            assert group_of(name) not in {group_of(other) for other in others}


def test_without_paraphrase_there_is_one_question():
    scenes = [plan_scene(i) for i in range(30)]
    always = {question for s in scenes for question, _ in make_conversation(s, "caption", paraphrase=False)}
    varied = {question for s in scenes for question, _ in make_conversation(s, "caption")}
    assert always == {"What is in the picture?"} and len(varied) == 3


# ---------------------------------------------------------------- files


def test_written_scenes_are_the_same_bytes_and_come_back(tmp_path):
    first = write_scenes(tmp_path / "a", 12, "heldout_scenes", seed=5)
    second = write_scenes(tmp_path / "b", 12, "heldout_scenes", seed=5)
    fewer = write_scenes(tmp_path / "c", 4, "heldout_scenes", seed=5)
    assert first.read_bytes() == second.read_bytes()
    written = json.loads(first.read_text())
    beginning = json.loads(fewer.read_text())
    assert written[: len(beginning)] == beginning
    for image in (tmp_path / "a" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes()
    for row, kept in zip(written, load_conversations(first, open_images=True), strict=True):
        assert {**kept, "image": None} == {**row, "image": None}
        assert Path(kept["image"]) == (tmp_path / "a" / row["image"]).resolve()
        assert Image.open(kept["image"]).size == (168, 168)
    assert {row["task"] for row in written} == set(TASKS)
    answers = [row["conversations"][1]["value"] for row in written if row["task"] == "existence"]
    assert answers.count("Yes") == answers.count("No") == 12


def test_splits_share_a_folder(tmp_path):
    for split in SPLITS:
        file = write_scenes(tmp_path, 2, split, tasks=["caption"])
        assert len(load_conversations(file)) == 2
    assert len(list((tmp_path / "images").iterdir())) == 6


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(split="val"), "use one of"),
        (dict(n=0), "at least one"),
        (dict(tasks=[]), "at least one"),
        (dict(tasks=["poem"]), "use some of"),
        (dict(n_objects=(0, 3)), "within 1..4"),
        (dict(n_objects=(1, 5)), "within 1..4"),
        (dict(size=80), "use a larger size"),
        (dict(min_side=0), "use a larger size"),
        (dict(n_objects=(1, 1), tasks=["relation"]), "needs two objects"),
    ],
)
def test_scene_arguments_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_scenes(tmp_path / "s", **{"n": 2, **options})
    assert not (tmp_path / "s").exists()
