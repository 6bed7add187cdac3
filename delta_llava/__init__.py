"""Delta-LLaVA: a token-efficient visual projector, and every projector it is compared with.

`import delta_llava` loads nothing else: each name below is imported from its module when it is first used.
The names of the model import its processor as well, so that `AutoConfig`, `AutoModel` and `AutoProcessor`
know `"delta_llava"`."""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors read; a test compares it with the table below
    from delta_llava.answerer import Answerer as Answerer
    from delta_llava.compressors.base import Compressor as Compressor
    from delta_llava.compressors.base import build_compressor as build_compressor
    from delta_llava.compressors.base import compressor_config as compressor_config
    from delta_llava.compressors.base import register_compressor as register_compressor
    from delta_llava.config import CompressorConfig as CompressorConfig
    from delta_llava.config import ProjectorConfig as ProjectorConfig
    from delta_llava.gradcam import grad_cam as grad_cam
    from delta_llava.gradcam import word_cams as word_cams
    from delta_llava.grid import VisionFeatures as VisionFeatures
    from delta_llava.processor import DeltaLlavaProcessor as DeltaLlavaProcessor
    from delta_llava.projector import DeltaProjector as DeltaProjector
    from delta_llava.runs import load as load
    from delta_llava.vlm import DeltaLlavaConfig as DeltaLlavaConfig
    from delta_llava.vlm import DeltaLlavaForConditionalGeneration as DeltaLlavaForConditionalGeneration

_MODULES = {  # name -> the module that defines it
    "Answerer": "answerer",
    "Compressor": "compressors.base",
    "CompressorConfig": "config",
    "DeltaLlavaConfig": "vlm",
    "DeltaLlavaForConditionalGeneration": "vlm",
    "DeltaLlavaProcessor": "processor",
    "DeltaProjector": "projector",
    "ProjectorConfig": "config",
    "VisionFeatures": "grid",
    "build_compressor": "compressors.base",
    "compressor_config": "compressors.base",
    "grad_cam": "gradcam",
    "load": "runs",
    "register_compressor": "compressors.base",
    "word_cams": "gradcam",
}
_REGISTERING = ("vlm", "processor")  # importing these registers "delta_llava" with the Auto classes
_MODEL_NAMES = (
    "Answerer", "DeltaLlavaConfig", "DeltaLlavaForConditionalGeneration", "DeltaLlavaProcessor", "load")

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    "Import a public name when it is first used."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODEL_NAMES:
        for module in _REGISTERING:
            import_module(f"{__name__}.{module}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
