"""Time the Delta projector beside the authors' algorithm, TokenPacker, and a lower bound:

  straightforward  the authors' algorithm step by step: ΔW is formed at every call,
                   nn.MultiheadAttention returns its weights, positions are resized at every call
  tokenpacker      TokenPacker's algorithm, likewise
  module           DeltaProjector
  folded           DeltaProjector.fold()
  floor            the matrix products, convolutions and the mixing attention of `folded`, on the
                   same tensors, with nothing between them

    python benchmarks/projector.py                                  # writes runs/benchmark_projector.json
    python benchmarks/projector.py --device cuda --batch 1 8 64 --dtype bfloat16 --record
           runs/benchmark_projector_gpu.json

Before anything is timed, it is checked that all but TokenPacker compute the same, gradients included.
Each round times each of them once, in an order that rotates, and each ratio is taken within one round,
so that other load on the machine affects both of its terms. glibc is told to keep freed memory, as the
allocator of a GPU does; otherwise most of the time at batch 8 is the kernel clearing pages. Reported are
the median ratio and its quartiles over rounds. Training is forward and backward to every parameter,
without DropPath; its memory is what autograd saves. On a CPU with `--threads 1` the clock is the CPU time
of the process, which other programs affect only through caches and clock rates; otherwise it is
wall-clock time.
"""

import ctypes
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from delta_llava.compressors.base import build_compressor, compressor_config
from delta_llava.config import ProjectorConfig
from delta_llava.grid import sincos_2d
from delta_llava.launch import SavedBytes
from delta_llava.projector import DeltaProjector, WindowAttention
from delta_llava.runs import write_record
from delta_llava.speed import median_and_quartiles

# ---------------------------------------------------------------- the authors' algorithm


class PlainAttention(nn.Module):
    """Attention inside each window as the authors and TokenPacker compute it: every window is a sequence of
    nn.MultiheadAttention, which also returns its weights."""

    def __init__(self, attend: WindowAttention):
        super().__init__()
        self.attention = nn.MultiheadAttention(attend.channels, attend.heads)
        self.attention.in_proj_weight = attend.qkv.weight
        self.attention.in_proj_bias = attend.qkv.bias
        self.attention.out_proj.weight = attend.out.weight
        self.attention.out_proj.bias = attend.out.bias

    def forward(self, q, k, v):
        batch, n_windows, _ = q.shape
        grid = math.isqrt(n_windows)
        side = math.isqrt(k.shape[1] // n_windows)

        def windows(x):
            pattern = "b (row i col j) c -> (i j) (row col b) c"
            return rearrange(x, pattern, row=grid, col=grid, i=side, j=side)

        queries = rearrange(q, "b v c -> 1 (v b) c")
        y, _ = self.attention(queries, windows(k), windows(v), need_weights=True)
        return rearrange(y, "1 (v b) c -> b v c", b=batch)


def pointwise(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    "A linear layer as a 1×1 convolution over images [b, c, row, col]."
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def resized(image: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    "Images [b, c, row, col] at another side."
    return F.interpolate(image, size=(side, side), mode=mode, align_corners=False)


class Straightforward(nn.Module):
    "The default projector without any optimization, on the weights of a `DeltaProjector`."

    def __init__(self, projector: DeltaProjector):
        super().__init__()
        self.projector = projector
        self.attention = PlainAttention(projector.attend)
        self.pos_embed = sincos_2d(projector.config.grid, projector.config.d_vision)

    def delta(self, part, x):
        "Low-rank projection with ΔW formed (§4.2, Eq. 4)."
        weight = part.base.weight + (part.U @ part.V).T
        return part.norm(F.gelu(F.linear(x, weight)))

    def self_attention(self, block, x):
        "The mixing attention of the reference."
        x = block.norm(x)
        weights = block.qkv.weight.chunk(3)
        biases = block.qkv.bias.chunk(3)
        heads = []
        for weight, bias in zip(weights, biases, strict=True):
            heads.append(rearrange(F.linear(x, weight, bias), "b n (h d) -> b h n d", d=block.head_dim))
        q, k, v = heads
        scores = q @ k.transpose(-1, -2) * block.head_dim**-0.5
        if not scores.isfinite().all():  # the host waits for the device here, as in the reference
            raise ValueError("non-finite attention scores")
        scores = scores - scores.amax(-1, keepdim=True)
        return block.out(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))

    def mix(self, x):
        "The mixing block on images [b, c, row, col], with 1×1 convolutions."
        block = self.projector.mix
        tokens = rearrange(pointwise(block.attn_branch, x), "b c row col -> b (row col) c")
        tokens = tokens + self.self_attention(block.emhsa, block.norm(tokens))
        attended = rearrange(tokens, "b (row col) c -> b c row col", row=x.shape[-1]).contiguous()
        convolved = pointwise(block.conv_branch, attended)
        y = block.mhca.conv(convolved).permute(0, 2, 3, 1)
        y = block.mhca.norm(y).permute(0, 3, 1, 2)
        convolved = convolved + pointwise(block.mhca.out, F.relu(y))
        y = torch.cat([attended, convolved], 1)
        return y + pointwise(block.mlp[2], F.relu(pointwise(block.mlp[0], y)))

    def forward(self, x, tokens):
        config = self.projector.config
        side = math.isqrt(tokens)

        def image(y):
            return rearrange(y, "b (row col) c -> b c row col", row=config.grid)

        k = self.delta(self.projector.k, x)
        v = self.delta(self.projector.v, x)
        query_level = image(x[..., -config.d_vision :]).contiguous()
        q = self.mix(resized(query_level, side, "bilinear")).flatten(2).transpose(1, 2)
        pos_embed = resized(image(self.pos_embed[None].to(x.device)), side, "bicubic")
        pos_embed = pos_embed.flatten(2).transpose(1, 2).to(x.dtype)
        q = self.delta(self.projector.q, q + pos_embed)
        return self.projector.mlp(self.attention(q, k, v))


# ---------------------------------------------------------------- the lower bound

MATRIX_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
}


class MatrixProducts(TorchDispatchMode):
    "Record every matrix product that is computed, with its tensors; `replay` computes them again."

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in MATRIX_PRODUCTS or "scaled_dot_product" in function.name():
            self.calls.append((function, args, kwargs))
        return function(*args, **kwargs)

    def replay(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


# ---------------------------------------------------------------- timing


def keep_freed_memory():
    "The process keeps freed memory of any size. Without glibc nothing changes."
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**30)):
        libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def summary(values) -> dict[str, float]:
    "Median and quartiles."
    median, low, high = median_and_quartiles(values)
    return dict(median=median, low=low, high=high)


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    "Time of every other call over that of `base`, within each round."
    found = {}
    for name, values in times.items():
        if name != base:
            pairs = zip(values, times[base], strict=True)
            found[name] = summary([value / reference for value, reference in pairs])
    return found


def check_close(outputs: dict[str, torch.Tensor], tolerance: dict[str, float]):
    "Error if an output is not that of the straightforward algorithm."
    for name, output in outputs.items():
        torch.testing.assert_close(
            output,
            outputs["straightforward"],
            **tolerance,
            msg=lambda message, name=name: f"{name} has another output: {message}",
        )


def some_gradients(projector: DeltaProjector) -> list[torch.Tensor]:
    "Gradients of one parameter of each kind."
    parameters = (projector.k.U, projector.q.base.weight, projector.mlp[0].weight)
    return [parameter.grad.clone() for parameter in parameters]


def check_gradients(expected: list[torch.Tensor], gradients: list[torch.Tensor]):
    "Error if gradients differ."
    for reference, gradient in zip(expected, gradients, strict=True):
        atol = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(
            gradient,
            reference,
            rtol=1e-3,
            atol=atol,
            msg=lambda message: f"the module has other gradients: {message}",
        )


def train_once(module: nn.Module, call):
    "Forward, and backward to every parameter."
    for parameter in module.parameters():
        parameter.grad = None
    call().square().sum().backward()


@dataclass
class ProjectorTimes:
    batch: tuple[int, ...] = (1, 8)  # Images at a time
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (576, 144, 64, 36, 16, 4, 1)  # Budgets V whose sides divide 24
    rounds: int = 9  # Paired rounds
    d_vision: int = 1024  # Width of the vision tower
    d_llm: int = 4096  # Width of the LLM
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = torch.get_num_threads()  # On a CPU
    seed: int = 0  # Of weights and features
    record: Path = Path("runs/benchmark_projector.json")

    def __post_init__(self):
        if self.rounds < 2:
            raise ValueError(f"rounds={self.rounds} must be at least 2, or there are no quartiles.")
        sides = {side**2 for side in range(1, 25) if 24 % side == 0}
        if bad := [tokens for tokens in self.tokens if tokens not in sides]:
            allowed = sorted(sides, reverse=True)
            raise ValueError(f"tokens={bad}: the straightforward algorithm takes only {allowed}.")
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        self.clock = time.perf_counter
        if self.device == "cpu" and self.threads == 1:
            self.clock = time.process_time

    # ------------------------------------------------------------ rounds

    def synchronize(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, call) -> float:
        self.synchronize()
        start = self.clock()
        call()
        self.synchronize()
        return self.clock() - start

    def time_rounds(self, calls) -> dict[str, list[float]]:
        "Milliseconds of each call in each round."
        names = list(calls)
        milliseconds = {name: [] for name in names}
        for i in range(self.rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                milliseconds[name].append(1e3 * self.seconds(calls[name]))
        return milliseconds

    # ------------------------------------------------------------ one cell of the table

    def build(self, batch, dtype, tokens):
        "The three projectors with equal sizes, and random patch tokens."
        torch.manual_seed(self.seed)
        config = ProjectorConfig(d_vision=self.d_vision, d_llm=self.d_llm)
        module = DeltaProjector(config)
        packer = build_compressor("tokenpacker", compressor_config("tokenpacker", config, tokens=tokens))
        for projector in (module, packer):
            projector.to(self.device, dtype).eval()
        packer.attend = PlainAttention(packer.attend)
        features = torch.randn(batch, config.grid**2, config.d_levels).to(self.device, dtype)
        modules = dict(straightforward=Straightforward(module).eval(), tokenpacker=packer, module=module)
        return modules, features

    def time_forward(self, calls, tolerance):
        "Milliseconds of the forward pass, after a comparison of the outputs."
        with torch.no_grad():
            outputs = {name: call().float() for name, call in calls.items() if name != "tokenpacker"}
            check_close(outputs, tolerance)
            with MatrixProducts() as products:
                calls["folded"]()
            return self.time_rounds(calls | dict(floor=products.replay))

    def time_training(self, modules, calls, compare):
        "Milliseconds of forward and backward, and MiB that autograd saves."
        saved_mib = {}
        gradients = {}
        for name, module in modules.items():
            with SavedBytes(module) as saved:
                calls[name]()
            saved_mib[name] = round(saved.total / 2**20, 1)
            train_once(module, calls[name])
            if name != "tokenpacker":
                gradients[name] = some_gradients(modules["module"])
        if compare:
            check_gradients(gradients["straightforward"], gradients["module"])

        def training_call(name):
            return lambda: train_once(modules[name], calls[name])

        return self.time_rounds({name: training_call(name) for name in modules}), saved_mib

    def time_cell(self, batch, dtype, tokens):
        "Times and ratios of one batch size, precision and budget, for forward pass and training."
        modules, features = self.build(batch, getattr(torch, dtype), tokens)
        folded = modules["module"].fold()

        def forward_call(projector):
            return lambda: projector(features, tokens=tokens)

        calls = {name: forward_call(module) for name, module in modules.items()}
        calls["folded"] = forward_call(folded)
        is_float32 = dtype == "float32"
        tolerance = dict(rtol=0, atol=1e-4) if is_float32 else dict(rtol=0.05, atol=0.1)
        forward = self.time_forward(calls, tolerance)
        training, saved_mib = self.time_training(modules, calls, compare=is_float32)
        return dict(
            batch=batch,
            dtype=dtype,
            tokens=tokens,
            forward_ms={name: summary(values) for name, values in forward.items()},
            forward_over_module=ratios(forward, "module"),
            forward_over_folded=ratios(forward, "folded"),
            folded_over_floor=ratios(forward, "floor")["folded"],
            training_ms={name: summary(values) for name, values in training.items()},
            training_over_module=ratios(training, "module"),
            kept_mib=saved_mib,
        )

    # ------------------------------------------------------------ all cells

    def __call__(self):
        cells = [(b, d, t) for b in self.batch for d in self.dtype for t in self.tokens]
        rows = []
        for batch, dtype, tokens in tqdm(cells):
            row = self.time_cell(batch, dtype, tokens)
            tqdm.write(report(row))
            rows.append(row)
            self.write(rows)
        print(f"wrote {self.record}")

    def write(self, rows):
        "The record, after every cell."
        clock = "CPU time of the process" if self.clock is time.process_time else "wall"
        write_record(
            self.record,
            [self.seed],
            rows,
            device=self.device,
            threads=self.threads,
            clock=clock,
            rounds=self.rounds,
            d_vision=self.d_vision,
            d_llm=self.d_llm,
        )


def report(row) -> str:
    "One cell of the table as a line."

    def show(ratio):
        return f"{ratio['median']:5.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"

    forward = row["forward_over_module"]
    training = row["training_over_module"]
    folded = row["forward_over_folded"]["straightforward"]
    parts = [
        f"{row['batch']:3} {row['dtype']:8} V={row['tokens']:3}",
        f"forward: straightforward ÷ module {show(forward['straightforward'])}, ÷ folded {show(folded)}, "
        f"tokenpacker ÷ module {show(forward['tokenpacker'])}, "
        f"folded ÷ floor {show(row['folded_over_floor'])}",
        f"training: straightforward ÷ module {show(training['straightforward'])}, "
        f"tokenpacker ÷ module {show(training['tokenpacker'])}, saved MiB {row['kept_mib']}",
    ]
    return ";  ".join(parts)


if __name__ == "__main__":
    tyro.cli(ProjectorTimes)()
