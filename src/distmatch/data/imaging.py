"""Converts pixels between numbers and pictures: to floats and back, grids, PNGs."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.data.images import Images as Images
from distmatch.data.images import load_images as load_images


def to_float(pixels: Tensor) -> Tensor:
    """Convert u8 in 0..255 to f32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to u8 in 0..255, rounded and clamped."""
    return (images.float() * 127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def picture(samples: Tensor, extent: float = 6.0) -> Tensor:
    """Return samples as pictures u8[N,C,H,W]: images f[N,C,H,W] in [-1, 1] one by one, points f[N,2] in one picture.

    Points are drawn as dots; those outside `[-extent, extent]^2` are left out. The second axis points up.
    """
    if samples.ndim == 4:
        return to_uint8(samples)
    side = 128
    column, row = ((samples.cpu() / extent + 1) * side / 2).floor().long().unbind(1)
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    pixels = torch.full((1, 1, side, side), 255, dtype=torch.uint8)
    pixels[0, 0, side - 1 - row[inside], column[inside]] = 0
    return pixels


def grid(pixels: Tensor, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arrange `pixels u8[N,C,H,W]` row by row on a light background: u8[rows * (H + gap) + gap, ..., 3]."""
    n, _, h, w = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 235, dtype=np.uint8)
    for i, tile in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        sheet[y : y + h, x : x + w] = tile
    return sheet


def png(array: np.ndarray, zoom: int = 1) -> bytes:
    """Encode u8[H,W] or u8[H,W,C] as PNG, enlarged `zoom` times without smoothing."""
    image = Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # the default level takes three times as long to save a seventh
    return buffer.getvalue()
