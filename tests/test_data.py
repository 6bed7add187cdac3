"Planted scenes keep their promises; broken conversations are named before anything long begins."
import hashlib, json, re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from delta_llava.data import (SPLITS, TASKS, Collator, make_conversation, concept_names, load_cutout, draw_scene, group_of, load_conversations, paint_background,
                              image_index, plan_scene, read_rows, write_scenes)

PICTURES = Path(__file__).parents[1]/"delta_llava"/"pictures"

# ---------------------------------------------------------------- pictures

def test_sheets_are_those_of_the_index_and_small():
    for artist, entry in image_index()["artists"].items():
        assert hashlib.sha256((PICTURES/f"{artist}.webp").read_bytes()).hexdigest() == entry["sha256"]
        assert (PICTURES/f"LICENSE-{artist}.txt").stat().st_size > 1000 and entry["credit"] in (PICTURES/"ATTRIBUTION.md").read_text()
    assert sum(f.stat().st_size for f in PICTURES.iterdir()) < 2.5e6

def test_every_artist_drew_every_thing_to_its_outline():
    assert len(set(concept_names())) == 64
    for artist, entry in image_index()["artists"].items():
        assert tuple(entry["boxes"]) == concept_names()
        for name in concept_names():
            alpha = np.asarray(load_cutout(name, artist).getchannel("A"))
            assert max(alpha.shape) >= 44 and 0.1 < (alpha > 127).mean() <= 1
            for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]): assert edge.max() >= 32, (name, artist)

# ---------------------------------------------------------------- scenes

@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size,min_side", [(168, 36), (112, 40), (336, 60)])
def test_plans_keep_their_promises(split, size, min_side):
    for index in range(60):
        scene = plan_scene(index, split, seed=3, size=size, min_side=min_side)
        assert scene == plan_scene(index, split, seed=3, size=size, min_side=min_side)
        centres = [o.box[0] + o.box[2] for o in scene.objects]
        assert centres == sorted(centres)
        for o in scene.objects:
            (x0, y0, x1, y1), (w, h) = o.box, load_cutout(o.name, o.artist).size
            assert o.artist in SPLITS[split] and 0 < x0 < x1 < size and 0 < y0 < y1 < size
            assert max(x1 - x0, y1 - y0) >= min_side and abs((x1 - x0)*h - (y1 - y0)*w) <= max(w, h)  # the shape is kept
        for a, b in combinations(scene.objects, 2):
            assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]
            assert (group_of(a.name) == group_of(b.name)) == (split == "heldout_scenes")

def test_every_thing_is_planted_and_every_count_comes():
    for split in SPLITS:
        scenes = [plan_scene(i, split) for i in range(600)]
        assert {o.name for s in scenes for o in s.objects} == set(concept_names())
        assert {len(s.objects) for s in scenes} == {1, 2, 3, 4}

def test_held_out_artist_is_never_in_another_split():
    assert not {"twemoji"} & set(SPLITS["train"] + SPLITS["heldout_scenes"]) and SPLITS["heldout_artist"] == ("twemoji",)

def test_outside_its_boxes_a_picture_is_background():
    for index in range(20):
        scene = plan_scene(index)
        changed = (np.asarray(draw_scene(scene)) != np.asarray(paint_background(scene.rng(1), scene.size))).any(-1)
        for x0, y0, x1, y1 in (o.box for o in scene.objects):
            assert changed[y0:y1, x0:x1].mean() > 0.1
            changed[y0:y1, x0:x1] = False
        assert not changed.any()

def test_pictures_are_the_same_everywhere():
    "Whole-number painting: another result means that stored experiments cannot be repeated with this Pillow."
    backgrounds = b"".join(paint_background(plan_scene(i).rng(1), 168).tobytes() for i in range(12))
    assert hashlib.sha256(backgrounds).hexdigest() == "954f4df9abb9ba939fe73d00f71709ab5e52f9fbceb4d8c08e2d8b5b8d3114b8"

# ---------------------------------------------------------------- questions

def _mentioned(*texts): return {w for text in texts for w in re.findall(r"\w+", text.lower())} & set(concept_names())

def test_answers_are_true():
    for split in SPLITS:
        for index in range(150):
            scene = plan_scene(index, split)
            boxes, shown = {o.name: o.box for o in scene.objects}, {o.name for o in scene.objects}
            [(_, caption)] = make_conversation(scene, "caption")
            assert [w for w in re.findall(r"\w+", caption.lower()) if w in concept_names()] == [o.name for o in scene.objects]
            yes, no = make_conversation(scene, "existence")
            assert yes[1] == "Yes" and _mentioned(yes[0]) <= shown and no[1] == "No" and not _mentioned(no[0]) & shown
            assert make_conversation(scene, "count")[0][1] == str(len(scene.objects))
            [(question, letter)] = make_conversation(scene, "choice")
            offered = dict(re.findall(r"^([A-D])\. (\w+)$", question, re.M))
            assert len(set(offered.values())) == 4 and [k for k, v in offered.items() if v in shown] == [letter]
            for question, answer in make_conversation(scene, "relation"):
                a, how, b = re.fullmatch(r"Is the (\w+) (left or right of|above or below) the (\w+)\?", question).groups()
                (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes[a], boxes[b]
                assert {"Left": ax1 < bx0, "Right": bx1 < ax0, "Above": ay1 < by0, "Below": by1 < ay0}[answer] and answer.lower() in how

def test_training_rows_never_join_a_held_out_pair():
    for index in range(300):
        scene = plan_scene(index)
        shown = {o.name for o in scene.objects}
        spoken = _mentioned(*(t for task in TASKS for pair in make_conversation(scene, task) for t in pair))
        assert len(spoken - shown) >= 3  # absent things are spoken of
        assert not any(group_of(a) == group_of(b) for a in shown for b in (shown | spoken) - {a})

def test_without_paraphrase_there_is_one_question():
    assert {q for i in range(30) for q, _ in make_conversation(plan_scene(i), "caption", paraphrase=False)} == {"What is in the picture?"}
    assert len({q for i in range(30) for q, _ in make_conversation(plan_scene(i), "caption")}) == 3

# ---------------------------------------------------------------- writing and reading

def test_written_scenes_are_the_same_bytes_and_come_back(tmp_path):
    files = [write_scenes(tmp_path/name, n, "heldout_scenes", seed=5) for name, n in (("a", 12), ("b", 12), ("c", 4))]
    a, b, c = (json.loads(file.read_text()) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes() and a[:len(c)] == c
    for image in (tmp_path/"a"/"images").iterdir(): assert image.read_bytes() == (tmp_path/"b"/"images"/image.name).read_bytes()
    rows = load_conversations(files[0], open_images=True)
    for row, kept in zip(a, rows, strict=True):
        assert {**kept, "image": None} == {**row, "image": None} and Path(kept["image"]) == (tmp_path/"a"/row["image"]).resolve()
        assert Image.open(kept["image"]).size == (168, 168)
    assert {row["task"] for row in a} == set(TASKS)
    answers = [row["conversations"][1]["value"] for row in a if row["task"] == "existence"]
    assert answers.count("Yes") == answers.count("No") == 12

def test_splits_share_a_folder(tmp_path):
    for split in SPLITS: write_scenes(tmp_path, 2, split, tasks=["caption"])
    assert len(list((tmp_path/"images").iterdir())) == 6 and {len(load_conversations(tmp_path/f"{split}.json")) for split in SPLITS} == {2}

@pytest.mark.parametrize("options,says", [
    (dict(split="val"), "use one of"), (dict(n=0), "at least one"), (dict(tasks=[]), "at least one"), (dict(tasks=["poem"]), "use some of"),
    (dict(n_objects=(0, 3)), "within 1..4"), (dict(n_objects=(1, 5)), "within 1..4"), (dict(size=80), "use a larger size"), (dict(min_side=0), "use a larger size"),
    (dict(n_objects=(1, 1), tasks=["relation"]), "needs two things"),
])
def test_scene_arguments_that_cannot_be(options, says, tmp_path):
    with pytest.raises(ValueError, match=re.escape(says)): write_scenes(tmp_path/"s", **{"n": 2, **options})
    assert not (tmp_path/"s").exists()

def _row(*values, roles=("human", "gpt"), **fields):
    turns = [{"from": roles[k % 2], "value": v} for k, v in enumerate(values)]
    return {"id": "x7", "image": "fox.png", "conversations": turns, **fields}

def _load(folder, *rows, **options):
    Image.new("RGB", (8, 8)).save(folder/"fox.png")
    (folder/"rows.json").write_text(json.dumps([_row("<image>\nWhat?", "A fox."), *rows]))
    return load_conversations(folder/"rows.json", **options)

BROKEN = {
    "no image": ({"id": "x7", "conversations": _row("Hi?", "Hello.")["conversations"]}, "has no 'image'"),
    "mark without image": (_row("<image>", "A fox.", image=None), "a question holds '<image>'"),
    "no mark": (_row("What?", "A fox."), "stands 0 times"),
    "two marks": (_row("<image>", "A fox.", "<image>", "Yes."), "stands 2 times"),
    "mark in an answer": (_row("<image>", "A <image>."), "stands in an answer"),
    "empty answer": (_row("<image>", " \n"), "conversations[1]['value'] is an empty answer"),
    "other roles": (_row("<image>", "A fox.", roles=("user", "assistant")), "conversations[0]['from'] is 'user'"),
    "roles exchanged": (_row("<image>", "A fox.", roles=("gpt", "human")), "roles must alternate"),
    "no answer": (_row("<image>", "A fox.", "Sure?"), "conversations[2] is a question without an answer"),
    "no conversations": ({"id": "x7", "image": "fox.png"}, "'conversations' must be a list"),
    "number as text": (_row("<image>", 4), "conversations[1] must be"),
    "two images": (_row("<image>", "A fox.", image=["fox.png", "fox.png"]), "path of one picture"),
    "missing file": (_row("<image>", "A fox.", image="lost.png"), "lost.png"),
    "outside the folder": (_row("<image>", "A fox.", image="../fox.png"), "outside its folder"),
    "absolute path outside": (_row("<image>", "A fox.", image="/etc/hostname"), "outside its folder"),
    "several images": (_row("<image>", "A fox.", image=["fox.png", "lost.png"]), "'image' lists 2 pictures"),
    "half a character": (_row("<image>", "A fox \ud83e."), "half of a character"),
    "half a character in a path": (_row("<image>", "A fox.", image="\ud83e.png"), "half of a character"),
    "half a character in an id": (_row("<image>", "A fox.", id="\ud83e"), "half of a character"),
    "no path at all": (_row("<image>", "A fox.", image="a\0b.png"), "null"),
    "endless path": (_row("<image>", "A fox.", image="a"*5000 + ".png"), "too long"),
    "no object": ("fox", "must be an object"),
}

@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named(name, tmp_path):
    row, says = BROKEN[name]
    with pytest.raises(ValueError, match=re.escape(says)) as error: _load(tmp_path, row)
    assert "rows.json: 1 of 2 rows cannot be used." in str(error.value) and f"row 1 (id {row.get('id') if isinstance(row, dict) else None!r}): " in str(error.value)

def test_all_problems_are_counted_and_five_shown(tmp_path):
    with pytest.raises(ValueError, match="7 of 8 rows") as error: _load(tmp_path, *[_row("<image>", "", id=i) for i in range(7)])
    assert str(error.value).count("empty answer") == 5

@pytest.mark.parametrize("content,says", [("fox", "is not JSON"), ("[]", "an empty list"), ('{"id": 1}', "begins with '{'"), ("", "begins with ''")])
def test_files_that_hold_no_rows(content, says, tmp_path):
    (tmp_path/"rows.json").write_text(content)
    with pytest.raises(ValueError, match=says): load_conversations(tmp_path/"rows.json")

def test_text_rows_only_when_asked(tmp_path):
    text = {"id": 9, "conversations": _row("Hi?", "Hello.")["conversations"]}
    rows = _load(tmp_path, text, text_rows=True)
    assert rows["image"][1] is None and rows["id"][1] == "9"

def test_link_out_of_the_folder(tmp_path):
    inside = tmp_path/"inside"; inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path/"secret.png"); (inside/"link.png").symlink_to(tmp_path/"secret.png")
    with pytest.raises(ValueError, match="outside its folder"): _load(inside, _row("<image>", "A fox.", image="link.png"))

def test_truncated_picture_is_found_when_asked(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path/"whole.png"); (tmp_path/"half.png").write_bytes((tmp_path/"whole.png").read_bytes()[:900])
    row = _row("<image>", "A fox.", image="half.png")
    assert len(_load(tmp_path, row)) == 2
    with pytest.raises(ValueError, match="row 1 .*half.png"): _load(tmp_path, row, open_images=True)

def test_error_says_how_to_find_all(tmp_path):
    with pytest.raises(ValueError, match="delta-llava doctor .*rows.json --images "): _load(tmp_path, "fox")

# ---------------------------------------------------------------- LLaVA's own files, row by row

BLIP = [{"id": "004539375", "image": "00453/004539375.jpg", "conversations": [{"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
                                                                             {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"}]},
        {"id": "002239345", "image": "00223/002239345.jpg", "conversations": [{"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
                                                                             {"from": "gpt", "value": "a grey watch with an army style strap"}]}]
PLACES = ["coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/140031996.jpg", "textvqa/train_images/00c359f294f7dcd9.jpg", "vg/VG_100K/2.jpg", "vg/VG_100K_2/3.jpg"]
MIX = [*(_row("<image>\nWhat?", "A fox.", "Colour?", "Red.", id=place.split("/")[-1][:-4], image=place) for place in PLACES),
       {"id": "wgByO4Y_0", "model": "", "conversations": _row("Who wrote it?", "I cannot know.", "Why?", "I saw no book.")["conversations"]},
       _row("What is this?\n<image>\nAnswer shortly.", "Fox", image=PLACES[0], id=17)]

@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("stored", [False, True])
def test_llavas_files_as_they_are(ending, stored, tmp_path):
    for row in [*BLIP, *MIX]:
        if "image" in row: (tmp_path/"images"/row["image"]).parent.mkdir(parents=True, exist_ok=True); Image.new("RGB", (8, 8)).save(tmp_path/"images"/row["image"])
    for rows in (BLIP, MIX):
        (file := tmp_path/f"rows{ending}").write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)) + "\n\n")
        read = load_conversations(file, tmp_path/"images", text_rows=True, cache=tmp_path/"cache" if stored else None)
        assert read.column_names == ["id", "image", "conversations"] and read["id"] == [str(row["id"]) for row in rows]
        for row, kept in zip(rows, read, strict=True):
            assert kept["image"] == (str((tmp_path/"images"/row["image"]).resolve()) if "image" in row else None)
            for turn, said in zip(row["conversations"], kept["conversations"], strict=True):
                if "<image>" in turn["value"]: assert said["value"] == "<image>\n" + turn["value"].replace("<image>", "").strip()  # what LLaVA trains on
                else: assert said == turn
    with pytest.raises(ValueError, match="row 6 .*no 'image'"): load_conversations(file, tmp_path/"images")

def _value(rng, depth=0):
    "Any JSON value, with everything that has ever confused a scanner."
    kind = rng.integers(9 if depth < 4 else 7)
    text = "".join(rng.choice(list('ab"\\/\b\f\n\r\t{}[],: \u2028é🦊\u0000\ufeff'), rng.integers(0, 9)))
    if kind < 3: return text
    if kind < 7: return [int(rng.integers(-9, 10**12)), float(rng.normal()*10.**rng.integers(-20, 20)), None, bool(rng.integers(2))][kind - 3]
    items = [_value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return items if kind == 7 else {f"{text}{i}": item for i, item in enumerate(items)}

@pytest.mark.parametrize("window", [1, 2, 7, 64, 2**20])
def test_rows_one_by_one_are_those_of_json_loads(window, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.data.WINDOW", window)
    rng, file = np.random.default_rng(window), tmp_path/"rows.json"
    for trial in range(60):
        rows = [_value(rng) for _ in range(rng.integers(0, 6))]
        text = "\ufeff"*(trial % 3 == 0) + " \r\n"*(trial % 2) + json.dumps(rows, ensure_ascii=bool(trial % 5), indent=[None, 1, "\t"][trial % 3],
                          separators=[None, (",", ":"), (" , ", " : ")][trial % 3]) + "\t\n"*(trial % 4)
        file.write_bytes(text.encode())
        read = list(read_rows(file))
        assert [row for row, _ in read] == rows == json.loads(text.removeprefix("\ufeff"))
        for row, written in read: assert written in text and json.loads(written) == row and written == written.strip()

@pytest.mark.parametrize("text", ['[{"a": 1, "a": 2}]', '["\\ud83e", "\\ud83e\\udd8a"]', "[NaN, -Infinity, 1E400, 123456789012345678901234567890]", "[12,34 ,-5]", "[ ]", "[[]]", "[true,false,null]"])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_oddities_read_as_json_loads_reads_them(text, window, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.data.WINDOW", window)
    (tmp_path/"rows.json").write_text(text)
    assert repr([row for row, _ in read_rows(tmp_path/"rows.json")]) == repr(json.loads(text))

@pytest.mark.parametrize("window", [1, 5, 1000])
def test_every_cut_of_a_file_is_an_error(window, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.data.WINDOW", window)
    text = json.dumps([_row("<image>\nWhat?", "A 🦊."), 12, "fox"], ensure_ascii=False)
    for end in range(len(text.encode())):
        (tmp_path/"rows.json").write_bytes(text.encode()[:end])
        with pytest.raises(ValueError, match="rows.json is not JSON"): list(read_rows(tmp_path/"rows.json"))

@pytest.mark.parametrize("text,says", [("[1, 2] 3", "after 2 rows: after the list stands '3'"), ("[1 2]", "after 1 rows: character 3 is '2'"), ("[1,]", "after 1 rows: Expecting value at character 3"),
                                       ("[1,,2]", "Expecting value at character 3"), ('["a\nb"]', "Invalid control character"), ("["*100_000, "after 0 rows"), ("[tru]", "Expecting value at character 1"),
                                       ('[{"id": 1}, {"id": x}]', "after 1 rows: Expecting value at character 19"), ("[1}", "character 2 is '}'")])
@pytest.mark.parametrize("window", [1, 1000])
def test_files_that_are_not_json(text, says, window, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.data.WINDOW", window)
    (tmp_path/"rows.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)): list(read_rows(tmp_path/"rows.json"))

def test_bytes_that_are_no_text(tmp_path):
    (tmp_path/"rows.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="utf-8"): list(read_rows(tmp_path/"rows.json"))
    with pytest.raises(ValueError, match="is not a file"): load_conversations(tmp_path/"none.json")

def test_a_row_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.data.WINDOW", 10); monkeypatch.setattr("delta_llava.data.MAX_ROW", 100)
    (tmp_path/"rows.json").write_text('[1, "' + "x"*10_000)
    with pytest.raises(ValueError, match="after 1 rows: a row does not end within 100 characters"): list(read_rows(tmp_path/"rows.json"))

def test_the_window_stays_small(tmp_path, monkeypatch):
    import tracemalloc
    with open(tmp_path/"rows.json", "w") as f: f.write("[" + ",".join(json.dumps(_row("<image>\nWhat?", "A fox. "*300, id=i)) for i in range(3000)) + "]")
    monkeypatch.setattr("delta_llava.data.WINDOW", 2**16)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path/"rows.json")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < (tmp_path/"rows.json").stat().st_size/5

# ---------------------------------------------------------------- the table on disk

def _cached(folder, **options): return load_conversations(folder/"rows.json", cache=folder/"cache", **options)

def test_second_reading_checks_nothing_and_change_is_noticed(tmp_path, monkeypatch):
    import delta_llava.data as data
    first = _load(tmp_path, cache=tmp_path/"cache")
    checked = []
    monkeypatch.setattr(data, "check_row", lambda *args, check=data.check_row: (checked.append(1), check(*args))[1])
    assert _cached(tmp_path)[:] == first[:] and not checked and len(list((tmp_path/"cache").iterdir())) == 1
    text = (tmp_path/"rows.json").read_text()
    (tmp_path/"rows.json").write_text(text.replace("A fox.", "A cat."))  # of the same length, and within the clock's grain
    assert _cached(tmp_path)["conversations"][0][1]["value"] == "A cat." and checked == [1]
    assert len(_cached(tmp_path, text_rows=True)) == 1 and checked == [1, 1]  # another question, another table
    _cached(tmp_path, open_images=True)
    assert checked == [1, 1, 1]  # asked for: done

def test_failed_readings_leave_no_table(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="1 of 2 rows"): _load(tmp_path, "fox", cache=tmp_path/"cache")
    def stopped(*args): raise KeyboardInterrupt
    _load(tmp_path)
    with monkeypatch.context() as m:
        m.setattr("delta_llava.data.check_row", stopped)
        with pytest.raises(KeyboardInterrupt): _cached(tmp_path)
    assert not list((tmp_path/"cache").iterdir())
    assert len(_cached(tmp_path)) == 1

def test_large_files_go_to_the_cache_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTA_LLAVA_CACHE", str(tmp_path/"home")); monkeypatch.setattr("delta_llava.data.IN_MEMORY", 10)
    rows = _load(tmp_path)
    assert rows.cache_files and Path(rows.cache_files[0]["filename"]).parent == tmp_path/"home"/"conversations"

def test_many_batches_of_rows(tmp_path):
    rows = _load(tmp_path, *(_row("<image>", f"Fox {i}.", id=i) for i in range(2500)), cache=tmp_path/"cache")
    assert rows["id"][1:] == [str(i) for i in range(2500)] and rows[2500]["conversations"][1]["value"] == "Fox 2499."

# ---------------------------------------------------------------- batches

@pytest.fixture(scope="module")
def processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
    from delta_llava.processor import build_processor
    letters = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"])}
    spelling = Tokenizer(models.BPE(vocab=letters, merges=[]))
    spelling.pre_tokenizer, spelling.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return build_processor(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28), tokenizer, tokens=9, template="v1")

@pytest.fixture
def scenes(tmp_path): return load_conversations(write_scenes(tmp_path, 4, n_objects=(2, 3), tasks=["caption", "count"]))

def test_batch_is_its_rows_padded_on_the_left(processor, scenes):
    collate = Collator(processor=processor)
    batch, alone = collate(list(scenes)), [collate([row]) for row in scenes]
    length = max(one["input_ids"].shape[1] for one in alone)
    assert len({one["input_ids"].shape[1] for one in alone}) > 1 and "tokens" not in batch
    for i, one in enumerate(alone):
        padding = length - one["input_ids"].shape[1]
        for key, fill in (("input_ids", processor.tokenizer.pad_token_id), ("labels", -100), ("attention_mask", 0)):
            assert batch[key][i].tolist() == [fill]*padding + one[key][0].tolist()
        assert one["attention_mask"].all() and torch.equal(batch["pixel_values"][i], one["pixel_values"][0])
        learned = one["labels"][0][one["labels"][0] >= 0]
        assert processor.tokenizer.decode(learned).strip() == scenes[i]["conversations"][1]["value"] + "</s>"
        assert (one["input_ids"] == processor.image_token_id).sum() == 9

def test_features_stand_for_pixels(processor, scenes):
    paths = sorted(set(scenes["image"]), reverse=True)
    features = torch.arange(len(paths)*8.).reshape(len(paths), 4, 2)
    batch = Collator(processor=processor, tokens=4, features=features, paths=paths)(list(scenes))
    assert "pixel_values" not in batch and batch["tokens"] == 4 and ((batch["input_ids"] == processor.image_token_id).sum(1) == 4).all()
    for row, kept in zip(scenes, batch["vision_features"], strict=True): assert torch.equal(kept, features[paths.index(row["image"])])

def test_rows_without_pictures_can_be_mixed_in(processor, tmp_path):
    rows = _load(tmp_path, {"id": 9, "conversations": _row("Hi?", "Hello.")["conversations"]}, text_rows=True)
    collate = Collator(processor=processor)
    assert collate(list(rows))["pixel_values"].shape[0] == 1 and "pixel_values" not in collate([rows[1]])

def test_nothing_to_learn_is_an_error(processor, scenes):
    with pytest.raises(ValueError, match=f"row '{scenes[0]['id']}': nothing is supervised"): Collator(processor=processor, max_length=190)([scenes[0]])
    with pytest.raises(ValueError, match=f"row '{scenes[0]['id']}': .*cut an image"): Collator(processor=processor, max_length=150)([scenes[0]])

def test_collators_that_cannot_be(processor, scenes):
    features, paths = torch.zeros(2, 4, 2), scenes["image"][:2]
    with pytest.raises(ValueError, match="both or neither"): Collator(processor=processor, paths=paths)
    with pytest.raises(ValueError, match="one for each"): Collator(processor=processor, features=features[:1], paths=paths)
    with pytest.raises(ValueError, match="no features for"): Collator(processor=processor, features=features, paths=paths)([scenes[-1]])
    with pytest.raises(ValueError, match="tokens=0"): Collator(processor=processor, tokens=0)
