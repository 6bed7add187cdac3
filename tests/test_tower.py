"Vision tower: hidden states of transformers, unused blocks removed, safe images, features on disk."

import hashlib
import io
import json
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from delta_llava import config as presets
from delta_llava import tower as tower_module
from delta_llava.adapter import vision_block_halves, vision_hidden_states
from delta_llava.compressors.base import compressor_class
from delta_llava.tower import (
    cache_features,
    image_processor_for,
    image_sha256,
    load_tower,
    open_image,
    required_depth,
    resolve_image_path,
    tower_sha256,
    truncate_tower,
    vision_features,
)

TINY = dict(hidden_size=16, num_attention_heads=2)
CLIP = dict(TINY, intermediate_size=32)
PRESETS = {  # true grid and depth, tiny width
    "clip_b32_224": (
        CLIPVisionModel,
        CLIPVisionConfig(**CLIP, num_hidden_layers=12, patch_size=32, image_size=224),
        224,
    ),
    "clip_b32_384": (
        CLIPVisionModel,
        CLIPVisionConfig(**CLIP, num_hidden_layers=12, patch_size=32, image_size=224),
        384,
    ),
    "clip_l14_224": (
        CLIPVisionModel,
        CLIPVisionConfig(**CLIP, num_hidden_layers=24, patch_size=14, image_size=224),
        224,
    ),
    "clip_l14_336": (
        CLIPVisionModel,
        CLIPVisionConfig(**CLIP, num_hidden_layers=24, patch_size=14, image_size=336),
        336,
    ),
    "siglip_so400m_384": (
        SiglipVisionModel,
        SiglipVisionConfig(**CLIP, num_hidden_layers=27, patch_size=14, image_size=384),
        384,
    ),
    "dinov2_s14": (
        Dinov2Model,
        Dinov2Config(**TINY, num_hidden_layers=12, patch_size=14, image_size=518, use_mask_token=False),
        168,
    ),
}


def saved(cls, config, folder):
    "A random tower of this class, saved as a user would have it, and the whole model."
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def small(tmp_path):
    "A 4-block CLIP of 8×8 px patches in a folder, and its processor."
    saved(
        CLIPVisionModel,
        CLIPVisionConfig(**CLIP, num_hidden_layers=4, patch_size=8, image_size=32),
        tmp_path / "clip",
    )
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    return tmp_path / "clip"


# ---- levels


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_levels_are_those_of_transformers(preset, tmp_path):
    cls, config, size = PRESETS[preset]
    cfg = getattr(presets, preset)()
    whole = saved(cls, config, tmp_path)
    tower = load_tower(tmp_path, cfg.levels)
    pixels = torch.randn(2, 3, size, size)
    resize = {"interpolate_pos_encoding": True} if preset == "clip_b32_384" else {}
    states = whole(pixels, output_hidden_states=True, **resize).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    features = vision_features(tower, pixels, cfg.levels)
    assert features.grid == cfg.grid and features.levels.shape == (2, cfg.grid**2, 4 * 16)
    n_before = 0 if cls is SiglipVisionModel else 1  # CLS
    assert_close(
        features.levels, torch.cat([states[i][:, n_before:] for i in cfg.levels], dim=-1), rtol=0, atol=1e-6
    )
    assert tower.config.num_hidden_layers == max(cfg.levels) < config.num_hidden_layers
    blocks = {
        int(k.split(".layer")[1].split(".")[1])
        for k in tower.state_dict()
        if ".layer." in k or ".layers." in k
    }
    assert blocks == set(range(max(cfg.levels)))
    assert not any("head." in k for k in tower.state_dict())
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())


def test_registers_are_dropped(tmp_path):
    whole = saved(
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(
            **TINY, num_hidden_layers=3, patch_size=14, image_size=56, num_register_tokens=4
        ),
        tmp_path,
    )
    pixels = torch.randn(1, 3, 70, 70)
    states = whole(pixels, output_hidden_states=True).hidden_states
    for levels in ((0, 2), (2, 0), (1, 2, 0), (2,)):  # joined in the order they are asked for
        assert_close(
            vision_features(load_tower(tmp_path, levels), pixels, levels).levels,
            torch.cat([states[i][:, 5:] for i in levels], dim=-1),
        )


def test_tower_of_a_whole_clip_with_text(tmp_path):
    text = CLIPTextConfig(**CLIP, num_hidden_layers=1, vocab_size=50)
    clip = saved(
        CLIPModel,
        CLIPConfig(
            text_config=text,
            vision_config=CLIPVisionConfig(**CLIP, num_hidden_layers=3, patch_size=8, image_size=32),
        ),
        tmp_path,
    )
    pixels = torch.randn(1, 3, 32, 32)
    states = clip.vision_model(pixels, output_hidden_states=True).hidden_states
    assert_close(
        vision_features(load_tower(tmp_path, (1, 2)), pixels, (1, 2)).levels,
        torch.cat([states[1], states[2]], dim=-1)[:, 1:],
    )


@pytest.mark.parametrize("preset", ["clip_b32_224", "siglip_so400m_384", "dinov2_s14"])
def test_cut_tower_reloads_cut(preset, tmp_path):
    cls, config, size = PRESETS[preset]
    saved(cls, config, tmp_path / "whole")
    tower = load_tower(tmp_path / "whole", (1, 3))
    tower.save_pretrained(tmp_path / "cut")
    again = AutoModel.from_pretrained(tmp_path / "cut").eval()
    pixels = torch.randn(1, 3, size, size)
    assert_close(vision_features(again, pixels, (1, 3)).levels, vision_features(tower, pixels, (1, 3)).levels)
    assert tower_sha256(again) == tower_sha256(tower)


def test_positions_follow_the_input_size(small):
    tower = load_tower(small, (0, 3))
    features = {
        size: vision_features(tower, torch.zeros(1, 3, size, size), (0, 3)) for size in (8, 24, 32, 35, 64)
    }
    assert {size: x.grid for size, x in features.items()} == {8: 1, 24: 3, 32: 4, 35: 4, 64: 8}
    level0 = features[64].levels[0, :, :16]  # an empty image: only positions tell patches apart
    assert level0.std(dim=0).min() > 1e-3


@pytest.mark.parametrize(
    "levels,message",
    [((), "must be indices"), ((-1, 2), "must be indices"), ((2, 5), r"depth=5 must lie in 1\.\.4")],
)
def test_impossible_levels(levels, message, small):
    with pytest.raises(ValueError, match=message):
        load_tower(small, levels)


@pytest.mark.parametrize(
    "shape,message", [((1, 3, 32, 24), "must be square"), ((1, 3, 7, 7), "at least one patch")]
)
def test_impossible_pixels(shape, message, small):
    with pytest.raises(ValueError, match=message):
        vision_features(load_tower(small, (1, 2)), torch.zeros(shape), (1, 2))


def test_towers_without_a_square_grid_are_refused(tmp_path):
    "NaFlex packs patches of any aspect ratio, Qwen-VL too: their pixel values are no images."
    config = Siglip2VisionConfig(**CLIP, num_hidden_layers=2, patch_size=8, num_patches=16)
    model = saved(Siglip2VisionModel, config, tmp_path)
    with pytest.raises(ValueError, match="as tower; it is: siglip2_vision_model.*square grid.*NaFlex"):
        load_tower(tmp_path, (0, 1))
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\].*NaFlex"):
        tower_module._check_pixels(model.config, torch.zeros(1, 16, 192))


@pytest.mark.parametrize("preset", ["clip_b32_224", "siglip_so400m_384", "dinov2_s14"])
def test_a_truncated_tower_shares_the_weights(preset):
    cls, config, size = PRESETS[preset]
    tower = cls(config).eval()
    shallow = truncate_tower(tower, 4)
    assert not any(t.is_meta for t in [*shallow.parameters(), *shallow.buffers()]) and not shallow.training
    pointers = {p.data_ptr() for p in tower.parameters()}
    assert all(p.data_ptr() in pointers for p in shallow.parameters())
    pixels = torch.randn(1, 3, size, size)
    assert torch.equal(
        vision_features(shallow, pixels, (1, 4)).levels, vision_features(tower, pixels, (1, 4)).levels
    )
    assert truncate_tower(shallow, 4) is shallow
    with pytest.raises(ValueError, match=r"depth=5 must lie in 1\.\.4"):
        truncate_tower(shallow, 5)


@pytest.mark.parametrize(
    "name,levels,depth",
    [
        *(("delta", (1, 3), 3), ("prumerge", (3,), 4), ("prumerge", (4,), None)),
        *(("fastervlm", (3,), 3), ("fastervlm", (4, 2), 4)),
    ],
)
def test_required_depth(name, levels, depth):
    compressor = compressor_class(name)
    config = compressor_class(name).Config(levels=levels)
    if depth is not None:
        assert required_depth(compressor, config, 4) == depth
    else:
        with pytest.raises(ValueError, match="has 4 blocks; use a lower level"):
            required_depth(compressor, config, 4)


def test_level_beyond_a_cut_tower(small):
    with pytest.raises(ValueError, match="reach beyond the 2 blocks"):
        vision_features(load_tower(small, (1, 2)), torch.zeros(1, 3, 32, 32), (1, 3))


# ---- attention of the CLS token

WITH_CLS = {  # depth 4, and number of tokens before the patches
    "clip": (CLIPVisionModel, CLIPVisionConfig(**CLIP, num_hidden_layers=4, patch_size=8, image_size=32), 1),
    "dinov2": (
        Dinov2Model,
        Dinov2Config(**TINY, num_hidden_layers=4, patch_size=8, image_size=32, use_mask_token=False),
        1,
    ),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(
            **TINY, num_hidden_layers=4, patch_size=8, image_size=32, num_register_tokens=4
        ),
        5,
    ),
}


def blocks(model):
    return next(m for name, m in model.named_modules() if name in ("encoder.layers", "encoder.layer"))


@pytest.mark.parametrize("levels", [(1, 3), (3, 1), (0,), (2, 0, 3)])
@pytest.mark.parametrize("name", WITH_CLS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [32, 48])
def test_attention_and_keys_are_those_of_the_block(name, levels, implementation, size, tmp_path):
    cls, config, before = WITH_CLS[name]
    whole = saved(cls, config, tmp_path)
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.3)  # biases and norms that a wrong read would miss
    whole.save_pretrained(tmp_path)
    whole.set_attn_implementation(implementation)
    pixels, outputs = torch.randn(2, 3, size, size), {}
    attend = next(
        m for name, m in blocks(whole)[levels[-1]].named_children() if name in ("self_attn", "attention")
    )
    hooks = [
        p.register_forward_hook(lambda m, args, out, which=which: outputs.__setitem__(which, out))
        for which, p in (("q", attend.q_proj), ("k", attend.k_proj))
    ]
    resize = {"interpolate_pos_encoding": True} if name == "clip" else {}
    states = whole(pixels, output_hidden_states=True, **resize).hidden_states
    for hook in hooks:
        hook.remove()
    expected = (outputs["q"] @ outputs["k"].mT * 16**-0.5).softmax(-1)[:, 0, before:]
    tower = load_tower(tmp_path, levels, attention=True)
    tower.set_attn_implementation(implementation)
    for model in (tower, whole):
        found = vision_features(model, pixels, levels, attention=True)
        assert_close(found.cls_attention, expected, rtol=0, atol=1e-6)
        assert_close(found.keys, outputs["k"][:, before:], rtol=0, atol=1e-5)
        assert_close(
            found.levels, torch.cat([states[i][:, before:] for i in levels], dim=-1), rtol=0, atol=1e-5
        )
    assert found.grid == size // 8 and found.cls_attention.shape == (2, found.grid**2)
    plain = vision_features(tower, pixels, levels)
    assert plain.cls_attention is None and plain.keys is None
    assert_close(plain.levels, found.levels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [(1, 3), (3, 1), (2, 0, 4)])
@pytest.mark.parametrize("name", WITH_CLS)
@pytest.mark.parametrize("size", [32, 48])
def test_attention_of_the_block_that_wrote_the_level(name, levels, size, tmp_path):
    "It is what transformers returns as attention weights, mean over the heads."
    cls, config, before = WITH_CLS[name]
    whole = saved(cls, config, tmp_path)
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.3)
    whole.save_pretrained(tmp_path)
    whole.set_attn_implementation("eager")
    pixels = torch.randn(2, 3, size, size)
    resize = {"interpolate_pos_encoding": True} if name == "clip" else {}
    weights = whole(pixels, output_attentions=True, **resize).attentions
    assert weights[0].shape[1] > 1  # with one head a mean over the heads would be nothing
    expected = sum(weights[levels[-1] - 1][:, h, 0, before:] for h in range(weights[0].shape[1]))
    tower = load_tower(tmp_path, levels, attention="before")
    assert len(blocks(tower)) == max(levels)  # no block more than the levels need
    for model in (tower, whole):
        found = vision_features(model, pixels, levels, attention="before")
        assert_close(found.level_attention, expected / weights[0].shape[1], rtol=0, atol=1e-6)
        assert found.cls_attention is None and found.keys is None
    plain = vision_features(tower, pixels, levels)
    assert_close(plain.levels, found.levels, rtol=0, atol=1e-5)


def after_attention(block, x):
    "The first part of a block, and the weights of its attention, written out for each make."
    if hasattr(block, "layer_norm1"):
        out, weights = block.self_attn(block.layer_norm1(x), attention_mask=None)
        return x + out, weights
    out, weights = block.attention(block.norm1(x))
    return x + block.layer_scale1(out), weights


def after_feed_forward(block, x):
    "The second part."
    if hasattr(block, "layer_norm2"):
        return x + block.mlp(block.layer_norm2(x))
    return x + block.layer_scale2(block.mlp(block.norm2(x)))


@torch.no_grad()
@pytest.mark.parametrize("reduction", [((0, 9),), ((1, 12), (3, 2)), ((0, 15), (1, 8), (2, 7))])
@pytest.mark.parametrize("name", WITH_CLS)
def test_blocks_that_reduce_equal_a_loop_over_images_and_tokens(name, reduction, tmp_path):
    cls, config, before = WITH_CLS[name]
    tower = saved(cls, config, tmp_path)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    pixels = torch.randn(2, 3, 32, 32)
    found = vision_features(tower, pixels, (4,), reduction=reduction)
    assert found.grid == 4 and not found.on_grid and found.levels.shape == (2, reduction[-1][1], 16)
    tower.set_attn_implementation("eager")
    for image, tokens in zip(pixels, found.levels, strict=True):
        x = vision_hidden_states(tower, image[None], 0)[0]
        for number, block in enumerate(blocks(tower)):
            x, weights = after_attention(block, x)
            if number in dict(reduction):
                received = [sum(weights[0, h, 0, j].item() for h in range(2)) / 2 for j in range(x.shape[1])]
                ranked = sorted(range(before, x.shape[1]), key=lambda j: -received[j])
                kept = sorted(ranked[: dict(reduction)[number] - 1])
                fused = sum(received[j] * x[0, j] for j in range(before, x.shape[1]) if j not in kept)
                x = torch.stack([*x[0, :before], *(x[0, j] for j in kept), fused])[None]
            x = after_feed_forward(block, x)
        assert_close(tokens, x[0, before:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_CLS)
def test_the_two_halves_are_the_block(name, tmp_path):
    cls, config, _ = WITH_CLS[name]
    tower = saved(cls, config, tmp_path)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    states = vision_hidden_states(tower, torch.randn(2, 3, 32, 32), 4)
    for block, x, y in zip(blocks(tower), states, states[1:], strict=False):
        attend, feed_forward = vision_block_halves(block)
        assert_close(feed_forward(attend(x)), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "levels,reduction,words",
    [
        ((1, 3), ((0, 9),), "is read at one level"),
        ((3,), ((3, 9),), "must name rising blocks below level 3"),
        ((3,), ((1, 9), (1, 5)), "must name rising blocks"),
        ((3,), ((1, 16),), "ever fewer of the 16 patches"),
        ((3,), ((0, 5), (1, 6)), "ever fewer of the 16 patches"),
        ((3,), ((0, 1),), "at least 2"),
    ],
)
def test_reductions_that_are_refused(small, levels, reduction, words):
    with pytest.raises(ValueError, match=words):
        vision_features(load_tower(small, levels), torch.zeros(1, 3, 32, 32), levels, reduction=reduction)


def test_siglip_cannot_rank(tmp_path):
    config = SiglipVisionConfig(**CLIP, num_hidden_layers=4, patch_size=8, image_size=32)
    saved(SiglipVisionModel, config, tmp_path)
    with pytest.raises(ValueError, match="ranks by the CLS token, and a siglip.* has none; use a CLIP"):
        vision_features(load_tower(tmp_path, (3,)), torch.zeros(1, 3, 32, 32), (3,), reduction=((1, 9),))


@pytest.mark.parametrize("name", WITH_CLS)
def test_the_block_that_reads_the_query_level_is_loaded_but_not_run(name, tmp_path):
    cls, config, _ = WITH_CLS[name]
    saved(cls, config, tmp_path)
    for levels, depth in (((1, 2), 3), ((2, 1), 2), ((0,), 1), ((3,), 4)):
        tower = load_tower(tmp_path, levels, attention=True)
        assert tower.config.num_hidden_layers == len(blocks(tower)) == depth
        ran = []
        hooks = [
            b.register_forward_hook(lambda m, args, out, i=i, ran=ran: ran.append(i))
            for i, b in enumerate(blocks(tower))
        ]
        vision_features(tower, torch.randn(1, 3, 32, 32), levels, attention=True)
        for hook in hooks:
            hook.remove()
        assert ran == list(range(max(levels)))


def test_attention_of_a_half_precision_tower(small):
    tower = load_tower(small, (1, 3), attention=True)
    pixels = torch.randn(2, 3, 32, 32)
    exact, found = (
        vision_features(tower.to(dtype), pixels.to(dtype), (1, 3), attention=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (
        found.cls_attention.dtype == torch.float32
        and found.keys.dtype == found.levels.dtype == torch.bfloat16
    )
    assert_close(found.cls_attention, exact.cls_attention, rtol=0.02, atol=1e-3)


def test_who_has_no_attention_to_give(small, tmp_path):
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        ValueError,
        match=r"reads level 3, but this tower ends with its 3 blocks.*attention=True.*keeps that block",
    ):
        vision_features(load_tower(small, (1, 3)), pixels, (1, 3), attention=True)
    with pytest.raises(ValueError, match=r"depth=5 must lie in 1\.\.4"):
        load_tower(small, (1, 4), attention=True)
    saved(
        SiglipVisionModel,
        SiglipVisionConfig(**CLIP, num_hidden_layers=4, patch_size=8, image_size=32),
        tmp_path / "siglip",
    )
    for attention in (True, "after", "before"):
        with pytest.raises(ValueError, match=f"attention={attention!r}.*has none; use a CLIP or DINOv2"):
            load_tower(tmp_path / "siglip", (1, 3), attention=attention)
    with pytest.raises(ValueError, match="level 0 is the embedded patches; use a higher"):
        load_tower(small, (1, 0), attention="before")
    with pytest.raises(ValueError, match="attention='both'; use 'before'"):
        load_tower(small, (1, 3), attention="both")
    with pytest.raises(ValueError, match="has none; use a CLIP or DINOv2"):
        vision_features(load_tower(tmp_path / "siglip", (1, 3)), pixels, (1, 2), attention=True)


# ---- processors


@pytest.mark.parametrize(
    "cls,kwargs",
    [
        (CLIPImageProcessorPil, {}),
        (SiglipImageProcessorPil, {}),
        (BitImageProcessorPil, dict(size={"shortest_edge": 256})),
        (BitImageProcessorPil, dict(size={"height": 224, "width": 224}, do_center_crop=False)),
    ],
)
def test_processor_makes_squares_of_any_size(cls, kwargs, small):
    cls(**kwargs).save_pretrained(small)
    for size in (56, 168):
        processor = image_processor_for(small, size)
        assert type(processor) is cls
        for w, h in ((1, 1), (3, 50), (90, 40)):
            pixels = processor(Image.new("RGB", (w, h), (255, 0, 0)), return_tensors="pt").pixel_values
            assert pixels.shape == (1, 3, size, size)
            mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
            expected = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
            assert_close(pixels.mean(dim=(0, 2, 3)), expected, rtol=1e-4, atol=1e-4)


def test_processor_faults(small):
    with pytest.raises(ValueError, match="image_size=0"):
        image_processor_for(small, 0)
    (small / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        image_processor_for(small, 32)


# ---- images


def encoded(image, fmt, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


NOISE = Image.effect_noise((40, 30), 80)


@pytest.mark.parametrize(
    "make,expected",
    [
        (lambda: Image.new("L", (2, 2), 9), (9, 9, 9)),
        (lambda: Image.new("1", (2, 2), 1), (255, 255, 255)),
        (lambda: Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (lambda: Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (lambda: Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (lambda: Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (lambda: Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (lambda: Image.new("RGB", (2, 2), (0, 0, 255)).convert("P"), (0, 0, 255)),
        (lambda: Image.fromarray(np.full((2, 2), 51400, np.uint16)), (200, 200, 200)),
        (lambda: Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(make, expected, tmp_path):
    image = make()
    fmt = "TIFF" if image.mode == "CMYK" else "PNG"
    (tmp_path / "x").write_bytes(encoded(image, fmt))
    for opened in (open_image(image), open_image(tmp_path / "x"), open_image("x", root=tmp_path)):
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == expected


RGBA = np.random.default_rng(3).integers(0, 256, (9, 7, 4)).astype(np.uint8)
ARRAYS = {
    "RGB": (RGBA[..., :3], "RGB"),
    "RGB, channels first": (RGBA[..., :3].transpose(2, 0, 1), "RGB"),
    "RGBA": (RGBA, "RGBA"),
    "gray": (RGBA[..., 0], "L"),
    "gray with a channel": (RGBA[..., :1], "L"),
    "gray and alpha": (RGBA[..., [0, 3]], "LA"),
    "integers": (RGBA[..., :3].astype(int), "RGB"),
    "16 bits": (RGBA[..., 0].astype(np.uint16) * 257, "L"),
    "16 bits in 32": (RGBA[..., :3].astype(np.int32) * 257, "RGB"),
    "floats to 255": (RGBA[..., :3].astype(np.float32), "RGB"),
    "mask": (RGBA[..., 0] > 99, "1"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_images(name):
    values, mode = ARRAYS[name]
    channels = dict(RGB=slice(3), RGBA=slice(4), L=0, LA=[0, 3])
    plain = (RGBA[..., 0] > 99).astype(np.uint8) * 255 if mode == "1" else RGBA[..., channels[mode]]
    want = open_image(Image.fromarray(np.ascontiguousarray(plain)))
    for same in (values, torch.tensor(np.ascontiguousarray(values))):
        assert np.array_equal(open_image(same), want)
    assert np.asarray(want).std() > 10


@pytest.mark.parametrize(
    "values,message",
    [
        (np.zeros((8, 8, 3)), "do_rescale=False"),
        (torch.full((3, 8, 8), 0.5), "from 0.5 to 0.5"),
        (np.full((8, 8), -0.5), "from -0.5 to -0.5, but they must lie in 0..255"),
        (np.full((8, 8), 70_000), "must lie in 0..65535"),
        (np.full((8, 8), np.nan), "must lie in 0..255"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one by one"),
        (np.zeros((8, 8, 5), np.uint8), "1 to 4 channels"),
        (np.zeros((0, 8), np.uint8), "has the shape"),
        (np.full((8, 8), "a"), "convert them to uint8"),
        (None, "image is 'None'.*give a path"),
        (b"bytes", "io.BytesIO"),
        (7, "give a path"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        open_image(values)


def test_8_bits_stored_in_32_keep_their_values():
    gray = Image.fromarray(RGBA[..., 0])
    assert np.array_equal(open_image(gray.convert("I")), open_image(gray))
    deep = Image.fromarray(RGBA[..., 0].astype(np.int32) * 257)
    assert deep.mode == "I" and np.array_equal(open_image(deep), open_image(gray))


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 2), 3)
    image.putpalette([0] * 768)
    assert open_image(io.BytesIO(encoded(image, "PNG", transparency=3))).getpixel((0, 0)) == (255, 255, 255)


def test_camera_orientation_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(io.BytesIO(encoded(NOISE, "JPEG", exif=exif))).size == (30, 40)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(fmt):
    data = encoded(NOISE.convert("RGB"), fmt)
    with pytest.raises(ValueError, match="cannot be used"):
        open_image(io.BytesIO(data[: len(data) * 2 // 3]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_no_image(data):
    refused(data)


def test_seldom_formats_are_not_even_tried():  # Pillow knows some fifty, and runs Ghostscript for one of them
    for fmt in ("PCX", "TGA", "ICO"):
        refused(encoded(NOISE.convert("RGB"), fmt))


def refused(data):
    with pytest.raises(ValueError, match="cannot be used.*readable are JPEG"):
        open_image(io.BytesIO(data))


def png(width, height):
    "A PNG whose header states this size and which holds almost no data."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size,message",
    [
        ((60_000, 60_000), "decompression bomb|are more than"),
        ((10_000, 10_000), "are more than 89,478,485"),
        ((40_000, 1), "are more than 200:1"),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(size, message, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match=message):
        open_image(io.BytesIO(png(*size)))


def test_text_bomb_in_a_png():
    info = zlib.compress(b"a" * 5_000_000)
    data = b"a\0\0" + info
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    good = encoded(NOISE, "PNG")
    with pytest.raises(ValueError, match="cannot be used"):
        open_image(io.BytesIO(good[:33] + chunk + good[33:]))


def test_paths_stay_in_their_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "in.png").write_bytes(encoded(NOISE, "PNG"))
    (tmp_path / "images2").mkdir()  # shares the beginning of its name with the folder
    for outside in (tmp_path / "out.png", tmp_path / "images2" / "out.png"):
        outside.write_bytes(encoded(NOISE, "PNG"))
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "door").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "sub" / "in.png")
    for good in ("sub/in.png", "sub/../sub/in.png", "inner.png", str(root / "sub" / "in.png")):
        assert open_image(good, root).size == (40, 30)
    for bad in (
        "../out.png",
        "../images2/out.png",
        str(tmp_path / "out.png"),
        "link.png",
        "door/out.png",
        "/etc/passwd",
        "sub/../../out.png",
    ):
        with pytest.raises(ValueError, match="leads outside its folder"):
            open_image(bad, root)
    for missing in ("none.png", "sub", ""):
        with pytest.raises(ValueError, match="is not a file"):
            resolve_image_path(missing, root)
    assert open_image(root / "link.png").size == (40, 30)  # no folder named, no fence


# ---- features on disk


@pytest.fixture
def images(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(7):
        Image.effect_noise((40, 30), 20 + 20 * i).save(tmp_path / "photos" / f"{i}.png")
    return sorted((tmp_path / "photos").iterdir())


class Counted:
    "Counts the images that pass through the tower; stops like a killed run after `limit`."

    def __init__(self, limit=10**9):
        self.n, self.limit = 0, limit

    def __call__(self, model, pixels, levels, *options):
        self.n += len(pixels)
        if self.n > self.limit:
            raise KeyboardInterrupt
        return vision_features(model, pixels, levels, *options)


@pytest.fixture
def count(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(tower_module, "vision_features", counted)
    return counted


def cached(images, small, cache, levels=(1, 3), size=32, **kwargs):
    kwargs = dict(batch_size=2, progress=False, dtype=torch.float32) | kwargs
    tower = load_tower(small, levels, kwargs.get("attention", False))
    return cache_features(images, tower, image_processor_for(small, size), levels, cache, **kwargs)


def features_of(images, small, levels=(1, 3), size=32, attention=False):
    pixels = image_processor_for(small, size)(
        [open_image(p) for p in images], return_tensors="pt"
    ).pixel_values
    return vision_features(load_tower(small, levels, attention), pixels, levels, attention)


def direct(*args, **kwargs):
    return features_of(*args, **kwargs).levels


def test_cached_features_are_the_features(images, small, tmp_path):
    exact = direct(images, small)
    cache = cached(images, small, tmp_path / "c")
    assert len(cache) == 7 and cache[2].dtype == torch.float32
    assert_close(cache[range(7)], exact)
    assert_close(cache[torch.tensor([5, 0])], exact[[5, 0]])
    half = cached(images, small, tmp_path / "c", dtype=torch.float16)
    assert_close(half[range(7)], exact.half().float(), rtol=1e-3, atol=1e-4)
    assert half.files[0].stat().st_size < 0.6 * cache.files[0].stat().st_size


def test_cached_attention_is_the_attention(images, small, tmp_path):
    exact = features_of(images, small, attention=True)
    cache = cached(images, small, tmp_path / "c", attention=True)
    for indices in ([5, 0], torch.tensor([5, 0])):
        batch = cache.index_batch(indices)
        assert batch.grid == exact.grid
        for name in ("levels", "cls_attention", "keys"):
            assert_close(getattr(batch, name), getattr(exact, name)[[5, 0]])
    assert_close(cache[2].keys, exact.keys[2:3])  # one image is a batch of one
    assert_close(cache[range(7)].levels, exact.levels)
    half = cached(images, small, tmp_path / "c", attention=True, dtype=torch.float16)
    assert {name: x.dtype for name, x in load_file(half.files[0]).items()} == dict(
        levels=torch.float16, keys=torch.float16, cls_attention=torch.float32
    )
    half = half.index_batch(range(7))
    assert_close(
        half.cls_attention, exact.cls_attention, rtol=1e-6, atol=0
    )  # the order of the patches depends on it
    assert_close(half.keys, exact.keys.half().float(), rtol=1e-3, atol=1e-4)
    assert half.levels.dtype == half.keys.dtype == half.cls_attention.dtype == torch.float32


def test_each_attention_has_a_cache_of_its_own(images, small, tmp_path):
    exact = features_of(images, small, attention="before")
    for _ in range(2):  # computed, then read
        cached(images, small, tmp_path / "c", attention="after")
        cache = cached(images, small, tmp_path / "c", attention="before", dtype=torch.float16)
        found = cache.index_batch(range(7))
        assert found.cls_attention is None and found.keys is None
        assert_close(found.level_attention, exact.level_attention)
        assert load_file(cache.files[0])["level_attention"].dtype == torch.float32


def test_a_reduction_has_a_cache_of_its_own(images, small, tmp_path):
    tower, processor = load_tower(small, (3,)), image_processor_for(small, 32)
    pixels = processor([open_image(p) for p in images], return_tensors="pt").pixel_values
    exact = {v: vision_features(tower, pixels, (3,), reduction=((1, v),)).levels for v in (9, 4)}
    for _ in range(2):  # computed, then read
        assert cached(images, small, tmp_path / "c", (3,))[[0]].shape == (1, 16, 16)
        for v in (9, 4):
            options = dict(reduction=((1, v),), progress=False, dtype=torch.float32)
            cache = cache_features(images, tower, processor, (3,), tmp_path / "c", **options)
            found = cache[range(7)]
            assert (found.grid, found.on_grid) == (4, False)
            assert_close(found.levels, exact[v])
            assert_close(cache[2].levels, exact[v][2:3])


def test_a_batch_of_a_plain_cache(images, small, tmp_path):
    batch = cached(images, small, tmp_path / "c").index_batch([1, 3])
    assert batch.cls_attention is None and batch.keys is None and batch.grid == 4
    assert_close(batch.levels, direct(images, small)[[1, 3]])


def test_attention_has_a_cache_of_its_own(images, small, tmp_path, count):
    levels = (3, 1)  # the block is in the tower either way: only the switch tells the two apart
    cached(images, small, tmp_path / "c", levels)
    cached(images, small, tmp_path / "c", levels, attention=True)
    assert count.n == 14
    assert (
        cached(images, small, tmp_path / "c", levels).index_batch([0]).keys is None
        and cached(images, small, tmp_path / "c", levels, attention=True).index_batch([0]).keys is not None
    )
    assert count.n == 14


def test_caches_of_earlier_versions_stay_valid(images, small, tmp_path, count):
    "Folder name and checksum written out as they were before attention could be stored."
    tower, processor = load_tower(small, (1, 3)), image_processor_for(small, 32)
    key = dict(
        version=1,
        tower=tower_sha256(tower),
        processor=processor.to_dict(),
        levels=[1, 3],
        dtype="torch.float32",
    )
    folder = (
        tmp_path
        / "c"
        / hashlib.sha256(json.dumps(key, sort_keys=True, default=str, indent=1).encode()).hexdigest()[:16]
    )
    folder.mkdir(parents=True)
    for path, x in zip(images, direct(images, small), strict=True):
        crc = zlib.crc32(x.contiguous().numpy().tobytes())
        save_file(
            {"levels": x.contiguous()}, folder / f"{image_sha256(path)}.safetensors", {"crc32": str(crc)}
        )
    count.n = 0
    assert_close(cached(images, small, tmp_path / "c")[range(7)], direct(images, small))
    assert count.n == 0


@pytest.mark.parametrize("name", ["levels", "cls_attention", "keys"])
def test_damage_in_any_tensor_is_found(name, images, small, tmp_path, count, caplog):
    cache = cached(images, small, tmp_path / "c", attention=True)
    entry, crc = load_file(cache.files[3]), safe_open(cache.files[3], "pt").metadata()["crc32"]
    entry[name].view(-1)[-1] += 1
    save_file(entry, cache.files[3], {"crc32": crc})
    count.n = 0
    with caplog.at_level(logging.WARNING):
        again = cached(images, small, tmp_path / "c", attention=True)
    assert count.n == 1 and f"{cache.files[3]} is damaged" in caplog.text
    assert_close(
        getattr(again.index_batch(range(7)), name), getattr(features_of(images, small, attention=True), name)
    )


def test_each_image_passes_once(images, small, tmp_path, count):
    opened = [Image.open(images[0]).copy()] * 2
    cache = cached([*images, *images[::-1], *opened], small, tmp_path / "c")
    assert count.n == 7 + 1
    assert_close(cache[0], cache[13])
    cached(images, small, tmp_path / "c")
    assert count.n == 8


def test_goes_on_after_a_kill(images, small, tmp_path, count):
    count.limit = 5
    with pytest.raises(KeyboardInterrupt):
        cached(images, small, tmp_path / "c")
    count.n, count.limit = 0, 10**9
    folder = next((tmp_path / "c").iterdir())
    assert len(list(folder.glob("*.safetensors"))) == 4
    (folder / ".tmp-half").write_bytes(b"half a file")
    cache = cached(images, small, tmp_path / "c")
    assert count.n == 3
    assert_close(cache[range(7)], direct(images, small))


def test_a_write_that_dies_leaves_no_entry(images, small, tmp_path, monkeypatch):
    def dies(*args):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="disk full"):
            cached(images, small, tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_entry_is_found_and_computed_again(damage, images, small, tmp_path, count, caplog):
    cache = cached(images, small, tmp_path / "c")
    file, data = cache.files[3], bytearray(cache.files[3].read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    file.write_bytes(
        {"flip": data, "cut": data[: len(data) // 2], "empty": b"", "other": b"x" * len(data)}[damage]
    )
    count.n = 0
    with caplog.at_level(logging.WARNING):
        again = cached(images, small, tmp_path / "c")
    assert count.n == 1 and f"{file} is damaged" in caplog.text
    assert_close(again[range(7)], direct(images, small))


def test_nothing_old_is_taken_for_new(images, small, tmp_path, count):
    for i, other in enumerate(
        ({}, dict(levels=(3, 1)), dict(levels=(1, 2)), dict(size=64), dict(dtype=torch.float16))
    ):
        cache = cached(images, small, tmp_path / "c", **other)
        assert count.n == 7 * (i + 1)
    assert_close(
        cached(images, small, tmp_path / "c", levels=(3, 1))[range(7)], direct(images, small, levels=(3, 1))
    )
    torch.manual_seed(1)
    CLIPVisionModel(
        CLIPVisionConfig(**CLIP, num_hidden_layers=4, patch_size=8, image_size=32)
    ).save_pretrained(small)  # same sizes, other weights
    cache = cached(images, small, tmp_path / "c")
    assert count.n == 7 * 6
    assert_close(cache[range(7)], direct(images, small))
    Image.effect_noise((40, 30), 5).save(images[0])  # same name, other image
    assert_close(cached(images, small, tmp_path / "c")[0], direct(images[:1], small)[0])
    assert count.n == 7 * 6 + 1


def test_hash_of_a_image_sees_its_palette():
    image = Image.new("P", (2, 2), 3)
    image.putpalette([0] * 768)
    other = image.copy()
    other.putpalette([9] * 768)
    assert image_sha256(image) != image_sha256(other)


def test_bad_images_stop_before_the_tower_runs(images, small, tmp_path, count):
    with pytest.raises(ValueError, match="leads outside"):
        cached([*images, tmp_path / "clip" / "config.json"], small, tmp_path / "c", root=tmp_path / "photos")
    with pytest.raises(ValueError, match="is not a file"):
        cached([*images, tmp_path / "none.png"], small, tmp_path / "c")
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be used"):
        cached([*images, tmp_path / "no.png"], small, tmp_path / "c")
    assert count.n == 0


def test_overflow_of_half_precision_is_an_error(images, small, tmp_path, monkeypatch):
    def large(*args):
        features = vision_features(*args)
        features.levels.mul_(1e6)
        return features

    monkeypatch.setattr(tower_module, "vision_features", large)
    with pytest.raises(ValueError, match="use dtype=torch.float32"):
        cached(images, small, tmp_path / "c", dtype=torch.float16)
    assert_close(
        cached(images, small, tmp_path / "c")[0], 1e6 * direct(images[:1], small)[0], rtol=1e-4, atol=1
    )
