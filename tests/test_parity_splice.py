"""LLaVA's splice against its reference's numbers (fixture `llava_splice` in `--parity-dir`).

The reference marks an image by one id of -200 and puts the visual tokens there; here a prompt reserves a place for each of them. Both must give the LLM the same
sequence: embeddings bit for bit, labels exactly. Padding is free, since the mask hides it: the reference fills zeros (on the right by default), ours pads with a
token on the left. Two things of the reference cannot be expressed, and are refused:

- the image of a row without `<image>`, which the reference consumes with a slice of length zero (row 1 of the `train` cases): an image that no text names is an error;
- a row that supervises nothing, in the prompt (row 2 of the `train` cases) or because its answer was cut off (row 0 of `train_trunc`)."""
from functools import cache

import pytest
import torch
from PIL import Image
from parity import cases, info, tensors, under
from tiny_vlm import TOWERS, llm_config, projector_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from delta_llava.data import Collator
from delta_llava.processor import build_processor
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaModel

NAME, IMAGE, BOS, EOS, PAD = "llava_splice", -200, 1, 2, 0
INEXPRESSIBLE = {"train": ([1], [2]), "train_leftpad": ([1], [2]), "train_trunc": ([1], [0, 2])}  # case -> rows without an image, rows without supervision
TEMPLATE = "{%- for m in messages -%}{{- m['content'] + ' ' -}}{%- if m['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"


def pytest_generate_tests(metafunc):
    kinds = {"case": lambda c: True, "labelled_case": lambda c: "labels" not in c["returns_none"], "inexpressible_case": lambda c: c["name"] in INEXPRESSIBLE}
    for kind, where in kinds.items():
        if kind in metafunc.fixturenames: metafunc.parametrize(kind, cases(metafunc, NAME, where=lambda n, c: where(c)))


def test_every_kind_has_a_case(pytestconfig):
    found = {c["name"] for c in info(pytestconfig.getoption("--parity-dir"), NAME)["cases"]}
    assert {"train", "train_leftpad", "train_trunc", "infer", "two_images"} <= found, "a fixture that is missing proves nothing"


# ---- the stored cases
def given(folder, case, key): return tensors(folder, NAME)[f"in.{case['name']}.{key}"]


def rows(folder, case) -> list:
    "Ids of each row without padding."
    ids = given(folder, case, "input_ids")
    mask = under(folder, NAME, f"in.{case['name']}.").get("attention_mask", torch.ones_like(ids))
    return [row[real.bool()].tolist() for row, real in zip(ids, mask)]


def expected(folder, case, key) -> list:
    "What the reference gives to the LLM, each row without padding."
    stored = under(folder, NAME, f"out.{case['name']}.")
    mask = stored.get("attention_mask", torch.ones(stored[key].shape[:2]))
    return [row[real.bool()] for row, real in zip(stored[key], mask)]


def named(ids) -> list:
    "Numbers of the images that the rows name; a row that names none uses one up in the reference."
    out, at = [], 0
    for row in ids:
        n = row.count(IMAGE)
        out += range(at, at + n)
        at += max(n, 1)
    return out


# ---- ours
def word(i): return "<image>" if i == IMAGE else f"w{i:02}"
def text(ids): return " ".join(map(word, ids))
def images(n): return [Image.new("RGB", (8, 8))]*n


@cache
def processor(folder):
    "One word for each id of the fixture's table; `<image>` is the id behind them."
    words, images = tensors(folder, NAME)["state.embed_tokens.weight"], tensors(folder, NAME)["in.image_features"]
    tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(len(words))}, unk_token=word(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=word(BOS), eos_token=word(EOS), pad_token=word(PAD), chat_template=TEMPLATE)
    return build_processor(CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8), tokenizer, tokens=images.shape[1])


@cache
def model(folder) -> DeltaLlavaModel:
    "A small LLM with the fixture's table; what `<image>` itself is embedded as must never be seen."
    table = tensors(folder, NAME)["state.embed_tokens.weight"]
    n, width = table.shape
    llm = llm_config(vocab_size=n+1, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                     bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    out = DeltaLlavaModel(DeltaLlavaConfig(vision_config=TOWERS["clip_b32_224"][1](), text_config=llm, projector=projector_config(d_llm=width).to_dict(), image_token_index=n))
    with torch.no_grad(): out.get_input_embeddings().weight.copy_(torch.cat([table, torch.full((1, width), torch.nan)]))
    return out.eval()


def encode(folder, case):
    "The rows through the processor."
    ids = rows(folder, case)
    return processor(folder)(images=images(len(named(ids))), text=[text(row) for row in ids], max_length=case["config"].get("tokenizer_model_max_length"))


def embed(folder, batch, images):
    "What the model hands to its LLM."
    seen = []
    hook = model(folder).language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    with hook, torch.no_grad():
        model(folder)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                      mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(images))})
    return seen[0]


def spliced(folder, case, times=1.) -> list:
    "Embeddings of each row without padding; visual tokens scaled by `times`."
    batch = encode(folder, case)
    out = embed(folder, batch, tensors(folder, NAME)["in.image_features"][named(rows(folder, case))]*times)
    return [row[real.bool()] for row, real in zip(out, batch["attention_mask"])]


def test_embeddings(case):
    folder, _, case = case
    ours, theirs = spliced(folder, case), expected(folder, case, "inputs_embeds")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs): assert torch.equal(a, b)


def test_one_percent_is_noticed(case):
    folder, _, case = case
    assert not all(torch.equal(a, b) for a, b in zip(spliced(folder, case, 1.01), expected(folder, case, "inputs_embeds")))


def test_left_padding(labelled_case):
    "The mask is the reference's with `tokenizer_padding_side` left, whatever side the case itself has."
    folder, _, case = labelled_case
    theirs = tensors(folder, NAME)[f"out.{case['name']}.attention_mask"]
    if case["config"].get("tokenizer_padding_side") != "left": theirs = theirs.sort(dim=1).values
    assert torch.equal(encode(folder, case)["attention_mask"].bool(), theirs)


def conversation(ids, labels) -> list:
    "A row as a question, and an answer where it is supervised; the template writes EOS behind the answer."
    start = next((i for i, l in enumerate(labels) if l >= 0), len(ids))
    question, answer = dict(role="user", content=text(ids[:start])), dict(role="assistant", content=text(ids[start:-1]))
    return [question, answer] if start < len(ids) else [question]


def collated(folder, case) -> tuple:
    "Numbers of the rows that supervise something, and the batch that the collator makes of them."
    ids, features = rows(folder, case), tensors(folder, NAME)["in.image_features"]
    images = dict(zip([i for i, row in enumerate(ids) if IMAGE in row], map(str, named(ids))))
    turns = [conversation(row, labels.tolist()) for row, labels in zip(ids, given(folder, case, "labels"))]
    collate = Collator(processor=processor(folder), max_length=case["config"].get("tokenizer_model_max_length"), features=features, paths=list(map(str, range(len(features)))))
    stays = [i for i, labels in enumerate(expected(folder, case, "labels")) if (labels >= 0).any()]
    entry = lambda i: dict(id=str(i), image=images.get(i), conversations=turns[i])
    for i in set(range(len(ids))) - set(stays):
        with pytest.raises(ValueError, match="nothing is supervised"): collate([entry(i)])
    return stays, collate([entry(i) for i in stays])


def test_labels(labelled_case):
    folder, _, case = labelled_case
    stays, batch = collated(folder, case)
    theirs = expected(folder, case, "labels")
    assert stays
    for i, labels, real in zip(stays, batch["labels"], batch["attention_mask"].bool()):
        assert torch.equal(labels[real], theirs[i]) and (labels[~real] == -100).all()


def test_training_batch_has_the_same_sequence(labelled_case):
    "Ids of the collator, visual tokens that it looked up."
    folder, _, case = labelled_case
    stays, batch = collated(folder, case)
    theirs, ours = expected(folder, case, "inputs_embeds"), embed(folder, batch, batch.get("vision_features", []))  # none where one row of text is left
    for i, row, real in zip(stays, ours, batch["attention_mask"].bool()): assert torch.equal(row[real], theirs[i])


# ---- what cannot be expressed
def test_which_rows_cannot_be_expressed(inexpressible_case):
    folder, _, case = inexpressible_case
    bare = [i for i, row in enumerate(rows(folder, case)) if IMAGE not in row]
    unsupervised = [i for i, row in enumerate(expected(folder, case, "labels")) if not (row >= 0).any()]
    assert (bare, unsupervised) == INEXPRESSIBLE[case["name"]]


def test_an_image_that_no_text_names_is_refused(inexpressible_case):
    folder, _, case = inexpressible_case
    with pytest.raises(ValueError, match=r"name 2 image\(s\) .* 3 were given"): processor(folder)(images=images(case["images"]), text=list(map(text, rows(folder, case))))
    with pytest.raises(ValueError, match="image placeholders per row"): embed(folder, encode(folder, case), tensors(folder, NAME)["in.image_features"])
