"""What `make test` runs: notebooks clean, modules and README in sync, the site's pages, every notebook, every test.

Each step compares the tree with itself before the step, so that unfinished work of yours does not fail it."""
import argparse, hashlib, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def snapshot() -> dict[str, str]:
    "Content hash of every file that git tracks or would track."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [f for f in listed.split("\0") if f and (ROOT/f).is_file()]
    return {f: hashlib.sha1((ROOT/f).read_bytes()).hexdigest() for f in files}


def run(title: str, *cmd: str, **env: str) -> None:
    "Run one command in the root, or stop here."
    print(f"\n--- {title}", flush=True)
    program = shutil.which(cmd[0], path=BIN) or cmd[0]
    code = subprocess.run([program, *cmd[1:]], cwd=ROOT, env=os.environ | env).returncode
    if code: sys.exit(f"\n{title}: failed (exit code {code}). Again, alone: {' '.join(cmd)}")


def unchanged(title: str, advice: str, *cmd: str, **env: str) -> None:
    "Run one command that should leave every file as it was."
    before = snapshot()
    run(title, *cmd, **env)
    after = snapshot()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if changed: sys.exit(f"\n{title}: failed. These files changed:\n  " + "\n  ".join(changed) + f"\n{advice}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync", action="store_true", help="stop before the notebooks and tests run")
    parser.add_argument("--flag", choices=["slow", "net"], help="run the cells and tests with this flag as well")
    args = parser.parse_args()

    unchanged("notebooks clean", "nbdev_clean has cleaned them: look at the diff and commit it.", "nbdev_clean")
    unchanged("modules in sync", "nbdev_export has written them from the notebooks: commit them; edit notebooks, not modules.", "nbdev_export")
    unchanged("README in sync", "It was written from nbs/index.ipynb: commit it.", "python", "tools/make_readme.py")
    if args.sync: return print("In sync.")

    offline = {} if args.flag == "net" else {"HF_HUB_OFFLINE": "1"}
    flags = ["--flags", args.flag] if args.flag else []
    workers = max(2, min(4, os.cpu_count() or 2))
    unchanged("pages of the site", "The check writes to _proc/ and _docs/ alone.", "python", "tools/check_docs.py", OMP_NUM_THREADS="1")
    run("weights converted, once", "python", "-c", "from delta_llava.assets import default_llm, default_tower, resolve; print(resolve(default_tower()), resolve(default_llm()), sep='\\n')")
    unchanged("notebooks run", "A notebook must leave nothing behind: let it write to a temporary folder.",
              "nbdev_test", "--n_workers", str(workers), "--timing", *flags, OMP_NUM_THREADS="1", **offline)
    ran = [p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT/"nbs").parts)]
    print(f"{len(ran)} notebooks passed")
    unchanged("tests", "A test must leave nothing behind: use pytest's tmp_path.",
              "python", "-m", "pytest", "-q", *([f"--{args.flag}"] if args.flag else []), **offline)


if __name__ == "__main__": main()
