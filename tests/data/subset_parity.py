"""python tests/data/subset_parity.py FULL SUBSET: the part of the parity fixtures that lives in the
repository, below 6 MB.

Left out is what another stored case, or a closed form, shows nearly as well:

- delta_llava: grids 12 and 24 (real_shapes has 24×24 at true widths); gradients by the largest
  parameters, and by the inputs of two budgets of four
- delta_blocks: blocks that the whole projector covers, a stride that it never takes, and of two pooled
  attentions the easier one
- delta_posembed_windows: the largest tables of positions, which differ from the smaller ones in their grid
- delta_llava_hd16, llava_mlp, mqt_resampler, honeybee_cabstractor: other budgets and depths
- m3_pooling: all 576 tokens, where nothing is pooled
- prumerge: pictures in twos, and with them the case that the reference cannot compute
- tokenpacker, quecc: grid 12, and of grid 8 all but one corner of one picture (see `corner`)

`--parity-dir FULL` runs the same tests on everything.
"""

import json
import re
import sys
from math import isqrt
from pathlib import Path

from safetensors.torch import load_file, save_file

LEFT_OUT = {  # fixture -> pattern of the cases that go, with all their tensors; pattern of single tensors that go
    "clip_feature_select": ("", ""),
    "delta_blocks": (r"mhca256|ntb128|ntb96to128_stride2|emhsa_sr[12]", ""),
    "delta_llava": (
        r"g(12|24)(s\d+)?",
        r"gin\.g8s[14]\..*|gp\..*(in_proj_weight|(mlp\.conv\d|[kv]_proj_1\.shared_weight)\.weight)",
    ),
    "delta_llava_hd16": (r"g8s4", ""),
    "delta_posembed_windows": ("", r"out\.(abs_pos_64_24_to_(16|24)|sincos_64_24)"),
    "fastv": ("", ""),
    "gradcam": ("", ""),
    "honeybee_cabstractor": (r"d0_q9|d1_q16", ""),
    "llava_mlp": (r"mlp3x_gelu", ""),
    "llava_splice": ("", ""),
    "m3_pooling": (r"s576", ""),
    "mqt_resampler": (r"m\d+", r"in\.x"),
    "prumerge": (r"b2(_.*)?", ""),
    "quecc": (r"g12(k\d+)?", ""),
    "qwen_resampler": ("", ""),
    "real_shapes": ("", ""),
    "tokenpacker": (r"g12(s\d+)?", r"(gin|cot)\.g8s4.*"),
}
CORNERS = ("tokenpacker", "quecc")
NOTE = "Cut: the first picture's upper left 4×4 patches of the 8×8 grid; cells do not see each other, so the reference's numbers hold."


def quarter(x):
    "[b, n, c] -> [1, n/4, c]: the upper left of the first picture; what has one place keeps it."
    g = isqrt(x.shape[1])
    return x[:1].view(1, g, g, -1)[:, : max(g // 2, 1), : max(g // 2, 1)].flatten(1, 2).contiguous()


def corner(info, tensors):
    "A fixture of grid 8 as one of grid 4, in place: `info` is changed, the tensors are returned."
    out = {k.replace("g8", "g4"): v if k.startswith("state") else quarter(v) for k, v in tensors.items()}
    info["note"] = " ".join(filter(None, [info.get("note"), NOTE]))
    for case in info["cases"]:
        case["name"] = case["name"].replace("g8", "g4")
        case |= dict(raw_grid=4, batch=1, out_shape=list(out[f"out.{case['name']}"].shape))
        if "inputs" in case:
            case["inputs"] = [k.replace("g8", "g4") for k in case["inputs"]]
        if f"cot.{case['name']}" not in out:
            case.pop("grads", None)
    return out


def main(full: Path, subset: Path):
    subset.mkdir(parents=True, exist_ok=True)
    for name, (cases, single) in LEFT_OUT.items():

        def stays(key):
            return not (re.fullmatch(single, key) or re.match(rf"(\w+\.|state_)({cases})(\.|$)", key))

        info = json.loads((full / f"{name}.json").read_text())
        info["cases"] = [c for c in info["cases"] if not re.fullmatch(cases, c["name"])]
        tensors = {k: v for k, v in load_file(full / f"{name}.safetensors").items() if stays(k)}
        if name in CORNERS:
            tensors = corner(info, tensors)
        (subset / f"{name}.json").write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n")
        save_file(tensors, subset / f"{name}.safetensors")
        (subset / f"{name}.safetensors").chmod(0o644)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
