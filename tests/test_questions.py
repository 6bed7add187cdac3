"Questions about planted scenes: true, balanced, and fair to the held-out sets; batches that share an image."

import hashlib
import json
import re
from collections import Counter

import pytest

from delta_llava.questions import (
    CATEGORIES,
    LETTER_ANSWER,
    QUESTION_TASKS,
    SHORT_ANSWER,
    category_of,
    make_questions,
    odd_name,
    plan_question_scene,
    question_row,
    write_questions,
)
from delta_llava.scenes import SPLITS, concept_names, group_of
from delta_llava.settings import QUICKSTART_OBJECTS, Quickstart


def mentioned(text):
    return set(re.findall(r"\w+", text.lower())) & set(concept_names())


def test_questions_are_the_same_everywhere():
    "The shipped model is trained and scored on these."
    content = []
    for split in SPLITS:
        for index in range(40):
            content.append(question_row(plan_question_scene(index, split, seed=5)))
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digest == "4e1caaa9eb6875b37f3fd5380ae723cbec3a5419bcd0905a72c4558f97267377"


@pytest.mark.parametrize("split", SPLITS)
def test_questions_of_a_few_objects_name_no_others(split):
    "Neither shown, nor asked for, nor an option: a name that is never shown would give the answer away."
    most = Quickstart().most_objects
    found, tasks = Counter(), set()
    for index in range(120):
        scene = plan_question_scene(index, split, seed=6, n_objects=(1, most), names=QUICKSTART_OBJECTS)
        assert len(scene.objects) <= most and {o.name for o in scene.objects} <= set(QUICKSTART_OBJECTS)
        row = question_row(scene)
        for turn in row["conversations"]:
            found.update(mentioned(turn["value"]))
        tasks |= set(row["task"].split(","))
    assert set(found) == set(QUICKSTART_OBJECTS) and tasks == set(QUESTION_TASKS)


@pytest.mark.parametrize(
    "names, message",
    [
        (("fox", "dragon"), "names=['dragon'] have no drawing"),
        (("fox", "cat"), "must lie in more than 4 groups with at least 4 names in each"),
        (QUICKSTART_OBJECTS, "must lie in more than 4 groups"),  # with up to four objects none would be left
        (concept_names()[:31], "with at least 4 names in each"),
    ],
)
def test_names_of_which_no_scenes_can_be_made(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_question_scene(0, names=names)


@pytest.mark.parametrize("split", SPLITS)
def test_places_are_true(split):
    for index in range(150):
        scene = plan_question_scene(index, split)
        boxes = {o.name: o.box for o in scene.objects}
        for task, question, answer in make_questions(scene, ["neighbor", "place", "half"]):
            question = question.removesuffix(SHORT_ANSWER)
            if task == "neighbor":
                direction, name = re.fullmatch(
                    r"W.* is (left of|right of|above|below) the (\w+)\?", question
                ).groups()
                axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[
                    direction
                ]
                first, second = (answer.lower(), name) if sign > 0 else (name, answer.lower())
                assert boxes[first][axis + 2] < boxes[second][axis]
                there = [
                    n for n, b in boxes.items() if n != name and sign * (boxes[name][axis] - b[axis]) > 0
                ]
                assert there == [answer.lower()]
                continue
            name = re.search(r"the (\w+)(?: in|\?)", question.replace("of the picture", "")).group(1)
            x = (boxes[name][0] + boxes[name][2]) / 2 - scene.size / 2
            y = (boxes[name][1] + boxes[name][3]) / 2 - scene.size / 2
            for word in answer.lower().split():
                assert {"left": x < 0, "right": x > 0, "upper": y < 0, "lower": y > 0}[word]
            assert len(answer.split()) == (2 if task == "place" else 1)


@pytest.mark.parametrize("split", SPLITS)
def test_names_and_odd_objects_are_true(split):
    found = Counter()
    for index in range(200):
        scene = plan_question_scene(index, split)
        names = [o.name for o in scene.objects]
        for task, _, answer in make_questions(scene, ["name", "odd"]):
            found[task] += 1
            if task == "name":
                assert [answer.lower()] == names
            else:
                others = {category_of(n) for n in names if n != answer.lower()}
                assert len(names) >= 3 and len(others) == 1 and category_of(answer.lower()) not in others
        assert index % 2 == 0 or len(names) < 3 or odd_name(names)
    assert min(found.values()) > 30


def test_training_questions_never_join_a_held_out_pair():
    for index in range(300):
        scene = plan_question_scene(index)
        present = {o.name for o in scene.objects}
        words = set().union(*(mentioned(q + " " + a) for _, q, a in make_questions(scene)))
        for name in present:
            assert group_of(name) not in {group_of(other) for other in (present | words) - {name}}


def test_answers_are_balanced_and_negatives_hard():
    answers, similar = {task: Counter() for task in QUESTION_TASKS}, []
    for index in range(600):
        scene = plan_question_scene(index)
        kinds = {category_of(o.name) for o in scene.objects}
        for task, question, answer in make_questions(scene):
            answers[task][answer] += 1
            if task == "existence" and answer == "No":
                similar += [category_of(name) in kinds for name in mentioned(question)]
    for task, most in dict(existence=0.5, count=0.3, relation=0.32, choice=0.3, place=0.3, half=0.32).items():
        assert max(answers[task].values()) <= most * answers[task].total(), task
    for task in ("name", "neighbor", "odd"):
        assert max(answers[task].values()) <= 0.06 * answers[task].total(), task
    assert 0.5 < sum(similar) / len(similar) < 0.9


def test_the_prompts_of_benchmarks_are_among_the_phrasings():
    "As `tasks.py` and its YAML files ask them."
    questions = set()
    for index in range(200):
        questions |= {question for _, question, _ in make_questions(plan_question_scene(index))}
    for wanted in (
        r"Is there an? \w+ in the picture\?" + SHORT_ANSWER,
        r"How many things are in the picture\?" + SHORT_ANSWER,
        r"Is the \w+ (left or right of|above or below) the \w+\?" + SHORT_ANSWER,
        r"Is the \w+ in the left or the right half of the picture\?" + SHORT_ANSWER,
        r"What is (left of|right of|above|below) the \w+\?" + SHORT_ANSWER,
        r"What thing is in the picture\?" + SHORT_ANSWER,
        r"Which of these is in the picture\?\nA\. \w+\nB\. \w+\nC\. \w+\nD\. \w+" + LETTER_ANSWER,
        r"Provide a one-sentence caption for the provided image\.",
    ):
        assert any(re.fullmatch(wanted, question) for question in questions), wanted


def test_every_object_has_a_category():
    numbers = Counter(map(category_of, concept_names()))
    assert list(numbers) == list(CATEGORIES) and min(numbers.values()) >= 9


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    one = write_questions(tmp_path / "a", 5, "heldout_artist", seed=3)
    two = write_questions(tmp_path / "b", 5, "heldout_artist", seed=3, workers=2)
    assert one.read_bytes() == two.read_bytes()
    for image in (tmp_path / "a" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes()
