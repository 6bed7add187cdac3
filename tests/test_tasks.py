"The offline tasks: every answer follows from the plan of the scene, and the task files name what exists."

import pytest
import yaml
from datasets import Dataset

from delta_llava import tasks
from delta_llava.scenes import plan_scene
from delta_llava.tasks import TASK_NAMES, gqa_questions, pope_questions, write_tasks

SIZE = 168
HALVES = {
    "left": lambda box: box[2] <= SIZE // 2,
    "right": lambda box: box[0] >= SIZE // 2,
    "upper": lambda box: box[3] <= SIZE // 2,
    "lower": lambda box: box[1] >= SIZE // 2,
}
SIDES = {
    "left of the ": lambda a, b: a[2] < b[0],
    "right of the ": lambda a, b: b[2] < a[0],
    "above the ": lambda a, b: a[3] < b[1],
    "below the ": lambda a, b: b[3] < a[1],
}


def scenes(n_objects):
    return [plan_scene(i, "heldout_scenes", seed=9, n_objects=n_objects) for i in range(60)]


def asked_name(question):
    "The object that an existence question is about."
    return question.removeprefix("Is there ").removesuffix(" in the picture?").split(" ", 1)[1]


def check_gqa(boxes, row):
    "One question of GQA's kind against the boxes."
    words = row["question"].removesuffix("?").removeprefix("What is ")
    if row["kind"] == "count":
        assert row["answer"] == str(len(boxes))
    if row["kind"] == "position":
        assert HALVES[row["answer"]](*boxes.values())
    for start, holds in SIDES.items():
        if row["kind"] == "what" and words.startswith(start):
            other = words.removeprefix(start)
            there = [name for name in boxes if name != other and holds(boxes[name], boxes[other])]
            assert there == [row["answer"]]


def test_answers_hold_in_the_plan():
    planned = scenes((1, 3))
    for scene, row in pope_questions(planned):
        shown = {o.name for o in scene.objects}
        assert (asked_name(row["question"]) in shown) == (row["answer"] == "yes")
    kinds = set()
    for scene in planned:
        boxes = {o.name: o.box for o in scene.objects}
        for row in gqa_questions(scene):
            kinds.add(row["kind"])
            check_gqa(boxes, row)
    assert kinds == {"count", "relation", "what", "position"}


def test_adversarial_objects_occur_with_what_is_shown():
    planned = scenes((2, 3))
    together = {(a.name, b.name) for scene in planned for a in scene.objects for b in scene.objects}
    hits = dict(random=0, popular=0, adversarial=0)
    for scene, row in pope_questions(planned):
        if row["answer"] == "no":
            name = asked_name(row["question"])
            hits[row["kind"]] += any((name, o.name) in together for o in scene.objects)
    assert hits["adversarial"] > 0.9 * len(planned) > 2 * hits["random"]


@pytest.fixture
def function_loader(monkeypatch):
    "A YAML loader that looks up `!function`s as lmms-eval does; a name that does not exist fails."

    class Loader(yaml.SafeLoader):
        pass

    def find(loader, node):
        module, _, name = node.value.rpartition(".")
        assert module == "delta_llava.tasks"
        return getattr(tasks, name)

    Loader.add_constructor("!function", find)
    return Loader


def test_task_files_are_complete(tmp_path, function_loader):
    counts = write_tasks(tmp_path, n=3, caption="What is in the picture?")
    for task in TASK_NAMES:
        settings = yaml.load((tmp_path / f"{task}.yaml").read_text(), Loader=function_loader)
        data = tmp_path / settings["dataset_kwargs"]["data_files"]["test"]
        rows = Dataset.from_parquet(str(data), cache_dir=str(tmp_path / "cache"))
        prompts = settings["lmms_eval_specific_kwargs"]["default"]
        assert settings["task"] == task and settings["metadata"]["scenes"]["n"] == 3
        assert len(rows) == sum(counts[task].values()) > 0
        assert {settings["doc_to_target"], "image", "question"} <= set(rows.column_names)
        assert prompts["ocr"] is False
        for row in rows:
            assert settings["doc_to_text"](row, prompts).startswith(row["question"])
            assert settings["doc_to_visual"](row)[0].size == (SIZE, SIZE)
    captions = Dataset.from_parquet(str(tmp_path / "caption.parquet"), cache_dir=str(tmp_path / "cache"))
    assert {row["question"] for row in captions} == {"What is in the picture?"}


def test_every_metric_of_a_task_file_is_computed(tmp_path, function_loader):
    "`process_results` returns exactly the metrics that the file lists, over all kinds of questions."
    write_tasks(tmp_path, n=30)
    for task in TASK_NAMES[:4]:
        settings = yaml.load((tmp_path / f"{task}.yaml").read_text(), Loader=function_loader)
        data = tmp_path / settings["dataset_kwargs"]["data_files"]["test"]
        rows = Dataset.from_parquet(str(data), cache_dir=str(tmp_path / "cache"))
        found = set()
        for row in rows:
            found |= settings["process_results"](row, [row["answer"]]).keys()
        assert found == {metric["metric"] for metric in settings["metric_list"]}
