"Small models with the grids and depths of the presets, and a byte-level tokenizer."

import dataclasses

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from delta_llava import config as presets
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

IMAGE = 259
CLIP = dict(hidden_size=128, intermediate_size=64, num_attention_heads=2)
L14 = dict(num_hidden_layers=24, patch_size=14, **CLIP)
TOWERS = {  # preset, its tower at small width, side of the images in px
    "clip_b32_224": (
        presets.clip_b32_224,
        lambda: CLIPVisionConfig(num_hidden_layers=12, image_size=224, patch_size=32, **CLIP),
        224,
    ),
    "clip_b32_384": (
        presets.clip_b32_384,
        lambda: CLIPVisionConfig(num_hidden_layers=12, image_size=224, patch_size=32, **CLIP),
        384,
    ),
    "clip_l14_336": (presets.clip_l14_336, lambda: CLIPVisionConfig(image_size=336, **L14), 336),
    "clip_l14_224": (presets.clip_l14_224, lambda: CLIPVisionConfig(image_size=224, **L14), 224),
    "siglip_so400m_384": (
        presets.siglip_so400m_384,
        lambda: SiglipVisionConfig(num_hidden_layers=27, image_size=384, patch_size=14, **CLIP),
        384,
    ),
    "dinov2_s14": (
        presets.dinov2_s14,
        lambda: Dinov2Config(
            hidden_size=128,
            num_hidden_layers=12,
            num_attention_heads=2,
            mlp_ratio=1,
            image_size=518,
            patch_size=14,
        ),
        168,
    ),
}


LLM_SIZES = dict(
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


def llm_config(**kwargs):
    return LlamaConfig(**LLM_SIZES | kwargs)


def projector_config(name="clip_b32_224", **kwargs):
    return dataclasses.replace(TOWERS[name][0](), **dict(d_vision=128, d_llm=64, rank=4) | kwargs)


def vlm_config(name="clip_b32_224", projector=None, **kwargs):
    return DeltaLlavaConfig(
        vision_config=TOWERS[name][1](),
        text_config=llm_config(**kwargs),
        projector=(projector or projector_config(name)).to_dict(),
        image_token_index=IMAGE,
    )


def tiny(name="clip_b32_224", seed=0, **kwargs):
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(vlm_config(name, **kwargs)).eval()


def images(name="clip_b32_224", n=1, seed=1):
    return torch.randn(n, 3, TOWERS[name][2], TOWERS[name][2], generator=torch.Generator().manual_seed(seed))


def prompt(tokens, images=1, before=(72, 105), after=(63, 10)):
    return torch.tensor([[*before, *([IMAGE] * tokens + [33]) * images, *after]])


def byte_tokenizer(eos="</s>", pieces=("<|im_start|>", "<image>")):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for piece in ("<s>", eos, *pieces):
        vocab[piece] = len(vocab)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=list(pieces),
    )
