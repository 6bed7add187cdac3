"""python tests/data/subset_parity.py FULL SUBSET: the part of the parity fixtures that lives in the repository.

Left out: grids 12 and 24 of delta_llava (real_shapes covers 24×24 at true widths), one case of delta_llava_hd16, three cases of
delta_blocks (covered inside the projector), the largest position tables, and every system other than Delta-LLaVA."""
import json
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file

KEEP = {  # fixture -> the cases that stay
    "delta_llava": lambda c: c.startswith("g8"), "delta_llava_hd16": lambda c: c == "g8s2", "delta_blocks": lambda c: c not in ("mhca256", "ntb128", "emhsa_sr1"),
    "delta_posembed_windows": lambda c: True, "clip_feature_select": lambda c: True, "real_shapes": lambda c: c.startswith("delta_"),
}
DROP = ("out.abs_pos_64_24_to_24", "out.abs_pos_64_24_to_16")


def main(full: Path, subset: Path):
    subset.mkdir(parents=True, exist_ok=True)
    for name, keep in KEEP.items():
        info = json.loads((full/f"{name}.json").read_text())
        gone = {c["name"] for c in info["cases"] if not keep(c["name"])}
        info["cases"] = [c for c in info["cases"] if keep(c["name"])]
        inputs = {k for c in info["cases"] for k in c.get("inputs", [])}
        tensors = {}
        for key, value in load_file(full/f"{name}.safetensors").items():
            kind, case = key.split(".")[:2]
            if name == "delta_llava" and kind == "in": stays = key in inputs
            elif name == "real_shapes": stays = keep(case)
            else: stays = case not in gone and key not in DROP
            if stays: tensors[key] = value
        (subset/f"{name}.json").write_text(json.dumps(info, indent=1) + "\n")
        save_file(tensors, subset/f"{name}.safetensors")
        (subset/f"{name}.safetensors").chmod(0o644)


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
