"The model as a transformers model: every tower, saving, resuming, generating, and what it refuses."

import copy
import dataclasses
import json
import logging
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import (
    IMAGE,
    TOWERS,
    byte_tokenizer,
    images,
    llm_config,
    projector_config,
    prompt,
    tiny,
    vlm_config,
)
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from delta_llava.adapter import add_adapters, cache_argument, is_lora_layer
from delta_llava.assets import load_llm
from delta_llava.config import ProjectorConfig, dinov2_s14
from delta_llava.processor import build_processor
from delta_llava.projector import DeltaProjector
from delta_llava.tower import image_processor_for, load_tower, vision_features
from delta_llava.vlm import (
    DeltaLlavaConfig,
    DeltaLlavaForConditionalGeneration,
    add_image_token,
    build_vlm,
    load_projector,
    save_projector,
    tower_fingerprint,
)

GREEDY = dict(max_new_tokens=6, do_sample=False)


def spoken(seed=0):
    "A model with large weights, whose answers vary with image and prompt."
    model = tiny(seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in (model.language_model, model.multi_modal_projector):
            for weight in part.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.3)
    return model


def projector_of(model):
    return model.multi_modal_projector


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


# towers and presets


@pytest.mark.parametrize("name", TOWERS)
def test_pixels_to_logits_at_every_preset(name):
    model, cfg = tiny(name), projector_config(name)
    assert model.config.vision_config.num_hidden_layers == max(cfg.levels)  # nothing above is computed
    features = vision_features(model.vision_tower, images(name), cfg.levels)
    assert features.grid == cfg.grid and features.levels.shape == (1, cfg.grid**2, len(cfg.levels) * 128)
    for tokens in {cfg.tokens, 4, 1}:
        ids = prompt(tokens)
        out = model(ids, vision_features=features.levels, tokens=tokens)
        assert out.logits.shape == (1, ids.shape[1], 264) and out.logits.isfinite().all()
    whole = model(prompt(cfg.tokens), images(name)).logits  # the preset's own budget, from the pixels
    assert_close(whole, model(prompt(cfg.tokens), vision_features=features.levels, tokens=cfg.tokens).logits)


@pytest.mark.parametrize("tokens", [144, 36, 16, 9, 4, 1])
def test_budgets_of_vit_b32_at_384(tokens):
    model = tiny("clip_b32_384")
    out = model(prompt(tokens), images("clip_b32_384"), tokens=tokens)
    assert out.image_hidden_states.shape == (tokens, 64)
    assert not torch.equal(
        out.logits, model(prompt(tokens), images("clip_b32_384", seed=2), tokens=tokens).logits
    )  # the image matters


@pytest.mark.parametrize("name", ["clip_b32_224", "siglip_so400m_384", "dinov2_s14"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_reloaded_is_equal(name, tied, tmp_path):
    model = tiny(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is DeltaLlavaForConditionalGeneration and same_weights(model, again)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    features = torch.randn(1, projector_config(name).grid ** 2, 4 * 128)
    assert_close(
        again(prompt(16), vision_features=features, tokens=16).logits,
        model(prompt(16), vision_features=features, tokens=16).logits,
        rtol=0,
        atol=0,
    )
    assert not any(p.requires_grad for p in again.vision_tower.parameters())


def test_auto_classes(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeltaLlavaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is DeltaLlavaForConditionalGeneration
    for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        assert type(kind.from_config(model.config)) is DeltaLlavaForConditionalGeneration
        assert type(kind.from_pretrained(tmp_path)) is DeltaLlavaForConditionalGeneration


def test_the_default_config_is_the_papers():
    config = DeltaLlavaConfig()
    assert (
        config.vision_feature_layer == [12, 16, 22, 23]
        and config.image_seq_length == 144
        and config.vision_config.num_hidden_layers == 23
    )
    assert DeltaLlavaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_the_projector_starts_as_it_does_alone():
    torch.manual_seed(0)
    alone = dict(DeltaProjector(projector_config()).named_parameters())
    for name, p in projector_of(tiny()).named_parameters():
        if p.numel() > 500:
            assert_close(
                p.std(),
                alone[name].std(),
                rtol=0.1,
                atol=1e-6,
                msg=f"{name}: {p.std():.4f}, alone {alone[name].std():.4f}",
            )


# the two ways to lose weights


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = prompt(4)[0]
        ids[-1] = 65 + i
        return dict(
            input_ids=ids, labels=torch.where(ids == IMAGE, -100, ids), pixel_values=images(seed=i)[0]
        )


def train(folder, resume=None, steps=4):
    torch.manual_seed(0)
    model = tiny(projector=projector_config(tokens=4))
    args = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
        logging_steps=1,
    )
    trainer = Trainer(model, args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole").model
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2")).model
    start = tiny(projector=projector_config(tokens=4))
    assert same_weights(whole, resumed)
    assert not same_weights(whole.multi_modal_projector, start.multi_modal_projector)
    assert same_weights(whole.vision_tower, start.vision_tower)


@pytest.mark.parametrize("original", [True, False])
def test_llava_checkpoint_brings_tower_and_llm(original, tmp_path):
    torch.manual_seed(3)
    ours = vlm_config()
    llava_hf = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=TOWERS["clip_b32_224"][1](), text_config=llm_config(), image_token_index=IMAGE
        )
    )
    llava_hf.save_pretrained(tmp_path, save_original_format=original)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, config=ours)
    assert same_weights(model.get_decoder(), llava_hf.model.language_model)
    assert torch.equal(model.get_output_embeddings().weight, llava_hf.lm_head.weight)
    tower = llava_hf.model.vision_tower.state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in model.vision_tower.state_dict().items())
    for name, p in projector_of(model).named_parameters():  # fresh, and not what the memory held
        assert p.isfinite().all() and p.abs().max() < 5, name
        if name.endswith("norm.weight"):
            assert (p == 1).all()
    assert model(prompt(16), images(), tokens=16).logits.isfinite().all()


@pytest.mark.parametrize(
    "key",
    [
        "multi_modal_projector.q.U",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "every projector weight",
    ],
)
def test_missing_weights_are_an_error(key, tmp_path):
    tiny().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = [k for k in state if "multi_modal_projector" in k] if key.startswith("every") else [key]
    save_file(
        {k: v for k, v in state.items() if k not in gone},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=f"{len(gone)} missing weights"):
        DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_truncated_file_of_the_model_is_named(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged .*fetch it again"):
        DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_unknown_projector_weights_are_an_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        state | {"multi_modal_projector.extra": torch.zeros(1)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="1 unexpected weights"):
        DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)


# seeing


def test_visual_tokens_take_their_places():
    model, captured = tiny(), []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: captured.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    ids = torch.cat([prompt(4), prompt(4, before=(80, 81))])
    pixels = images(n=2)
    model(ids, pixels, tokens=4)
    hook.remove()
    expected = model.get_input_embeddings()(ids)
    expected[:, 2:6] = projector_of(model)(
        vision_features(model.vision_tower, pixels, projector_config().levels), tokens=4
    )
    assert_close(captured[0], expected)


def test_two_images_in_one_row_and_none_in_the_next():
    model = tiny()
    two, pixels = prompt(4, images=2), images(n=2)
    none = torch.full_like(two, 70)
    out = model(torch.cat([two, none]), pixels, tokens=4).logits
    assert_close(out[:1], model(two, pixels, tokens=4).logits)
    assert_close(out[1:], model(none).logits)
    swapped = model(two, pixels.flip(0), tokens=4).logits
    assert not torch.allclose(swapped, out[:1])


@pytest.mark.parametrize(
    "ids,n,tokens",
    [
        (prompt(9), 1, 16),
        (prompt(16), 1, 4),
        (prompt(4), 0, 4),
        (prompt(4), 2, 4),
        (torch.tensor([[IMAGE] * 2 + [65] * 4, [IMAGE] * 6]), 2, 4),
    ],
)
def test_wrong_number_of_placeholders(ids, n, tokens):
    with pytest.raises(ValueError, match="same tokens"):
        tiny()(ids, images(n=n) if n else None, tokens=tokens)


def test_impossible_budget_and_wrong_features():
    with pytest.raises(ValueError, match="50"):
        tiny()(prompt(50), images(), tokens=50)
    with pytest.raises(ValueError):
        tiny()(prompt(4), vision_features=torch.zeros(1, 49, 4 * 96), tokens=4)
    with pytest.raises(ValueError, match="either"):
        tiny()(prompt(4), images(), vision_features=torch.zeros(1, 49, 4 * 128), tokens=4)


def test_the_tower_never_trains():
    model = tiny().train()
    tower = model.vision_tower
    assert model.training and projector_of(model).training and not any(m.training for m in tower.modules())
    model(prompt(4), images().requires_grad_(), tokens=4, labels=prompt(4)).loss.backward()
    assert all(p.grad is None for p in tower.parameters())
    without_grad = {n for n, p in projector_of(model).named_parameters() if p.grad is None}
    assert not without_grad


def test_mixed_precision_of_parts():
    model = tiny().to(torch.bfloat16)
    features = vision_features(tiny().vision_tower, images(), projector_config().levels)  # cached in float32
    assert model(prompt(4), vision_features=features.levels, tokens=4).logits.dtype == torch.bfloat16


# the loss


@pytest.mark.parametrize("num_items", [None, 7])
def test_loss_at_labels_equals_the_plain_loss(num_items):
    model = tiny(projector=projector_config(drop_path=0.0))
    ids = torch.cat([prompt(4), prompt(4, before=(80, 81))])
    labels = torch.where(ids == IMAGE, -100, ids)
    labels[0, :-1] = -100
    kwargs = {} if num_items is None else dict(num_items_in_batch=torch.tensor(num_items))
    grads, losses = [], []
    for training in (True, False):
        model.zero_grad()
        out = model.train(training)(ids, images(n=2), tokens=4, labels=labels, **kwargs)
        out.loss.backward()
        losses.append(out.loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert (out.logits is None) == training
    assert_close(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)


def test_logits_only_where_there_are_labels():
    model, rows = tiny().train(), []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda m, args: rows.append(args[0].shape[:-1].numel())
    )
    labels = torch.full_like(prompt(16), -100)
    labels[:, -2:] = 65
    model(prompt(16), images(), tokens=16, labels=labels)
    assert rows == [2]


@pytest.mark.parametrize(
    "keep,kept", [(1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 5]), [0, 5])]
)
def test_logits_only_where_they_are_kept(keep, kept):
    model = tiny()
    whole = model(prompt(4), images(), tokens=4).logits
    assert_close(model(prompt(4), images(), tokens=4, logits_to_keep=keep).logits, whole[:, kept])


def test_nothing_supervised_is_an_error():
    with pytest.raises(ValueError, match="supervise nothing"):
        tiny().train()(prompt(4), images(), tokens=4, labels=torch.full_like(prompt(4), -100))


# generating


@pytest.mark.parametrize("tokens", [16, 4, 1])
def test_generate_with_cache_without_and_from_features(tokens):
    model, ids = tiny(), prompt(tokens)
    kwargs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), tokens=tokens, **GREEDY)
    words = model.generate(pixel_values=images(), **kwargs)
    features = vision_features(model.vision_tower, images(), projector_config().levels).levels
    assert words.shape[1] > ids.shape[1]
    assert torch.equal(words, model.generate(pixel_values=images(), use_cache=False, **kwargs))
    assert torch.equal(words, model.generate(vision_features=features, **kwargs))
    assert torch.equal(words, model.generate(vision_features=features, use_cache=False, **kwargs))
    logits = model(words, images(), tokens=tokens).logits  # what greedy means, computed plainly
    logits[..., IMAGE] = -torch.inf
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(-1), words[:, ids.shape[1] :])


def test_beams_with_two_images_in_a_row():
    model, ids = tiny(), prompt(4, images=2)
    kwargs = dict(attention_mask=torch.ones_like(ids), num_beams=3, tokens=4, **GREEDY)
    words = model.generate(ids, pixel_values=images(n=2), **kwargs)
    assert torch.equal(words, model.generate(ids, pixel_values=images(n=2), use_cache=False, **kwargs))


def loves_images(model):
    model.get_decoder().norm.register_forward_hook(lambda m, args, out: out.abs())
    with torch.no_grad():
        model.get_output_embeddings().weight[IMAGE] = 10
    return model


@pytest.mark.parametrize(
    "own", [None, GenerationConfig(**GREEDY), GenerationConfig(suppress_tokens=[65], **GREEDY)]
)
def test_generate_never_writes_image(own):
    model = loves_images(tiny())
    assert model(prompt(4), images(), tokens=4).logits[0, -1].argmax() == IMAGE
    words = model.generate(
        prompt(4),
        generation_config=own,
        pixel_values=images(),
        tokens=4,
        attention_mask=torch.ones_like(prompt(4)),
        **({} if own else GREEDY),
    )
    assert IMAGE not in words[0, prompt(4).shape[1] :]


def test_the_callers_suppressed_tokens_stay_suppressed():
    model = tiny()
    first = model.generate(prompt(4), pixel_values=images(), tokens=4, **GREEDY)[0, prompt(4).shape[1]].item()
    other = model.generate(prompt(4), pixel_values=images(), tokens=4, suppress_tokens=[first], **GREEDY)[
        0, prompt(4).shape[1]
    ].item()
    assert other != first


# building


def parts(name="clip_b32_224", **kwargs):
    torch.manual_seed(5)
    return AutoModel.from_config(TOWERS[name][1]()), LlamaForCausalLM(llm_config(**kwargs))


@pytest.mark.parametrize("name", ["clip_b32_224", "siglip_so400m_384", "dinov2_s14"])
def test_build_vlm_keeps_the_parts(name, tmp_path):
    tower, llm = parts(name)
    whole = {k: v.clone() for k, v in tower.state_dict().items()}
    model = build_vlm(tower, llm, byte_tokenizer(), projector_config(name))
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert model.get_input_embeddings().weight is llm.get_input_embeddings().weight  # no second copy
    assert all(torch.equal(v, whole[k]) for k, v in model.vision_tower.state_dict().items())
    assert model.config.vision_config.num_hidden_layers == max(projector_config(name).levels)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert same_weights(again, model) and not any(p.requires_grad for p in again.vision_tower.parameters())
    assert again.generation_config.suppress_tokens == [IMAGE]


def test_siglip_loses_its_pooling_head():
    tower, llm = parts("siglip_so400m_384")
    assert any("head" in k for k in tower.state_dict())
    model = build_vlm(tower, llm, byte_tokenizer(), projector_config("siglip_so400m_384"))
    assert not any("head" in k for k in model.vision_tower.state_dict())


def test_cut_tower_sees_what_the_whole_tower_sees():
    tower, llm = parts()
    whole = vision_features(tower.eval(), images(), projector_config().levels).levels
    model = build_vlm(tower, llm, byte_tokenizer(), projector_config())
    assert_close(vision_features(model.vision_tower, images(), projector_config().levels).levels, whole)


@pytest.mark.parametrize(
    "vocab,tied,rows", [(264, False, 264), (258, False, 260), (258, True, 260), (260, True, 260)]
)
def test_the_table_grows_only_if_it_must(vocab, tied, rows):
    tower, llm = parts(vocab_size=vocab, tie_word_embeddings=tied)
    before = llm.get_input_embeddings().weight.detach().clone()
    tokenizer = byte_tokenizer(pieces=("<|im_start|>",))
    model = build_vlm(tower, llm, tokenizer, projector_config())
    table = model.get_input_embeddings().weight
    assert (
        tokenizer.convert_tokens_to_ids("<image>")
        == model.config.image_token_id
        == add_image_token(tokenizer)
        == 259
    )
    assert (
        table.shape[0]
        == model.get_output_embeddings().weight.shape[0]
        == rows
        == model.config.text_config.vocab_size
    )
    assert (model.get_output_embeddings().weight is table) == tied
    assert torch.equal(table[: min(vocab, 258)], before[:258])
    assert "<|im_start|>" in tokenizer.all_special_tokens  # still there


@pytest.mark.slow
def test_real_parts_keep_their_knowledge(tmp_path):
    "The LLM inside the model answers as it does alone, with an image or without."
    cfg = dinov2_s14()
    llm, tokenizer = load_llm()
    model = build_vlm(load_tower(None, cfg.levels), llm, tokenizer, cfg).eval()
    processor = build_processor(
        image_processor_for(image_size=168), tokenizer, tokens=cfg.tokens, template="chatml"
    )

    def answer(model, prompt, images=None, **kwargs):
        batch = processor(images, prompt, **kwargs)
        return tokenizer.decode(
            model.generate(**batch, max_new_tokens=12, do_sample=False, **kwargs)[
                0, batch.input_ids.shape[1] :
            ]
        )

    def prompt_for(text):
        return processor.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True)

    assert answer(model, "The capital of France is").startswith(" Paris.")
    assert (
        answer(model, prompt_for("What is the capital of France?"))
        == "The capital of France is Paris.<|im_end|>"
    )
    image_prompt = prompt_for("<image>\nWhat is the capital of France?")
    photo = Image.linear_gradient("L")
    answer_text = answer(model, image_prompt, photo, tokens=4)
    assert answer_text.endswith("Paris.<|im_end|>")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert same_weights(again, model)
    assert answer(again, image_prompt, photo, tokens=4) == answer_text


def test_parts_that_do_not_fit():
    tower, llm = parts()
    for change, way_out in [
        (dict(d_vision=256), "set d_vision=128"),
        (dict(d_llm=128), "set d_llm=64"),
        (dict(levels=(2, 16)), "relative_levels"),
    ]:
        with pytest.raises(ValueError, match=way_out):
            build_vlm(tower, llm, byte_tokenizer(), dataclasses.replace(projector_config(), **change))


# the projector alone


def test_projector_alone_there_and_back(tmp_path):
    model, other = tiny(), tiny(seed=9)
    save_projector(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["projector.json", "projector.safetensors"]
    assert same_weights(load_projector(tmp_path), projector_of(model))
    other.vision_tower = model.vision_tower
    other.language_model = model.language_model
    load_projector(tmp_path, other)
    assert_close(
        other(prompt(4), images(), tokens=4).logits,
        model(prompt(4), images(), tokens=4).logits,
        rtol=0,
        atol=0,
    )


def test_statistics_travel_with_the_projector(tmp_path):
    cfg = projector_config("dinov2_s14")
    assert cfg.standardize
    model = tiny("dinov2_s14")
    projector_of(model).fit_statistics(
        vision_features(model.vision_tower, images("dinov2_s14", n=2), cfg.levels).levels
    )
    save_projector(projector_of(model), tmp_path)
    assert_close(load_projector(tmp_path).feature_std, projector_of(model).feature_std, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "whole")
    assert_close(
        projector_of(DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")).feature_mean,
        projector_of(model).feature_mean,
    )


def test_another_default_budget_is_taken_over(tmp_path):
    save_projector(DeltaProjector(projector_config(tokens=4)), tmp_path)
    model = tiny()
    load_projector(tmp_path, model)
    assert (
        model.config.image_seq_length == 4 and ProjectorConfig.from_dict(model.config.projector).tokens == 4
    )
    assert model(prompt(4), images()).logits.isfinite().all()


@pytest.mark.parametrize(
    "change,what",
    [
        (lambda s: s.pop("q.U"), "lacks 1 weights, e.g. 'q.U'"),
        (lambda s: s.update(more=torch.zeros(1)), "has unknown 1 weights"),
        (lambda s: s.update({"q.U": torch.zeros(2, 2)}), "wrong shapes for 1 weights, e.g. 'q.U'"),
    ],
)
def test_projector_file_with_wrong_weights(change, what, tmp_path):
    save_projector(tiny(), tmp_path)
    state = load_file(tmp_path / "projector.safetensors")
    change(state)
    save_file(state, tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match=what):
        load_projector(tmp_path)


@pytest.mark.parametrize(
    "change,what",
    [
        (dict(grid=12), "grid: projector 12, model 7"),
        (dict(levels=(4, 6, 8, 10)), "levels"),
        (dict(d_llm=128), "d_llm: projector 128, model 64"),
        (dict(d_vision=256), "d_vision: projector 256, model 128"),
    ],
)
def test_projector_of_other_sizes(change, what, tmp_path):
    save_projector(DeltaProjector(projector_config(**change)), tmp_path)
    model = tiny()
    before = copy.deepcopy(projector_of(model).state_dict())
    with pytest.raises(ValueError, match=what):
        load_projector(tmp_path, model)
    assert all(
        torch.equal(v, before[k]) for k, v in projector_of(model).state_dict().items()
    )  # left as it was


def test_projector_of_another_kind_of_tower(tmp_path):
    save_projector(tiny(), tmp_path)
    about = json.loads((tmp_path / "projector.json").read_text())
    about["tower"]["model_type"] = "siglip_vision_model"
    (tmp_path / "projector.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match="model_type: projector siglip_vision_model, model clip_vision_model"
    ):
        load_projector(tmp_path, tiny())


def test_projector_of_a_tower_with_other_weights(tmp_path):
    "Other weights are an error unless it is forced; another precision is not."
    model, other = tiny(), tiny(seed=9)
    save_projector(model, tmp_path)
    with pytest.raises(ValueError, match="a vision tower with other weights.*force=True"):
        load_projector(tmp_path, other)
    load_projector(tmp_path, other, force=True)
    assert same_weights(projector_of(other), projector_of(model))
    for dtype in (torch.bfloat16, torch.float16):
        load_projector(tmp_path, tiny().to(dtype))
    shorter = tiny(projector=projector_config(levels=(1, 2, 3, 4)))  # fewer blocks of the same tower
    save_projector(shorter, tmp_path / "short")
    known = json.loads((tmp_path / "short" / "projector.json").read_text())["tower"]["fingerprint"]
    assert len(known) < len(json.loads((tmp_path / "projector.json").read_text())["tower"]["fingerprint"])
    about = json.loads((tmp_path / "projector.json").read_text())
    del about["tower"]["fingerprint"]  # as earlier versions wrote it
    (tmp_path / "projector.json").write_text(json.dumps(about))
    load_projector(tmp_path, tiny(seed=9))


def test_the_fingerprint_of_a_tower_that_is_spread_over_processes(tmp_path):
    model = build_vlm(*parts(), byte_tokenizer(), projector_config())
    whole = tower_fingerprint(model.vision_tower)
    torch.nn.init.zeros_(model.vision_tower.embeddings.position_embedding.weight)  # like a shard
    save_projector(model, tmp_path, state=projector_of(model).state_dict())
    assert json.loads((tmp_path / "projector.json").read_text())["tower"]["fingerprint"] == whole


# what transformers offers to any model


def test_embeddings_are_resized_with_the_head(tmp_path):
    for tied in (False, True):
        model = tiny(tie_word_embeddings=tied)
        before = model(prompt(4), images(), tokens=4).logits
        model.resize_token_embeddings(300, mean_resizing=False)
        assert_close(model(prompt(4), images(), tokens=4).logits[..., :264], before)
        assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 300
        model.save_pretrained(tmp_path / str(tied))
        again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / str(tied))
        assert same_weights(again, model)
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_load_options(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    load = DeltaLlavaForConditionalGeneration.from_pretrained
    assert load(tmp_path, dtype=torch.bfloat16).get_decoder().dtype == torch.bfloat16
    placed = load(tmp_path, device_map={"": "cpu"})
    assert_close(placed(prompt(4), images(), tokens=4).logits, model(prompt(4), images(), tokens=4).logits)
    assert "LlamaDecoderLayer" in placed._no_split_modules
    eager = load(tmp_path, attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"
    _, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def test_attention_of_the_llm_can_be_set():
    model = tiny()
    before = model(prompt(4), images(), tokens=4)
    model.language_model.set_attn_implementation("eager")
    after = model(prompt(4), images(), tokens=4, output_attentions=True)
    assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    assert len(after.attentions) == 2 and after.attentions[0].shape[-1] == prompt(4).shape[1]
    model.set_attn_implementation("sdpa")
    assert model.language_model.config._attn_implementation == "sdpa"


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny(projector=projector_config(drop_path=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model(prompt(4), images(), tokens=4, labels=prompt(4)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert_close(grads[0][name], grads[1][name])


def test_adapters_of_peft(tmp_path):
    from peft import LoraConfig

    model = tiny(projector=projector_config(drop_path=0.0)).train()
    names = [f"language_model.{n}" for n, m in model.language_model.named_modules() if n.endswith("q_proj")]
    before = model(prompt(4), images(), tokens=4, labels=prompt(4)).loss
    add_adapters(model, LoraConfig(r=2, target_modules=names))
    out = model(prompt(4), images(), tokens=4, labels=prompt(4))
    assert_close(out.loss, before)  # LoRA starts at zero
    out.loss.backward()
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learns) == 2 * len(names) and all("lora_" in n for n in learns)
    assert any(is_lora_layer(m) for m in model.modules()) and model.peft_config
    model.eval().generate(prompt(4), pixel_values=images(), tokens=4, **GREEDY)


def test_sampling_and_several_answers():
    model, ids = tiny(), torch.cat([prompt(4), prompt(4, before=(80, 81))])
    torch.manual_seed(0)
    answers = model.generate(
        ids, pixel_values=images(n=2), tokens=4, do_sample=True, num_return_sequences=3, max_new_tokens=4
    )
    assert len(answers) == 6 and answers[:, : ids.shape[1]].equal(ids.repeat_interleave(3, 0))
    assert IMAGE not in answers[:, ids.shape[1] :]


def test_generating_without_images():
    model, ids = tiny(), torch.tensor([[72, 105, 63]])
    own = model.language_model.generate(ids, suppress_tokens=[IMAGE], **GREEDY)
    assert own.equal(model.generate(ids, **GREEDY)) and own.equal(model.generate(input_ids=ids, **GREEDY))


def test_a_cache_is_continued():
    "A second question about the same image reads the cache of the first."
    model, ids = tiny(), prompt(4)
    first = model.generate(ids, pixel_values=images(), tokens=4, return_dict_in_generate=True, **GREEDY)
    question = torch.cat([first.sequences, torch.tensor([[66, 67]])], dim=1)
    cache = first.past_key_values
    second = model.generate(question, **{cache_argument(): cache}, **GREEDY)
    assert second.equal(model.generate(question, pixel_values=images(), tokens=4, **GREEDY))
    step = model(torch.tensor([[65]]), past_key_values=model(ids, images(), tokens=4).past_key_values)
    whole = model(torch.cat([ids, torch.tensor([[65]])], 1), images(), tokens=4)
    assert_close(step.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


def test_outputs_as_a_tuple():
    model = tiny()
    out = model(prompt(4), images(), tokens=4, use_cache=False)
    logits, visual, read = model(prompt(4), images(), tokens=4, use_cache=False, return_dict=False)
    assert_close(model.get_output_embeddings()(read), logits)
    assert_close(logits, out.logits)
    assert_close(visual, out.image_hidden_states)
    hidden = model(prompt(4), images(), tokens=4, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and hidden[-1].shape == (1, prompt(4).shape[1], 64)


def test_images_find_their_places_in_embeddings():
    model = tiny()
    embeds = model.get_input_embeddings()(prompt(4))
    want = model(prompt(4), images(), tokens=4).logits
    assert_close(model(prompt(4), images(), inputs_embeds=embeds, tokens=4).logits, want)
    assert_close(model(pixel_values=images(), inputs_embeds=embeds, tokens=4).logits, want)
    with pytest.raises(ValueError, match=r"\[3\] image placeholders"):
        model(pixel_values=images(), inputs_embeds=embeds[:, 3:], tokens=4)
    answer = model.generate(inputs_embeds=embeds, pixel_values=images(), tokens=4, **GREEDY)
    assert answer.equal(
        model.generate(prompt(4), pixel_values=images(), tokens=4, **GREEDY)[:, prompt(4).shape[1] :]
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_cache=False),
        dict(prompt_lookup_num_tokens=3),
        dict(prefill_chunk_size=3),
        dict(prefill_chunk_size=4, num_beams=2),
        dict(assistant_early_exit=1),
        dict(assistant_model="text"),
        dict(assistant_model="images"),
        dict(assistant_model="images", do_sample=True, top_k=1),
        dict(num_return_sequences=2, num_beams=2, prefill_chunk_size=5),
        dict(cache_implementation="static"),
    ],
    ids=str,
)
def test_settings_of_generate_that_read_parts_of_the_prompt(settings):
    model, ids = spoken(), prompt(4, after=(63, 10, 63, 10, 72, 105))
    drafts = {"text": LlamaForCausalLM(llm_config()).eval(), "images": tiny(seed=1)}
    settings = GREEDY | settings
    beams = {k: v for k, v in settings.items() if k.startswith("num_")}
    want = model.generate(ids, pixel_values=images(), tokens=4, **GREEDY | beams)
    if "assistant_model" in settings:
        settings["assistant_model"] = drafts[settings["assistant_model"]]
    assert want.equal(model.generate(ids, pixel_values=images(), tokens=4, **settings))
    other = model.generate(ids, pixel_values=images(seed=2), tokens=4, **settings)
    assert not want.equal(other)  # the image is seen
    assert not model.get_decoder()._forward_pre_hooks and not model.language_model._forward_pre_hooks


@pytest.mark.parametrize("assistant", [True, False])
def test_drafts_that_are_all_accepted(assistant):
    "A draft that is the model itself proposes only what the model says."
    model, ids = spoken(), prompt(4)
    passes = []
    model.get_decoder().register_forward_hook(lambda m, args, out: passes.append(out[0].shape[1]))
    want = model.generate(ids, pixel_values=images(), tokens=4, **GREEDY)
    slow = len(passes)
    draft = copy.deepcopy(model)
    draft.get_decoder()._forward_hooks.clear()
    options = dict(assistant_model=draft) if assistant else dict(prompt_lookup_num_tokens=3)
    passes.clear()
    ids = ids if assistant else torch.cat([want, ids], dim=1)  # what was said once may be said again
    images_ = images() if assistant else images().repeat(2, 1, 1, 1)
    model.generate(ids, pixel_values=images_, tokens=4, **GREEDY | options)
    assert len(passes) <= slow if not assistant else len(passes) < slow


def test_a_draft_with_a_tower_needs_pixels():
    model, features = tiny(), torch.randn(1, 49, 512)
    with pytest.raises(ValueError, match="needs pixel_values"):
        model.generate(prompt(4), vision_features=features, tokens=4, assistant_model=tiny(seed=1), **GREEDY)


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        (dict(token=9), "did you mean 'tokens'"),
        (dict(pixel_value=1), "did you mean 'pixel_values'"),
        (dict(question=["?"]), "did you mean 'question_"),
        (dict(output_hiden_states=True), "did you mean 'output_hidden_states'"),
        (dict(xyzzy=1), "this model has"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_unknown_arguments_are_errors(unknown, hint, training):
    model = tiny().train(training)
    with pytest.raises(TypeError, match=hint):
        model(prompt(4), images(), tokens=4, **unknown)
    with pytest.raises((TypeError, ValueError), match=next(iter(unknown))):
        model.generate(prompt(4), pixel_values=images(), tokens=4, **unknown)
    with pytest.raises(TypeError, match=next(iter(unknown))):
        model.get_image_features(images(), **unknown)


def test_arguments_that_transformers_gives_all_models():
    model = tiny()
    ids = prompt(4)
    want = model(ids, images(), tokens=4).logits
    extra = dict(use_cache=False, output_attentions=False, num_items_in_batch=3)
    extra |= dict(mm_token_type_ids=torch.zeros_like(ids))
    assert_close(model(ids, images(), tokens=4, **extra).logits, want)


@pytest.mark.parametrize("training", [True, False])
def test_labels_that_are_shifted_already(training):
    model = tiny()
    model.multi_modal_projector.train = lambda mode=True: model.multi_modal_projector
    model.train(training)
    ids = prompt(4)
    labels = torch.where(ids == IMAGE, -100, ids)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    want = model(ids, images(), tokens=4, labels=labels).loss
    others = torch.full_like(labels, 7)
    assert_close(model(ids, images(), tokens=4, labels=others, shift_labels=shifted).loss, want)
    assert not torch.allclose(model(ids, images(), tokens=4, labels=labels, shift_labels=others).loss, want)


def test_image_features_as_they_are_asked_for():
    model = tiny()
    depth = model.config.vision_config.num_hidden_layers
    out = model.get_image_features(images(n=2), tokens=4)
    assert out.hidden_states is None and out.attentions is None
    assert len(out.pooler_output) == 2 and out.pooler_output[0].shape == (4, 64)
    assert out.last_hidden_state.shape == (2, 49, 128)
    model.set_attn_implementation("eager")
    more = model.get_image_features(images(n=2), tokens=4, output_hidden_states=True, output_attentions=True)
    assert len(more.hidden_states) == depth + 1 and len(more.attentions) == depth
    assert_close(more.hidden_states[-1][:, 1:], out.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert_close(more.pooler_output[0], out.pooler_output[0], rtol=1e-4, atol=1e-5)
    plain = model.get_image_features(images(n=2), tokens=4, return_dict=False)
    assert isinstance(plain, tuple) and plain[0].equal(more.last_hidden_state)
    assert model.visual_token_counts(images(n=2), tokens=9) == [9, 9]


# weights without a folder


def test_weights_from_a_state_dict():
    model = tiny()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    load = DeltaLlavaForConditionalGeneration.from_pretrained
    again = load(None, config=copy.deepcopy(model.config), state_dict=state)
    for name, weight in again.state_dict().items():
        assert weight.equal(state[name]), name
    assert not any(p.requires_grad for p in again.vision_tower.parameters())
    short = {k: v for k, v in state.items() if not k.endswith("lm_head.weight")}
    with pytest.raises(
        ValueError, match="state_dict: 1 missing weights, e.g. 'language_model.lm_head.weight'"
    ):
        load(None, config=model.config, state_dict=short)
    with pytest.raises(ValueError, match="state_dict: 1 unexpected weights"):
        load(None, config=model.config, state_dict=state | {"language_model.lm_head.bias": torch.zeros(264)})


def test_new_weights_from_an_empty_state_dict():
    config = vlm_config()
    new = DeltaLlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    built = tiny().state_dict()
    for name, weight in new.state_dict().items():
        assert weight.isfinite().all() and weight.abs().max() < 5, name
        if weight.numel() > 1000:
            assert 0.8 < weight.std() / built[name].std() < 1.25, f"{name} is not as its model initializes it"
    assert new(prompt(4), images(), tokens=4).logits.isfinite().all()


@pytest.mark.parametrize(
    "name", ["language_model.lm_head.bias", "language_model.model.layers.7.mlp.up_proj.weight", "extra"]
)
def test_unexpected_weights_are_an_error(name, tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 unexpected weights, e.g. '{name}'"):
        DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(drop="lm_head.weight"), "1 missing weights, e.g. 'language_model.lm_head.weight'"),
        (dict(add="lm_head.bias"), "1 unexpected weights"),
        (dict(add="model.language_model.layers.9.mlp.up_proj.weight"), "1 unexpected weights"),
    ],
)
def test_weights_of_a_llava_checkpoint_that_do_not_fit(change, message, tmp_path):
    config = vlm_config()
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=TOWERS["clip_b32_224"][1](), text_config=llm_config(), image_token_index=IMAGE
        )
    )
    llava.save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if "add" in change:
        state[change["add"]] = torch.zeros(3)
    else:
        state.pop(change["drop"])
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)


def test_the_table_of_a_larger_vocabulary():
    model = tiny()
    model.resize_token_embeddings(300)
    assert model.vocab_size == model.config.text_config.vocab_size == 300


def test_a_whole_model_is_no_llm(tmp_path):
    tiny().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a whole model of this package"):
        load_llm(tmp_path)


# no warnings


@pytest.fixture
def warned(caplog, monkeypatch):
    "Warnings of Python's `warnings` and of transformers' loggers."
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: [
            text
            for text in [str(w.message) for w in found] + [r.getMessage() for r in caplog.records]
            if "deprecated" in text.lower() or "will be removed" in text.lower()
        ]


def test_what_is_deprecated_is_not_used(warned, tmp_path):
    "Build, train, save, load, generate: nothing that transformers warns of."
    logging_once = transformers_logging.get_logger("transformers")
    for name in ("warning_once", "info_once"):
        cached = getattr(type(logging_once), name, None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()  # a warning that another test has had is one here as well
    model = tiny()
    ids = prompt(4)
    model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    labels = torch.where(ids == IMAGE, -100, ids)
    model.train()(ids, images(), tokens=4, labels=labels).loss.backward()
    model.eval()
    for settings in (dict(), dict(num_beams=2), dict(use_cache=False), dict(prompt_lookup_num_tokens=2)):
        model.generate(ids, pixel_values=images(), tokens=4, **GREEDY, **settings)
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    model.generate(ids, pixel_values=images(), tokens=4, generation_config=config)
    model.set_attn_implementation("eager")
    model(ids, images(), tokens=4, output_attentions=True, output_hidden_states=True)
    build_vlm(
        AutoModel.from_config(TOWERS["clip_b32_224"][1]()),
        LlamaForCausalLM(llm_config()),
        byte_tokenizer(),
        projector_config(),
    )
    processor = build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=4, template="v1")
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    chat = [
        dict(
            role="user",
            content=[dict(type="image", image=Image.new("RGB", (9, 9))), dict(type="text", text="?")],
        )
    ]
    processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert warned() == []
