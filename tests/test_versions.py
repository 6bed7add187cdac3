"""The package works with the lowest and the newest versions that its ranges admit, without the lock file.

Run by `pytest --net tests/test_versions.py`. DELTA_LLAVA_VENVS names a folder that keeps the environments."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ["test_vlm.py", "test_adapter.py", "test_parity_fastv.py", "test_projector.py"]
pytestmark = pytest.mark.net


def requirements() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def lowest(requirement: str) -> str:
    "`package>=1.2,<2` becomes `package==1.2.*`, the lowest release line that the range admits."
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)(.*)", requirement)
    if found is None:
        return requirement
    package, low, _ = found.groups()
    return f"{package}=={low}.*" if low.count(".") < 2 else f"{package}=={low}"


FREE = {"safetensors", "sentencepiece"}  # transformers itself asks for newer ones than our floor


def lowest_set() -> list[str]:
    pinned = [r if r.split(">")[0] in FREE else lowest(r) for r in requirements()]
    return [*pinned, "torchvision==0.23.*"]


def newest_set() -> list[str]:
    return [*requirements(), "torchvision"]


SETS = {"lowest": lowest_set, "newest": newest_set}


def run(*command, **env):
    environ = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | env
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", SETS)
def test_core_tests_pass(name, tmp_path):
    venv = Path(os.environ.get("DELTA_LLAVA_VENVS", tmp_path)) / name
    python = venv / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, venv)
        wanted = [*SETS[name](), "pytest", "beartype"]
        run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *wanted)
    versions = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    print(run(python, "-c", versions))
    tests = [ROOT / "tests" / file for file in CORE]
    env = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, **env)
