"""The output folder of `distmatch sample`: a grid, numbered images, and `sample.json`, which describes the call."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distmatch.data import imaging
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic, write_json
from distmatch.system.plain import read_json

MANIFEST = "sample.json"
GRID = "grid.png"


BLOCK = 4096
"""Bytes of a block of a disk, of which a file takes whole ones."""


def nbytes(n: int, shape: Sequence[int]) -> int:
    """Return about how many bytes `write` takes for `n` images of `shape` (C, H, W) that do not get smaller as PNG.

    In the grid they are larger, but repeated pixels take next to nothing.
    """
    one = math.prod(shape)
    return n * (BLOCK * math.ceil(one / BLOCK) + one)


def earlier(out: Path) -> list[Path]:
    """Return the images of an earlier call in `out`, which `write` replaces.

    Raises `UserError` if other files have such names, which would be mixed with the new images or lost.
    """
    known = _known(out / MANIFEST)
    found = sorted(path for path in out.glob("*.png") if path.name == GRID or re.fullmatch(r"\d{6,}", path.stem))
    foreign = [path for path in found if (0 if path.name == GRID else int(path.stem)) >= known]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0].name}, which is not of the call that {MANIFEST} there tells of"
            f"{'' if known else ' (there is none)'}. Choose another folder with --out, or move the pictures away"
        )
    return found


def write(out: Path, pixels: Tensor, columns: int, zoom: int, made: dict[str, Any]) -> None:
    """Write `pixels u8[N,C,H,W]`, and how they were `made`, replacing those of an earlier call.

    The old images are deleted first and `sample.json` is written next, so that a killed call leaves no mixture.
    """
    for path in earlier(out):
        path.unlink(missing_ok=True)
    write_json(out / MANIFEST, {"n": len(pixels), **made})
    _picture(out / GRID, imaging.grid(pixels, columns=columns), zoom)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        _picture(out / f"{i:06d}.png", image)


def _picture(file: Path, image: np.ndarray, zoom: int = 1) -> None:
    write_atomic(file, lambda path: path.write_bytes(imaging.png(image, zoom=zoom)))


def _known(manifest: Path) -> int:
    """Return how many images the call described by `sample.json` made."""
    if not manifest.exists():
        return 0
    try:
        return int(read_json(manifest, dict[str, Any])["n"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{manifest} is damaged; delete it with the pictures beside it") from error
