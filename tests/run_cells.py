"""`run_cells.py NOTEBOOK SPEC`: run a notebook's code cells where its reader sits, in its own folder.

SPEC is JSON: `keep`, texts one of which a cell must hold; `skip`, texts that it must not hold; `after`, code
that runs after the cells that hold a text."""

import json
import os
import sys
from pathlib import Path

import matplotlib


def main(path, spec):
    matplotlib.use("agg")
    path, spec = Path(path).absolute(), json.loads(spec)
    os.chdir(path.parent)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        kept = any(text in source for text in spec.get("keep", [""]))
        if cell["cell_type"] != "code" or not kept or any(text in source for text in spec.get("skip", [])):
            continue
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        for text, code in spec.get("after", {}).items():
            if text in source:
                exec(code, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
