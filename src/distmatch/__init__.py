"""distmatch: turn a pretrained diffusion model into a one-step generator by Distribution Matching Distillation.

The names below are loaded when they are first used, so that `import distmatch` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distmatch.denoiser import Cond as Cond
    from distmatch.denoiser import Denoiser as Denoiser
    from distmatch.denoiser import Prediction as Prediction
    from distmatch.images import Images as Images
    from distmatch.images import load_images as load_images
    from distmatch.models.info import Info as Info
    from distmatch.pipeline import DistilledPipeline as DistilledPipeline
    from distmatch.pipeline import TeacherPipeline as TeacherPipeline
    from distmatch.recipe_entries import Recipe as Recipe
    from distmatch.run import distil as distil
    from distmatch.schedule import EDM as EDM
    from distmatch.schedule import VP as VP
    from distmatch.schedule import Flow as Flow

_HOME = {
    "Cond": "denoiser",
    "Denoiser": "denoiser",
    "DistilledPipeline": "pipeline",
    "EDM": "schedule",
    "Flow": "schedule",
    "Images": "images",
    "Info": "models.info",
    "Prediction": "denoiser",
    "Recipe": "recipe_entries",
    "TeacherPipeline": "pipeline",
    "VP": "schedule",
    "distil": "run",
    "load_images": "images",
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
