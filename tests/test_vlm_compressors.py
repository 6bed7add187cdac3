"Every compressor inside the model: loss, generation, batches, saving."

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_vlm import IMAGE, TOWERS, byte_tokenizer, images, llm_config, projector_config
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaForCausalLM

from delta_llava.adapter import CLIPImageProcessorPil
from delta_llava.answerer import Answerer, Request
from delta_llava.collator import Collator
from delta_llava.compressors import fastv
from delta_llava.compressors.base import (
    COMPRESSORS,
    VARIANTS,
    compressor_class,
    compressor_config,
    compressor_name,
    remaining_tokens,
)
from delta_llava.gradcam import word_cams
from delta_llava.grid import VisionFeatures
from delta_llava.processor import build_processor
from delta_llava.tower import vision_features
from delta_llava.vlm import (
    DeltaLlavaConfig,
    DeltaLlavaForConditionalGeneration,
    load_projector,
    save_projector,
)

TOWER, SIZES = "clip_b32_384", projector_config("clip_b32_384")
every = pytest.mark.parametrize("name", [*COMPRESSORS, *VARIANTS])


def tiny(name, **options):
    "A model whose projector is `name`, at 9 tokens (the MLP has no choice but 144)."
    torch.manual_seed(0)
    config = compressor_config(name, SIZES, tokens=144 if name == "mlp" else 9, **options)
    return DeltaLlavaForConditionalGeneration(
        DeltaLlavaConfig(
            vision_config=TOWERS[TOWER][1](),
            text_config=llm_config(num_hidden_layers=4),
            compressor=compressor_name(compressor_class(name)(config)),
            projector=config.to_dict(),
            image_token_index=IMAGE,
        )
    ).eval()


def inputs(model, rows=((72, 105), (65, 66, 67, 68)), seed=1):
    "Prompts of unequal length, padded on the left, each with one image; a question where needed."
    v = model.config.image_seq_length
    ids = [[*row, *[IMAGE] * v, 63, 10] for row in rows]
    width = max(map(len, ids))
    batch = dict(
        input_ids=torch.tensor([[257] * (width - len(i)) + i for i in ids]),
        attention_mask=torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
        pixel_values=images(TOWER, len(rows), seed),
    )
    if "text" in model.multi_modal_projector.requires:
        questions = [[5, *row] for row in rows]
        q = max(map(len, questions))
        batch |= dict(
            question_ids=torch.tensor([[257] * (q - len(a)) + a for a in questions]),
            question_mask=torch.tensor([[0] * (q - len(a)) + [1] * len(a) for a in questions]),
        )
    return batch


@every
def test_loss_reaches_the_projector(name):
    model = tiny(name).train()
    batch = inputs(model)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and any(
        p.grad is not None and p.grad.any() for p in model.multi_modal_projector.parameters()
    )
    assert all(p.grad is None for p in model.vision_tower.parameters())


@every
def test_rows_of_a_batch_equal_rows_alone(name):
    model = tiny(name)
    batch = inputs(model)
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for i in range(2):
            real = batch["attention_mask"][i].bool()
            alone = {k: v[i : i + 1] for k, v in batch.items()} | {
                k: batch[k][i : i + 1, real] for k in ("input_ids", "attention_mask")
            }
            assert_close(model(**alone).logits[0, -1], together[i], atol=1e-5, rtol=1e-4)


@every
def test_generation_with_a_cache(name):
    model = tiny(name)
    batch = inputs(model)
    generated = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, batch["input_ids"].shape[1] + 5) or (generated[:, -1] == 257).any()
    assert generated.equal(model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))
    with torch.no_grad():
        first = model(**batch).logits[:, -1]
    first[:, IMAGE] = -torch.inf  # an image cannot be generated
    assert generated[:, batch["input_ids"].shape[1]].equal(first.argmax(-1))


@every
def test_saved_and_loaded(name, tmp_path):
    model = tiny(name)
    batch = inputs(model)
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(tmp_path / "model")
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_close(again(**batch).logits, logits, rtol=0, atol=1e-6)
    save_projector(model, tmp_path / "projector")
    loaded = load_projector(tmp_path / "projector")
    assert (
        type(loaded) is type(model.multi_modal_projector)
        and loaded.config == model.multi_modal_projector.config
    )
    other = tiny(name)
    for p in other.multi_modal_projector.parameters():
        torch.nn.init.zeros_(p)
    load_projector(tmp_path / "projector", other)
    with torch.no_grad():
        assert_close(other(**batch).logits, logits, rtol=0, atol=1e-6)


def test_the_question_changes_what_quecc_sees():
    model = tiny("quecc")
    batch = inputs(model)
    with torch.no_grad():
        before = model.get_image_features(
            **{k: batch[k] for k in ("pixel_values", "question_ids", "question_mask")}
        ).pooler_output[0]
        after = model.get_image_features(
            batch["pixel_values"],
            question_ids=batch["question_ids"].flip(0),
            question_mask=batch["question_mask"].flip(0),
        ).pooler_output[0]
    assert (before - after).abs().max() > 1e-4
    with pytest.raises(ValueError, match="give question_ids"):
        model(**{k: v for k, v in batch.items() if "question" not in k})


def test_fastv_drops_what_the_budget_says():
    model, layer_lengths = tiny("fastv"), []
    batch = inputs(model)
    hook = (
        model.get_decoder()
        .layers[3]
        .register_forward_pre_hook(lambda module, args: layer_lengths.append(args[0].shape[1]))
    )
    with torch.no_grad():
        for tokens in (144, 9, 1):
            model(**batch, tokens=tokens)
    hook.remove()
    rows = batch["input_ids"].shape[1]
    assert layer_lengths == [rows, rows - 135, rows - 143]
    features = vision_features(model.vision_tower, batch["pixel_values"], model.config.vision_feature_layer)
    ready = dict(mm_encoder_outputs={"image": model.get_image_features(vision_features=features)})
    words = {k: x for k, x in batch.items() if k != "pixel_values"}
    for given in (batch, words | dict(vision_features=features), words | ready):
        for tokens in (None, 9, 25, 1, 144):  # the first two are the config's
            out = model.generate(
                **given, tokens=tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
            )
            assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [rows + 1] * 2 + [
                rows + 1 - 144 + (tokens or 9)
            ] * 2


def test_prumerge_needs_a_block_more():
    config = compressor_config("prumerge", replace(SIZES, levels=(1, 2, 3, 12)), tokens=9)
    with pytest.raises(ValueError, match="PruMerge reads the attention of the block after level 12"):
        DeltaLlavaConfig(
            vision_config=TOWERS[TOWER][1](),
            text_config=llm_config(),
            compressor="prumerge",
            projector=config.to_dict(),
            image_token_index=IMAGE,
        )


def test_projector_that_reads_attention_needs_a_tower_that_has_it(tmp_path):
    save_projector(compressor_class("prumerge")(compressor_config("prumerge", SIZES, tokens=9)), tmp_path)
    model = tiny("delta")  # its tower ends at the highest level
    with pytest.raises(ValueError, match="reads the attention of the block after level 11"):
        load_projector(tmp_path, model)
    assert model.config.compressor == "delta"


def clear_maps(model, seed=0):
    "Weights so large that images differ in what the tower looks at, and answers in what the LLM says."
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in (model.vision_tower, model.language_model, model.multi_modal_projector):
            for weight in part.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.3)
    return model


def test_adaptive_counts_inside_the_model(tmp_path):
    "Each image has its own number of tokens, and each row its own number of placeholders."
    model = clear_maps(tiny("prumerge", adaptive=True))
    pixels = torch.cat([images(TOWER, 1, seed) for seed in range(3)])
    pixels[1, :, :192] = 0
    counts = model.visual_token_counts(pixels)
    assert len(set(counts)) > 1
    assert [len(x) for x in model.get_image_features(pixels).pooler_output] == counts
    processor = build_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384),
        byte_tokenizer(),
        tokens=9,
        template="v1",
    )
    pictures = [Image.new("RGB", (8, 8))] * 3
    rows = ["<image> a <image> b", "c<image>"]
    batch = processor(pictures, rows, tokens=counts)
    placeholders = (batch["input_ids"] == IMAGE).sum(1).tolist()
    assert placeholders == [counts[0] + counts[1], counts[2]]
    batch["pixel_values"] = pixels
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row, own in enumerate([slice(0, 2), slice(2, 3)]):
            alone = processor(pictures[own], rows[row], tokens=counts[own])
            alone["pixel_values"] = pixels[own]
            assert_close(model(**alone).logits[0, -1], together[row], atol=1e-3, rtol=1e-3)
    settings = dict(max_new_tokens=4, do_sample=False)
    answer = model.generate(**batch, **settings)
    assert answer.equal(model.generate(**batch, **settings, use_cache=False))
    loss = model.train()(
        **batch, labels=torch.where(batch["input_ids"] == IMAGE, -100, batch["input_ids"])
    ).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None for p in model.multi_modal_projector.parameters())
    model.save_pretrained(tmp_path)
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.visual_token_counts(pixels) == counts
    with pytest.raises(ValueError, match=r"visual_token_counts\(pixel_values\)"):
        again(**processor(pictures, rows, tokens=counts[::-1]) | dict(pixel_values=pixels))
    fixed = processor(pictures, rows, tokens=9) | dict(pixel_values=pixels)
    assert again(**fixed, tokens=9).image_hidden_states.shape == (27, 64)


def test_counts_of_the_processor_are_one_for_each_image():
    processor = build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=9, template="v1")
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"tokens=\[1, 2\] .* 1 image"):
        processor(picture, "<image>", tokens=[1, 2])
    with pytest.raises(ValueError, match="positive int"):
        processor(picture, "<image>", tokens=[0])


@pytest.mark.parametrize(
    "settings",
    [
        dict(prompt_lookup_num_tokens=3),
        dict(assistant_model="text"),
        dict(assistant_model="itself"),
        dict(assistant_model="delta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["fastv", "llavolta"])
def test_a_reduction_checks_drafts_as_it_generates(name, settings, padded):
    model = clear_maps(tiny(name))
    v = model.config.image_seq_length
    ids = torch.tensor([[*[257] * 2 * padded, 72, 105, 63, 10, *[IMAGE] * v, 63, 10, 72, 105, 63, 10]])
    batch = dict(input_ids=ids, attention_mask=(ids != 257).long(), pixel_values=images(TOWER, 1))
    greedy = dict(max_new_tokens=12, do_sample=False)
    passes = []
    hook = model.get_decoder().register_forward_hook(lambda m, args, out: passes.append(out[0].shape[1]))
    want = model.generate(**batch, **greedy)
    prompt, step = passes[0], max(passes[1:])
    hook.remove()
    if draft := settings.get("assistant_model"):
        drafts = {
            "text": lambda: LlamaForCausalLM(llm_config()).eval(),
            "itself": lambda: clear_maps(tiny(name)),
        }
        settings = dict(assistant_model=drafts.get(draft, lambda: tiny("delta"))())
        if draft == "delta":
            with pytest.raises(ValueError, match="placeholders"):  # another number of them
                model.generate(**batch, **greedy, **settings)
            return
    passes.clear()
    model.get_decoder().register_forward_hook(lambda m, args, out: passes.append(out[0].shape[1]))
    assert want.equal(model.generate(**batch, **greedy, **settings))
    assert passes[0] > prompt or max(passes[1:]) > step  # drafts were checked
    if draft == "itself":  # the same model: all that it proposes is accepted
        assert len(passes) < 8
    assert passes[0] < prompt + 12 < ids.shape[1]  # image tokens were dropped


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m.generate(**b, prefill_chunk_size=16), "prefill_chunk_size=16: FastV"),
        (lambda m, b: m.generate(**b, assistant_early_exit=1), "assistant_early_exit=1: FastV"),
        (
            lambda m, b: m.generate(**b, generation_config=GenerationConfig(prefill_chunk_size=16)),
            "prefill_chunk_size=16: FastV",
        ),
        (lambda m, b: m(inputs_embeds=torch.zeros(1, 150, 64)), "inputs_embeds do not tell FastV"),
        (lambda m, b: m.generate(inputs_embeds=torch.zeros(1, 150, 64)), "inputs_embeds do not tell FastV"),
    ],
)
@pytest.mark.parametrize("name", ["fastv", "llavolta"])
def test_what_a_reduction_inside_the_llm_refuses(name, call, message):
    model = tiny(name)
    with pytest.raises(
        ValueError, match=message.replace("FastV", type(model.multi_modal_projector).__name__)
    ):
        call(model, inputs(model, rows=((72, 105),)))


@pytest.mark.parametrize("name", ["fastv", "llavolta"])
def test_a_reduction_finds_the_images_in_embeddings(name):
    model = clear_maps(tiny(name))
    batch = inputs(model)
    greedy = dict(max_new_tokens=5, do_sample=False)
    want, logits = model.generate(**batch, **greedy), model(**batch).logits
    length = batch["input_ids"].shape[1]
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_close(model(**batch).logits, logits, atol=1e-4, rtol=1e-4)
    assert want[:, length:].equal(model.generate(**batch, **greedy))


def test_a_variant_is_what_its_name_says():
    full = compressor_config("delta", SIZES, tokens=9)
    with pytest.raises(ValueError, match="its config says {'mixing': 'full'}"):
        DeltaLlavaConfig(
            vision_config=TOWERS[TOWER][1](),
            text_config=llm_config(),
            compressor="delta-no-emhsa",
            projector=full.to_dict(),
            image_token_index=IMAGE,
        )


def test_every_image_gets_its_own_question():
    "Two images in the first row, none in the second."
    processor = build_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384),
        byte_tokenizer(),
        tokens=9,
        template="v1",
        questions=True,
    )
    image = Image.new("RGB", (8, 8))
    batch = processor([image, image], ["<image> <image> a", "b"], questions=["What?", "Nothing."])
    assert batch["question_ids"].shape[0] == 2 and batch["question_ids"][0].equal(batch["question_ids"][1])

    def turns(question):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]

    collate = Collator(processor=processor, features=torch.randn(1, 144, 512), paths=["p"])
    batch = collate(
        [
            dict(id="0", image="p", conversations=turns("<image>\nWhat?")),
            dict(id="1", image=None, conversations=turns("And?")),
        ]
    )
    assert batch["question_ids"].shape[0] == len(batch["vision_features"]) == 1


@pytest.mark.parametrize("name", ["mqt", "qwen", "prumerge"])
def test_tokens_without_a_place_get_no_map(name):
    with pytest.raises(ValueError, match="have no position in the image"):
        word_cams(tiny(name), None, Image.new("RGB", (8, 8)), "What?")


@every
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(name):
    model = tiny(name).eval()  # in training mode DropPath would draw
    processor = build_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384),
        byte_tokenizer(),
        tokens=model.config.image_seq_length,
        template="v1",
        questions="text" in model.multi_modal_projector.requires,
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id

    def say(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = [
        dict(id="long", image=None, conversations=say("Hm? " * 200, "Well. " * 100)),
        dict(id="a", image="a", conversations=say("<image>\nWhat is it?", "A cat")),
        dict(id="text", image=None, conversations=say("Why?", "So.")),
        dict(
            id="b",
            image="b",
            conversations=say("<image>\nAnd this one, what may it be?", "Two dogs and a bird"),
        ),
    ]
    width = len(SIZES.levels) * SIZES.d_vision
    images = dict(
        features=torch.randn(2, 144, width, generator=torch.Generator().manual_seed(0)), paths=["a", "b"]
    )
    if "attention" in model.multi_modal_projector.requires:
        g = torch.Generator().manual_seed(1)
        images["features"] = [
            VisionFeatures(
                f[None], 12, torch.rand(1, 144, generator=g), torch.randn(1, 144, SIZES.d_vision, generator=g)
            )
            for f in images["features"]
        ]
    if "level_attention" in model.multi_modal_projector.requires:
        g = torch.Generator().manual_seed(1)
        images["features"] = [
            VisionFeatures(f[None], 12, level_attention=torch.rand(1, 144, generator=g))
            for f in images["features"]
        ]
    if count := remaining_tokens(model.multi_modal_projector):
        left = torch.randn(2, 1, count, SIZES.d_vision, generator=torch.Generator().manual_seed(0))
        images["features"] = [VisionFeatures(f, 12, on_grid=False) for f in left]
    found = {}
    for packing in (False, True):
        if packing and "decoder" in model.multi_modal_projector.requires:
            break
        batch = Collator(processor=processor, packing=packing, **images)(rows)
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        found[packing] = (
            len(batch["input_ids"]),
            out.loss,
            torch.cat(
                [p.grad.flatten() for p in model.multi_modal_projector.parameters() if p.grad is not None]
            ),
        )
    if "decoder" in model.multi_modal_projector.requires:
        with pytest.raises(ValueError, match="packing=False"):
            Collator(
                processor=build_processor(
                    processor.image_processor, byte_tokenizer(), 9, "v1", placeholders=144
                ),
                packing=True,
            )
        return
    assert (found[False][0], found[True][0]) == (4, 2)
    assert_close(found[True][1], found[False][1], rtol=1e-5, atol=1e-6)
    assert_close(found[True][2], found[False][2], rtol=1e-3, atol=1e-6)


@every
def test_no_image_still_gives_finite_visual_tokens_and_gradients(name):
    model = tiny(name).train()
    tokens = model.dummy_visual_tokens()
    tokens.sum().backward()
    assert tokens.isfinite().all() and tokens.shape[0] == 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.multi_modal_projector.parameters())


# ---- FastV ranks at the end of the prompt
def with_answer(batch, answer):
    "Prompt and answer in one pass, the answer supervised."
    rows, length = batch["input_ids"].shape
    tail = torch.tensor([answer]).expand(rows, -1)
    ids = torch.cat([batch["input_ids"], tail], dim=1)
    labels = torch.cat([torch.full((rows, length), -100), tail], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tail)], dim=1)
    return batch | dict(input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("training", [False, True])
def test_the_answer_does_not_change_what_fastv_keeps(training, monkeypatch):
    model = tiny("fastv")
    batch = inputs(model)
    length = batch["input_ids"].shape[1]
    select = fastv.select_tokens
    kept = []

    def record(*args):
        index, shown = select(*args)
        kept.append([[i for i in row if i < length] for row in index.tolist()])
        return index, shown

    monkeypatch.setattr(fastv, "select_tokens", record)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    model.train(training)
    for answer in ([33], [40, 41, 42], [50, 51, 52, 53, 54]):
        model(**with_answer(batch, answer))
    second_turn = with_answer(with_answer(batch, [33, 34]), [40, 41])  # labels of the second answer only
    second_turn["labels"][:, length : length + 2] = second_turn["input_ids"][:, length : length + 2]
    model(**second_turn)
    assert len(kept) == 5 and all(choice == kept[0] for choice in kept)
    batch |= dict(prompt_end=torch.full((2,), length - 1))
    with torch.no_grad():
        without_labels = {k: v for k, v in with_answer(batch, [33]).items() if k != "labels"}
        model.eval()(**without_labels)
    assert kept[-1] == kept[0]


@pytest.mark.parametrize("name", ["fastv", "llavolta"])
def test_a_reduction_scores_an_answer_as_it_generates_it(name):
    model = tiny(name)
    batch = inputs(model)
    length = batch["input_ids"].shape[1]
    greedy = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    made = model.generate(**batch, **greedy, output_logits=True, return_dict_in_generate=True)
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        one = {k: v[row : row + 1] for k, v in batch.items()}
        one |= {k: one[k][:, real] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(**with_answer(one, made.sequences[row, length:].tolist()))
        for step in range(4):
            assert_close(out.logits[0, real.sum() - 1 + step], made.logits[step][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fastv", "llavolta"])
def test_a_reduction_with_beams_and_samples(name):
    model = tiny(name)
    batch = inputs(model)
    for options in (dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)):
        made = model.generate(**batch, max_new_tokens=4, **options)
        assert len(made) == 2 * options["num_return_sequences"]


def test_answerer_gives_each_image_its_own_number_of_tokens():
    "Requests of one batch, generated and scored, as each alone; a fixed budget is still possible."
    model = clear_maps(tiny("prumerge", adaptive=True)).eval()
    processor = build_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384),
        byte_tokenizer(),
        tokens=9,
        template="v1",
    )
    pictures = [
        Image.linear_gradient("L").convert("RGB"),
        Image.new("RGB", (384, 384)),
        Image.effect_noise((384, 384), 90).convert("RGB"),
    ]
    answerer = Answerer(model, processor)
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert len(set(model.visual_token_counts(pixels))) > 1
    requests = [Request("a?", [picture]) for picture in pictures]
    together = answerer.generate_ids(requests, max_new_tokens=3)
    alone = [answerer.generate_ids([request], max_new_tokens=3)[0] for request in requests]
    assert together == alone
    scores = answerer.log_likelihoods(requests, ["x", "yes", "z"])
    for request, answer, score in zip(requests, ["x", "yes", "z"], scores, strict=True):
        (own,) = answerer.log_likelihoods([request], [answer])
        assert score.log_likelihood == pytest.approx(own.log_likelihood, abs=1e-3)
    two = Request("a?", pictures[:2])
    assert (
        answerer.generate_ids([two], max_new_tokens=2)
        == answerer.generate_ids([two, two], max_new_tokens=2)[:1]
    )
    assert answerer.generate_ids(requests, tokens=9, max_new_tokens=2) is not None
