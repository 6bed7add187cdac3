"""Both stages of the recipe with several seeds and systems, side by side on one GPU; one record of all.

    python benchmarks/recipe.py                                 # three seeds of Delta
    python benchmarks/recipe.py --systems delta full --seeds 0  # other systems, the same number of steps
    python benchmarks/recipe.py --merge-only                    # the record anew from finished trainings

Every training is a process of its own, `delta-llava recipe-long` with the options of its system; its output
is in `FOLDER/SYSTEM-SEED/log`. One that was stopped goes on when the program is started again. The trainings
share the GPU, so their seconds say little about one that runs alone. Each of Delta needs more than 42 GB of
its memory: two at once on an H200, one on an H100 (`--at-once 1`).
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from delta_llava.runs import read_run, write_record

ROOT = Path(__file__).resolve().parents[1]
AT_36 = ["--train-budgets", "36", "--eval-budgets", "36", "--curve-budgets", "36"]
SYSTEMS = dict(  # options of `delta-llava recipe-long`
    delta=[],
    full=["--lora-rank", "0", "--stage2-learning-rate", "1e-4"],
    tokenpacker=["--compressor", "tokenpacker", *AT_36],
    honeybee=["--compressor", "cabstractor", *AT_36],
)


def last_step(log: list[dict]) -> int:
    "How far a stage came."
    return max(entry["step"] for entry in log)


def curve_rows(log: list[dict]):
    "The scores during a stage, in whole percents: a row for each step, held-out set and budget."
    for entry in log:
        for images, budgets in entry.get("scores", {}).items():
            for tokens, tasks in budgets.items():
                percent, mismatched = ({t: round(100 * s[i]) for t, s in tasks.items()} for i in (0, 1))
                row = dict(step=entry["step"], images=images, tokens=int(tokens))
                yield row | dict(percent=percent, mismatched_percent=mismatched)


@dataclass
class RecipeSeeds:
    systems: tuple[str, ...] = ("delta",)  # Names in SYSTEMS
    seeds: tuple[int, ...] = (0, 1, 2)  # Of each system
    folder: Path = Path("runs/seeds")  # Gets a folder for each training
    work: Path = Path("runs/seeds")  # Gets scenes and checkpoints, in the same folders
    record: Path = Path("runs/recipe_seeds.json")  # Gets the scores of all trainings
    at_once: int = 2  # Trainings at the same time; the memory of the GPU sets a limit
    num_workers: int = 4  # Of each training
    stage1_minutes: float = 0.0  # Longest time of stage 1; 0 sets no limit
    stage2_minutes: float = 0.0  # Longest time of stage 2; 0 sets no limit
    options: str = ""  # More options of `delta-llava recipe-long`, as one text
    merge_only: bool = False  # Train nothing
    pause: float = 15.0  # Seconds between two looks at the trainings

    def __post_init__(self):
        if unknown := [name for name in self.systems if name not in SYSTEMS]:
            raise ValueError(f"systems={unknown} must be among {list(SYSTEMS)}.")
        if self.at_once < 1:
            raise ValueError(f"at_once={self.at_once} must be at least 1.")
        self.trainings = [f"{name}-{seed}" for name in self.systems for seed in self.seeds]

    def start(self, training: str) -> subprocess.Popen:
        "A process that trains."
        name, seed = training.rsplit("-", 1)
        folder = self.folder / training
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", "delta_llava", "recipe-long", "--seed", seed]
        command += ["--output-dir", str(folder.resolve())]
        command += ["--work-dir", str((self.work / training / "work").resolve())]
        for option in ("num_workers", "stage1_minutes", "stage2_minutes"):
            command += [f"--{option.replace('_', '-')}", str(getattr(self, option))]
        command += [*SYSTEMS[name], *shlex.split(self.options)]
        shown = dict(PYTHONUNBUFFERED="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
        with (folder / "log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | shown)

    def last_line(self, training: str) -> str:
        "Where a training is."
        lines = (self.folder / training / "log").read_text(errors="replace").splitlines() or [""]
        return f"  {training}: {lines[-1][-100:]}"

    def train(self) -> list[str]:  # Trainings that failed
        "All trainings, `at_once` at the same time: when one ends, the next begins."
        waiting = list(self.trainings)
        processes: dict[str, subprocess.Popen] = {}
        start = time.monotonic()
        while True:
            running = [training for training, process in processes.items() if process.poll() is None]
            while waiting and len(running) < self.at_once:
                running.append(waiting.pop(0))
                processes[running[-1]] = self.start(running[-1])
            if not running:
                return [training for training, process in processes.items() if process.returncode]
            print(f"{time.monotonic() - start:.0f} s", *map(self.last_line, running), sep="\n", flush=True)
            time.sleep(self.pause)

    def merge(self) -> Path:
        "One record of all trainings that have ended."
        rows = []
        for training in self.trainings:
            if not (self.folder / training / "run.json").exists():
                continue
            run = read_run(self.folder / training)
            stage1, stage2 = (run["result"]["logs"][stage] for stage in ("stage1", "stage2"))
            rows.append(
                dict(
                    system=training.rsplit("-", 1)[0],
                    seed=run["seeds"][0],
                    stage1_steps=last_step(stage1),
                    stage2_steps=last_step(stage2),
                    scores=run["result"]["scores"],
                    curves=list(curve_rows(stage2)),
                    losses=[dict(step=e["step"], loss=e["loss"]) for e in stage2 if "loss" in e],
                    seconds=run["seconds"],
                )
            )
        return write_record(self.record, sorted({row["seed"] for row in rows}), dict(trainings=rows))

    def __call__(self):
        failed = [] if self.merge_only else self.train()
        print(self.merge())
        if failed:
            sys.exit(f"failed: {', '.join(failed)}; see the file log of each")


if __name__ == "__main__":
    tyro.cli(RecipeSeeds)()
