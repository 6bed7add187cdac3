"The doctor finds each damage where it is and nowhere else; its index can be trained on and is never partial."

import hashlib
import io
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import byte_tokenizer
from transformers import CLIPImageProcessorPil

from delta_llava import doctor
from delta_llava.collator import Collator
from delta_llava.conversations import load_conversations, read_rows
from delta_llava.doctor import (
    OUTCOMES,
    PROBLEMS,
    REPAIRS,
    Problem,
    check_dataset,
    image_problems,
    repair_row,
    row_problems,
)
from delta_llava.processor import build_processor

NOISE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
FILES = ("index.json", "report.json", "report.txt")


def encoded(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    "An image folder with one image for each kind of damage."
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.roll(NOISE, i)).save(folder / f"good{i}.png")
    whole = encoded("PNG")
    contents = {
        "half.png": whole[: len(whole) // 2],
        "page.jpg": b"<html>404</html>",
        "empty.png": b"",
        "named.png": encoded("JPEG"),
        "bare": whole,
        "only.webp": encoded("WEBP"),
        "two.jpg": encoded("JPEG"),
        "two.png": whole,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    first = Image.fromarray(NOISE)
    first.save(folder / "moving.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    for name, size in {"tiny.png": (40, 20), "narrow.png": (400, 40), "thread.png": (4, 1000)}.items():
        first.resize(size).save(folder / name)
    first.save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def make_row(*values, roles=("human", "gpt"), **fields):
    turns = [{"from": roles[k % 2], "value": value} for k, value in enumerate(values)]
    return {"id": "x", "image": "good0.png", "conversations": turns, **fields}


def row_of(image):
    return make_row(f"<image>\nWhat is {str(image)[:9]}?", "A fox.", image=image)


def messages(*texts):
    "Turns as chat messages: the user's and the assistant's alternate."
    return [dict(role=("user", "assistant")[k % 2], content=text) for k, text in enumerate(texts)]


@pytest.fixture(scope="module")
def processor():
    return build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=9, template="v1")


# Each row with what is found in it, what is repaired, and what becomes of it
LEFT_OUT = {
    "missing": (row_of("lost.png"), ["missing"]),
    "a folder": (row_of("."), ["missing"]),
    "truncated": (row_of("half.png"), ["truncated"]),
    "no image": (row_of("page.jpg"), ["unreadable"]),
    "no bytes": (row_of("empty.png"), ["unreadable"]),
    "out of the folder": (row_of("../secret.png"), ["path-escape"]),
    "out by a link": (row_of("link.png"), ["path-escape"]),
    "absolute": (row_of("/etc/hostname"), ["path-escape"]),
    "other ending, ambiguous": (row_of("two.gif"), ["missing"]),
    "thread": (row_of("thread.png"), ["bad-size"]),
    "empty answer": (make_row("<image>\nWho?", " \n"), ["empty-answer"]),
    "roles exchanged": (make_row("<image>\nWho?", "I", roles=("gpt", "human")), ["wrong-role"]),
    "three in a row": (make_row("<image>\nA", "I", "J", roles=("human", "human")), ["wrong-role"]),
    "unknown role": (make_row("<image>\nB", "I", roles=("human", "robot")), ["wrong-role"]),
    "no turns": (make_row(), ["no-turns"]),
    "number as text": (make_row("<image>\nC", 4), ["bad-turn"]),
    "half a character": (make_row("<image>\nD", "A \ud83e"), ["broken-text"]),
    "image token in an answer": (make_row("<image>\nE", "<image>"), ["image-token-in-answer"]),
    "token without image": (make_row("<image>\nF", "A fox.", image=None), ["image-token-without-image"]),
    "two images": (make_row("<image>\nG", "A fox.", image=["good0.png", "good1.png"]), ["several-images"]),
    "two image tokens": (make_row("<image><image>\nH", "A fox."), ["several-images"]),
    "no path": (make_row("<image>\nI", "A fox.", image=7), ["bad-image"]),
    "no object": (["fox"], ["no-object"]),
    "cut away": (make_row("<image>\nJ" + "?" * 900, "A fox."), ["cut-away"]),
    "a video": (make_row("U", "A fox.", image=None, video="a.mp4"), ["unused-media"]),
    "images": (make_row("<image>\nV", "A fox.", image=None, images=["good0.png"]), ["unused-media"]),
    "a sound": (make_row("<image>\nW", "A fox.", audio_path="a.wav"), ["unused-media"]),
    "a clip": (make_row("Z", "A fox.", image=None, clipPath="a.mp4"), ["unused-media"]),
    "mark of a video": (make_row("<image>\nIs it in <Video_2>?", "Yes."), ["unused-media"]),
    "other mark": (make_row("Is it in <|image|>?", "Yes.", image=None), ["image-token-spelling"]),
    "two system prompts": (make_row("<image>\nX", "A", system="A", system_prompt="B"), ["bad-system"]),
    "repaired in vain": (make_row("S", "A fox.", image="half.png"), ["no-image-token", "truncated"]),
    "in vain, without an image": (make_row("T", "A fox.", image="lost.png"), ["no-image-token", "missing"]),
}
KEPT = {
    "animated": (row_of("moving.gif"), ["animated"]),
    "wrong extension": (row_of("named.png"), ["wrong-extension"]),
    "no extension": (row_of("bare"), ["wrong-extension"]),
    "tiny": (row_of("tiny.png"), ["tiny"]),
    "narrow": (row_of("narrow.png"), ["narrow"]),
    "empty question": (make_row("<image>\nWho?", "A fox.", "", "Yes."), ["empty-question"]),
    "blank question": (make_row("<image>\nWho?", "A fox.", " \n", "Yes."), ["empty-question"]),
    "over-long": (make_row("<image>\nJ", "A fox. " * 200), ["over-long"]),
    "second mark": (make_row("<image>\nWhat is in <img>b.png</img>?", "A fox."), ["media-in-text"]),
    "a linked image": (make_row('<img src="b.png"> What?', "A fox.", image=None), ["media-in-text"]),
    "unknown key": (make_row("<image>\nY", "A fox.", caption="A fox."), ["unknown-key"]),
}
REPAIRED = {
    "other roles": (make_row("<image>\nK", "A fox.", roles=("User", "assistant")), ["wrong-role"], ["roles"]),
    "messages": (
        {"id": 3, "image": "good0.png", "conversations": messages("<image>\nL", "A fox.")},
        ["bad-turn"],
        ["roles"],
    ),
    "list of one": (make_row("<image>\nM", "A fox.", image=["good1.png"]), ["bad-image"], ["image"]),
    "empty path": (make_row("Who are you?", "A model.", image=""), ["bad-image"], ["image"]),
    "blanks and a backslash": (
        make_row("<image>\nN", "A fox.", image=" .\\good1.png "),
        ["missing"],
        ["path"],
    ),
    "other ending": (make_row("<image>\nO", "A fox.", image="only.jpg"), ["missing"], ["path"]),
    "no token": (make_row("What is it?", "A fox.", "Sure?", "Yes."), ["no-image-token"], ["image-token"]),
    "image token in other letters": (
        make_row("What is it?", "A fox.", "Now < Image/>?", "Yes."),
        ["no-image-token"],
        ["image-token"],
    ),
    "image token in other letters, and in an answer": (
        make_row("<Image>\nWhat tag is that?", "It is <Image>."),
        ["no-image-token"],
        ["image-token"],
    ),
    "last question open": (make_row("<image>\nP", "A fox.", "Sure?"), ["no-answer"], ["question"]),
    "all at once": (
        {
            "id": 5,
            "image": [" .\\only.gif"],
            "conversations": [
                dict(role="USER", content="Q"),
                dict(role="Assistant", content="A fox."),
                dict(role="user", content="R"),
            ],
        },
        ["bad-turn"],
        ["roles", "image", "path", "image-token", "question"],
    ),
}
DAMAGE = {
    **{name: (row, kinds, [], "left out") for name, (row, kinds) in LEFT_OUT.items()},
    **{name: (row, kinds, [], "kept") for name, (row, kinds) in KEPT.items()},
    **{name: (row, kinds, repairs, "repaired") for name, (row, kinds, repairs) in REPAIRED.items()},
}


def write_rows(file, rows):
    file.write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]")
    return file


def kinds_found(report):
    return [(result.index, [p.kind for p in result.problems]) for result in report.problem_rows]


# ---------------------------------------------------------------- one row


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_found_where_it_is_and_nowhere_else(name, images, tmp_path, processor):
    damaged, kinds, repairs, outcome = DAMAGE[name]
    if isinstance(damaged, dict):
        damaged = {**damaged, "id": "d"}
    good = [{**row_of(f"good{i}.png"), "id": str(i)} for i in range(3)]
    rows = [good[0], damaged, *good[1:]]
    report = check_dataset(
        write_rows(tmp_path / "rows.json", rows),
        images,
        tmp_path / "out",
        processor=processor,
        max_length=500,
    )
    [result] = report.problem_rows
    assert (result.index, [p.kind for p in result.problems]) == (1, kinds)
    assert (result.repairs, result.outcome) == (repairs, outcome)
    assert report.rows == 4 and report.problems == Counter(kinds) and report.repairs == Counter(repairs)
    assert report.outcomes == Counter(["kept"] * 3 + [outcome])
    index = tmp_path / "out" / "index.json"
    assert [row for row, _ in read_rows(index) if row["id"] != "d"] == good
    loaded = load_conversations(index, images, text_rows=True, open_images=True)
    assert len(loaded) == 4 - (outcome == "left out")
    if outcome == "kept":
        assert index.read_text() == "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def test_every_kind_is_planted_somewhere():
    elsewhere = {"text-only", "duplicate-id", "duplicate-row", "template"}
    assert {kind for _, kinds, _, _ in DAMAGE.values() for kind in kinds} | elsewhere == set(PROBLEMS)
    assert {name for _, _, repairs, _ in DAMAGE.values() for name in repairs} == set(REPAIRS)


def test_errors_are_what_training_refuses(images, tmp_path):
    "The line between error and warning is the reader's own."
    for name, (damaged, kinds, _, _) in DAMAGE.items():
        if {"cut-away", "over-long"} & set(kinds):
            continue
        file = write_rows(tmp_path / "rows.json", [damaged])
        if any(p.is_error for p in row_problems(damaged, images)):
            with pytest.raises(ValueError, match="1 of 1 rows"):
                load_conversations(file, images, text_rows=True, open_images=True)
        else:
            assert len(load_conversations(file, images, text_rows=True, open_images=True)) == 1, name


def test_too_long_rows_are_those_that_training_refuses(images, processor, tmp_path):
    "The doctor's index of a set with rows of all lengths can be collated; each row it left out cannot."
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        question, answer = "a" * rng.integers(1, 120), "b" * rng.integers(1, 120)
        rows.append(make_row(f"{question}\n<image>", answer, id=i, image=f"good{i % 3}.png"))
    file = write_rows(tmp_path / "rows.json", rows)
    report = check_dataset(file, images, tmp_path / "out", processor=processor, max_length=260)
    collate = Collator(processor=processor, max_length=260)
    left_out = {result.index for result in report.problem_rows if result.outcome == "left out"}
    assert 0 < len(left_out) < len(rows)
    for i, row in enumerate(load_conversations(file, images)):
        if i in left_out:
            with pytest.raises(ValueError, match=f"^row '{i}': "):
                collate([row])
        else:
            collate([row])
    collate(list(load_conversations(tmp_path / "out" / "index.json", images)))


def test_repairs_lose_nothing(images):
    for damaged, *_ in DAMAGE.values():
        if not isinstance(damaged, dict):
            continue
        before = json.dumps(damaged)
        after, done = repair_row(damaged, images)
        assert json.dumps(damaged) == before  # the row that was given is left alone
        if not done:
            assert after is damaged
        texts = [turn.get("value", turn.get("content")) for turn in damaged["conversations"]]
        kept = [turn.get("value", turn.get("content")) for turn in after["conversations"]]
        assert kept[1::2] == texts[1::2] and len(kept) >= len(texts) - 1  # every answer
        for a, b in zip(kept[::2], texts[::2], strict=False):
            assert str(b).replace("<image>\n", "", 1).strip() in str(a) or "<" in str(a)
        assert after.keys() - {"image"} == damaged.keys() - {"image"}
        assert repair_row(after, images) == (after, [])  # nothing is left to do


def test_rows_without_images(images, tmp_path):
    text = {"id": 2, "conversations": make_row("Hi?", "Hello.")["conversations"], "model": ""}
    file = write_rows(tmp_path / "rows.json", [row_of("good0.png"), text])
    report = check_dataset(file, images)
    assert report.problem_rows == [] and report.text_only == 1 and "text_rows=True" in report.summary()
    assert kinds_found(check_dataset(file, images, text_rows=False)) == [(1, ["text-only"])]


def test_unknown_keys_are_named_once(images, tmp_path):
    rows = [make_row(f"<image>\n{i}", "A", id=i, system="Be brief.", **{"ab"[i % 2]: 1}) for i in range(4)]
    found = check_dataset(write_rows(tmp_path / "rows.json", rows), images, tmp_path / "out").problem_rows
    assert [(r.index, [p.message for p in r.problems]) for r in found] == [
        (0, ["the key 'a' is not read."]),
        (1, ["the key 'b' is not read."]),
    ]


def test_system_prompts_need_a_place(images, processor, tmp_path):
    rows = [make_row("<image>\nQ", "A", id=1), make_row("<image>\nQ2", "A", id=2, system="Be brief.")]
    file = write_rows(tmp_path / "rows.json", rows)
    assert check_dataset(file, images, processor=processor).problem_rows == []
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for before in ("", refusing):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = before + (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
        )
        other = build_processor(CLIPImageProcessorPil(), tokenizer, 9, "chat")
        assert kinds_found(check_dataset(file, images, processor=other)) == [(1, ["template"])]


def test_links_below_the_folder(images, tmp_path):
    file = write_rows(tmp_path / "rows.json", [row_of("link.png")])
    assert kinds_found(check_dataset(file, images)) == [(0, ["path-escape"])]
    assert check_dataset(file, images, tmp_path / "out", follow_links=True).problem_rows == []
    assert len(load_conversations(tmp_path / "out" / "index.json", images, follow_links=True)) == 1


def test_duplicates(images, tmp_path):
    a, b = ({**row_of(f"good{i}.png"), "id": "ab"[i]} for i in range(2))
    rows = [a, b, a, {**b, "id": "c"}, {**row_of("good2.png"), "id": "a"}, {**a, "id": "e", "model": "m"}]
    report = check_dataset(write_rows(tmp_path / "rows.json", rows), images, tmp_path / "out")
    assert kinds_found(report) == [
        (2, ["duplicate-row"]),
        (3, ["duplicate-row"]),
        (4, ["duplicate-id"]),
        (5, ["duplicate-row"]),
    ]
    assert "of row 0." in report.problem_rows[0].problems[0].message
    assert "row 0 has the id 'a' too" in report.problem_rows[2].problems[0].message
    assert report.outcomes["kept"] == 6  # reported, and left to the reader


def test_missing_and_null_ids_are_no_duplicates(images, tmp_path):
    rows = [{**row_of(f"good{i}.png"), "id": None} for i in range(3)]
    del rows[2]["id"]
    assert check_dataset(write_rows(tmp_path / "rows.json", rows), images).problem_rows == []


# ---------------------------------------------------------------- one image


@pytest.mark.parametrize(
    "form,ending",
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("PPM", "ppm"),
    ],
)
def test_cut_images_of_every_format(form, ending, tmp_path):
    content = encoded(form)
    (tmp_path / f"a.{ending}").write_bytes(content)
    assert image_problems(f"a.{ending}", tmp_path) == []
    for share in (0.4, 0.9):
        (tmp_path / f"b.{ending}").write_bytes(content[: int(len(content) * share)])
        assert [p.kind for p in image_problems(f"b.{ending}", tmp_path)] == ["truncated"], share


def test_a_decoder_may_raise_anything(images, monkeypatch):
    def broken(*args):
        raise RuntimeError("decoder error -2")

    monkeypatch.setattr(doctor, "open_image", broken)
    [problem] = image_problems("good0.png", images)
    assert problem.kind == "unreadable" and "decoder error -2 (RuntimeError)" in problem.message


def test_camera_jpegs_with_a_preview_are_jpegs(tmp_path):
    image = Image.fromarray(NOISE)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image.resize((40, 32))])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert image_problems("a.jpg", tmp_path) == []


# ---------------------------------------------------------------- any damage

ODD_VALUES = [
    None,
    7,
    "",
    " ",
    [],
    {},
    "<image>",
    "<Image>\n",
    ["good0.png"],
    "only.jpg",
    "half.png",
    "a\0b",
    "\udc80",
    "é🦊",
    "../secret.png",
    True,
]


def damage_turns(rng, turns, key, odd):
    "One random change of the turns."
    k = rng.integers(len(turns))
    if key == "turn":
        turns[k] = odd
    elif key == "swap":
        turns.reverse()
    elif key == "cut":
        turns.pop(k)
    elif isinstance(turns[k], dict) and key in ("value", "from"):
        turns[k][key] = odd if rng.integers(2) else str(turns[k].get(key)).upper()


def damage_row(rng, good):
    "A row with up to three random changes, from harmless to hopeless."
    bad = json.loads(json.dumps(good))
    for _ in range(rng.integers(0, 4)):
        if not isinstance(bad, dict):
            break
        key = rng.choice(["image", "conversations", "id", "turn", "value", "from", "swap", "cut", "all"])
        odd = ODD_VALUES[rng.integers(len(ODD_VALUES))]
        turns = bad.get("conversations")
        if key in ("image", "conversations", "id"):
            bad[key] = odd
        elif key == "all":
            bad = odd if rng.random() < 0.2 else bad
        elif isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            damage_turns(rng, turns, key, odd)
    return bad


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_damage_the_index_loads(seed, images, tmp_path):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(150):
        good = row_of(f"good{i % 3}.png") if i % 4 else make_row("Hi?", "Hello.", image=None)
        rows.append(damage_row(rng, {**good, "id": i}))
    report = check_dataset(write_rows(tmp_path / "rows.json", rows), images, tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    texts = [text for _, text in read_rows(index)]
    assert len(load_conversations(index, images, text_rows=True, open_images=True)) == len(texts)
    assert len(texts) == report.outcomes["kept"] + report.outcomes["repaired"]
    assert set(OUTCOMES) == set(report.outcomes) and report.rows == 150
    again = check_dataset(index, images, tmp_path / "again")
    assert again.outcomes == {"kept": len(texts)}
    assert (tmp_path / "again" / "index.json").read_bytes() == index.read_bytes()
    outcomes = {result.index: result.outcome for result in report.problem_rows}
    expected = []
    for i, row in enumerate(rows):
        if outcomes.get(i) == "repaired":
            row = repair_row(row, images)[0]
        if outcomes.get(i) != "left out":
            expected.append(json.dumps(row))
    assert texts == expected  # all others untouched, in their order


# ---------------------------------------------------------------- files


def test_report_holds_every_problem(images, tmp_path):
    rows = []
    for name, (damaged, *_) in DAMAGE.items():
        if not name.startswith(("over", "cut")):
            rows.append({**damaged, "id": name} if isinstance(damaged, dict) else damaged)
    report = check_dataset(write_rows(tmp_path / "rows.json", rows), images, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["rows"] == len(rows) and written["options"] == dict(text_rows=True, max_length=None)
    assert written["outcomes"] == {name: report.outcomes[name] for name in OUTCOMES}
    assert [row["index"] for row in written["problem_rows"]] == list(range(len(rows)))
    assert written["problem_rows"][0]["id"] == "missing"
    problems = [p for row in written["problem_rows"] for p in row["problems"]]
    for p in problems:
        assert (p["level"], p["hint"]) == PROBLEMS[p["kind"]] and p["message"]
    assert sum(written["problems"].values()) == sum(
        len({p["kind"] for p in row["problems"]}) for row in written["problem_rows"]
    )
    content = (tmp_path / "out" / "index.json").read_bytes()
    assert written["index"] == dict(
        name="index.json", rows=len(json.loads(content)), sha256=hashlib.sha256(content).hexdigest()
    )
    assert (tmp_path / "out" / "report.txt").read_text() == report.summary()
    for kind in report.problems:
        assert kind in report.summary()


def test_good_rows_pass_to_the_letter(images, tmp_path):
    row = (
        '{"id":1 , "image": "good0.png","conversations":[{"from":"human","value":"<image>\\u00e9 é"},'
        '{"value":"A \\ud83e\\udd8a.","from":"gpt"}], "model": 1E2}'
    )
    (tmp_path / "rows.json").write_text(f"[{row}]")
    assert check_dataset(tmp_path / "rows.json", images, tmp_path / "out").problem_rows == []
    assert (tmp_path / "out" / "index.json").read_text() == f"[\n{row}\n]\n"
    (tmp_path / "rows.jsonl").write_text(row + "\r\n")
    check_dataset(tmp_path / "rows.jsonl", images, tmp_path / "lines")
    assert (tmp_path / "lines" / "index.json").read_text() == f"[\n{row}\n]\n"


def test_nothing_left_is_still_a_list(images, tmp_path):
    report = check_dataset(write_rows(tmp_path / "rows.json", ["fox"]), images, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == []
    assert report.outcomes == {"left out": 1}


@pytest.mark.parametrize(
    "function,calls",
    [
        ("read_rows", 0),
        ("row_problems", 100),
        ("_add_duplicates", 100),
    ],
)
def test_a_stop_leaves_what_was_there(function, calls, images, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.json", [row_of("good0.png")] * 200)
    check_dataset(file, images, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == sorted(FILES)
    write_rows(file, [row_of("good1.png")] * 200)
    done, real = [], getattr(doctor, function)

    def stopping(*args, **kwargs):
        done.append(1)
        if len(done) > calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(doctor, function, stopping)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(file, images, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_leaves_what_was_there(images, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.json", [row_of("good0.png")] * 3)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor._IndexWriter, "close", full)
    with pytest.raises(OSError, match="No space"):
        check_dataset(file, images, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(num_workers=0), "num_workers=0"),
        (dict(images="nowhere"), "is not a folder"),
        (dict(file="none.json"), "is not a file"),
    ],
)
def test_arguments_that_cannot_be(options, message, images, tmp_path):
    file = write_rows(tmp_path / "rows.json", [row_of("good0.png")])
    with pytest.raises(ValueError, match=message):
        check_dataset(**{"file": file, "images": images, **options})


def test_the_data_is_not_overwritten(images, tmp_path):
    file = write_rows(tmp_path / "index.json", [row_of("good0.png")])
    with pytest.raises(ValueError, match="over the data"):
        check_dataset(file, images, tmp_path)
    with pytest.raises(ValueError, match="is unknown; use one of"):
        Problem("headache", "")


# ---------------------------------------------------------------- many workers


@pytest.fixture
def many_rows(images, tmp_path):
    "A file of 400 rows, some of them damaged."
    rng = np.random.default_rng(7)
    rows = [damage_row(rng, {**row_of(f"good{i % 3}.png"), "id": i % 90}) for i in range(400)]
    return write_rows(tmp_path / "rows.json", rows)


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def test_results_come_in_order_and_few_are_in_progress(images, many_rows, tmp_path, monkeypatch):
    "Threads in the place of processes, of which the later ones are faster."
    futures = []

    class CountingThreads(ThreadPoolExecutor):
        def __init__(self, num_workers, context, start, args):
            super().__init__(num_workers)
            check_chunk = partial(doctor._check_chunk, **args[0])

            def slow(chunk):
                time.sleep(0.05 * (len(futures) % 3))
                return check_chunk(chunk)

            monkeypatch.setattr(doctor, "_work", slow)

        def submit(self, *args):
            futures.append(super().submit(*args))
            assert sum(not future.done() for future in futures) <= 6
            return futures[-1]

    alone = check_dataset(many_rows, images, tmp_path / "one")
    monkeypatch.setattr(doctor, "ProcessPoolExecutor", CountingThreads)
    together = check_dataset(many_rows, images, tmp_path / "many", num_workers=2)
    assert together.to_json() == alone.to_json() and len(futures) == 7
    assert same_files(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_one_and_two_processes_write_the_same_bytes(images, many_rows, tmp_path, processor):
    for num_workers in (1, 2):
        check_dataset(
            many_rows,
            images,
            tmp_path / str(num_workers),
            processor=processor,
            max_length=300,
            num_workers=num_workers,
        )
    assert same_files(tmp_path / "1", tmp_path / "2")


def killed(chunk):
    os._exit(1)


@pytest.mark.slow
def test_a_killed_process_is_a_sentence(images, many_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_work", killed)
    with pytest.raises(ValueError, match="num_workers=2: one of them was killed"):
        check_dataset(many_rows, images, tmp_path / "out", num_workers=2)
    assert list((tmp_path / "out").iterdir()) == []
