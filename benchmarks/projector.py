"""Time the Delta projector side by side with the algorithm it computes, with TokenPacker, and with the
least that any exact algorithm must do:

  straightforward  the authors' algorithm step by step: ΔW formed at every call,
                   nn.MultiheadAttention with its weights, positions resized at every call
  tokenpacker      TokenPacker's algorithm, likewise
  module           DeltaProjector
  folded           DeltaProjector.fold()
  floor            the matrix products, convolutions and the mixing attention of `folded`, on the
                   same tensors, with nothing between them

    python benchmarks/projector.py                                  # writes runs/benchmark_projector.json
    python benchmarks/projector.py --device cuda --batch 1 8 64 --dtype bfloat16 --record
           runs/benchmark_projector_gpu.json

That all but TokenPacker compute the same, gradients included, is checked before anything is timed. Every
round times each once, in an order that rotates, and a ratio is taken within its round, so that other
work on the machine hits both sides. glibc keeps what is freed, as the allocator of a GPU does: else most
of what is timed at batch 8 is the kernel clearing pages. Printed: the median ratio and the middle half
of the rounds. Training is forward and backward to every parameter, without DropPath; its memory is what
autograd keeps. On a CPU with `--threads 1` the clock is the time of the process, in which other work
takes part only through caches and clock rates; otherwise the wall's.
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
from delta_llava.speed import median_and_quartiles
from delta_llava.runs import write_record


class PlainAttention(nn.Module):
    "Attention inside each window as the authors and TokenPacker compute it: every window a sequence of nn.MultiheadAttention, which also returns its weights."

    def __init__(self, attend: WindowAttention):
        super().__init__()
        self.attention = nn.MultiheadAttention(attend.channels, attend.heads)
        for name, p in dict(in_proj_weight=attend.qkv.weight, in_proj_bias=attend.qkv.bias).items():
            setattr(self.attention, name, p)
        self.attention.out_proj.weight, self.attention.out_proj.bias = attend.out.weight, attend.out.bias

    def forward(self, q, k, v):
        g, s = math.isqrt(q.shape[1]), math.isqrt(k.shape[1] // q.shape[1])
        k, v = (
            rearrange(y, "b (row i col j) c -> (i j) (row col b) c", row=g, col=g, i=s, j=s) for y in (k, v)
        )
        y, _ = self.attention(rearrange(q, "b v c -> 1 (v b) c"), k, v, need_weights=True)
        return rearrange(y, "1 (v b) c -> b v c", b=q.shape[0])


class Straightforward(nn.Module):
    "The default projector without any thought of speed, on the weights of a `DeltaProjector`."

    def __init__(self, projector: DeltaProjector):
        super().__init__()
        self.p, self.attention = projector, PlainAttention(projector.attend)
        self.table = sincos_2d(projector.config.grid, projector.config.d_vision)

    def delta(self, part, x):
        return part.norm(F.gelu(F.linear(x, part.base.weight + (part.U @ part.V).T)))

    def self_attention(self, m, t):
        x = m.norm(t)
        q, k, v = (
            rearrange(F.linear(x, w, b), "b n (h d) -> b h n d", d=m.head_dim)
            for w, b in zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3))
        )
        scores = q @ k.transpose(-1, -2) * m.head_dim**-0.5
        if not scores.isfinite().all():
            raise ValueError(
                "non-finite attention scores"
            )  # the host waits for the device here, as in the reference
        scores = scores - scores.amax(-1, keepdim=True)
        return m.out(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))

    def mix(self, x):
        "The block on images [b, c, row, col], with 1×1 convolutions."
        block, g = self.p.mix, x.shape[-1]
        point = lambda layer, y: F.conv2d(y, layer.weight[..., None, None], layer.bias)
        t = rearrange(point(block.attn_branch, x), "b c row col -> b (row col) c")
        t = t + self.self_attention(block.emhsa, block.norm(t))
        t = rearrange(t, "b (row col) c -> b c row col", row=g).contiguous()
        p = point(block.conv_branch, t)
        y = block.mhca.norm(block.mhca.conv(p).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        p = p + point(block.mhca.out, F.relu(y))
        y = torch.cat([t, p], 1)
        return y + point(block.mlp[2], F.relu(point(block.mlp[0], y)))

    def forward(self, x, tokens):
        config, b = self.p.config, x.shape[0]
        g = math.isqrt(tokens)
        image = lambda y: rearrange(y, "b (row col) c -> b c row col", row=config.grid)
        k, v = self.delta(self.p.k, x), self.delta(self.p.v, x)
        q = (
            self.mix(
                F.interpolate(
                    image(x[..., -config.d_vision :]).contiguous(),
                    size=(g, g),
                    mode="bilinear",
                    align_corners=False,
                )
            )
            .flatten(2)
            .transpose(1, 2)
        )
        place = (
            F.interpolate(
                image(self.table[None].to(x.device)), size=(g, g), mode="bicubic", align_corners=False
            )
            .flatten(2)
            .transpose(1, 2)
        )
        q = self.delta(self.p.q, q + place.to(x.dtype))
        return self.p.mlp(self.attention(q, k, v))


PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
}


class Products(TorchDispatchMode):
    "Remember every matrix product that is asked for, with its tensors; `replay` does them again."

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket in PRODUCTS or "scaled_dot_product" in f.name():
            self.calls.append((f, args, kwargs or {}))
        return f(*args, **kwargs or {})

    def replay(self):
        for f, args, kwargs in self.calls:
            f(*args, **kwargs)


def keep_memory():
    "Freed memory stays with the process, whatever its size; where there is no glibc, nothing changes."
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**30)):
        libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


@dataclass
class ProjectorTimes:
    batch: tuple[int, ...] = (1, 8)  # Pictures at a time
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (576, 144, 64, 36, 16, 4, 1)  # Budgets V that cut the 24×24 grid evenly
    rounds: int = 9  # Paired rounds
    d_vision: int = 1024  # Width of the tower
    d_llm: int = 4096  # Width of the LLM
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = torch.get_num_threads()  # On a CPU
    seed: int = 0  # Of weights and features
    record: Path = Path("runs/benchmark_projector.json")

    def __post_init__(self):
        if self.rounds < 2:
            raise ValueError(f"rounds={self.rounds} must be at least 2: there is no spread of one.")
        if bad := [t for t in self.tokens if t < 1 or math.isqrt(t) ** 2 != t or 24 % math.isqrt(t)]:
            raise ValueError(
                f"tokens={bad}: the straightforward algorithm takes 576, 144, 64, 36, 16, 9, 4 or 1."
            )
        torch.set_num_threads(self.threads)
        keep_memory()
        self.clock = time.process_time if self.device == "cpu" and self.threads == 1 else time.perf_counter

    def wait(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, f):
        self.wait()
        start = self.clock()
        f()
        self.wait()
        return self.clock() - start

    def rotate(self, calls):
        "Milliseconds of each call in each round."
        names, found = list(calls), {n: [] for n in calls}
        for i in range(self.rounds):
            for n in names[i % len(names) :] + names[: i % len(names)]:
                found[n].append(1e3 * self.seconds(calls[n]))
        return found

    def time_cell(self, batch, dtype, tokens):
        "One cell of the table: times and ratios, forward and training."
        torch.manual_seed(self.seed)
        config = ProjectorConfig(d_vision=self.d_vision, d_llm=self.d_llm)
        cast = lambda m: m.to(self.device, getattr(torch, dtype)).eval()
        module, packer = (
            cast(DeltaProjector(config)),
            cast(build_compressor("tokenpacker", compressor_config("tokenpacker", config, tokens=tokens))),
        )
        packer.attend = PlainAttention(packer.attend)
        x = torch.randn(batch, config.grid**2, config.d_levels).to(self.device, getattr(torch, dtype))
        straight, folded = Straightforward(module).eval(), module.fold()
        calls = dict(
            straightforward=lambda: straight(x, tokens),
            tokenpacker=lambda: packer(x, tokens=tokens),
            module=lambda: module(x, tokens=tokens),
            folded=lambda: folded(x, tokens=tokens),
        )
        close = dict(rtol=0, atol=1e-4) if dtype == "float32" else dict(rtol=0.05, atol=0.1)
        with torch.no_grad():
            outs = {n: f().float() for n, f in calls.items() if n != "tokenpacker"}  # warms up, too
            for n, out in outs.items():
                torch.testing.assert_close(
                    out, outs["straightforward"], **close, msg=lambda m: f"{n} computes something else: {m}"
                )
            with Products() as floor:
                folded(x, tokens=tokens)
            forward = self.rotate(calls | dict(floor=floor.replay))
        train, kept = self.training(
            dict(straightforward=straight, tokenpacker=packer, module=module),
            calls,
            close if dtype == "float32" else None,
        )
        middle = lambda values: dict(zip(("median", "low", "high"), median_and_quartiles(values)))
        against = lambda times, name: {
            other: middle([a / b for a, b in zip(times[other], times[name])])
            for other in times
            if other != name
        }
        return dict(
            batch=batch,
            dtype=dtype,
            tokens=tokens,
            forward_ms={n: middle(t) for n, t in forward.items()},
            forward_over_module=against(forward, "module"),
            forward_over_folded=against(forward, "folded"),
            folded_over_floor=middle([a / b for a, b in zip(forward["folded"], forward["floor"])]),
            training_ms={n: middle(t) for n, t in train.items()},
            training_over_module=against(train, "module"),
            kept_mib=kept,
        )

    def training(self, modules, calls, close):
        "The same for forward and backward; and what autograd keeps, MiB."

        def once(name):
            for p in modules[name].parameters():
                p.grad = None
            calls[name]().square().sum().backward()

        kept, grads = {}, {}
        for name, m in modules.items():
            with SavedBytes(m) as saved:
                calls[name]()
            kept[name] = round(saved.total / 2**20, 1)
            once(name)
            if name != "tokenpacker":
                grads[name] = [
                    p.grad.clone()
                    for p in (
                        modules["module"].k.U,
                        modules["module"].q.base.weight,
                        modules["module"].mlp[0].weight,
                    )
                ]
        if close:
            for a, b in zip(grads["straightforward"], grads["module"]):
                torch.testing.assert_close(
                    b, a, rtol=1e-3, atol=1e-3 * a.abs().max().item(), msg=lambda m: f"other gradients: {m}"
                )
        return self.rotate({n: lambda n=n: once(n) for n in modules}), kept

    def __call__(self):
        show = lambda r: f"{r['median']:5.2f} [{r['low']:.2f}–{r['high']:.2f}]"
        rows = []
        for batch, dtype, tokens in tqdm(
            [(b, d, t) for b in self.batch for d in self.dtype for t in self.tokens]
        ):
            rows.append(row := self.time_cell(batch, dtype, tokens))
            f, t = row["forward_over_module"], row["training_over_module"]
            tqdm.write(
                f"{batch:3} {dtype:8} V={tokens:3}  forward: straightforward ÷ module {show(f['straightforward'])}, ÷ folded {show(row['forward_over_folded']['straightforward'])}, tokenpacker ÷ module {show(f['tokenpacker'])}, "
                f"folded ÷ floor {show(row['folded_over_floor'])};  training: straightforward ÷ module {show(t['straightforward'])}, tokenpacker {show(t['tokenpacker'])}, kept {row['kept_mib']}"
            )
        clock = "CPU time of the process" if self.clock is time.process_time else "wall"
        print(
            f"wrote {write_record(self.record, [self.seed], rows, device=self.device, threads=self.threads, clock=clock, rounds=self.rounds, d_vision=self.d_vision, d_llm=self.d_llm)}"
        )


if __name__ == "__main__":
    tyro.cli(ProjectorTimes)()
