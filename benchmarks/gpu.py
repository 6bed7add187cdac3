"""All measurements that need a GPU, with one command, the most important first:

    make gpu                                         # = python benchmarks/gpu.py --minutes 9
    python benchmarks/gpu.py --minutes 5 --out DIR   # records into another folder
    python benchmarks/gpu.py --only budgets          # one part
    python benchmarks/gpu.py --tiny                  # every part at tiny sizes, on any machine

  tests     tests/test_gpu.py
  switches  stage-1 step at 144 tokens, one switch at a time
  budgets   stage-1 step at each budget of Table 4
  finetune  stage-2 step: LoRA, all weights, float32 masters
  projector Delta, the authors' algorithm, TokenPacker and the floor
  speed     Fig. 3: prefill, decode, tokens/s with a dynamic cache
  packing   packed rows against padded ones
  compiled  Fig. 3 with a static cache, compiled steps and CUDA graphs

It needs PyTorch, transformers in the range of pyproject.toml, and one GPU; no weights and no network. The
package need not be installed if PYTHONPATH names the repository. Each
part is a process of its own, so that a failure, a CUDA error or a hang of one does not reach the next. It
gets its share of the minutes that are left, and is ended when they are over. Records are written after
every cell, so that nothing is lost by that. While one part runs, the next one imports its libraries.
`gpu.json` says how each part ended, and `gpu.log` has all output. Without a GPU the sizes are tiny.
"""

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from packing import Packing
from projector import ProjectorTimes
from speed import FULL, RecordedSweep
from steps import StepTimes
from transformers import CLIPVisionConfig, LlamaConfig

from delta_llava.runs import write_record

ROOT = Path(__file__).resolve().parents[1]
SHARES = dict(  # of the time, in seconds if there are eight minutes
    tests=75, switches=60, budgets=30, finetune=80, projector=50, speed=85, packing=25, compiled=100
)


@dataclass
class GPU:
    minutes: float = 9.0  # All parts together
    out: Path = Path("runs")  # Gets the records
    only: tuple[str, ...] = ()  # Parts; without them all
    tiny: bool = not torch.cuda.is_available()  # Tiny sizes
    isolated: bool = torch.cuda.is_available()  # Each part in a process of its own
    wait: bool = False  # Begin when a line arrives on standard input; for isolated parts
    results: list[dict] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        if unknown := [name for name in self.only if name not in SHARES]:
            raise ValueError(f"only={unknown} must be among {list(SHARES)}.")
        self.out = self.out.resolve()
        self.log = self.out / "gpu.log"
        self.device = "cpu" if self.tiny else "cuda"

    # ------------------------------------------------------------ what runs

    def parts(self) -> dict[str, Callable[[], None]]:
        "A function for each part."
        return dict(
            tests=self.tests,
            switches=lambda: self.steps("switches"),
            budgets=lambda: self.steps("budgets"),
            finetune=lambda: self.steps("finetune"),
            projector=self.projector,
            speed=lambda: self.speed("dynamic"),
            packing=self.packing,
            compiled=lambda: self.speed("static"),
        )

    def tests(self):
        "The GPU tests, recorded one after the other."
        import pytest

        outcomes = Outcomes(self.out / "gpu_tests.json")
        file = str(ROOT / "tests" / "test_gpu.py")
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-x" if self.tiny else "--durations=8"]
        code = pytest.main([file, "--rootdir", str(ROOT), *options], plugins=[outcomes])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            failed = [row["test"] for row in outcomes.rows if row["outcome"] == "failed"]
            raise RuntimeError(f"{len(failed)} tests failed: {', '.join(failed)}" if failed else str(code))

    def steps(self, plan: str):
        "Training steps at full size, or tiny ones."
        record = self.out / "steps_full.json"
        if not self.tiny:
            return StepTimes(plan=plan, record=record)()
        sizes = dict(tokens=4, budgets=(16, 4), rows=(4, 2), lora_rank=2, repeats=1)
        with tiny_parts() as parts:
            return StepTimes(plan=plan, record=record, device="cpu", **sizes, **parts)()

    def projector(self):
        "The projector's table in bfloat16."
        sizes: dict = dict(batch=(1, 8, 64))
        if self.tiny:
            sizes = dict(batch=(1,), tokens=(4,), rounds=2, d_vision=128, d_llm=64, threads=1)
        record = self.out / "benchmark_projector_gpu.json"
        ProjectorTimes(dtype=("bfloat16",), device=self.device, record=record, **sizes)()

    def speed(self, cache: str):
        "Fig. 3 with one type of cache; the compiled steps of a static one take a minute each to compile."
        sizes: dict = dict(tokens=(576, 1)) if cache == "static" else {}
        sizes |= dict(repeats=5 if cache == "static" else 3, warm_up=1)
        if self.tiny:
            sizes = dict(tokens=(16, 4), text=6, answer=4, batch=(2,), repeats=3)
            sizes |= dict(device="cpu", dtype="float32")
        with tiny_parts() as parts:
            settings = FULL | dict(caches=(cache,)) | sizes | (parts if self.tiny else {})
            RecordedSweep(record=self.out / "speed_full.json", keep=True, **settings)()

    def packing(self):
        "Packed and padded passes over the same rows, at the width of a 7B LLM."
        sizes: dict = dict(hidden=4096, layers=4, scale=1, batches=6)
        if self.tiny:
            sizes = dict(hidden=64, layers=1, scale=16, batches=2, rows=200, timed=(16,))
        Packing(tokens=(), record=self.out / "packing_gpu.json", **sizes)()

    # ------------------------------------------------------------ how it runs

    def run_here(self, name: str) -> str:
        "One part in this process; what failed, or nothing."
        try:
            self.parts()[name]()
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return ""

    def start(self, name: str, log) -> subprocess.Popen:
        "A process that imports its libraries and waits for a line."
        command = [sys.executable, __file__, "--only", name, "--wait", "--out", str(self.out)]
        command += ["--tiny"] if self.tiny else ["--no-tiny"]
        env = os.environ | dict(PYTHONUNBUFFERED="1", TQDM_MININTERVAL="5")
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, env=env)

    def run_isolated(self, process: subprocess.Popen, seconds: float) -> str:
        "Let a process begin; what failed, or nothing."
        try:
            process.communicate(b"go\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"stopped after its {seconds:.0f} s; cells before that are recorded"
        except BrokenPipeError:
            process.wait()
        return "" if process.returncode == 0 else f"exit code {process.returncode}, see {self.log.name}"

    def run_all(self, log):
        "All parts, one after the other, each with its share of the time that is left."
        end = time.monotonic() + 60 * self.minutes
        names = list(self.only or SHARES)
        waiting = self.start(names[0], log) if self.isolated else None
        for i, name in enumerate(names):
            left = end - time.monotonic()
            if left < 10:
                self.note(name, 0, "not started: the minutes are used up")
                continue
            current = waiting
            if self.isolated:
                waiting = self.start(names[i + 1], log) if i + 1 < len(names) else None
            print(f"\n===== {name}", file=log, flush=True)
            start = time.monotonic()
            if self.isolated:
                share = SHARES[name] / sum(SHARES[later] for later in names[i:])
                failed = self.run_isolated(current, left * share)
            else:
                with redirect_stdout(log), redirect_stderr(log):
                    failed = self.run_here(name)
            self.note(name, time.monotonic() - start, failed)
        if self.isolated and waiting is not None:
            waiting.kill()

    def note(self, name: str, seconds: float, failed: str):
        "Record how a part ended."
        self.results.append(dict(part=name, seconds=round(seconds, 1), ended=failed or "complete"))
        print(f"{name:10} {seconds:6.1f} s  {failed or 'complete'}", flush=True)
        write_record(self.out / "gpu.json", [0], self.results, minutes=self.minutes, tiny=self.tiny)

    def __call__(self):
        if self.wait and not sys.stdin.readline():
            return
        if self.wait:
            name = self.only[0]
            sys.argv = [sys.argv[0], "--only", name]  # the command in its records
            sys.exit(1 if self.run_here(name) else 0)
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self.run_all(log)
        print(f"\nrecords and {self.log.name} are in {self.out}")


class Outcomes:
    "A pytest plugin that records every test when it ends."

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        message = str(report.longrepr)[-2000:] if report.outcome != "passed" else ""
        row = dict(test=report.nodeid.rpartition("::")[2], outcome=report.outcome)
        self.rows.append(row | dict(seconds=round(report.duration, 2), message=message))
        write_record(self.path, [0], self.rows)


class tiny_parts(tempfile.TemporaryDirectory):
    "Configurations of a vision tower with a 4×4 grid and of a two-layer LLM, as folders."

    def __enter__(self) -> dict:
        folder = Path(super().__enter__())
        tower = dict(hidden_size=128, intermediate_size=64, num_attention_heads=2, num_hidden_layers=4)
        llm = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
        CLIPVisionConfig(image_size=56, patch_size=14, **tower).save_pretrained(folder / "tower")
        LlamaConfig(vocab_size=264, **llm).save_pretrained(folder / "llm")
        return dict(tower=str(folder / "tower"), llm=str(folder / "llm"), image_size=56)


if __name__ == "__main__":
    tyro.cli(GPU)()
