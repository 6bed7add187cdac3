"The first figure of the README shows what its script and the model in the package give."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delta_llava.scenes import draw_scene

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_hero  # noqa: E402


@pytest.fixture(scope="module")
def result():
    return json.loads((ROOT / "runs" / "hero.json").read_text(encoding="utf-8"))["result"]


def test_the_image_is_the_first_of_its_kind(result):
    number, scene, question, truth = make_hero.first_scene()
    recorded = (result["scene"], result["question"], result["truth"])
    assert recorded == (number, question, truth)
    assert result["objects"] == [o.name for o in scene.objects]
    with Image.open(make_hero.IMAGES / "scene.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(draw_scene(scene)))


def test_the_page_prints_the_recorded_answers(result):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for tokens, answer in result["answers"].items():
        assert f"“{answer}” with {tokens} visual token" in readme  # in the caption
        assert f"    {tokens} {answer}\n" in readme  # in the ten lines


@pytest.mark.slow
def test_the_figure_is_current(tmp_path, result):
    make_hero.main(tmp_path, tmp_path / "hero.json")
    again = json.loads((tmp_path / "hero.json").read_text(encoding="utf-8"))["result"]
    assert again == result
    with Image.open(tmp_path / "hero.png") as new, Image.open(make_hero.IMAGES / "hero.png") as old:
        difference = np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float)
    assert np.abs(difference).mean() < 2  # of 255; rounding moves a few colors
