"""Models as the hub has them: configurations, names of weights, files of a tokenizer; the weights are random.

Files have the layout of the published ones, with old keys. CLIP has its true shapes, the LLM is narrow."""

import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = (
    "USER: What is {i}? ASSISTANT: A cat and {i} dogs. Provide a one-sentence caption for the image, please."
)


def write_json(path, content):
    Path(path).write_text(json.dumps(content, indent=2))


def random_state(cls, config, dtype):
    "Weights of the right shapes; large ones repeat one block of random numbers, which is fast to make."
    with torch.device("meta"):
        model = cls(config)
    block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    block = block.to(dtype)
    state = {}
    for name, weight in model.state_dict().items():
        if weight.ndim < 2:  # weights of norms and the logit scale; biases
            state[name] = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
            continue
        n = weight.numel()
        state[name] = block.repeat(-(-n // len(block)))[:n].clone().reshape(weight.shape)
    return state


def parts_of(state, parts):
    "A state dict in pieces of about the same number of bytes."
    total = sum(t.nbytes for t in state.values())
    pieces, size = [{}], 0
    for name, tensor in state.items():
        if size > total / parts and len(pieces) < parts:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor.nbytes
    return pieces


def write_weights(folder, state, kind, parts=1):
    "`model*.safetensors` or `pytorch_model*.bin`, with an index if there are several."
    stem = dict(safetensors="model", bin="pytorch_model")[kind]
    save = dict(safetensors=lambda s, path: save_file(s, path, {"format": "pt"}), bin=torch.save)[kind]
    if parts == 1:
        return save(state, folder / f"{stem}.{kind}")
    index = {}
    for i, piece in enumerate(parts_of(state, parts)):
        name = f"{stem}-{i + 1:05}-of-{parts:05}.{kind}"
        save(piece, folder / name)
        index |= dict.fromkeys(piece, name)
    total = sum(t.nbytes for t in state.values())
    write_json(folder / f"{stem}.{kind}.index.json", dict(metadata=dict(total_size=total), weight_map=index))


VISION = {  # what differs from transformers' defaults, as the published files list it
    "openai/clip-vit-base-patch32": dict(dropout=0.0, model_type="clip_vision_model"),
    "openai/clip-vit-large-patch14-336": dict(
        dropout=0.0,
        hidden_size=1024,
        image_size=336,
        intermediate_size=4096,
        model_type="clip_vision_model",
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        projection_dim=768,
    ),
}
TEXTS = {
    "openai/clip-vit-base-patch32": dict(dropout=0.0, model_type="clip_text_model"),
    "openai/clip-vit-large-patch14-336": dict(
        dropout=0.0,
        hidden_size=768,
        intermediate_size=3072,
        model_type="clip_text_model",
        num_attention_heads=12,
        projection_dim=768,
    ),
}


def write_clip(folder, name, kind, parts=1, dtype=torch.bfloat16):
    "Text and vision model together, in the layout of 2021: an image processor with plain numbers as sizes."
    folder.mkdir(parents=True)
    shape = dict(projection_dim=768 if "large" in name else 512, logit_scale_init_value=2.6592)
    config = CLIPConfig(text_config=TEXTS[name], vision_config=VISION[name], **shape)
    about = dict(
        architectures=["CLIPModel"], initializer_factor=1.0, model_type="clip", torch_dtype="float32"
    )
    about |= shape | dict(text_config=TEXTS[name], vision_config=VISION[name])
    write_json(folder / "config.json", about | dict(text_config_dict=None, vision_config_dict=None))
    state = random_state(CLIPModel, config, dtype)
    if kind == "bin":  # buffers that older versions stored
        vision = config.vision_config
        n = (vision.image_size // vision.patch_size) ** 2 + 1
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(n)[None]
    write_weights(folder, state, kind, parts)
    side = config.vision_config.image_size
    write_json(
        folder / "preprocessor_config.json",
        dict(
            crop_size=side,
            do_center_crop=True,
            do_normalize=True,
            do_resize=True,
            feature_extractor_type="CLIPFeatureExtractor",
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            resample=3,
            size=side,
        ),
    )
    (folder / "README.md").write_text("---\ntags:\n- vision\n---\n# CLIP\n")


def write_tokenizer(folder):
    "A SentencePiece model with the settings of Llama's, without a tokenizer.json; returns its size."
    text = folder / "text"
    text.write_text("\n".join(TEXT.format(i=i) for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    for path in (text, folder / "tokenizer.vocab"):
        path.unlink()
    same = dict(__type="AddedToken", lstrip=False, normalized=False, rstrip=False, single_word=False)
    tokens = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    special = {k: same | dict(content=v) for k, v in tokens.items()}
    write_json(
        folder / "tokenizer_config.json",
        special
        | dict(
            add_bos_token=True,
            add_eos_token=False,
            clean_up_tokenization_spaces=False,
            legacy=False,
            model_max_length=4096,
            pad_token=None,
            padding_side="right",
            sp_model_kwargs={},
            tokenizer_class="LlamaTokenizer",
        ),
    )
    write_json(folder / "special_tokens_map.json", tokens | dict(pad_token="<unk>"))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def write_vicuna(folder, kind="bin", parts=2, hidden=128):
    "An LLM with the files of Vicuna 1.5: `.bin` in two parts, old buffers in them, `tokenizer.model` alone."
    folder.mkdir(parents=True)
    sizes = dict(
        vocab_size=write_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    write_json(
        folder / "config.json",
        sizes
        | dict(
            _name_or_path="vicuna-7b-v1.5",
            architectures=["LlamaForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
            hidden_act="silu",
            initializer_range=0.02,
            model_type="llama",
            pad_token_id=0,
            pretraining_tp=1,
            rope_scaling=None,
            tie_word_embeddings=False,
            torch_dtype="float16",
            transformers_version="4.31.0",
            use_cache=True,
        ),
    )
    generation = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=4096)
    write_json(folder / "generation_config.json", generation | dict(temperature=0.9, top_p=0.6))
    state = random_state(LlamaForCausalLM, LlamaConfig(**sizes), torch.float16)
    if kind == "bin":
        frequencies = 1 / 10000 ** (torch.arange(0, hidden // 4, 2) / (hidden // 4))
        state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(4)}
    write_weights(folder, state, kind, parts)


def write_siglip(folder):
    "SigLIP with text and vision model, its depth and grid, at a small width."
    folder.mkdir(parents=True)
    narrow = dict(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_hidden_layers=27)
    vision = narrow | dict(image_size=384, patch_size=14, model_type="siglip_vision_model")
    text = narrow | dict(vocab_size=100, num_hidden_layers=1, model_type="siglip_text_model")
    config = SiglipConfig(text_config=text, vision_config=vision)
    about = dict(architectures=["SiglipModel"], model_type="siglip", torch_dtype="float32")
    write_json(folder / "config.json", about | dict(text_config=text, vision_config=vision))
    write_weights(folder, random_state(SiglipModel, config, torch.float32), "safetensors")
    half = [0.5, 0.5, 0.5]
    kind = dict(image_processor_type="SiglipImageProcessor", processor_class="SiglipProcessor")
    size = dict(height=384, width=384)
    steps = dict(do_normalize=True, do_rescale=True, do_resize=True, rescale_factor=1 / 255, resample=3)
    write_json(
        folder / "preprocessor_config.json", kind | steps | dict(image_mean=half, image_std=half, size=size)
    )


def write_dinov2(folder):
    "DINOv2-small, its depth and grid, at a small width."
    folder.mkdir(parents=True)
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=12, image_size=518, patch_size=14)
    about = dict(architectures=["Dinov2Model"], model_type="dinov2", torch_dtype="float32")
    write_json(folder / "config.json", about | sizes)
    write_weights(folder, random_state(Dinov2Model, Dinov2Config(**sizes), torch.float32), "safetensors")
    write_json(
        folder / "preprocessor_config.json",
        dict(
            crop_size=dict(height=224, width=224),
            do_center_crop=True,
            do_convert_rgb=True,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=[0.485, 0.456, 0.406],
            image_processor_type="BitImageProcessor",
            image_std=[0.229, 0.224, 0.225],
            resample=3,
            rescale_factor=1 / 255,
            size=dict(shortest_edge=256),
        ),
    )
