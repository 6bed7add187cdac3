"""A person opens a notebook in JupyterLab and chooses "Run All Cells": a real browser does the same.

`DELTA_LLAVA_SCREENSHOTS` names a folder that keeps what was seen."""

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


@pytest.fixture
def lab(tmp_path, request):
    "JupyterLab on a notebook without outputs, beside the records and nothing else: yields its address and the notebook."
    nb = json.loads((ROOT / "nbs" / request.param).read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    copy = tmp_path / "nbs" / request.param
    copy.parent.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    for record in (ROOT / "runs").glob("*.json"):
        shutil.copy(record, tmp_path / "runs")
    copy.write_text(json.dumps(nb), encoding="utf-8")
    # A home of its own: no setting, extension or running server of this machine takes part.
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
        address = wait(
            lambda: re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\?token=\w+", log.read_text()),
            120,
            lambda: log.read_text(),
        )[0]
        yield address.replace("/lab?", f"/lab/tree/nbs/{request.param}?"), copy
    finally:
        server.terminate()
        server.wait(timeout=20)


def wait(ready, seconds, report):
    "The first true value of `ready()`, or a failure that says what was there instead."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.5)
    pytest.fail(f"not ready after {seconds} s: {report()}")


def run_all(page, lab):
    'Open the notebook, choose "Run All Cells", wait for the last one.'
    address, copy = lab
    page.goto(address)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    page.get_by_text("| Idle").wait_for(timeout=120_000)  # the status bar: the kernel has started
    assert page.locator(".jp-OutputArea-output").count() == 0  # nothing has run yet
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def code():
        def read():
            try:
                return json.loads(copy.read_text(encoding="utf-8"))["cells"]
            except json.JSONDecodeError:
                return None  # just being written

        return [
            c for c in wait(read, 30, lambda: "no whole notebook") if c["cell_type"] == "code" and c["source"]
        ]

    def errors():
        return [
            o["ename"] + ": " + o["evalue"]
            for c in code()
            for o in c["outputs"]
            if o["output_type"] == "error"
        ]

    def finished():
        page.keyboard.press("Control+s")
        return errors() or all(c["execution_count"] for c in code())

    wait(finished, 1200, lambda: [c["execution_count"] for c in code()])
    assert not errors()
    assert sum(bool(c["outputs"]) for c in code()) > 2, "the cells ran and showed nothing"
    assert page.locator(".jp-OutputArea-output").count() > 0, "no output on the screen"
    if shots := os.environ.get("DELTA_LLAVA_SCREENSHOTS"):
        if (drawn := page.locator(".jp-OutputArea-output img")).count():
            drawn.last.scroll_into_view_if_needed()
        page.screenshot(path=Path(shots) / f"{copy.stem}.png")
    assert (
        page.get_by_text(re.compile("Error displaying widget|Error creating widget|Loading widget")).count()
        == 0
    ), "a widget is not shown"


@pytest.mark.parametrize("lab", ["03_delta.ipynb", *TUTORIALS], indirect=True)
def test_run_all(page, lab):
    "As a person does, with the cells that other test runs leave out: nothing fails, and nothing that takes hours begins."
    run_all(page, lab)


@pytest.mark.parametrize("lab", ["44_explore.ipynb"], indirect=True)
def test_explorer(page, lab, tmp_path):
    "A person moves the slider, clicks a word, brings a file that is no picture."
    run_all(page, lab)
    shots = Path(os.environ.get("DELTA_LLAVA_SCREENSHOTS", tmp_path))
    words, image, slider = (
        page.locator(".widget-toggle-buttons button"),
        page.locator(".jp-OutputArea-output img.widget-image"),
        page.locator(".widget-slider .noUi-handle"),
    )

    def settled():
        page.wait_for_timeout(1000)  # the change reaches the kernel
        wait(
            lambda: (
                "computing …" not in page.locator(".widget-html").all_inner_texts()
                and image.evaluate("i => i.complete && i.naturalWidth > 0")
            ),
            120,
            lambda: page.locator(".widget-html").all_inner_texts(),
        )

    def seen(name):
        image.scroll_into_view_if_needed()
        page.screenshot(path=shots / f"{name}.png")
        return image.get_attribute("src"), image.screenshot()

    settled()
    first, budget = seen("1-start"), page.locator(".widget-slider .widget-readout").inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    settled()
    assert page.locator(".widget-slider .widget-readout").inner_text() != budget
    moved = seen("2-slider")
    assert moved[0] != first[0] and moved[1] != first[1], "the slider moved and the picture did not"
    other = words.and_(page.locator(":not(.mod-active)")).last
    said = other.inner_text()
    other.click()
    settled()
    assert page.locator(".widget-toggle-buttons button.mod-active").inner_text() == said
    clicked = seen("3-word")
    assert clicked[0] != moved[0] and clicked[1] != moved[1], "a word was clicked and the picture stayed"
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Your own picture").click()
    chooser.value.set_files(dict(name="notes.txt", mimeType="text/plain", buffer=b"no picture"))
    page.get_by_text("notes.txt cannot be used: this is no picture").wait_for()
    page.screenshot(path=shots / "4-refused.png")
