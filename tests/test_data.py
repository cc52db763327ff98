"""Pixels as numbers and as pictures."""

import io

import numpy as np
import torch
from PIL import Image

from distmatch import data


def test_eight_bits_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(pixels)), pixels)
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_grid_places_every_tile(tmp_path):
    pixels = torch.arange(5 * 9, dtype=torch.uint8).reshape(5, 1, 3, 3)
    sheet = data.grid(pixels, columns=2, gap=1)
    assert sheet.shape == (3 * 4 + 1, 2 * 4 + 1, 3)
    for i in range(5):
        y, x = (i // 2) * 4 + 1, (i % 2) * 4 + 1
        assert np.array_equal(sheet[y : y + 3, x : x + 3, 1], pixels[i, 0].numpy())
    decoded = np.asarray(Image.open(io.BytesIO(data.png(sheet, zoom=3))))
    assert np.array_equal(decoded[::3, ::3], sheet)
