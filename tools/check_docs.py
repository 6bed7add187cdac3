"""Check the pages of the site without Quarto: nbdev's own processing, then pandoc, then what a reader would
stumble over.

`make docs` runs this where Quarto is missing, `make test` always. The pages stay in _docs/ as a plain
preview; the site itself is Quarto's. Each failure names page, cell and the way to mend it.
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
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pypandoc
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = {"eq": "Eq.", "fig": "Figure", "tbl": "Table", "sec": "Section"}
REFERENCE = re.compile(
    r"(?s)(?P<fence>`{3,}).*?(?P=fence)|`[^`\n]*`|(?<!\w)@(?P<at>(?:eq|fig|tbl|sec)-[\w-]+)"
)
FENCED, LINKED = re.compile(r"(?sm)^(`{3,}).*?^\1"), re.compile(r"\[(`[^`\n]+`)\]\([^)\n]*\)")
LEFTOVER = re.compile(r"\]\(|\$\$|:::|\n *(?:[-*]|\d+\.) \S|\*\*\S|\{[#.]|(?<!\w)@(?:eq|fig|tbl|sec)-")
TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><meta name="description" content="{description}"><link rel="stylesheet" href="{up}styles.css"><style>
:root{{color-scheme:light dark}} body{{font:16px/1.5 sans-serif;margin:0;display:flex;flex-wrap:wrap}} nav{{flex:0 0 14rem;padding:1rem;font-size:.9em}} nav ul{{padding-left:1rem}}
main{{flex:1 1 20rem;min-width:0;max-width:50rem;padding:1rem;box-sizing:border-box}} pre{{overflow:auto;padding:.5rem;background:#8882}} img{{max-width:100%}} [class*=callout]{{border-left:4px solid #48c;padding-left:1rem}} [class*=callout]::before{{content:attr(title);font-weight:bold}}
@media (max-width: 40rem) {{nav{{order:2}}}} body.quarto-dark{{color-scheme:dark;background:#222;color:#ddd}} body.quarto-dark a{{color:#6bf}} body.quarto-light{{color-scheme:light}}</style>
<body class="quarto-light"><script>document.body.className = matchMedia("(prefers-color-scheme: dark)").matches ? "quarto-dark" : "quarto-light"</script>
<nav>{nav}</nav><main><h1 class="title">{title}</h1><p class="subtitle">{description}</p>{body}</main></body></html>"""


def front(nb: nbformat.NotebookNode) -> dict:
    "What nbdev made of a notebook's title cell."
    first = nb.cells[0] if nb.cells else None
    found = re.search(r"^---\n(.*?)\n---", first.source, re.S) if first and first.cell_type == "raw" else None
    return yaml.safe_load(found[1]) if found else {}


def outputs(cell: nbformat.NotebookNode, options: dict, page: Path, n: int) -> str:
    "A cell's outputs as Markdown; pictures become files beside the page."
    parts, plain = [], []
    for k, out in enumerate(cell.get("outputs", [])):
        data = out.get("data", {})
        if kind := next((m for m in ("image/png", "image/jpeg") if m in data), None):
            image = page.parent / f"{page.stem}_files" / f"{n}-{k}.{kind[6:]}"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(base64.b64decode(data[kind]))
            alt, label = (
                str(options.get("fig-alt", "")).replace('"', "&quot;"),
                f" #{options['label']}" if "label" in options else "",
            )
            parts.append(
                f'![{options.get("fig-cap", "")}]({image.parent.name}/{image.name}){{alt="{alt}"{label}}}'
            )
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif "text/html" in data:
            parts.append(f"```{{=html}}\n{''.join(data['text/html'])}\n```")
        elif text := "".join(out.get("text", "") or data.get("text/plain", "")):
            parts.append(f"``````\n{text.rstrip()}\n``````")
    return "\n\n".join(parts)


def markdown(nb: nbformat.NotebookNode, page: Path, faults: list) -> str:
    "One page as pandoc's Markdown, each cell in a division that carries its number; labels get theirs."
    texts, labels = {}, {}
    for n, cell in enumerate(nb.cells):
        text, found = cell.source, []
        if cell.cell_type == "code":
            lines = re.findall(r"^#\|\s*([\w-]+: .*)$", text, re.M)
            options = yaml.safe_load("\n".join(lines)) or {}
            code = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip()
            text = f"``````python\n{code}\n``````\n\n" if code and options.get("echo") is not False else ""
            text = text + outputs(cell, options, page, n) if options.get("include") is not False else ""
            found = [options["label"]] if "label" in options else []
            if found and not found[0].startswith(("fig-", "tbl-")):
                faults.append((cell, f"label {found[0]!r} on a cell: it must begin with fig- or tbl-"))
        elif cell.cell_type == "markdown":
            found = re.findall(r"\{#((?:eq|fig|tbl|sec)-[\w-]+)", text)
            faults += [
                (cell, f"label {label!r} on an equation: it must begin with eq-")
                for label in re.findall(r"\$\$\s*\{#([\w-]+)", text)
                if not label.startswith("eq-")
            ]
        else:
            continue
        for label in found:
            if label in labels:
                faults.append((cell, f"label {label!r} is used twice on this page: rename one"))
            labels.setdefault(label, sum(other[:3] == label[:3] for other in labels) + 1)
        texts[n] = text
    parts = []
    for n, text in texts.items():

        def refer(match):
            if match["at"] is None:
                return match[0]  # code stays as it is
            if match["at"] not in labels:
                faults.append(
                    (
                        nb.cells[n],
                        f"{match[0]} refers to nothing on this page: label it with #{match['at']}, or link to the page that has it",
                    )
                )
            return f"[{PREFIXES[match['at'].split('-')[0]]} {labels.get(match['at'], '?')}](#{match['at']})"

        text = re.sub(
            r"\$\$\s*\{#(eq-[\w-]+)\}", lambda m: rf"\qquad ({labels[m[1]]}) $$ []{{#{m[1]}}}", text
        )
        text = REFERENCE.sub(refer, text)
        parts.append(f'::::::: {{data-cell="{n}"}}\n{text}\n:::::::')
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


def leads_nowhere(
    target: str,
    page: Path,
    out: Path,
    pages: dict[str, str],
    anchors: dict[Path, set],
    site: str,
    repo: str,
    root: Path,
) -> str:
    "Why a link of a page would fail, or nothing."
    if inside := re.match(re.escape(repo) + r"/(?:blob|tree|raw)/[^/]+/([^#?]+)", target):
        return "" if (root / unquote(inside[1])).exists() else f"{inside[1]} does not exist in the repository"
    if target.startswith(site):
        target, page = target[len(site) :].lstrip("/") or "index.html", out / "index.html"
    elif re.match(r"[a-z]+:", target):
        return ""
    path, anchor = urldefrag(target)
    file = (page.parent / unquote(path)).resolve() if path else page
    if not file.is_relative_to(out):
        return f"{path} lies outside the site: give its address in the repository"
    if file.suffix == ".ipynb":
        file = out / pages.get(file.relative_to(out).as_posix(), "?")
    if not file.exists():
        return f"{path} does not exist"
    return (
        f"{file.name} has no anchor #{anchor}"
        if anchor and file in anchors and unquote(anchor) not in anchors[file]
        else ""
    )


def examine(soup: BeautifulSoup, where: Callable, faults: list) -> None:
    "What is wrong inside one page, apart from its links."
    for image in soup.find_all("img"):
        if not image.get("alt", "").strip():
            faults.append(
                (
                    where(image),
                    f"picture {image.get('src')} without alt text: `#| fig-alt:` in a code cell, ![what it shows](…) in Markdown",
                )
            )
    for tag in soup.find_all(["p", "li", "td", "figcaption", "h1", "h2", "h3"]):
        text = "".join(
            s for s in tag.find_all(string=True) if not s.find_parent(["code", "pre", "math", "annotation"])
        )
        if found := LEFTOVER.search(text):
            faults.append(
                (
                    where(tag),
                    f"markup left as text: {text[max(0, found.start() - 15) : found.end() + 25].strip()!r}; mend the markup; a list or ::: wants an empty line before it",
                )
            )


def check(
    source: Path, out: Path, config: dict, settings: dict, root: Path, names: dict[str, list[str]]
) -> list[str]:
    "Write the preview of processed notebooks in `source` to `out`, and return every fault."
    shutil.rmtree(out, ignore_errors=True)
    found = sorted(p for p in source.rglob("*.ipynb") if (root / "nbs" / p.relative_to(source)).exists())
    books = {p.relative_to(source).as_posix(): nbformat.read(p, 4) for p in found}
    about = {name: front(nb) for name, nb in books.items()}
    pages = {
        name: (Path(name).parent / about[name].get("output-file", f"{Path(name).stem}.html")).as_posix()
        for name in books
    }
    sidebar = config["website"]["sidebar"]["contents"]
    problems = [
        f"_quarto.yml: sidebar names {name}, which does not exist: remove it"
        for name in listed_notebooks(sidebar)
        if name not in books
    ]
    problems += [
        f"_quarto.yml: the sidebar does not name {name}: list it"
        for name in books
        if name not in listed_notebooks(sidebar)
    ]
    problems += [
        f"nbs/{name}: no {what}: the first cell wants `# Title`, then `> one sentence`"
        for name in books
        for what in ("title", "description")
        if not about[name].get(what)
    ]
    if (image := config["website"].get("image")) and not (source / image).exists():
        problems.append(f"_quarto.yml: image {image} does not exist under nbs/")
    for name in books:  # nbdev takes title and description from the title cell and drops what else it holds
        title = nbformat.read(root / "nbs" / name, 4).cells[0].source
        if re.sub(r"\A# .*\n+> .*(\n> .*)*", "", title).strip():
            problems.append(
                f"nbs/{name}: the site leaves out what follows title and description in the first cell: give it a cell of its own"
            )
    for p in source.rglob("*"):
        if p.is_file() and p.suffix != ".ipynb":
            (
                (out / p.relative_to(source)).parent.mkdir(parents=True, exist_ok=True),
                shutil.copy(p, out / p.relative_to(source)),
            )

    titles = {name: (pages[name], about[name].get("title") or name) for name in books}
    faults = {name: [] for name in books}
    texts = {name: markdown(nb, out / pages[name], faults[name]) for name, nb in books.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(texts, pool.map(pandoc, texts.values())))
    soups = {name: BeautifulSoup(body, "html.parser") for name, (body, _) in done.items()}
    anchors = {out / pages[name]: {t["id"] for t in soup.find_all(id=True)} for name, soup in soups.items()}
    for name, soup in soups.items():
        page, up = out / pages[name], "../" * pages[name].count("/")
        page.parent.mkdir(parents=True, exist_ok=True)
        body = re.sub(
            r'href="([^":]+)\.ipynb',
            lambda m: (
                f'href="{os.path.relpath(out / pages.get(os.path.normpath(os.path.join(os.path.dirname(name), m[1] + ".ipynb")), "?"), page.parent)}'
            ),
            done[name][0],
        )
        page.write_text(
            TEMPLATE.format(
                title=html.escape(titles[name][1]),
                description=html.escape(about[name].get("description") or ""),
                up=up,
                nav=navigation(sidebar, titles, up),
                body=body,
            ),
            encoding="utf-8",
        )
    for name, soup in soups.items():
        page, nb = out / pages[name], books[name]

        def where(tag):
            return (
                nb.cells[int(holder["data-cell"])]
                if (holder := tag.find_parent(attrs={"data-cell": True}))
                else None
            )

        examine(soup, where, faults[name])
        for tag in soup.find_all(["a", "img"]):
            target = tag.get("href") or tag.get("src") or ""
            why = (
                leads_nowhere(
                    target,
                    page,
                    out,
                    pages,
                    anchors,
                    settings["doc_host"] + settings["doc_baseurl"],
                    settings["git_url"],
                    root,
                )
                if target
                else ""
            )
            if why:
                faults[name].append((where(tag), f"link to {target}: {why}"))
        faults[name] += [
            (None, f"pandoc: {line.strip()}") for line in done[name][1].splitlines() if line.strip()
        ]
        faults[name] += [
            (
                None,
                f"{symbol} is exported and has no heading on this page: see that its cell says `#| export` and not `#| hide`",
            )
            for symbol in names.get(name, ())
            if symbol.lower() not in anchors[page]
        ]
    for name, rows in faults.items():
        for cell, what in rows:
            spot = (
                f", cell {cell.get('id', '')} ({cell.source.strip().splitlines()[0][:60] if cell.source.strip() else 'empty'})"
                if cell
                else ""
            )
            problems.append(f"nbs/{name}{spot}: {what}")
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


def unlink(folder: Path) -> None:
    "nbdev links names inside code as well, where the link's text would be shown: take these links out."
    for path in folder.rglob("*.ipynb"):
        nb, changed = nbformat.read(path, 4), False
        for out in (
            o for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})
        ):
            text = "".join(out.data["text/markdown"])
            out.data["text/markdown"] = FENCED.sub(lambda code: LINKED.sub(r"\1", code[0]), text)
            changed |= out.data["text/markdown"] != text
        if changed:
            nbformat.write(nb, path)


def main() -> None:
    os.chdir(ROOT)
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs

    try:
        source = Path(proc_nbs(n_workers=max(2, min(4, os.cpu_count() or 2))))
    except Exception as error:
        sys.exit(
            f"nbdev could not process a notebook, which would stop the site too (it runs imports and exported cells alone): {error}\n{error.__cause__ or ''}"
        )
    unlink(source)
    problems = check(
        source,
        ROOT / "_docs",
        yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")),
        dict(get_config().d),
        ROOT,
        exported(ROOT),
    )
    if problems:
        sys.exit("\n".join(problems) + f"\n{len(problems)} faults. The pages as they are: _docs/index.html")
    print(
        f"{len(list((ROOT / '_docs').rglob('*.html')))} pages: links, anchors, pictures, equations and references hold. Preview: _docs/index.html"
    )


if __name__ == "__main__":
    main()
