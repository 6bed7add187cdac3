"Answers and likelihoods: batch, form of the images and cache change nothing; `<image>` is never written."

import numpy as np
import pytest
import torch
from tiny_vlm import IMAGE, TOWERS, byte_tokenizer, llm_config, projector_config

from delta_llava.adapter import CLIPImageProcessorPil
from delta_llava.answerer import Answerer, AnswerScore, EncodedAnswer, Request, RequestEncoder, shared_prompt
from delta_llava.compressors import base
from delta_llava.compressors.base import tower_options
from delta_llava.processor import build_processor
from delta_llava.scenes import draw_scene, plan_scene
from delta_llava.tower import vision_features
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

every = pytest.mark.parametrize("name", [*base.COMPRESSORS, *base.VARIANTS])

QUESTIONS = [
    "What?",
    "Is there a fox in the picture?\nAnswer the question using a single word or phrase.",
    "How many?",
    "Which of these is in the picture?\nA. fox\nB. key",
    "Why is it so?",
    "Left or right?",
    "Name it.",
    "And?",
]
ANSWERS = ["A", "B", "a fox", "No", "Yes", "left", "three things", "C"]


def scene_image(i):
    return draw_scene(plan_scene(i, seed=3))


def build(name="delta", template="v1"):
    "A tiny model of one compressor at 9 tokens (the MLP has 144) with its processor, images of 384 px."
    torch.manual_seed(0)
    sizes = base.compressor_config(name, projector_config("clip_b32_384"), tokens=144 if name == "mlp" else 9)
    compressor = base.compressor_name(base.compressor_class(name)(sizes))
    config = DeltaLlavaConfig(
        vision_config=TOWERS["clip_b32_384"][1](),
        text_config=llm_config(num_hidden_layers=4),
        compressor=compressor,
        projector=sizes.to_dict(),
        image_token_index=IMAGE,
    )
    model = DeltaLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.get_decoder().layers.parameters():
            p.mul_(12 if p.ndim == 2 else 1)  # else every image gets the same answer
    requires = model.multi_modal_projector.requires
    pixels = CLIPImageProcessorPil(size=dict(shortest_edge=384), crop_size=dict(height=384, width=384))
    placeholders = sizes.placeholders(sizes.tokens) if "decoder" in requires else None
    processor = build_processor(
        pixels, byte_tokenizer(), sizes.tokens, template, "text" in requires, placeholders
    )
    return model, processor


def requests(n=8):
    return [Request(question, [scene_image(i)]) for i, question in enumerate(QUESTIONS[:n])]


def log_likelihoods(scores):
    return torch.tensor([score.log_likelihood for score in scores])


# ---------------------------------------------------------------- batches, budgets, forms of the images


@every
def test_answers_do_not_depend_on_the_batch(name):
    answerer = Answerer(*build(name))
    batch_sizes, n = ((1, 4, 8), 8) if name == "delta" else ((1, 4), 4)
    texts = [answerer.generate(requests(n), max_new_tokens=4, batch_size=b) for b in batch_sizes]
    scores = [answerer.log_likelihoods(requests(n), ANSWERS[:n], batch_size=b) for b in batch_sizes]
    assert all(t == texts[0] for t in texts) and len(set(texts[0])) > 1
    for other in scores[1:]:
        torch.testing.assert_close(log_likelihoods(other), log_likelihoods(scores[0]), atol=1e-3, rtol=1e-4)
        assert [s[1:] for s in other] == [s[1:] for s in scores[0]]


def test_arrays_and_tensors_get_the_answer_of_their_image():
    answerer = Answerer(*build("delta"))
    image = scene_image(3)
    array = np.asarray(image)
    want = answerer.generate_ids([Request("What?", [image])], max_new_tokens=3)
    for same in (array, torch.tensor(array).permute(2, 0, 1)):
        assert answerer.generate_ids([Request("What?", [same])], max_new_tokens=3) == want
        assert answerer.answer(same, "What?", max_new_tokens=3) == answerer.answer(
            image, "What?", max_new_tokens=3
        )
    with pytest.raises(ValueError, match="do_rescale=False"):
        answerer.answer(array / 255, "What?")


@every
def test_the_budget_of_the_call_reaches_the_model(name):
    model, processor = build(name)
    answerer = Answerer(model, processor)
    if name in ("mlp", "quecc", "qwen", "evit", "dynamicvit", "pixelshuffle"):  # built for one budget
        with pytest.raises(ValueError, match="tokens=4 .* use"):
            answerer.generate(requests(1), tokens=4)
        return
    budgets = []

    def note(module, args, kwargs):
        budgets.append(kwargs.get("tokens"))

    hook = model.multi_modal_projector.register_forward_pre_hook(note, with_kwargs=True)
    answerer.generate(requests(1), tokens=4, max_new_tokens=2)
    hook.remove()
    assert budgets == [4]
    four, nine = (answerer.log_likelihoods(requests(2), ["A", "B"], tokens=t) for t in (4, 9))
    assert four != nine


@pytest.mark.parametrize(
    "name", [*("delta", "fastv", "llavolta", "prumerge", "fastervlm", "evit", "dynamicvit", "quecc")]
)
def test_images_features_and_visual_tokens_answer_alike(name):
    model, processor = build(name)
    answerer = Answerer(model, processor)
    plain = requests(3)
    options = tower_options(model.multi_modal_projector)
    features, visual = [], []
    with torch.no_grad():
        for request in plain:
            inputs = answerer.encoder.image_inputs([request])
            levels, pixels = model.config.vision_feature_layer, inputs["pixel_values"]
            features.append(vision_features(model.vision_tower, pixels, levels, **options))
            visual.append(torch.stack(list(model.get_image_features(**inputs).pooler_output)))
    others = [
        [Request(r.question, vision_features=x) for r, x in zip(plain, features, strict=True)],
        [Request(r.question, visual_tokens=x) for r, x in zip(plain, visual, strict=True)],
    ]
    texts, scores = answerer.generate(plain, max_new_tokens=4), answerer.log_likelihoods(plain, ANSWERS[:3])
    for other in others:
        assert answerer.generate(other, max_new_tokens=4) == texts
        again = answerer.log_likelihoods(other, ANSWERS[:3])
        torch.testing.assert_close(log_likelihoods(again), log_likelihoods(scores), atol=1e-3, rtol=1e-4)


def test_several_images_and_none_in_one_call():
    answerer = Answerer(*build())
    two = [scene_image(0), scene_image(1)]
    mixed = [*requests(2), Request("Which is older?", two), Request("Who?")]
    mixed.append(Request("First <image> then <image>: which?", two[::-1]))
    one, four = (answerer.generate(mixed, max_new_tokens=4, batch_size=b) for b in (1, 4))
    assert one == four and answerer.encoder.prompt(Request("Q", two)).count("<image>") == 2
    with pytest.raises(ValueError, match="the texts name 1 image"):
        answerer.generate([Request("Only <image> of two", two)])


def test_one_answer_from_paths_files_and_messages(tmp_path):
    answerer = Answerer(*build())
    image = scene_image(0)
    image.save(tmp_path / "scene.png")
    question = "What is in the picture?"
    parts = [dict(role="user", content=[dict(type="image"), dict(type="text", text=question)])]
    wanted = answerer.answer(image, question, max_new_tokens=4)
    assert wanted == answerer.answer(str(tmp_path / "scene.png"), question, max_new_tokens=4)
    assert wanted == answerer.answer([tmp_path / "scene.png"], parts, max_new_tokens=4)
    assert wanted == answerer.answer(image, [dict(role="user", content=question)], max_new_tokens=4)
    assert answerer.answer(None, "Who?", max_new_tokens=4) == answerer.answer([], "Who?", max_new_tokens=4)
    assert parts[0]["content"][0] == dict(type="image")  # the caller's messages are as they were


# ---------------------------------------------------------------- likelihoods


class Force:
    "A logits processor that forces tokens, so that `generate` tells what it thought of them."

    def __init__(self, ids):
        self.ids, self.k = ids, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.k]] = 0
        self.k += 1
        return forced


@pytest.mark.parametrize("name", ["delta", "fastv", "llavolta", "quecc"])
def test_likelihood_is_that_of_the_tokens_one_after_the_other(name):
    "FastV too: what is dropped before an answer is dropped while it is scored."
    model, processor = build(name)
    answerer, request, answer = Answerer(model, processor), requests(2)[1], "a fox"
    (score,) = answerer.log_likelihoods([request], [answer])
    prompt_ids, answer_ids, _ = answerer.encoder.answer_ids(request, answer)
    inputs = answerer.encoder.image_inputs([request])
    out = model.generate(
        input_ids=torch.tensor([prompt_ids]),
        **inputs,
        max_new_tokens=len(answer_ids),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[Force(answer_ids)],
    )
    predictions = [logits[0].float().log_softmax(-1) for logits in out.logits]
    steps = [row[i].item() for row, i in zip(predictions, answer_ids, strict=True)]
    assert processor.tokenizer.decode(answer_ids).strip() == answer
    assert abs(score.log_likelihood - sum(steps)) < 1e-3 and score.n_tokens == len(answer_ids)


@pytest.mark.parametrize("name", ["delta", "fastv", "llavolta"])
def test_choices_of_unequal_number_and_length_score_as_alone(name):
    answerer = Answerer(*build(name))
    choices = [["A", "a fox and a key", "No"], ["Nothing"], ["left", "right"]]
    together = answerer.choice_log_likelihoods(requests(3), choices, batch_size=3)
    for request, answers, scores in zip(requests(3), choices, together, strict=True):
        alone = answerer.log_likelihoods([request] * len(answers), answers, batch_size=1)
        torch.testing.assert_close(log_likelihoods(scores), log_likelihoods(alone), atol=1e-3, rtol=1e-4)


def test_the_end_of_the_turn_is_scored_when_asked():
    "With it, the score is the training loss."
    model, processor = build()
    answerer, request = Answerer(model, processor), requests(1)[0]
    (without,) = answerer.log_likelihoods([request], ["a fox"])
    (score,) = answerer.log_likelihoods([request], ["a fox"], end_of_turn=True)
    turns = [*answerer.encoder.messages(request), dict(role="assistant", content="a fox")]
    row = processor.encode_conversation(turns)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        loss = model(ids, **answerer.encoder.image_inputs([request]), labels=labels).loss
    assert score.n_tokens == without.n_tokens + 1 == sum(label != -100 for label in row["labels"])
    assert abs(-score.log_likelihood / score.n_tokens - loss.item()) < 1e-4


def test_only_the_last_answer_of_a_conversation_is_scored():
    encoder = RequestEncoder(build()[1])
    turns = [dict(role="user", content="<image>\nWhat?"), dict(role="assistant", content="A fox.")]
    request = Request([*turns, dict(role="user", content="Where?")], [scene_image(0)])
    prompt_ids, answer_ids, labels = encoder.answer_ids(request, "left")
    assert prompt_ids == encoder.prompt_ids(request) and labels == answer_ids
    assert encoder.processor.tokenizer.decode(answer_ids).strip() == "left"


def test_a_token_merged_across_the_border_is_read_but_not_scored():
    short, long = EncodedAnswer([1, 2], [7, 8], [7, 8]), EncodedAnswer([1, 2, 3], [9], [9])
    wanted = [EncodedAnswer([1, 2], [7, 8], [7, 8]), EncodedAnswer([1, 2], [3, 9], [-100, 9])]
    assert shared_prompt([short, long]) == ([1, 2], wanted)


def prefer(model, logits):
    "Raises some logits at every position, in the LLM's own head."

    def raise_logits(module, args, output):
        output = output.clone()
        for token, value in logits.items():
            output[..., token] = value
        return output

    return model.get_output_embeddings().register_forward_hook(raise_logits)


def test_image_is_neither_generated_nor_the_greedy_token():
    "Where `<image>` is the most likely token, generation writes the second best, which is therefore greedy."
    model, processor = build(template="plain")
    a = processor.tokenizer.convert_tokens_to_ids("A")
    answerer, hook = Answerer(model, processor), prefer(model, {IMAGE: 200.0, a: 100.0})
    assert answerer.generate(requests(1), max_new_tokens=2) == ["AA"]
    scores = answerer.choice_log_likelihoods(requests(1), [["A", "B", "AA"]])[0]
    hook.remove()
    assert [score.is_greedy for score in scores] == [True, False, True]
    assert scores[0].log_likelihood == pytest.approx(-100)  # its probability still counts `<image>`


def test_the_llms_own_head_scores():
    "What the head adds to the logits counts in the likelihood."
    model, processor = build(template="plain")
    a = processor.tokenizer.convert_tokens_to_ids("A")
    answerer = Answerer(model, processor)
    (before,) = answerer.log_likelihoods(requests(1), ["A"])
    hook = prefer(model, {a: 100.0})
    (after,) = answerer.log_likelihoods(requests(1), ["A"])
    hook.remove()
    assert before.log_likelihood < -1 and after == AnswerScore(pytest.approx(0, abs=1e-6), True, 1)


# ---------------------------------------------------------------- what it refuses


def test_answers_that_cannot_be_scored_are_named():
    answerer = Answerer(*build())
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        answerer.log_likelihoods(requests(2), ["A"])
    with pytest.raises(ValueError, match=r"answers \[1\] are empty"):
        answerer.log_likelihoods(requests(2), ["A", " "])
    with pytest.raises(ValueError, match="never generates"):
        answerer.log_likelihoods(requests(1), ["<image>"])
    (written,) = answerer.generate(requests(1), max_new_tokens=4)
    cut = answerer.generate(requests(1), max_new_tokens=4, until=written[2:4])
    assert cut == [written[:2].strip()]  # `until` is one text, not its letters


def test_what_generation_refuses():
    model, processor = build()
    answerer = Answerer(model, processor)
    with pytest.raises(ValueError, match="give one of them"):
        Request("?", [scene_image(0)], visual_tokens=torch.zeros(1, 9, 64))
    with pytest.raises(ValueError, match=r"\['seed'\] are unknown"):
        answerer.generate(requests(1), seed=1)
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        answerer.generate(requests(1), batch_size=0)
    with pytest.raises(ValueError, match="tokens=4.*visual_tokens"):
        answerer.generate([Request("?", visual_tokens=torch.zeros(1, 9, 64))], tokens=4)
    with pytest.raises(ValueError, match="is not supported by this model's chat template"):
        plain = build_processor(processor.image_processor, byte_tokenizer(), 9, "plain")
        Answerer(model, plain, system_prompt="Be brief.")
    with pytest.raises(ValueError, match="call model.eval"):
        Answerer(model.train(), processor).generate(requests(1))
