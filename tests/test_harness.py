"The lmms-eval plug-in: requests answered, settings in the result; the real harness over offline tasks."

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_answerer import QUESTIONS, build, scene_image

from delta_llava import harness
from delta_llava.answerer import Answerer, Request
from delta_llava.harness import HarnessModel, harness_cmd, read_result
from delta_llava.runs import load
from delta_llava.tasks import TASK_NAMES, write_tasks
from delta_llava.tower import image_aspect, with_aspect

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def whole(tmp_path):
    "A folder as `finetune` writes it."
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Task:
    "The attributes of lmms-eval's tasks that are read."

    def __init__(self, **prompts):
        self.config = SimpleNamespace(num_fewshot=0, output_type="generate_until", metadata=dict(version=1))
        self.args = SimpleNamespace()
        self.lmms_eval_specific_kwargs = prompts

    def doc_to_visual(self, doc):
        return [doc["image"]]


def generation_requests(task, n=3, **kwargs):
    "Requests as lmms-eval makes them."
    options = dict(max_new_tokens=4, until=["\n\n"], **kwargs)
    return [
        SimpleNamespace(args=(question, dict(options), task.doc_to_visual, i, "t", "test"))
        for i, question in enumerate(QUESTIONS[:n])
    ]


def harness_model(folder, first_image=None, **args):
    "The plug-in's model with the documents that lmms-eval would give it."
    model = HarnessModel(pretrained=str(folder), device="cpu", **args)
    docs = [dict(image=scene_image(i)) for i in range(len(QUESTIONS))]
    if first_image is not None:
        docs[0]["image"] = first_image
    model.task_dict = dict(t=dict(test=docs))
    model.cache_hook = SimpleNamespace(add_partial=lambda *args: None)
    return model


def test_requests_are_answered_and_settings_written(whole):
    task = Task(pre_prompt="", post_prompt="!", ocr=False)
    model = harness_model(whole, tokens=4, batch_size=2, system_prompt="Be brief.")
    wanted = generation_requests(task)
    requests = [Request(question, [scene_image(i)]) for i, question in enumerate(QUESTIONS[:3])]
    alone = Answerer(*load(whole, device="cpu"), system_prompt="Be brief.")
    assert model.generate_until(wanted) == alone.generate(
        requests, tokens=4, max_new_tokens=4, until=["\n\n"]
    )
    settings = json.loads(json.dumps(task.args.delta_llava))
    assert (settings["visual_tokens"], settings["compressor"], settings["template"]) == (4, "delta", "v1")
    assert (settings["image_aspect"], settings["dtype"]["llm"]) == ("original", "torch.float32")
    assert settings["checkpoint"]["sha256"].keys() == {"model.safetensors"} and settings["versions"]["torch"]
    assert settings["delta_llava"]["commit"]
    task_settings = settings["tasks"]["t"]
    assert (task_settings["ocr"], task_settings["post_prompt"], task_settings["split"]) == (
        False,
        "!",
        "test",
    )
    assert task_settings["generation_kwargs"]["until"] == ["\n\n"]
    assert task_settings["first_prompt"].startswith("Be brief. USER: <image>\n")
    assert task_settings["first_prompt"].endswith("ASSISTANT:")
    assert wanted[0].args[1]["until"] == ["\n\n"]  # the request's own settings are as they were


def test_requests_with_different_settings_keep_their_order(whole):
    model, task = harness_model(whole, batch_size=4), Task()
    short, long = generation_requests(task, 3), generation_requests(task, 3, temperature=0)
    for request in long:
        request.args[1]["max_new_tokens"] = 6
    mixed = [short[0], long[1], short[2], long[0]]
    assert model.generate_until(mixed) == [model.generate_until([request])[0] for request in mixed]


def test_choice_gets_the_negative_likelihood(whole):
    "lmms-eval takes the smallest number for the answer."
    model = harness_model(whole, batch_size=4)
    requests = [
        SimpleNamespace(args=("Which?", letter, Task().doc_to_visual, 0, "t", "test")) for letter in "ABCD"
    ]
    found = model.loglikelihood(requests)
    wanted = model.answerer.log_likelihoods([Request("Which?", [scene_image(0)])] * 4, list("ABCD"))
    torch.testing.assert_close(
        torch.tensor([n for n, _ in found]), torch.tensor([-s.log_likelihood for s in wanted])
    )
    assert all(n > 0 for n, _ in found)


def test_aspect_by_argument_and_by_task(whole):
    wide = Image.linear_gradient("L").resize((500, 200)).convert("RGB")
    pixels = {}
    for aspect in (None, "original", "pad"):
        model = harness_model(whole, image_aspect=aspect)
        processor = model.answerer.processor.image_processor
        pixels[aspect] = processor(wide, return_tensors="pt").pixel_values
        assert image_aspect(processor) == (aspect or "original")
    assert pixels[None].equal(pixels["original"]) and not pixels["pad"].equal(pixels["original"])
    assert pixels["pad"].shape == pixels["original"].shape
    back = with_aspect(with_aspect(model.trained_image_processor, "pad"), "original")
    torch.testing.assert_close(back(wide, return_tensors="pt").pixel_values, pixels["original"])
    model, task = harness_model(whole, wide, image_aspect="pad"), Task()
    by_task = model.generate_until(generation_requests(task, 1, image_aspect_ratio="original"))
    assert by_task == harness_model(whole, wide).generate_until(generation_requests(Task(), 1))
    assert task.args.delta_llava["tasks"]["t"]["image_aspect"] == "original"
    assert image_aspect(model.answerer.processor.image_processor) == "pad"  # as before
    with pytest.raises(ValueError, match="image_aspect='square'"):
        harness_model(whole, image_aspect="square")


@pytest.mark.parametrize(
    "args,words",
    [
        (dict(token=4), "'token'"),
        (dict(tokens=5), "must be the square"),
        (dict(batch_size="auto"), "batch_size='auto'"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(dtype="int8"), "dtype='int8'"),
        (dict(template="v2"), "template='v2'"),
        (dict(template="plain", system_prompt="Be brief."), "is not supported by"),
    ],
)
def test_wrong_arguments_are_named(whole, args, words):
    with pytest.raises(ValueError, match=words):
        harness_model(whole, **args)


def test_video_is_refused(whole):
    model = harness_model(whole, "film.mp4")
    with pytest.raises(ValueError, match="reads images only"):
        model.generate_until(generation_requests(Task(), 1))


def test_the_newest_result_is_read(tmp_path):
    for folder, name, score in (("z", "20250101_000000", 0), ("a", "20260101_000000", 1)):
        (tmp_path / folder).mkdir()
        config = dict(resolved_cli_args=dict(delta_llava={}))
        result = dict(results=dict(t={"acc,none": score, "acc_stderr,none": 0}), config=config)
        (tmp_path / folder / f"{name}_results.json").write_text(json.dumps(result))
    assert read_result(tmp_path) == (dict(t=dict(acc=1)), {})


def test_nothing_imports_lmms_eval():
    code = "import sys, delta_llava.harness; print('lmms_eval' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness.plugin_class.cache_clear()
    for access in (harness.manifest, lambda: harness.DeltaLlava):
        with pytest.raises(ImportError, match=r"delta-llava\[eval\]"):
            access()


def test_the_entry_point_names_what_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'delta_llava = "delta_llava.harness:manifest"' in text and callable(harness.manifest)


# ---------------------------------------------------------------- the real harness

EVAL = ROOT / ".venv-eval" / "bin" / "python"
PYTHON = sys.executable if find_spec("lmms_eval") else str(EVAL) if EVAL.exists() else None


def run_harness(model, tmp_path, batch_size):
    "Scores, settings, and the answers to each task, of one run of lmms-eval."
    out = tmp_path / f"out{batch_size}"
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"), PYTHONPATH=str(ROOT))
    cmd = harness_cmd(model, out, tmp_path / "tasks", batch_size=batch_size, limit=6, python=PYTHON, tokens=4)
    run = subprocess.run(cmd, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and list(out.rglob("*_results.json")), (run.stdout + run.stderr)[-3000:]
    answers = {}
    for path in out.rglob("*_samples_*.jsonl"):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == 6
        answers[path.name.split("_samples_")[1].removesuffix(".jsonl")] = [
            s["filtered_resps"] for s in samples
        ]
    assert answers.keys() == set(TASK_NAMES)
    del answers["scenes_choice_likely"]  # numbers, which differ in their last digits
    return *read_result(out), answers


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="needs lmms-eval: `make eval` makes an environment that has it")
def test_the_real_harness_offline(whole, tmp_path):
    "All tasks, two batch sizes: same answers, same scores; all settings in the result."
    write_tasks(tmp_path / "tasks", n=6)
    scores, settings, answers = run_harness(whole, tmp_path, 1)
    other_scores, other_settings, other_answers = run_harness(whole, tmp_path, 4)
    assert answers == other_answers and scores == other_scores and scores.keys() == set(TASK_NAMES)
    assert {"pope_accuracy", "pope_f1", "pope_yes_ratio"} <= scores["scenes_pope"].keys()
    assert "caption_cider" in scores["scenes_caption"] and "acc" in scores["scenes_choice_likely"]
    assert dict(settings, batch_size=4) == other_settings
    assert (settings["visual_tokens"], settings["image_aspect"], settings["template"]) == (
        4,
        "original",
        "v1",
    )
    assert settings["versions"]["lmms_eval"] == "0.7.3" and settings["checkpoint"]["sha256"]
    assert settings["tasks"].keys() == set(TASK_NAMES)
    for task in settings["tasks"].values():
        assert task["ocr"] is False and task["split"] == "test" and "<image>" in task["first_prompt"]
    assert settings["tasks"]["scenes_pope"]["metadata"]["scenes"]["split"] == "heldout_scenes"
    assert settings["tasks"]["scenes_gqa"]["generation_kwargs"]["max_new_tokens"] == 16
