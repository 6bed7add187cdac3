"""What `make test` runs: notebooks clean, modules and README in sync, lint, types, the site's pages,
every notebook, every test.

Each step compares the tree with itself before the step, so that unfinished work of yours does not fail it."""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CODE = ("nbs", "delta_llava", "tests", "tools", "benchmarks")
CONVERT = """\
from delta_llava.assets import default_llm, default_tower, resolve
print(resolve(default_tower()), resolve(default_llm()), sep="\\n")
"""


def snapshot() -> dict[str, str]:
    "Content hash of every file that git tracks or would track."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [f for f in listed.split("\0") if f and (ROOT / f).is_file()]
    return {f: hashlib.sha1((ROOT / f).read_bytes()).hexdigest() for f in files}


def run(title: str, *cmd: str, **env: str) -> None:
    "Run one command in the root, or stop here."
    print(f"\n--- {title}", flush=True)
    program = shutil.which(cmd[0], path=BIN) or cmd[0]
    code = subprocess.run([program, *cmd[1:]], cwd=ROOT, env=os.environ | env).returncode
    if code:
        sys.exit(f"\n{title}: failed (exit code {code}). Again, alone: {' '.join(cmd)}")


def unchanged(title: str, advice: str, *cmd: str, **env: str) -> None:
    "Run one command that should leave every file as it was."
    before = snapshot()
    run(title, *cmd, **env)
    after = snapshot()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if changed:
        sys.exit(f"\n{title}: failed. These files changed:\n  " + "\n  ".join(changed) + f"\n{advice}")


def in_sync() -> None:
    "The steps that need no model: notebooks, modules and README agree."
    unchanged(
        "notebooks clean", "nbdev_clean has cleaned them: look at the diff and commit it.", "nbdev_clean"
    )
    unchanged(
        "modules in sync",
        "nbdev_export has written them from the notebooks: commit them; edit notebooks, not modules.",
        "nbdev_export",
    )
    unchanged(
        "README in sync",
        "It was written from nbs/index.ipynb: commit it.",
        "python",
        "tools/make_readme.py",
    )


def code_style() -> None:
    "Lint, format and types, of notebooks and files alike."
    run("lint", "ruff", "check", *CODE)
    written = [folder for folder in CODE if folder != "delta_llava"]  # nbdev writes that one
    run("format (mend it with: ruff format)", "ruff", "format", "--check", "--quiet", *written)
    known = "mypy-baseline filter --hide-stats"  # errors of mypy-baseline.txt; new ones fail
    run("types", "bash", "-c", f"PATH={BIN}:$PATH; mypy --no-error-summary | {known}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync", action="store_true", help="stop before the notebooks and tests run")
    parser.add_argument(
        "--flag", choices=["slow", "net"], help="run the cells and tests with this flag as well"
    )
    args = parser.parse_args()

    in_sync()
    code_style()
    if args.sync:
        print("In sync.")
        return

    offline = {} if args.flag == "net" else {"HF_HUB_OFFLINE": "1"}
    notebook_flags = ["--flags", args.flag] if args.flag else []
    test_flags = [f"--{args.flag}"] if args.flag else []
    workers = max(2, min(4, os.cpu_count() or 2))
    unchanged(
        "pages of the site",
        "The check writes to _proc/ and _docs/ alone.",
        "python",
        "tools/check_docs.py",
        OMP_NUM_THREADS="1",
    )
    run("weights converted, once", "python", "-c", CONVERT)
    unchanged(
        "notebooks run",
        "A notebook must leave nothing behind: let it write to a temporary folder.",
        *("nbdev_test", "--n_workers", str(workers), "--timing", *notebook_flags),
        OMP_NUM_THREADS="1",
        **offline,
    )
    notebooks = [p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb")]
    ran = [p for p in notebooks if not any(part[0] in "._" for part in p.parts)]
    print(f"{len(ran)} notebooks passed")
    unchanged(
        "tests",
        "A test must leave nothing behind: use pytest's tmp_path.",
        *("python", "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *test_flags),
        OMP_NUM_THREADS="1",  # a core for each worker
        **offline,
    )


if __name__ == "__main__":
    main()
