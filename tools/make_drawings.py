"""Build `delta_llava/drawings/`: 64 everyday objects by three artists, as one RGBA sheet per artist.

    python tools/make_drawings.py            fetch the three packages with npm and write the folder
    python tools/make_drawings.py --check    fetch, build in memory, and fail if the folder differs in a byte

npm and Pillow are needed (the Pillow of requirements.lock: another libwebp may compress to other bytes).
Licence texts (`LICENSE-*.txt`) are kept by hand beside what this writes.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "delta_llava" / "drawings"
COLUMNS = 8

# name: how the sheets are cut, where the drawings come from, and what their licence asks to be said
ARTISTS = {
    "noto": dict(
        package="emoji-datasource-google",
        version="16.0.0",
        side=64,
        inside="package/img/google/64/{}.png",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        licence="Apache-2.0",
        work="Noto Emoji",
        credit="Copyright Google LLC",
        origin="https://github.com/googlefonts/noto-emoji",
    ),
    "fluent": dict(
        package="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        side=128,
        inside="package/assets/{}.webp",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        licence="MIT",
        work="Fluent Emoji (3D)",
        credit="Copyright (c) Microsoft Corporation; packaged by LobeHub",
        origin="https://github.com/microsoft/fluentui-emoji",
    ),
    "twemoji": dict(
        package="emoji-datasource-twitter",
        version="16.0.0",
        side=64,
        inside="package/img/twitter/64/{}.png",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        licence="CC-BY-4.0",
        work="Twemoji",
        credit="Copyright Twitter, Inc and other contributors",
        origin="https://github.com/jdecked/twemoji",
    ),
}

# Name and code point. The order decides which objects share a training image (nbs/30_scenes): append only.
CONCEPTS = """
fox 1f98a, cat 1f408, elephant 1f418, horse 1f40e, cow 1f404, pig 1f416, rabbit 1f407, penguin 1f427,
owl 1f989, duck 1f986, turtle 1f422, snake 1f40d, octopus 1f419, crab 1f980, shark 1f988, butterfly 1f98b,
spider 1f577-fe0f, frog 1f438, lion 1f981, panda 1f43c, giraffe 1f992, flamingo 1f9a9, banana 1f34c,
apple 1f34e, pineapple 1f34d, strawberry 1f353, watermelon 1f349, lemon 1f34b, carrot 1f955, eggplant 1f346,
mushroom 1f344, hamburger 1f354, donut 1f369, taco 1f32e, avocado 1f951, cake 1f382, pizza 1f355, car 1f697,
bus 1f68c, bicycle 1f6b2, train 1f682, airplane 2708-fe0f, helicopter 1f681, rocket 1f680, sailboat 26f5,
tractor 1f69c, anchor 2693, castle 1f3f0, guitar 1f3b8, drum 1f941, trumpet 1f3ba, basketball 1f3c0,
kite 1fa81, trophy 1f3c6, umbrella 2602-fe0f, key 1f511, clock 23f0, camera 1f4f7, bell 1f514, crown 1f451,
chair 1fa91, cactus 1f335, sunflower 1f33b, robot 1f916
"""


def concepts() -> list[dict]:
    "Name, article and code point of each object."
    pairs = [entry.split() for entry in CONCEPTS.replace("\n", " ").strip().split(",")]
    return [dict(name=name, article="an" if name[0] in "aeiou" else "a", code=code) for name, code in pairs]


def fetch(artist: dict, folder: Path) -> tarfile.TarFile:
    "Download the package by name and compare its bytes with the checksum above."
    name = f"{artist['package']}@{artist['version']}"
    command = ["npm", "pack", "--silent", name]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    file = folder / done.stdout.strip().splitlines()[-1]
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != artist["sha256"]:
        sys.exit(f"{name}: sha256 {found}, expected {artist['sha256']}; nothing was written.")
    return tarfile.open(file)


def load_cutout(package: tarfile.TarFile, artist: dict, code: str) -> Image.Image:
    "One drawing, at most `side` px, cropped to the smallest box that holds all its pixels."
    members = set(package.getnames())
    candidates = [artist["inside"].format(c) for c in (code, code.removesuffix("-fe0f"))]
    path = next((path for path in candidates if path in members), None)
    if path is None:
        sys.exit(f"{artist['package']} has no image {code}.")
    image = Image.open(io.BytesIO(package.extractfile(path).read())).convert("RGBA")
    if image.width > artist["side"]:
        image = image.resize((artist["side"], artist["side"]), Image.Resampling.LANCZOS)
    solid = image.getchannel("A").point(lambda a: 255 * (a >= 32))  # without the soft shadow of an edge
    return image.crop(solid.getbbox())


def sheet(package: tarfile.TarFile, artist: dict) -> tuple[bytes, list[list[int]]]:
    "All drawings of one artist in a grid, as lossless WebP, with the box of each."
    side = artist["side"]
    objects = concepts()
    boxes = []
    page = Image.new("RGBA", (COLUMNS * side, -(-len(objects) // COLUMNS) * side))
    for i, concept in enumerate(objects):
        image = load_cutout(package, artist, concept["code"])
        x = i % COLUMNS * side
        y = i // COLUMNS * side
        page.paste(image, (x, y))
        boxes.append([x, y, x + image.width, y + image.height])
    out = io.BytesIO()
    page.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue(), boxes


def attribution() -> str:
    "ATTRIBUTION.md: the credits that the licences ask for."
    lines = [
        "# Credits of the drawings",
        "",
        "Each sheet holds a selection of one artist's emoji. **Changes made**: cut to the outline, "
        "arranged in a grid, saved as",
        "WebP (Fluent also scaled from 256 to 128 px). Scenes made from them are collages and inherit these "
        "licences.",
        "",
        "| sheet | work | credit | licence | origin | taken from |",
        "|---|---|---|---|---|---|",
    ]
    for name, artist in ARTISTS.items():
        licence = f"{artist['licence']} (`LICENSE-{name}.txt`)"
        package = f"npm `{artist['package']}` {artist['version']}"
        cells = [f"`{name}.webp`", artist["work"], artist["credit"], licence, artist["origin"], package]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def index_text(index: dict) -> str:
    "The index as JSON, with each box and each object on one line."
    text = json.dumps(index, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text)
    return re.sub(r'\{\s+("name".*),\s+("article".*),\s+("code".*)\s+\}', r"{\1, \2, \3}", text) + "\n"


def build() -> dict[str, bytes]:
    "Name -> content of each file of the folder."
    files = {}
    objects = concepts()
    index = dict(concepts=objects, artists={})
    with tempfile.TemporaryDirectory() as folder:
        for name, artist in ARTISTS.items():
            with fetch(artist, Path(folder)) as package:
                content, boxes = sheet(package, artist)
            files[f"{name}.webp"] = content
            credit = {k: artist[k] for k in ("work", "credit", "licence", "origin", "package", "version")}
            box_of = {concept["name"]: box for concept, box in zip(objects, boxes, strict=True)}
            index["artists"][name] = credit | dict(sha256=hashlib.sha256(content).hexdigest(), boxes=box_of)
    files["drawings.json"] = index_text(index).encode()
    files["ATTRIBUTION.md"] = attribution().encode()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", dest="compare_only", action="store_true", help="compare with the folder, write nothing"
    )
    compare_only = parser.parse_args().compare_only
    for name in ARTISTS:
        if not (FOLDER / f"LICENSE-{name}.txt").exists():
            sys.exit(f"LICENSE-{name}.txt is missing from {FOLDER}.")
    differing = []
    for name, content in build().items():
        same = (FOLDER / name).exists() and (FOLDER / name).read_bytes() == content
        if not compare_only:
            (FOLDER / name).write_bytes(content)
        elif not same:
            differing.append(name)
        state = "as before" if same else "differs" if compare_only else "written"
        print(f"{name:16} {len(content):8,d} bytes  {state}")
    if differing:
        sys.exit(f"{', '.join(differing)}: not what the packages give.")


if __name__ == "__main__":
    main()
