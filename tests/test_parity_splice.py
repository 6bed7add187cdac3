"""LLaVA's splice against its reference's numbers (fixture `llava_splice` in `--parity-dir`).

The reference marks an image by one id of -200 and puts the visual tokens there; here a prompt reserves a
place for each of them. Both must give the LLM the same sequence: embeddings bit for bit, labels exactly.
Padding is free, since the mask hides it: the reference fills zeros (on the right by default), ours pads
with a token on the left. Two things of the reference cannot be expressed, and are refused:

- the image of a row without `<image>`, which the reference consumes with a slice of length zero (row 1 of
  the `train` cases): an image that no text names is an error;
- a row that supervises nothing, in the prompt (row 2 of the `train` cases) or because its answer was cut
  off (row 0 of `train_trunc`)."""

from functools import cache

import pytest
import torch
from parity import cases, info, tensors, under
from PIL import Image
from tiny_vlm import TOWERS, llm_config, projector_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from delta_llava.collator import Collator
from delta_llava.processor import build_processor
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

NAME = "llava_splice"
IMAGE, BOS, EOS, PAD = -200, 1, 2, 0
# case -> rows without an image, rows without supervision
INEXPRESSIBLE = {"train": ([1], [2]), "train_leftpad": ([1], [2]), "train_trunc": ([1], [0, 2])}
TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- m['content'] + ' ' -}}"
    "{%- if m['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


def pytest_generate_tests(metafunc):
    kinds = {
        "case": lambda case: True,
        "labelled_case": lambda case: "labels" not in case["returns_none"],
        "inexpressible_case": lambda case: case["name"] in INEXPRESSIBLE,
    }
    for kind, belongs in kinds.items():
        if kind in metafunc.fixturenames:
            found = cases(metafunc, NAME, where=lambda name, case, belongs=belongs: belongs(case))
            metafunc.parametrize(kind, found)


def test_every_kind_has_a_case(pytestconfig):
    found = {case["name"] for case in info(pytestconfig.getoption("--parity-dir"), NAME)["cases"]}
    expected = {"train", "train_leftpad", "train_trunc", "infer", "two_images"}
    assert expected <= found, "a fixture that is missing proves nothing"


# ---------------------------------------------------------------- the stored cases


def stored_input(folder, case, key):
    return tensors(folder, NAME)[f"in.{case['name']}.{key}"]


def stored_rows(folder, case) -> list:
    "Ids of each row without padding."
    ids = stored_input(folder, case, "input_ids")
    mask = under(folder, NAME, f"in.{case['name']}.").get("attention_mask", torch.ones_like(ids))
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def expected_rows(folder, case, key) -> list:
    "What the reference gives to the LLM, each row without padding."
    stored = under(folder, NAME, f"out.{case['name']}.")
    mask = stored.get("attention_mask", torch.ones(stored[key].shape[:2]))
    return [row[real.bool()] for row, real in zip(stored[key], mask, strict=True)]


def named_images(rows) -> list:
    "Numbers of the images that the rows name; a row that names none uses one up in the reference."
    numbers, first = [], 0
    for row in rows:
        n = row.count(IMAGE)
        numbers += range(first, first + n)
        first += max(n, 1)
    return numbers


# ---------------------------------------------------------------- ours


def word(i):
    return "<image>" if i == IMAGE else f"w{i:02}"


def text_of(ids):
    return " ".join(map(word, ids))


def dummy_images(n):
    return [Image.new("RGB", (8, 8))] * n


@cache
def make_processor(folder):
    "One word for each id of the fixture's table; `<image>` is the next id."
    n_words = len(tensors(folder, NAME)["state.embed_tokens.weight"])
    n_visual = tensors(folder, NAME)["in.image_features"].shape[1]
    tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(n_words)}, unk_token=word(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=word(BOS),
        eos_token=word(EOS),
        pad_token=word(PAD),
        chat_template=TEMPLATE,
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
    return build_processor(image_processor, tokenizer, tokens=n_visual)


@cache
def make_model(folder) -> DeltaLlavaForConditionalGeneration:
    "A small LLM with the fixture's table; what `<image>` itself is embedded as must never be used."
    table = tensors(folder, NAME)["state.embed_tokens.weight"]
    n, width = table.shape
    llm = llm_config(
        vocab_size=n + 1,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    _, vision_config, _ = TOWERS["clip_b32_224"]
    config = DeltaLlavaConfig(
        vision_config=vision_config(),
        text_config=llm,
        image_token_index=n,
        projector=projector_config(d_llm=width).to_dict(),
    )
    model = DeltaLlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.cat([table, torch.full((1, width), torch.nan)]))
    return model.eval()


def encode(folder, case):
    "The rows through the processor."
    rows = stored_rows(folder, case)
    max_length = case["config"].get("tokenizer_model_max_length")
    return make_processor(folder)(
        images=dummy_images(len(named_images(rows))),
        text=[text_of(row) for row in rows],
        max_length=max_length,
    )


def embed(folder, batch, images):
    "What the model hands to its LLM."
    embeddings = []

    def keep(module, args, kwargs):
        embeddings.append(kwargs["inputs_embeds"])

    model = make_model(folder)
    visual = {"image": BaseModelOutputWithPooling(pooler_output=list(images))}
    with model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], mm_encoder_outputs=visual)
    return embeddings[0]


def spliced(folder, case, scale=1.0) -> list:
    "Embeddings of each row without padding; visual tokens scaled by `scale`."
    batch = encode(folder, case)
    images = tensors(folder, NAME)["in.image_features"][named_images(stored_rows(folder, case))]
    embeddings = embed(folder, batch, images * scale)
    return [row[real.bool()] for row, real in zip(embeddings, batch["attention_mask"], strict=True)]


def test_embeddings(case):
    folder, _, case = case
    expected = expected_rows(folder, case, "inputs_embeds")
    for ours, reference in zip(spliced(folder, case), expected, strict=True):
        assert torch.equal(ours, reference)


def test_one_percent_is_noticed(case):
    folder, _, case = case
    pairs = zip(spliced(folder, case, 1.01), expected_rows(folder, case, "inputs_embeds"), strict=True)
    assert not all(torch.equal(ours, reference) for ours, reference in pairs)


def test_left_padding(labelled_case):
    "The mask is the reference's with `tokenizer_padding_side` left, whatever side the case itself has."
    folder, _, case = labelled_case
    reference = tensors(folder, NAME)[f"out.{case['name']}.attention_mask"]
    if case["config"].get("tokenizer_padding_side") != "left":
        reference = reference.sort(dim=1).values
    assert torch.equal(encode(folder, case)["attention_mask"].bool(), reference)


def conversation(ids, labels) -> list:
    "A row as a question, and an answer where it is supervised; the template writes EOS after the answer."
    start = next((i for i, label in enumerate(labels) if label >= 0), len(ids))
    question = dict(role="user", content=text_of(ids[:start]))
    answer = dict(role="assistant", content=text_of(ids[start:-1]))
    return [question, answer] if start < len(ids) else [question]


def case_rows(folder, case) -> list:
    "The case as rows of a data set; images are named by their numbers."
    ids = stored_rows(folder, case)
    numbers = iter(named_images(ids))
    rows = []
    for i, (row, labels) in enumerate(zip(ids, stored_input(folder, case, "labels"), strict=True)):
        named = [str(next(numbers)) for _ in range(row.count(IMAGE))]
        rows.append(
            dict(
                id=str(i), image=named[0] if named else None, conversations=conversation(row, labels.tolist())
            )
        )
    return rows


def collated(folder, case) -> tuple:
    "Numbers of the rows that supervise something, and the batch that the collator makes of them."
    rows, features = case_rows(folder, case), tensors(folder, NAME)["in.image_features"]
    max_length = case["config"].get("tokenizer_model_max_length")
    collate = Collator(
        processor=make_processor(folder),
        max_length=max_length,
        features=features,
        paths=[str(i) for i in range(len(features))],
    )
    labels = expected_rows(folder, case, "labels")
    supervised = [i for i, row in enumerate(labels) if (row >= 0).any()]
    for i in set(range(len(rows))) - set(supervised):
        with pytest.raises(ValueError, match=f"^row '{i}': nothing is supervised"):
            collate([rows[i]])
    return supervised, collate([rows[i] for i in supervised])


def test_labels(labelled_case):
    folder, _, case = labelled_case
    supervised, batch = collated(folder, case)
    reference = expected_rows(folder, case, "labels")
    assert supervised
    masks = batch["attention_mask"].bool()
    for i, labels, real in zip(supervised, batch["labels"], masks, strict=True):
        assert torch.equal(labels[real], reference[i])
        assert (labels[~real] == -100).all()


def test_training_batch_has_the_same_sequence(labelled_case):
    "Ids of the collator, visual tokens that it looked up."
    folder, _, case = labelled_case
    supervised, batch = collated(folder, case)
    reference = expected_rows(folder, case, "inputs_embeds")
    ours = embed(folder, batch, batch.get("vision_features", []))  # none where one row of text is left
    for i, row, real in zip(supervised, ours, batch["attention_mask"].bool(), strict=True):
        assert torch.equal(row[real], reference[i])


# ---------------------------------------------------------------- what cannot be expressed


def test_which_rows_cannot_be_expressed(inexpressible_case):
    folder, _, case = inexpressible_case
    bare = [i for i, row in enumerate(stored_rows(folder, case)) if IMAGE not in row]
    labels = expected_rows(folder, case, "labels")
    unsupervised = [i for i, row in enumerate(labels) if not (row >= 0).any()]
    assert (bare, unsupervised) == INEXPRESSIBLE[case["name"]]


def test_an_image_that_no_text_names_is_refused(inexpressible_case):
    folder, _, case = inexpressible_case
    texts = [text_of(row) for row in stored_rows(folder, case)]
    with pytest.raises(ValueError, match=r"name 2 image\(s\) .* 3 were given"):
        make_processor(folder)(images=dummy_images(case["images"]), text=texts)
    with pytest.raises(ValueError, match="image placeholders per row"):
        embed(folder, encode(folder, case), tensors(folder, NAME)["in.image_features"])
