"The doctor finds each damage where it is and nowhere else; what it writes can be trained on; it never writes half a file."
import io, json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import byte_tokenizer
from transformers import CLIPImageProcessorPil

from delta_llava import doctor
from delta_llava.data import load_conversations, read_rows
from delta_llava.doctor import PROBLEMS, REPAIRS, Problem, examine, examine_image, examine_row, repair
from delta_llava.processor import build_processor

NOISE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)

def encoded(form, **options):
    Image.fromarray(NOISE).save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()

@pytest.fixture
def images(tmp_path):
    "An image folder with one picture for each kind of damage."
    folder = tmp_path/"images"; folder.mkdir()
    for i in range(3): Image.fromarray(np.roll(NOISE, i)).save(folder/f"good{i}.png")
    whole = encoded("PNG")
    for name, content in {"half.png": whole[:len(whole)//2], "page.jpg": b"<html>404</html>", "empty.png": b"", "named.png": encoded("JPEG"), "bare": encoded("PNG"), "only.webp": encoded("WEBP"),
                          "two.jpg": encoded("JPEG"), "two.png": whole}.items(): (folder/name).write_bytes(content)
    first = Image.fromarray(NOISE)
    first.save(folder/"moving.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    for name, size in {"tiny.png": (40, 20), "narrow.png": (400, 40), "thread.png": (4, 1000)}.items(): first.resize(size).save(folder/name)
    first.save(tmp_path/"secret.png")
    (folder/"link.png").symlink_to(tmp_path/"secret.png")
    return folder

def row(*values, roles=("human", "gpt"), **fields):
    turns = [{"from": roles[k % 2], "value": v} for k, v in enumerate(values)]
    return {"id": "x", "image": "good0.png", "conversations": turns, **fields}

def shown(image): return row(f"<image>\nWhat is {str(image)[:9]}?", "A fox.", image=image)

@pytest.fixture(scope="module")
def processor(): return build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=9, template="v1")

# Each row with what is found in it, what is tried on it, and what becomes of it
DAMAGE = {
    "missing": (shown("lost.png"), ["missing"], [], "left out"),
    "a folder": (shown("."), ["missing"], [], "left out"),
    "truncated": (shown("half.png"), ["truncated"], [], "left out"),
    "no picture": (shown("page.jpg"), ["unreadable"], [], "left out"),
    "no bytes": (shown("empty.png"), ["unreadable"], [], "left out"),
    "out of the folder": (shown("../secret.png"), ["path-escape"], [], "left out"),
    "out by a link": (shown("link.png"), ["path-escape"], [], "left out"),
    "absolute": (shown("/etc/hostname"), ["path-escape"], [], "left out"),
    "other ending, ambiguous": (shown("two.gif"), ["missing"], [], "left out"),
    "thread": (shown("thread.png"), ["bad-size"], [], "left out"),
    "animated": (shown("moving.gif"), ["animated"], [], "kept"),
    "wrong extension": (shown("named.png"), ["wrong-extension"], [], "kept"),
    "no extension": (shown("bare"), ["wrong-extension"], [], "kept"),
    "tiny": (shown("tiny.png"), ["tiny"], [], "kept"),
    "narrow": (shown("narrow.png"), ["narrow"], [], "kept"),
    "empty answer": (row("<image>\nWho?", " \n"), ["empty-answer"], [], "left out"),
    "empty question": (row("<image>\nWho?", "A fox.", "", "Yes."), ["empty-question"], [], "kept"),
    "blank question": (row("<image>\nWho?", "A fox.", " \n", "Yes."), ["empty-question"], [], "kept"),
    "roles exchanged": (row("<image>\nWho?", "I", roles=("gpt", "human")), ["wrong-role"], [], "left out"),
    "three in a row": (row("<image>\nA", "I", "J", roles=("human", "human")), ["wrong-role"], [], "left out"),
    "unknown role": (row("<image>\nB", "I", roles=("human", "robot")), ["wrong-role"], [], "left out"),
    "no turns": (row(), ["no-turns"], [], "left out"),
    "number as text": (row("<image>\nC", 4), ["bad-turn"], [], "left out"),
    "half a character": (row("<image>\nD", "A \ud83e"), ["broken-text"], [], "left out"),
    "mark in an answer": (row("<image>\nE", "<image>"), ["mark-in-answer"], [], "left out"),
    "mark without image": (row("<image>\nF", "A fox.", image=None), ["mark-without-image"], [], "left out"),
    "two images": (row("<image>\nG", "A fox.", image=["good0.png", "good1.png"]), ["several-images"], [], "left out"),
    "two marks": (row("<image><image>\nH", "A fox."), ["several-images"], [], "left out"),
    "no path": (row("<image>\nI", "A fox.", image=7), ["bad-image"], [], "left out"),
    "no object": (["fox"], ["no-object"], [], "left out"),
    "over-long": (row("<image>\nJ", "A fox. "*200), ["over-long"], [], "kept"),
    "cut away": (row("<image>\nJ" + "?"*900, "A fox."), ["cut-away"], [], "left out"),
    "other roles": (row("<image>\nK", "A fox.", roles=("User", "assistant")), ["wrong-role"], ["roles"], "repaired"),
    "messages": ({"id": 3, "image": "good0.png", "conversations": [dict(role="user", content="<image>\nL"), dict(role="assistant", content="A fox.")]}, ["bad-turn"], ["roles"], "repaired"),
    "list of one": (row("<image>\nM", "A fox.", image=["good1.png"]), ["bad-image"], ["image"], "repaired"),
    "empty path": (row("Who are you?", "A model.", image=""), ["bad-image"], ["image"], "repaired"),
    "blanks and a backslash": (row("<image>\nN", "A fox.", image=" .\\good1.png "), ["missing"], ["path"], "repaired"),
    "other ending": (row("<image>\nO", "A fox.", image="only.jpg"), ["missing"], ["path"], "repaired"),
    "no mark": (row("What is it?", "A fox.", "Sure?", "Yes."), ["no-mark"], ["mark"], "repaired"),
    "mark in other letters": (row("What is it?", "A fox.", "Now < Image/>?", "Yes."), ["no-mark"], ["mark"], "repaired"),
    "mark in other letters, and in an answer": (row("<Image>\nWhat tag is that?", "It is <Image>."), ["no-mark"], ["mark"], "repaired"),
    "last question open": (row("<image>\nP", "A fox.", "Sure?"), ["no-answer"], ["question"], "repaired"),
    "all at once": ({"id": 5, "image": [" .\\only.gif"], "conversations": [dict(role="USER", content="Q"), dict(role="Assistant", content="A fox."), dict(role="user", content="R")]},
                    ["bad-turn"], ["roles", "image", "path", "mark", "question"], "repaired"),
    "repaired in vain": (row("S", "A fox.", image="half.png"), ["no-mark", "truncated"], [], "left out"),
    "in vain, without a picture": (row("T", "A fox.", image="lost.png"), ["no-mark", "missing"], [], "left out"),
}

def written(file, rows):
    file.write_text("[" + ",\n ".join(json.dumps(r) for r in rows) + "]")
    return file

@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_found_where_it_is_and_nowhere_else(name, images, tmp_path, processor):
    damaged, kinds, repairs, outcome = DAMAGE[name]
    if isinstance(damaged, dict): damaged = {**damaged, "id": "d"}
    rows = [{**shown(f"good{i}.png"), "id": str(i)} for i in range(3)]
    rows.insert(1, damaged)
    report = examine(written(tmp_path/"rows.json", rows), images, tmp_path/"out", processor=processor, max_length=500)
    assert [(d.index, [p.kind for p in d.problems], d.repairs, d.outcome) for d in report.found] == [(1, kinds, repairs, outcome)]
    assert report.rows == 4 and report.problems == Counter(kinds) and report.repairs == Counter(repairs)
    assert report.outcomes == Counter(["kept"]*3 + [outcome])
    index = list(read_rows(tmp_path/"out"/"index.json"))
    assert [r for r, _ in index if r["id"] != "d"] == [r for r in rows if r is not damaged]
    assert len(load_conversations(tmp_path/"out"/"index.json", images, text_rows=True, open_images=True)) == 4 - (outcome == "left out")
    if outcome == "kept": assert (tmp_path/"out"/"index.json").read_text() == "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"

def test_every_kind_is_planted_somewhere():
    elsewhere = {"text-only", "duplicate-id", "duplicate-row"}
    assert {k for _, kinds, _, _ in DAMAGE.values() for k in kinds} | elsewhere == set(PROBLEMS)
    assert {r for _, _, repairs, _ in DAMAGE.values() for r in repairs} == set(REPAIRS)

def test_errors_are_what_training_refuses(images, tmp_path):
    "The line between error and warning is the reader's own."
    for name, (damaged, kinds, _, _) in DAMAGE.items():
        if {"cut-away", "over-long"} & set(kinds): continue
        file = written(tmp_path/"rows.json", [damaged])
        if any(p.is_error for p in examine_row(damaged, images)):
            with pytest.raises(ValueError, match="1 of 1 rows"): load_conversations(file, images, text_rows=True, open_images=True)
        else: assert len(load_conversations(file, images, text_rows=True, open_images=True)) == 1, name

def test_repairs_lose_nothing(images):
    for damaged, *_ in DAMAGE.values():
        if not isinstance(damaged, dict): continue
        before, (after, done) = json.dumps(damaged), repair(damaged, images)
        assert json.dumps(damaged) == before  # the row that was given is left alone
        if not done: assert after is damaged
        spoken = [t.get("value", t.get("content")) for t in damaged["conversations"]]
        kept = [t.get("value", t.get("content")) for t in after["conversations"]]
        assert kept[1::2] == spoken[1::2] and len(kept) >= len(spoken) - 1  # every answer
        assert all(str(b).replace("<image>\n", "", 1).strip() in str(a) or "<" in str(a) for a, b in zip(spoken[::2], kept[::2]))
        assert after.keys() - {"image"} == damaged.keys() - {"image"}
        assert repair(after, images) == (after, [])  # nothing is left to do

def test_rows_without_pictures(images, tmp_path):
    rows = [shown("good0.png"), {"id": 2, "conversations": row("Hi?", "Hello.")["conversations"], "model": ""}]
    file = written(tmp_path/"rows.json", rows)
    assert examine(file, images).found == [] and examine(file, images).text_only == 1 and "text_rows=True" in examine(file, images).summary()
    assert [[p.kind for p in d.problems] for d in examine(file, images, text_rows=False).found] == [["text-only"]]

def test_duplicates(images, tmp_path):
    a, b = {**shown("good0.png"), "id": "a"}, {**shown("good1.png"), "id": "b"}
    rows = [a, b, a, {**b, "id": "c"}, {**shown("good2.png"), "id": "a"}, {**a, "id": "e", "model": "m"}]
    report = examine(written(tmp_path/"rows.json", rows), images, tmp_path/"out")
    assert [(d.index, [p.kind for p in d.problems]) for d in report.found] == [(2, ["duplicate-row"]), (3, ["duplicate-row"]), (4, ["duplicate-id"]), (5, ["duplicate-row"])]
    assert "of row 0." in report.found[0].problems[0].says and "row 0 has the id 'a' too" in report.found[2].problems[0].says
    assert report.outcomes["kept"] == 6  # told, and left to the reader

@pytest.mark.parametrize("form,ending", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm")])
def test_cut_pictures_of_every_format(form, ending, tmp_path):
    content = encoded(form)
    (tmp_path/f"a.{ending}").write_bytes(content)
    assert examine_image(f"a.{ending}", tmp_path) == []
    for share in (.4, .9):
        (tmp_path/f"b.{ending}").write_bytes(content[:int(len(content)*share)])
        assert [p.kind for p in examine_image(f"b.{ending}", tmp_path)] == ["truncated"], share

def test_a_decoder_may_raise_anything(images, monkeypatch):
    def broken(*args): raise RuntimeError("decoder error -2")
    monkeypatch.setattr(doctor, "open_image", broken)
    [problem] = examine_image("good0.png", images)
    assert problem.kind == "unreadable" and "decoder error -2 (RuntimeError)" in problem.says

def test_camera_jpegs_with_a_preview_are_jpegs(tmp_path):
    image = Image.fromarray(NOISE)
    image.save(tmp_path/"a.jpg", "MPO", save_all=True, append_images=[image.resize((40, 32))])
    assert Image.open(tmp_path/"a.jpg").format == "MPO" and examine_image("a.jpg", tmp_path) == []

# ---------------------------------------------------------------- any damage

def spoiled(rng, good):
    "A row with up to three random changes, from harmless to hopeless."
    bad = json.loads(json.dumps(good))
    for _ in range(rng.integers(0, 4)):
        if not isinstance(bad, dict): break
        turns, key = bad.get("conversations"), rng.choice(["image", "conversations", "id", "turn", "value", "from", "swap", "cut", "all"])
        odd = [None, 7, "", " ", [], {}, "<image>", "<Image>\n", ["good0.png"], "only.jpg", "half.png", "a\0b", "\udc80", "é🦊", "../secret.png", True][rng.integers(16)]
        if key in ("image", "conversations", "id"): bad[key] = odd
        elif key == "all" and rng.random() < .2: bad = odd
        elif isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            k = rng.integers(len(turns))
            if key == "turn": turns[k] = odd
            elif key == "swap": turns.reverse()
            elif key == "cut": turns.pop(k)
            elif isinstance(turns[k], dict) and key in ("value", "from"): turns[k][key] = odd if rng.integers(2) else str(turns[k].get(key)).upper()
    return bad

@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_damage_the_index_loads(seed, images, tmp_path):
    rng = np.random.default_rng(seed)
    rows = [spoiled(rng, {**shown(f"good{i % 3}.png"), "id": i} if i % 4 else {"id": i, **row("Hi?", "Hello.", image=None)}) for i in range(150)]
    report = examine(written(tmp_path/"rows.json", rows), images, tmp_path/"out")
    index = [(r, text) for r, text in read_rows(tmp_path/"out"/"index.json")]
    assert len(load_conversations(tmp_path/"out"/"index.json", images, text_rows=True, open_images=True)) == len(index) == report.outcomes["kept"] + report.outcomes["repaired"]
    assert {"kept", "repaired", "left out"} == set(report.outcomes) and report.rows == 150
    again = examine(tmp_path/"out"/"index.json", images, tmp_path/"again")
    assert again.outcomes == {"kept": len(index)} and (tmp_path/"again"/"index.json").read_bytes() == (tmp_path/"out"/"index.json").read_bytes()
    outcomes = {d.index: d.outcome for d in report.found}
    wanted = [repair(r, images)[0] if outcomes.get(i) == "repaired" else r for i, r in enumerate(rows) if outcomes.get(i) != "left out"]
    assert [text for _, text in index] == [json.dumps(r) for r in wanted]  # all others untouched, in their order

# ---------------------------------------------------------------- files

def test_report_holds_every_problem(images, tmp_path):
    rows = [{**d, "id": name} if isinstance(d, dict) else d for name, (d, *_) in DAMAGE.items() if not name.startswith(("over", "cut"))]
    report = examine(written(tmp_path/"rows.json", rows), images, tmp_path/"out")
    said = json.loads((tmp_path/"out"/"report.json").read_text())
    assert said["rows"] == len(rows) and said["outcomes"] == {k: report.outcomes[k] for k in ("kept", "repaired", "left out")} and said["checked"] == dict(text_rows=True, max_length=None)
    assert [f["index"] for f in said["found"]] == list(range(len(rows))) and said["found"][0]["id"] == "missing"
    assert all(p["hint"] == PROBLEMS[p["kind"]][1] and p["says"] and p["level"] in ("error", "warning") for f in said["found"] for p in f["problems"])
    assert sum(said["problems"].values()) == sum(len({p["kind"] for p in f["problems"]}) for f in said["found"])
    import hashlib
    content = (tmp_path/"out"/"index.json").read_bytes()
    assert said["index"] == dict(name="index.json", rows=len(json.loads(content)), sha256=hashlib.sha256(content).hexdigest())
    assert (tmp_path/"out"/"report.txt").read_text() == report.summary()
    for kind in report.problems: assert kind in report.summary()

@pytest.mark.parametrize("text", ['[{"id":1 , "image": "good0.png","conversations":[{"from":"human","value":"<image>\\u00e9 é"},{"value":"A \\ud83e\\udd8a.","from":"gpt"}], "x": 1E2}]'])
def test_good_rows_pass_to_the_letter(text, images, tmp_path):
    (tmp_path/"rows.json").write_text(text)
    assert examine(tmp_path/"rows.json", images, tmp_path/"out").found == []
    assert (tmp_path/"out"/"index.json").read_text() == "[\n" + text[1:-1] + "\n]\n"
    (tmp_path/"rows.jsonl").write_text(text[1:-1] + "\r\n")
    examine(tmp_path/"rows.jsonl", images, tmp_path/"lines")
    assert (tmp_path/"lines"/"index.json").read_text() == "[\n" + text[1:-1] + "\n]\n"

def test_nothing_left_is_still_a_list(images, tmp_path):
    report = examine(written(tmp_path/"rows.json", ["fox"]), images, tmp_path/"out")
    assert json.loads((tmp_path/"out"/"index.json").read_text()) == [] and report.outcomes == {"left out": 1}

@pytest.mark.parametrize("moment", ["reading", "looking", "writing"])
def test_a_stop_leaves_what_was_there(moment, images, tmp_path, monkeypatch):
    file = written(tmp_path/"rows.json", [shown("good0.png")]*200)
    examine(file, images, tmp_path/"out")
    before = {p.name: p.read_bytes() for p in (tmp_path/"out").iterdir()}
    assert sorted(before) == ["index.json", "report.json", "report.txt"]
    written(file, [shown("good1.png")]*200)
    stop, calls = {"reading": "read_rows", "looking": "examine_row", "writing": "_note_duplicates"}[moment], []
    real = getattr(doctor, stop)
    def stopping(*args, **kwargs):
        calls.append(1)
        if moment == "reading" or len(calls) > 100: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(doctor, stop, stopping)
    with pytest.raises(KeyboardInterrupt): examine(file, images, tmp_path/"out")
    assert {p.name: p.read_bytes() for p in (tmp_path/"out").iterdir()} == before

def test_a_full_disk_leaves_what_was_there(images, tmp_path, monkeypatch):
    file = written(tmp_path/"rows.json", [shown("good0.png")]*3)
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(doctor._Index, "close", full)
    with pytest.raises(OSError, match="No space"): examine(file, images, tmp_path/"out")
    assert list((tmp_path/"out").iterdir()) == []

@pytest.mark.parametrize("options,says", [(dict(workers=0), "workers=0"), (dict(images="nowhere"), "is not a folder"), (dict(file="none.json"), "is not a file")])
def test_arguments_that_cannot_be(options, says, images, tmp_path):
    file = written(tmp_path/"rows.json", [shown("good0.png")])
    with pytest.raises(ValueError, match=says): examine(**{"file": file, "images": images, **options})

def test_the_data_is_not_overwritten(images, tmp_path):
    file = written(tmp_path/"index.json", [shown("good0.png")])
    with pytest.raises(ValueError, match="over the data"): examine(file, images, tmp_path)
    with pytest.raises(ValueError, match="no problem that the doctor knows"): Problem("headache", "")

# ---------------------------------------------------------------- many workers

def many(images, tmp_path):
    rng = np.random.default_rng(7)
    return written(tmp_path/"rows.json", [spoiled(rng, {**shown(f"good{i % 3}.png"), "id": i % 90}) for i in range(400)])

def test_results_come_in_order_and_few_are_on_their_way(images, tmp_path, monkeypatch):
    "Threads in the place of processes, of which the later ones are faster."
    import time
    waiting = []
    def pool(workers, context, start, args):
        threads = ThreadPoolExecutor(workers)
        submit = threads.submit
        def counted(*a):
            future = submit(*a); waiting.append(future)
            assert sum(not f.done() for f in waiting) <= 6
            return future
        monkeypatch.setattr(threads, "submit", counted)
        bundle = doctor.partial(doctor._bundle, **args[0])
        def slow(rows): time.sleep(.05*(len(waiting) % 3)); return bundle(rows)
        monkeypatch.setattr(doctor, "_do", slow)
        return threads
    file = many(images, tmp_path)
    alone = examine(file, images, tmp_path/"one")
    monkeypatch.setattr(doctor, "ProcessPoolExecutor", pool)
    together = examine(file, images, tmp_path/"many", workers=2)
    assert together.to_json() == alone.to_json() and len(waiting) == 7
    for name in ("index.json", "report.json", "report.txt"): assert (tmp_path/"one"/name).read_bytes() == (tmp_path/"many"/name).read_bytes()

@pytest.mark.slow
def test_one_and_two_processes_write_the_same_bytes(images, tmp_path, processor):
    file = many(images, tmp_path)
    for workers in (1, 2): examine(file, images, tmp_path/str(workers), processor=processor, max_length=300, workers=workers)
    for name in ("index.json", "report.json", "report.txt"): assert (tmp_path/"1"/name).read_bytes() == (tmp_path/"2"/name).read_bytes()

def killed(bundle):
    import os
    os._exit(1)

@pytest.mark.slow
def test_a_killed_process_is_a_sentence(images, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_do", killed)
    with pytest.raises(ValueError, match="workers=2: one of them was killed"): examine(many(images, tmp_path), images, tmp_path/"out", workers=2)
    assert list((tmp_path/"out").iterdir()) == []
