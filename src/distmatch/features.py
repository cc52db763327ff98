"""Reference statistics: what real images look like to a classifier, computed once and kept by fingerprint."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmatch import rng
from distmatch.checkpoint import write_atomic
from distmatch.data import Images
from distmatch.metrics import Moments
from distmatch.models.classifier import NETWORK, Classifier

FORMAT = "distmatch-reference-1"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distmatch"
"""Where references are kept unless told: the platform's cache folder for one user."""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in the features of one classifier.

    Args:
        mu, cov: f64[F], f64[F,F], of all images.
        features: f32[n,F] of n images drawn at random, for kernel distance, precision and recall; of half precision,
            which is what the file stores.
        count: number of images.
        source: what they are, in words.
        images, classifier: SHA-256 of the pixels and of the classifier (`image_fingerprint`, `fingerprint`).
    """

    mu: Tensor
    cov: Tensor
    features: Tensor
    count: int
    source: str
    images: str
    classifier: str

    def save(self, file: Path) -> None:
        """Write one safetensors file; what is no tensor goes into its header."""
        tensors = {"mu": self.mu, "cov": self.cov, "features": self.features.half()}
        names = ("count", "source", "images", "classifier")
        header = json.dumps({"format": FORMAT, **{name: getattr(self, name) for name in names}})
        write_atomic(file, lambda p: save_file(tensors, p, metadata={"distmatch": header}))


def load_reference(file: Path, classifier: Classifier | None = None) -> Reference:
    """The reference in `file`, made with `classifier` where one is given.

    Raises `ValueError` where the file is missing or damaged, or was made with another classifier.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist; `distmatch classifier` makes a reference.safetensors")
    try:
        with safe_open(file, framework="pt") as content:
            header: dict[str, Any] = json.loads((content.metadata() or {})["distmatch"])
            tensors: dict[str, Tensor] = {name: content.get_tensor(name) for name in ("mu", "cov", "features")}
            if header.pop("format", None) != FORMAT:
                raise ValueError(f"{file} is not of format {FORMAT!r}: not a reference, or one of another version")
            tensors["features"] = tensors["features"].float()
            loaded = Reference(**tensors, **header)
    except (AttributeError, KeyError, TypeError, OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}; delete it and make it again") from error
    if classifier is not None and loaded.classifier != fingerprint(classifier):
        raise ValueError(f"{file} was made with another classifier; features of two classifiers cannot be compared")
    return loaded


@torch.no_grad()
def reference(
    images: Images,
    classifier: Classifier,
    cache: Path | None = CACHE,
    *,
    keep: int = 10_000,
    source: str = "",
    batch: int = 500,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """The reference of `images` in the features of `classifier`, from the folder `cache` if it is there already.

    It is found there by the fingerprints of the pixels and of the classifier; one that cannot be read is made again.

    Args:
        cache: `None` computes it always and keeps nothing.
        keep: how many images' features to keep, drawn at random by position.
        source: description of the images.
        progress: called with the number of images after each batch.

    Raises `ValueError` for fewer than 2 images, or images that the classifier does not take.
    """
    pixels, network = image_fingerprint(images.pixels), fingerprint(classifier)
    source = source or f"{len(images):,} images, SHA-256 {pixels[:12]}"
    file = None
    if cache is not None:
        key = sha256(f"{FORMAT}/{pixels}/{network}/{keep}".encode()).hexdigest()
        file = cache.expanduser() / f"reference-{key[:32]}.safetensors"
        with suppress(ValueError):
            return replace(load_reference(file, classifier), source=source)

    moments, parts = Moments(), []
    for rows in images.pixels.split(batch):
        parts.append(classifier.features(rows).float().cpu())
        moments.update(parts[-1])
        if progress is not None:
            progress(len(rows))
    chosen = torch.from_numpy(rng.shuffled(0, len(images), 0, min(keep, len(images))))
    features = torch.cat(parts)[chosen].half().float()
    made = Reference(moments.mean, moments.cov, features, len(images), source, pixels, network)
    if file is not None:
        with suppress(OSError):  # a cache that cannot be written to is no reason to fail
            made.save(file)
    return made


def image_fingerprint(pixels: Tensor) -> str:
    """SHA-256 of the shape and the bytes of `pixels u8[N,C,H,W]`."""
    return _digest(pixels).hexdigest()


def fingerprint(classifier: Classifier) -> str:
    """SHA-256 over all that decides what `classifier` computes: its network and its weights."""
    weights = {name: _digest(value).hexdigest() for name, value in sorted(classifier.state_dict().items())}
    network = {name: classifier.config[name] for name in NETWORK}
    return sha256(json.dumps({"network": network, "weights": weights}).encode()).hexdigest()


def _digest(tensor: Tensor):
    digest = sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest
