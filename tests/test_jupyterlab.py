"""Notebooks in JupyterLab, in a real browser: open, "Run All Cells", and the explorer's widgets.

The environment variable `DELTA_LLAVA_SCREENSHOTS` names a folder for screenshots.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted(
    p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs" / "tutorials").glob("*.ipynb")
)
BROWSERS = "chromium", "chromium-browser", "google-chrome"
pytestmark = pytest.mark.slow


@pytest.fixture
def page():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: `make slow` installs it")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser_path:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


def copy_notebook(name, folder):
    "A notebook without outputs, the records that it reads, and the file by which it finds the repository."
    notebook = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    copy = folder / "nbs" / name
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    (folder / "runs").mkdir()
    for record in (ROOT / "runs").glob("*.json"):
        shutil.copy(record, folder / "runs")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return copy


@pytest.fixture
def lab(tmp_path, request):
    "JupyterLab on a copy of a notebook; yields its address and the copy."
    copy = copy_notebook(request.param, tmp_path)
    # Separate folders: settings, extensions and running servers of this machine have no effect.
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        f"--notebook-dir={tmp_path}",
        "--expose-app-in-browser",
    ]
    log = tmp_path / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        url = re.compile(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\?token=\w+")
        address = wait(lambda: url.search(log.read_text()), 120, log.read_text)[0]
        yield address.replace("/lab?", f"/lab/tree/nbs/{request.param}?"), copy
    finally:
        server.terminate()
        server.wait(timeout=20)


def wait(ready, seconds, report):
    "The first true value of `ready()`; after `seconds` the test fails with `report()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.5)
    pytest.fail(f"not ready after {seconds} s: {report()}")


def read_notebook(path):
    "The saved notebook, or `None` while JupyterLab writes it."
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None


def code_cells(path):
    "Code cells of the saved notebook that are not empty."
    notebook = wait(lambda: read_notebook(path), 30, lambda: "the notebook is not valid JSON")
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]


def errors(path):
    "Exceptions in the saved notebook."
    found = []
    for cell in code_cells(path):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{output['ename']}: {output['evalue']}")
    return found


def save_screenshot(page, name):
    "A screenshot of the last figure, if a folder is named for it."
    if folder := os.environ.get("DELTA_LLAVA_SCREENSHOTS"):
        figures = page.locator(".jp-OutputArea-output img")
        if figures.count():
            figures.last.scroll_into_view_if_needed()
        page.screenshot(path=Path(folder) / f"{name}.png")


def run_all(page, lab):
    'Open the notebook, choose "Run All Cells", wait for the last cell.'
    address, copy = lab
    page.goto(address)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    page.get_by_text("| Idle").wait_for(timeout=120_000)  # the status bar: the kernel has started
    assert page.locator(".jp-OutputArea-output").count() == 0  # nothing has run yet
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def finished():
        page.keyboard.press("Control+s")
        return errors(copy) or all(cell["execution_count"] for cell in code_cells(copy))

    wait(finished, 1200, lambda: [cell["execution_count"] for cell in code_cells(copy)])
    assert not errors(copy)
    assert sum(bool(cell["outputs"]) for cell in code_cells(copy)) > 2, "hardly any cell has an output"
    assert page.locator(".jp-OutputArea-output").count() > 0, "no output on the screen"
    save_screenshot(page, copy.stem)
    broken = re.compile("Error displaying widget|Error creating widget|Loading widget")
    assert page.get_by_text(broken).count() == 0, "a widget is not shown"


@pytest.mark.parametrize("lab", ["03_delta.ipynb", *TUTORIALS], indirect=True)
def test_run_all(page, lab):
    "Every cell runs, also those that other test runs leave out, and none starts hours of work."
    run_all(page, lab)


class ExplorerPage:
    "The explorer on the screen."

    def __init__(self, page, folder):
        self.page = page
        self.folder = folder
        self.words = page.locator(".widget-toggle-buttons button")
        self.figure = page.locator(".jp-OutputArea-output img.widget-image")
        self.slider = page.locator(".widget-slider .noUi-handle")

    def budget(self):
        return self.page.locator(".widget-slider .widget-readout").inner_text()

    def active_word(self):
        return self.page.locator(".widget-toggle-buttons button.mod-active").inner_text()

    def texts(self):
        return self.page.locator(".widget-html").all_inner_texts()

    def settled(self):
        "Wait until the kernel has answered."
        self.page.wait_for_timeout(1000)  # the change reaches the kernel
        loaded = "i => i.complete && i.naturalWidth > 0"
        wait(lambda: "computing …" not in self.texts() and self.figure.evaluate(loaded), 120, self.texts)

    def shown(self, name):
        "The figure's source and its pixels on the screen; also saves a screenshot."
        self.figure.scroll_into_view_if_needed()
        self.page.screenshot(path=self.folder / f"{name}.png")
        return self.figure.get_attribute("src"), self.figure.screenshot()

    def click_another_word(self):
        other = self.words.and_(self.page.locator(":not(.mod-active)")).last
        text = other.inner_text()
        other.click()
        return text

    def upload(self, name, content):
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role("button", name="Your own image").click()
        chooser.value.set_files(dict(name=name, mimeType="text/plain", buffer=content))


def assert_differs(before, after):
    "Another figure, and other pixels on the screen."
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("lab", ["44_explore.ipynb"], indirect=True)
def test_explorer(page, lab, tmp_path):
    "Move the slider, click another word, upload a file that is not an image."
    run_all(page, lab)
    explorer = ExplorerPage(page, Path(os.environ.get("DELTA_LLAVA_SCREENSHOTS", tmp_path)))
    explorer.settled()
    first = explorer.shown("1-start")
    budget = explorer.budget()
    explorer.slider.focus()
    page.keyboard.press("ArrowRight")
    explorer.settled()
    assert explorer.budget() != budget
    moved = explorer.shown("2-slider")
    assert_differs(first, moved)
    word = explorer.click_another_word()
    explorer.settled()
    assert explorer.active_word() == word
    assert_differs(moved, explorer.shown("3-word"))
    explorer.upload("notes.txt", b"not an image")
    page.get_by_text("notes.txt cannot be used: it is not an image").wait_for()
    page.screenshot(path=explorer.folder / "4-refused.png")
