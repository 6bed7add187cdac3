"""What each compressor says about itself, so that one set of tests compares all with their references.

A `Reference` describes a fixture and how our module is built and run from it; `Sizes` is for the tests that
need no fixture (`test_compressors.py`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from hashfill import fill
from parity import close, info, tensors, under
from torch import nn

from delta_llava.compressors.base import (
    Compressor,
    build_compressor,
    compressor_class,
    from_reference,
    to_reference,
)
from delta_llava.compressors.baselines import CellsConfig, PixelShuffleConfig, RandomPatchesConfig
from delta_llava.compressors.cabstractor import CAbstractorConfig
from delta_llava.compressors.dynamicvit import DynamicViTConfig
from delta_llava.compressors.evit import EViTConfig
from delta_llava.compressors.fastervlm import FasterVLMConfig
from delta_llava.compressors.m3 import M3Config
from delta_llava.compressors.mlp import MLPConfig
from delta_llava.compressors.mqt import MQTConfig
from delta_llava.compressors.prumerge import PruMergeConfig
from delta_llava.compressors.quecc import QueCCConfig
from delta_llava.compressors.qwen import QwenConfig
from delta_llava.compressors.tokenpacker import TokenPackerConfig
from delta_llava.config import CompressorConfig
from delta_llava.grid import VisionFeatures, sincos_2d
from delta_llava.tower import cls_attention


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state_size(module: nn.Module) -> int:
    return sum(t.numel() for t in module.state_dict().values())


def run_forward(module, inputs, case) -> dict:
    "The usual call: one tensor of features."
    return dict(out=module(inputs["x"]))


@dataclass(frozen=True, kw_only=True)
class Real:
    "Cases of the fixture `real_shapes`: true widths, hash-filled weights and inputs."

    cases: str  # Prefix of the cases' names
    hash: str  # Prefix of the names in the hash
    config: Callable = lambda case: None  # Case -> config; `None` takes the class's default
    inputs: dict = field(default_factory=lambda: dict(x=(1, 576, 1024)))  # Name -> shape
    run: Callable | None = None  # Module, inputs, case -> tokens; by default after three empty levels
    constants: Callable = dict  # Tensors that are not hash-filled, by the reference's names


@dataclass(frozen=True, kw_only=True)
class Reference:
    "One fixture of a reference, and how our module is built and run from it."

    name: str  # In the registry
    fixture: str  # NAME.json and NAME.safetensors
    config: Callable  # Folder, case -> config
    inputs: Callable  # Folder, case -> name -> tensor
    state: Callable  # Folder, case -> the reference's tensors
    run: Callable = run_forward  # Module, inputs, case -> `out` and intermediates
    count: Callable = lambda folder, case: {}  # Folder, case -> function of the module -> its expected value
    where: Callable = lambda case: True  # Which cases are compared
    prefix_in_reference: str = ""  # Of the module below its prefix in the reference's checkpoint
    real: Real | None = None

    def load(self, folder, case, scale=1.0) -> Compressor:
        "Ours with the sizes of a case and the reference's state, scaled."
        module = build_compressor(self.name, self.config(folder, case))
        prefix = module.prefix + self.prefix_in_reference
        state = {prefix + k: v * scale for k, v in self.state(folder, case).items()}
        module.load_state_dict(from_reference(state, module.state_dict_map, module.prefix))
        return module.eval()

    def outputs(self, folder, case, scale=1.0) -> dict:
        "Outputs and intermediates of a case."
        return self.run(self.load(folder, case, scale), self.inputs(folder, case), case)

    def expected(self, folder, case) -> dict:
        "What the reference gave."
        stored = dict(out=tensors(folder, self.fixture)[f"out.{case['name']}"])
        return stored | self.intermediates(folder, case)

    def intermediates(self, folder, case) -> dict:
        return under(folder, self.fixture, f"mid.{case['name']}.") if self.fixture == "quecc" else {}


@lru_cache(maxsize=2)
def real_module(reference: str, config: CompressorConfig | None, scale=1.0) -> Compressor:
    "True widths, hash-filled under the reference's names."
    described = next(r for r in REFERENCES if r.name == reference)
    cls = compressor_class(reference)
    with torch.device("meta"):
        module = cls(config)
    state = {}
    for key, tensor in to_reference(module.state_dict(), module.state_dict_map).items():
        state[key] = torch.from_numpy(fill(f"{described.real.hash}/{key}", tuple(tensor.shape))) * scale
    state |= described.real.constants()
    module.load_state_dict(from_reference(state, module.state_dict_map), assign=True)
    return module.eval()


def real_outputs(reference: Reference, case, scale=1.0) -> torch.Tensor:
    "Tokens of a case at true widths."
    real = reference.real
    module = real_module(reference.name, real.config(case), scale)
    inputs = {}
    for key, shape in real.inputs.items():
        inputs[key] = torch.from_numpy(fill(f"{real.hash}/in.{key}", shape, kind="input"))
    with torch.no_grad():
        if real.run is not None:
            return real.run(module, inputs, case)
        levels = torch.cat([torch.zeros(1, 576, 3072), inputs["x"]], -1)
        return module(levels, tokens=case.get("num_query_tokens", case.get("num_visual_tokens")))


# ---- LLaVA's MLP and M3
DEPTHS = {"linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}  # LLaVA's name -> linear layers


def mlp_config(folder, case) -> MLPConfig:
    n = tensors(folder, "llava_mlp")["in.x"].shape[1]
    return MLPConfig(
        grid=math.isqrt(n),
        tokens=n,
        levels=(23,),
        d_vision=case["mm_hidden_size"],
        d_llm=case["hidden_size"],
        depth=DEPTHS[case["name"]],
    )


MLP_REFERENCE = Reference(
    name="mlp",
    fixture="llava_mlp",
    config=mlp_config,
    inputs=lambda folder, case: dict(x=tensors(folder, "llava_mlp")["in.x"]),
    state=lambda folder, case: under(folder, "llava_mlp", f"state.{case['name']}."),
    count=lambda folder, case: {parameters: case["param_count"]},
    real=Real(cases="llava_mlp", hash="llava"),
)


def identity_state(width: int) -> dict:
    "LLaVA's `linear` that changes nothing: the output is what the reference stores, tokens before the MLP."
    return {"weight": torch.eye(width), "bias": torch.zeros(width)}


def m3_config(folder, case) -> M3Config:
    n, width = tensors(folder, "m3_pooling")["in.x"].shape[1:]
    return M3Config(
        grid=math.isqrt(n), tokens=case["out_tokens"], levels=(23,), d_vision=width, d_llm=width, depth=1
    )


M3_REFERENCE = Reference(
    name="m3",
    fixture="m3_pooling",
    config=m3_config,
    inputs=lambda folder, case: dict(x=tensors(folder, "m3_pooling")["in.x"]),
    state=lambda folder, case: identity_state(tensors(folder, "m3_pooling")["in.x"].shape[-1]),
    where=lambda case: case["scale"] == case["out_tokens"],
)  # others: test_parity_mlp.py


# ---- TokenPacker
def tokenpacker_config(folder, case) -> TokenPackerConfig:
    ctor = info(folder, "tokenpacker")["ctor"]
    assert (ctor["kv_dim"], ctor["ln_eps"]) == (ctor["embed_dim"], 1e-6)
    return TokenPackerConfig(
        grid=case["raw_grid"],
        tokens=(case["raw_grid"] // case["scale_factor"]) ** 2,
        levels=tuple(range(ctor["multi_dim"] // ctor["embed_dim"])),
        d_vision=ctor["embed_dim"],
        d_llm=ctor["hidden_size"],
        heads=ctor["num_heads"],
    )


def tokenpacker_inputs(folder, case) -> dict:
    return {key.rpartition(".")[2]: tensors(folder, "tokenpacker")[key] for key in case["inputs"]}


def project(module, inputs, case) -> torch.Tensor:
    grid = math.isqrt(inputs["multi"].shape[1])
    return module.project(inputs["multi"], inputs["single"], grid // case["scale_factor"])


TOKENPACKER_REFERENCE = Reference(
    name="tokenpacker",
    fixture="tokenpacker",
    config=tokenpacker_config,
    inputs=tokenpacker_inputs,
    state=lambda folder, case: under(folder, "tokenpacker", "state."),
    run=lambda module, inputs, case: dict(out=project(module, inputs, case)),
    count=lambda folder, case: {parameters: info(folder, "tokenpacker")["param_count"]},
    real=Real(
        cases="tokenpacker_",
        hash="tokenpacker",
        run=project,
        inputs=dict(single=(1, 576, 1024), multi=(1, 576, 4096)),
    ),
)


# ---- MQT
def mqt_config(folder, case) -> MQTConfig:
    ctor = info(folder, "mqt_resampler")["ctor"]
    assert ctor["ln_eps"] == 1e-6, "fixed in the reference, and here"
    return MQTConfig(
        grid=case.get("tgt_size", [24])[0],
        tokens=case["num_visual_tokens"],
        queries=ctor["grid_size"] ** 2,
        heads=ctor["num_heads"],
        levels=(23,),
        d_vision=ctor["kv_dim"],
        d_llm=ctor["embed_dim"],
    )


def mqt_count(folder, case) -> dict:
    numbers = info(folder, "mqt_resampler")
    return {state_size: numbers["param_count"], parameters: numbers["trainable"]}


MQT_REFERENCE = Reference(
    name="mqt",
    fixture="mqt_resampler",
    config=mqt_config,
    count=mqt_count,
    inputs=lambda folder, case: dict(
        x=tensors(folder, "mqt_resampler")["in.x_12" if "tgt_size" in case else "in.x"]
    ),
    state=lambda folder, case: {k: v.float() for k, v in under(folder, "mqt_resampler", "state.").items()},
    real=Real(cases="mqt_", hash="mqt", constants=lambda: dict(pos_embed=sincos_2d(16, 1024).half())),
)


# ---- QueCC
def quecc_config(folder, case) -> QueCCConfig:
    ctor = info(folder, "quecc")["ctor"]
    assert case["kernel"] == case["stride"] and ctor["ln_eps"] == 1e-6
    config = QueCCConfig(
        grid=case["raw_grid"],
        tokens=(case["raw_grid"] // case["kernel"]) ** 2,
        levels=tuple(range(ctor["multi_dim"] // ctor["vision_hidden"])),
        d_vision=ctor["vision_hidden"],
        d_llm=ctor["hidden_size"],
        d_text=ctor["text_dim"],
        heads=ctor["num_heads"],
    )
    assert config.kernel == case["kernel"]
    return config


def quecc_state(folder, case) -> dict:
    "What all cases share, and the kernel of this one."
    return under(folder, "quecc", "state.") | under(folder, "quecc", f"state_{case['name']}.")


def quecc_run(module, inputs, case) -> dict:
    compressed = module.compress(inputs["multi"], inputs["single"], inputs["text"])
    return dict(compressed=compressed, out=module.mlp(compressed))


def without_mlp(module) -> int:
    return parameters(module) - parameters(module.mlp)


QUECC_REFERENCE = Reference(
    name="quecc",
    fixture="quecc",
    config=quecc_config,
    state=quecc_state,
    run=quecc_run,
    inputs=lambda folder, case: under(folder, "quecc", f"in.g{case['raw_grid']}."),
    count=lambda folder, case: {parameters: case["total_params"], without_mlp: case["compressor_params"]},
    real=Real(
        cases="quecc_",
        hash="quecc",
        config=lambda case: QueCCConfig(tokens=(24 // case["kernel"]) ** 2),
        inputs=dict(multi=(1, 576, 4096), single=(1, 576, 1024), text=(1, 1, 4096)),
        run=lambda module, inputs, case: quecc_run(module, inputs, case)["out"],
    ),
)


# ---- C-Abstractor
def cabstractor_config(folder, case) -> CAbstractorConfig:
    ctor = case["ctor"]
    assert ctor["pos_emb"], "always there in our module"
    eos = ctor["num_eos_tokens"]
    return CAbstractorConfig(
        grid=math.isqrt(case["num_input_tokens"]),
        tokens=ctor["num_query_tokens"] + eos,
        levels=(24,),
        d_vision=ctor["encoder_hidden_size"],
        d_llm=ctor["output_hidden_size"],
        depth=ctor["depth"],
        hidden=ctor["hidden_size"],
        mlp_depth=ctor["mlp_depth"],
        prenorm=ctor["prenorm"],
        eos=eos,
    )


CABSTRACTOR_REFERENCE = Reference(
    name="cabstractor",
    fixture="honeybee_cabstractor",
    config=cabstractor_config,
    inputs=lambda folder, case: under(folder, "honeybee_cabstractor", f"in.{case['name']}."),
    state=lambda folder, case: under(folder, "honeybee_cabstractor", f"state.{case['name']}."),
    count=lambda folder, case: {parameters: case["param_count"]},
    real=Real(cases="cabs_", hash="cabs"),
)


# ---- Qwen-VL
def qwen_config(folder, case) -> QwenConfig:
    ctor = info(folder, "qwen_resampler")["ctor"]
    assert ctor["ln_eps"] == 1e-6, "fixed in the reference, and here"
    return QwenConfig(
        grid=math.isqrt(case["tokens"]),
        tokens=ctor["grid_size"] ** 2,
        heads=ctor["num_heads"],
        levels=(48,),
        d_vision=ctor["kv_dim"],
        d_llm=ctor["embed_dim"],
        post=False,
    )


QWEN_REFERENCE = Reference(
    name="qwen",
    fixture="qwen_resampler",
    config=qwen_config,
    prefix_in_reference="attn_pool.",
    inputs=lambda folder, case: dict(x=tensors(folder, "qwen_resampler")[f"in.{case['name']}"]),
    state=lambda folder, case: under(folder, "qwen_resampler", "state."),
    count=lambda folder, case: {state_size: info(folder, "qwen_resampler")["param_count"]},
)


# ---- PruMerge
class Stored(nn.Module):
    "A layer whose output is given."

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, _):
        return self.output


class StoredBlock(nn.Module):
    "A block of the vision tower whose projections are the stored queries and keys."

    def __init__(self, q, k):
        super().__init__()
        self.layer_norm1 = nn.Identity()
        self.self_attn = nn.Module()
        self.self_attn.q_proj = Stored(q[:, 0])
        self.self_attn.k_proj = Stored(k)


def prumerge_features(folder, case) -> VisionFeatures:
    "Patch tokens, attention and keys of a case, by our own attention from the stored queries and keys."
    stored = tensors(folder, "prumerge")
    batch = case["name"].split("_")[0]
    q, k = stored[f"in.{batch}.q"], stored[f"in.{batch}.k"]
    attention, keys = cls_attention(StoredBlock(q, k), k, k.shape[1] - 1)
    close(attention, stored[f"mid.{batch}.cls_attn"], "attention")
    return VisionFeatures(stored[f"in.{batch}.feats"], 24, attention, keys)


def prumerge_width(folder) -> int:
    return tensors(folder, "prumerge")["in.b1.feats"].shape[-1]


def prumerge_config(folder, case) -> PruMergeConfig:
    width = prumerge_width(folder)
    adaptive = case["args"]["if_adaptive"]
    return PruMergeConfig(
        levels=(0,),
        d_vision=width,
        d_llm=width,
        depth=1,
        plus="plus" in case["fn"],
        adaptive=adaptive,
        batch_statistics=True,
        tokens=73 if adaptive else case["out_shape"][1],
    )


PRUMERGE_REFERENCE = Reference(
    name="prumerge",
    fixture="prumerge",
    config=prumerge_config,
    where=lambda case: "error" not in case,
    inputs=lambda folder, case: dict(x=prumerge_features(folder, case)),
    state=lambda folder, case: identity_state(prumerge_width(folder)),
)

REFERENCES = (
    MLP_REFERENCE,
    M3_REFERENCE,
    TOKENPACKER_REFERENCE,
    MQT_REFERENCE,
    QUECC_REFERENCE,
    CABSTRACTOR_REFERENCE,
    QWEN_REFERENCE,
    PRUMERGE_REFERENCE,
)


# ---- tests without a fixture
@dataclass(frozen=True, kw_only=True)
class Sizes:
    "A small module, and what is known about its gradients."

    config: CompressorConfig
    variants: dict[str, dict] = field(default_factory=dict)  # Other fields that are tested too
    tokens: int | None = None  # Budget at which every parameter gets a gradient
    zero_grad_params: frozenset[str] = frozenset()  # Shifts that the softmax cancels

    def all_configs(self) -> dict[str, CompressorConfig]:
        standardized = {"standardized": replace(self.config, standardize=True)}
        return (
            {"default": self.config}
            | standardized
            | {name: replace(self.config, **fields) for name, fields in self.variants.items()}
        )


COMMON = dict(grid=6, tokens=9, levels=(1, 2), d_vision=32, d_llm=24)
PREDICTOR_PARAMS = [
    f"predictors.{i}.{layer}{part}"
    for i in range(2)
    for layer in ("norm.", "local.", "head.0.", "head.2.", "")
    for part in ("weight", "bias")
]
KEY_BIAS = frozenset({"k.3.bias"})  # adds the same number to all scores of a query
SIZES = {
    "mlp": Sizes(config=MLPConfig(**COMMON | dict(tokens=36)), variants={"linear": dict(depth=1)}),
    "m3": Sizes(config=M3Config(**COMMON)),
    "tokenpacker": Sizes(config=TokenPackerConfig(**COMMON, heads=4), zero_grad_params=KEY_BIAS),
    "mqt": Sizes(
        config=MQTConfig(**COMMON, queries=16, heads=4),
        tokens=16,
        zero_grad_params=frozenset({"ln_k.bias"}),
        variants={"one head": dict(heads=1), "wider LLM": dict(d_llm=64)},
    ),
    "quecc": Sizes(
        config=QueCCConfig(**COMMON, heads=4),
        zero_grad_params=KEY_BIAS,
        variants={"one cell": dict(tokens=1), "text width": dict(d_text=10)},
    ),
    "cabstractor": Sizes(
        config=CAbstractorConfig(**COMMON, depth=2),
        variants={
            "other width": dict(hidden=20),
            "no block": dict(depth=0),
            "prenorm": dict(prenorm=True),
            "end tokens": dict(eos=2, tokens=11),
            "one layer": dict(mlp_depth=1),
            "three layers": dict(mlp_depth=3),
            "one level": dict(levels=(4,)),
        },
    ),
    "qwen": Sizes(
        config=QwenConfig(**COMMON, heads=3),
        variants={"without post": dict(post=False), "as wide as the LLM": dict(d_vision=24)},
    ),
    "prumerge": Sizes(config=PruMergeConfig(**COMMON), variants={"plus": dict(plus=True)}),
    "fastervlm": Sizes(config=FasterVLMConfig(**COMMON)),
    "evit": Sizes(config=EViTConfig(**COMMON), variants={"own blocks": dict(blocks=(1,))}),
    "dynamicvit": Sizes(
        config=DynamicViTConfig(**COMMON),
        variants={"own blocks": dict(blocks=(1,))},
        zero_grad_params=frozenset(PREDICTOR_PARAMS),  # they are in the tower's pass: test_dynamicvit.py
    ),
    "random": Sizes(config=RandomPatchesConfig(**COMMON), variants={"other draw": dict(draw_seed=1)}),
    "spaced": Sizes(config=CellsConfig(**COMMON)),
    "meanpool": Sizes(config=CellsConfig(**COMMON)),
    "pixelshuffle": Sizes(config=PixelShuffleConfig(**COMMON)),
}


def small_module(name: str, config: CompressorConfig) -> Compressor:
    "All parameters random, so that none is hidden by a 0 or a 1."
    torch.manual_seed(0)
    module = build_compressor(name, config).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if config.standardize:
        module.fit_statistics(torch.randn(8, config.grid**2, config.d_levels) * 2 + 1)
    return module


def small_inputs(name: str, config: CompressorConfig, batch=2, grid=None, seed=1) -> dict:
    "Random inputs of a module: `features`, and `text` if it reads the question."
    generator = torch.Generator().manual_seed(seed)
    grid = grid or config.grid
    n = grid**2
    levels = torch.randn(batch, n, config.d_levels, generator=generator)
    requires = compressor_class(name).requires
    if "attention" in requires:
        attention = torch.randn(batch, n + 1, generator=generator).softmax(-1)[:, 1:]
        levels = VisionFeatures(levels, grid, attention, torch.randn(batch, n, 32, generator=generator))
    if "level_attention" in requires:
        attention = torch.randn(batch, n, generator=generator).softmax(-1)
        levels = VisionFeatures(levels, grid, level_attention=attention)
    if "reduction" in requires or "pruning" in requires:
        left = torch.randn(batch, config.tokens, config.d_levels, generator=generator)
        levels = VisionFeatures(left, grid, on_grid=False)
    inputs = dict(features=levels)
    if "text" in requires:
        inputs["text"] = torch.randn(
            batch, 1, getattr(config, "d_text", None) or config.d_llm, generator=generator
        )
    return inputs
