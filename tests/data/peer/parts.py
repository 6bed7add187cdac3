"""The parts that are tested, at the size of transformers' own tests: LLaVA's where PEER is `llava`, else ours
with the compressor that it names. `test_peer_suite.py` copies this file to the unpacked tests."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_vlm import byte_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.auto import modeling_auto, processing_auto
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from delta_llava.compressors.base import compressor_class, compressor_config
from delta_llava.config import ProjectorConfig
from delta_llava.processor import JOIN_PARTS, TEMPLATES, DeltaLlavaProcessor
from delta_llava.vlm import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

PEER = os.environ["PEER"]
LLAVA = PEER == "llava"
MODEL = LlavaForConditionalGeneration if LLAVA else DeltaLlavaForConditionalGeneration
CONFIG = LlavaConfig if LLAVA else DeltaLlavaConfig
PROCESSOR = LlavaProcessor if LLAVA else DeltaLlavaProcessor
SIDE = 8  # px
GRID = 4  # patches per side
OPTIONS = {"fastv": dict(layer=1), "quecc": dict(heads=4), "prumerge": dict(neighbors=4)}

if not LLAVA:  # many tests leave out models that are not in these tables, which no `register` reaches
    modeling_auto.MODEL_MAPPING_NAMES["delta_llava"] = MODEL.__name__
    for table in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        names["delta_llava"] = MODEL.__name__
    processing_auto.PROCESSOR_MAPPING_NAMES["delta_llava"] = PROCESSOR.__name__


def projector():
    "Sizes of the projector; `None` for LLaVA."
    if LLAVA:
        return None
    # PruMerge reads the attention of the block above the highest level
    levels = (0, 1) if PEER == "prumerge" else (1, 2)
    like = ProjectorConfig(grid=GRID, tokens=4, levels=levels, d_vision=32, d_llm=32, rank=4, head_dim=8)
    return like if PEER == "delta" else compressor_config(PEER, like, **OPTIONS.get(PEER, {}))


PROJECTOR = projector()
IMAGE_TOKENS = GRID**2 if LLAVA else PROJECTOR.placeholders(PROJECTOR.tokens)
READS_QUESTION = not LLAVA and "text" in compressor_class(PEER).requires


def config(vocab_size=99, image_token=2, **special):
    "Config of the whole model, its weights of standard deviation 0.02."
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    text = LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=512, **sizes | dict(pad_token_id=1) | special
    )
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=SIDE // GRID, projection_dim=32, **sizes)
    whole = dict(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=image_token)
    if LLAVA:
        return LlavaConfig(**whole, vision_feature_layer=-1, image_seq_length=IMAGE_TOKENS)
    return DeltaLlavaConfig(**whole, compressor=PEER, projector=PROJECTOR.to_dict())


def image_processor():
    "Pixels of the tower's size."
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)


def processor_options():
    "Arguments of the processor besides its parts."
    if LLAVA:
        return dict(
            patch_size=SIDE // GRID, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    options = dict(
        tokens=PROJECTOR.tokens, chat_template=JOIN_PARTS + TEMPLATES["v1"], questions=READS_QUESTION
    )
    return options | dict(placeholders=IMAGE_TOKENS if "decoder" in compressor_class(PEER).requires else None)


def processor():
    "A whole processor."
    options = processor_options()
    if LLAVA:
        options["chat_template"] = JOIN_PARTS + TEMPLATES["v1"]
    return PROCESSOR(image_processor(), byte_tokenizer(), **options)


def pictures():
    "Two files with pictures."
    folder = Path(tempfile.gettempdir()) / "peer-pictures"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        noise = np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    return [str(file) for file in files]


def save_tiny_model():
    "A folder of models as the pipeline tests expect it."
    root = Path(tempfile.mkdtemp())
    ours = processor()
    folder = root / CONFIG.model_type / MODEL.__name__
    vocab = len(ours.tokenizer)
    special = dict(bos_token_id=256, eos_token_id=257, pad_token_id=257)
    model = MODEL(config(vocab, ours.image_token_id, **special))
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    ours.save_pretrained(folder)
    (root / "reports").mkdir()
    summary = {MODEL.__name__: dict(tokenizer_classes=["PreTrainedTokenizerFast"], processor_classes=[])}
    (root / "reports/tiny_model_summary.json").write_text(json.dumps(summary))
    return str(root)
