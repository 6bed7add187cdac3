"""The same loaders on LLaVA and on ours: bfloat16, offloading, four and eight bits, adapters.

LLaVA is transformers' own with random weights, and our converter makes the other model from its folder, so
both hold the same weights. Its results are the measure of ours."""

import copy
import re
from functools import cache, partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_vlm import CLIP, IMAGE, byte_tokenizer, images, llm_config, projector_config, prompt, tiny
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from delta_llava import adapter
from delta_llava.checkpoints.converting import convert
from delta_llava.compressors.base import COMPRESSORS, compressor_config
from delta_llava.vlm import DeltaLlavaForConditionalGeneration, build_vlm

TOWER = "clip_b32_384"  # 12×12 patches
IN_LLAVA = {  # our name of a part -> transformers'
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector\.mlp\.0": "model.multi_modal_projector.linear_1",
    r"^multi_modal_projector\.mlp\.2": "model.multi_modal_projector.linear_2",
    r"^multi_modal_projector$": "model.multi_modal_projector",
    r"^language_model\.model": "model.language_model",
    r"^language_model\.lm_head": "lm_head",
}
UNUSED = "model.vision_tower.encoder.layers.5."  # block above the level that is read; ours has none


def in_llava(name):
    "Transformers' name of one of our parts or weights."
    found = [re.sub(ours, llavas, name) for ours, llavas in IN_LLAVA.items() if re.search(ours, name)]
    assert len(found) == 1, name
    return found[0]


def used(names):
    "Names without those of the block that LLaVA holds and does not read."
    return {name for name in names if not name.startswith(UNUSED)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "LLaVA as llava-hf saves it, and what our converter makes of it."
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    sizes = CLIP | dict(intermediate_size=256, num_hidden_layers=6, image_size=384, patch_size=32)
    llm = llm_config(hidden_size=128, intermediate_size=128, num_hidden_layers=4)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes),
            text_config=llm,
            image_token_index=IMAGE,
            image_seq_length=144,
        )
    )
    with torch.no_grad():
        for weight in llava.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)  # biases are zero at the start, and would hide
    llava.save_pretrained(root / "llava")
    done = convert(root / "llava", root / "ours")
    assert (done.config.tokens, done.config.levels) == (144, (5,))
    return SimpleNamespace(llava=root / "llava", ours=root / "ours", root=root)


def load(folder, **how):
    "The one call that loads both."
    return AutoModelForImageTextToText.from_pretrained(folder, **how).eval()


def load_both(folders, **how):
    "LLaVA and ours by the same call."
    llava, ours = (load(folder, **how) for folder in (folders.llava, folders.ours))
    assert isinstance(llava, LlavaForConditionalGeneration)
    assert isinstance(ours, DeltaLlavaForConditionalGeneration)
    return llava, ours


def inputs(tokens=144, question=False):
    "A prompt with one image."
    batch = dict(input_ids=torch.tensor([[72, 105, *[IMAGE] * tokens, 63, 10]]), pixel_values=images(TOWER))
    if question:
        batch["question_ids"] = torch.tensor([[5, 6, 7]])
        batch["question_mask"] = torch.ones_like(batch["question_ids"])
    return batch


@torch.no_grad()
def logits(model, **batch):
    "Those of all positions in float32."
    return model(**batch or inputs()).logits.float()


def assert_same(llava, ours):
    "Equal logits, bit for bit, and the same answer."
    assert torch.equal(logits(ours), logits(llava))
    options = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])  # ours never writes <image>
    assert torch.equal(ours.generate(**inputs(), **options), llava.generate(**inputs(), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(folders, dtype):
    llava, ours = load_both(folders, dtype=dtype)
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    assert_same(llava, ours)


# ---------------------------------------------------------------- offloading


def on_meta(model):
    "Weights that are not in memory."
    return {name for name, weight in model.named_parameters() if weight.is_meta}


def assert_offloaded_alike(llava, ours):
    "The same weights are elsewhere, and nothing changes."
    elsewhere = {in_llava(name) for name in on_meta(ours)}
    assert elsewhere and elsewhere == used(on_meta(llava))
    assert_same(llava, ours)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_whole_model_offloaded(folders, where, tmp_path):
    "What `device_map` does with a whole model, without an accelerator."
    plain = logits(load(folders.llava))
    llava, ours = load_both(folders)
    for model in (llava, ours):
        options = dict(execution_device=torch.device("cpu"))
        if where == "cpu":
            accelerate.cpu_offload(model, **options)
        else:
            accelerate.disk_offload(model, tmp_path / type(model).__name__, **options)
        assert len(on_meta(model)) == len(list(model.parameters()))
    assert_offloaded_alike(llava, ours)
    assert torch.equal(logits(ours), plain)


@pytest.mark.parametrize(
    "part", ["vision_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head"]
)
def test_device_map_that_names_a_part(folders, part, tmp_path):
    parts = ["vision_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head"]
    device_map = {name: "disk" if name == part else "cpu" for name in parts}
    ours = load(folders.ours, device_map=device_map, offload_folder=tmp_path / "ours")
    device_map = {in_llava(name): where for name, where in device_map.items()}
    llava = load(folders.llava, device_map=device_map, offload_folder=tmp_path / "llava")
    assert on_meta(ours) == {name for name, _ in ours.named_parameters() if name.startswith(part)}
    assert_offloaded_alike(llava, ours)


def test_device_map_auto_divides_alike(folders, tmp_path):
    "The memory lacks the last two layers of the LLM and its head."
    pair = []
    for folder in (folders.llava, folders.ours):
        whole = sum(weight.nbytes for weight in load(folder).parameters())
        memory = {"cpu": whole - 600_000}
        pair.append(load(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path / folder.name))
    llava, ours = pair
    assert {"cpu", "disk"} == {str(where) for where in ours.hf_device_map.values()}
    assert {in_llava(name): where for name, where in ours.hf_device_map.items()} == {
        name: where for name, where in llava.hf_device_map.items() if name not in (UNUSED.rstrip("."),)
    }
    assert_offloaded_alike(llava, ours)


# ---------------------------------------------------------------- four and eight bits

QUANTIZED = {
    "fp4": dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "QLoRA's": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": dict(load_in_8bit=True),
}


def quantized(kind):
    "Arguments of `from_pretrained`."
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: `make slow` installs it")
    return dict(quantization_config=BitsAndBytesConfig(**QUANTIZED[kind]), device_map="cpu")


def rounded(model):
    "Layers whose matrices are in four or eight bits."
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name for name, part in model.named_modules() if isinstance(part, Linear4bit | Linear8bitLt)}


def linear(model):
    "All linear layers; the quantized ones are linear, too."
    return {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized(folders, kind):
    "Every linear layer but the head, projector included, as in LLaVA; then the same logits."
    llava, ours = load_both(folders, **quantized(kind))
    assert {in_llava(name) for name in rounded(ours)} == used(rounded(llava))
    assert linear(ours) - rounded(ours) == {"language_model.lm_head"}
    assert ours.known_fingerprint is None  # other numbers than those of the whole tower
    assert_same(llava, ours)
    assert not torch.equal(logits(ours), logits(load(folders.ours)))


def test_shapes_that_cannot_be_repacked():
    "bitsandbytes needs blocks of 64 inputs and 32 outputs on some CPUs (SigLIP: 4304; C/4 = 288 channels)."
    linears = [(64, 32), (4304, 1152), (1152, 4304), (288, 64), (128, 48), (1152, 576)]
    part = torch.nn.ModuleList(torch.nn.Linear(*sizes, device="meta") for sizes in linears)
    part.append(torch.nn.LayerNorm(288))
    assert adapter.unpackable_layers(part) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_four_bits_leave_layers_out_by_their_shape(as_dict, tmp_path):
    "Runs on every CPU; a folder of the rounded model loads as it was saved."
    four_bits = quantized("QLoRA's")
    given = four_bits["quantization_config"]
    if as_dict:
        four_bits["quantization_config"] = given.to_dict()
    tiny().save_pretrained(tmp_path / "whole")
    model = load(tmp_path / "whole", **four_bits)
    assert given.llm_int8_skip_modules is None
    left_out = {name for name in linear(model) - rounded(model) if "lm_head" not in name}
    sizes = {n: (p.in_features, p.out_features) for n, p in model.named_modules() if n in linear(model)}
    assert left_out == {n for n, (d_in, d_out) in sizes.items() if d_in % 64 or d_out % 32} - {
        "language_model.lm_head"
    }
    assert "multi_modal_projector.mix.emhsa.qkv" in left_out  # 96 inputs
    assert "multi_modal_projector.attend.qkv" in rounded(model) and "language_model.lm_head" in linear(model)
    ids, pixels = prompt(16), images("clip_b32_224")
    before = model(ids, pixels).logits
    assert before.isfinite().all()
    model.save_pretrained(tmp_path / "rounded")
    again = load(tmp_path / "rounded")
    assert rounded(again) == rounded(model)
    assert_close(again(ids, pixels).logits, before, atol=5e-3, rtol=5e-3)  # scales became bfloat16


def test_layers_that_the_user_leaves_out_of_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower"])
    make = partial(DeltaLlavaForConditionalGeneration._without_weights, tiny().config)
    found = adapter.four_bit_config(own, make, ("multi_modal_projector",)).llm_int8_skip_modules
    assert found[0] == "vision_tower" and "multi_modal_projector.mix.emhsa.qkv" in found
    assert own.llm_int8_skip_modules == ["vision_tower"] and "language_model.lm_head" not in found
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert adapter.four_bit_config(eight, make, ("multi_modal_projector",)) is eight


# ---------------------------------------------------------------- adapters


def adapted(pair, dora=False):
    "Both in PEFT's wrappers, with LLaVA's random adapters on all linear layers of both."
    torch.manual_seed(0)
    options = dict(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    llava, ours = (get_peft_model(model, LoraConfig(**options)).eval() for model in pair)
    weights = get_peft_model_state_dict(llava)
    prefix = "base_model.model."
    names = {name: prefix + in_llava(name.removeprefix(prefix)) for name in get_peft_model_state_dict(ours)}
    left_out = {name for name in weights if name.startswith(prefix + UNUSED)}
    assert set(names.values()) == weights.keys() - left_out and left_out
    set_peft_model_state_dict(ours, {name: weights[llavas] for name, llavas in names.items()})
    return llava, ours


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_on_all_linear_layers(folders, dora, tmp_path):
    "The same before and after merging, and after PEFT has saved and loaded them."
    plain = logits(load(folders.ours))
    llava, ours = adapted(load_both(folders), dora)
    assert_same(llava, ours)
    before = logits(ours)
    assert (before - plain).abs().max() > 0.1
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders.ours), tmp_path).eval()
    assert torch.equal(logits(again), before)
    llava, ours = llava.merge_and_unload(), ours.merge_and_unload()
    assert_same(llava, ours)
    assert_close(logits(ours), before, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_adapters_on_quantized_layers(folders, kind):
    llava, ours = adapted(load_both(folders, **quantized(kind)))
    assert_same(llava, ours)


# ---------------------------------------------------------------- every compressor beside LLaVA


class Choices(TorchFunctionMode):
    """While it lasts, the patches that a model ranks are noted or, with `given`, those are taken.

    The attention of random weights is nearly even: after any rounding, other patches come first, and how far
    the logits move says nothing about the loader."""

    def __init__(self, given=None):
        super().__init__()
        self.given = None if given is None else list(given)
        self.noted = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.__name__ not in ("topk", "argsort"):
            return found
        index = found if function.__name__ == "argsort" else found.indices
        self.noted.append(index)
        if self.given is None:
            return found
        index = self.given.pop(0)
        if function.__name__ == "argsort":
            return index
        return SimpleNamespace(indices=index, values=args[0].gather((kwargs or {}).get("dim", -1), index))


@pytest.fixture(scope="module")
def saved(folders):
    "A folder for each compressor, with LLaVA's tower and LLM and a new projector."
    parts = load(folders.llava).model.vision_tower, load(folders.ours).language_model

    def save(name):
        folder = folders.root / name
        if folder.exists():
            return folder
        tower, llm = copy.deepcopy(parts)
        torch.manual_seed(0)
        like = projector_config(TOWER, d_llm=128, levels=(2, 3, 4, 5))
        config = compressor_config(name, like, tokens=144 if name == "mlp" else 9)
        build_vlm(tower, llm, byte_tokenizer(), config, name).save_pretrained(folder)
        return folder

    return save


def drift(folder, **how):
    "How far the logits move, relative to their size, when a model is loaded in another way; and the model."
    model = load(folder)
    projector = getattr(model, "multi_modal_projector", None)  # LLaVA's is elsewhere
    batch = inputs(model.config.image_seq_length, "text" in getattr(projector, "requires", ()))
    with Choices() as choices:
        plain = logits(model, **batch)
    model = load(folder, **how)
    with Choices(choices.noted) as held:
        found = logits(model, **batch)
    assert not held.given, "not every choice was made again"
    return ((found - plain).norm() / plain.norm()).item(), model


MARGIN = 1.6  # projectors differ; the largest that was found is 1.4


@pytest.fixture(scope="module")
def llavas_drift(folders):
    "What bfloat16, four or eight bits cost LLaVA, and its quantized layers."

    @cache
    def measure(kind):
        how = dict(dtype=torch.bfloat16) if kind == "bfloat16" else quantized(kind)
        found, model = drift(folders.llava, **how)
        return found, how, set() if kind == "bfloat16" else rounded(model)

    return measure


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bfloat16_costs_what_it_costs_llava(saved, llavas_drift, name):
    llava, how, _ = llavas_drift("bfloat16")
    ours, _ = drift(saved(name), **how)
    assert 0 < ours < MARGIN * llava


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_quantization_costs_what_it_costs_llava(saved, llavas_drift, name, kind):
    "All linear layers but the LLM's head are rounded, as in LLaVA, and the logits move about as far."
    llava, how, parts = llavas_drift(kind)
    ours, model = drift(saved(name), **how)
    assert 0 < ours < MARGIN * llava
    assert linear(model) - rounded(model) == {"language_model.lm_head"}
    shared = {in_llava(part) for part in rounded(model) if not part.startswith("multi_modal_projector")}
    wanted = {part for part in parts if "multi_modal_projector" not in part}
    assert shared in (wanted, used(wanted))  # some compressors read the highest block
    assert model.known_fingerprint is None  # other numbers than those of the whole tower
    question = "text" in model.multi_modal_projector.requires
    model.generate(**inputs(model.config.image_seq_length, question), max_new_tokens=2, do_sample=False)
