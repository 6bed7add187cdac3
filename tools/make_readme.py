"""Write README.md from nbs/index.ipynb; `--run` executes the notebook first.

Cells marked `#| hide` are left out, `#| echo: false` keeps only the output. All links into the repository
become relative to its root, so that they hold in every clone and fork; setup.py makes them absolute for PyPI.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
from addresses import LINK, relative_target
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


def from_root(match: re.Match) -> str:
    "One Markdown link with its target, which is relative to nbs/, made relative to the root."
    image, text, target = match.groups()
    file, mark, anchor = target.partition("#")
    path = (INDEX.parent / file).resolve()
    if not path.exists():
        raise ValueError(f"{INDEX.name} links to {target}, which does not exist; a link is relative to nbs/.")
    anchor = "" if path.suffix == ".ipynb" else mark + anchor  # a notebook on GitHub has no anchors
    return f"{image}[{text}]({path.relative_to(ROOT).as_posix()}{anchor})"


def without_address(match: re.Match) -> str:
    "A link with the address of a file of this repository, made relative to the root; any other as it is."
    path = relative_target(match[1])
    if path is None:
        return match[0]
    if not (ROOT / path).exists():
        raise ValueError(f"{INDEX.name} links to {match[1]}: there is no {path} in the repository.")
    return f"]({path})"


def readme() -> str:
    "The text of README.md, from the stored outputs of the notebook."
    nb = nbformat.read(INDEX, 4)
    nb.cells = [cell for cell in nb.cells if shown(cell)]
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        raise ValueError(
            f"{INDEX.name} draws a figure; save it under nbs/images/ and link to it, so that the README can."
        )
    text = LINK.sub(from_root, text)
    text = re.sub(r"\]\((https?:[^)\s]+)\)", without_address, text)
    return NOTICE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    if "--run" in sys.argv:
        run_index()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
