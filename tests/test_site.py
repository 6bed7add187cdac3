"""`tools/check_site.py` finds a planted fault of each kind, and none in the rendered site.

Chromium is needed, and for the site itself Quarto.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A page</title>
<meta name="viewport" content="width=device-width">
<style>
.body {{ display: grid; grid-template-columns: minmax(0, 1fr); }}
nav {{ display: none; }}
@media (min-width: 1000px) {{
  .body {{ grid-template-columns: minmax(0, 1fr) 200px; }}
  nav {{ display: block; }}
}}
@media (prefers-color-scheme: dark) {{ body {{ background: #222; color: #eee; }} a {{ color: #8cf; }} }}
.framed {{ overflow-x: auto; }}
</style>
<script defer src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml-full.js"></script></head>
<body><div class="body"><main><h1>A page</h1>{content}</main>
<nav id="quarto-margin-sidebar" role="doc-toc"><a href="#there">On this page</a></nav></div></body></html>"""
FORMULA = r'<p id="there">The sum is <span class="math inline">\({}\)</span>.</p>'
TABLE = "<table><tr>" + "<td>a wide cell</td>" * 30 + "</tr></table>"
GOOD = (
    FORMULA.format(r"\frac{a}{b}")
    + f'<div class="framed" tabindex="0">{TABLE}</div>'
    + '<p>See <a href="#there">the sum</a>.</p><img alt="A dot." src="dot.png" width="20" height="20">'
)


@pytest.fixture(scope="module")
def check_site():
    for package in ("playwright", "axe_playwright_python", "mathjax"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing: `make slow` and `make site` install it")
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "tools" / "check_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.browser_path():
        pytest.skip(f"no browser ({', '.join(module.BROWSERS)}); on Debian: apt-get install chromium")
    return module


def faults(check_site, tmp_path, content):
    (tmp_path / "index.html").write_text(PAGE.format(content=content), encoding="utf-8")
    return check_site.check(tmp_path)


def test_a_sound_page_holds(check_site, tmp_path):
    assert faults(check_site, tmp_path, GOOD) == []


@pytest.mark.parametrize(
    "content, wanted, views",
    [
        (TABLE, "wider than the page: <table>", "light 390, light 1024, dark 390, dark 1024"),
        (
            f'<div style="width: 900px">{"word " * 400}</div>',
            "wider than the page: <div>",
            "light 390, dark 390",
        ),
        (
            '<p style="width: 950px">Text</p>',
            "covers the table of contents: <p> Text",
            "light 1024, dark 1024",
        ),
        (FORMULA.format(r"\frac{a}"), "formula with an error: Missing argument for \\frac", "light 390"),
        (FORMULA.format(r"\frac{a}{"), "1 of 2 formulas are not typeset", "light 390"),
        (
            '<p>See <a style="color: #bbb" href="#x">that page</a></p>',
            "color-contrast, contrast 1.9",
            "(light",
        ),
        ('<p style="background: #222; color: #444">Gray</p>', "color-contrast, contrast 1.6", "dark 1440"),
        ('<img src="dot.png">', "image-alt", "light 390, light 1440, dark 390, dark 1440"),
        ('<a href="#x"></a>', "link-name", "light 390"),
        ("<details><summary>Code</summary>" + TABLE + "</details>", "wider than the page: <", "dark 390"),
        ("<script>document.body.className = 'quarto-light'</script>", "not dark, which", "(dark 390"),
    ],
)
def test_a_planted_fault_is_found(check_site, tmp_path, content, wanted, views):
    found = faults(check_site, tmp_path, GOOD + content)
    assert any(wanted in fault and views in fault for fault in found), found


def test_nothing_is_read_from_the_network(check_site, tmp_path):
    tag = '<script src="https://example.org/far.js" onerror="document.title = \'refused\'"></script>'
    widen = f"<script>if (document.title === 'refused') document.write('{TABLE}')</script>"
    assert any("wider than the page" in fault for fault in faults(check_site, tmp_path, tag + widen))


def test_the_site_holds(check_site):
    "Renders the site, which takes minutes, and opens every page."
    if not shutil.which("quarto"):
        pytest.skip("quarto is missing: the workflow `test.yml` names the version and where it comes from")
    command = ["make", "-o", ".venv/.installed", "docs", f"PY={sys.executable}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=3600)
    assert check_site.check(ROOT / "_docs", base=check_site.site_base()) == []
