"""A feature space that needs no training: the principal components of the pixels of real images.

It sees where everything is but not what it means, which makes it as different as possible from a classifier's features.
"""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.data import imaging
from distmatch.data.images import Images
from distmatch.system import rng
from distmatch.system.digests import load_file, save_file
from distmatch.system.errors import UserError
from distmatch.system.files import together, write_json
from distmatch.system.plain import read_json

FORMAT = "distmatch-pixels-1"
COMPONENTS = 64


class Pixels(nn.Module):
    """`(pixels u8[B,C,H,W]) -> features f[B,F]`: coordinates in an orthonormal basis. A `features.FeatureSpace`.

    Args:
        shape: (C, H, W).
        mean: f[C*H*W], of images in [-1, 1].
        basis: f[C*H*W, F], orthonormal columns.
    """

    name = "pixels"
    distance = "frechet/pixels"
    classes = ()
    mean: Tensor
    basis: Tensor

    def __init__(self, shape: tuple[int, ...], mean: Tensor, basis: Tensor):
        super().__init__()
        if mean.shape != (prod(shape),) or basis.shape[:-1] != mean.shape:
            raise UserError(f"mean {tuple(mean.shape)} and basis {tuple(basis.shape)} are not of images {tuple(shape)}")
        self.shape = tuple(shape)
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    @property
    def identity(self) -> dict[str, Any]:
        return {"space": "pixels", "shape": list(self.shape)}

    def both(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return `(features f[B,F], None)`. Raises `UserError` for images of another shape than those of the basis."""
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.shape:
            expected = f"uint8 (B, {', '.join(map(str, self.shape))})"
            raise UserError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}; the real images are {expected}")
        x = imaging.to_float(pixels.to(self.basis.device)).flatten(1)
        return (x - self.mean) @ self.basis, None

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json` to `folder`."""
        with together(folder, "config.json") as beside:
            written = save_file(self.state_dict(), beside / "model.safetensors")
            write_json(beside / "config.json", {"format": FORMAT, "shape": list(self.shape), "weights": written})

    @classmethod
    def load(cls, folder: Path) -> "Pixels":
        """Load the space in `folder`. Raises `UserError` if the folder is damaged or holds something else."""
        try:
            config = read_json(folder / "config.json", dict[str, Any])
            if config["format"] != FORMAT:
                raise UserError(f"its format is {config['format']!r:.80}, not {FORMAT!r}: made by another version")
            return cls(tuple(config["shape"]), **load_file(folder / "model.safetensors", config.get("weights")))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(
                f"{folder} is damaged: {type(error).__name__}: {error}; run `distmatch classifier` again"
            ) from error


def principal_components(images: Images, components: int = COMPONENTS, sample: int = 10_000) -> Pixels:
    """Return the space of the first `components` principal components of `images`, or of a `sample` of them.

    There are fewer components if there are fewer pixels, or if there are fewer than two images per component. The
    result depends only on the images, up to rounding. Raises `UserError` for fewer than 2 images.
    """
    if len(images) < 2:
        raise UserError(f"principal components of {len(images)} image were asked for; at least 2 are needed")
    rows = torch.from_numpy(rng.shuffled(0, len(images), 0, min(sample, len(images))))
    x = imaging.to_float(images.pixels[rows]).flatten(1)
    mean = x.mean(0)
    most = min(components, x.shape[1], len(images) // 2)
    with rng.seeded(0):  # the method starts from random directions
        basis = torch.svd_lowrank(x - mean, q=min(most + 16, *x.shape), niter=4)[2][:, :most]
    return Pixels(tuple(images.pixels.shape[1:]), mean, basis.contiguous())
