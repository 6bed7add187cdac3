"""Seconds, peak memory and fraction of the measured ceiling of a training step at full size: CLIP-L/14-336
and Vicuna-7B with random weights, on one large GPU.

    python benchmarks/steps.py --plan switches    # stage 1 at 144 tokens, one switch at a time
    python benchmarks/steps.py --plan budgets     # stage 1 at every budget of Table 4
    python benchmarks/steps.py --plan finetune    # stage 2: all weights, and LoRA

A step begins with pixels that are on the GPU already and consists of vision tower, projector, LLM, backward
pass, clipping and AdamW, under autocast to bfloat16, as in training. The learning rate is 0: the work is the
same, and every step starts from the same weights. Rows are as long as `delta_llava.launch` assumes. The
record is written after every cell. A cell that does not fit in memory is repeated with half of its rows if
it is one of a comparison of budgets, and recorded as such otherwise.

Two fractions are given: `of_ceiling` counts every operation that runs, recomputation included, and
`of_ceiling_useful` leaves recomputation out. The ceiling is the fastest of ten large matrix products.

All weights of a 7B LLM with float32 masters need 108 GB. Two kinds of cells stand in for them on one GPU:
bfloat16 masters and moments with all layers, and float32 masters with as many layers as fit. From two such
depths, `scaled_seconds` extends the time of a layer to all layers of the LLM.
"""

import gc
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import tyro
from transformers import AutoModelForImageTextToText

from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.flops import model_config, num_parameters
from delta_llava.launch import PAPER_TIMES, ROWS, RowLengths, llm_row_flops, row_flops
from delta_llava.passes import compile_layers
from delta_llava.runs import read_record, write_record
from delta_llava.speed import StageTimer, measured_device, median_and_quartiles, resolve_device
from delta_llava.train import Finetune, Pretrain
from delta_llava.trainer import freeze
from delta_llava.vlm import DeltaLlavaForConditionalGeneration

BUDGETS = (576, 144, 64, 16, 4, 1)  # of Table 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    "One step that is timed."

    stage: Literal["pretrain", "finetune"] = "pretrain"
    tokens: int = 144  # Budget V; all patches of the tower are LLaVA's MLP, others are Delta
    rows: int = 32  # Rows in the pass
    gradient_checkpointing: bool = False  # Recompute activations of the LLM
    fused: bool = True  # AdamW in one kernel; else PyTorch's default for the device
    padded: bool = False  # Rows of different lengths: attention gets a mask
    compiled: bool = False  # torch.compile of each layer of the LLM
    lora_rank: int = 0  # Of low-rank updates in place of the LLM's own weights
    layers: int | None = None  # First layers of the LLM; None takes all
    float32: bool = False  # Masters and moments of the LLM in float32 instead of bfloat16
    halve: bool = False  # With half of the rows, if it does not fit

    @property
    def model_key(self) -> tuple:
        "Cells with the same key share a model."
        return self.stage == "finetune", self.lora_rank, self.layers, self.float32, self.compiled

    def describe(self) -> str:
        "A short name."
        names = ("padded", "compiled", "float32")
        switches = [name for name in names if getattr(self, name)]
        switches += ["checkpointing"] if self.gradient_checkpointing else []
        switches += [] if self.fused else ["AdamW not fused"]
        switches += [f"LoRA {self.lora_rank}"] if self.lora_rank else []
        switches += [f"{self.layers} layers"] if self.layers else []
        return f"{self.stage} V={self.tokens} rows={self.rows} {', '.join(switches)}".rstrip()


def paper_ratio(tokens: int, base: int, stage: str) -> float | None:
    "Table 4's time at a budget relative to another one; `None` if the paper has no such row."
    if tokens not in PAPER_TIMES or base not in PAPER_TIMES:
        return None

    def seconds(budget: int) -> int:
        hours, minutes, rest = map(int, PAPER_TIMES[budget][stage == "finetune"].split(":"))
        return 3600 * hours + 60 * minutes + rest

    return round(seconds(tokens) / seconds(base), 3)


def random_batch(cell: Cell, lengths: RowLengths, image_id: int, side: int, device: torch.device) -> dict:
    "Random images, text and answers: one text token, the image, the rest of the text."
    text = torch.randint(1, image_id, (cell.rows, lengths.text))
    image = torch.full((cell.rows, cell.tokens), image_id)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], 1)
    mask = torch.ones_like(ids)
    if cell.padded:  # on the left; the longest row keeps all of its text
        for i in range(cell.rows):
            missing = i * (lengths.text - lengths.answer) // (2 * cell.rows)
            ids[i] = torch.cat([ids.new_zeros(missing), ids[i, : ids.shape[1] - missing]])
            mask[i, :missing] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -lengths.answer :] = ids[:, -lengths.answer :]
    labels[ids == image_id] = -100
    pixels = torch.randn(cell.rows, 3, side, side)
    batch = dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels)
    return {name: tensor.to(device) for name, tensor in batch.items()} | dict(tokens=cell.tokens)


def timed_step(
    model, optimizer, batch: dict, device: torch.device, bf16: bool = True
) -> tuple[dict[str, float], float]:
    "Seconds of each part of a step and of the whole step, and the loss."
    timer = StageTimer(device)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: timer.mark(name))
        for name, module in (("tower", model.vision_tower), ("projector", model.multi_modal_projector))
    ]
    timer.mark("start")
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    timer.mark("LLM forward")
    loss.backward()
    timer.mark("backward")
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    timer.mark("optimizer")
    for hook in hooks:
        hook.remove()
    seconds = {timer.marks[i][0]: timer.between(i - 1, i) for i in range(1, len(timer.marks))}
    return seconds | dict(step=timer.between(0, -1)), loss.item()


def free_memory(device: torch.device):
    "Release memory that no object uses any more to the GPU."
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class StepTimes:
    plan: Literal["switches", "budgets", "finetune"] = "switches"  # Which cells
    tower: str = "hub:openai/clip-vit-large-patch14-336"  # Only its shapes
    llm: str = "hub:lmsys/vicuna-7b-v1.5"  # Only its shapes
    image_size: int | None = None  # Side of an image, px; None takes the tower's own
    tokens: int = 144  # Budget V of the switches
    budgets: tuple[int, ...] = BUDGETS  # Budgets V of the others; all patches of the tower are the MLP's
    rows: tuple[int, int] = (32, 16)  # Rows of a pass in stage 1 and stage 2: the paper's on each GPU
    lora_rank: int = 128  # Of low-rank updates: LLaVA's
    repeats: int = 4  # Steps of each cell that count
    warm_up: int = 1  # Steps before them
    device: str = "auto"  # Where; auto takes the GPU if there is one
    seed: int = 0  # Of weights and rows
    record: Path = Path("runs/steps_full.json")  # Keeps the cells of other plans
    model_key: tuple | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.place = resolve_device(self.device)
        config = self.config(None)
        vision = config.vision_config
        self.n_layers = config.text_config.num_hidden_layers
        self.side = self.image_size or vision.image_size
        self.n_patches = (self.side // vision.patch_size) ** 2
        self.model = None
        self.metas: dict[tuple, tuple[DeltaLlavaForConditionalGeneration, int]] = {}

    # ------------------------------------------------------------ which cells

    def cells(self) -> list[Cell]:
        "The cells of the plan, the most important first."
        return dict(switches=self.switches, budgets=self.table, finetune=self.finetune)[self.plan]()

    def switches(self) -> list[Cell]:
        "Stage 1 at one budget, one switch at a time."
        base = Cell(tokens=self.tokens, rows=self.rows[0])
        changes: list[dict] = [
            dict(gradient_checkpointing=True),
            dict(),
            dict(padded=True),
            dict(fused=False),
            *(dict(rows=max(1, round(scale * base.rows))) for scale in (2, 1 / 2, 1 / 4)),
        ]
        if self.place.type == "cuda":  # on a CPU the compiler takes minutes
            changes.append(dict(compiled=True))
        return [replace(base, **change) for change in changes]

    def table(self) -> list[Cell]:
        "Stage 1 at every budget."
        return [Cell(tokens=tokens, rows=self.rows[0], halve=True) for tokens in self.budgets]

    def finetune(self) -> list[Cell]:
        "Stage 2: LoRA, all weights at every budget, and float32 masters at two depths."
        base = Cell(stage="finetune", tokens=self.tokens, rows=self.rows[1], gradient_checkpointing=True)
        base = replace(base, halve=True)
        lora = replace(base, lora_rank=self.lora_rank)
        cells = [lora, replace(lora, gradient_checkpointing=False), replace(lora, fused=False)]
        budgets = sorted(self.budgets, key=lambda tokens: (tokens != self.tokens, -tokens))
        cells += [replace(base, tokens=tokens) for tokens in budgets]
        most = self.fitting_layers()
        cells += [replace(base, float32=True, layers=layers) for layers in (most, most // 2)]
        if self.place.type == "cuda":
            cells.append(replace(lora, gradient_checkpointing=False, compiled=True))
        return cells

    def fitting_layers(self) -> int:
        "Layers of the LLM with float32 masters, gradients and moments that fit beside the rest."
        if self.place.type != "cuda":
            return self.n_layers
        model = self.meta(self.config(None))
        layer = num_parameters(model.get_decoder().layers[0])
        rest = num_parameters(model) - self.n_layers * layer
        # 16 bytes of each weight, and autocast's copy; a quarter is left for activations
        memory = 0.75 * torch.cuda.get_device_properties(self.place).total_memory
        return max(2, min(self.n_layers, int((memory / 18 - rest) // layer) // 2 * 2))

    # ------------------------------------------------------------ the model

    def config(self, layers: int | None):
        "The configuration of the model with Delta, and with so many layers of the LLM."
        config = model_config(self.tower, self.llm, "delta", min(self.budgets), self.image_size)
        config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
        return config

    def meta(self, config) -> DeltaLlavaForConditionalGeneration:
        "A model without memory."
        with torch.device("meta"):
            return DeltaLlavaForConditionalGeneration(config)

    def compressor(self, tokens: int) -> str:
        return "mlp" if tokens == self.n_patches else "delta"

    def build(self, cell: Cell):
        "The model of a cell with both projectors, on the GPU, in place of the one before."
        self.model = self.projectors = None
        free_memory(self.place)
        torch.manual_seed(self.seed)
        with self.place:
            model = AutoModelForImageTextToText.from_config(
                self.config(cell.layers), dtype=torch.bfloat16, trust_remote_code=False
            )
        delta = model.multi_modal_projector
        mlp = build_compressor("mlp", compressor_config("mlp", delta.config, tokens=self.n_patches))
        self.projectors = {
            name: p.to(self.place, torch.float32) for name, p in (("delta", delta), ("mlp", mlp))
        }
        if cell.float32:
            model.language_model.float()
        if cell.compiled:
            compile_layers(model)
        self.model, self.model_key = model.to(self.place), cell.model_key
        freeze(model, cell.stage, cell.lora_rank)

    def prepare(self, cell: Cell):
        "The model of a cell, ready for its steps."
        if self.model is None or self.model_key != cell.model_key:
            self.build(cell)
        self.model.multi_modal_projector = self.projectors[self.compressor(cell.tokens)]
        freeze(self.model, cell.stage, cell.lora_rank)
        if cell.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(dict(use_reentrant=False))
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.train()

    # ------------------------------------------------------------ one cell

    def steps(self, cell: Cell) -> tuple[list[dict[str, float]], float, int]:
        "Seconds of each step, the last loss, and bytes of peak memory."
        self.prepare(cell)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = True if cell.fused else None
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=fused)
        image_id = self.model.config.image_token_id
        batch = random_batch(cell, ROWS[cell.stage], image_id, self.side, self.place)
        if self.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = []
        for i in range(self.warm_up + self.repeats):
            seconds, loss = timed_step(self.model, optimizer, batch, self.place)
            found += [seconds] if i >= self.warm_up else []
        for p in trained:
            p.grad = None
        peak = torch.cuda.max_memory_allocated() if self.place.type == "cuda" else 0
        return found, loss, peak

    def stage(self, cell: Cell):
        "The settings of the stage of a cell; nothing is read from its paths."
        return (Finetune if cell.stage == "finetune" else Pretrain)(
            data=Path(),
            output_dir=Path(),
            tower=self.tower,
            llm=self.llm,
            compressor=self.compressor(cell.tokens),
            tokens=cell.tokens,
            projector=None,
            image_size=self.image_size,
            sharding="none",
            lora_rank=cell.lora_rank,
            gradient_checkpointing=cell.gradient_checkpointing,
        )

    def flops(self, cell: Cell) -> tuple[int, int]:
        "FLOPs of a row: all that run, and without recomputation."
        stage = self.stage(cell)
        key = stage.compressor, cell.tokens, cell.layers
        if key not in self.metas:
            config = model_config(self.tower, self.llm, stage.compressor, cell.tokens, self.image_size)
            config.text_config.num_hidden_layers = cell.layers or config.text_config.num_hidden_layers
            model = self.meta(config)
            parts = row_flops(stage, model, ROWS[cell.stage])
            self.metas[key] = model, parts["tower"] + parts["projector"]
        model, rest = self.metas[key]
        every = llm_row_flops(stage, model, ROWS[cell.stage])
        useful = llm_row_flops(replace(stage, gradient_checkpointing=False), model, ROWS[cell.stage])
        return rest + every, rest + useful

    def measure(self, cell: Cell) -> dict:
        "One entry of the record."
        start = perf_counter()
        found, loss, peak = self.steps(cell)
        steps = [seconds["step"] for seconds in found]
        middle, low, high = median_and_quartiles(steps)
        every, useful = self.flops(cell)
        tokens = cell.rows * (ROWS[cell.stage].text + cell.tokens)
        return asdict(cell) | dict(
            projector=self.compressor(cell.tokens),
            seconds=[middle, low, high],
            parts={name: median_and_quartiles([s[name] for s in found])[0] for name in found[0]},
            rows_per_second=round(cell.rows / middle, 2),
            tokens_per_second=round(tokens / middle, 1),
            flops=cell.rows * every,
            of_ceiling=round(cell.rows * every / middle / self.peak, 4),
            of_ceiling_useful=round(cell.rows * useful / middle / self.peak, 4),
            peak_gib=round(peak / 2**30, 2) or None,
            loss=round(loss, 3),
            took=round(perf_counter() - start, 1),
        )

    def entry(self, cell: Cell) -> dict:
        "The entry of a cell; one that does not fit, or fails, says so."
        too_large = []
        while True:
            try:
                return self.measure(cell) | (dict(out_of_memory_at=too_large) if too_large else {})
            except torch.OutOfMemoryError:
                too_large.append(cell.rows)
            except Exception as error:
                traceback.print_exc()
                self.model = None  # what it holds is not known
                return asdict(cell) | dict(error=f"{type(error).__name__}: {error}"[:500])
            if self.model is not None:
                self.model.zero_grad()
            free_memory(self.place)
            if not cell.halve or cell.rows == 1:
                return asdict(cell) | dict(out_of_memory_at=too_large)
            cell = replace(cell, rows=cell.rows // 2)

    # ------------------------------------------------------------ all cells

    def others(self) -> list[dict]:
        "Cells of other plans that the record holds."
        if not self.record.exists():
            return []
        return [entry for entry in read_record(self.record)["result"] if entry["plan"] != self.plan]

    def write(self, results: list[dict]):
        names = ("tower", "llm", "image_size", "repeats", "warm_up")
        write_record(
            self.record,
            [self.seed],
            results,
            lengths={stage: vars(rows) for stage, rows in ROWS.items()},
            clock="CUDA events" if self.place.type == "cuda" else "CPU",
            random_weights=True,
            **{name: getattr(self, name) for name in names},
        )

    def __call__(self):
        cuda = self.place.type == "cuda"
        self.peak = measured_device(self.place, torch.bfloat16, None if cuda else (128, 256)).peak
        free_memory(self.place)
        others, results = self.others(), []
        about = dict(plan=self.plan, ceiling_tflops=round(self.peak / 1e12, 3))
        for cell in self.cells():
            results.append(about | self.entry(cell))
            add_ratios(results, self.n_patches)
            add_scaled(results, self.n_layers)
            print(f"{cell.describe():58} {summary(results[-1])}", flush=True)
            self.write(others + results)
        print(f"wrote {self.record}")


def add_ratios(results: list[dict], base: int):
    "Seconds of a row relative to the budget `base` with the same switches, and the paper's; scaled times."
    timed = [entry for entry in results if "seconds" in entry]
    for entry in timed:
        same = ("stage", "lora_rank", "layers", "float32", "compiled", "padded", "fused")
        for other in timed:
            if other["tokens"] == base and all(entry[name] == other[name] for name in same):
                ratio = entry["seconds"][0] * other["rows"] / (entry["rows"] * other["seconds"][0])
                entry["ratio"] = round(ratio, 3)
                entry["paper_ratio"] = paper_ratio(entry["tokens"], base, entry["stage"])


def add_scaled(results: list[dict], layers: int):
    "Seconds with all layers of the LLM, from a straight line through the last two depths."
    timed = [entry for entry in results if entry.get("float32") and "seconds" in entry]
    if len(timed) == 2 and timed[0]["rows"] == timed[1]["rows"]:
        a, b = timed
        layer = (a["seconds"][0] - b["seconds"][0]) / (a["layers"] - b["layers"])
        for entry in timed:
            entry["scaled_layers"] = layers
            entry["scaled_seconds"] = round(a["seconds"][0] + (layers - a["layers"]) * layer, 4)


def summary(entry: dict) -> str:
    "An entry as a line."
    if "error" in entry:
        return entry["error"].splitlines()[0]
    if "seconds" not in entry:
        return f"does not fit with {entry['out_of_memory_at'][-1]} rows"
    memory = f", {entry['peak_gib']} GiB" if entry["peak_gib"] else ""
    ratio = f", ratio {entry['ratio']} (paper {entry['paper_ratio']})" if "ratio" in entry else ""
    halved = f", {entry['rows']} rows" if "out_of_memory_at" in entry else ""
    return (
        f"{entry['seconds'][0]:7.3f} s, {entry['rows_per_second']:6.1f} rows/s, "
        f"{entry['tokens_per_second']:7.0f} tokens/s, {entry['of_ceiling']:.0%} of the ceiling "
        f"({entry['of_ceiling_useful']:.0%} useful){memory}{halved}{ratio}"
    )


if __name__ == "__main__":
    tyro.cli(StepTimes)()
