"""Score a trained model on the offline tasks through lmms-eval (`make eval`), at several budgets:

    .venv-eval/bin/python benchmarks/harness.py     # the quickstart's model; writes runs/harness.json

Beside the five tasks, captions are asked for once more with the question of the quickstart's training, as
`scenes_caption_asked`.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from delta_llava.harness import harness_cmd, read_result
from delta_llava.quickstart import QUESTION
from delta_llava.runs import write_record
from delta_llava.tasks import TASK_NAMES, write_tasks


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    "Score a trained model on the offline tasks at several budgets."

    pretrained: Path = Path("runs/quickstart")  # Folder of a trained model
    tokens: tuple[int, ...] = (36, 9)  # Budgets
    n: int = 20  # Scenes
    seed: int = 4_000_000  # Of the scenes
    batch_size: int = 8  # Requests in one pass
    out: Path = Path("runs/harness.json")  # The record

    def __call__(self):
        results = []
        with TemporaryDirectory() as folder:
            questions = write_tasks(f"{folder}/tasks", self.n, seed=self.seed)
            write_tasks(f"{folder}/asked", self.n, seed=self.seed, caption=QUESTION)
            for budget in self.tokens:
                scores, settings = self.score(f"{folder}/tasks", TASK_NAMES, f"{folder}/out{budget}", budget)
                captions, caption_settings = self.score(
                    f"{folder}/asked", ("scenes_caption",), f"{folder}/asked{budget}", budget
                )
                scores["scenes_caption_asked"] = captions["scenes_caption"]
                settings["tasks"]["scenes_caption_asked"] = caption_settings["tasks"]["scenes_caption"]
                results.append(dict(scores=scores, settings=settings))
        print(write_record(self.out, [self.seed], results, questions=questions))

    def score(self, tasks: str, names: tuple[str, ...], out: str, tokens: int) -> tuple[dict, dict]:
        "Scores and settings of one run of lmms-eval."
        cmd = harness_cmd(
            self.pretrained, out, tasks, names, self.batch_size, python=sys.executable, tokens=tokens
        )
        subprocess.run(cmd, env=os.environ | dict(HF_HUB_OFFLINE="1"), check=True)
        return read_result(out)


if __name__ == "__main__":
    tyro.cli(HarnessRun)()
