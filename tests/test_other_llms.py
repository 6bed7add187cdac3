"LLMs of other makes inside the model: their own logits, training and generation, or one clear sentence."

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_vlm import IMAGE, TOWERS, byte_tokenizer, images, projector_config, prompt
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from delta_llava import adapter, train
from delta_llava.closed_form_init import closed_form_init
from delta_llava.collator import concatenate_rows
from delta_llava.compressors.base import compressor_config
from delta_llava.settings import Finetune
from delta_llava.vlm import (
    DeltaLlavaForConditionalGeneration,
    build_vlm,
    check_llm,
    check_packing,
    check_rows_apart,
    load_projector,
    save_projector,
)

TOWER = "clip_b32_224"
ENDS = dict(vocab_size=264, bos_token_id=256, eos_token_id=257, pad_token_id=257)
LLAMA = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **ENDS,
)
CONFIGS = {
    "granite": LLAMA | dict(logits_scaling=7.0, residual_multiplier=0.3, embedding_multiplier=3.0),
    "cohere": LLAMA | dict(logit_scale=0.3),
    "gemma3_text": LLAMA | dict(head_dim=16, final_logit_softcapping=3.0),
    "phi": LLAMA,
    "gptj": dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **ENDS),
    "gpt2": dict(n_embd=64, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ENDS),
    "opt": dict(hidden_size=64, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4, dropout=0, **ENDS)
    | dict(word_embed_proj_dim=64, max_position_embeddings=256),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4, **ENDS),
    "falcon": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, **ENDS),
    "llama4_text": LLAMA
    | dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64),
    "gpt_neox": dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **ENDS
    ),
}
HYBRID = {
    "lfm2": LLAMA | dict(layer_types=["conv", "full_attention"]),
    "mamba": dict(hidden_size=64, state_size=4, num_hidden_layers=2, **ENDS),
    "granitemoehybrid": LLAMA
    | dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8),
    "qwen3_next": LLAMA
    | dict(
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}


def make_llm(kind, configs=None):
    "A small LLM with weights that are far from 0, biases and norms too."
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(configs or CONFIGS | HYBRID)[kind]))
    with torch.no_grad():
        for weight in llm.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return llm.eval()


def make_model(llm, compressor="delta", seed=0):
    torch.manual_seed(seed)
    tower = AutoModel.from_config(TOWERS[TOWER][1]())
    config = compressor_config(compressor, projector_config(TOWER), tokens=1)
    return build_vlm(tower.eval(), llm, byte_tokenizer(), config, compressor)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_the_llms_own(kind, tmp_path):
    llm = make_llm(kind)
    model = make_model(make_llm(kind))
    ids = torch.tensor([[256, 72, 105, 33, 80, 90]])
    own = llm(ids, labels=ids)
    here = model(ids, labels=ids)
    assert_close(here.logits[..., :IMAGE], own.logits[..., :IMAGE])
    assert_close(model.train()(ids, labels=ids).loss, own.loss)
    batch = dict(input_ids=prompt(1), pixel_values=images(TOWER))
    want = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(again(**batch).logits, want)
    written = again.generate(**batch, max_new_tokens=3, do_sample=False)
    slow = again.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    assert written.tolist() == slow.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "falcon"])
def test_other_makes_learn_and_fastv_refuses_them(kind):
    model = make_model(make_llm(kind))
    ids = prompt(1)
    model.train()(ids, images(TOWER), labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.multi_modal_projector.parameters())
    with pytest.raises(ValueError, match="FastV|has no `layers`"):
        fastv = make_model(make_llm(kind), "fastv")
        ids = prompt(fastv.config.image_seq_length)
        fastv(ids, images(TOWER), tokens=1)


TAKE_IDS_ONLY = {
    "openai-gpt": CONFIGS["gpt2"],
    "xlnet": dict(d_model=64, n_layer=2, n_head=4, d_inner=64, **ENDS),
    "cpmant": dict(hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=64, num_hidden_layers=2),
}


@pytest.mark.parametrize("kind", TAKE_IDS_ONLY)
def test_llms_that_take_token_ids_only_are_refused(kind):
    llm = make_llm(kind, TAKE_IDS_ONLY)
    with pytest.raises(ValueError, match=f"{type(llm).__name__}.* takes no inputs_embeds.*Take a causal LM"):
        make_model(llm)


def packed(rows):
    return concatenate_rows([[dict(input_ids=row, labels=row) for row in rows]], 257)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma3_text", "phi", "gpt_neox"])
def test_packed_rows_do_not_reach_each_other(kind):
    model = make_model(make_llm(kind))
    batches = [packed([first, [80, 81, 82, 83]]) for first in ([65, 66, 67], [90, 70, 71])]
    logits = [model(b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits for b in batches]
    assert_close(logits[0][:, 3:7], logits[1][:, 3:7], atol=1e-6, rtol=1e-6)
    check_packing(model.language_model)


WINDOWS = {
    "mistral": LLAMA | dict(sliding_window=6),
    "gemma3_text": CONFIGS["gemma3_text"] | dict(sliding_window=6),
    "cohere2": LLAMA | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", WINDOWS)
def test_separate_turns_longer_than_a_window_are_refused(kind):
    model = make_model(make_llm(kind, WINDOWS))
    ids = torch.arange(65, 75)[None]
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 3])
    short = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 4, 5, 5]])  # no row alone is longer than the window
    assert model(ids, segments=segments, position_ids=short).logits.isfinite().all()
    with pytest.raises(ValueError, match="a row has 7 tokens.*last 6 alone.*separate_turns=False"):
        model(ids, segments=segments, position_ids=short + (segments > 0))


@pytest.mark.parametrize("kind", ["falcon", "opt", "bloom"])
def test_llms_that_ignore_where_a_row_begins_are_refused(kind):
    model = make_model(make_llm(kind))
    with pytest.raises(ValueError, match=rf"{kind!r}, the rows would influence each other through"):
        model(**packed([[65, 66, 67], [80, 81, 82, 83]]))
    with pytest.raises(ValueError, match="packing=False and separate_turns=False"):
        check_rows_apart(model)


@pytest.mark.parametrize("kind", ["falcon", "opt"])
def test_a_pass_shows_what_no_list_names(kind, monkeypatch):
    "Rows that reach each other are found by trying; a mask of our own keeps the same LLM's rows apart."
    monkeypatch.setattr(adapter, "UNPACKED_TYPES", set())
    model = make_model(make_llm(kind)).train()
    with pytest.raises(ValueError, match=rf"{kind!r}, rows in one sequence influence each other"):
        check_rows_apart(model)
    check_rows_apart(model, separate_turns=True)
    assert model.training


@pytest.mark.parametrize("separate_turns", [False, True])
def test_llms_that_keep_rows_apart_pass(separate_turns):
    for kind in ("granite", "gemma3_text", "phi"):
        check_rows_apart(make_model(make_llm(kind)), separate_turns)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "opt", "granite"])
def test_padding_on_the_left_changes_nothing(kind):
    model = make_model(make_llm(kind))
    row = torch.tensor([[70, 71, 72, 73]])
    padded = torch.cat([torch.full((1, 3), 257), row], dim=1)
    alone = model(row, attention_mask=torch.ones_like(row)).logits
    assert_close(model(padded, attention_mask=(padded != 257).long()).logits[:, 3:], alone)


OTHERS = {
    "bert": (dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4), "is an encoder"),
    "bart": (dict(d_model=64, encoder_layers=1, decoder_layers=1), "is an encoder"),
    "opt": (dict(hidden_size=64, word_embed_proj_dim=32), "embeddings 32 wide in a decoder 64 wide"),
    "gemma3n_text": (
        dict(hidden_size=64, hidden_size_per_layer_input=8),
        "reads the ids of its tokens again",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_llms_that_visual_tokens_cannot_enter_are_refused(kind):
    fields, reason = OTHERS[kind]
    with pytest.raises(ValueError, match=f"{kind!r}.*{reason}"):
        check_llm(AutoConfig.for_model(kind, **fields))


def test_the_initialization_aims_at_what_enters_the_llm():
    "Gemma scales its embeddings; the table alone is eight times too small."
    model = make_model(make_llm("gemma3_text"))
    table = model.get_input_embeddings().weight
    assert_close(model.token_embeddings(), table * 8.0)
    assert_close(make_model(make_llm("phi")).token_embeddings(), model_table("phi"))


def model_table(kind):
    torch.manual_seed(0)
    return make_model(make_llm(kind)).get_input_embeddings().weight.detach()


@pytest.mark.parametrize("kind", HYBRID)
def test_packing_is_refused_where_it_would_leak(kind):
    model = make_model(make_llm(kind))
    rows = packed([[65, 66, 67], [80, 81, 82, 83]])
    with pytest.raises(
        ValueError, match=rf"'{kind}', the rows would influence each other through.*packing=False"
    ):
        model(**rows)
    ids = rows["input_ids"]
    assert model(ids, labels=ids).loss.isfinite()  # one row after another is no matter
    steps = torch.arange(ids.shape[1])[None]
    assert model(ids, labels=ids, position_ids=steps).loss.isfinite()


@pytest.mark.parametrize(
    ("setting", "value", "package", "way_out"),
    [
        ("attn_implementation", "flash_attention_2", "flash-attn", "attn_implementation='sdpa'"),
        ("sharding", "zero3", "deepspeed", "sharding='fsdp2'"),
    ],
)
def test_missing_packages_are_named_before_anything_loads(
    setting, value, package, way_out, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    stage = Finetune(data=tmp_path / "no.json", output_dir=tmp_path, projector=None, **{setting: value})
    for run in (train.train_run, train.build_stage_model):
        with pytest.raises(ValueError, match=f"{setting}='{value}' needs {package}.*or use {way_out}"):
            run(stage)


# ---------------------------------------------------------------- PEFT's wrappers


def wrapped(**options):
    model = make_model(make_llm("granite"))
    fresh = {k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()}
    return get_peft_model(model, LoraConfig(r=2, **options)), fresh


def test_the_trained_copy_of_the_projector_is_saved(tmp_path):
    model, fresh = wrapped(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    part = adapter.unwrap_part(model.base_model.model.multi_modal_projector)
    with torch.no_grad():
        for weight in part.parameters():
            weight.add_(0.5)
    for i, whole in enumerate((model, model.base_model.model, model.base_model.model.multi_modal_projector)):
        again = load_projector(save_projector(whole, tmp_path / str(i))).state_dict()
        assert all(again[k].equal(v) for k, v in part.state_dict().items())
        assert not again["attend.out.weight"].equal(fresh["attend.out.weight"])


def assert_saved_as_it_computes(model, folder):
    "The projector, saved and loaded into a model without PEFT, computes the same; returns its weights."
    pixels = images(TOWER)
    want = model.eval().get_image_features(pixels).pooler_output[0]
    plain = make_model(make_llm("granite"))
    plain.vision_tower = adapter.unwrap_model(model).vision_tower
    projector = load_projector(save_projector(model, folder), plain)
    assert_close(plain.get_image_features(pixels).pooler_output[0], want, atol=1e-4, rtol=1e-4)
    return projector.state_dict()


def differ(state, fresh):
    return {name for name, weight in fresh.items() if not torch.allclose(state[name], weight, atol=1e-3)}


@torch.no_grad()
@pytest.mark.parametrize("names", [["attend"], ["mix.mhca", "mlp"], ["attend.out", "mlp.0"]], ids="-".join)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "qkv", "mlp.2"]], ids=["LLM", "both"])
def test_trained_copies_inside_the_projector_are_saved(names, targets, tmp_path):
    inside = [f"multi_modal_projector.{name}" for name in names]
    model, fresh = wrapped(target_modules=targets, modules_to_save=inside, init_lora_weights=False)
    wrappers = [m for m in model.modules() if adapter.unwrap_part(m) is not m]
    assert wrappers
    for weight in (p for m in wrappers for p in adapter.unwrap_part(m).parameters()):
        weight.add_(0.2 * torch.randn_like(weight))
    changed = differ(assert_saved_as_it_computes(model, tmp_path), fresh)
    assert {name for name in fresh if name.startswith(tuple(names))} <= changed
    assert ("mix.emhsa.qkv.weight" in changed) == ("qkv" in targets)
    assert all(adapter.unwrap_part(m) is not m for m in wrappers)  # saving changes nothing in the model
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")  # which trains no part of the projector
    assert not differ(assert_saved_as_it_computes(model, tmp_path), fresh)


@torch.no_grad()
def test_updates_of_several_weights_of_a_layer_are_saved(tmp_path):
    names = {"attend.out.weight", "mlp.0.weight", "q.U", "q.V"}
    inside = [f"multi_modal_projector.{name}" for name in names]
    model, fresh = wrapped(target_modules=["q_proj"], target_parameters=inside, init_lora_weights=False)
    assert differ(assert_saved_as_it_computes(model, tmp_path), fresh) == names


@torch.no_grad()
def test_adapters_on_the_projector_are_saved_in_its_weights(tmp_path):
    model, _ = wrapped(target_modules="all-linear", init_lora_weights=False)
    pixels = images(TOWER)
    want = model.eval().get_image_features(pixels).pooler_output[0]
    plain = make_model(make_llm("granite"))
    projector = load_projector(save_projector(model, tmp_path))
    assert not any(adapter.is_lora_layer(m) for m in projector.modules())
    plain.vision_tower = adapter.merged_copy(model.base_model.model.vision_tower)
    plain.multi_modal_projector = projector
    assert_close(plain.get_image_features(pixels).pooler_output[0], want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"fold\(\) reads .*merge_and_unload"):
        model.base_model.model.multi_modal_projector.fold()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["granite", "gemma3_text"])
@pytest.mark.parametrize("tuning", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_puts_its_vectors_before_the_prompt(kind, tuning):
    plain = make_model(make_llm(kind))
    model = get_peft_model(plain, tuning(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids, pixels = prompt(1), images(TOWER)
    embeds = plain.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = plain.get_image_features(pixels).pooler_output[0]
    embeds = torch.cat([model.get_prompt(1), embeds], 1)
    want = plain.language_model(inputs_embeds=embeds).logits
    mask = torch.ones_like(ids)
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert_close(found, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"generate\(\) of a PeftModelForCausalLM.*or train LoRA"):
        model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=1)
    assert plain.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=1).shape == (1, ids.shape[1] + 1)


def test_the_closed_form_initialization_reaches_the_trained_copy():
    model, _ = wrapped(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    part = model.base_model.model.multi_modal_projector
    trained, config = adapter.unwrap_part(part), adapter.unwrap_part(part).config
    before = trained.mlp[-1].weight.clone()
    closed_form_init(part, torch.randn(20, config.grid**2, config.d_levels), torch.randn(20, config.d_llm))
    assert not trained.mlp[-1].weight.equal(before)
    assert adapter.unwrap_model(model) is model.base_model.model
