"""A person opens a notebook in JupyterLab and chooses "Run All Cells": a real browser does the same."""
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent/"nbs"/"03_delta.ipynb"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
pytestmark = pytest.mark.slow


@pytest.fixture
def page():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: `make slow` installs it")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser_path: pytest.skip(f"no browser ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on an empty copy of the notebook: yields its address and the copy."
    nb = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    copy = tmp_path/NOTEBOOK.name
    copy.write_text(json.dumps(nb), encoding="utf-8")
    # A home of its own: no setting, extension or running server of this machine takes part.
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path/"config"), "JUPYTER_RUNTIME_DIR": str(tmp_path/"runtime"),
                        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path/"workspaces"),
                        "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", f"--notebook-dir={tmp_path}", "--expose-app-in-browser"]
    log = tmp_path/"lab.log"
    with log.open("w") as out: server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        yield wait(lambda: re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\?token=\w+", log.read_text()), 120, lambda: log.read_text())[0], copy
    finally:
        server.terminate()
        server.wait(timeout=20)


def wait(ready, seconds, report):
    "The first true value of `ready()`, or a failure that says what was there instead."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready(): return value
        time.sleep(0.5)
    pytest.fail(f"not ready after {seconds} s: {report()}")


def test_run_all(page, lab):
    address, copy = lab
    page.goto(address.replace("/lab?", f"/lab/tree/{copy.name}?"))
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    page.get_by_text("| Idle").wait_for(timeout=120_000)  # the status bar: the kernel has started
    assert page.locator(".jp-OutputArea-output").count() == 0  # nothing has run yet
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def code(): return [c for c in json.loads(copy.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code" and c["source"]]
    def errors(): return [o["ename"] + ": " + o["evalue"] for c in code() for o in c["outputs"] if o["output_type"] == "error"]
    def finished():
        page.keyboard.press("Control+s")
        return errors() or all(c["execution_count"] for c in code())

    wait(finished, 300, lambda: [c["execution_count"] for c in code()])
    assert not errors()
    assert sum(bool(c["outputs"]) for c in code()) > 2, "the cells ran and showed nothing"
    assert page.locator(".jp-OutputArea-output").count() > 0, "no output on the screen"
