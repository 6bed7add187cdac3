"Broken conversations are named before anything long begins; files are read as `json.loads` reads them."

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from delta_llava import conversations
from delta_llava.conversations import (
    load_conversations,
    media_links,
    media_marks,
    media_of_key,
    read_rows,
    row_name,
    unknown_keys,
)


def make_row(*values, roles=("human", "gpt"), **fields):
    turns = [{"from": roles[k % len(roles)], "value": value} for k, value in enumerate(values)]
    return {"id": "x7", "image": "fox.png", "conversations": turns, **fields}


def load_with(folder, *rows, **options):
    "Read the rows behind a good one."
    Image.new("RGB", (8, 8)).save(folder / "fox.png")
    (folder / "rows.json").write_text(json.dumps([make_row("<image>\nWhat?", "A fox."), *rows]))
    return load_conversations(folder / "rows.json", **options)


# ---------------------------------------------------------------- rows

BROKEN = {
    "no image": ({"id": "x7", "conversations": make_row("Hi?", "Hello.")["conversations"]}, "has no 'image'"),
    "image token without image": (make_row("<image>", "A fox.", image=None), "a question holds '<image>'"),
    "no image token": (make_row("What?", "A fox."), "occurs 0 times"),
    "two image tokens": (make_row("<image>", "A fox.", "<image>", "Yes."), "occurs 2 times"),
    "image token in an answer": (make_row("<image>", "A <image>."), "occurs in an answer"),
    "empty answer": (make_row("<image>", " \n"), "conversations[1]['value'] is an empty answer"),
    "other roles": (
        make_row("<image>", "A fox.", roles=("user", "assistant")),
        "conversations[0]['from'] is 'user'",
    ),
    "roles exchanged": (make_row("<image>", "A fox.", roles=("gpt", "human")), "roles must alternate"),
    "no answer": (make_row("<image>", "A fox.", "Sure?"), "conversations[2] is a question without an answer"),
    "no conversations": ({"id": "x7", "image": "fox.png"}, "'conversations' must be a list"),
    "number as text": (make_row("<image>", 4), "conversations[1] must be"),
    "two images": (make_row("<image>", "A fox.", image=["fox.png", "fox.png"]), "path of one image"),
    "several images": (make_row("<image>", "A fox.", image=["a.png", "b.png"]), "'image' lists 2 images"),
    "missing file": (make_row("<image>", "A fox.", image="lost.png"), "lost.png"),
    "outside the folder": (make_row("<image>", "A fox.", image="../fox.png"), "outside its folder"),
    "absolute path outside": (make_row("<image>", "A fox.", image="/etc/hostname"), "outside its folder"),
    "half a character": (make_row("<image>", "A fox \ud83e."), "half of a character"),
    "half a character in a path": (make_row("<image>", "A fox.", image="\ud83e.png"), "half of a character"),
    "half a character in an id": (make_row("<image>", "A fox.", id="\ud83e"), "half of a character"),
    "no path at all": (make_row("<image>", "A fox.", image="a\0b.png"), "null"),
    "endless path": (make_row("<image>", "A fox.", image="a" * 5000 + ".png"), "too long"),
    "no object": ("fox", "must be an object"),
    "images": (make_row("What?", "A fox.", image=None, images=["fox.png"]), "'images' is"),
    "image_path": (make_row("<image>", "A fox.", image=None, image_path="fox.png"), "'image_path' is"),
    "image_file": (make_row("<image>", "A fox.", image=None, image_file="fox.png"), "from the row's 'image'"),
    "camel case": (make_row("Q", "A", image=None, imageFile="fox.png"), "'imageFile' is"),
    "other case": (make_row("<image>", "A fox.", image=None, Image="fox.png"), "'Image' is"),
    "more images": (make_row("<image>", "A", images=["fox.png", "dog.png"]), "'images' is"),
    "another image": (make_row("<image>", "A", picture="dog.png"), "'picture' is"),
    "video": (make_row("Q", "A", image=None, video="a.mp4"), "'video' is 'a.mp4'"),
    "video and image": (make_row("<image>", "A", video_path="a.mp4"), "'video_path' is"),
    "audio": (make_row("Q", "A", image=None, audios=["a.wav"]), "'audios' is"),
    "token of a video": (make_row("<video>\nWhat happens?", "A dog.", image=None), "shows '<video>'"),
    "token of a sound": (make_row("Listen.\n<audio>", "A dog.", image=None), "shows '<audio>'"),
    "token of a video in a line": (make_row("What happens in <video> now?", "A", image=None), "'<video>'"),
    "token of a sound beside an image": (make_row("<image>\nIs <audio> of it?", "A"), "shows '<audio>'"),
    "numbered token": (make_row("See <image_12> now.", "A", image=None), "shows '<image_12>'"),
    "file in a tag": (make_row("See <img>b.jpg</img>", "A", image=None), "shows '<img>b.jpg</img>'"),
    "bytes": (make_row("Q", "A", image=None, imgBytes="iVBO"), "'imgBytes' is"),
    "folder of frames": (make_row("<image>", "A", framesFolder="x/"), "'framesFolder' is"),
    "pixels": (make_row("Q", "A", image=None, pixels=[[1]]), "'pixels' is"),
    "name of no image": (make_row("Q", "A", image=None, photo_id=3), "'photo_id' is"),
    "file under any key": (make_row("Q", "A", image=None, depth="d.PNG"), "'depth' is 'd.PNG'"),
    "second view": (make_row("<image>", "A", image_left="left.png"), "'image_left' is"),
    "image of a turn": (
        {
            "id": "x7",
            "conversations": [
                dict(make_row("Q")["conversations"][0], image="fox.png"),
                {"from": "gpt", "value": "A"},
            ],
        },
        "conversations[0]: 'image' is",
    ),
    "system of a list": (make_row("<image>", "A", system=["Be brief."]), "'system' must hold one"),
    "two systems": (make_row("<image>", "A", system="A", system_prompt="B"), "'system' and 'system_prompt'"),
    "image in the system prompt": (make_row("<image>", "A", system="<image> is it."), "holds '<image>'"),
    "system alone": (make_row("Be brief.", roles=("system",)), "'conversations' must be a list"),
}
KEPT = {
    "metadata": dict(source="web", image_id=7, width=64, video=None, audio="", images=[]),
    "description": dict(video_id="v7", image_size=[64, 48], frame=12, figure="Figure 3", clip_score=0.3),
    "where it came from": dict(
        image_url="https://x.org/a.png", image_path="/data/fox.png", images=["fox.png"]
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named(name, tmp_path):
    row, message = BROKEN[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_with(tmp_path, row)
    own_id = row.get("id") if isinstance(row, dict) else None
    assert "rows.json: 1 of 2 rows cannot be used." in str(error.value)
    assert f"row 1 (id {own_id!r}): " in str(error.value)


@pytest.mark.parametrize("name", KEPT)
def test_keys_that_change_nothing(name, tmp_path):
    assert len(load_with(tmp_path, make_row("<image>", "A fox.", **KEPT[name]))) == 2


def test_unknown_keys_are_named_once(tmp_path, caplog):
    rows = [make_row("<image>", "A", weight=2, id=i) for i in range(3)] + [
        make_row("<image>", "B", caption=1)
    ]
    load_with(tmp_path, *rows)
    assert [record.message.endswith("not read: caption, weight.") for record in caplog.records] == [True]
    assert unknown_keys(dict(id=1, image="a", conversations=[], System_Prompt="S", video=None)) == []


def test_media_of_keys():
    found = {"image": "image", "images": "image", "img_list": "img", "imagePaths": "image", "VIDEO": "video"}
    found |= {"photo_url": "photo", "audio_file": "audio", "frames": "frame", "soundName": "sound"}
    assert {key: media_of_key(key) for key in found} == found
    found |= {"pixel_values": "pixel", "imagepath": "image", "img_base64": "img", "videoDirs": "video"}
    assert {key: media_of_key(key) for key in found} == found
    others = (
        "image_id",
        "video_length",
        "part_of_speech",
        "framework",
        "data",
        "base64",
        "file",
        "path",
        "imagination",
        "id",
        "caption",
        "image_size",
        "",
    )
    assert [media_of_key(key) for key in others] == [None] * len(others)


MARKS = {
    "<VIDEO> x": ["<VIDEO>"],
    "x <|audio|>, <speech>.": ["<|audio|>", "<speech>"],
    "<image>\n<Image>\n<image/><img_3>": ["<Image>", "<image/>", "<img_3>"],
    "<image_soft_token><start_of_image><IMG_CONTEXT>": [
        "<image_soft_token>",
        "<start_of_image>",
        "<IMG_CONTEXT>",
    ],
    '<video>\nWhere does <a href="x">this</a> lead?': ["<video>"],
}
TEXTS = [
    "an image / video of <b>foxes</b>",
    "Is `<video>` a tag?\n```html\n<audio>\n```",
    "Use the <video>, <audio> and <img> tags.",
    "What is an <Image> component?",
    '<html><body>\n<video>\n<source src="a.mp4">\n</video></body></html>',
    '<div class="x"> <Image /> </div> is wrong. Why?',
    "a <video title>, an <image url>, <|im_start|>, <imagination>, 1 <image",
]


@pytest.mark.parametrize("text", MARKS)
def test_marks_of_media(text):
    assert [text[mark.start() : mark.end()] for _, mark in media_marks(text)] == MARKS[text]


@pytest.mark.parametrize("text", TEXTS)
def test_text_about_tags_has_no_marks(text, tmp_path):
    assert media_marks(text) == []
    assert len(load_with(tmp_path, make_row(text, "A", image=None), text_rows=True)) == 2


def test_links_of_media():
    text = "![a fox](fox.png) <img alt='x' src='b.png'> `![](c.png)` [page](d.png) <a href='e.png'>e</a>"
    assert media_links(text) == ["![a fox](fox.png)", "<img alt='x' src='b.png'>"]


@pytest.mark.parametrize("key", ["system", "system_prompt", "System", "sysPrompt", "systemmessage", None])
def test_system_prompts_come_first(key, tmp_path):
    if key is None:
        row = make_row("Be brief.", "<image>\nQ", "A", roles=("x", "y"))
        for turn, role in zip(row["conversations"], ("system", "human", "gpt"), strict=True):
            turn["from"] = role
    else:
        row = make_row("Q\n<image>", "A", **{key: "Be brief."})
    plain, found = load_with(tmp_path, row)["conversations"]
    assert found == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nQ"},
        {"from": "gpt", "value": "A"},
    ]
    assert [turn["from"] for turn in plain] == ["human", "gpt"]


def test_links_in_the_image_folder(tmp_path):
    elsewhere, folder = tmp_path / "disk" / "coco", tmp_path / "images"
    elsewhere.mkdir(parents=True)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "fox.png")
    Image.new("RGB", (8, 8)).save(elsewhere.parent / "secret.png")
    (folder / "coco").symlink_to(elsewhere)
    file = tmp_path / "rows.json"

    def load(image, **options):
        file.write_text(json.dumps([make_row("<image>", "A fox.", image=image)]))
        return load_conversations(file, folder, open_images=True, **options)

    with pytest.raises(ValueError, match=r"by a symbolic link; .*follow_links=True \(--follow-links\)"):
        load("coco/fox.png")
    assert load("coco/fox.png", follow_links=True)["image"] == [str(elsewhere / "fox.png")]
    for image in ("coco/../secret.png", "../disk/secret.png", str(elsewhere / "fox.png")):
        with pytest.raises(ValueError, match="leads outside its folder"):
            load(image, follow_links=True)
    cached = load("coco/fox.png", follow_links=True, cache=tmp_path / "cache")
    assert len(cached) == 1
    with pytest.raises(ValueError, match="by a symbolic link"):  # another table than that with links
        load("coco/fox.png", cache=tmp_path / "cache")


def test_all_problems_are_counted_and_five_shown(tmp_path):
    rows = [make_row("<image>", "", id=i) for i in range(7)]
    with pytest.raises(ValueError, match="7 of 8 rows") as error:
        load_with(tmp_path, *rows)
    assert str(error.value).count("empty answer") == 5


def test_a_row_is_named_by_what_there_is():
    assert row_name(make_row(), 3) == "row 3 (id 'x7')"
    assert row_name(make_row()) == "row 'x7'"
    assert row_name(make_row(id=None)) == "the row without id and with image 'fox.png'"
    assert row_name("fox", 0) == "row 0 (id None)"


def test_rows_without_id_get_their_number(tmp_path):
    without = make_row("<image>", "A fox.")
    del without["id"]
    null, zero = (make_row("<image>", "A fox.", id=own_id) for own_id in (None, 0))
    rows = load_with(tmp_path, without, null, zero)
    assert rows["id"] == ["x7", "1", "2", "0"]


@pytest.mark.parametrize(
    "content,message",
    [
        ("fox", "is not JSON"),
        ("[]", "an empty list"),
        ('{"id": 1}', "begins with '{'"),
        ("", "begins with ''"),
    ],
)
def test_files_that_hold_no_rows(content, message, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_conversations(tmp_path / "rows.json")


def test_text_rows_only_when_asked(tmp_path):
    text = {"id": 9, "conversations": make_row("Hi?", "Hello.")["conversations"]}
    rows = load_with(tmp_path, text, text_rows=True)
    assert rows["image"][1] is None and rows["id"][1] == "9"


def test_link_out_of_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="outside its folder"):
        load_with(inside, make_row("<image>", "A fox.", image="link.png"))


def test_truncated_image_is_found_when_asked(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    row = make_row("<image>", "A fox.", image="half.png")
    assert len(load_with(tmp_path, row)) == 2
    with pytest.raises(ValueError, match="row 1 .*half.png"):
        load_with(tmp_path, row, open_images=True)


def test_error_says_how_to_find_all(tmp_path):
    with pytest.raises(ValueError, match="delta-llava doctor .*rows.json --images "):
        load_with(tmp_path, "fox")


# ---------------------------------------------------------------- LLaVA's own files, row by row

BLIP = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    },
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
            {"from": "gpt", "value": "a grey watch with an army style strap"},
        ],
    },
]
MIX_IMAGES = [
    "coco/train2017/000000033471.jpg",
    "gqa/images/2354786.jpg",
    "ocr_vqa/images/140031996.jpg",
    "textvqa/train_images/00c359f294f7dcd9.jpg",
    "vg/VG_100K/2.jpg",
    "vg/VG_100K_2/3.jpg",
]
CHAT = make_row("Who wrote it?", "I cannot know.", "Why?", "I saw no book.")["conversations"]
MIX = [
    *(
        make_row("<image>\nWhat?", "A fox.", "Colour?", "Red.", id=Path(path).stem, image=path)
        for path in MIX_IMAGES
    ),
    {"id": "wgByO4Y_0", "model": "", "conversations": CHAT},
    make_row("What is this?\n<image>\nAnswer shortly.", "Fox", image=MIX_IMAGES[0], id=17),
]


def check_turns_are_llavas(turns, kept):
    "What LLaVA trains on: the image comes first in its turn."
    for turn, trained in zip(turns, kept, strict=True):
        if "<image>" in turn["value"]:
            question = turn["value"].replace("<image>", "").strip()
            assert trained["value"] == "<image>\n" + question
        else:
            assert trained == turn


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("stored", [False, True])
def test_llavas_files_as_they_are(ending, stored, tmp_path):
    folder = tmp_path / "images"
    for row in [*BLIP, *MIX]:
        if "image" in row:
            (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / row["image"])
    file = tmp_path / f"rows{ending}"
    for rows in (BLIP, MIX):
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        file.write_text(json.dumps(rows) if ending == ".json" else lines)
        read = load_conversations(file, folder, text_rows=True, cache=tmp_path / "cache" if stored else None)
        assert read.column_names == ["id", "image", "conversations"]
        assert read["id"] == [str(row["id"]) for row in rows]
        for row, kept in zip(rows, read, strict=True):
            assert kept["image"] == (str((folder / row["image"]).resolve()) if "image" in row else None)
            check_turns_are_llavas(row["conversations"], kept["conversations"])
    with pytest.raises(ValueError, match="row 6 .*no 'image'"):
        load_conversations(file, folder)


# ---------------------------------------------------------------- the streaming reader


def random_value(rng, depth=0):
    "Any JSON value, with everything that can confuse a scanner."
    kind = rng.integers(9 if depth < 4 else 7)
    letters = list('ab"\\/\b\f\n\r\t{}[],: \u2028é🦊\u0000\ufeff')
    text = "".join(rng.choice(letters, rng.integers(0, 9)))
    if kind < 3:
        return text
    if kind < 7:
        number = float(rng.normal() * 10.0 ** rng.integers(-20, 20))
        return [int(rng.integers(-9, 10**12)), number, None, bool(rng.integers(2))][kind - 3]
    items = [random_value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return items if kind == 7 else {f"{text}{i}": item for i, item in enumerate(items)}


def random_text(rng, trial):
    "A JSON list of random values, in one of many layouts."
    rows = [random_value(rng) for _ in range(rng.integers(0, 6))]
    indent = [None, 1, "\t"][trial % 3]
    separators = [None, (",", ":"), (" , ", " : ")][trial % 3]
    text = json.dumps(rows, ensure_ascii=bool(trial % 5), indent=indent, separators=separators)
    return rows, "\ufeff" * (trial % 3 == 0) + " \r\n" * (trial % 2) + text + "\t\n" * (trial % 4)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 2**20])
def test_rows_one_by_one_are_those_of_json_loads(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK_CHARS", chunk)
    rng, file = np.random.default_rng(chunk), tmp_path / "rows.json"
    for trial in range(60):
        rows, text = random_text(rng, trial)
        file.write_bytes(text.encode())
        read = list(read_rows(file))
        assert [row for row, _ in read] == rows == json.loads(text.removeprefix("\ufeff"))
        for row, written in read:
            assert written in text and json.loads(written) == row and written == written.strip()


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1, "a": 2}]',
        '["\\ud83e", "\\ud83e\\udd8a"]',
        "[NaN, -Infinity, 1E400, 123456789012345678901234567890]",
        "[12,34 ,-5]",
        "[ ]",
        "[[]]",
        "[true,false,null]",
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_oddities_read_as_json_loads_reads_them(text, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK_CHARS", chunk)
    (tmp_path / "rows.json").write_text(text)
    rows = [row for row, _ in read_rows(tmp_path / "rows.json")]
    assert repr(rows) == repr(json.loads(text))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_every_cut_of_a_file_is_an_error(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK_CHARS", chunk)
    rows = [make_row("<image>\nWhat?", "A 🦊."), 12, "fox"]
    content = json.dumps(rows, ensure_ascii=False).encode()
    for end in range(len(content)):
        (tmp_path / "rows.json").write_bytes(content[:end])
        with pytest.raises(ValueError, match="rows.json is not JSON"):
            list(read_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    "text,message",
    [
        ("[1, 2] 3", "after 2 rows: '3' follows the end of the list"),
        ("[1 2]", "after 1 rows: character 3 is '2'"),
        ("[1,]", "after 1 rows: Expecting value at character 3"),
        ("[1,,2]", "Expecting value at character 3"),
        ('["a\nb"]', "Invalid control character"),
        ("[" * 100_000, "after 0 rows"),
        ("[tru]", "Expecting value at character 1"),
        ('[{"id": 1}, {"id": x}]', "after 1 rows: Expecting value at character 19"),
        ("[1}", "character 2 is '}'"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_files_that_are_not_json(text, message, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK_CHARS", chunk)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_rows(tmp_path / "rows.json"))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="rows.json is not JSON.*utf-8"):
        list(read_rows(tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="is not a file"):
        load_conversations(tmp_path / "none.json")


def test_a_row_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "CHUNK_CHARS", 10)
    monkeypatch.setattr(conversations, "MAX_ROW_CHARS", 100)
    (tmp_path / "rows.json").write_text('[1, "' + "x" * 10_000)
    with pytest.raises(ValueError, match="after 1 rows: a row does not end within 100 characters"):
        list(read_rows(tmp_path / "rows.json"))


def test_little_of_a_file_is_held(tmp_path, monkeypatch):
    rows = [make_row("<image>\nWhat?", "A fox. " * 300, id=i) for i in range(3000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(conversations, "CHUNK_CHARS", 2**16)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "rows.json")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < (tmp_path / "rows.json").stat().st_size / 5


# ---------------------------------------------------------------- the table on disk


def load_cached(folder, **options):
    return load_conversations(folder / "rows.json", cache=folder / "cache", **options)


@pytest.fixture
def checked(monkeypatch):
    "A list that grows with each call of `check_row`."
    calls, check_row = [], conversations.check_row

    def counted(*args):
        calls.append(1)
        return check_row(*args)

    monkeypatch.setattr(conversations, "check_row", counted)
    return calls


def test_second_reading_checks_nothing_and_change_is_noticed(tmp_path, checked):
    first = load_with(tmp_path, cache=tmp_path / "cache")
    checked.clear()
    assert load_cached(tmp_path)[:] == first[:]
    assert not checked and len(list((tmp_path / "cache").iterdir())) == 1
    text = (tmp_path / "rows.json").read_text()
    (tmp_path / "rows.json").write_text(text.replace("A fox.", "A cat."))  # of the same length and time
    assert load_cached(tmp_path)["conversations"][0][1]["value"] == "A cat."
    assert len(checked) == 1
    assert len(load_cached(tmp_path, text_rows=True)) == 1
    assert len(checked) == 2  # another option, another table
    load_cached(tmp_path, open_images=True)
    assert len(checked) == 3  # asked for, and so done


def test_failed_readings_leave_no_table(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="1 of 2 rows"):
        load_with(tmp_path, "fox", cache=tmp_path / "cache")

    def stopped(*args):
        raise KeyboardInterrupt

    load_with(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "check_row", stopped)
        with pytest.raises(KeyboardInterrupt):
            load_cached(tmp_path)
    assert not list((tmp_path / "cache").iterdir())
    assert len(load_cached(tmp_path)) == 1


def test_large_files_go_to_the_cache_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTA_LLAVA_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(conversations, "IN_MEMORY_BYTES", 10)
    rows = load_with(tmp_path)
    assert rows.cache_files
    assert Path(rows.cache_files[0]["filename"]).parent == tmp_path / "home" / "conversations"


def test_many_batches_of_rows(tmp_path):
    many = [make_row("<image>", f"Fox {i}.", id=i) for i in range(2500)]
    rows = load_with(tmp_path, *many, cache=tmp_path / "cache")
    assert rows["id"][1:] == [str(i) for i in range(2500)]
    assert rows[2500]["conversations"][1]["value"] == "Fox 2499."
