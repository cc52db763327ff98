"""distmatch: turn a pretrained diffusion model into a one-step generator by Distribution Matching Distillation.

The names below are loaded on first use, so that `import distmatch` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distmatch.commands.distillation import distil as distil
    from distmatch.data.images import Images as Images
    from distmatch.data.images import load_images as load_images
    from distmatch.diffusion.denoiser import Cond as Cond
    from distmatch.diffusion.denoiser import Denoiser as Denoiser
    from distmatch.diffusion.denoiser import Prediction as Prediction
    from distmatch.diffusion.schedule import EDM as EDM
    from distmatch.diffusion.schedule import VP as VP
    from distmatch.diffusion.schedule import Flow as Flow
    from distmatch.models.info import Info as Info
    from distmatch.pipeline import DistilledPipeline as DistilledPipeline
    from distmatch.pipeline import TeacherPipeline as TeacherPipeline
    from distmatch.recipe.entries import Recipe as Recipe

_HOME = {
    "Cond": "diffusion.denoiser",
    "Denoiser": "diffusion.denoiser",
    "DistilledPipeline": "pipeline",
    "EDM": "diffusion.schedule",
    "Flow": "diffusion.schedule",
    "Images": "data.images",
    "Info": "models.info",
    "Prediction": "diffusion.denoiser",
    "Recipe": "recipe.entries",
    "TeacherPipeline": "pipeline",
    "VP": "diffusion.schedule",
    "distil": "commands.distillation",
    "load_images": "data.images",
}
__all__ = [
    "EDM",
    "VP",
    "Cond",
    "Denoiser",
    "DistilledPipeline",
    "Flow",
    "Images",
    "Info",
    "Prediction",
    "Recipe",
    "TeacherPipeline",
    "distil",
    "load_images",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distmatch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"distmatch.{_HOME[name]}"), name)
