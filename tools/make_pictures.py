"""Build `delta_llava/images/`: 64 everyday things, each drawn by three artists, as one RGBA sheet per artist.

    python tools/make_pictures.py            fetch the three packages with npm and write the folder
    python tools/make_pictures.py --check    fetch, build in memory, and fail if one byte differs from the folder

npm and Pillow are needed (the Pillow of requirements.lock: another libwebp may compress to other bytes).
Licence texts (`LICENSE-*.txt`) are kept by hand beside what this writes.
"""

import argparse, hashlib, io, json, re, subprocess, sys, tarfile, tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "delta_llava" / "pictures"
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

# name and code point; the order decides which things meet in a training picture (see nbs/30b_conversations), so add only at the end
CONCEPTS = """
fox 1f98a, cat 1f408, elephant 1f418, horse 1f40e, cow 1f404, pig 1f416, rabbit 1f407, penguin 1f427,
owl 1f989, duck 1f986, turtle 1f422, snake 1f40d, octopus 1f419, crab 1f980, shark 1f988, butterfly 1f98b,
spider 1f577-fe0f, frog 1f438, lion 1f981, panda 1f43c, giraffe 1f992, flamingo 1f9a9, banana 1f34c, apple 1f34e,
pineapple 1f34d, strawberry 1f353, watermelon 1f349, lemon 1f34b, carrot 1f955, eggplant 1f346, mushroom 1f344, hamburger 1f354,
donut 1f369, taco 1f32e, avocado 1f951, cake 1f382, pizza 1f355, car 1f697, bus 1f68c, bicycle 1f6b2,
train 1f682, airplane 2708-fe0f, helicopter 1f681, rocket 1f680, sailboat 26f5, tractor 1f69c, anchor 2693, castle 1f3f0,
guitar 1f3b8, drum 1f941, trumpet 1f3ba, basketball 1f3c0, kite 1fa81, trophy 1f3c6, umbrella 2602-fe0f, key 1f511,
clock 23f0, camera 1f4f7, bell 1f514, crown 1f451, chair 1fa91, cactus 1f335, sunflower 1f33b, robot 1f916
"""


def concepts() -> list[dict]:
    pairs = [entry.split() for entry in CONCEPTS.replace("\n", " ").strip().split(",")]
    return [dict(name=name, article="an" if name[0] in "aeiou" else "a", code=code) for name, code in pairs]


def fetch(artist: dict, folder: Path) -> tarfile.TarFile:
    "The package by its name, its bytes compared with the checksum above."
    name = f"{artist['package']}@{artist['version']}"
    done = subprocess.run(
        ["npm", "pack", "--silent", name], cwd=folder, check=True, capture_output=True, text=True
    )
    file = folder / done.stdout.strip().splitlines()[-1]
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != artist["sha256"]:
        sys.exit(f"{name}: sha256 {found}, expected {artist['sha256']}; nothing was written.")
    return tarfile.open(file)


def load_cutout(package: tarfile.TarFile, artist: dict, code: str) -> Image.Image:
    "One drawing, at most `side` px, cut to the smallest box that holds all its pixels."
    members = set(package.getnames())
    path = next(
        (p for c in (code, code.removesuffix("-fe0f")) if (p := artist["inside"].format(c)) in members), None
    )
    if path is None:
        sys.exit(f"{artist['package']} has no picture {code}.")
    image = Image.open(io.BytesIO(package.extractfile(path).read())).convert("RGBA")
    if image.width > artist["side"]:
        image = image.resize((artist["side"], artist["side"]), Image.Resampling.LANCZOS)
    solid = image.getchannel("A").point(
        lambda a: 255 * (a >= 32)
    )  # the soft shadow of an edge is not the thing
    return image.crop(solid.getbbox())


def sheet(package: tarfile.TarFile, artist: dict) -> tuple[bytes, list[list[int]]]:
    "All drawings of one artist in a grid, as lossless WebP, with the box of each."
    side, names, boxes = artist["side"], concepts(), []
    page = Image.new("RGBA", (COLUMNS * side, -(-len(names) // COLUMNS) * side))
    for i, concept in enumerate(names):
        image, x, y = load_cutout(package, artist, concept["code"]), i % COLUMNS * side, i // COLUMNS * side
        page.paste(image, (x, y))
        boxes.append([x, y, x + image.width, y + image.height])
    out = io.BytesIO()
    page.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue(), boxes


def attribution() -> str:
    lines = [
        "# Who drew the pictures",
        "",
        "Each sheet holds a selection of one artist's emoji. **Changes made**: cut to the outline, arranged in a grid, saved as",
        "WebP (Fluent also scaled from 256 to 128 px). Scenes made from them are collages and inherit these licences.",
        "",
        "| sheet | work | credit | licence | origin | taken from |",
        "|---|---|---|---|---|---|",
    ]
    for name, a in ARTISTS.items():
        lines.append(
            f"| `{name}.webp` | {a['work']} | {a['credit']} | {a['licence']} (`LICENSE-{name}.txt`) | {a['origin']} | npm `{a['package']}` {a['version']} |"
        )
    return "\n".join(lines) + "\n"


def build() -> dict[str, bytes]:
    files, index = {}, dict(concepts=concepts(), artists={})
    with tempfile.TemporaryDirectory() as folder:
        for name, artist in ARTISTS.items():
            with fetch(artist, Path(folder)) as package:
                files[f"{name}.webp"], boxes = sheet(package, artist)
            index["artists"][name] = dict(
                {k: artist[k] for k in ("work", "credit", "licence", "origin", "package", "version")},
                sha256=hashlib.sha256(files[f"{name}.webp"]).hexdigest(),
                boxes={c["name"]: b for c, b in zip(concepts(), boxes)},
            )
    text = re.sub(
        r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", json.dumps(index, indent=1)
    )  # a box on one line
    text = re.sub(r'\{\s+("name".*),\s+("article".*),\s+("code".*)\s+\}', r"{\1, \2, \3}", text)
    files["pictures.json"] = (text + "\n").encode()
    files["ATTRIBUTION.md"] = attribution().encode()
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the folder instead of writing it")
    check = parser.parse_args().check_budget
    for name in ARTISTS:
        if not (FOLDER / f"LICENSE-{name}.txt").exists():
            sys.exit(f"LICENSE-{name}.txt is missing from {FOLDER}.")
    differing = []
    for name, content in build().items():
        same = (FOLDER / name).exists() and (FOLDER / name).read_bytes() == content
        if not check:
            (FOLDER / name).write_bytes(content)
        elif not same:
            differing.append(name)
        print(
            f"{name:16} {len(content):8,d} bytes  {'as before' if same else 'differs' if check else 'written'}"
        )
    if differing:
        sys.exit(f"{', '.join(differing)}: not what the packages give.")
