"""Adapters and offloading by other libraries: every layer is called, none is read past its call.

The same loaders beside LLaVA, and quantization, are in `test_llava_loaders.py`."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from test_vlm_compressors import inputs, tiny
from torch.testing import assert_close

from delta_llava.compressors.base import COMPRESSORS
from delta_llava.delta import DeltaProjection, columns_of_layer, is_plain_layer, rows_of_layer
from delta_llava.projector import DeltaProjector, WindowAttention
from delta_llava.vlm import DeltaLlavaForConditionalGeneration, tower_fingerprint

FOUR = ("delta", "tokenpacker", "mqt", "qwen")  # those that use parts of a layer, each in its own way


def pairs(always, second):
    "Every compressor with both ways to load; the second way is slow for those that read no part of a layer."
    found = [(name, always) for name in COMPRESSORS]
    for name in COMPRESSORS:
        found.append(pytest.param(name, second, marks=() if name in FOUR else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("name", "dora"), pairs(False, True))
def test_adapters_on_all_linear_layers_take_part(name, dora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    model = get_peft_model(tiny(name), config).eval()
    batch = inputs(model.base_model.model)
    with torch.no_grad():
        before = model(**batch).logits
        assert_close(model.merge_and_unload()(**batch).logits, before, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 4, 9, 36, 144])
def test_adapters_take_part_at_every_budget_and_with_a_shared_base(tokens):
    torch.manual_seed(0)
    projector = DeltaProjector(grid=12, tokens=9, d_vision=128, d_llm=32, rank=4, share_base=True)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    x = torch.randn(2, 144, projector.config.d_levels)
    with torch.no_grad():
        plain = projector.eval()(x, tokens=tokens)
        wrapped = get_peft_model(projector, config).eval()
        before = wrapped(x, tokens=tokens)
        assert not torch.allclose(before, plain, atol=1e-3)
        assert_close(wrapped.merge_and_unload()(x, tokens=tokens), before, atol=1e-4, rtol=1e-3)


def test_every_adapter_of_the_projector_learns():
    model = get_peft_model(
        tiny("delta"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    batch = inputs(model.base_model.model)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    updates = {n: p for n, p in model.named_parameters() if "lora_" in n}
    unmoved = [n for n, p in updates.items() if p.grad is None or not p.grad.any()]
    assert any("multi_modal_projector" in n for n in updates)
    assert any("vision_tower" in n for n in updates)  # somebody unfroze the tower: gradients flow
    assert [n for n in unmoved if "vision_tower" not in n] == []
    assert not any(f"layers.{i}." in n for n in unmoved for i in range(8))


@pytest.mark.parametrize(("name", "where"), pairs("cpu", "disk"))
def test_offloaded_weights(name, where, tmp_path):
    model = tiny(name)
    batch = inputs(model)
    with torch.no_grad():
        want = model(**batch).logits
        model = copy.deepcopy(model)
        if where == "cpu":
            model = accelerate.cpu_offload(model, execution_device="cpu")
        else:
            model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
        assert all(p.is_meta for p in model.multi_modal_projector.parameters())
        assert_close(model(**batch).logits, want, atol=1e-6, rtol=1e-5)
        written = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert written.shape[1] == batch["input_ids"].shape[1] + 2
    assert tower_fingerprint(model.vision_tower) is None
    assert model(**batch).logits.shape == want.shape  # with gradients on, too


@pytest.mark.parametrize("name", ["delta", "fastv", "llavolta"])
def test_device_map_auto_with_a_disk(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    batch = inputs(model)
    with torch.no_grad():
        want = model(**batch).logits
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    again = DeltaLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in again.hf_device_map.values()
    with torch.no_grad():
        assert_close(again(**batch).logits, want, atol=1e-6, rtol=1e-5)


def test_layers_that_are_not_plain():
    layer = torch.nn.Linear(4, 12)
    assert is_plain_layer(layer) and is_plain_layer(torch.nn.LayerNorm(4))
    assert not is_plain_layer(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)))
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert not is_plain_layer(layer)


def test_a_called_layer_computes_what_a_read_one_does():
    torch.manual_seed(0)
    attend, base = WindowAttention(32, 4), torch.nn.Linear(64, 32, bias=False)
    part = DeltaProjection(32, 32, 4, base)
    q, k = torch.randn(2, 4, 32), torch.randn(2, 36, 32)
    plain = attend(q, k, k), attend.single_patch(q), part(k), rows_of_layer(attend.qkv, q, 3, 8)
    for layer in (attend.qkv, base):
        layer.register_forward_hook(lambda *_: None)
    called = attend(q, k, k), attend.single_patch(q), part(k), rows_of_layer(attend.qkv, q, 3, 8)
    assert_close(called, plain, atol=1e-5, rtol=1e-5)
    assert_close(columns_of_layer(base, k), torch.nn.functional.linear(k, base.weight[:, 32:]))


@pytest.mark.parametrize("how", ["offloaded", "adapters", "integers"])
def test_fold_refuses_weights_that_are_not_what_a_layer_computes(how):
    projector = DeltaProjector(grid=12, tokens=9, d_vision=128, d_llm=32, rank=4).eval()
    assert projector.fold() is not None
    layer = next(module for module in projector.modules() if isinstance(module, torch.nn.Linear))
    if how == "offloaded":
        accelerate.cpu_offload(projector, execution_device="cpu")
        assert layer.weight.is_meta
    elif how == "adapters":
        inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), projector)
    else:
        layer.weight = torch.nn.Parameter(layer.weight.data.char(), requires_grad=False)
    with pytest.raises(ValueError, match=r"fold\(\) reads the weights of the projector, but .* is a "):
        projector.fold()


def test_fold_on_the_meta_device():
    with torch.device("meta"):
        projector = DeltaProjector(grid=12, tokens=9, d_vision=128, d_llm=32, rank=4).eval()
        features = torch.empty(1, 144, projector.config.d_levels)
        assert projector.fold()(features).shape == (1, 9, 32)
