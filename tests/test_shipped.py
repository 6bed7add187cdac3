"""The model that comes with the package: small, documented, and right on scenes that it has not seen."""

from importlib.resources import files
from pathlib import Path

import pytest
from safetensors import safe_open

from delta_llava import load
from delta_llava.answerer import Answerer
from delta_llava.files import read_json, shipped_folder
from delta_llava.questions import make_questions, plan_question_scene
from delta_llava.runs import read_record, rename_legacy
from delta_llava.scenes import draw_scene

ROOT = Path(__file__).resolve().parents[1]
SEED = 7_000_000  # of scenes that neither training nor its scores used


def test_it_is_package_data_of_at_most_20_mb():
    weights = sorted(shipped_folder().glob("*.safetensors"))
    assert [file.name for file in weights] == ["lora.safetensors", "projector.safetensors"]
    assert sum(file.stat().st_size for file in weights) < 20e6
    assert '"shipped/*"' in (ROOT / "pyproject.toml").read_text()
    assert shipped_folder() == Path(str(files("delta_llava"))) / "shipped"


def test_its_run_names_commit_command_and_settings():
    run, record = read_json(shipped_folder() / "run.json"), read_record(ROOT / "runs" / "recipe.json")
    assert run["kind"] == "recipe"
    for name in ("commit", "command", "hardware", "seeds", "settings"):
        assert run[name] == record[name]
    assert rename_legacy(run)["result"]["scores"] == record["result"]["scores"]


def test_its_matrices_are_bfloat16():
    for file in shipped_folder().glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                if len(part.get_shape()) > 1 and "mean" not in name and "std" not in name:
                    assert part.get_dtype() == "BF16", name


@pytest.mark.slow
@pytest.mark.parametrize("tokens, least", [(36, 0.85), (4, 0.75)])
def test_it_answers_questions_about_new_scenes(tokens, least):
    "Exact match of generated answers; with the images of other scenes at most two thirds as many."
    answerer = Answerer(*load())
    scenes = [plan_question_scene(i, "heldout_scenes", SEED) for i in range(4)]
    images = [draw_scene(scene) for scene in scenes]
    correct, mismatched, n = 0, 0, 0
    for i, scene in enumerate(scenes):
        for _, question, answer in make_questions(scene):
            correct += answerer.answer(images[i], question, tokens=tokens) == answer
            mismatched += answerer.answer(images[i - 1], question, tokens=tokens) == answer
            n += 1
    assert correct / n >= least
    assert mismatched / n < correct / n / 1.5
