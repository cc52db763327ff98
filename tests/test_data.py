"""Reading image folders and archives; writing pictures."""

import io
import shutil
import tarfile
import zipfile

import bucket
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from distmatch import data


def test_folder_tar_and_zip_hold_the_same_images(tmp_path):
    folder = tiny.image_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        archive.add(folder, arcname=".")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    a, b, c = (data.load_images(tmp_path / name) for name in ("images", "images.tar.xz", "images.zip"))
    assert len(a) == 16
    assert a.classes == b.classes == c.classes == ("dark", "light")
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.pixels, c.pixels)
    assert torch.equal(a.labels, b.labels)
    first = np.asarray(Image.open(folder / "train" / "dark" / "0.png"))
    assert np.array_equal(a.pixels[0, 0].numpy(), first)
    assert (a.pixels[a.labels == 1].float().mean() - a.pixels[a.labels == 0].float().mean()).item() > 100


def test_splits_and_flat_folders(tmp_path):
    folder = tiny.image_folder(tmp_path / "images", per_class=3)
    assert len(data.load_images(folder, "test")) == 6
    flat = data.load_images(folder / "train" / "dark")
    assert (len(flat), flat.labels, flat.classes) == (3, None, ())
    with pytest.raises(ValueError, match="has no folder 'valid'; it has dark, light, test, train"):
        data.load_images(folder, "valid")
    with pytest.raises(ValueError, match="has no folder 'test'; it has none"):
        data.load_images(folder / "train" / "dark", "test")


def test_colour_images_become_three_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = data.load_images(tmp_path)
    assert images.pixels.shape == (1, 3, 4, 6)
    assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), pixels)


def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path):
    pixels = np.arange(0, 65536, 1000, dtype=np.uint16).reshape(6, 11)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(data.load_images(tmp_path).pixels[0, 0].numpy(), pixels // 256)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        data.load_images(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (5, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png is \(4, 5\), the first image is \(4, 4\)"):
        data.load_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b.png is not an image"):
        data.load_images(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"b.png is not an image that Pillow can read \(image file is truncated"):
        data.load_images(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        data.load_images(tmp_path / "broken.tar")


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


@pytest.mark.parametrize("suffix", ["tar.xz", "zip"])
def test_an_archive_at_a_url_is_the_archive_on_the_disk(tmp_path, monkeypatch, suffix):
    home = bucket.make(tmp_path, monkeypatch)
    folder = tiny.image_folder(tmp_path / "images")
    (home / "sets").mkdir()
    shutil.make_archive(str(home / "sets" / "set"), {"tar.xz": "xztar", "zip": "zip"}[suffix], folder)
    there, here = data.load_images(f"bucket://sets/set.{suffix}", "test"), data.load_images(folder, "test")
    assert torch.equal(there.pixels, here.pixels)
    assert there.classes == here.classes == ("dark", "light")
    for nothing in ("bucket://sets/none.tar", "bucket://sets"):
        with pytest.raises(ValueError, match=f"{nothing} is no file; expected one"):
            data.load_images(nothing)
