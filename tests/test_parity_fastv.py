"""FastV: the reference's selection of tokens and its LlamaModel, number by number.

Then caches, padding, decoders and gradients, against a model that hides by a mask what FastV drops."""

import copy

import pytest
import torch
from parity import cases, close, info, tensors, under
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    StaticCache,
)

from delta_llava.adapter import cache_argument, checkpointing_runs_hooks
from delta_llava.compressors.base import build_compressor, from_reference, to_reference
from delta_llava.compressors.fastv import (
    FastV,
    FastVConfig,
    check_decoder,
    fastv_context,
    pruned_layer_class,
    select_tokens,
)
from delta_llava.compressors.mlp import MLP, MLPConfig

IMAGE, PAD = 7, 0


def pytest_generate_tests(metafunc):
    for kind in ("selection", "llama"):
        if f"{kind}_case" in metafunc.fixturenames:

            def of_kind(name, case, kind=kind):
                return case["name"].startswith("llama") == (kind == "llama")

            found = cases(metafunc, "fastv", where=of_kind)
            assert found, f"no {kind} case of fastv in the folder of fixtures"
            metafunc.parametrize(f"{kind}_case", found)


# ---- the reference
def select(folder, name, case, times=1.0):
    attention = tensors(folder, name)[f"in.{case['name']}.attn_last_row"][:, :, 0].mean(1) * times
    positions = torch.arange(case["seq"])[None]
    return select_tokens(
        attention,
        (positions >= case["sys_length"]) & (positions < case["sys_length"] + case["image_tokens"]),
        case["rank"],
    )


def test_selection(selection_case):
    folder, name, case = selection_case
    index, hidden = select(folder, name, case)
    stored = under(folder, name, f"out.{case['name']}.")
    assert hidden is None and index.shape[1] == case["kept"]
    assert_close(index[0], stored["keep"], rtol=0, atol=0)
    assert_close(index, stored["position_ids"], rtol=0, atol=0)


def test_selection_notices_another_order(selection_case):
    "A factor would not change the order; its reversal does, unless all tokens are kept."
    folder, name, case = selection_case
    index, _ = select(folder, name, case, times=-1e-3)
    same = index.tolist() == tensors(folder, name)[f"out.{case['name']}.position_ids"].tolist()
    assert same == (case["rank"] == case["image_tokens"])


def reference_llama(folder, name, times=1.0):
    config = {
        k: v
        for k, v in info(folder, name)["llama_config"].items()
        if not k.startswith("fast_v")
        and k not in ("use_fast_v", "output_attentions", "output_hidden_states", "use_return_dict")
    }
    model = LlamaModel(LlamaConfig(**config)).eval()
    state = {k: v for k, v in under(folder, name, "state.").items() if not k.endswith("inv_freq")}
    model.load_state_dict({k: v * times for k, v in state.items()})
    return model


def hide(decoder, embeds, gone, layer, visible=None, position_ids=None, **kwargs):
    "Nothing is dropped and nothing cached; from `layer` on, a mask hides what is `gone`."
    n = embeds.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril() & ~gone[:, None, None]
    if visible is not None:
        mask = mask & visible[:, None, None].bool()
    mask = mask | (
        torch.eye(n, dtype=torch.bool) & ~mask.any(-1, keepdim=True)
    )  # what attends to no token, padding, attends to itself
    handles = [
        b.register_forward_pre_hook(
            lambda m, args, kw: (args, kw | dict(attention_mask=mask)), with_kwargs=True
        )
        for b in decoder.layers[layer:]
    ]
    try:
        return decoder(
            inputs_embeds=embeds, attention_mask=visible, position_ids=position_ids, use_cache=False, **kwargs
        )
    finally:
        for handle in handles:
            handle.remove()


def run_llama(folder, name, case, times=1.0):
    settings = info(folder, name)["llama_config"] | case
    model, embeds = reference_llama(folder, name, times), tensors(folder, name)["in.llama.inputs_embeds"]
    if not settings["use_fast_v"]:
        return model(inputs_embeds=embeds, output_hidden_states=True)
    positions = torch.arange(embeds.shape[1])[None]
    first, layer = settings["fast_v_sys_length"], settings["fast_v_agg_layer"]
    images = (positions >= first) & (positions < first + settings["fast_v_image_token_length"])
    with fastv_context(model, images, keep=settings["fast_v_attention_rank"], layer=layer) as pruned:
        out = model(inputs_embeds=embeds, output_hidden_states=True)
    if settings["fast_v_inplace"]:
        return out
    gone = torch.ones_like(images).scatter(1, pruned.index, False)
    hidden = hide(model, embeds, gone, layer, output_hidden_states=True)
    close(pruned.gather(hidden.last_hidden_state), out.last_hidden_state, "dropped and hidden")
    return hidden


@torch.no_grad()
def test_llama(llama_case):
    folder, name, case = llama_case
    out = run_llama(folder, name, case)
    assert list(out.last_hidden_state.shape) == case["out_shape"]
    assert [h.shape[1] for h in out.hidden_states] == case["layer_lengths"]
    close(
        out.last_hidden_state, tensors(folder, name)[f"out.{case['name']}.last_hidden_state"], "hidden states"
    )


@torch.no_grad()
def test_llama_notices_one_percent(llama_case):
    folder, name, case = llama_case
    with pytest.raises(AssertionError, match="hidden states"):
        close(
            run_llama(folder, name, case, 1.01).last_hidden_state,
            tensors(folder, name)[f"out.{case['name']}.last_hidden_state"],
            "hidden states",
        )


# ---- the compressor
def small(**kwargs):
    return FastV(FastVConfig(**dict(grid=6, tokens=9, levels=(1, 2), d_vision=16, d_llm=24) | kwargs)).eval()


@pytest.mark.parametrize("grid", [3, 6, 7])
def test_all_patches_come_out_at_every_budget(grid):
    model = small()
    x = torch.randn(2, grid * grid, 32)
    mlp = MLP(MLPConfig(grid=6, tokens=36, levels=(1, 2), d_vision=16, d_llm=24))
    mlp.load_state_dict(model.state_dict())
    for tokens in range(1, grid * grid + 1):
        assert_close(model(x, tokens=tokens), mlp(x, tokens=grid * grid))
    assert_close(model(x[1:], tokens=1), model(x, tokens=1)[1:], rtol=1e-4, atol=1e-5)
    assert model.to(torch.bfloat16)(x.bfloat16(), tokens=2).dtype == torch.bfloat16


def test_compressor_in_the_registry():
    model = build_compressor("fastv", small().config.to_dict())
    assert (
        type(model) is FastV
        and model.requires == ("decoder",)
        and model.config.layer == 2
        and model.config.placeholders(9) == 36
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in FastV().parameters()) == 20_979_712
    state = model.state_dict()
    reference_state = to_reference(state, FastV.state_dict_map, FastV.prefix)
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias"} < set(reference_state)
    back = from_reference(reference_state, FastV.state_dict_map, FastV.prefix)
    for k in state:
        assert_close(back[k], state[k], rtol=0, atol=0)
    model(torch.randn(1, 36, 32)).sum().backward()
    assert all(p.grad.any() for p in model.parameters())
    old = {k: v.clone() for k, v in state.items()}
    model.reset_parameters()
    assert all((model.state_dict()[k] != old[k]).any() for k in old)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: FastVConfig(layer=0), "layer=0 must be at least 1"),
        (lambda: small()(torch.randn(1, 36, 32), tokens=37), "use one of 1..36"),
        (lambda: small()(torch.randn(1, 36, 32), tokens=0), "use one of 1..36"),
        (lambda: FastVConfig(tokens=577), "use one of 1..576"),
    ],
)
def test_refused_sizes(call, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        call()


# ---- the choice
@pytest.mark.parametrize("seed", range(8))
def test_select_tokens_equals_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    b, t, keep = 4, 20, 1 + seed
    attention = torch.rand(b, t, generator=g)
    images = torch.rand(b, t, generator=g) < 0.5
    visible = torch.arange(t) >= torch.tensor([0, 3, 6, 2])[:, None]
    images &= visible
    index, shown = select_tokens(attention, images, keep, visible)
    for row in range(b):
        best = sorted((j for j in range(t) if images[row, j]), key=lambda j: -attention[row, j])[:keep]
        want = sorted(best + [j for j in range(t) if visible[row, j] and not images[row, j]])
        kept_index = index[row].tolist()
        assert kept_index == sorted(set(kept_index))
        assert [j for i, j in enumerate(kept_index) if shown is None or shown[row, i]] == want
    longest = max((visible & ~images).sum(1) + images.sum(1).clamp(max=keep))
    assert index.shape[1] == longest


# ---- decoders
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=PAD,
    initializer_range=0.2,
    max_position_embeddings=256,
)
DECODERS = {
    "llama": {},
    "qwen2": {},
    "mistral": dict(sliding_window=None),
    "smollm": dict(tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "qwen3": dict(head_dim=16),
    "granite": dict(attention_multiplier=0.2),
    "olmo2": {},
}


def causal_lm(kind="llama", attention="sdpa", seed=0, **kwargs):
    torch.manual_seed(seed)
    config = AutoConfig.for_model({"smollm": "llama"}.get(kind, kind), **SIZES | DECODERS[kind] | kwargs)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)  # biases and norms that do something
    return model


def row(before, after, n=12):
    return [*range(10, 10 + before), *[IMAGE] * n, *range(30, 30 + after)]


def batch(*rows, side="left"):
    "Token ids and mask, padded."
    longest = max(map(len, rows))

    def fill(r):
        return [PAD] * (longest - len(r))

    ids = torch.tensor([fill(r) + r if side == "left" else r + fill(r) for r in rows])
    return ids, (ids != PAD).long()


ONE, PADDED, MIXED = (
    [row(3, 5)],
    [row(3, 5), row(2, 3)],
    [row(3, 5), [*range(10, 29)], row(2, 3)],
)  # the second of MIXED is text alone


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 4])
@pytest.mark.parametrize("kind", DECODERS)
def test_row_is_the_models_own_attention(kind, layer):
    lm = causal_lm(kind, "eager")
    ids, mask = batch(*PADDED)
    with fastv_context(lm.base_model, ids == IMAGE, keep=4, layer=layer) as pruned:
        out = lm(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert_close(pruned.attention_received, out.attentions[layer - 1][:, :, -1].mean(1), rtol=0, atol=1e-6)
    assert [h.shape[1] for h in out.hidden_states] == [20] * (layer + 1) + [12] * (
        5 - layer
    ) and out.attentions[layer].shape[2:] == (12, 12)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_dropped_equals_hidden(kind, attention):
    lm, plain = causal_lm(kind, attention), causal_lm(kind)
    ids, mask = batch(*MIXED)
    embeds = lm.get_input_embeddings()(ids)
    with fastv_context(lm.base_model, ids == IMAGE, keep=4, layer=2) as pruned:
        out = lm.base_model(ids, attention_mask=mask).last_hidden_state
    gone = torch.ones_like(mask, dtype=torch.bool).scatter(1, pruned.index, False) | (
        (ids == IMAGE) & ~chosen(pruned, ids, mask, 4)
    )
    slow = pruned.gather(hide(plain.base_model, embeds, gone, 2, mask).last_hidden_state)
    real = pruned.gather(mask.bool() & ~gone)
    assert real.sum(1).tolist() == [12, 19, 9]
    close(out[real], slow[real], "dropped and hidden")


def chosen(pruned, ids, mask, keep):
    "Image tokens that a loop over the rows would keep."
    out = torch.zeros_like(ids, dtype=torch.bool)
    for r in range(len(ids)):
        positions = (ids[r] == IMAGE).nonzero()[:, 0]
        out[r, positions[pruned.attention_received[r, positions].argsort(descending=True)[:keep]]] = True
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_all_kept_equals_unpruned(kind):
    lm = causal_lm(kind)
    ids, mask = batch(*PADDED)
    with fastv_context(lm.base_model, ids == IMAGE, keep=12):
        out = lm(ids, attention_mask=mask).logits
    close(out[mask.bool()], lm(ids, attention_mask=mask).logits[mask.bool()], "logits")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_know_of_each_other(side):
    lm = causal_lm()
    ids, mask = batch(*MIXED, side=side)
    with fastv_context(lm.model, ids == IMAGE, keep=4) as pruned:
        out = lm.model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
    for r, tokens in enumerate(MIXED):
        alone = torch.tensor([tokens])
        with fastv_context(lm.model, alone == IMAGE, keep=4) as single:
            want = lm.model(alone).last_hidden_state[0]
        start = ids.shape[1] - len(tokens) if side == "left" else 0
        where = [pruned.index[r].tolist().index(start + i) for i in single.index[0].tolist()]
        close(out[r, where], want, f"row {r}")


@torch.no_grad()
def test_the_token_that_asks_is_never_dropped():
    lm = causal_lm()
    ids = torch.tensor([[10, 11, *[IMAGE] * 8]])
    with fastv_context(lm.model, ids == IMAGE, keep=2) as pruned:
        lm(ids)
    assert pruned.index.shape[1] == 2 + 2 + 1 and pruned.index[0, -1] == 9


# ---- cache and answers
def with_cache(cache):
    "The cache as a keyword argument, under the name that this transformers uses."
    return {cache_argument(): cache}


def lengths(cache):
    return [layer.get_seq_length() for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("steps", [(1, 1, 1), (3, 1)])
@pytest.mark.parametrize("rows, prompt, kept", [(ONE, 20, 12), (PADDED, 20, 12), (MIXED, 20, 19)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_the_cache_equals_no_cache(attention, rows, prompt, kept, steps):
    "Positions go on from the full prompt, and each layer has masks of its own length."
    lm, plain = causal_lm(attention=attention), causal_lm()
    ids, mask = batch(*rows)
    cache = DynamicCache(config=lm.config)
    with fastv_context(lm.model, ids == IMAGE, keep=4, layer=2) as pruned:
        lm(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **with_cache(cache))
    assert lengths(cache) == [prompt] * 2 + [kept] * 3
    gone = (ids == IMAGE) & ~chosen(pruned, ids, mask, 4)
    new = torch.randint(40, 60, (len(rows), sum(steps)), generator=torch.Generator().manual_seed(1))
    n_generated = 0
    for n in steps:
        step, mask, gone = (
            new[:, n_generated : n_generated + n],
            F.pad(mask, (0, n), value=1),
            F.pad(gone, (0, n)),
        )
        n_generated += n
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with fastv_context(lm.model, None, keep=4, layer=2):
            out = lm.model(
                step, attention_mask=mask, position_ids=positions[:, -n:], past_key_values=cache
            ).last_hidden_state
        embeds = plain.get_input_embeddings()(torch.cat([ids, new[:, :n_generated]], dim=1))
        close(
            out,
            hide(plain.model, embeds, gone, 2, mask, positions).last_hidden_state[:, -n:],
            f"{n_generated} steps",
        )
        assert lengths(cache) == [prompt + n_generated] * 2 + [kept + n_generated] * 3


@torch.no_grad()
def test_positions_go_on_without_being_given():
    lm, ids = causal_lm(), torch.tensor(ONE)
    new, cache = torch.tensor([[41]]), DynamicCache()  # a cache that makes its layers as they come
    with fastv_context(lm.model, ids == IMAGE, keep=2) as pruned:
        lm(ids, **with_cache(cache))
        out = lm.model(new, **with_cache(cache)).last_hidden_state
    gone = F.pad((ids == IMAGE) & ~chosen(pruned, ids, None, 2), (0, 1))
    assert lengths(cache) == [21] * 2 + [11] * 3
    close(
        out,
        hide(lm.model, lm.get_input_embeddings()(torch.cat([ids, new], 1)), gone, 2).last_hidden_state[
            :, -1:
        ],
        "next token",
    )


def generate(lm, ids, mask, keep=4, beams=1, **kwargs):
    with fastv_context(lm.base_model, (ids == IMAGE).repeat_interleave(beams, 0), keep=keep):
        return lm.generate(
            **dict(input_ids=ids) | kwargs,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            num_beams=beams,
            do_sample=False,
            suppress_tokens=[IMAGE],
            return_dict_in_generate=True,
            output_logits=True,
        )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "smollm"])
def test_generate(kind, beams):
    "An answer in a batch is the answer alone; with beams, rows of the cache move."
    lm = causal_lm(kind)
    ids, mask = batch(*MIXED)
    together = generate(lm, ids, mask, beams=beams)
    assert lengths(together.past_key_values) == [25] * 2 + [24] * 3
    for r, tokens in enumerate(MIXED):
        alone = torch.tensor([tokens])
        single = generate(lm, alone, torch.ones_like(alone), beams=beams)
        assert single.sequences[0, -6:].tolist() == together.sequences[r, -6:].tolist()
        if IMAGE not in tokens:
            assert (
                single.sequences.tolist()
                == lm.generate(
                    alone,
                    attention_mask=torch.ones_like(alone),
                    max_new_tokens=6,
                    min_new_tokens=6,
                    num_beams=beams,
                    do_sample=False,
                    suppress_tokens=[IMAGE],
                ).tolist()
            )


@torch.no_grad()
def test_generate_equals_writing_without_a_cache():
    lm, ids = causal_lm(seed=3), torch.tensor(ONE)
    out = generate(
        lm, ids, torch.ones_like(ids), input_ids=None, inputs_embeds=lm.get_input_embeddings()(ids)
    )  # as the whole model calls it
    with fastv_context(lm.model, ids == IMAGE, keep=4) as pruned:
        lm(ids)
    gone = (ids == IMAGE) & ~chosen(pruned, ids, None, 4)
    for i in range(6):
        logits = lm.lm_head(
            hide(lm.model, lm.get_input_embeddings()(ids), F.pad(gone, (0, i)), 2).last_hidden_state[:, -1]
        )
        close(out.logits[i], logits, f"logits of word {i}")
        ids = torch.cat([ids, out.sequences[:, i : i + 1]], dim=1)
    whole = lm.generate(
        torch.tensor(ONE),
        attention_mask=torch.ones(1, 20),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert (whole.logits[0] - out.logits[0]).abs().max() > 1e-2  # dropping does something here


@torch.no_grad()
def test_a_reset_or_new_cache_begins_anew():
    lm, ids = causal_lm(), torch.tensor(ONE)
    cache = DynamicCache(config=lm.config)
    with fastv_context(lm.model, ids == IMAGE, keep=4):
        first = lm(ids, **with_cache(cache)).logits
        cache.reset()
        if cache.get_seq_length():
            cache = DynamicCache(config=lm.config)  # older versions only zero it
        close(lm(ids, **with_cache(cache)).logits, first, "after reset")
    assert lengths(cache) == [20] * 2 + [12] * 3


def test_cache_rows_move_with_their_masks():
    shown = torch.tensor([[True, False, True], [True, True, True]])

    def layer():
        out = pruned_layer_class()(3, shown)
        out.expected = True
        out.update(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))
        return out

    swapped, twice, one = layer(), layer(), layer()
    swapped.reorder_cache(torch.tensor([1, 0]))
    twice.batch_repeat_interleave(2)
    one.batch_select_indices(torch.tensor([1]))
    for moved, rows in ((swapped, [1, 0]), (twice, [0, 0, 1, 1]), (one, [1])):
        assert moved.keys[:, 0, 0, 0].tolist() == rows and moved.shown.tolist() == shown[rows].tolist()
        assert moved.mask(None, 2).tolist() == F.pad(shown[rows], (0, 2), value=True).tolist()


# ---- training
def losses(lm, ids, mask, how, checkpointing=False):
    embeds = lm.get_input_embeddings()(ids).detach().requires_grad_()
    lm.zero_grad()
    weights = torch.linspace(-1, 1, 32)
    with fastv_context(lm.model, ids == IMAGE, keep=4) as pruned:
        out = lm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    gone = (ids == IMAGE) & ~chosen(pruned, ids, mask, 4)
    if how == "hidden":
        out = pruned.gather(hide(lm.model, embeds, gone, 2, mask).last_hidden_state)
    (out * weights)[pruned.gather(mask.bool() & ~gone)].square().sum().backward()
    return embeds.grad, {k: p.grad for k, p in lm.model.named_parameters() if p.grad is not None}


def test_gradients_equal_those_of_hiding():
    lm = causal_lm()
    ids, mask = batch(*MIXED)
    gin, gp = losses(lm, ids, mask, "dropped")
    want_in, want_p = losses(lm, ids, mask, "hidden")
    assert_close(gin, want_in, rtol=1e-4, atol=1e-4)
    assert set(gp) == set(want_p) and len(gp) > 40
    for k in gp:
        assert_close(gp[k], want_p[k], rtol=1e-3, atol=1e-3, msg=lambda m, name=k: f"{name}: {m}")
    assert gin[(ids == IMAGE)].abs().sum(-1).gt(0).all()  # dropped ones too: the first two layers read them


def test_gradient_checkpointing_changes_nothing():
    lm = causal_lm()
    ids, mask = batch(*PADDED)
    want_in, want_p = losses(lm, ids, mask, "dropped")
    lm.train()
    lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    if checkpointing_runs_hooks():  # such as 5.20
        with pytest.raises(ValueError, match="switch gradient checkpointing off"):
            losses(lm, ids, mask, "dropped")
        return
    gin, gp = losses(lm, ids, mask, "dropped")
    assert_close(gin, want_in, rtol=1e-5, atol=1e-5)
    for k in gp:
        assert_close(gp[k], want_p[k], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision():
    lm = causal_lm().bfloat16()
    ids, mask = batch(*PADDED)
    with fastv_context(lm.model, ids == IMAGE, keep=4) as pruned:
        out = lm(ids, attention_mask=mask)
    assert (
        out.logits.dtype == torch.bfloat16
        and out.logits.isfinite().all()
        and pruned.attention_received.dtype == torch.float32
    )


@torch.no_grad()
def test_labels_go_with_their_tokens():
    lm = causal_lm()
    ids, mask = batch(*PADDED)
    targets = F.pad(ids[:, 1:].masked_fill(ids[:, 1:] == IMAGE, -100), (0, 1), value=-100)
    with fastv_context(lm.model, ids == IMAGE, keep=4) as pruned:
        lm(ids, attention_mask=mask)
    assert pruned.gather(targets)[0].tolist()[:2] + pruned.gather(targets)[0].tolist()[-5:] == [
        11,
        12,
        31,
        32,
        33,
        34,
        -100,
    ]
    assert pruned.gather(torch.randn(1, 20, 3)).shape == (2, 12, 3)


# ---- hooks and errors
def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left():
    lm, ids = causal_lm(), torch.tensor(ONE)
    before = hooks(lm)
    with fastv_context(lm.model, ids == IMAGE, keep=4):
        assert hooks(lm) == before + 1 + 2 + 3
        lm(ids)
    assert hooks(lm) == before
    with pytest.raises(RuntimeError, match="stop"):
        with fastv_context(lm.model, ids == IMAGE, keep=4):
            raise RuntimeError("stop")
    assert hooks(lm) == before


@torch.no_grad()
def test_without_images_nothing_changes():
    lm, ids = causal_lm(), torch.tensor(ONE)
    cache = DynamicCache(config=lm.config)
    with fastv_context(lm.model, None, keep=4) as pruned:
        out = lm(ids, **with_cache(cache)).logits
    assert_close(out, lm(ids).logits, rtol=0, atol=0)
    assert lengths(cache) == [20] * 5 and pruned.index is None and pruned.gather(ids) is ids
    with fastv_context(lm.model, None, keep=4):
        lm(torch.tensor([[41]]), **with_cache(cache))
    assert lengths(cache) == [21] * 5


def tiny(kind, **kwargs):
    return AutoModel.from_config(AutoConfig.for_model(kind, **SIZES | kwargs))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: causal_lm(), "has no `layers`"),
        (lambda: tiny("phi"), "['dense']"),
        (lambda: tiny("mistral"), "sliding_window=None"),
        (
            lambda: tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
            "sliding_window=None",
        ),
        (lambda: tiny("gemma2", head_dim=8), "attn_logit_softcapping"),
        (lambda: tiny("stablelm"), "a rotation of the whole head"),
        (lambda: tiny("gpt_neox"), "q_proj"),
        (lambda: tiny("phi3"), "['k_proj', 'q_proj']"),
    ],
)
def test_other_decoders_are_refused(make, text):
    with pytest.raises(ValueError) as error:
        check_decoder(make(), 2)
    assert text in str(error.value)


@pytest.mark.parametrize("layer", [-1, 0, 5, 9])
def test_layers_are_refused(layer):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.4"):
        check_decoder(causal_lm().model, layer)


@torch.no_grad()
def test_refused_passes():
    lm, ids = causal_lm(), torch.tensor(ONE)
    image_mask, cache = ids == IMAGE, DynamicCache(config=lm.config)
    with fastv_context(lm.model, image_mask, keep=4):
        lm(ids, **with_cache(cache))
    for text, error, how, call in [
        ("keep=0", ValueError, dict(keep=0), {}),
        ("image_mask is [1, 19]", ValueError, dict(image_mask=image_mask[:, 1:]), {}),
        (
            "2D attention mask",
            ValueError,
            {},
            dict(attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool)),
        ),
        ("StaticCache", ValueError, {}, with_cache(StaticCache(lm.config, 40))),
        ("whole prompt", ValueError, {}, with_cache(cache)),
        ("pruned after layer 2", ValueError, dict(layer=3), with_cache(cache)),
        ("packed", ValueError, {}, dict(position_ids=torch.arange(20)[None] % 9, use_cache=False)),
    ]:
        with (
            pytest.raises(error) as caught,
            fastv_context(lm.model, **dict(image_mask=image_mask, keep=4, layer=2) | how),
        ):
            lm(ids, **copy.deepcopy(call))
        assert text in str(caught.value)
    for step in (torch.tensor([[41]]), torch.tensor([[41, 42]])):
        with pytest.raises(RuntimeError, match="inside `with fastv_context"):
            lm(step, **with_cache(copy.deepcopy(cache)))
