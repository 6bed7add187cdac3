"""python tests/data/subset_parity.py FULL SUBSET: the part of the parity fixtures that is stored in the
repository, below 6 MB.

Cases are left out if another stored case or a closed form tests nearly the same:

- delta_llava: grids 12 and 24 (real_shapes has 24×24 at true widths); gradients of the largest
  parameters, and gradients of the inputs at two budgets of four
- delta_blocks: blocks that the whole projector contains, a stride that it never uses, and the simpler
  one of two pooled attentions
- delta_posembed_windows: the largest tables of positions, which differ from the smaller ones only in the
  grid
- delta_llava_hd16, llava_mlp, mqt_resampler, honeybee_cabstractor: other budgets and depths
- m3_pooling: all 576 tokens, where nothing is pooled
- prumerge: batches of two images, among them the case that the reference cannot compute
- tokenpacker, quecc: grid 12, and of grid 8 all but one corner of one image (see `crop_fixture`)

`pytest --parity-dir FULL` runs the same tests on all fixtures.
"""

import json
import re
import sys
from math import isqrt
from pathlib import Path

from safetensors.torch import load_file, save_file

# fixture: (pattern of cases that are left out with all their tensors, pattern of single tensors)
LEFT_OUT = {
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
CROPPED = ("tokenpacker", "quecc")
NOTE = (
    "Cropped: the first image's upper left 4×4 patches of the 8×8 grid. Windows are independent of each "
    "other, so the reference's outputs stay valid."
)


def crop(x):
    "[b, n, c] -> [1, n/4, c]: the upper left quarter of the first image; a single token is kept."
    grid = isqrt(x.shape[1])
    side = max(grid // 2, 1)
    return x[:1].view(1, grid, grid, -1)[:, :side, :side].flatten(1, 2).contiguous()


def crop_fixture(info, tensors):
    "A fixture of grid 8 as one of grid 4, in place: `info` is changed, the tensors are returned."
    cropped = {}
    for key, tensor in tensors.items():
        cropped[key.replace("g8", "g4")] = tensor if key.startswith("state") else crop(tensor)
    info["note"] = " ".join(filter(None, [info.get("note"), NOTE]))
    for case in info["cases"]:
        name = case["name"].replace("g8", "g4")
        out_shape = list(cropped[f"out.{name}"].shape)
        case |= dict(name=name, raw_grid=4, batch=1, out_shape=out_shape)
        if "inputs" in case:
            case["inputs"] = [key.replace("g8", "g4") for key in case["inputs"]]
        if f"cot.{name}" not in cropped:
            case.pop("grads", None)
    return cropped


def is_kept(key, cases, single):
    "Whether the tensor `key` belongs to the subset."
    of_left_out_case = re.match(rf"(\w+\.|state_)({cases})(\.|$)", key)
    return not (re.fullmatch(single, key) or of_left_out_case)


def write_subset(full, subset, name):
    "One fixture of the subset."
    cases, single = LEFT_OUT[name]
    info = json.loads((full / f"{name}.json").read_text())
    info["cases"] = [case for case in info["cases"] if not re.fullmatch(cases, case["name"])]
    tensors = load_file(full / f"{name}.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if is_kept(key, cases, single)}
    if name in CROPPED:
        tensors = crop_fixture(info, tensors)
    text = json.dumps(info, indent=1, ensure_ascii=False)
    (subset / f"{name}.json").write_text(text + "\n")
    path = subset / f"{name}.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)


def main(full: Path, subset: Path):
    subset.mkdir(parents=True, exist_ok=True)
    for name in LEFT_OUT:
        write_subset(full, subset, name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
