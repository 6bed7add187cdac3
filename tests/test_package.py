"The package's root and its core: what an import loads, which names there are, and compressors of one's own."

import ast
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import delta_llava
from delta_llava.compressors.base import (
    COMPRESSORS,
    COST_FORMULAS,
    VARIANTS,
    Compressor,
    build_compressor,
    compressor_class,
    compressor_config,
    compressor_name,
    config_from_dict,
    cost_formula,
    from_reference,
    register_compressor,
    to_reference,
)
from delta_llava.config import LEGACY_CONFIG_VALUES, CompressorConfig, ProjectorConfig, clip_b32_384
from delta_llava.grid import interpolate

PACKAGE = Path(delta_llava.__file__).parent
CORE = ("config", "grid", "delta", "mixing", "compressors.base", "projector")
NEEDED = {"torch", "einops", "jaxtyping", "delta_llava"}
HERE = [name for name in delta_llava._MODULES if find_spec(f"delta_llava.{delta_llava._MODULES[name]}")]


def run_python(code):
    "Output of a program in a process of its own."
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


# ---- the root


def test_importing_the_root_is_cheap():
    code = (
        "import sys, time; start = time.process_time(); import delta_llava; "
        "seconds = time.process_time() - start; "
        "print(seconds, [m for m in ('torch', 'transformers', 'numpy', 'einops') if m in sys.modules])"
    )
    seconds, loaded = run_python(code).split(maxsplit=1)
    assert loaded == "[]"
    assert float(seconds) <= 0.1


def test_every_name_is_found():
    assert set(dir(delta_llava)) == set(delta_llava.__all__)
    for name in HERE:
        value = getattr(delta_llava, name)
        assert value is getattr(import_module(f"delta_llava.{delta_llava._MODULES[name]}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'DeltaProjectorr'"):
        delta_llava.DeltaProjectorr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from delta_llava import nothing")


def test_no_name_hides_a_module():
    "Else what `from delta_llava import x` gives would depend on what was imported before."
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(delta_llava.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(delta_llava.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported_from = {}
    for node in block.body:
        (alias,) = node.names
        assert alias.name == alias.asname, "an explicit re-export"
        imported_from[alias.name] = node.module.removeprefix("delta_llava.")
    assert imported_from == delta_llava._MODULES
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", delta_llava._MODEL_NAMES)
def test_a_model_name_imports_model_and_processor(name, monkeypatch):
    "Both register with the Auto classes when they are imported."
    imported = []

    def note(module):
        imported.append(module)
        return type("Module", (), {name: None})

    monkeypatch.setattr(delta_llava, "import_module", note)
    monkeypatch.delitem(vars(delta_llava), name, raising=False)
    delta_llava.__getattr__(name)
    monkeypatch.delitem(vars(delta_llava), name)
    assert {"delta_llava.vlm", "delta_llava.processor"} <= set(imported)


@pytest.mark.slow
def test_the_auto_classes_know_the_model():
    code = (
        "from delta_llava import DeltaLlavaConfig; from transformers import AutoConfig; "
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING; "
        "config = AutoConfig.for_model('delta_llava'); "
        "print(type(config) is DeltaLlavaConfig, PROCESSOR_MAPPING[type(config)].__name__)"
    )
    assert run_python(code).splitlines()[-1] == "True DeltaLlavaProcessor"


# ---- the core


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_little(module):
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= NEEDED


def test_the_projector_runs_without_transformers():
    code = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'safetensors', 'PIL', 'accelerate', 'peft'):\n"
        "    sys.modules[name] = None  # an import of it fails\n"
        "import torch\n"
        "from delta_llava import DeltaProjector\n"
        "projector = DeltaProjector(grid=6, tokens=9, levels=(1, 2), d_vision=128, d_llm=24)\n"
        "print(tuple(projector(torch.randn(2, 36, 256)).shape))"
    )
    assert run_python(code) == "(2, 9, 24)"


def test_old_configs_load():
    for field, values in LEGACY_CONFIG_VALUES.items():
        for old, new in values.items():
            d = ProjectorConfig().to_dict() | {field: old}
            assert getattr(ProjectorConfig.from_dict(d), field) == new
            assert getattr(config_from_dict("delta", d), field) == new
            assert d[field] == old, "the dict itself is left alone"
    with pytest.raises(ValueError, match=r"query_pool='taps'; use one of \['bilinear', 'mean'\]"):
        ProjectorConfig(query_pool="taps")


# ---- compressors of one's own


@dataclass(frozen=True, kw_only=True)
class MeanPoolConfig(CompressorConfig):
    bias: bool = True


class MeanPool(Compressor):
    Config = MeanPoolConfig

    def __init__(self, config=None, **fields):
        super().__init__(config, **fields)
        self.linear = nn.Linear(self.config.d_levels, self.config.d_llm, bias=self.config.bias)

    def forward(self, features, *, tokens=None, text=None):
        features, tokens = self.validate_inputs(features, tokens)
        return self.linear(interpolate(self.normalize(features.levels), round(tokens**0.5), "mean"))


def mean_pool_cost(config, patches, tokens):
    return {"linear": 2 * tokens * config.d_levels * config.d_llm}


SIZES = replace(clip_b32_384(tokens=16, d_llm=24), d_vision=32, heads=4, head_dim=8)


@pytest.fixture
def registered():
    register_compressor("mean-pool", MeanPool, cost=mean_pool_cost)
    yield "mean-pool"
    COMPRESSORS.pop("mean-pool", None)
    COST_FORMULAS.pop("mean-pool", None)


def test_a_registered_compressor_is_known_everywhere(registered):
    assert compressor_class(registered) is MeanPool
    config = compressor_config(registered, SIZES, bias=False)
    assert type(config) is MeanPoolConfig and config.grid == 12 and not config.bias
    assert config_from_dict(registered, config.to_dict()) == config
    for given in (config, config.to_dict()):
        module = build_compressor(registered, given)
        assert type(module) is MeanPool and compressor_name(module) == registered
    assert module(torch.randn(2, 144, 128), tokens=9).shape == (2, 9, 24)
    assert cost_formula(registered)(config, 144, 16) == {"linear": 2 * 16 * 128 * 24}
    with pytest.raises(ValueError, match="'mean-pool' needs a MeanPoolConfig, not a ProjectorConfig"):
        build_compressor(registered, SIZES)


def test_a_taken_name_is_refused(registered):
    with pytest.raises(ValueError, match="name='mean-pool' is taken"):
        register_compressor("mean-pool", MeanPool)
    assert register_compressor("mean-pool", MeanPool, exist_ok=True) is MeanPool
    with pytest.raises(ValueError, match="no cost formula registered for 'mean-pool'; give one with"):
        cost_formula("mean-pool")
    for name in ("mlp", "delta-no-tb"):
        with pytest.raises(ValueError, match=f"name={name!r} is taken"):
            register_compressor(name, MeanPool)
    with pytest.raises(ValueError, match="a variant cannot be replaced"):
        register_compressor("delta-no-tb", MeanPool, exist_ok=True)


def test_what_is_not_registered_says_how():
    with pytest.raises(ValueError, match="compressor='mean-pool' is unknown.*register_compressor"):
        build_compressor("mean-pool", SIZES)
    with pytest.raises(ValueError, match=r"MeanPool is not in the registry; add it with register_compressor"):
        compressor_name(MeanPool(MeanPoolConfig()))
    with pytest.raises(ValueError, match="no cost formula registered for 'mqt'"):
        cost_formula("mqt")


def test_a_config_of_another_class_is_refused():
    with pytest.raises(ValueError, match="must be a MeanPoolConfig; sizes are given by name"):
        MeanPool(CompressorConfig())


@pytest.mark.parametrize("name", [*COMPRESSORS, *VARIANTS])
def test_every_name_gives_a_config(name):
    sizes = replace(SIZES, tokens=144) if name == "mlp" else SIZES  # which keeps all patches
    config = compressor_config(name, sizes)
    assert isinstance(config, compressor_class(name).Config)


def test_names_of_a_reference():
    state_dict_map = {
        "attend.qkv.": "attn.in_proj_",
        "k.3.": "ln_k.",
        "k.": "k_proj.",
        "out.weight": "proj.T",
    }
    names = ("attn.in_proj_weight", "ln_k.weight", "k_proj.0.weight", "proj", "projection.weight")
    reference = {name: torch.randn(2, 3) for name in names}
    prefixed = {f"model.{name}": tensor for name, tensor in reference.items()}
    ours = from_reference(prefixed, state_dict_map, "model.")
    assert list(ours) == ["attend.qkv.weight", "k.3.weight", "k.0.weight", "out.weight", "projection.weight"]
    assert torch.equal(ours["out.weight"], reference["proj"].T)
    back = to_reference(ours, state_dict_map, "model.")
    assert back.keys() == prefixed.keys()
    assert all(torch.equal(back[name], prefixed[name]) for name in back)


def test_every_data_file_is_in_the_wheel():
    "Modules find their way by themselves; what else lies in the package must be named."
    root = Path(delta_llava.__file__).parent
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["delta_llava"]
    named = {file for pattern in patterns for file in root.glob(pattern)}
    found = {file for file in root.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert {file for file in found if "__pycache__" not in file.parts} <= named
