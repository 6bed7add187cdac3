"""Every command printed in a notebook, README or CONTRIBUTING: the program accepts it, and a test runs it or
a list says why none does."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from delta_llava import cli

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = (
    "delta-llava",
    "python",
    "make",
    "pip",
    "torchrun",
    "accelerate",
    "hf",
    "nbdev_test",
    "ruff",
    "conda",
)
FIRST = re.compile(rf"(?:\w+=\S+ |\.venv(?:-eval)?/bin/)*({'|'.join(PROGRAMS)})[\w.]* ")
SHELLS = ("", "sh", "bash", "shell", "console")


def pages():
    "Name and text of every page: Markdown, and what code cells printed."
    for name in ("README.md", "CONTRIBUTING.md", "runs/README.md"):
        yield name, (ROOT / name).read_text(), ""
    for path in sorted((ROOT / "nbs").rglob("[!_]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            name, source = path.relative_to(ROOT).as_posix(), "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                yield name, source, ""
            elif cell["cell_type"] == "code":
                outputs = "".join("".join(o.get("text", "")) for o in cell["outputs"])
                shell = "\n".join(
                    line.lstrip()[1:] for line in source.splitlines() if line.lstrip()[:1] == "!"
                )
                yield name, "", f"{outputs}\n{shell}"


def commands_in(markdown, printed):
    "Commands of a page: in blocks, in code within the text, and in what was printed."
    lines = []
    fence = re.compile(r"^```(\S*)\n(.*?)^```", re.S | re.M)
    for block in fence.finditer(markdown):
        if block[1] in SHELLS:
            lines += block[2].replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", fence.sub("", markdown))
    lines += [line.removeprefix("Next: ") for line in printed.splitlines()]
    for line in lines:
        start = line.find("python -m torch.distributed.run") if "srun " in line else 0
        for part in re.split(r" (?:&&|;) ", re.sub(r"\s+#.*", "", line[max(start, 0) :])):
            part = " ".join(part.split()).removesuffix(" &")
            if FIRST.match(part) and not re.search(r"\bcommit [0-9a-f]{7}\b", part):  # or a record's command
                yield re.sub(r"^(?:\w+=\S+ )*(?:\.venv(?:-eval)?/bin/)?", "", part)


RECORDED = {
    part.strip()
    for path in (ROOT / "runs").glob("*.json")
    for part in json.loads(path.read_text()).get("command", "").split(";")
}
PRINTED = sorted({(n, c) for n, *page in pages() for c in commands_in(*page) if c not in RECORDED})
COMMANDS = sorted({command for _, command in PRINTED})


def own_words(command):
    "What follows the name of our program, however it is started; `None` for another program."
    words = shlex.split(command)
    if words[0] == "delta-llava":
        return words[1:]
    for module in ("--module", "-m"):
        for at in range(len(words) - 1):
            if words[at : at + 2] == [module, "delta_llava"]:
                return words[at + 2 :]
            if words[at : at + 2] == [module, "delta_llava.train"]:
                return words[at + 2 :]
    return None


OURS = [command for command in COMMANDS if own_words(command)]
PLACEHOLDER = re.compile(r"…|\b[A-Z]{2,}\b(?!=)")


def test_commands_are_found_where_they_stand():
    block = "```sh\nmake x  # why\nHF_HUB_OFFLINE=1 .venv/bin/python -m \\\n  a\n```"
    text = f"Type `delta-llava chat --image a.png`:\n\n{block}\n"
    started = "python -m torch.distributed.run --module delta_llava pretrain"
    printed = f"Next: delta-llava flops --tokens 4\nsrun x {started} &\nmake y, commit 0123456"
    assert list(commands_in(text, printed)) == [
        "make x",
        "python -m a",
        "delta-llava chat --image a.png",
        "delta-llava flops --tokens 4",
        started,
    ]
    assert len(OURS) > 25 and any("torch.distributed.run" in command for command in OURS)


@pytest.mark.parametrize("command", OURS)
def test_the_program_accepts_what_is_printed(command):
    "Its own parser reads the options; a command that is only named must exist."
    name, *options = own_words(command)
    assert name in cli.COMMANDS
    if options == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            cli.parse_command([name, *options])
    elif options:
        words = [re.sub("…", "x", PLACEHOLDER.sub("mlp", w) if w == "NAME" else w) for w in options]
        assert type(cli.parse_command([name, *words])).__name__


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_has_the_target(command):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert command.split()[1] in targets


# What a test runs: the command as it is printed, with these options after it.
SMALL = "--max-steps 2 --train-images 4 --test-images 2 --batch-size 2"
SMALL_RECIPE = (
    "--stage1-steps 2 --stage2-steps 2 --train-images 12 --test-images 2 --naming-images 2 "
    "--stage1-batch-size 2 --stage2-batch-size 2"
)
SHORT = {
    "quickstart": SMALL_RECIPE,
    "compare": "--max-steps 1 --train-images 4 --test-images 2 --batch-size 2",
    "train": SMALL,
    "speed": "--repeats 3 --warm-up 0 --answer 2",
    "chat": "--max-new-tokens 3",
    "gradcam": "--tokens 4",
    "tasks": "--n 2",
    "doctor": "",
    "convert": "",
    "evaluate": "",
    "launch": "",
    "flops": "",
    "pretrain": "",
}
RUN_BY = {  # part of the command -> the test that runs it
    "--tower hub:openai/clip-vit-base-patch32": "tests/test_hub.py::test_tutorial_c_trains_with_clip",
    "data/LLaVA-Pretrain/": "tests/test_hub.py::test_tutorial_d_trains_both_stages_and_its_variants",
    "data/mix665k/": "tests/test_hub.py::test_tutorial_d_trains_both_stages_and_its_variants",
    "--load-in-4bit": "tests/test_hub.py::test_tutorial_d_trains_both_stages_and_its_variants",
    "accelerate.commands.launch": "tests/test_stage.py::test_accelerate_trains_on_two_processes_as_one",
    "--nnodes 2": "tests/test_stage.py::test_the_batch_script_trains_on_two_nodes_as_one_process",
    "--tasks scenes_pope": "tests/test_harness.py::test_the_real_harness_offline",
    "python benchmarks/gpu.py --tiny": "tests/test_benchmarks.py::test_the_gpu_command_at_tiny_sizes",
    "--images LLaVA-Pretrain": "tests/test_launch.py::test_torchrun_reads_its_command",
    "--images mix665k": "tests/test_launch.py::test_torchrun_reads_its_command",
}
NOT_RUN = {  # part of the command -> why no test runs it; arguments are parsed all the same
    "--device cuda": "needs a GPU; benchmarks/gpu.py times the same",
    "--save-steps 200": "as the command above it on the page, with another interval of checkpoints",
    "accelerate launch": "a name in the text",
    "ruff check": "a part of tools/check.py",
    "recipe": "minutes on a GPU; tests/test_recipe.py runs it with small numbers",
    "make ": "the targets call tools/check.py, benchmarks and pip, which the checks themselves are",
    "--tasks gqa,mmbench": "fetches the benchmarks' data sets",
    "python tools/check.py": "runs the tests themselves",
    "python tools/addresses.py": "for a fork; tests/test_repository.py compares what it would write",
    "python benchmarks/captions.py": "trains several models; tests/test_evaluate.py tests its scores",
    "pip ": "installs; the release test installs the wheel",
    "hf ": "the hub's own program",
    "python3 -m venv": "makes the environment in which the tests run",
    "nbdev_test": "runs a notebook, as tools/check.py does with all of them",
    "ruff format": "changes files",
    "python -m pytest": "the tests themselves",
    "python -m uv": "builds the wheel, as tests/test_release.py does",
}


def runs_here(command):
    "Whether `test_printed_command_runs` runs it."
    words = own_words(command)
    listed = any(part in command for part in (*NOT_RUN, *RUN_BY))
    return bool(words) and len(words) > 1 and not listed and not PLACEHOLDER.search(command)


def test_every_command_is_run_or_listed():
    lost = []
    for page, command in PRINTED:
        template = own_words(command) and (PLACEHOLDER.search(command) or len(own_words(command)) == 1)
        listed = any(part in command for part in (*NOT_RUN, *RUN_BY))
        if not (template or listed or runs_here(command)):
            lost.append((page, command))
    assert not lost, "let a test run them, or add them to NOT_RUN with a reason"


def test_the_lists_are_current():
    for part in (*NOT_RUN, *RUN_BY):
        assert any(part in command for command in COMMANDS), f"no page prints {part!r}"
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(), test


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if runs_here(c)])
def test_printed_command_runs(command, tmp_path):
    "As it is printed, with small numbers, in a shell without an activated environment."
    for name in re.findall(r"\S+\.(?:png|jpg)", command):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    name, *options = own_words(command)
    words = [sys.executable, "-m", "delta_llava", name, *options, *SHORT[name].split()]
    env = os.environ | dict(PATH="/usr/bin:/bin", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
