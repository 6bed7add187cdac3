"""Write README.md from nbs/index.ipynb; `--run` executes the notebook first.

Cells marked `#| hide` are left out, `#| echo: false` keeps only the output. Relative links become
addresses in the repository named by settings.ini, so that they hold on GitHub and on PyPI alike.
"""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
NOTICE = (
    "<!-- Written by tools/make_readme.py from nbs/index.ipynb: "
    "edit the notebook, then run `make readme`. -->\n\n"
)


def run_index() -> None:
    "Execute the notebook in place, then clean it."
    nb = nbformat.read(INDEX, 4)
    NotebookClient(nb, coalesce_streams=True, resources={"metadata": {"path": str(INDEX.parent)}}).execute()
    nbformat.write(nb, INDEX)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", INDEX], cwd=ROOT, check=True)


def shown(cell: nbformat.NotebookNode) -> bool:
    "Whether a cell belongs in the README; strips its directives."
    if cell.cell_type == "raw":
        return False
    if cell.cell_type == "markdown":
        return True
    directives = re.findall(r"^#\|\s*(.*?)\s*$", cell.source, re.M)
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    if "echo: false" in directives:
        cell.metadata["transient"] = {"remove_source": True}
    return "hide" not in directives


def absolute(match: re.Match, settings: configparser.SectionProxy) -> str:
    "One Markdown link with its relative target replaced by an address."
    image, text, target = match.groups()
    path = (INDEX.parent / target.partition("#")[0]).resolve()
    if not path.exists():
        raise ValueError(f"{INDEX.name} links to {target}, which does not exist; a link is relative to nbs/.")
    kind = "raw" if image else ("tree" if path.is_dir() else "blob")
    root = f"{settings['git_url']}/{kind}/{settings['branch']}"
    return f"{image}[{text}]({root}/{path.relative_to(ROOT).as_posix()})"


def readme() -> str:
    "The text of README.md, from the stored outputs of the notebook."
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini")
    nb = nbformat.read(INDEX, 4)
    nb.cells = [cell for cell in nb.cells if shown(cell)]
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        raise ValueError(
            f"{INDEX.name} draws a figure; save it under nbs/images/ and link to it, so that the README can."
        )
    text = re.sub(
        r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)", lambda m: absolute(m, config["DEFAULT"]), text
    )
    return NOTICE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    if "--run" in sys.argv:
        run_index()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
