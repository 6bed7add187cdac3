"""Checkpoints of other layouts.

The sources are written by hand, with the true names and at small width: nothing comes from our own export.
"""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from parity import close, tensors, under
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import byte_tokenizer
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from delta_llava import cli
from delta_llava.answerer import Answerer
from delta_llava.checkpoints import convert
from delta_llava.checkpoints.converting import to_layout_state
from delta_llava.checkpoints.inferring import HEAD, LLAVA_MLP, LLM
from delta_llava.checkpoints.reading import LazyTensor, Weights, write_weights
from delta_llava.compressors.base import build_compressor, compressor_class
from delta_llava.files import new_folder
from delta_llava.runs import load as load_folder
from delta_llava.vlm import DeltaLlavaForConditionalGeneration, build_vlm, load_projector, save_projector

STATE = Path(__file__).parent / "data" / "parity"
VOCAB, D, FF, LAYERS = 264, 64, 48, 2
C, BLOCKS, PATCH, SIDE = (
    128,
    4,
    14,
    56,
)  # a CLIP tower with a 4×4 grid, and 64 channels a head as OpenAI's have
CONFIG = dict(
    model_type="llava_llama",
    architectures=["LlavaLlamaForCausalLM"],
    hidden_size=D,
    intermediate_size=FF,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=VOCAB,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
    rope_scaling=None,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    hidden_act="silu",
    torch_dtype="float32",
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    mm_hidden_size=C,
    mm_vision_tower="openai/clip-vit-tiny-patch14-56",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    use_mm_proj=True,
    mm_use_im_start_end=False,
    mm_use_im_patch_token=False,
    image_aspect_ratio="pad",
    tokenizer_padding_side="right",
    tune_mm_mlp_adapter=False,
)


def draw(shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        k: (torch.randn(s, generator=g) * 0.1 + (1.0 if "norm" in k and k.endswith("weight") else 0.0)).to(
            dtype
        )
        for k, s in shapes.items()
    }


def llm_shapes(prefix="model.", head="lm_head."):
    out = {f"{prefix}embed_tokens.weight": (VOCAB, D)}
    for i in range(LAYERS):
        at = f"{prefix}layers.{i}."
        out |= (
            {f"{at}self_attn.{n}_proj.weight": (D, D) for n in "qkvo"}
            | {f"{at}mlp.{n}_proj.weight": (FF, D) for n in ("gate", "up")}
            | {f"{at}mlp.down_proj.weight": (D, FF)}
        )
        out |= {f"{at}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return out | {f"{prefix}norm.weight": (D,), f"{head}weight": (VOCAB, D)}


def tower_shapes(prefix="model.vision_tower.vision_tower.vision_model."):
    def wb(name, *shape):
        return {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}

    out = {
        f"{prefix}embeddings.class_embedding": (C,),
        f"{prefix}embeddings.patch_embedding.weight": (C, 3, PATCH, PATCH),
        f"{prefix}embeddings.position_embedding.weight": (1 + (SIDE // PATCH) ** 2, C),
    }
    out |= wb("pre_layrnorm", C)
    for i in range(BLOCKS):
        at = f"encoder.layers.{i}."
        for n in "kvq":
            out |= wb(f"{at}self_attn.{n}_proj", C, C)
        out |= (
            wb(f"{at}self_attn.out_proj", C, C)
            | wb(f"{at}layer_norm1", C)
            | wb(f"{at}mlp.fc1", 64, C)
            | wb(f"{at}mlp.fc2", C, 64)
            | wb(f"{at}layer_norm2", C)
        )
    return out | wb("post_layernorm", C)


def mlp_shapes(prefix="model.mm_projector.", one="0.", two="2."):
    return {
        f"{prefix}{one}weight": (D, C),
        f"{prefix}{one}bias": (D,),
        f"{prefix}{two}weight": (D, D),
        f"{prefix}{two}bias": (D,),
    }


def delta_shapes(prefix="model.mm_projector."):
    "The authors' 45 tensors: names of the stored fixture, sizes of this model (96 is the fixture's LLM)."
    return {
        prefix + k: tuple(D if s == 96 and k.startswith("mlp.") else s for s in v.shape)
        for k, v in under(STATE, "delta_llava", "state.").items()
    }


def write(state, folder, kind="safetensors", parts=1, config=None, stem=None):
    "A checkpoint as HF's savers lay it out."
    folder.mkdir(parents=True, exist_ok=True)
    save = (lambda s, p: save_file(s, p, metadata={"format": "pt"})) if kind == "safetensors" else torch.save
    stem = stem or ("model" if kind == "safetensors" else "pytorch_model")
    names, where = list(state), {}
    for i in range(parts):
        file = f"{stem}.{kind}" if parts == 1 else f"{stem}-{i + 1:05}-of-{parts:05}.{kind}"
        part_names = names[i::parts]
        save({k: state[k] for k in part_names}, folder / file)
        where |= dict.fromkeys(part_names, file)
    if parts > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(left, right, names=None):
    "Byte for byte, in the same precision."
    assert names is not None or set(left) == set(right), set(left) ^ set(right)
    for k in left if names is None else names:
        assert (
            left[k].dtype == right[k].dtype
            and left[k].shape == right[k].shape
            and torch.equal(left[k], right[k])
        ), k


def read(folder):
    weights = Weights(folder)
    return {k: weights[k] for k in weights.shapes}


# ---- projectors
def fixture(name):
    "State by the reference's names, the file's prefix, and what shapes cannot tell."
    if name == "delta":
        return (
            under(STATE, "delta_llava", "state."),
            "model.mm_projector.",
            dict(grid=8, tokens=16, levels=(2, 3), heads=4),
        )
    if name == "tokenpacker":
        return under(STATE, "tokenpacker", "state."), "model.mm_projector.", dict(grid=4, tokens=4, heads=4)
    if name == "mqt":
        return (
            under(STATE, "mqt_resampler", "state."),
            "model.query_abstractor.",
            dict(grid=12, tokens=9, heads=4),
        )
    if name == "quecc":
        state = under(STATE, "quecc", "state.") | under(STATE, "quecc", "state_g4k2.")
        return state, "model.mm_projector.", dict(grid=4)
    if name == "cabstractor":
        return under(STATE, "honeybee_cabstractor", "state.d2_q25_eos2."), "abstractor.", dict(tokens=27)
    if name == "qwen":
        return (
            {f"attn_pool.{k}": v for k, v in under(STATE, "qwen_resampler", "state.").items()},
            "transformer.visual.",
            dict(grid=8, levels=(5,), heads=2),
        )
    case = {"mlp": "mlp2x_gelu", "linear": "linear"}[name]
    return under(STATE, "llava_mlp", f"state.{case}."), "model.mm_projector.", dict(grid=4, compressor="mlp")


KINDS = ("delta", "tokenpacker", "mqt", "quecc", "cabstractor", "qwen", "mlp", "linear")


def stage1(tmp_path, name, kind="bin", dtype=None):
    state, prefix, overrides = fixture(name)
    state = {prefix + k: v if dtype is None else v.to(dtype) for k, v in state.items()}
    folder = write(state, tmp_path / "authors", kind, stem="mm_projector")
    return state, folder / f"mm_projector.{kind}", overrides


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_projector_there_and_back(name, kind, tmp_path):
    state, file, overrides = stage1(tmp_path, name, kind)
    done = convert(file, tmp_path / "ours", **overrides)
    assert done.config == load_projector(tmp_path / "ours").config
    convert(tmp_path / "ours", tmp_path / "back", to="authors", format=kind)
    same(state, read(tmp_path / "back" / f"mm_projector.{kind}"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["delta", "mlp"])
def test_precision_is_kept(name, dtype, tmp_path):
    state, file, overrides = stage1(tmp_path, name, dtype=dtype)
    convert(file, tmp_path / "ours", **overrides)
    assert {v.dtype for v in load_file(tmp_path / "ours" / "projector.safetensors").values()} == {dtype}
    convert(tmp_path / "ours", tmp_path / "back", to="authors")
    same(state, read(tmp_path / "back"))


def test_delta_computes_what_the_authors_code_does(tmp_path):
    _, file, overrides = stage1(tmp_path, "delta")
    convert(file, tmp_path / "ours", **overrides)
    projector, t = load_projector(tmp_path / "ours"), tensors(STATE, "delta_llava")
    assert (
        projector.config.rank,
        projector.config.head_dim,
        projector.config.mlp_ratio,
        projector.config.mix_ratio,
    ) == (16, 32, 2, 0.75)
    single, multi = t["in.g8.single"], t["in.g8.multi"]
    close(projector.project(multi, single, 4), t["out.g8s2"], "output")


def test_tokenpacker_computes_what_its_code_does(tmp_path):
    _, file, overrides = stage1(tmp_path, "tokenpacker")
    convert(file, tmp_path / "ours", **overrides)
    t = tensors(STATE, "tokenpacker")
    close(
        load_projector(tmp_path / "ours").project(t["in.g4.multi"], t["in.g4.single"], 2),
        t["out.g4s2"],
        "output",
    )


def test_mlp_computes_what_its_code_does(tmp_path):
    state, file, overrides = stage1(tmp_path, "mlp")
    convert(file, tmp_path / "ours", **overrides)
    x, w = torch.randn(1, 16, 48), {k.removeprefix("model.mm_projector."): v for k, v in state.items()}
    close(
        load_projector(tmp_path / "ours")(x),
        F.linear(F.gelu(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"]),
        "output",
    )


@pytest.mark.parametrize(
    "prefix", ["base_model.model.model.mm_projector.", "mm_projector.", "module.model.mm_projector."]
)
def test_prefixes_of_lora_and_parallel_training(prefix, tmp_path):
    state, _, overrides = fixture("mlp")
    file = (
        write({prefix + k: v for k, v in state.items()}, tmp_path, "bin", stem="non_lora_trainables")
        / "non_lora_trainables.bin"
    )
    convert(file, tmp_path / "ours", **overrides)
    same({f"mlp.{k}": v for k, v in state.items()}, load_file(tmp_path / "ours" / "projector.safetensors"))


@pytest.mark.parametrize(
    "name,wanted",
    [
        ("delta", dict(levels=(12, 16, 22, 23), grid=24, tokens=144, heads=8)),
        ("tokenpacker", dict(levels=(12, 16, 22, 23), grid=24, tokens=144, heads=8)),
        ("mlp", dict(levels=(23,), grid=24, tokens=576)),
        ("m3", dict(levels=(23,), grid=24, tokens=576)),
        ("fastv", dict(levels=(23,), tokens=144)),
        ("mqt", dict(levels=(23,), grid=24, tokens=256, heads=16)),
    ],
)
def test_defaults_are_the_published_ones(name, wanted, tmp_path):
    c, d = 128, 64
    reference = build_compressor(
        name,
        compressor_class(name).Config(
            d_vision=c, d_llm=d, levels=(1, 2, 3, 4) if name in ("delta", "tokenpacker") else (1,)
        ),
    )
    layout_state = to_layout_state(reference, reference.state_dict())
    write(
        {(reference.prefix or "model.mm_projector.") + k: v.contiguous() for k, v in layout_state.items()},
        tmp_path,
        "bin",
        stem="mm_projector",
    )
    done = convert(tmp_path / "mm_projector.bin", tmp_path / "ours", compressor=name)
    assert {k: getattr(done.config, k) for k in wanted} == wanted
    assert done.config.d_vision == c and done.config.d_llm == d
    assert set(done.assumed) == {"grid", "levels", "tokens"} | (
        {"heads"} & set(wanted)
    ) and "taken as published" in str(done)


@pytest.mark.parametrize("scale,tokens", [(1, 576), (2, 144), (3, 64), (4, 36), (6, 16), (24, 1)])
def test_scale_factor_of_the_config_is_the_budget(scale, tokens, tmp_path):
    reference = build_compressor("delta", compressor_class("delta").Config(d_vision=128, d_llm=64))
    layout_state = to_layout_state(reference, reference.state_dict())
    write(
        {"model.mm_projector." + k: v.contiguous() for k, v in layout_state.items()},
        tmp_path,
        "bin",
        stem="mm_projector",
        config=dict(
            mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2, scale_factor=scale
        ),
    )
    done = convert(tmp_path / "mm_projector.bin", tmp_path / "ours")
    assert done.config.tokens == tokens and set(done.assumed) == {"levels", "heads"}
    convert(tmp_path / "ours", tmp_path / "back", to="authors")


# ---- what is refused
def test_names_that_are_missing_unknown_or_misshapen(tmp_path):
    state, prefix, overrides = fixture("delta")
    state = {prefix + k: v for k, v in state.items()}
    some = prefix + "combined_block.ntb.mhca.norm.weight"
    cases = [
        ({k: v for k, v in state.items() if k != some}, f"lacks 1 tensors, e.g. '{some}' of shape (32,)"),
        (state | {prefix + "extra": torch.ones(1)}, f"has 1 unknown tensors, e.g. '{prefix}extra'"),
        (state | {some: torch.ones(31)}, f"has '{some}' of shape (31,) instead of (32,)"),
        ({k: v for k, v in state.items() if "mlp.2" not in k}, f"lacks '{prefix}mlp.2.weight'"),
        (state | {"encoder.weight": torch.ones(1)}, "'encoder.weight' is no name of the layout"),
        ({"model.mm_projector.foo": torch.ones(1)}, "holds no projector that is known here"),
        ({"model.layers.0.x": torch.ones(1)}, "has no config.json"),
    ]
    for i, (wrong, words) in enumerate(cases):
        file = write(wrong, tmp_path / str(i), "bin", stem="mm_projector") / "mm_projector.bin"
        with pytest.raises(ValueError) as error:
            convert(file, tmp_path / "ours", **overrides)
        assert words in str(error.value), error.value
        assert not (tmp_path / "ours").exists()


def test_settings_that_are_missing_or_contradict(tmp_path):
    _, file, overrides = stage1(tmp_path, "delta")
    for wrong, words in [
        (dict(overrides, levels=None), "levels is missing: the projector reads 2 levels"),
        (dict(overrides, levels=(1, 2, 3)), "are 3, but the weights read 2"),
        (dict(overrides, heads=3), "heads=3 must divide"),
        (dict(overrides, rank=8), "rank=8, but the weights say rank=16"),
        (dict(overrides, tokens=10), "tokens=10 must be the square"),
        (dict(overrides, compressor="mqt"), "compressor='mqt', but the weights are those of 'delta'"),
        (dict(overrides, nonsense=1), "are no settings of 'delta'"),
        (dict(overrides, to="gguf"), "use one of"),
        (dict(overrides, to="authors"), "convert it to 'ours' first"),
        (dict(overrides, format="pt"), "use 'bin' or 'safetensors'"),
    ]:
        with pytest.raises(ValueError) as error:
            convert(file, tmp_path / "ours", **wrong)
        assert words in str(error.value), error.value
    with pytest.raises(ValueError, match="compressor is missing.*mlp, m3, prumerge"):
        convert(stage1(tmp_path / "m", "mlp")[1], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("old", [False, True])
def test_a_program_in_a_bin_is_not_run(old, tmp_path):
    torch.save(
        {"model.mm_projector.0.weight": torch.ones(2, 2), "x": Harmful(tmp_path / "harm")},
        tmp_path / "mm_projector.bin",
        _use_new_zipfile_serialization=not old,
    )
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert(tmp_path / "mm_projector.bin", tmp_path / "ours", compressor="mlp")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "ours").exists()


def test_files_of_the_old_format_are_read(tmp_path):
    state, _, overrides = fixture("mlp")
    state = {f"model.mm_projector.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "mm_projector.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path / "mm_projector.bin", tmp_path / "ours", **overrides)


def test_damaged_files(tmp_path):
    for kind, stem in (("bin", "mm_projector"), ("safetensors", "mm_projector")):
        state, _, overrides = fixture("mlp")
        file = (
            write({f"model.mm_projector.{k}": v for k, v in state.items()}, tmp_path / kind, kind, stem=stem)
            / f"{stem}.{kind}"
        )
        file.write_bytes(file.read_bytes()[:300])
        with pytest.raises(ValueError, match="damaged"):
            convert(file, tmp_path / "ours", **overrides)
    torch.save(torch.ones(3), tmp_path / "t.bin")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        convert(tmp_path / "t.bin", tmp_path / "ours")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        convert(tmp_path / "none", tmp_path / "ours")
    with pytest.raises(ValueError, match="holds no weights"):
        convert(tmp_path, tmp_path / "ours")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="LoRA adapter.*Merge it.*non_lora_trainables.bin"):
        convert(tmp_path / "lora", tmp_path / "ours")
    folder = write(draw(mlp_shapes()), tmp_path / "parts", "bin", parts=2, config=CONFIG)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="lacks 'pytorch_model-00002-of-00002.bin'"):
        convert(folder, tmp_path / "ours")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps(dict(weight_map={"a": "../../etc/x.bin"}))
    )
    with pytest.raises(ValueError, match="not in its folder"):
        convert(folder, tmp_path / "ours")


def test_targets_that_are_taken(tmp_path):
    _, file, overrides = stage1(tmp_path, "mlp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for target in ("full", "file"):
        with pytest.raises(ValueError, match="exists and is not empty"):
            convert(file, tmp_path / target, **overrides)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["own.txt"] and (
        tmp_path / "file"
    ).read_text() == "keep"
    (tmp_path / "empty").mkdir()
    convert(file, tmp_path / "empty", **overrides)
    load_projector(tmp_path / "empty")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(stop, tmp_path, monkeypatch):
    folder, calls = authors(tmp_path / "authors"), []
    read_one = Weights.__getitem__

    def broken(self, name):
        calls.append(name)
        if len(calls) == 60:
            raise stop  # after the projector, in the middle of the LLM
        return read_one(self, name)

    monkeypatch.setattr(Weights, "__getitem__", broken)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(folder, tmp_path / "out" / "ours", **DELTA)
    assert list((tmp_path / "out").iterdir()) == []


# ---- whole models of the authors
DELTA = dict(levels=(1, 3), heads=4, tokens=4)


def authors(
    folder,
    kind="safetensors",
    parts=1,
    tower=True,
    projector=None,
    dtype=torch.float32,
    config=None,
    more=None,
):
    state = draw(
        llm_shapes()
        | (tower_shapes() if tower else {})
        | (delta_shapes() if projector is None else projector),
        dtype,
    ) | (more or {})
    return write(
        state,
        folder,
        kind,
        parts,
        config=CONFIG | dict(scale_factor=2, mm_projector_type="delatallava") | (config or {}),
    )


def load(folder):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    return model.eval()


def kept(state):
    "What ours has a place for: without the tower's last block, which nobody reads."
    return {k: v for k, v in state.items() if f"encoder.layers.{BLOCKS - 1}." not in k}


@pytest.mark.parametrize("kind,parts", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_whole_model_there_and_back(kind, parts, tmp_path):
    folder = authors(tmp_path / "authors", kind, parts)
    done = convert(folder, tmp_path / "ours", heads=4, levels=(1, 3))
    assert (
        done.config.tokens == 4 and done.config.grid == 4 and len(done.dropped) == 16 and done.assumed == {}
    )
    assert load(tmp_path / "ours").config.vision_config.num_hidden_layers == BLOCKS - 1
    convert(tmp_path / "ours", tmp_path / "back", to="authors", format=kind, part_size=200_000)
    same(kept(read(folder)), read(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob(f"*-of-*.{kind}"))) > 1
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: config.get(k, "none") for k in json.loads((folder / "config.json").read_text())} == json.loads(
        (folder / "config.json").read_text()
    )
    convert(tmp_path / "back", tmp_path / "again", heads=4, levels=(1, 3))
    same(read(tmp_path / "ours"), read(tmp_path / "again"))


@torch.no_grad()
def test_whole_model_computes_what_its_parts_do(tmp_path):
    "LLM and tower from the same tensors by transformers' own classes, the visual tokens put in by hand."
    folder = authors(tmp_path / "authors")
    convert(folder, tmp_path / "ours", **DELTA)
    ours, state = load(tmp_path / "ours"), read(folder)
    llm = LlamaForCausalLM(
        LlamaConfig(
            **{
                k: v
                for k, v in CONFIG.items()
                if not k.startswith(("mm_", "model_type", "torch_dtype", "rope", "architectures"))
            },
            rope_parameters=dict(rope_theta=5000.0, rope_type="default"),
        )
    ).eval()
    llm.load_state_dict({k: v for k, v in state.items() if k in llm.state_dict()})
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=C,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=BLOCKS,
            image_size=SIDE,
            patch_size=PATCH,
        )
    ).eval()
    tower.load_state_dict(
        {
            k: state["model.vision_tower.vision_tower.vision_model." + k.removeprefix("vision_model.")]
            for k in tower.state_dict()
        }
    )
    pixels = torch.randn(1, 3, SIDE, SIDE)
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    levels = torch.cat([hidden[1][:, 1:], hidden[3][:, 1:]], dim=-1)
    visual = ours.multi_modal_projector(levels)
    before, after = torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9]])
    words = llm.get_input_embeddings()
    wanted = llm(inputs_embeds=torch.cat([words(before), visual, words(after)], dim=1)).logits
    ids = torch.cat([before, torch.full((1, 4), VOCAB), after], dim=1)
    got = ours(input_ids=ids, pixel_values=pixels).logits
    assert ours.config.image_token_id == VOCAB and got.shape[-1] == VOCAB + 1
    close(got[..., :VOCAB], wanted, "logits")
    assert not got[..., VOCAB].any()  # the row of <image> is zero
    assert ours.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2, do_sample=False).shape == (
        1,
        11,
    )


def test_tower_from_a_folder_when_the_checkpoint_lacks_it(tmp_path):
    folder = authors(tmp_path / "authors", tower=False)
    with pytest.raises(ValueError, match="tower is missing.*openai/clip-vit-tiny-patch14-56"):
        convert(folder, tmp_path / "ours", **DELTA)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=C,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=BLOCKS,
            image_size=SIDE,
            patch_size=PATCH,
        )
    )
    tower.save_pretrained(tmp_path / "clip")
    convert(folder, tmp_path / "ours", tower=tmp_path / "clip", **DELTA)
    ours = load(tmp_path / "ours").vision_tower.state_dict()
    same(ours, tower.state_dict(), names=list(ours))
    done = convert(folder, tmp_path / "part", projector_only=True, grid=4, **DELTA)
    assert "load_projector" in done.written and load_projector(tmp_path / "part").config.grid == 4


def test_tower_of_another_maker_must_be_named(tmp_path):
    folder = authors(tmp_path / "authors", config=dict(mm_vision_tower="laion/CLIP-ViT-H-14"))
    with pytest.raises(ValueError, match="tower is missing.*heads and activation"):
        convert(folder, tmp_path / "ours", **DELTA)


@pytest.mark.parametrize(
    "change", [dict(mm_vision_select_feature="cls_patch"), dict(mm_use_im_start_end=True)]
)
def test_fields_that_would_be_computed_differently_here(change, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*cannot be converted"):
        convert(authors(tmp_path / "authors", config=change), tmp_path / "ours", **DELTA)


def test_computed_buffers_of_old_versions_are_left_out(tmp_path):
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    convert(authors(tmp_path / "authors", more=more), tmp_path / "ours", **DELTA)
    assert not any("inv_freq" in k or "position_ids" in k for k in read(tmp_path / "ours"))


def test_an_unknown_tensor_of_a_whole_model_is_refused(tmp_path):
    folder = authors(tmp_path / "authors", more={"model.image_newline": torch.ones(D)})
    with pytest.raises(ValueError, match="unknown tensors.*image_newline"):
        convert(folder, tmp_path / "ours", **DELTA)
    folder = authors(tmp_path / "short")
    state = read(folder)
    write({k: v for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}, folder)
    with pytest.raises(
        ValueError, match="lacks 1 tensors, e.g. 'language_model.model.layers.1.mlp.up_proj.weight'"
    ):
        convert(folder, tmp_path / "ours", **DELTA)
    with pytest.raises(ValueError, match="model_type='llava_mpt'"):
        convert(authors(tmp_path / "mpt", config=dict(model_type="llava_mpt")), tmp_path / "ours", **DELTA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_of_a_whole_model(dtype, tmp_path):
    folder = authors(
        tmp_path / "authors",
        "bin",
        2,
        dtype=dtype,
        config=dict(torch_dtype=str(dtype).removeprefix("torch.")),
    )
    convert(folder, tmp_path / "ours", **DELTA)
    assert {v.dtype for v in read(tmp_path / "ours").values()} == {dtype} and load(
        tmp_path / "ours"
    ).dtype == dtype
    convert(tmp_path / "ours", tmp_path / "back", to="authors")
    same(kept(read(folder)), read(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == str(
        dtype
    ).removeprefix("torch.")


@pytest.mark.parametrize("stored", [True, False])
def test_tied_head(stored, tmp_path):
    folder = authors(tmp_path / "authors", config=dict(tie_word_embeddings=True))
    state = read(folder)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if not stored:
        del state["lm_head.weight"]
    write(state, folder)
    convert(folder, tmp_path / "ours", **DELTA)
    model = load(tmp_path / "ours")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("lm_head" in name for name in read(tmp_path / "ours"))
    convert(tmp_path / "ours", tmp_path / "back", to="authors")
    same({k: v for k, v in kept(state).items() if k != "lm_head.weight"}, read(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_head_that_differs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tie_word_embeddings is true.*would be lost"):
        convert(
            authors(tmp_path / "authors", config=dict(tie_word_embeddings=True)), tmp_path / "ours", **DELTA
        )


def test_tied_head_that_shares_memory_in_a_bin(tmp_path):
    folder = authors(tmp_path / "authors")
    state = read(folder)
    (folder / "model.safetensors").unlink()
    write(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, folder, "bin")
    convert(folder, tmp_path / "ours", **DELTA)
    ours = read(tmp_path / "ours")
    assert torch.equal(ours[HEAD + "weight"], ours[LLM + "embed_tokens.weight"])


def test_vocabulary_grows_by_image_and_shrinks_again(tmp_path):
    folder = authors(tmp_path / "authors")
    byte_tokenizer(pieces=("<|im_start|>",)).save_pretrained(
        folder
    )  # 259 tokens in 264 rows: <image> gets a row that is there
    convert(folder, tmp_path / "ours", **DELTA)
    model = load(tmp_path / "ours")
    assert model.config.image_token_id == 259 and model.config.text_config.vocab_size == VOCAB
    convert(tmp_path / "ours", tmp_path / "back", to="authors")
    same(kept(read(folder)), read(tmp_path / "back"))
    grown = authors(tmp_path / "grown")
    convert(grown, tmp_path / "grown-ours", **DELTA)
    state = read(tmp_path / "grown-ours")
    for k in (LLM + "embed_tokens.weight", HEAD + "weight"):
        assert len(state[k]) == VOCAB + 1 and not state[k][VOCAB].any()
    done = convert(tmp_path / "grown-ours", tmp_path / "grown-back", to="authors")
    assert (
        json.loads((tmp_path / "grown-back" / "config.json").read_text())["vocab_size"] == VOCAB
        and "row 264" in done.dropped[0]
    )


def test_a_model_of_ours_that_never_was_the_authors(tmp_path):
    "It holds no config, so the tower's name must be given; the fields come from ours."
    convert(authors(tmp_path / "authors"), tmp_path / "ours", **DELTA)
    (tmp_path / "ours" / "authors_config.json").unlink()
    with pytest.raises(ValueError, match="tower is missing: the authors' code loads the tower by name"):
        convert(tmp_path / "ours", tmp_path / "back", to="authors")
    convert(tmp_path / "ours", tmp_path / "back", to="authors", tower="openai/clip-vit-tiny-patch14-56")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    for k in (
        "model_type",
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "torch_dtype",
        "mm_hidden_size",
        "mm_vision_tower",
        "mm_vision_select_feature",
    ):
        assert config[k] == CONFIG[k], k
    assert (
        config["scale_factor"] == 2
        and config["mm_vision_select_layer"] == 3
        and "rope_parameters" not in config
    )
    same(kept(read(tmp_path / "authors")), read(tmp_path / "back"))


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(order="project-mix"), "order"),
        (dict(query_pool="mean"), "query_pool"),
        (dict(standardize=True), "standardize=True"),
        (dict(tokens=9), "does not cut the 4×4 grid evenly"),
    ],
)
def test_what_the_authors_code_cannot_compute_is_refused(change, words, tmp_path):
    config = compressor_class("delta").Config(
        **dict(grid=4, tokens=4, levels=(1, 3), d_vision=128, d_llm=64, heads=4) | change
    )
    save_projector(build_compressor("delta", config), tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "ours", tmp_path / "back", to="authors")
    assert not (tmp_path / "back").exists()


OLD_PREFIXES = {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@pytest.mark.parametrize("to", ["authors", "llava-hf"])
def test_a_model_folder_of_an_earlier_version_is_converted(to, tmp_path):
    "Names as `save_pretrained` wrote them before the model held a whole causal LM."
    if to == "authors":
        convert(authors(tmp_path / "authors"), tmp_path / "ours", **DELTA)
    else:
        hf(tmp_path / "hf")
        convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to=to)
    new = read(tmp_path / "ours")
    assert {k.split(".")[0] for k in new} == {"vision_tower", "multi_modal_projector", "language_model"}
    old = {}
    for name, tensor in new.items():
        prefix = next(p for p in OLD_PREFIXES if name.startswith(p))
        old[OLD_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    write(old, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", to=to)
    same(read(tmp_path / "back"), read(tmp_path / "again"))


def test_a_damaged_folder_of_ours_is_refused(tmp_path):
    convert(authors(tmp_path / "authors"), tmp_path / "ours", **DELTA)
    state = read(tmp_path / "ours")
    name = "multi_modal_projector.mlp.2.bias"
    for wrong, words in (
        ({k: v for k, v in state.items() if k != name}, "lacks 1 tensors, e.g. 'mlp.2.bias'"),
        (state | {"multi_modal_projector.extra": torch.ones(1)}, "has unknown 1 tensors, e.g. 'extra'"),
        (state | {name: torch.ones(3)}, "size mismatch for mlp.2.bias"),
    ):
        write(wrong, tmp_path / "ours")
        with pytest.raises(ValueError, match=words) as error:
            convert(tmp_path / "ours", tmp_path / "back", to="authors")
        assert "\n" not in str(error.value)
    (tmp_path / "ours" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert(tmp_path / "ours", tmp_path / "back", to="authors")
    assert not (tmp_path / "back").exists()


# ---- llava-hf
def hf(folder, layer=-2, seed=0, depth=LAYERS, **config):
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=C,
                intermediate_size=64,
                num_attention_heads=2,
                num_hidden_layers=BLOCKS,
                image_size=SIDE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=D,
                intermediate_size=FF,
                num_hidden_layers=depth,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            ),
            image_token_index=259,
            vision_feature_layer=layer,
            image_seq_length=16,
            **config,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # biases are zero at the start, and would hide
    model.save_pretrained(folder)
    return model


HUB = {
    "language_model.model.": "language_model.model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "multi_modal_projector.": "multi_modal_projector.",
    "vision_tower.": "vision_tower.vision_model.",
}
IDS = torch.tensor([[5, 6, *[259] * 16, 7, 8, 9]])


def respelled(folder, spelling):
    "The same checkpoint as transformers saves it now, as on the hub, or under the names of the modules."
    state = read(folder)
    if spelling == "hub":
        state = {
            next(new + k.removeprefix(old) for old, new in HUB.items() if k.startswith(old)): v
            for k, v in state.items()
        }
    if spelling == "modules":
        state = {
            "lm_head.weight"
            if "lm_head" in k
            else "model." + k.replace("language_model.model.", "language_model."): v
            for k, v in state.items()
        }
    return write(state, folder, config=json.loads((folder / "config.json").read_text()))


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["saved", "hub", "modules"])
@pytest.mark.parametrize("layer", [-2, -1, 2])
def test_llava_hf_gives_the_same_logits(spelling, layer, tmp_path):
    llava_hf, pixels = hf(tmp_path / "hf", layer), torch.randn(1, 3, SIDE, SIDE)
    done = convert(respelled(tmp_path / "hf", spelling), tmp_path / "ours")
    assert done.config.levels == (layer if layer > 0 else BLOCKS + 1 + layer,) and done.config.tokens == 16
    ours = load(tmp_path / "ours")
    wanted = llava_hf(input_ids=IDS, pixel_values=pixels).logits
    assert torch.equal(ours(input_ids=IDS, pixel_values=pixels).logits, wanted)
    convert(tmp_path / "ours", tmp_path / "back", to="llava-hf")
    again, problems = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert torch.equal(again.eval()(input_ids=IDS, pixel_values=pixels).logits, wanted)


@torch.no_grad()
def test_llava_hf_there_and_back_is_byte_equal(tmp_path):
    llava_hf = hf(tmp_path / "hf")
    source = read(respelled(tmp_path / "hf", "hub"))
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "short", to="llava-hf")
    same(kept(source), read(tmp_path / "short"))
    llava_hf.model.vision_tower.save_pretrained(tmp_path / "clip")
    convert(
        tmp_path / "ours", tmp_path / "whole", to="llava-hf", tower=tmp_path / "clip"
    )  # with the block that nobody reads
    same(source, read(tmp_path / "whole"))
    config, old = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("whole", "hf"))
    for part in ("vision_config", "text_config"):
        exported, loaded = config.pop(part), old.pop(part)
        assert {k: exported[k] for k in loaded} == loaded
    assert {k: config[k] for k in old} == old


def by_hand(name, llava_hf, pixels, v):
    "Visual tokens of a training-free system from transformers' own model, patch by patch; `None`: not here."
    llava_hf.set_attn_implementation("eager")  # fused attention does not return its weights
    tower = llava_hf.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    patches, side = tower.hidden_states[-2][0, 1:], math.isqrt(v)
    project = llava_hf.model.multi_modal_projector
    cell = 4 // side  # patches per side

    def patch(row, column):
        return patches[4 * row + column]

    def cells():
        for row, column in itertools.product(range(side), repeat=2):
            rows, columns = (range(cell * i, cell * (i + 1)) for i in (row, column))
            yield [patch(i, j) for i in rows for j in columns]

    if name == "mlp":
        return project(patches)
    if name == "m3":
        return torch.stack([sum(project(p) for p in own) / len(own) for own in cells()])
    if name == "meanpool":
        return project(torch.stack([sum(own) / len(own) for own in cells()]))
    if name == "spaced":
        return project(torch.stack([own[-1] for own in cells()]))  # right below the center of 2×2 patches
    if name == "random":
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
        return project(torch.stack([patches[i] for i in sorted(order[:v])]))
    if name == "fastervlm":
        received = tower.attentions[-2][0, :, 0, 1:].mean(0).tolist()
        ranked = sorted(range(16), key=lambda i: -received[i])
        return project(torch.stack([patches[i] for i in sorted(ranked[:v])]))
    return None


@torch.no_grad()
@pytest.mark.parametrize("name", LLAVA_MLP)
def test_llava_hf_answers_with_every_training_free_system(name, tmp_path, capsys):
    "One checkpoint of llava-hf, converted for each system on the command line, and asked there."
    llava_hf = hf(tmp_path / "hf", depth=4)
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(tmp_path / "hf")
    v = 16 if name == "mlp" else 4
    paths = [str(tmp_path / "hf"), str(tmp_path / "ours")]
    cli.main(["convert", *paths, "--compressor", name, "--tokens", str(v)])
    model, processor = load_folder(tmp_path / "ours")
    assert (model.config.compressor, model.config.projector_config().tokens) == (name, v)
    image = Image.effect_noise((90, 60), 60).convert("RGB")
    image.save(tmp_path / "image.png")
    batch = processor([image], ["<image>\nWhat?"])
    ours = model(**batch).logits[0, -1]
    visual = by_hand(name, llava_hf, batch["pixel_values"], v)
    if visual is not None:
        embeds = llava_hf.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == 259] = visual
        assert_close(ours, llava_hf(inputs_embeds=embeds).logits[0, -1], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    command = [
        "chat",
        "--output-dir",
        paths[1],
        "--image",
        str(tmp_path / "image.png"),
        "--question",
        "What?",
    ]
    cli.main([*command, "--max-new-tokens", "3"])
    answer = Answerer(model, processor).answer(image, "What?", max_new_tokens=3)
    assert capsys.readouterr().out.strip().endswith(answer.strip())


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy='full'"),
        (dict(projector_hidden_act="relu"), "projector_hidden_act='relu'"),
        (dict(multimodal_projector_bias=False), "multimodal_projector_bias=False"),
        (dict(vision_feature_layer=[-2, -1]), "the MLP here reads one level"),
    ],
)
def test_llava_hf_that_ours_has_no_place_for(change, words, tmp_path):
    hf(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        convert(tmp_path / "hf", tmp_path / "ours")


def test_only_an_mlp_becomes_llava_hf(tmp_path):
    convert(authors(tmp_path / "authors"), tmp_path / "ours", **DELTA)
    with pytest.raises(ValueError, match="compressor='delta': llava-hf knows the MLP"):
        convert(tmp_path / "ours", tmp_path / "back", to="llava-hf")
    convert(authors(tmp_path / "mlp", projector=mlp_shapes()), tmp_path / "mlp-ours", compressor="mlp")
    convert(tmp_path / "mlp-ours", tmp_path / "hf", to="llava-hf")
    _, problems = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]


@torch.no_grad()
def test_a_llava_hf_model_starts_a_delta_model(tmp_path):
    "Its tower and LLM with a fresh projector between them."
    llava_hf = hf(tmp_path / "hf")
    llm = LlamaForCausalLM(llava_hf.config.text_config)
    llm.model, llm.lm_head = llava_hf.model.language_model, llava_hf.lm_head
    config = compressor_class("delta").Config(grid=4, tokens=4, levels=(1, 3), d_vision=C, d_llm=D, heads=4)
    model = build_vlm(llava_hf.model.vision_tower, llm, byte_tokenizer(), config)
    assert model.get_decoder() is llava_hf.model.language_model and model.language_model is llm
    ids = torch.tensor([[5, *[model.config.image_token_id] * 4, 7]])
    assert model(input_ids=ids, pixel_values=torch.randn(1, 3, SIDE, SIDE)).logits.isfinite().all()


# ---- memory
def test_no_more_than_one_file_is_open(tmp_path):
    folder = authors(tmp_path / "authors", "bin", 3)
    weights = Weights(folder)
    for name in weights.shapes:
        weights[name]
        assert weights.open_path == weights.file_of[name]


def test_parts_hold_no_more_than_asked(tmp_path):
    state = {f"w{i}": torch.randn(100) for i in range(7)}
    with new_folder(tmp_path / "parts") as folder:
        lazy = {k: LazyTensor((100,), v.clone) for k, v in state.items()}
        files = write_weights(lazy, folder, part_size=900)
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert max(sum(t.nbytes for t in load_file(tmp_path / "parts" / f.name).values()) for f in files) <= 900
    same(state, read(tmp_path / "parts"))
    assert (
        json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["metadata"][
            "total_size"
        ]
        == 2800
    )


# ---------------------------------------------------------------- LLMs of other makes


SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=D,
    intermediate_size=FF,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MAKES = {  # the authors' model_type -> transformers', and more fields
    "llava_seed_oss": ("seed_oss", dict(head_dim=16, attention_bias=True)),
    "llava_gemma": ("gemma", dict(head_dim=16)),
    "llava_gemma2": ("gemma2", dict(head_dim=16, final_logit_softcapping=3.0)),
    "llava_phi": ("phi", {}),
    "llava_phi3": ("phi3", {}),
    "llava_qwen3": ("qwen3", dict(head_dim=16)),
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", MAKES)
def test_llms_of_other_makes(model_type, tmp_path):
    "The file has the names that transformers' own class of the LLM saves."
    kind, more = MAKES[model_type]
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).eval()
    for weight in llm.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    state = {k: v.clone() for k, v in llm.state_dict().items()}
    if llm.config.tie_word_embeddings:
        del state["lm_head.weight"]
    fields = llm.config.to_dict() | dict(model_type=model_type)
    kept_fields = {k: v for k, v in CONFIG.items() if k.startswith(("mm_", "use_", "image_"))}
    folder = write(
        state | draw(tower_shapes() | mlp_shapes()), tmp_path / "authors", config=fields | kept_fields
    )
    convert(folder, tmp_path / "ours", compressor="mlp")
    model = load(tmp_path / "ours")
    assert model.config.text_config.model_type == kind
    ids = torch.tensor([[1, 5, 9, 200]])
    found = model(ids).logits
    torch.testing.assert_close(found[..., :VOCAB], llm(ids).logits, atol=1e-4, rtol=1e-4)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 9]])
    assert model(ids, torch.randn(1, 3, SIDE, SIDE)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shape", [(0,), (0, D)])
def test_tensors_that_zero3_left_empty(shape, kind, tmp_path):
    state = draw(delta_shapes())
    state[min(state)] = torch.zeros(shape)
    file = write(state, tmp_path / "stage1", kind, stem="mm_projector")
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are empty, .*of shape \(0,.*zero_to_fp32"):
        convert(file, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_nan_and_infinity_are_refused(whole, number, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight" if whole else min(delta_shapes())
    if whole:
        folder = authors(tmp_path / "authors", more={name: torch.full((FF, D), number)})
    else:
        state = draw(delta_shapes())
        state[name].view(-1)[3] = number
        folder = write(state, tmp_path / "stage1", stem="mm_projector")
    kind = "NaN" if number != number else "infinite"
    with pytest.raises(ValueError, match=rf"of the \d+ numbers of '{name}' are {kind}.*earlier step"):
        convert(folder, tmp_path / "ours", **DELTA)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_no_floating_point_are_refused(whole, dtype, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight" if whole else max(delta_shapes())
    if whole:
        folder = authors(tmp_path / "authors", more={name: torch.ones(D, D, dtype=dtype)})
    else:
        state = draw(delta_shapes())
        state[name] = torch.ones_like(state[name]).to(dtype)
        folder = write(state, tmp_path / "stage1", stem="mm_projector")
    with pytest.raises(ValueError, match=rf"'{name}' holds {dtype}, .*full precision, or dequantize"):
        convert(folder, tmp_path / "ours", **DELTA)
    assert not (tmp_path / "ours").exists()


def test_tensors_without_numbers_are_refused(tmp_path):
    state = draw(delta_shapes())
    name = sorted(state)[2]
    state[name] = state[name].to("meta")
    file = write(state, tmp_path / "stage1", "bin", stem="mm_projector")
    with pytest.raises(ValueError, match=rf"'{name}' has a shape but no numbers \(device 'meta'\).*again"):
        convert(file, tmp_path / "ours", **DELTA)
    assert not (tmp_path / "ours").exists()


def test_everything_that_is_left_out_is_listed(tmp_path):
    more = {"model.embed_tokens.weight": (VOCAB, D), "model.image_newline": (D,)}
    more |= {f"model.layers.{i}.mlp.up_proj.weight": (FF, D) for i in range(3)}
    folder = write(draw(mlp_shapes() | more), tmp_path / "model", config=CONFIG)
    done = convert(folder, tmp_path / "ours", compressor="mlp", projector_only=True)
    assert sorted(done.dropped) == sorted(more)
    left_out = next(line for line in str(done).splitlines() if line.startswith("left out: 5: "))
    assert all(
        name in left_out for name in ("embed_tokens", "image_newline", "layers.*.mlp.up_proj.weight (3)")
    )
