"""Seconds of tower, projector, prefill and decode, each apart, and tokens/s against visual tokens (the
paper's Fig. 3), budgets interleaved in one run; 576 is LLaVA's MLP, all others Delta.

    python benchmarks/speed.py                          # DINOv2-S/14 at 336 px and SmolLM2-135M on
           one thread of a CPU; writes runs/speed.json
    python benchmarks/speed.py --full                   # one large GPU: CLIP-L/14-336 and
           Vicuna-7B, random weights, bfloat16, batch 1 and 32; writes runs/speed_full.json

With `--full` every budget is timed with a growing cache and eager steps, as the paper's script does, and
with a static cache and compiled steps in CUDA graphs: what is left of the gain of few tokens when the
framework's overhead is gone. What and how is measured is in `delta_llava.speed`.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro

from delta_llava.speed import Sweep, speed_report
from delta_llava.runs import write_record

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
class RecordedSweep(Sweep):
    full: bool = False  # The paper's shapes on one large GPU, as above; what is given beside it is kept
    record: Path | None = None  # Without it runs/speed.json, or with `full` runs/speed_full.json

    def __call__(self):
        told = {f.name: getattr(self, f.name) for f in fields(Sweep)}
        if self.full:
            told |= {k: v for k, v in FULL.items() if told[k] == getattr(Sweep, k)}
        sweep = Sweep(**told)
        limit, rows = sweep()
        print(speed_report(rows))
        clock = (
            "CUDA events"
            if sweep.device != "cpu"
            else "CPU time of the process, one thread"
            if sweep.threads == 1
            else "wall"
        )
        settings = {k: v for k, v in asdict(sweep).items() if k not in ("seed", "device")} | dict(
            tower=sweep.setup(sweep.tokens[0]).tower, llm=sweep.setup(sweep.tokens[0]).llm
        )
        record = self.record or Path("runs") / f"speed{'_full' if self.full else ''}.json"
        print(
            f"wrote {write_record(record, [sweep.seed], rows, clock=clock, device=limit.name, peak=limit.peak, bandwidth=limit.bandwidth, **settings)}"
        )


if __name__ == "__main__":
    tyro.cli(RecordedSweep)()
