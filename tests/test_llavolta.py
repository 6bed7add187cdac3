"""LLaVolta against a loop over the rows and the layers, in which nothing is batched, cached or hooked; then
caches, padding, several images, training and its schedule."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_parity_fastv import DECODERS, IMAGE, MIXED, PADDED, batch, causal_lm, row
from test_vlm_compressors import IMAGE as MODEL_IMAGE
from test_vlm_compressors import SIZES, clear_maps, inputs, tiny, with_answer
from tiny_stage import run_stage, stage, write_parts
from torch.testing import assert_close

from delta_llava.compressors import llavolta
from delta_llava.compressors.base import VARIANTS, compressor_config
from delta_llava.compressors.llavolta import STAGED, LLaVolta, LLaVoltaConfig, llavolta_context

TWO_IMAGES = [*range(10, 12), *[IMAGE] * 12, 20, *[IMAGE] * 12, 21]


def pooled_row(x, positions, is_image, stride):
    "One row with each `stride` image tokens averaged, and their mean position rounded down."
    states, new_positions, cell = [], [], []
    for i, image in enumerate(is_image):
        if not image:
            states.append(x[i])
            new_positions.append(positions[i])
            continue
        cell.append(i)
        if len(cell) == stride:
            states.append(torch.stack([x[j] for j in cell]).sum(0) / stride)
            new_positions.append(sum(positions[j] for j in cell) // stride)
            cell = []
    return torch.stack(states), new_positions


def last_states(decoder, embeds, is_image, stride, layer):
    "Last hidden states of one row without padding, layer by layer, and their positions."
    x, positions = embeds[None], list(range(len(embeds)))
    for number, block in enumerate(decoder.layers):
        if number == layer:
            states, positions = pooled_row(x[0], positions, is_image, stride)
            x = states[None]
        ids = torch.tensor([positions])
        mask = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()[None, None]
        x = block(x, attention_mask=mask, position_ids=ids, position_embeddings=decoder.rotary_emb(x, ids))
    return decoder.norm(x)[0], positions


def embedded(lm, ids):
    "Input embeddings as the decoder makes them."
    return lm.get_input_embeddings()(ids) * getattr(lm.config, "embedding_multiplier", 1)


@torch.no_grad()
@pytest.mark.parametrize("layer,stride", [(1, 4), (2, 12), (4, 3), (2, 1)])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_batch_equals_a_loop_over_rows_and_layers(kind, layer, stride):
    lm = causal_lm(kind)
    decoder = lm.base_model
    for rows, side in ((PADDED, "left"), ([*MIXED, TWO_IMAGES], "left"), ([*MIXED, TWO_IMAGES], "right")):
        ids, mask = batch(*rows, side=side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with llavolta_context(decoder, ids == IMAGE, stride=stride, layer=layer) as pooled:
            out = decoder(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        shown = pooled.gather(mask.bool())
        for r, tokens in enumerate(rows):
            own = torch.tensor(tokens)
            expected, kept = last_states(decoder, embedded(lm, own), own == IMAGE, stride, layer)
            first, index = mask[r].argmax().item(), pooled.index[r].tolist()
            real = [
                index.index(first + p) for p in kept
            ]  # tokens that fill up the row stand among the others
            assert shown[r, real].all()
            assert_close(out[r, real], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "alone"])
def test_generation_is_the_loop_run_anew_for_each_token(side, beams):
    lm = causal_lm("qwen2")
    rows = [TWO_IMAGES] if side == "alone" else [TWO_IMAGES, row(3, 5), [*range(10, 29)]]
    ids, mask = batch(*rows)
    greedy = dict(max_new_tokens=5, do_sample=False, num_beams=beams)
    with llavolta_context(lm.model, ids == IMAGE, stride=4):
        made = lm.generate(ids, attention_mask=mask, return_dict_in_generate=True, **greedy)
    lengths = [layer.get_seq_length() for layer in made.past_key_values.layers]
    reduced = max(len(tokens) - 3 * tokens.count(IMAGE) // 4 for tokens in rows)
    assert lengths == [ids.shape[1] + 4] * 2 + [reduced + 4] * 3
    if beams > 1:
        return
    for tokens, answer in zip(rows, made.sequences[:, ids.shape[1] :], strict=True):
        sequence = torch.tensor(tokens)
        for token in answer:
            states, _ = last_states(lm.model, embedded(lm, sequence), sequence == IMAGE, 4, 2)
            assert lm.lm_head(states[-1]).argmax() == token
            sequence = torch.cat([sequence, token[None]])


@torch.no_grad()
def test_beams_of_a_batch_are_those_of_rows_alone():
    lm = causal_lm("llama")
    rows = [TWO_IMAGES, row(3, 5)]
    ids, mask = batch(*rows)
    options = dict(max_new_tokens=5, do_sample=False, num_beams=3)
    with llavolta_context(lm.model, ids == IMAGE, stride=4):
        together = lm.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for tokens, answer in zip(rows, together, strict=True):
        own = torch.tensor([tokens])
        with llavolta_context(lm.model, own == IMAGE, stride=4):
            alone = lm.generate(own, attention_mask=torch.ones_like(own), **options)[0, own.shape[1] :]
        assert alone.tolist() == answer.tolist()


# ---- inside the model
def test_the_model_pools_what_the_budget_says():
    model, lengths = tiny("llavolta"), []
    words = inputs(model)
    block = model.get_decoder().layers[3]
    hook = block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        for tokens in (144, None, 36, 1):
            model(**words, tokens=tokens)
    hook.remove()
    n = words["input_ids"].shape[1]
    assert lengths == [n, n - 135, n - 108, n - 143]  # 9 is the config's
    with pytest.raises(ValueError, match="tokens=10 is not possible for LLaVoltaConfig"):
        model(**words, tokens=10)


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_those_of_the_loop(training):
    "An answer in the same pass, rows of unequal length."
    model = clear_maps(tiny("llavolta")).train(training)
    words = with_answer(inputs(model), [40, 41, 42])
    loss = model(**words).loss
    loss.backward()
    found = model.multi_modal_projector.mlp[0].weight.grad.clone()
    model.zero_grad()
    features = model.get_image_features(words["pixel_values"]).pooler_output
    total, count = 0, 0
    for r, visual in enumerate(features):
        real = words["attention_mask"][r].bool()
        ids, labels = words["input_ids"][r, real], words["labels"][r, real]
        is_image = ids == MODEL_IMAGE
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[is_image] = visual
        states, positions = last_states(model.get_decoder(), embeds, is_image, 16, 2)
        logits = model.language_model.lm_head(states)
        for i, (here, following) in enumerate(pairwise(positions)):
            if labels[following] != -100:
                assert following == here + 1  # the answer's tokens are next to each other
                total = total - logits[i].log_softmax(-1)[labels[following]]
                count += 1
    assert count == 6
    assert_close(loss, total / count, rtol=1e-4, atol=1e-5)
    (total / count).backward()
    assert_close(found, model.multi_modal_projector.mlp[0].weight.grad, rtol=1e-3, atol=1e-5)


# ---- the stages of the training
def test_the_authors_stages():
    projector = LLaVolta(LLaVoltaConfig(schedule=STAGED, tokens=576, d_vision=16, d_llm=16)).train()
    assert [part[1] for part in STAGED] == [8, 2, 2, 1] and [part[0] for part in STAGED[:3]] == [2, 2, 16]
    for progress, part in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.7499, 2), (0.75, 3), (1.0, 3)):
        projector.set_progress(progress)
        assert projector.layer_and_stride(72) == STAGED[part]
    assert projector.eval().layer_and_stride(72) == (2, 8)
    assert LLaVolta(replace(projector.config, schedule=())).train().layer_and_stride() == (2, 1)
    config = compressor_config("llavolta-staged", SIZES, tokens=144)
    assert config.schedule == STAGED
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_stage_follows_the_schedule(kind, tmp_path, monkeypatch):
    options = dict(layer=1, schedule=((1, 8), (1, 2), (1, 1)))  # the LLM has two layers
    monkeypatch.setitem(VARIANTS, "three-parts", ("llavolta", options))
    trained, evaluated = [], []
    own = LLaVolta.layer_and_stride

    def record(self, tokens=None):
        pair = own(self, tokens)
        (trained if self.training else evaluated).append(pair)
        return pair

    monkeypatch.setattr(llavolta.LLaVolta, "layer_and_stride", record)
    one = stage(kind, write_parts(tmp_path), tmp_path / "out", compressor="three-parts", tokens=4)
    run_stage(one)
    constant = [(1, 4)] * 6
    assert trained == (constant if kind == "pretrain" else [(1, 8)] * 2 + [(1, 2)] * 2 + [(1, 1)] * 2)


# ---- what is refused
@pytest.mark.parametrize(
    "options,message",
    [
        (dict(tokens=100), "tokens=100 is not possible"),
        (dict(layer=0), "layer=0 must be at least 1"),
        (dict(schedule=((2, 0),)), r"has the part \(2, 0\)"),
        (dict(schedule=((0, 2),)), r"has the part \(0, 2\)"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLaVoltaConfig(**options)


@pytest.mark.parametrize(
    "how,message",
    [
        (dict(stride=8), "stride=8 does not divide the numbers of image tokens"),
        (dict(stride=0), "stride=0 must be at least 1"),
        (dict(stride=4, layer=5), r"layer=5 must lie in 1\.\.4"),
    ],
)
def test_contexts_that_are_refused(how, message):
    lm = causal_lm("llama")
    ids, mask = batch(*PADDED)
    with pytest.raises(ValueError, match=message), llavolta_context(lm.model, ids == IMAGE, **how):
        lm.model(ids, attention_mask=mask)
    assert not any(module._forward_pre_hooks for module in lm.modules())


def test_a_sliding_window_is_refused():
    lm = causal_lm("mistral", sliding_window=8)
    ids, mask = batch(*PADDED)
    with pytest.raises(ValueError, match="layers without full attention"):
        with llavolta_context(lm.model, ids == IMAGE, stride=4):
            lm.model(ids, attention_mask=mask)


def test_a_cache_that_was_pooled_is_continued_inside_the_context_only():
    lm = causal_lm("llama")
    ids, mask = batch(row(3, 5))
    with llavolta_context(lm.model, ids == IMAGE, stride=4):
        past = lm(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="or `llavolta_context`"):
        lm(ids[:, -1:], past_key_values=past)
