"""What only a GPU can show: `python benchmarks/gpu.py --only tests`, or pytest on this file alone.

Everything is small; the same code runs on the CPU, and both must agree. Slow compilations come last."""

import copy
import json
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products; CUDA reads it once

import pytest
import test_vlm_compressors as inside
import torch
from PIL import Image
from references import SIZES, small_inputs, small_module
from safetensors.torch import load_file
from tiny_stage import EachStep, stage, write_parts
from tiny_vlm import byte_tokenizer, images, projector_config, prompt, tiny
from torch.testing import assert_close
from transformers import TrainerCallback

from delta_llava.adapter import CLIPImageProcessorPil
from delta_llava.collator import Collator
from delta_llava.gradcam import word_cams
from delta_llava.grid import VisionFeatures
from delta_llava.processor import build_processor
from delta_llava.projector import DeltaProjector
from delta_llava.train import run_stage

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def exact_float32():
    "No TF32, and kernels that give the same bits each time, where there are such kernels."
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def moved(value, dtype=None):
    "A tensor, features or a dict of them on the GPU; floating-point numbers in `dtype`."
    if isinstance(value, dict):
        return {name: moved(item, dtype) for name, item in value.items()}
    if isinstance(value, VisionFeatures):
        return value.to(DEVICE, dtype or torch.float32)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, dtype if dtype and value.is_floating_point() else None)


def on_gpu(model):
    return copy.deepcopy(model).to(DEVICE)


def distance(a, b):
    "Largest difference, relative to the largest number."
    return ((a.float().cpu() - b.float().cpu()).abs().max() / b.float().abs().max()).item()


# ---------------------------------------------------------------- compressors


def outputs(module, inputs, tokens):
    "Visual tokens, and the gradient of each parameter, for a fixed projection of the output."
    inputs = dict(inputs)
    module.zero_grad()
    out = module(inputs.pop("features"), tokens=tokens, **inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * direction).sum().backward()
    return out.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SIZES)
def test_a_compressor_gives_the_same_on_both_devices(name):
    config = SIZES[name].config
    module, inputs = small_module(name, config), small_inputs(name, config)
    gpu = on_gpu(module)
    for tokens in config.budgets(config.grid):
        expected, gradients = outputs(module, inputs, tokens)
        found, gpu_gradients = outputs(gpu, moved(inputs), tokens)
        assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert gradients.keys() == gpu_gradients.keys()
        largest = max(g.abs().max().item() for g in gradients.values())
        for key, gradient in gradients.items():
            assert (gpu_gradients[key].cpu() - gradient).abs().max().item() < 1e-4 * max(largest, 1), key


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16_is_near_float32(name):
    "Not for PruMerge, which selects tokens by comparisons."
    config = SIZES[name].config
    module, inputs = small_module(name, config), small_inputs(name, config)
    expected, _ = outputs(module, inputs, config.tokens)
    found, _ = outputs(on_gpu(module).bfloat16(), moved(inputs, torch.bfloat16), config.tokens)
    assert found.isfinite().all()
    assert name in ("prumerge", "fastervlm") or distance(found, expected) < 0.1


def true_projector():
    "Delta at the paper's sizes, and features of two images."
    torch.manual_seed(0)
    projector = DeltaProjector().eval()
    return projector, torch.randn(2, 576, projector.config.d_levels)


def test_delta_at_true_size():
    projector, features = true_projector()
    gpu = on_gpu(projector)
    folded = gpu.fold()
    for tokens in (576, 144, 64, 16, 1):
        with torch.no_grad():
            expected = projector(features, tokens=tokens)
            assert distance(gpu(moved(features), tokens=tokens), expected) < 1e-5
            assert distance(folded(moved(features), tokens=tokens), expected) < 1e-5
    half = gpu.bfloat16()
    with torch.no_grad():
        assert distance(half(moved(features, torch.bfloat16), tokens=144), projector(features)) < 0.05


@pytest.mark.parametrize("tokens", [576, 144, 16, 1])
def test_the_projector_never_waits_for_the_gpu(tokens):
    "After the first call, which computes position embeddings."
    projector, features = true_projector()
    gpu, features = on_gpu(projector).train(), moved(features)
    outputs(gpu, dict(features=features), tokens)
    direction = torch.randn(2, tokens, gpu.config.d_llm, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (gpu(features, tokens=tokens) * direction).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [576, 144, 16])
def test_the_projector_runs_in_a_cuda_graph(tokens):
    projector, features = true_projector()
    gpu, features = on_gpu(projector).bfloat16().fold(), moved(features, torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                gpu(features, tokens=tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gpu(features, tokens=tokens)
        features.copy_(torch.randn_like(features))
        graph.replay()
        assert_close(captured, gpu(features, tokens=tokens), rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- the model


def test_the_model_gives_the_same_on_both_devices():
    "Logits, loss and gradients without DropPath; one row is padded."
    model = tiny(projector=projector_config(drop_path=0.0))
    ids = torch.cat([prompt(9), prompt(9, before=(257, 105))])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    labels = ids.clone()
    labels[:, :-2] = -100
    batch = dict(input_ids=ids, attention_mask=mask, pixel_values=images(n=2), tokens=9)
    gpu = on_gpu(model)
    assert_close(gpu(**moved(batch)).logits.cpu(), model(**batch).logits, rtol=1e-4, atol=1e-4)
    losses = []
    for one, inputs in ((model, batch), (gpu, moved(batch))):
        loss = one.train()(**inputs, labels=labels.to(one.device)).loss
        loss.backward()
        losses.append(loss.item())
    assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for (name, p), q in zip(model.named_parameters(), gpu.parameters(), strict=True):
        if p.grad is not None:
            assert p.grad.abs().max() < 1e-6 or distance(q.grad, p.grad) < 1e-2, name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("tokens", [49, 9, 1])
def test_generation_is_the_same_on_both_devices(cache, tokens):
    "With a static cache the steps are not compiled here."
    model = tiny()
    model.generation_config.eos_token_id = None
    batch = dict(input_ids=prompt(tokens), pixel_values=images(), tokens=tokens)
    options = dict(max_new_tokens=8, do_sample=False)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    expected = model.generate(**batch, **options)
    assert_close(on_gpu(model).generate(**moved(batch), **options).cpu(), expected)


@pytest.mark.parametrize(
    "name", ["fastv", "llavolta", "quecc", "prumerge", "fastervlm", "evit", "dynamicvit"]
)
def test_other_compressors_generate_on_the_gpu(name):
    "FastV edits masks and caches inside the LLM, under sdpa; the others need more than features."
    model = inside.tiny(name)
    batch = inside.inputs(model)
    gpu = on_gpu(model)
    assert gpu.config.text_config._attn_implementation == "sdpa"
    expected = model(**batch).logits[:, -1]
    assert_close(gpu(**moved(batch)).logits[:, -1].cpu(), expected, rtol=1e-3, atol=1e-3)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert gpu.generate(**moved(batch), **options).shape[1] == batch["input_ids"].shape[1] + 4
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    gpu.train()(**moved(batch), labels=labels.to(DEVICE)).loss.backward()


def test_word_cams_are_the_same_on_both_devices():
    model = tiny()
    processor = build_processor(CLIPImageProcessorPil(), byte_tokenizer(), tokens=9, template="v1")
    model.generation_config.eos_token_id = None
    image = Image.linear_gradient("L").resize((224, 224)).convert("RGB")
    options = dict(answer="A red fox.", tokens=9)
    expected = word_cams(model, processor, image, "What?", **options)
    found = word_cams(on_gpu(model), processor, image, "What?", **options)
    assert distance(found.cams, expected.cams) < 1e-3


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def weights(folder):
    whole = folder / "model.safetensors"
    return load_file(whole if whole.exists() else folder / "projector.safetensors")


class OnGpu(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert next(model.parameters()).device.type == DEVICE


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


STAGES = {
    "stage 1": ("pretrain", dict(bf16=True)),
    "stage 1, checkpointing": ("pretrain", dict(bf16=True, gradient_checkpointing=True)),
    "stage 1, long passes": ("pretrain", dict(bf16=True, gradient_checkpointing=True, checkpoint_above=750)),
    "stage 2": ("finetune", dict(bf16=True)),
    "stage 2, packing": ("finetune", dict(bf16=True, packing=True)),
    "stage 2, LoRA": ("finetune", dict(bf16=True, lora_rank=4)),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_on_the_gpu(parts, tmp_path, name):
    kind, options = STAGES[name]
    each = EachStep()
    path = run_stage(stage(kind, parts, tmp_path, max_steps=3, **options), callbacks=[each, OnGpu()])
    assert torch.cuda.get_device_name() in json.loads(path.read_text())["hardware"]
    assert len(each.losses) == 3 and all(0 < loss < 20 for loss in each.losses)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_resumed_run_has_the_same_bits(parts, tmp_path, kind):
    "With deterministic kernels; DropPath draws from the GPU's own generator."
    run_stage(stage(kind, parts, tmp_path / "whole"), callbacks=[OnGpu()])
    stopped = stage(kind, parts, tmp_path / "stopped", save_steps=2)
    run_stage(stopped, callbacks=[StopAfter(2)])
    run = tmp_path / "stopped" / "run.json"
    content = json.loads(run.read_text())
    run.write_text(json.dumps(content | dict(result=None)))  # not finished
    run_stage(stopped)
    assert json.loads(run.read_text())["resumed"] is True
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(whole[key].equal(resumed[key]) for key in whole)


def test_float32_losses_are_those_of_the_cpu(parts, tmp_path):
    "TokenPacker has no DropPath, whose random numbers differ between devices."
    losses = {}
    for device in (DEVICE, "cpu"):
        each = EachStep()
        settings = stage("pretrain", parts, tmp_path / device, compressor="tokenpacker", max_steps=4)
        run_stage(settings, callbacks=[each], use_cpu=device == "cpu")
        losses[device] = each.losses
    assert_close(losses[DEVICE], losses["cpu"], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- packing


def collated(packing):
    "Four rows of text of different lengths."
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    processor = build_processor(image_processor, byte_tokenizer(), tokens=9, template="v1")
    rows = []
    for i, n in enumerate((1, 1, 2, 20)):
        turns = [
            {"from": "human", "value": "Tell me more. " * n},
            {"from": "gpt", "value": "Once upon a time. " * n},
        ]
        rows.append(dict(id=str(i), image=None, conversations=turns))
    return Collator(processor=processor, packing=packing)(rows)


def loss_of(model, batch):
    return model.train()(**moved(batch)).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_have_the_loss_of_padded_ones(dtype):
    model = on_gpu(tiny()).to(dtype)
    packed, padded = collated(True), collated(False)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(loss_of(model, packed), loss_of(model, padded), rtol=rtol, atol=0)


# ---------------------------------------------------------------- compilation, which is slow


def test_a_compiled_projector_gives_the_same():
    projector, features = true_projector()
    gpu, features = on_gpu(projector).bfloat16(), moved(features, torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(gpu, fullgraph=True, dynamic=False)
        assert distance(compiled(features, tokens=16), gpu(features, tokens=16)) < 0.02


@pytest.mark.parametrize(
    "kind, options", [("pretrain", {}), ("finetune", dict(lora_rank=4, lora_dropout=0.0))]
)
def test_compiled_layers_give_the_losses_of_eager_ones(parts, tmp_path, kind, options):
    "In float32; TokenPacker has no DropPath, whose random numbers would be drawn from another state."
    losses = {}
    for compiled in (False, True):
        each = EachStep()
        same = dict(compressor="tokenpacker", max_steps=3, torch_compile=compiled) | options
        run_stage(stage(kind, parts, tmp_path / str(compiled), **same), callbacks=[each])
        losses[compiled] = each.losses
    assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-4)


def test_flex_attention_packs_rows():
    "Compiled by transformers; heads of 16 channels, the fewest that the kernel takes."
    model = on_gpu(tiny())
    packed, padded = collated(True), collated(False)
    expected = loss_of(model, padded)
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert_close(loss_of(model, packed), expected, rtol=1e-3, atol=0)
