"""Score a trained model through lmms-eval (`make eval`) on the offline tasks, at several budgets, with the
images of the questions and with those of other scenes:

    .venv-eval/bin/python benchmarks/harness.py     # the model of the package; writes runs/harness.json

The record is written after every run of lmms-eval. The same command continues a run that was stopped.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from delta_llava.files import read_json, shipped_folder
from delta_llava.harness import harness_cmd, read_result
from delta_llava.runs import commit, write_record
from delta_llava.tasks import TASK_NAMES, write_tasks


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    "Score a trained model on the offline tasks at several budgets."

    pretrained: Path | None = None  # Folder of a trained model; None is the package's own
    tokens: tuple[int, ...] = (144, 36, 16, 9, 4, 1)  # Budgets
    n: int = 50  # Scenes
    seed: int = 4_000_000  # Of the scenes
    batch_size: int = 16  # Requests in one pass
    out: Path = Path("runs/harness.json")  # The record

    def __call__(self):
        results = self.earlier_results()
        done = {(r["settings"]["visual_tokens"], r["mismatched"]) for r in results}
        with TemporaryDirectory() as folder:
            questions = {}
            for mismatched in (False, True):
                questions = write_tasks(
                    f"{folder}/tasks-{mismatched}", self.n, seed=self.seed, mismatched=mismatched
                )
            for budget in self.tokens:
                for mismatched in (False, True):
                    if (budget, mismatched) in done:
                        continue
                    scores, settings = self.score(
                        f"{folder}/tasks-{mismatched}", f"{folder}/out{budget}-{mismatched}", budget
                    )
                    results.append(dict(mismatched=mismatched, scores=scores, settings=settings))
                    print(write_record(self.out, [self.seed], results, questions=questions), flush=True)

    def earlier_results(self) -> list[dict]:
        "Results of the same commit and number of scenes that the record holds."
        if not self.out.exists():
            return []
        record = read_json(self.out)
        if record["commit"] != commit() or any("mismatched" not in r for r in record["result"]):
            return []
        return [r for r in record["result"] if self.scenes_of(r) == self.n]

    @staticmethod
    def scenes_of(result: dict) -> int:
        "The number of scenes of a result."
        return result["settings"]["tasks"]["scenes_pope"]["metadata"]["scenes"]["n"]

    def score(self, tasks: str, out: str, tokens: int) -> tuple[dict, dict]:
        "Scores and settings of one run of lmms-eval."
        model = self.pretrained or shipped_folder()
        cmd = harness_cmd(
            model, out, tasks, TASK_NAMES, self.batch_size, python=sys.executable, tokens=tokens
        )
        subprocess.run(cmd, env=os.environ | dict(HF_HUB_OFFLINE="1"), check=True)
        return read_result(out)


if __name__ == "__main__":
    tyro.cli(HarnessRun)()
