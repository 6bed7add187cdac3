"Scores: a model that uses its image passes, a random one is at chance, wrong input is named."

import math
from types import SimpleNamespace

import pytest
import tiny_vlm
import torch
from test_answerer import build, scene_image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from delta_llava import evaluate
from delta_llava.adapter import BitImageProcessorPil, CausalLMOutputWithPast
from delta_llava.answerer import Answerer
from delta_llava.evaluate import (
    answer_losses,
    derangement,
    encode_images,
    forced_choice_accuracy,
    matched_mismatched_loss,
)
from delta_llava.processor import build_processor
from delta_llava.scenes import concept_names, make_conversation, plan_scene, with_article
from delta_llava.vlm import DeltaLlavaForConditionalGeneration

PROMPT_WORDS = {"A", "An", "and", ",", ".", "What", "is", "in", "the", "picture", "?", "user", "assistant"}
NAME_WORDS = {word for name in concept_names() for word in with_article(name).split()}
WORDS = ["<unk>", "<s>", "</s>", *sorted(NAME_WORDS | PROMPT_WORDS)]


@pytest.fixture(scope="module")
def processor():
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    side = dict(height=56, width=56)
    return build_processor(
        BitImageProcessorPil(size=side, crop_size=side), tokenizer, tokens=4, template="v1"
    )


def scenes(n, n_objects=(1, 1)):
    "Captioned scenes without their images."
    rows = []
    for i in range(n):
        objects = [dict(name=o.name) for o in plan_scene(i, "train", seed=5, n_objects=n_objects).objects]
        caption = " and ".join(with_article(o["name"]) for o in objects)
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the picture?"},
            {"from": "gpt", "value": caption[0].upper() + caption[1:] + "."},
        ]
        rows.append(dict(objects=objects, conversations=turns))
    return rows


class Cache:
    "Of the visual tokens, where a model has keys and values."

    def __init__(self, logits):
        self.logits = logits

    def batch_select_indices(self, indices):
        self.logits = self.logits[indices]


class Reader(DeltaLlavaForConditionalGeneration):
    "A model whose next word is any that its visual tokens hold: one channel for each word."

    def __init__(self, processor):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(1))
        self.vision_tower = nn.Identity()
        self.config = SimpleNamespace(image_token_id=processor.image_token_id)
        self.generation_config = GenerationConfig()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        tokens=None,
        use_cache=None,
    ):
        if mm_encoder_outputs:
            logits = torch.stack(list(mm_encoder_outputs["image"].pooler_output)).mean(1)
        else:
            logits = past_key_values.logits
        n = logits_to_keep or input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits[:, None].expand(-1, n, -1), past_key_values=Cache(logits))


@pytest.fixture
def reader(processor):
    return Reader(processor).eval()


def visible_words(rows, processor, visible=True):
    "Visual tokens: the words of the names in the image, and every word that is no name."
    names = {word for name in concept_names() for word in name.split()}
    visual = torch.zeros(len(rows), 4, len(processor.tokenizer))
    for i, row in enumerate(rows):
        shown = {word for o in row["objects"] for word in o["name"].split()}
        for j, word in enumerate(WORDS):
            if word not in names or visible and word in shown:
                visual[i, :, j] = 20.0
    return visual


def noise(n, processor):
    return torch.randn(n, 1, len(processor.tokenizer), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- models that use the image, and not


@pytest.mark.parametrize("n_objects", [(1, 1), (2, 3)])
def test_a_model_that_uses_the_image_passes(processor, reader, n_objects):
    rows = scenes(48, n_objects)
    visual = visible_words(rows, processor)
    scores = matched_mismatched_loss(reader, processor, rows, visual)
    assert scores["p"] < 1e-6 and scores["matched_loss"] + 1 < scores["mismatched_loss"]
    assert forced_choice_accuracy(reader, processor, rows, visual) == 1


def test_it_fails_on_other_images(processor, reader):
    rows = scenes(48)
    visual = visible_words(rows, processor)
    moved = [rows[j] for j in derangement(48).tolist()]
    assert matched_mismatched_loss(reader, processor, moved, visual)["p"] > 0.99  # restores the matches
    assert forced_choice_accuracy(reader, processor, moved, visual) < 0.3


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_equal_scores_are_not_correct(processor, reader, value):
    visual = torch.full((6, 4, len(processor.tokenizer)), value)
    assert forced_choice_accuracy(reader, processor, scenes(6), visual) == 0


def test_random_tokens_are_at_chance(processor, reader):
    rows = scenes(96)
    visual = visible_words(rows, processor, visible=False) + noise(96, processor)
    scores = matched_mismatched_loss(reader, processor, rows, visual)
    assert scores["p"] > 0.01 and abs(scores["matched_loss"] - scores["mismatched_loss"]) < 0.3
    assert forced_choice_accuracy(reader, processor, rows, visual) < 0.2  # chance is 1/16


def test_scores_do_not_depend_on_the_batch(processor, reader):
    rows = scenes(11, (1, 3))
    visual = visible_words(rows, processor) + noise(11, processor)
    losses = answer_losses(reader, processor, rows, visual, batch_size=11)
    torch.testing.assert_close(answer_losses(reader, processor, rows, visual, batch_size=3), losses)
    reverse = answer_losses(reader, processor, rows[::-1], visual.flip(0), batch_size=2)
    torch.testing.assert_close(reverse, losses.flip(0))
    two, eleven = (forced_choice_accuracy(reader, processor, rows, visual, batch_size=b) for b in (2, 11))
    assert two == eleven


def test_all_answers_of_a_row_count(processor, reader):
    "Two turns: the mean over the tokens of both."
    (row,) = scenes(1)
    first = row["conversations"]
    second = [dict(first[0], value="What is in the picture?"), dict(first[1], value="An owl.")]
    visual = visible_words([row], processor) + noise(1, processor)
    both = answer_losses(reader, processor, [dict(conversations=[*first, *second])], visual)
    alone = [dict(conversations=first), dict(conversations=[dict(first[0]), second[1]])]
    losses = answer_losses(reader, processor, alone, visual.expand(2, -1, -1))
    counts = torch.tensor([4.0, 4.0])  # article, name, full stop, end of turn
    torch.testing.assert_close(both[0], (losses * counts).sum() / counts.sum())


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("n_objects", [(1, 1), (2, 3), (4, 4)])
def test_candidates_one_shown_the_others_absent(n_objects):
    rows = scenes(40, n_objects)
    lists = evaluate._candidates(rows, 16, 0)
    target_positions = set()
    for row, names in zip(rows, lists, strict=True):
        shown = [o["name"] for o in row["objects"]]
        assert names[0] in shown and not set(shown) & set(names[1:])
        assert len(set(names)) == 16 and set(names) <= set(concept_names())
        target_positions.add(shown.index(names[0]))
    assert lists == evaluate._candidates(rows, 16, 0) != evaluate._candidates(rows, 16, 1)
    assert n_objects == (1, 1) or len(target_positions) > 1  # not always the first object


@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_derangement_has_no_fixed_point(n, seed):
    order = derangement(n, seed)
    assert sorted(order.tolist()) == list(range(n)) and not (order == torch.arange(n)).any()
    assert order.equal(derangement(n, seed))
    assert n < 64 or not order.equal(derangement(n, seed + 1))


def test_one_image_has_no_other(processor, reader):
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"n={n} must be at least 2"):
            derangement(n)
    rows = scenes(1)
    with pytest.raises(ValueError, match="must be at least 2"):
        matched_mismatched_loss(reader, processor, rows, visible_words(rows, processor))


def test_encoding_is_the_projector_in_batches_at_any_budget():
    model = tiny_vlm.tiny()
    config = tiny_vlm.projector_config()
    features = torch.randn(5, config.grid**2, config.d_levels, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 4, config.tokens):
        visual = encode_images(model, features, tokens, batch_size=2)
        torch.testing.assert_close(visual, model.multi_modal_projector(features, tokens=tokens).detach())
        assert visual.shape == (5, tokens, 64) and not visual.requires_grad
    torch.testing.assert_close(
        encode_images(model, list(features)), encode_images(model, features, config.tokens)
    )
    with pytest.raises(ValueError, match="training mode"):
        encode_images(model.train(), features)


def test_scores_refuse(processor, reader):
    rows = scenes(3)
    visual = visible_words(rows, processor)
    for score in (answer_losses, forced_choice_accuracy):
        with pytest.raises(ValueError, match="0 images for 0 rows"):
            score(reader, processor, [], visual[:0])
        with pytest.raises(ValueError, match="3 images for 2 rows"):
            score(reader, processor, rows[:2], visual)
    with pytest.raises(ValueError, match="0 captions for 0 rows"):
        evaluate.object_scores([], [])
    with pytest.raises(ValueError, match="features hold no image"):
        encode_images(tiny_vlm.tiny(), [])
    with pytest.raises(ValueError, match="visual holds no image"):
        evaluate.generate_captions(reader, processor, visual[:0])
    shown = max(len(row["objects"]) for row in rows)
    for names in ((), concept_names()[:16]):
        most = len(names or concept_names()) - shown + 1
        for candidates in (1, most + 1):
            with pytest.raises(ValueError, match=f"candidates={candidates} must lie in 2..{most}"):
                forced_choice_accuracy(reader, processor, rows, visual, candidates=candidates, names=names)


# ---------------------------------------------------------------- captions


def named_rows(*names):
    return [dict(objects=[dict(name=name) for name in group]) for group in names]


@pytest.mark.parametrize(
    "compressor,budgets", [("delta", (1, 4)), ("fastv", (1, 9, 144)), ("llavolta", (1, 9, 144))]
)
def test_captions_are_those_of_one_image_at_a_time(compressor, budgets):
    "The batch, and visual tokens made beforehand, change no word; FastV drops tokens in the LLM."
    model, processor = build(compressor)
    images = [scene_image(i) for i in range(5)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    answerer, question = Answerer(model, processor), "What is in the picture?"
    for tokens in budgets:
        with torch.no_grad():
            visual = torch.stack(list(model.get_image_features(pixels, tokens=tokens).pooler_output))
        two, five = (
            evaluate.generate_captions(model, processor, visual, tokens, question, 6, batch_size)
            for batch_size in (2, 5)
        )
        assert two == five
        assert two == [answerer.answer(i, question, tokens=tokens, max_new_tokens=6) for i in images]


def test_objects_are_counted_exactly():
    rows = named_rows(["fox", "key"], ["owl"], ["cake", "bus", "lion"])
    captions = ["A FOX and a key.", "An owl, a fox and an owl.", "I see a pancake and a lion."]
    scores = evaluate.object_scores(captions, rows)  # a pancake is no cake, and an owl named twice is one
    assert scores == dict(precision=4 / 5, recall=4 / 6, f1=8 / 11, exact_match=1 / 3)
    assert evaluate.object_scores([""] * 3, rows) == dict(precision=0, recall=0, f1=0, exact_match=0)
    with pytest.raises(ValueError, match="2 captions for 3 rows"):
        evaluate.object_scores(captions[:2], rows)


def test_references_are_the_datas_own_phrasings():
    for i in range(12):
        scene = plan_scene(i, "train", seed=5, n_objects=(1, 4))
        row = dict(objects=[dict(name=o.name) for o in scene.objects])
        texts = [text.lower() for text in evaluate.reference_captions(row)]
        assert len(texts) == 3 and make_conversation(scene, "caption")[0][1].lower() in texts
        assert texts[0] == make_conversation(scene, "caption", paraphrase=False)[0][1].lower()


def test_cider_by_hand():
    "Two images, one reference each: an n-gram of only one has the weight ln 2, of both the weight 0."
    pytest.importorskip("pycocoevalcap")
    true = [["a red fox"], ["a key"]]
    wanted = (
        1000 * (3 / 4 + 2 / 4) / 2
    )  # n-grams of 1, 2 and 3 words; of 1 and 2: shorter ones have no others
    assert abs(evaluate.cider(["A red fox.", "a key"], true) - wanted) < 1e-6
    assert evaluate.cider(["a", "a"], true) == evaluate.cider(["", "nothing"], true) == 0
    # "a red" has "red" of {red, fox} and "a red" of {a red, red fox}: cosine 1/sqrt 2, a word too short
    assert abs(evaluate.cider(["a red", "a"], true) - 1000 / 4 * 2**-0.5 * 2 * math.exp(-1 / 72) / 2) < 1e-6
    # a second reference halves what only the first has
    two = [["a red fox", "the bird"], ["a key", "a key"]]
    assert abs(evaluate.cider(["a red fox", "a"], two) - 1000 * 3 / 4 / 2 / 2) < 1e-6
    with pytest.raises(ValueError, match="there must be two"):
        evaluate.cider(["a"], [["a"]])


def test_cider_without_its_package(monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    scores = evaluate.score_captions(["A fox.", "A key."], named_rows(["fox"], ["key"]))
    assert scores["exact_match"] == 1 and scores["cider"] is scores["cider_reference"] is None
    with pytest.raises(ImportError, match="captions"):
        evaluate.cider(["a", "b"], [["a"], ["b"]])
    assert "needs `pip install 'delta-llava[captions]'`" in evaluate.unavailable_benchmarks("runs/q", [4])


def test_the_true_caption_has_the_highest_score():
    pytest.importorskip("pycocoevalcap")
    rows = scenes(24, (2, 3))
    captions = [evaluate.reference_captions(row)[0] for row in rows]
    best = evaluate.score_captions(captions, rows)
    assert best["cider"] == best["cider_reference"] and best["exact_match"] == 1
    worse = evaluate.score_captions([captions[i] for i in derangement(24).tolist()], rows)
    assert worse["cider"] < 0.3 * best["cider"] and worse["cider_reference"] == best["cider_reference"]
