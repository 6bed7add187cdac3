"""Run notebooks as `nbdev_test` does, and compare the text of each output with the committed one.

    python tools/check_outputs.py                     # all notebooks
    python tools/check_outputs.py nbs/26_flops.ipynb  # one of them

Numbers may differ by one unit of their last printed digit, because processors round differently. A cell whose
output changes from run to run, such as a time, begins with `#| output: varies`. Cells that `nbdev_test`
leaves out keep their outputs and are not compared, nor are pictures, progress bars and warnings.
"""

import argparse
import difflib
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIES = "#| output: varies"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
LINE = re.compile(r"(?<=\.py)#L\d+")  # of a link to the source, which moves with every change above it
TEXTS = ("text/markdown", "text/plain")  # of an output that has both, the first is shown


def text_of(output: dict) -> str:
    "The text of one output; empty for pictures and for stderr."
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        return ""
    return next(("".join(data[kind]) for kind in TEXTS if kind in data), "")


def cell_texts(notebook) -> list[str]:
    "The text of each cell's outputs."
    return ["".join(map(text_of, cell.get("outputs", []))) for cell in notebook.cells]


def last_digit(number: str) -> float:
    "One unit of the last printed digit."
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def same_text(committed: str, found: str) -> bool:
    "Whether two texts agree, numbers within one unit of their last printed digit."
    committed, found = LINE.sub("", committed), LINE.sub("", found)
    if NUMBER.sub("#", committed) != NUMBER.sub("#", found):
        return False
    for old, new in zip(NUMBER.findall(committed), NUMBER.findall(found), strict=True):
        if old != new and ("." not in old + new or abs(float(old) - float(new)) > 1.01 * last_digit(old)):
            return False
    return True


def difference(committed: str, found: str) -> str:
    "The lines that differ."
    lines = difflib.unified_diff(committed.splitlines(), found.splitlines(), n=0)
    return "\n".join(line[:160] for line in list(lines)[3:23])


def check_notebook(path: Path) -> list[str]:  # A message for each cell that differs
    "Run a notebook and compare."
    sys.path.insert(0, str(ROOT))
    os.environ["IN_TEST"] = "1"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    os.chdir(path.parent)
    notebook = NBProcessor(path, process=True).nb
    committed = cell_texts(notebook)
    skipped = set(get_config().tst_flags.split())

    def is_left_out(cell) -> bool:
        directives = getattr(cell, "directives_", None) or {}
        never = directives.get("eval:", [""])[0].lower() == "false"
        return cell.cell_type != "code" or never or bool(skipped & directives.keys())

    shell = CaptureShell(path)
    try:
        shell.run_all(notebook, exc_stop=True, preproc=is_left_out)
    except Exception:
        return [shell.prettytb(fname=path)]
    messages = []
    for number, (cell, old, new) in enumerate(
        zip(notebook.cells, committed, cell_texts(notebook), strict=True)
    ):
        if VARIES not in cell.source and not same_text(old, new):
            messages.append(f"{path.relative_to(ROOT)}, cell {number}:\n{difference(old, new)}")
    return messages


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="without them all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="notebooks at a time")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebooks]
    if not paths:
        found = (ROOT / "nbs").rglob("*.ipynb")
        paths = sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), max_tasks_per_child=1)
    failed = 0
    with pool:
        waiting = {pool.submit(check_notebook, path): path for path in paths}
        for done in as_completed(waiting):
            messages = done.result()
            failed += bool(messages)
            print(waiting[done].relative_to(ROOT), "differs" if messages else "agrees", flush=True)
            print(*messages, sep="\n", end="\n" if messages else "")
    if failed:
        sys.exit(
            f"{failed} of {len(paths)} notebooks print something else than what is committed. Run them again."
        )


if __name__ == "__main__":
    main()
