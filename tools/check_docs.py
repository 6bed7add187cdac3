"""Check the pages of the site without Quarto: nbdev's own processing, then pandoc, then what a reader would
stumble over.

`make docs` runs this where Quarto is missing, `make test` always. The pages stay in _docs/ as a plain
preview; the site itself is Quarto's. Each failure names page, cell and a fix.
"""

import ast
import base64
import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pypandoc
import yaml
from bs4 import BeautifulSoup
from shape_pages import CITED, shape_folder

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = {"eq": "Eq.", "fig": "Figure", "tbl": "Table", "sec": "Section"}
REFERENCE = re.compile(
    r"(?s)(?P<fence>`{3,}).*?(?P=fence)|`[^`\n]*`|(?<!\w)@(?P<at>(?:eq|fig|tbl|sec)-[\w-]+)"
)
LEFTOVER = re.compile(r"\]\(|\$\$|:::|\n *(?:[-*]|\d+\.) \S|\*\*\S|\{[#.]|(?<!\w)@(?:eq|fig|tbl|sec)-")
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<meta name="description" content="{description}">
<link rel="stylesheet" href="{up}styles.css">
<style>
:root{{color-scheme:light dark}}
body{{font:16px/1.5 sans-serif;margin:0;display:flex;flex-wrap:wrap}}
nav{{flex:0 0 14rem;padding:1rem;font-size:.9em}} nav ul{{padding-left:1rem}}
main{{flex:1 1 20rem;min-width:0;max-width:50rem;padding:1rem;box-sizing:border-box}}
pre{{overflow:auto;padding:.5rem;background:#8882}} img{{max-width:100%}}
[class*=callout]{{border-left:4px solid #48c;padding-left:1rem}}
[class*=callout]::before{{content:attr(title);font-weight:bold}}
@media (max-width: 40rem) {{nav{{order:2}}}}
body.quarto-dark{{color-scheme:dark;background:#222;color:#ddd}} body.quarto-dark a{{color:#6bf}}
body.quarto-light{{color-scheme:light}}
</style>
<body class="quarto-light">
<script>
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
document.body.className = dark ? "quarto-dark" : "quarto-light";
</script>
<nav>{nav}</nav>
<main><h1 class="title">{title}</h1><p class="subtitle">{description}</p>{body}</main></body></html>"""


def front(nb: nbformat.NotebookNode) -> dict:
    "What nbdev made of a notebook's title cell."
    first = nb.cells[0] if nb.cells else None
    found = re.search(r"^---\n(.*?)\n---", first.source, re.S) if first and first.cell_type == "raw" else None
    return yaml.safe_load(found[1]) if found else {}


def figure(cell_output: dict, kind: str, options: dict, page: Path, name: str) -> str:
    "An image of a cell's output as a file beside the page, and the Markdown that shows it."
    image = page.parent / f"{page.stem}_files" / f"{name}.{kind.removeprefix('image/')}"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(base64.b64decode(cell_output[kind]))
    alt = str(options.get("fig-alt", "")).replace('"', "&quot;")
    label = f" #{options['label']}" if "label" in options else ""
    return f'![{options.get("fig-cap", "")}]({image.parent.name}/{image.name}){{alt="{alt}"{label}}}'


def outputs(cell: nbformat.NotebookNode, options: dict, page: Path, n: int) -> str:
    "A cell's outputs as Markdown; images become files beside the page."
    parts = []
    for k, out in enumerate(cell.get("outputs", [])):
        data = out.get("data", {})
        if kind := next((m for m in ("image/png", "image/jpeg") if m in data), None):
            parts.append(figure(data, kind, options, page, f"{n}-{k}"))
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif "text/html" in data:
            parts.append(f"```{{=html}}\n{''.join(data['text/html'])}\n```")
        elif text := "".join(out.get("text", "") or data.get("text/plain", "")):
            parts.append(f"``````\n{text.rstrip()}\n``````")
    return "\n\n".join(parts)


def code_markdown(cell: nbformat.NotebookNode, page: Path, n: int, faults: list) -> tuple[str, list[str]]:
    "A code cell with its outputs as Markdown, and its label, if it has one."
    lines = re.findall(r"^#\|\s*([\w-]+: .*)$", cell.source, re.M)
    options = yaml.safe_load("\n".join(lines)) or {}
    code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    text = f"``````python\n{code}\n``````\n\n" if code and options.get("echo") is not False else ""
    if options.get("include") is not False:
        text += outputs(cell, options, page, n)
    labels = [options["label"]] if "label" in options else []
    if labels and not labels[0].startswith(("fig-", "tbl-")):
        faults.append((cell, f"label {labels[0]!r} on a cell: it must begin with fig- or tbl-"))
    return text, labels


def is_shown(cell: nbformat.NotebookNode) -> bool:
    "Whether a code cell's lines appear on its page."
    options = set(re.findall(r"(?m)^#\|\s*(echo|include): *false", cell.source))
    return (
        cell.cell_type == "code" and not options and bool(re.sub(r"(?m)^#\|.*\n?", "", cell.source).strip())
    )


def code_faults(nb: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode | None, str]]:
    "Code that a reader could not copy and run, references inside code."
    faults, shown = [], [cell for cell in nb.cells if is_shown(cell)]
    if shown and not any(re.search(r"(?m)^ *(import|from) \w|^%|^[!$]", cell.source) for cell in shown):
        advice = "take `#| hide` from the cell of imports, or fold it with `#| code-fold: true`"
        faults.append((None, f"code without the imports that it needs: {advice}"))
    for cell in shown:
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        if found := CITED.search("\n".join(lines)):
            faults.append((cell, f"code cites {found[0]}, which is not on this page"))
    return faults


def text_labels(cell: nbformat.NotebookNode, faults: list) -> list[str]:
    "The labels of a Markdown cell."
    for label in re.findall(r"\$\$\s*\{#([\w-]+)", cell.source):
        if not label.startswith("eq-"):
            faults.append((cell, f"label {label!r} on an equation: it must begin with eq-"))
    return re.findall(r"\{#((?:eq|fig|tbl|sec)-[\w-]+)", cell.source)


def resolved(text: str, cell: nbformat.NotebookNode, labels: dict[str, int], faults: list) -> str:
    "A cell's Markdown with numbers in place of labels and references."

    def number(match):
        return rf"\qquad ({labels[match[1]]}) $$ []{{#{match[1]}}}"

    def refer(match):
        label = match["at"]
        if label is None:
            return match[0]  # code stays as it is
        if label not in labels:
            advice = f"label it with #{label}, or link to the page that has it"
            faults.append((cell, f"{match[0]} refers to nothing on this page: {advice}"))
        return f"[{PREFIXES[label.split('-')[0]]} {labels.get(label, '?')}](#{label})"

    text = text.replace("{fig-alt=", "{alt=")  # Quarto's name for it
    return REFERENCE.sub(refer, re.sub(r"\$\$\s*\{#(eq-[\w-]+)\}", number, text))


def markdown(nb: nbformat.NotebookNode, page: Path, faults: list) -> str:
    "One page as pandoc's Markdown, each cell in a division that carries its number; labels get theirs."
    texts, labels = {}, {}
    for n, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            texts[n], found = code_markdown(cell, page, n, faults)
        elif cell.cell_type == "markdown":
            texts[n], found = cell.source, text_labels(cell, faults)
        else:
            continue
        for label in found:
            if label in labels:
                faults.append((cell, f"label {label!r} is used twice on this page: rename one"))
            of_its_kind = sum(other[:3] == label[:3] for other in labels)
            labels.setdefault(label, of_its_kind + 1)
    parts = [
        f'::::::: {{data-cell="{n}"}}\n{resolved(text, nb.cells[n], labels, faults)}\n:::::::'
        for n, text in texts.items()
    ]
    return "\n\n".join(parts)


def pandoc(text: str) -> tuple[str, str]:
    "HTML, and what pandoc warned of: an equation that does not parse, an id used twice."
    command = [
        pypandoc.get_pandoc_path(),
        "-f",
        "markdown",
        "-t",
        "html",
        "--mathml",
        "--syntax-highlighting=none",
        "--wrap=preserve",
    ]
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout, done.stderr


def navigation(entry: str | dict | list, names: dict[str, tuple[str, str]], up: str) -> str:
    "The sidebar of _quarto.yml as a list of links."
    if isinstance(entry, list):
        return "<ul>" + "".join(f"<li>{navigation(e, names, up)}</li>" for e in entry) + "</ul>"
    if isinstance(entry, dict):
        return html.escape(entry["section"]) + navigation(entry["contents"], names, up)
    return f'<a href="{up}{names[entry][0]}">{html.escape(names[entry][1])}</a>' if entry in names else ""


def listed_notebooks(entry: str | dict | list) -> list[str]:
    "Every notebook that an entry of the sidebar names."
    if isinstance(entry, str):
        return [entry]
    return sum([listed_notebooks(e) for e in (entry if isinstance(entry, list) else entry["contents"])], [])


@dataclass
class Site:
    "The processed notebooks and the pages that they become."

    source: Path  # Processed notebooks
    out: Path  # Gets the pages
    config: dict  # _quarto.yml
    settings: dict  # settings.ini
    root: Path  # The repository

    def __post_init__(self):
        notebooks = {p.relative_to(self.source): p for p in sorted(self.source.rglob("*.ipynb"))}
        kept = {name: p for name, p in notebooks.items() if (self.root / "nbs" / name).exists()}
        self.books = {name.as_posix(): nbformat.read(p, 4) for name, p in kept.items()}
        self.about = {name: front(nb) for name, nb in self.books.items()}
        self.pages = {name: self.page_of(name) for name in self.books}
        self.sidebar = self.config["website"]["sidebar"]["contents"]
        self.home = self.settings["doc_host"] + self.settings["doc_baseurl"]
        self.anchors = {}

    def page_of(self, name: str) -> str:
        "Where the page of a notebook lies below `out`."
        file = self.about[name].get("output-file", f"{Path(name).stem}.html")
        return (Path(name).parent / file).as_posix()

    def listing_faults(self) -> list[str]:
        "Notebooks without a place in the sidebar, a title or a description; lost opening text."
        listed = listed_notebooks(self.sidebar)
        faults = [
            f"_quarto.yml: sidebar names {name}, which does not exist: remove it"
            for name in listed
            if name not in self.books
        ]
        for name in self.books:
            if name not in listed:
                faults.append(f"_quarto.yml: the sidebar does not name {name}: list it")
            for what in ("title", "description"):
                if not self.about[name].get(what):
                    advice = "the first cell wants `# Title`, then `> one sentence`"
                    faults.append(f"nbs/{name}: no {what}: {advice}")
            source = nbformat.read(self.root / "nbs" / name, 4)
            for cell in source.cells:
                if cell.cell_type == "code" and re.match(r"#\|\s*export\b", cell.source):
                    advice = "write `#| exports`, and the site shows its lines"
                    faults.append(described(name, cell, f"code that its page leaves out: {advice}"))
                if any(out.get("name") == "stderr" for out in cell.get("outputs", [])):
                    advice = "silence it and run the cell again, or remove this output"
                    faults.append(described(name, cell, f"a warning or progress bar (stderr): {advice}"))
            first = source.cells[0].source
            if re.sub(r"\A# .*\n+> .*(\n> .*)*", "", first).strip():  # nbdev would drop it
                lost = "the site leaves out what follows title and description in the first cell"
                faults.append(f"nbs/{name}: {lost}: give it a cell of its own")
        return faults

    def copy_files(self) -> None:
        "Everything beside the notebooks: images, style sheets."
        for file in self.source.rglob("*"):
            inside = file.relative_to(self.source)
            if file.is_file() and file.suffix != ".ipynb" and inside.parts[0] != "_docs":  # Quarto's own
                target = self.out / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)

    def write(self, name: str, body: str) -> None:
        "One page; links to notebooks become links to their pages."
        page, up = self.out / self.pages[name], "../" * self.pages[name].count("/")
        here = os.path.dirname(name)

        def to_page(match):
            target = os.path.normpath(os.path.join(here, match[1] + ".ipynb"))
            return f'href="{os.path.relpath(self.out / self.pages.get(target, "?"), page.parent)}'

        names = {n: (self.pages[n], self.about[n].get("title") or n) for n in self.books}
        page.parent.mkdir(parents=True, exist_ok=True)
        text = TEMPLATE.format(
            title=html.escape(names[name][1]),
            description=html.escape(self.about[name].get("description") or ""),
            up=up,
            nav=navigation(self.sidebar, names, up),
            body=re.sub(r'href="([^":]+)\.ipynb', to_page, body),
        )
        page.write_text(text, encoding="utf-8")

    def leads_nowhere(self, target: str, page: Path) -> str:
        "Why a link of a page would fail, or nothing."
        repository = re.escape(self.settings["git_url"])
        if inside := re.match(repository + r"/(?:blob|tree|raw)/[^/]+/([^#?]+)", target):
            exists = (self.root / unquote(inside[1])).exists()
            return "" if exists else f"{inside[1]} does not exist in the repository"
        if target.startswith(self.home):
            target = target.removeprefix(self.home).lstrip("/") or "index.html"
            page = self.out / "index.html"
        elif re.match(r"[a-z]+:", target):
            return ""
        path, anchor = urldefrag(target)
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.is_relative_to(self.out):
            return f"{path} lies outside the site: give its address in the repository"
        if file.suffix == ".ipynb":
            file = self.out / self.pages.get(file.relative_to(self.out).as_posix(), "?")
        if not file.exists():
            return f"{path} does not exist"
        if anchor and file in self.anchors and unquote(anchor) not in self.anchors[file]:
            return f"{file.name} has no anchor #{anchor}"
        return ""

    def page_faults(self, name: str, soup: BeautifulSoup, exported_names: list[str]) -> list:
        "Pairs of a cell (or None) and what is wrong with it on one page."
        page, nb, faults = self.out / self.pages[name], self.books[name], []

        def cell_of(tag):
            holder = tag.find_parent(attrs={"data-cell": True})
            return nb.cells[int(holder["data-cell"])] if holder else None

        faults += code_faults(nb)
        examine(soup, cell_of, faults)
        for tag in soup.find_all(["a", "img"]):
            target = tag.get("href") or tag.get("src") or ""
            why = self.leads_nowhere(target, page) if target else ""
            if why:
                faults.append((cell_of(tag), f"link to {target}: {why}"))
        for symbol in exported_names:
            if symbol.lower() not in self.anchors[page]:
                advice = "see that its cell says `#| exports` and not `#| hide`"
                faults.append((None, f"{symbol} is exported and has no heading on this page: {advice}"))
        return faults


def examine(soup: BeautifulSoup, cell_of: Callable, faults: list) -> None:
    "What is wrong inside one page, apart from its links."
    for image in soup.find_all("img"):
        if not image.get("alt", "").strip():
            advice = "`#| fig-alt:` in a code cell, ![what it shows](…) in Markdown"
            faults.append((cell_of(image), f"image {image.get('src')} without alt text: {advice}"))
    for tag in soup.find_all(["p", "li", "td", "figcaption", "h1", "h2", "h3"]):
        verbatim = ["code", "pre", "math", "annotation"]
        text = "".join(s for s in tag.find_all(string=True) if not s.find_parent(verbatim))
        if found := LEFTOVER.search(text):
            around = text[max(0, found.start() - 15) : found.end() + 25].strip()
            advice = "mend the markup; a list or ::: wants an empty line before it"
            faults.append((cell_of(tag), f"markup left as text: {around!r}; {advice}"))


def config_faults(config: dict, settings: dict, folder: Path) -> list[str]:
    "What _quarto.yml lacks or should not contain; `folder` has the files that it names."
    website, formats, faults = config.get("website", {}), config.get("format", {}), []
    if set(formats) != {"html"}:
        others = sorted(set(formats) - {"html"})
        advice = "it doubles the time, and Quarto before 1.10.15 stops at a second format"
        faults.append(f"format {others}: remove it; {advice}")
    if not formats.get("html", {}).get("respect-user-color-scheme"):
        faults.append("format html: respect-user-color-scheme: true opens the site dark for who reads dark")
    for what in ("favicon", "image"):
        if not website.get(what) or not (folder / website[what]).exists():
            faults.append(f"website: {what} {website.get(what)!r} names no file under nbs/")
    if not (folder / "404.qmd").exists():
        faults.append("nbs/404.qmd, the page for wrong addresses, is missing")
    if settings["version"] not in str(website.get("page-footer")):
        faults.append(f"website: the page-footer does not say version {settings['version']} of settings.ini")
    entries = website.get("navbar", {}).get("left", [])
    texts = [entry.get("text") for entry in entries]
    for wanted in ("Start", "Learn", "API", "Results"):
        if wanted not in texts:
            faults.append(f"website: the navbar has no entry {wanted!r}")
    for entry in entries:
        for target in entry.get("menu", [entry.get("href")]):
            if not (folder / str(target)).exists():
                faults.append(f"website: the navbar names {target}, which does not exist")
    return [f"_quarto.yml: {fault}" for fault in faults]


def described(name: str, cell: nbformat.NotebookNode | None, what: str) -> str:
    "One fault as a line."
    if not cell:
        return f"nbs/{name}: {what}"
    first = cell.source.strip().splitlines()[0][:60] if cell.source.strip() else "empty"
    return f"nbs/{name}, cell {cell.get('id', '')} ({first}): {what}"


def check(
    source: Path, out: Path, config: dict, settings: dict, root: Path, names: dict[str, list[str]]
) -> list[str]:
    "Write the preview of processed notebooks in `source` to `out`, and return every fault."
    shutil.rmtree(out, ignore_errors=True)
    site = Site(source, out, config, settings, root)
    problems = site.listing_faults()
    site.copy_files()
    faults = {name: [] for name in site.books}
    texts = {name: markdown(nb, out / site.pages[name], faults[name]) for name, nb in site.books.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(texts, pool.map(pandoc, texts.values()), strict=True))
    soups = {name: BeautifulSoup(body, "html.parser") for name, (body, _) in done.items()}
    for name, soup in soups.items():
        site.anchors[out / site.pages[name]] = {tag["id"] for tag in soup.find_all(id=True)}
        site.write(name, done[name][0])
    for name, soup in soups.items():
        faults[name] += site.page_faults(name, soup, names.get(name, []))
        warnings = [line.strip() for line in done[name][1].splitlines() if line.strip()]
        faults[name] += [(None, f"pandoc: {line}") for line in warnings]
        problems += [described(name, cell, what) for cell, what in faults[name]]
    return problems


def exported(root: Path) -> dict[str, list[str]]:
    "The public functions and classes that each notebook writes."
    names = {}
    for path in (root / "delta_llava").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not (
            header := re.search(
                r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (?:\.\./)+nbs/(\S+)\.$", text, re.M
            )
        ):
            continue
        names[header[1]] = [
            node.name
            for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        ]
    return names


def main() -> None:
    os.chdir(ROOT)
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs

    try:
        source = Path(proc_nbs(n_workers=max(2, min(4, os.cpu_count() or 2))))
    except Exception as error:
        sys.exit(
            "nbdev could not process a notebook, which would stop the site too"
            f" (it runs imports and exported cells alone): {error}\n{error.__cause__ or ''}"
        )
    shape_folder(source, ROOT)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    out = ROOT / "_docs"
    settings = dict(get_config().d)
    problems = config_faults(config, settings, ROOT / "nbs")
    problems += check(source, out, config, settings, ROOT, exported(ROOT))
    if problems:
        sys.exit("\n".join(problems) + f"\n{len(problems)} faults. The pages as they are: _docs/index.html")
    count = len(list(out.rglob("*.html")))
    print(f"{count} pages: links, anchors, images, equations and references hold. Preview: _docs/index.html")


if __name__ == "__main__":
    main()
