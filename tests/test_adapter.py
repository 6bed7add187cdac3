"The adapter: each part is found, failures are named, and other modules take moving parts from it."

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_vlm import IMAGE, TOWERS, images, prompt
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from delta_llava import adapter
from delta_llava.config import clip_b32_224
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "delta_llava"
OPTIONAL = {"lmms_eval"}
SIZES = dict(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=257,
)
HEADS = {  # LLM: what its head does besides a product with a matrix
    "llama": {},
    "phi": {},  # bias
    "gemma2": dict(final_logit_softcapping=2.0, head_dim=16),
    "granite": dict(logits_scaling=3.0),
    "cohere": dict(logit_scale=0.3),
    "gpt_neox": {},  # other names for the decoder and the head
}


def causal_lm(kind, seed=0):
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | HEADS[kind])).eval()
    with torch.no_grad():
        for p in llm.get_output_embeddings().parameters():
            p.normal_()
    return llm


@pytest.mark.parametrize("name", adapter.PARTS)
def test_each_part_is_there(name):
    module, reason = adapter.PARTS[name]
    if module.partition(".")[0] in OPTIONAL:
        pytest.importorskip(module.partition(".")[0])
    assert getattr(adapter, name) is adapter.moving_part(name) and reason


def test_a_part_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(adapter.PARTS, "Gone", ("transformers.cache_utils", "a test asks for it"))
    monkeypatch.setitem(adapter.PARTS, "NoModule", ("transformers.gone", "a test asks for it"))
    for name in ("Gone", "NoModule"):
        with pytest.raises(adapter.AdapterError, match="because a test asks for it") as error:
            adapter.moving_part(name)
        low, high = adapter.TESTED["transformers"]
        assert f"Tested with transformers {low} to {high}" in str(error.value)
    with pytest.raises(AttributeError, match="nothing"):
        getattr(adapter, "nothing")  # noqa: B009  the module's own `__getattr__`


def test_the_lowest_tested_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "transformers", "accelerate", "peft"):
        assert re.search(rf'"{package}>=([\d.]+)', text)[1] == adapter.TESTED[package][0]


@pytest.mark.parametrize("path", ["vlm.py", "compressors/fastv.py"])
def test_moving_parts_come_from_the_adapter(path):
    text = (PACKAGE / path).read_text()
    for name, (module, _) in adapter.PARTS.items():
        assert not re.search(rf"from {re.escape(module)} import[^\n]*\b{name}\b", text), name
    assert not re.search(r"from (transformers|peft|accelerate)\.", text)


def test_overrides_that_are_never_called_are_an_error():
    adapter.check_overrides(DynamicCache, {"update": ("layer_idx",)}, "a test")
    with pytest.raises(adapter.AdapterError, match=r"DynamicCache\.update \(gone\)"):
        adapter.check_overrides(DynamicCache, {"update": ("gone",)}, "a test")
    with pytest.raises(adapter.AdapterError, match=r"DynamicCache\._update"):
        adapter.check_overrides(DynamicCache, {"_update": ()}, "a test")


def test_only_a_plain_dynamic_cache_is_known():
    class Own(DynamicCache):
        pass

    config = causal_lm("llama").config
    adapter.check_dynamic_cache(None)
    adapter.check_dynamic_cache(DynamicCache(config=config))
    for cache in (StaticCache(config=config, max_cache_len=8), Own(config=config), (), object()):
        with pytest.raises(ValueError, match=f"FastV needs a DynamicCache.*{type(cache).__name__}"):
            adapter.check_dynamic_cache(cache)


# ---- the LLM's own head
@pytest.mark.parametrize("kind", HEADS)
def test_selected_logits_are_the_llms_own(kind):
    llm = causal_lm(kind)
    ids = torch.randint(3, 64, (2, 7))
    select = torch.rand(2, 7) < 0.5
    logits, _ = adapter.selected_logits(llm, lambda hidden: hidden[select], input_ids=ids)
    assert_close(logits, llm(ids).logits[select])
    assert not any(m._forward_hooks for m in llm.modules())


def test_an_llm_whose_decoder_the_hook_does_not_see_still_has_its_own_logits():
    class Unseen(type(causal_lm("llama"))):
        def get_decoder(self):
            return torch.nn.Identity()

    llm = causal_lm("llama")
    llm.__class__ = Unseen
    ids = torch.randint(3, 64, (2, 7))
    logits, _ = adapter.selected_logits(llm, lambda x: x[:, -1], input_ids=ids)
    assert_close(logits, llm(ids).logits[:, -1])


def vlm(kind):
    projector = clip_b32_224().to_dict() | dict(d_vision=128, d_llm=64, rank=4, drop_path=0.0)
    llm = causal_lm(kind)
    config = DeltaLlavaConfig(
        vision_config=TOWERS["clip_b32_224"][1](),
        text_config=llm.config,
        projector=projector,
        image_token_index=IMAGE,
    )
    model = DeltaLlavaForConditionalGeneration(config).eval()
    model.language_model = llm
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_the_model_uses_the_whole_head(kind):
    model, ids = vlm(kind), prompt(4)
    labels = torch.where(ids == IMAGE, -100, ids)
    out = model(ids, images(), tokens=4, labels=labels)
    embeds, _, _ = model.merge_visual_tokens(ids, None, model.get_image_features(images(), tokens=4))
    own = model.language_model(inputs_embeds=embeds, labels=labels)
    assert_close(out.logits, own.logits)
    assert_close(out.loss, own.loss)
    assert_close(model.train()(ids, images(), tokens=4, labels=labels).loss, own.loss)
    first = model.eval().generate(ids, pixel_values=images(), tokens=4, max_new_tokens=1, do_sample=False)
    own.logits[..., IMAGE] = -torch.inf
    assert first[0, -1] == own.logits[0, -1].argmax()


# ---- old folders
def old_names(model):
    "The state dict of earlier versions: the decoder under LLaVA's names, the head alone."
    llm = model.language_model
    head = next(name for name, m in llm.named_modules() if m is llm.get_output_embeddings())
    out = {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("language_model.")
        if name.startswith(f"{head}."):
            out["lm_head." + name.removeprefix(f"{head}.")] = weight
        elif name.startswith(f"{llm.base_model_prefix}."):
            out["model.language_model." + name.removeprefix(f"{llm.base_model_prefix}.")] = weight
        else:
            out["model." + name] = weight
    return out


@pytest.mark.parametrize("kind", HEADS)
def test_folders_of_earlier_versions_load(kind, tmp_path):
    model = vlm(kind)
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in old_names(model).items()}
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    want = model.state_dict()
    got = again.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    other = vlm(kind)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(old_names(model))
    assert all(torch.equal(v, want[k]) for k, v in other.state_dict().items())


def test_importing_the_adapter_is_cheap():
    code = "import sys, delta_llava.adapter; print({'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
