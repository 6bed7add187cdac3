"""What is left to do on the notebooks that nbdev has processed, before Quarto or the preview shows them.

In the API blocks: what each argument and field means as a list below the signature, where formulas and
references are set; `class` in front of classes; no links inside code. In cells: numbers of equations and
figures in place of their labels, imports folded. In text: the alt text of an image that stands alone.
"""

import ast
import re
from pathlib import Path

import nbformat

FENCED, LINKED = re.compile(r"(?sm)^(`{3,}).*?^\1"), re.compile(r"\[(`[^`\n]+`)\]\([^)\n]*\)")
SIGNATURE = re.compile(r"(?sm)^```python\n(?:def|class) (?P<name>[\w.]+)\((?P<rest>.*?)^```$")
REMARK = re.compile(r"^(?P<code>    \*{0,2}(?P<name>\w+)[^#]*?) # (?P<text>.+)$")
RESULT = re.compile(r"^(?P<code>\).*?:) # (?P<text>.+)$")
MODULES = re.compile(r"\b(?:__main__|collections\.abc|delta_llava(?:\.\w+)*)\.(?=[A-Z])")
LABEL = re.compile(r"(?m)\{#((?:eq|fig|tbl|sec)-[\w-]+)|^#\|\s*label:\s*((?:fig|tbl)-[\w-]+)")
CITED = re.compile(r"(?<!\w)@((eq|fig|tbl)-[\w-]+)")
WORDS = {"eq": "Eq.", "fig": "Figure", "tbl": "Table"}
FOLD = re.compile(r'\A#\| code-fold: show\n#\| code-summary: "Exported source"\n')
ALONE = re.compile(r"(?m)^(\[?)!\[([^\]\n]+)\]\(([^)\n]+)\)(\]\([^)\n]+\))?$")
METHOD = re.compile(r"(\(https?://[^)\s]+#\w+)\.\w+(?=\))")
FOLDED = '#| code-fold: true\n#| code-summary: "Imports of the module"\n'


def class_fields(root: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    "For each class of the package: its bases, and what the comments beside its fields say."
    found = {}
    for path in sorted((root / "delta_llava").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            remarks = {}
            for item in node.body:
                line = lines[item.end_lineno - 1][item.end_col_offset :] if item.end_lineno else ""
                if isinstance(item, ast.AnnAssign) and "# " in line:
                    remarks[item.target.id] = line.split("# ", 1)[1].strip()
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            found[node.name] = (bases, remarks)
    return found


def remarks_of(name: str, classes: dict[str, tuple[list[str], dict[str, str]]]) -> dict[str, str]:
    "The remarks on the fields of a class, those of its bases first."
    bases, own = classes.get(name, ((), {}))
    inherited = {}
    for base in bases:
        inherited |= remarks_of(base, classes)
    return inherited | own


def argument_list(remarks: dict[str, str]) -> str:
    "The meaning of arguments and result as a list. Methods have no anchor: links to them lead to the class."
    result = remarks.pop("return", None)
    items = [f"- `{argument}`: {remark}" for argument, remark in remarks.items()]
    items += [f"- returns: {result}"] if result else []
    return METHOD.sub(r"\1", "\n".join(items))


def api_block(text: str, classes: dict[str, tuple[list[str], dict[str, str]]], source_follows: bool) -> str:
    """One block of `show_doc` in which the meaning of each argument stands below the signature. A signature
    that the source repeats is left out, unless a class inherits some of its fields."""
    match = SIGNATURE.search(text)
    if not match:
        return text
    name, remarks, lines = match["name"], {}, []
    for line in match["rest"].splitlines():
        if found := REMARK.match(line) or RESULT.match(line):
            remarks[found.groupdict().get("name") or "return"] = found["text"]
            line = found["code"]
        lines.append(line)
    code = MODULES.sub("", LINKED.sub(r"\1", "\n".join(lines)))
    own = classes.get(name, ((), {}))[1]
    fields = remarks_of(name, classes)
    if name in classes:
        code = re.sub(r"\)(?:->None)?:\s*\Z", ")", code.rstrip())
    named = {field: remark for field, remark in fields.items() if re.search(rf"[ (]{field}:", code)}
    keyword = "class" if name in classes else "def"
    repeated = source_follows and named.keys() <= own.keys()
    block = "" if repeated else f"```python\n{keyword} {name}({code.rstrip()}\n```"
    before, after = text[: match.start()].strip("\n"), text[match.end() :].strip("\n")
    parts = (before, block, after, argument_list(named | remarks))
    return "\n\n".join(part for part in parts if part)


def label_numbers(nb: nbformat.NotebookNode) -> dict[str, int]:
    "The number that each label of a page gets: equations, figures and tables are counted apart."
    numbers = {}
    for cell in nb.cells:
        for pair in LABEL.findall(cell.source):
            label = pair[0] or pair[1]
            kind = label.split("-")[0]
            numbers.setdefault(label, sum(other.split("-")[0] == kind for other in numbers) + 1)
    return numbers


def code_cell(source: str, numbers: dict[str, int]) -> str:
    "The source of a code cell with numbers in place of labels; exported lines are open, imports are folded."

    def number(match):
        known = match[1] in numbers
        return f"{WORDS[match[2]]} {numbers[match[1]]}" if known else match[0]

    lines = source.split("\n")
    source = "\n".join(line if line.startswith("#|") else CITED.sub(number, line) for line in lines)
    code = FOLD.sub("", source)
    if code == source:
        return source
    tree = parsed(code)
    only_imports = tree.body and all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
    return FOLDED + code if only_imports else code


def parsed(code: str) -> ast.Module:
    "The tree of a cell, empty for one that is not plain Python."
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def shown_name(cell: nbformat.NotebookNode) -> str | None:
    "What a cell of `show_doc` documents."
    found = re.search(r"^show_doc\(([\w.]+)", cell.source, re.M) if cell.cell_type == "code" else None
    return found[1] if found else None


def documented_first(page: list[nbformat.NotebookNode]) -> tuple[list[nbformat.NotebookNode], set[str]]:
    "The cells with each exported cell behind the blocks of what it defines, and the names of these."
    ordered, pending, names = [], list(page), set()
    while pending:
        cell = pending.pop(0)
        defined = []
        if cell.cell_type == "code" and FOLD.match(cell.source):
            body = parsed(FOLD.sub("", cell.source)).body
            defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        blocks = {}
        for cells, end in ((pending, 0), (ordered, -1)):
            while cells and shown_name(cells[end]) in defined:
                block = cells.pop(end)
                blocks[shown_name(block)] = block
        ordered += [blocks[name] for name in defined if name in blocks]
        names |= blocks.keys()
        ordered.append(cell)
    return ordered, names


def alone(match: re.Match) -> str:
    "An image that is a paragraph of its own: Quarto would make its text a caption and set no alt text."
    opened, alt, target, closed = match.groups()
    attribute = 'fig-alt="{}"'.format(alt.replace('"', "'"))
    return f"{opened}![]({target}){{{attribute}}}{closed or ''}"


def shape(nb: nbformat.NotebookNode, classes: dict[str, tuple[list[str], dict[str, str]]]) -> None:
    "One processed notebook, in place and once."
    if nb.metadata.get("shaped"):
        return
    nb.metadata["shaped"] = True
    numbers = label_numbers(nb)
    nb.cells, with_source = documented_first(nb.cells)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts = re.split(r"(?sm)(^`{3,}.*?^`{3,})", cell.source)
            cell.source = "".join(p if p.startswith("```") else ALONE.sub(alone, p) for p in parts)
        if cell.cell_type != "code":
            continue
        # nbdev has run the cells with imports, and kept what they warned of
        cell.outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        symbol = shown_name(cell)
        cell.source = code_cell(cell.source, numbers)
        for output in cell.outputs:
            if "text/markdown" not in output.get("data", {}):
                continue
            text = "".join(output.data["text/markdown"])
            text = api_block(text, classes, symbol in with_source) if symbol else ALONE.sub(alone, text)
            output.data["text/markdown"] = FENCED.sub(lambda code: LINKED.sub(r"\1", code[0]), text)


def shape_folder(folder: Path, root: Path) -> None:
    "Every processed notebook below `folder`."
    classes = class_fields(root)
    for path in sorted(folder.rglob("*.ipynb")):
        nb = nbformat.read(path, 4)
        if not nb.metadata.get("shaped"):
            shape(nb, classes)
            nbformat.write(nb, path)
