"""Pixels as numbers and as pictures."""

import io

import numpy as np
import torch
from PIL import Image

from distmatch.data import imaging


def test_eight_bits_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(imaging.to_uint8(imaging.to_float(pixels)), pixels)
    assert imaging.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_grid_places_every_tile(tmp_path):
    pixels = torch.arange(5 * 9, dtype=torch.uint8).reshape(5, 1, 3, 3)
    sheet = imaging.grid(pixels, columns=2, gap=1)
    assert sheet.shape == (3 * 4 + 1, 2 * 4 + 1, 3)
    for i in range(5):
        y, x = (i // 2) * 4 + 1, (i % 2) * 4 + 1
        assert np.array_equal(sheet[y : y + 3, x : x + 3, 1], pixels[i, 0].numpy())
    decoded = np.asarray(Image.open(io.BytesIO(imaging.png(sheet, zoom=3))))
    assert np.array_equal(decoded[::3, ::3], sheet)
