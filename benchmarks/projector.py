"""Time the Delta projector three ways, side by side:

  straightforward  the authors' algorithm step by step: ΔW formed at every call, nn.MultiheadAttention with its weights, positions resized at every call
  module           DeltaProjector
  folded           DeltaProjector.fold()

The three compute the same; this is checked before anything is timed. Every round times all three once, in an order that rotates, and a ratio is
taken within its round, so that other work on the machine hits both sides. Printed: the median ratio and the middle half of the rounds.

  python benchmarks/projector.py --batch 1 8 --dtype float32 --tokens 144 36 1 --rounds 9 --record
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from delta_llava.config import ProjectorConfig
from delta_llava.grid import sincos_2d
from delta_llava.projector import DeltaProjector
from delta_llava.train import hardware, write_record


class Straightforward(nn.Module):
    "The default projector without any thought of speed, on the weights of a `DeltaProjector`."
    def __init__(self, projector: DeltaProjector):
        super().__init__()
        self.p, c = projector, projector.config.d_vision
        self.attention = nn.MultiheadAttention(c, projector.config.heads)
        state = projector.attend.state_dict()
        self.attention.load_state_dict({"in_proj_weight": state["qkv.weight"], "in_proj_bias": state["qkv.bias"],
                                        "out_proj.weight": state["out.weight"], "out_proj.bias": state["out.bias"]})
        self.attention.to(projector.mlp[0].weight)
        self.table = sincos_2d(projector.config.grid, c)

    def delta(self, part, x):
        return part.norm(F.gelu(F.linear(x, part.base.weight + (part.U @ part.V).T)))

    def self_attention(self, m, t):
        x = m.norm(t)
        q, k, v = (rearrange(F.linear(x, w, b), "b n (h d) -> b h n d", d=m.head_dim) for w, b in zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3)))
        scores = q @ k.transpose(-1, -2) * m.head_dim**-.5
        if not scores.isfinite().all(): raise ValueError("non-finite attention scores")  # the host waits for the device here, as in the reference
        scores = scores - scores.amax(-1, keepdim=True)
        return m.out(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))

    def mix(self, x):
        "The block on images [b, c, row, col], with 1×1 convolutions."
        block, g = self.p.mix, x.shape[-1]
        point = lambda layer, y: F.conv2d(y, layer.weight[..., None, None], layer.bias)
        t = rearrange(point(block.far, x), "b c row col -> b (row col) c")
        t = t + self.self_attention(block.emhsa, block.norm(t))
        t = rearrange(t, "b (row col) c -> b c row col", row=g).contiguous()
        p = point(block.near, t)
        y = block.mhca.norm(block.mhca.conv(p).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        p = p + point(block.mhca.out, F.relu(y))
        y = torch.cat([t, p], 1)
        return y + point(block.mlp[2], F.relu(point(block.mlp[0], y)))

    def forward(self, x, tokens):
        config, b = self.p.config, x.shape[0]
        g = math.isqrt(tokens)
        image = lambda y: rearrange(y, "b (row col) c -> b c row col", row=config.grid)
        k, v = self.delta(self.p.k, x), self.delta(self.p.v, x)
        q = self.mix(F.interpolate(image(x[..., -config.d_vision:]).contiguous(), size=(g, g), mode="bilinear", align_corners=False)).flatten(2).transpose(1, 2)
        place = F.interpolate(image(self.table[None].to(x.device)), size=(g, g), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        q = self.delta(self.p.q, q + place.to(x.dtype))
        k, v = (rearrange(y, "b (row i col j) c -> (i j) (row col b) c", row=g, col=g, i=config.grid//g) for y in (k, v))
        y, _ = self.attention(rearrange(q, "b v c -> 1 (v b) c"), k, v, need_weights=True)
        return self.p.mlp(rearrange(y, "1 (v b) c -> b v c", b=b))


def timed(f, device):
    "Seconds of one call, device included."
    if device.type == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values):
    "Median and the middle half."
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def measure(batch, dtype, tokens, args, device):
    "One row: times and ratios of the three, from paired rounds."
    torch.manual_seed(args.seed)
    config = ProjectorConfig(d_vision=args.d_vision, d_llm=args.d_llm)
    module = DeltaProjector(config).to(device, getattr(torch, dtype)).eval()
    x = torch.randn(batch, config.grid**2, config.d_levels).to(device, getattr(torch, dtype))
    straight, folded = Straightforward(module).eval(), module.fold()
    calls = {"straightforward": lambda: straight(x, tokens), "module": lambda: module(x, tokens=tokens), "folded": lambda: folded(x, tokens=tokens)}
    with torch.no_grad():
        outs = {n: f().float() for n, f in calls.items()}  # warms up, too
        for name, out in outs.items():
            torch.testing.assert_close(out, outs["straightforward"], rtol=0, atol=1e-4 if dtype == "float32" else .05, msg=lambda m: f"{name} computes something else: {m}")
        seconds = {n: [] for n in calls}
        for i in range(args.rounds):
            names = list(calls)
            for name in names[i % 3:] + names[:i % 3]: seconds[name].append(timed(calls[name], device))
    ratio = lambda a, b: spread([p/q for p, q in zip(seconds[a], seconds[b])])
    return {"batch": batch, "dtype": dtype, "tokens": tokens, "ms": {n: spread([1e3*t for t in s]) for n, s in seconds.items()},
            "straightforward/module": ratio("straightforward", "module"), "straightforward/folded": ratio("straightforward", "folded"),
            "module/folded": ratio("module", "folded")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images in a batch")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 144, 64, 36, 16, 4, 1], help="budgets that cut the 24×24 grid evenly")
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds, at least 2")
    parser.add_argument("--d-vision", type=int, default=1024, help="width of the tower")
    parser.add_argument("--d-llm", type=int, default=4096, help="width of the LLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write runs/benchmark_projector.json")
    args = parser.parse_args()
    if args.rounds < 2: parser.error(f"--rounds {args.rounds}: a spread needs at least 2")
    if bad := [t for t in args.tokens if math.isqrt(t)**2 != t or t < 1 or 24 % math.isqrt(t)]:
        parser.error(f"--tokens {bad}: the straightforward algorithm takes 576, 144, 64, 36, 16, 9, 4 or 1")
    device = torch.device(args.device)
    print(f"{hardware()}, on {device.type}; torch {torch.__version__}; median of {args.rounds} paired rounds [middle half]")
    print(f"{'batch':>5} {'dtype':>9} {'tokens':>6} {'straightforward':>16}   {'÷ module':>20}   {'÷ folded':>20}")
    show = lambda r: f"{r['median']:6.2f} [{r['low']:.2f}–{r['high']:.2f}]"
    rows = []
    for batch in args.batch:
        for dtype in args.dtype:
            for tokens in args.tokens:
                rows.append(row := measure(batch, dtype, tokens, args, device))
                print(f"{batch:5d} {dtype:>9} {tokens:6d} {row['ms']['straightforward']['median']:13.1f} ms   {show(row['straightforward/module']):>20}   "
                      f"{show(row['straightforward/folded']):>20}", flush=True)
    if args.record:
        path = write_record(Path(__file__).parent.parent/"runs"/"benchmark_projector.json", [args.seed], rows,
                            command=" ".join(["python benchmarks/projector.py", *sys.argv[1:]]), device=args.device, rounds=args.rounds)
        print(f"wrote {path}")


if __name__ == "__main__": main()
