"""Seconds of vision tower, projector, prefill and decode, and tokens/s against visual tokens (the
paper's Fig. 3). 576 tokens are LLaVA's MLP, all other budgets are Delta.

    python benchmarks/speed.py --device cpu             # DINOv2-S/14 at 336 px and SmolLM2-135M on
           one thread of a CPU; writes runs/speed.json
    python benchmarks/speed.py --full                   # one large GPU: CLIP-L/14-336 and
           Vicuna-7B, random weights, bfloat16, batch 1 and 32; writes runs/speed_full.json

With `--full` every budget is timed with a dynamic cache and eager steps, as in the authors' script, and
with a static cache and compiled steps in CUDA graphs. The second one shows how much faster few tokens are
without the framework's overhead. `delta_llava.speed` describes how each stage is measured.
"""

from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import tyro

from delta_llava.flops import Device
from delta_llava.runs import read_record, write_record
from delta_llava.settings import SpeedSettings
from delta_llava.speed import resolve_device, run_sweep, speed_report

FULL = dict(
    tower="hub:openai/clip-vit-large-patch14-336",
    llm="hub:lmsys/vicuna-7b-v1.5",
    random_weights=True,
    dtype="bfloat16",
    batch=(1, 32),
    caches=("dynamic", "static"),
    warm_up=2,
)


@dataclass(frozen=True, kw_only=True)
class RecordedSweep(SpeedSettings):
    full: bool = False  # The paper's shapes on one large GPU; settings given beside it are kept
    record: Path | None = None  # Without it runs/speed.json, or with --full runs/speed_full.json
    keep: bool = False  # Keep what the record holds of other types of cache

    def settings(self) -> SpeedSettings:
        "The settings of the sweep, with those of `full` in place of defaults."
        values = {field.name: getattr(self, field.name) for field in fields(SpeedSettings)}
        if self.full:
            for name, value in FULL.items():
                if values[name] == getattr(SpeedSettings, name):
                    values[name] = value
        return SpeedSettings(**values)

    def __call__(self):
        settings = self.settings()
        rows = self.others(settings)
        for cache, batch in product(settings.caches, settings.batch):
            device, found = run_sweep(replace(settings, batch=(batch,), caches=(cache,)))
            rows += found
            self.write(settings, device, rows)
        print(speed_report(rows))
        print(f"wrote {self.path}")

    def others(self, settings: SpeedSettings) -> list[dict]:
        "Rows of other types of cache, if they are to be kept."
        if not self.keep or not self.path.exists():
            return []
        return [row for row in read_record(self.path)["result"] if row["cache"] not in settings.caches]

    @property
    def path(self) -> Path:
        return self.record or Path("runs") / ("speed_full.json" if self.full else "speed.json")

    def write(self, settings: SpeedSettings, device: Device, rows: list[dict]):
        "The record, after every batch size and type of cache."
        recorded = asdict(settings)
        seed = recorded.pop("seed")
        recorded |= dict(device=device.name, peak=device.peak, bandwidth=device.bandwidth)
        write_record(self.path, [seed], rows, clock=clock_name(settings), **recorded)


def clock_name(settings: SpeedSettings) -> str:
    "The clock that the timer reads, in words."
    if resolve_device(settings.device).type == "cuda":
        return "CUDA events"
    return "CPU time of the process, one thread" if settings.threads == 1 else "wall"


if __name__ == "__main__":
    tyro.cli(RecordedSweep)()
