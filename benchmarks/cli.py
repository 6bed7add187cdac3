"""CPU seconds of short calls of the command line: help, a typo, a path that does not exist.

    python benchmarks/cli.py                            # prints a table
    python benchmarks/cli.py --record runs/cli.json     # also writes a record

These calls must not import torch or transformers, which take seconds. Each call is a process of its own,
and the time is the user and system time of that process and its children, which other programs affect
only through caches and clock rates. The minimum of several repeats is reported: the first call compiles
Python files and reads them from disk. `import delta_llava` and an empty Python program show what cannot
be saved.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from delta_llava.flops import as_table
from delta_llava.runs import write_record

COMMAND = ("-m", "delta_llava")
CALLS = {  # name: arguments of Python, expected exit status
    "python, empty program": (("-c", ""), 0),
    "import delta_llava": (("-c", "import delta_llava"), 0),
    "delta-llava --help": ((*COMMAND, "--help"), 0),
    "delta-llava pretrain --help": ((*COMMAND, "pretrain", "--help"), 0),
    "delta-llava pretain (typo)": ((*COMMAND, "pretain"), 2),
    "delta-llava pretrain --dta (typo)": ((*COMMAND, "pretrain", "--dta", "rows.json"), 2),
    "delta-llava pretrain --data nowhere.json": ((*COMMAND, "pretrain", "--data", "nowhere.json"), 1),
}


def cpu_seconds(arguments: tuple[str, ...], status: int) -> float:
    "User and system time of one Python process; another exit status than expected is an error."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        call = " ".join(arguments)
        raise RuntimeError(
            f"python {call} ended with status {done.returncode}, not {status}:\n{done.stderr[-2000:]}"
        )
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@dataclass(frozen=True, kw_only=True)
class CommandLineTimes:
    repeats: int = 5  # Processes of each call; the minimum is reported
    record: Path | None = None  # JSON file of the result, such as runs/cli.json; without it none is written

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1.")

    def __call__(self):
        rows = []
        for name, (arguments, status) in CALLS.items():
            seconds = [cpu_seconds(arguments, status) for _ in range(self.repeats)]
            rows.append({"call": name, "cpu_seconds": round(min(seconds), 3)})
        print(as_table(rows))
        if self.record is not None:
            clock = "user and system time of the process"
            write_record(self.record, [0], rows, clock=clock, repeats=self.repeats)  # nothing is random
            print(f"wrote {self.record}")


if __name__ == "__main__":
    tyro.cli(CommandLineTimes)()
