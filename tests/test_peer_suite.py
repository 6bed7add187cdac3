"""Transformers' own common tests of models, pipelines and processors, on LLaVA and on ours.

`data/peer/differences.json` gives the reason for each test that LLaVA passes and ours does not. Its names may
hold `*`. Entries with `may_pass` are of tests whose outcome depends on their random numbers."""

import json
import os
import re
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).resolve().parent
PEER = TESTS / "data" / "peer"
COMPRESSORS = ["delta", "prumerge", "quecc", "fastv"]
PINNED = re.search(r'"transformers==([\d.]+)"', (TESTS.parent / "pyproject.toml").read_text())[1]
DIFFERENCES = json.loads((PEER / "differences.json").read_text())
MISSING = {  # what the tests import, and the source distribution lacks
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/pipelines/__init__.py": "",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url\n",
}
ADAPTER = {  # file here: where it goes
    "parts.py": ["tests/parts.py"],
    "modeling.py": ["tests/test_modeling_delta_llava.py"],
    "processing.py": ["tests/test_processing_delta_llava.py"],
    "pipelines.py": [
        f"tests/pipelines/test_pipelines_{task}.py" for task in ("image_text_to_text", "any_to_any")
    ],
}
pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(
        version("transformers") != PINNED, reason=f"the differences are those from transformers {PINNED}"
    ),
]


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *args], check=True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    "The unpacked source distribution, with the adapter in its tests."
    folder = tmp_path_factory.mktemp("peer")
    source = ["--no-deps", "--no-build-isolation", "--no-binary=:all:", f"transformers=={PINNED}"]
    pip("download", "--quiet", *source, "-d", str(folder))
    pip("install", "--quiet", "--no-deps", "--target", str(folder / "packages"), "parameterized")
    with tarfile.open(folder / f"transformers-{PINNED}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    root = folder / f"transformers-{PINNED}"
    files = {path: text for path, text in MISSING.items()}
    files |= {path: (PEER / name).read_text() for name, paths in ADAPTER.items() for path in paths}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def outcomes(root, module, peer):
    "Test -> passed, failed or skipped."
    report = root / f"{module}-{peer}.xml"
    paths = [root, root.parent / "packages", TESTS.parent, TESTS]
    environment = os.environ | dict(
        PEER=peer,
        PYTHONPATH=os.pathsep.join(map(str, paths)),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={root}",
        "-c",
        os.devnull,
    ]
    command += [f"--junitxml={report}", f"tests/test_{module}_delta_llava.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        found[case.get("name")] = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    assert len(found) > 60, done.stdout[-3000:]
    return found


@pytest.fixture(scope="module")
def llavas(suite):
    "What LLaVA itself does here, for each module; tests of models may need what this machine has not."
    return {module: outcomes(suite, module, "llava") for module in ("modeling", "processing")}


@pytest.mark.parametrize("peer", COMPRESSORS)
@pytest.mark.parametrize("module", ["modeling", "processing"])
def test_what_llava_passes_ours_passes(module, peer, suite, llavas):
    llava, ours = llavas[module], outcomes(suite, module, peer)
    differ = {test for test, how in llava.items() if how == "passed" and ours.get(test) != "passed"}
    differ |= {test for test, how in ours.items() if how == "failed" and llava.get(test) != "failed"}
    entries = DIFFERENCES[module].items()
    expected = {test: entry for test, entry in entries if peer in entry.get("compressors", COMPRESSORS)}
    assert all(entry["reason"] for entry in expected.values())
    new = {test: f"LLaVA {llava.get(test)}, ours {ours.get(test)}" for test in differ}
    new = {test: how for test, how in new.items() if not any(fnmatch(test, name) for name in expected)}
    assert not new, "no reason is known; give one in data/peer/differences.json, or mend them"
    always = {name for name, entry in expected.items() if not entry.get("may_pass")}
    gone = sorted(name for name in always if not any(fnmatch(test, name) for test in differ))
    assert not gone, "these pass now; take them out of data/peer/differences.json"


def test_llava_passes_most(llavas):
    "A suite that skips everything would find no difference."
    for module, least in dict(modeling=100, processing=30).items():
        assert sum(how == "passed" for how in llavas[module].values()) >= least
