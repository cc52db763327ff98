"""Optional packages: which extra brings each, and one message where one is missing."""

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
"""What is imported only where it is used, and the extra of this package that brings it."""


def need(*packages: str, by: str) -> None:
    """Raise `UserError` unless all `packages` can be imported; it says that `by` needs them and how to get them."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"{by} needs {package} ({error}): pip install 'distmatch[{EXTRAS[package]}]'") from error
