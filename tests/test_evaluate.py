"The scores: a model that reads its picture passes every one, a blind or random one stands at chance, and wrong input is named. The paper's tables: numbers, warnings, ours beside."
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

import tiny_vlm
from delta_llava import evaluate
from delta_llava.scenes import make_conversation, concept_names, plan_scene, with_article, write_scenes
from delta_llava.conversations import load_conversations
from delta_llava.evaluate import derangement, answer_losses, forced_choice_accuracy, matched_mismatched_loss, encode_images
from delta_llava.processor import build_processor
from delta_llava.quickstart import answer
from delta_llava.tower import open_image
from delta_llava.vlm import DeltaLlavaForConditionalGeneration

WORDS = ["<unk>", "<s>", "</s>", *sorted({w for n in concept_names() for w in with_article(n).split()} |
                                         {"A", "An", "and", ",", ".", "What", "is", "in", "the", "picture", "?", "user", "assistant"})]

@pytest.fixture(scope="module")
def processor():
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return build_processor(BitImageProcessorPil(size=dict(height=56, width=56), crop_size=dict(height=56, width=56)), tokenizer, tokens=4, template="v1")

def scenes(n, count=(1, 1)):
    "Captioned scenes without their pictures."
    rows = []
    for i in range(n):
        things = [dict(name=o.name) for o in plan_scene(i, "train", seed=5, n_objects=count).objects]
        said = " and ".join(with_article(t["name"]) for t in things)
        rows.append(dict(objects=things, conversations=[{"from": "human", "value": "<image>\nWhat is in the picture?"},
                                                        {"from": "gpt", "value": said[0].upper() + said[1:] + "."}]))
    return rows

class Cache:
    def __init__(self, seen): self.seen = seen
    def batch_repeat_interleave(self, n): self.seen = self.seen.repeat_interleave(n, dim=0)

class Head(nn.Module):
    def forward(self, hidden): return hidden

class Eyes(nn.Module):
    def forward(self, input_ids, mm_encoder_outputs=None, past_key_values=None, tokens=None, use_cache=None, attention_mask=None):
        seen = torch.stack(mm_encoder_outputs["image"].pooler_output).mean(1) if mm_encoder_outputs else past_key_values.seen
        return BaseModelOutputWithPast(last_hidden_state=seen[:, None].expand(-1, input_ids.shape[1], -1), past_key_values=Cache(seen))

class Reader(DeltaLlavaForConditionalGeneration):
    "A model whose next word is any that its visual tokens hold: one channel for each word."
    def __init__(self):
        nn.Module.__init__(self)
        self.model,self.lm_head,self.some = Eyes(),Head(),nn.Parameter(torch.zeros(1))

def words_seen(rows, processor, seeing=True):
    "Visual tokens: the words of the names in the picture, and every word that is no name."
    names = {w for n in concept_names() for w in n.split()}
    visual = torch.zeros(len(rows), 4, len(processor.tokenizer))
    for i,row in enumerate(rows):
        shown = {w for o in row["objects"] for w in o["name"].split()}
        for j,w in enumerate(WORDS): visual[i, :, j] = 20. if w not in names or seeing and w in shown else 0.
    return visual

# ---------------------------------------------------------------- a model that sees, and ones that do not

@pytest.mark.parametrize("count", [(1, 1), (2, 3)])
def test_a_model_that_sees_passes(processor, count):
    rows = scenes(48, count)
    visual = words_seen(rows, processor)
    scores = matched_mismatched_loss(Reader().eval(), processor, rows, visual)
    assert scores["p"] < 1e-6 and scores["right"] + 1 < scores["shuffled"]
    assert forced_choice_accuracy(Reader().eval(), processor, rows, visual) == 1

def test_a_model_that_sees_fails_on_other_pictures(processor):
    rows = scenes(48)
    visual = words_seen(rows, processor)
    moved = [rows[j] for j in derangement(48).tolist()]
    assert matched_mismatched_loss(Reader().eval(), processor, moved, visual)["p"] > .99  # this shuffle brings the right ones back
    assert forced_choice_accuracy(Reader().eval(), processor, moved, visual) < .3

@pytest.mark.parametrize("value", [1., float("nan")])
def test_a_model_that_says_the_same_of_everything_names_nothing(processor, value):
    rows = scenes(6)
    assert forced_choice_accuracy(Reader().eval(), processor, rows, torch.full((6, 4, len(processor.tokenizer)), value)) == 0

def test_random_tokens_stand_at_chance(processor):
    rows = scenes(96)
    g = torch.Generator().manual_seed(0)
    noise = words_seen(rows, processor, seeing=False) + torch.randn(96, 1, len(processor.tokenizer), generator=g)
    scores = matched_mismatched_loss(Reader().eval(), processor, rows, noise)
    assert scores["p"] > .01 and abs(scores["right"] - scores["shuffled"]) < .3
    assert .0 <= forced_choice_accuracy(Reader().eval(), processor, rows, noise) < .2  # chance is 1/16

def test_scores_do_not_depend_on_the_batch(processor):
    rows = scenes(11, (1, 3))
    visual = words_seen(rows, processor) + torch.randn(11, 1, len(processor.tokenizer), generator=torch.Generator().manual_seed(0))
    whole = answer_losses(Reader().eval(), processor, rows, visual, batch_size=11)
    torch.testing.assert_close(answer_losses(Reader().eval(), processor, rows, visual, batch_size=3), whole)
    torch.testing.assert_close(answer_losses(Reader().eval(), processor, rows[::-1], visual.flip(0), batch_size=2), whole.flip(0))
    assert forced_choice_accuracy(Reader().eval(), processor, rows, visual, batch_size=2) == forced_choice_accuracy(Reader().eval(), processor, rows, visual, batch_size=11)

# ---------------------------------------------------------------- the parts

@pytest.mark.parametrize("count", [(1, 1), (2, 3), (4, 4)])
def test_candidates_one_shown_the_others_absent(count):
    rows = scenes(40, count)
    lists = evaluate._candidates(rows, 16, 0)
    for row,names in zip(rows, lists):
        shown = {o["name"] for o in row["objects"]}
        assert names[0] in shown and not shown & set(names[1:]) and len(set(names)) == 16 and set(names) <= set(concept_names())
    assert lists == evaluate._candidates(rows, 16, 0) != evaluate._candidates(rows, 16, 1)
    if count != (1, 1): assert len({[o["name"] for o in r["objects"]].index(n[0]) for r,n in zip(rows, lists)}) > 1  # not always the first thing

@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_another_is_never_the_same_picture(n, seed):
    order = derangement(n, seed)
    assert sorted(order.tolist()) == list(range(n)) and not (order == torch.arange(n)).any()
    assert order.equal(derangement(n, seed))
    assert n < 64 or not order.equal(derangement(n, seed + 1))

def test_one_picture_has_no_other(processor):
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"n={n} must be at least 2"): derangement(n)
    rows = scenes(1)
    with pytest.raises(ValueError, match="must be at least 2"): matched_mismatched_loss(Reader().eval(), processor, rows, words_seen(rows, processor))

def test_seeing_is_the_projector_in_batches_at_any_budget():
    model = tiny_vlm.tiny()
    config = tiny_vlm.projector_config()
    features = torch.randn(5, config.grid**2, config.d_levels, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 4, config.tokens):
        visual = encode_images(model, features, tokens, batch_size=2)
        torch.testing.assert_close(visual, model.multi_modal_projector(features, tokens=tokens).detach())
        assert visual.shape == (5, tokens, 64) and not visual.requires_grad
    torch.testing.assert_close(encode_images(model, list(features)), encode_images(model, features, config.tokens))
    with pytest.raises(ValueError, match="training mode"): encode_images(model.train(), features)

def test_scores_refuse(processor):
    rows = scenes(3)
    visual = words_seen(rows, processor)
    for score in (answer_losses, forced_choice_accuracy):
        with pytest.raises(ValueError, match="0 pictures for 0 rows"): score(Reader().eval(), processor, [], visual[:0])
    with pytest.raises(ValueError, match="0 captions for 0 rows"): evaluate.object_scores([], [])
    with pytest.raises(ValueError, match="features hold no picture"): encode_images(tiny_vlm.tiny(), [])
    with pytest.raises(ValueError, match="visual holds no picture"): evaluate.captions(Reader().eval(), processor, visual[:0])
    for score in (answer_losses, forced_choice_accuracy):
        with pytest.raises(ValueError, match="3 pictures for 2 rows"): score(Reader().eval(), processor, rows[:2], visual)
    for candidates in (1, 62):
        with pytest.raises(ValueError, match=f"candidates={candidates} must lie in 2..61"): forced_choice_accuracy(Reader().eval(), processor, rows, visual, candidates=candidates)

# ---------------------------------------------------------------- captions

def naming_rows(*names): return [dict(objects=[dict(name=n) for n in some]) for some in names]

def test_captions_are_those_of_one_picture_at_a_time(tmp_path):
    "The batch, and visual tokens made beforehand, change no word; FastV drops in the LLM at each budget."
    rows = load_conversations(write_scenes(tmp_path, 5, "heldout_scenes", 0, (1, 2), 168, tasks=("caption",), paraphrase=False, min_side=56))
    for compressor,budgets in (("delta", (1, 4)), ("fastv", (1, 49))):
        model,processor = tiny_vlm.tiny("clip_b32_224", compressor=compressor).eval(), build_processor(CLIPImageProcessorPil(), tiny_vlm.byte_tokenizer(), tokens=4, template="v1")
        for tokens in budgets:
            pixels = processor.image_processor([open_image(r["image"]) for r in rows], return_tensors="pt")["pixel_values"]
            with torch.no_grad(): visual = evaluate.visual_tokens(model.model, pixels, tokens=tokens)
            said = evaluate.captions(model, processor, visual, tokens, max_new_tokens=6, batch_size=2)
            assert said == evaluate.captions(model, processor, visual, tokens, max_new_tokens=6, batch_size=5)
            if compressor == "delta": assert said == [answer(model, processor, open_image(r["image"]), tokens=tokens, max_new_tokens=6) for r in rows]

def test_things_are_counted_exactly():
    rows = naming_rows(["fox", "key"], ["owl"], ["cake", "bus", "lion"])
    said = ["A FOX and a key.", "An owl, a fox and an owl.", "I see a pancake and a lion."]
    assert evaluate.object_scores(said, rows) == dict(precision=4/5, recall=4/6, f1=8/11, exact_match=1/3)  # a pancake is no cake, and an owl said twice is one
    assert evaluate.object_scores([""]*3, rows) == dict(precision=0, recall=0, f1=0, exact_match=0)
    with pytest.raises(ValueError, match="2 captions for 3 rows"): evaluate.object_scores(said[:2], rows)

def test_references_are_the_datas_own_phrasings():
    for i in range(12):
        scene = plan_scene(i, "train", seed=5, n_objects=(1, 4))
        true = evaluate.references(dict(objects=[dict(name=o.name) for o in scene.objects]))
        assert len(true) == 3 and make_conversation(scene, "caption")[0][1].lower() in [t.lower() for t in true] and true[0].lower() == make_conversation(scene, "caption", paraphrase=False)[0][1].lower()

def test_cider_by_hand():
    "Two pictures, one reference each, so a run of words that only one has weighs ln 2 and one that both have weighs nothing."
    pytest.importorskip("pycocoevalcap")
    true = [["a red fox"], ["a key"]]
    assert abs(evaluate.cider(["A red fox.", "a key"], true) - 1000*(3/4 + 2/4)/2) < 1e-6  # runs of 1, 2 and 3 words; of 1 and 2: shorter ones have no others
    assert evaluate.cider(["a", "a"], true) == evaluate.cider(["", "nothing"], true) == 0
    # "a red" has "red" of {red, fox} and "a red" of {a red, red fox}: cosine 1/sqrt 2 each, one word too short
    assert abs(evaluate.cider(["a red", "a"], true) - 1000/4*2**-.5*2*math.exp(-1/72)/2) < 1e-6
    # a second reference halves what only the first has
    assert abs(evaluate.cider(["a red fox", "a"], [["a red fox", "the bird"], ["a key", "a key"]]) - 1000*3/4/2/2) < 1e-6
    with pytest.raises(ValueError, match="there must be two"): evaluate.cider(["a"], [["a"]])

def test_cider_without_its_package(monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    scores = evaluate.caption_scores(["A fox.", "A key."], naming_rows(["fox"], ["key"]))
    assert scores["exact_match"] == 1 and scores["cider"] is None
    with pytest.raises(ImportError, match="captions"): evaluate.cider(["a", "b"], [["a"], ["b"]])
    assert "needs `pip install 'delta-llava[captions]'`" in evaluate.missing("runs/q", [4])

def test_the_true_caption_is_the_best_that_the_model_was_taught():
    pytest.importorskip("pycocoevalcap")
    rows = scenes(24, (2, 3))
    said = [evaluate.references(r)[0] for r in rows]
    best = evaluate.caption_scores(said, rows)
    assert best["cider"] == best["cider_reference"] and best["exact_match"] == 1
    worse = evaluate.caption_scores([said[i] for i in derangement(24).tolist()], rows)
    assert worse["cider"] < .3*best["cider"] and worse["cider_reference"] == best["cider_reference"]

# ---------------------------------------------------------------- the paper's tables

def cells(number, **where): return [c for c in evaluate.paper_cells(number) if all(c[k] == v for k,v in where.items())]
def value(number, **where):
    found, = cells(number, **where)
    return found["value"]

def test_tables_have_the_numbers_that_the_papers_text_states():
    "§6.1–§6.6 repeat some of them in words: a slip in the table would break one."
    ours = dict(system="Delta-LLaVA (Ours)")
    assert (value(1, column="GQA", tokens="144", **ours), value(1, column="GQA", tokens="144", system="TokenPacker")) == (62.34, 61.9)
    assert (value(1, column="SQA", tokens="144", **ours), value(1, column="SQA", system="Matryoshka Query", tokens="144")) == (68.7, 67.5)
    assert [value(1, column="VizWiz", tokens=t, **ours) for t in ("36", "16")] == [56.2, 55.2]
    assert (value(1, column="MME", system="LLaVA-1.5"), value(1, column="VQAv2", system="LLaVA-1.5")) == (1510.7, 78.5)
    for t in ("4", "1"):  # "the top scores on GQA, POPE, TextVQA, and VizWiz"
        for column in ("GQA", "POPE", "TextVQA", "VizWiz"): assert value(1, column=column, tokens=t, **ours) == max(c["value"] or 0 for c in cells(1, column=column, tokens=t))
    assert value(2, column="GQA", tokens="144") - value(2, column="GQA", tokens="448") > 3 and value(2, column="MMB", tokens="144") - value(2, column="MMB", tokens="448") > 11
    assert value(2, column="MME", tokens="144") == 1524
    full = {c["column"]: c["value"] for c in cells(3, system="Full Model")}  # Table 1's row at 144 tokens, SQA to one more digit
    assert full == {c["column"]: 68.67 if c["column"] == "SQA" else c["value"] for c in cells(1, tokens="144", **ours) if c["column"] in full}
    assert value(4, column="Pretraining", tokens="1") == 16*60 and 2.8 < value(4, column="Finetuning", tokens="1")/3600 < 2.9  # "16 minutes and 2.9 hours"
    for column in ("Pretraining", "Finetuning"):  # "a clear monotonic reduction"
        times = [c["value"] for c in cells(4, column=column)]
        assert times == sorted(times, reverse=True) and len(set(times)) == 6
    assert value(5, column="GQA", system="CLIP 336") == max(c["value"] for c in cells(5, column="GQA")) and value(5, column="MME", system="SigLIP 386") == min(c["value"] for c in cells(5, column="MME"))
    for c in cells(6, tokens="576", system="FastV"): assert c["value"] == value(6, tokens="576", system="Ours", llm=c["llm"], column=c["column"])  # "performance is matched"
    gains = [value(6, tokens=t, system="Ours", llm="LLaVA-1.5-7B", column=k) - value(6, tokens=t, system="FastV", llm="LLaVA-1.5-7B", column=k) for t in ("144", "64") for k in ("Nocaps", "Flickr30k")]
    assert 2 < min(gains) and max(gains) < 5  # "up to 3–5 CIDEr points"

def test_tables_without_another_copy_as_printed():
    "Typed a second time from the paper, row by row."
    rows = lambda n: [[c["printed"] for c in cells(n, system=s, tokens=t)] for s,t in dict.fromkeys((c["system"], c["tokens"]) for c in evaluate.paper_cells(n))]
    assert [" ".join(r) for r in rows(2)] == ["57.5 60.6 1487.5 68.2 38.9 78.2", "61.77 72.0 1524.0 87.0 73.1 41.7", "55.1 67.3 1452.3 86.2 72.4 33.1"]
    assert [" ".join(r) for r in rows(5)] == ["61.1 64.94 1442 86.12 67.82 57.2", "60.5 64.9 1448.1 84.56 69.3 56.1", "59.44 61.69 1345.03 85.2 68.42 55.54"]

def test_tables_equal_the_reading_guides_copies():
    "The reading guide typed them by hand, apart from these."
    guide = "\n".join("".join(c["source"]) for c in json.loads((Path(__file__).parents[1]/"nbs"/"00_reading_guide.ipynb").read_text())["cells"] if c["cell_type"] == "code")
    def typed(name):
        scope = {}
        exec(re.search(rf"^{name} = .*?(?=^\w|\Z)", guide, re.M | re.S)[0], scope)
        return scope[name]
    rows = lambda n: {(c["system"], c["llm"], c["tokens"]): [x["value"] for x in cells(n, system=c["system"], llm=c["llm"], tokens=c["tokens"])] for c in evaluate.paper_cells(n)}
    blocks,mine = typed("blocks"),rows(1)
    assert sorted(map(str, mine.values())) == sorted(str([None if v is None else float(v) for v in r]) for block in blocks.values() for r in block)
    for name,(own,*_) in blocks.items():
        tokens,llm = name.split()[-1], "Vicuna-1.5 13B" if "13B" in name else "Vicuna-1.5 7B"
        assert list(own) in [r for (system,l,t),r in mine.items() if (l, t) == (llm, tokens) and "Ours" in system]
    assert typed("printed") == {c["column"]: c["value"] for c in cells(2, system="Qwen-VL-Chat")}
    assert {k: list(v) for k,v in typed("scores").items()} | {"Full Model": list(typed("whole"))} == {k[0]: v for k,v in rows(3).items()}
    assert {str(t): list(v) for t,v in typed("times").items()} == {t: [c["printed"] for c in cells(4, tokens=t)] for t in map(str, typed("times"))}
    where = [("LLaVA-1.5-7B", "Nocaps"), ("LLaVA-1.5-7B", "Flickr30k"), ("LLaVA-1.5-13B", "Nocaps"), ("LLaVA-1.5-13B", "Flickr30k")]
    for t,four in typed("captions").items():
        for (llm,column),pair in zip(where, four): assert pair == tuple(value(6, tokens=str(t), llm=llm, column=column, system=s) for s in ("FastV", "Ours"))

def concerned(number, says): return {(c["system"], c["llm"], c["tokens"], c["column"]) for c in evaluate.paper_cells(number) if any(says in w for w in c["warnings"])}

def test_warnings_sit_on_the_cells_they_concern():
    "Each selection is computed again from the numbers."
    published = dict(VQAv2=78.2, GQA=57.5, VizWiz=38.9, SQA=68.2, MME=1487.5, MMB=60.6)
    assert {c[3] for c in concerned(2, "Shifted")} == {c["column"] for c in cells(2, system="Qwen-VL-Chat") if published.get(c["column"]) != c["value"]} == {"POPE", "SQA", "VizWiz"}
    llms = ("LLaVA-1.5-7B", "LLaVA-1.5-13B")
    pairs = {(llm, t, k): (value(6, system="Ours", llm=llm, tokens=t, column=k), value(6, system="FastV", llm=llm, tokens=t, column=k)) for llm in llms for t in ("144", "64", "36", "16", "4", "1") for k in ("Nocaps", "Flickr30k")}
    assert {c[1:] for c in concerned(6, "Equal to FastV")} == {k for k,(a,b) in pairs.items() if a == b}
    assert {c[1:] for c in concerned(6, "Below FastV")} == {k for k,(a,b) in pairs.items() if a < b}
    kept = {k: a/value(6, system="Ours", llm=k[0], tokens="576", column=k[2]) for k,(a,_) in pairs.items()}
    assert {c[1:] for c in concerned(6, "≥ 85")} == {k for k,v in kept.items() if v < .85}
    own = {k: value(6, system="Ours", llm="LLaVA-1.5-7B", tokens="576", column=k) for k in ("Nocaps", "Flickr30k")}
    assert {c[1:] for c in concerned(6, "lies below")} == {k for k,(a,_) in pairs.items() if k[0] == llms[0] and a > own[k[2]]}
    table = evaluate.paper_tables()["tables"]["1"]
    budgets = [dict(zip(table["columns"], row)) for row in table["rows"]]
    other = next(letter for letter,w in zip("abcdefghij", table["warnings"]) if w["says"].startswith("Another budget"))
    assert [(r["system"], r["tokens"]) for r in budgets if other in evaluate._warned(table, r, "tokens")] == [("PruMerge", "~32"), ("Matryoshka Query", "2")]
    assert concerned(6, "own protocol") == {(c["system"], c["llm"], c["tokens"], c["column"]) for c in evaluate.paper_cells(6) if c["system"] == "FastV" or c["tokens"] == "576"}
    ours,base = ({c["column"]: c["value"] for c in cells(1, system=s, tokens=t)} for s,t in (("Delta-LLaVA (Ours)", "144"), ("LLaVA-1.5", "576")))
    assert {c[3] for c in concerned(1, "Consistent gains")} == {k for k in ours if ours[k] < base[k]} and {c[2] for c in concerned(1, "Consistent gains")} == {"144"}
    big,base = ({c["column"]: c["value"] for c in cells(1, system=s)} for s in ("Delta-LLaVA-13B (Ours)", "LLaVA-1.5 13B"))
    assert {c[3] for c in concerned(1, "13B LLM")} == {k for k in big if big[k] <= base[k]}
    assert {c[3] for c in concerned(1, "Two splits")} == {"VQAv2", "VizWiz"} and len(concerned(1, "Two splits")) == 26*2 - 3  # three dashes
    drop = {c["system"]: c["value"] for c in cells(3, column="MME")}
    assert [c[0] for c in concerned(3, "largest MME drop")] == [min(drop, key=drop.get)]
    assert {c[2] for c in concerned(4, "2.51×")} == {"144"} and not concerned(5, "Bold in the paper") - {("SigLIP 386", "Vicuna 7B", "81", "SQA")}

def test_every_warning_is_shown_at_a_cell_and_in_words():
    for number in range(1, 7):
        text = evaluate.paper_table(number, "none")
        table,_,below = text.partition("\n\n- ⚠a")
        for letter,w in zip("abcdefghij", evaluate.paper_tables()["tables"][str(number)]["warnings"]):
            assert any(letter in mark for mark in re.findall(r"⚠([a-j]+)", table)), (number, letter)
            assert w["says"] in text and w["evidence"] in text
        assert table.count("not run") == len(evaluate.paper_tables()["tables"][str(number)]["rows"])
    with pytest.raises(ValueError, match="number=7 must be one of 1..6"): evaluate.paper_table(7)

def test_selectors_name_rows_and_columns_that_exist():
    for table in evaluate.paper_tables()["tables"].values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        for w in table["warnings"]:
            for where in w["cells"]:
                for key,values in where.items(): assert set(values) <= set(table["columns"] if key == "column" else [row[table["columns"].index(key)] for row in table["rows"]]), (w["says"], key)

def test_ours_stand_beside_with_their_spread(tmp_path):
    said = lambda seed,name,tokens,f1: dict(seed=seed, compressor=name, tokens=tokens, set="one", cider=100*f1, f1=f1)
    result = [said(0, "delta", 4, .2), said(1, "delta", 4, .6), said(0, "delta", 4, .4) | dict(set="two"), said(1, "delta", 4, .8) | dict(set="two"), said(0, "fastv", 64, .9)]
    (tmp_path/"captions.json").write_text(json.dumps(dict(patches=64, result=result)))
    (tmp_path/"compare.json").write_text(json.dumps(dict(recipe=dict(steps=9, batch_size=2), result=[
        dict(label="mlp", calibrated=True, scores=dict(a={"64": dict(naming=.5)}, b={"64": dict(naming=1.)})), dict(label="delta", calibrated=False, scores=dict(a={"4": dict(naming=.1)}))])))
    columns = evaluate.recorded_columns(6, tmp_path)
    rows = evaluate.paper_tables()["tables"]["6"]["rows"]
    of = lambda heading,*row: columns[heading][[r[:3] for r in rows].index(list(row))]
    assert of("here: F1 of the things", "Ours", "LLaVA-1.5-7B", "4") == "0.50 (0.30–0.70, n=2)"  # first the mean over the sets of a seed
    assert of("here: CIDEr, own scenes", "FastV", "LLaVA-1.5-7B", "576") == of("here: CIDEr, own scenes", "Ours", "LLaVA-1.5-7B", "576") == "90 (90–90, n=1)"
    assert {of("here: F1 of the things", "Ours", llm, t) for llm,t in (("LLaVA-1.5-13B", "4"), ("LLaVA-1.5-13B", "576"), ("LLaVA-1.5-7B", "64"), ("LLaVA-1.5-7B", "1"))} == {"not run"}
    forced_choice_accuracy, = evaluate.recorded_columns(1, tmp_path).values()
    assert forced_choice_accuracy[0] == "75% (75%–75%, n=1)" and set(forced_choice_accuracy[1:]) == {"not run"}
    pruned = dict(label="prumerge", calibrated=True, scores=dict(a={"36": dict(naming=.25)}))
    (tmp_path/"compare.json").write_text(json.dumps(dict(recipe=dict(steps=9, batch_size=2), result=[pruned])))
    assert [t for t in next(iter(evaluate.recorded_columns(1, tmp_path).values())) if t != "not run"] == ["25% (25%–25%, n=1) at 36 tokens"]  # stands at "~32"
    assert evaluate.recorded_columns(2, tmp_path) == {"here": ["not run"]*3}

def test_figure_has_means_and_bars_to_the_extremes():
    rows = [dict(seed=s, compressor=c, tokens=t, set=n, f1=(.1 + .2*s)*(1 + (c == "delta"))*t/16) for s in (0, 1, 2) for c,budgets in (("delta", (16, 4)), ("fastv", (64, 16, 4))) for t in budgets for n in ("a", "b")]
    import matplotlib.pyplot as plt
    fig = evaluate.draw_captions(dict(patches=64, result=rows), {"f1": "F1"})
    assert len(fig.axes) == 2
    for ax in fig.axes:
        assert ax.get_lines()[0].get_ydata()[0] == pytest.approx(.3*4)  # all patches
        for container,twice in zip(ax.containers, (2, 1)):
            line,_,(bars,) = container.lines
            assert list(line.get_xdata()) == [4, 16] and list(line.get_ydata()) == pytest.approx([.3*twice/4, .3*twice])
            assert bars.get_segments()[1][:, 1].tolist() == pytest.approx([.1*twice, .5*twice])
    plt.close(fig)
