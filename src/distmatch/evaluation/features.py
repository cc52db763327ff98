"""Reference statistics of real images in a feature space, computed once and cached by fingerprint."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distmatch.data.images import Images, load_images
from distmatch.evaluation.metrics import Moments
from distmatch.system import limits, rng
from distmatch.system.arrays import arrays
from distmatch.system.digests import Damaged, read_file, save_file, tensor_digest
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic
from distmatch.system.paths import CACHE
from distmatch.system.progress import console
from distmatch.system.screen import printable

FORMAT = "distmatch-reference-1"


class FeatureSpace(Protocol):
    """The space in which images are compared: a `Classifier`'s features, `Pixels`' components, FID's
    `Inception`, or `EfficientNet`."""

    @property
    def name(self) -> str:
        """Its name next to figures, e.g. `pooled`."""
        ...

    @property
    def distance(self) -> str:
        """Name of the Frechet distance in these features among the figures: `fid` or `frechet/NAME`."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes it recognises, in the order of its logits; empty if it knows none."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything apart from the weights that determines the features, as JSON."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def to(self, device: torch.device, /) -> Any: ...

    def both(self, pixels: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """`pixels u8[B,C,H,W]` in 0..255 -> `(features f[B,F], logits f[B,K])`; None for logits without classes."""
        ...


@dataclass(frozen=True)
class Reference:
    """Statistics of real images in one feature space.

    Args:
        mu, cov: f64[F], f64[F,F], of all images.
        features: f32[n,F] of n images drawn at random, for kernel distance, precision and recall; rounded to half
            precision, which is what the file stores. Empty (n = 0) if only the statistics are known.
        count: number of images; 0 if unknown.
        source: description of the images.
        images, classifier: SHA-256 of the pixels and of the feature space (`image_fingerprint`, `fingerprint`); empty
            if unknown.
    """

    mu: Tensor
    cov: Tensor
    features: Tensor
    count: int
    source: str
    images: str
    classifier: str

    def save(self, file: Path) -> None:
        """Write one safetensors file; everything but the tensors goes into its header."""
        tensors = {"mu": self.mu, "cov": self.cov, "features": self.features.half()}
        names = ("count", "source", "images", "classifier")
        header = json.dumps({"format": FORMAT, **{name: getattr(self, name) for name in names}})
        write_atomic(file, lambda p: save_file(tensors, p, metadata={"distmatch": header}))


def load_reference(file: Path, space: FeatureSpace | None = None) -> Reference:
    """Return the reference in `file`, which must have been made in `space` if one is given.

    Raises `UserError` if the file is missing or damaged, or was made in another feature space.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist; `distmatch classifier` makes a reference.safetensors")
    try:
        content, metadata = read_file(file)
        header: dict[str, Any] = json.loads(metadata["distmatch"])
        tensors = {name: content[name] for name in ("mu", "cov", "features")}
        if header.pop("format", None) != FORMAT:
            raise UserError(f"{file} is not of format {FORMAT!r}: not a reference, or one of another version")
        tensors["features"] = tensors["features"].float()
        loaded = Reference(**tensors, **header)
    except (AttributeError, KeyError, TypeError, OSError, json.JSONDecodeError, Damaged) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}; delete it and make it again") from error
    if space is not None and loaded.classifier != fingerprint(space):
        raise UserError(f"{file} was made with another classifier; features of two classifiers cannot be compared")
    return loaded


@torch.no_grad()
def reference(
    images: Images,
    space: FeatureSpace,
    cache: Path | None = CACHE,
    *,
    keep: int = 10_000,
    source: str = "",
    batch: int = 250,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Return the reference of `images` in `space`, from the folder `cache` if it is there already.

    Cached references are looked up by the fingerprints of pixels and space; a damaged one is recomputed.

    Args:
        cache: with `None`, always compute the reference and store nothing.
        keep: number of images whose features are kept, drawn at random by position.
        source: description of the images.
        progress: called with the number of images after each batch.

    Raises `UserError` for fewer than 2 images, or images that the network does not accept.
    """
    pixels, network = image_fingerprint(images.pixels), fingerprint(space)
    source = source or f"{len(images):,} images, SHA-256 {pixels[:12]}"
    file = None
    if cache is not None:
        key = sha256(f"{FORMAT}/{pixels}/{network}/{keep}".encode()).hexdigest()
        file = cache / f"reference-{key[:32]}.safetensors"
        if file.exists():
            with suppress(UserError):
                found = load_reference(file, space)
                if (found.images, len(found.features)) == (pixels, min(keep, len(images))):
                    return replace(found, source=source)
            console.print(f"{file} is damaged; it is made again", soft_wrap=True)

    moments, parts = Moments(), []
    for rows in images.pixels.split(batch):
        parts.append(space.both(rows)[0].float().cpu())
        moments.update(parts[-1])
        if progress is not None:
            progress(len(rows))
    chosen = torch.from_numpy(rng.shuffled(0, len(images), 0, min(keep, len(images))))
    features = torch.cat(parts)[chosen].half().float()  # as the file stores them, so that cached ones are equal
    made = Reference(moments.mean, moments.cov, features, len(images), source, pixels, network)
    if file is not None:
        with suppress(OSError):  # failing to write the cache is not an error
            made.save(file)
    return made


def all_features(known: Reference) -> Tensor:
    """Return the features f32[N,F] of all N images, in the images' order, of a reference that kept all of them."""
    order = torch.from_numpy(rng.shuffled(0, known.count, 0, known.count))
    return torch.empty_like(known.features).index_copy_(0, order, known.features)


def load_statistics(file: Path) -> Reference | None:
    """Return the statistics `mu` and `sigma` in `file`, an .npz as in EDM and pytorch-fid, or `None` if it has none.

    Statistics don't say which network and which resize they were made with; by convention, FID's Inception and
    `legacy`. ADM's files also hold some of the images; these are ignored, because the statistics cover all images.

    Raises `UserError` if they are not a mean f[F] and covariance f[F,F], or if the file is damaged.
    """
    if file.suffix != ".npz":
        return None
    found = arrays(file)
    if not {"mu", "sigma"} <= found.keys():
        return None
    mean, cov = found["mu"], found["sigma"]
    if len(mean.shape) != 1 or cov.shape != mean.shape * 2 or not all(a.dtype.kind == "f" for a in (mean, cov)):
        raise UserError(
            f"{file}: mu is {mean.dtype} {mean.shape} and sigma {cov.dtype} {cov.shape}; "
            "expected floats (F,) and (F, F)"
        )
    limits.check(cov.nbytes, limits.STATISTICS, f"{file}: sigma")
    mu, sigma = mean.read(), cov.read()
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{file}: mu or sigma is not finite; get it again")
    statistics = torch.from_numpy(mu).double(), torch.from_numpy(sigma).double()
    return Reference(*statistics, torch.empty(0, len(mu)), 0, str(file), images="", classifier="")


def load_real(path: Path) -> Images:
    """Return images from a folder or an archive (see `images.load_images`), or an array u8[N,H,W,C] in an .npy or .npz.

    In an .npz the array is called `arr_0`, as in ADM's files (Dhariwal and Nichol 2021), or is the only one.

    Raises `UserError` if the path is missing or damaged, or holds no such array.
    """
    if path.suffix not in (".npz", ".npy"):
        return load_images(path)
    found = arrays(path)
    name = next(iter(found)) if len(found) == 1 else "arr_0"
    if name not in found:
        names = ", ".join(printable(name, 40) for name in list(found)[:12])
        raise UserError(f"{path} has no arr_0, nor mu and sigma; it has {names or 'nothing'}")
    array = found[name]
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] not in (1, 3):
        raise UserError(
            f"{path}: {name} is {array.dtype} {array.shape}; expected images as uint8 (N, H, W, C) with C of 1 or 3"
        )
    limits.check(array.nbytes, limits.ARRAY, f"{path}: {name}")
    return Images(torch.from_numpy(array.read()).permute(0, 3, 1, 2).contiguous(), None, ())


def image_fingerprint(pixels: Tensor) -> str:
    """Return the SHA-256 of the shape and the bytes of `pixels u8[N,C,H,W]`."""
    return tensor_digest(pixels)


def fingerprint(space: FeatureSpace) -> str:
    """Return the SHA-256 of everything that determines what `space` computes: its network and its weights."""
    weights = {name: tensor_digest(value) for name, value in sorted(space.state_dict().items())}
    return sha256(json.dumps({"network": space.identity, "weights": weights}).encode()).hexdigest()
