"""Score a trained model on the offline tasks through lmms-eval, at several budgets. Run it where lmms-eval is (`make eval`):

    .venv-eval/bin/python benchmarks/harness.py                    # what the quickstart trained; writes runs/harness.json

Next to the five tasks, the captions are asked for once more in the words that the quickstart's training used, as `scenes_caption_asked`.
"""
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from delta_llava.tasks import TASK_NAMES, write_tasks
from delta_llava.harness import harness_cmd, read_result
from delta_llava.quickstart import QUESTION
from delta_llava.runs import write_record


@dataclass(frozen=True, kw_only=True)
class Scored:
    "Score a trained model on the offline tasks at several budgets."
    pretrained: Path = Path("runs/quickstart")  # What a training wrote
    tokens: tuple[int, ...] = (36, 9)  # Budgets
    n: int = 20  # Scenes
    seed: int = 4_000_000  # Of the scenes
    batch_size: int = 8  # Requests in one pass
    out: Path = Path("runs/harness.json")  # The record

    def __call__(self):
        found = []
        with TemporaryDirectory() as folder:
            told = write_tasks(f"{folder}/tasks", self.n, seed=self.seed)
            write_tasks(f"{folder}/asked", self.n, seed=self.seed, caption=QUESTION)
            for t in self.tokens:
                scores, settings = self.score(f"{folder}/tasks", TASK_NAMES, f"{folder}/out{t}", t)
                asked, more = self.score(f"{folder}/asked", ("scenes_caption",), f"{folder}/asked{t}", t)
                scores["scenes_caption_asked"], settings["tasks"]["scenes_caption_asked"] = asked["scenes_caption"], more["tasks"]["scenes_caption"]
                found.append(dict(scores=scores, settings=settings))
        print(write_record(self.out, [self.seed], found, questions=told))

    def score(self, tasks: str, names: tuple[str, ...], out: str, tokens: int):
        subprocess.run(harness_cmd(self.pretrained, out, tasks, names, self.batch_size, python=sys.executable, tokens=tokens), env=os.environ | dict(HF_HUB_OFFLINE="1"), check=True)
        return read_result(out)


if __name__ == "__main__": tyro.cli(Scored)()
