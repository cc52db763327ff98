"""From encoded pictures to pixels: orientation, transparency, colour and depth, decided for all of a set together."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from layouts import encoded, pixels, png, write
from PIL import Image, PngImagePlugin

from distmatch.data.images import Images, load_images
from distmatch.system.errors import UserError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(array: np.ndarray, depth: int, colour: int, width: int, height: int) -> bytes:
    """A PNG written out by its specification, of any depth, whose rows are the bytes `array` [rows, bytes]."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def read(tmp_path, files: dict[str, bytes]) -> np.ndarray:
    """`[N,H,W,C]`."""
    return load_images(write(tmp_path / "set", files)).pixels.permute(0, 2, 3, 1).numpy()


UPRIGHT = {  # EXIF 2.3, Table 6: which side of the picture the first row and the first column are
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = write(tmp_path / "set", {"a.png": encoded(pixels(0), exif=exif)})
    images = load_images(folder)
    assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), UPRIGHT[orientation](pixels(0)))
    assert ("1 turned upright by EXIF" in str(images)) == (orientation > 1)


def test_an_orientation_in_xmp_alone_is_followed(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    images = load_images(write(tmp_path, {"a.png": encoded(pixels(0), pnginfo=info)}))
    assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), UPRIGHT[6](pixels(0)))


def test_masks_of_zero_and_one_are_told(tmp_path):
    mask = np.eye(4, dtype=np.uint8)
    images = load_images(write(tmp_path, {"a.png": encoded(mask)}))
    assert "nearly black: no more than 1 of 255 in use" in str(images)
    assert Images.of(torch.from_numpy(mask)[None]).account.notes == images.account.notes
    assert Images.of(torch.from_numpy(16 * mask)[None]).account.notes == ()


@pytest.mark.parametrize(("bits", "tag", "value", "words"), [(16, 262, 0, "0 is white"), (8, 339, 2, "are signed")])
def test_tiffs_whose_numbers_mean_something_else_are_refused(tmp_path, bits, tag, value, words):
    entries = {256: 4, 257: 4, 258: bits, 259: 1, 262: 1, 273: 134, 277: 1, 278: 4, 279: 2 * bits, 339: 1, tag: value}
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))  # TIFF 6.0: a header, a directory, the pixels
    body = b"".join(struct.pack("<HHII", name, 4, 1, entry) for name, entry in sorted(entries.items()))
    content = (head + body + bytes(4)).ljust(entries[273], b"\0") + bytes(2 * bits)
    with pytest.raises(UserError, match=rf"a.tif \(.*{words}"):
        load_images(write(tmp_path, {"a.tif": content}))


def test_what_is_transparent_is_put_on_white(tmp_path):
    rgba = np.concatenate([pixels(0), pixels(1, 1)[..., None]], axis=2)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    found = read(tmp_path, {"a.png": encoded(rgba)})[0]
    share = rgba[..., 3:] / 255
    assert np.abs(found - (share * rgba[..., :3] + (1 - share) * 255)).max() <= 1
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], rgba[1, :, :3])
    grey = rgba[..., [0, 3]]
    other = read(tmp_path / "grey", {"a.png": encoded(Image.fromarray(grey, "LA"))})[0]
    assert other.shape == (5, 6, 1)
    assert np.array_equal(other[..., 0], found[..., 0])


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6) % 3, "P")
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    found = read(tmp_path, {"a.gif": encoded(image, "GIF", transparency=1), "b.png": encoded(image)})
    assert found[0, 0, :3].tolist() == [[0, 0, 0], [255, 255, 255], [10, 200, 10]]
    assert found[1, 0, :3].tolist() == [[0, 0, 0], [200, 10, 10], [10, 200, 10]]


@pytest.mark.parametrize("order", ["grey first", "colour first"])
def test_grey_among_colour_becomes_rgb_for_all(tmp_path, order):
    grey, colour = encoded(pixels(0, 1)), encoded(pixels(1))
    files = [grey, grey, colour] if order == "grey first" else [colour, grey, grey]
    folder = write(tmp_path / "set", {f"{i}.png": content for i, content in enumerate(files)})
    images = load_images(folder)
    stacked = np.stack([pixels(0, 1)] * 3, axis=2)
    expected = [stacked if content is grey else pixels(1) for content in files]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert "2 grey as RGB" in str(images)


@pytest.mark.parametrize(("bits", "largest"), [(8, 200), (10, 1023), (12, 2048), (14, 9000), (16, 2**15), (16, 65535)])
def test_of_sixteen_bits_the_upper_eight_in_use_are_taken_for_the_whole_set(tmp_path, bits, largest):
    dark, bright = np.full((3, 4), 255, np.uint16), np.full((3, 4), largest, np.uint16)
    folder = write(tmp_path / "set", {"0.png": encoded(dark), "1.png": encoded(bright), "2.tif": encoded(dark, "TIFF")})
    images = load_images(folder)
    assert images.pixels[:, 0, 0, 0].tolist() == [255 >> (bits - 8), largest >> (bits - 8), 255 >> (bits - 8)]
    assert images.account.bits == bits
    assert f"with {bits} in use" in str(images)


def test_depths_are_not_mixed(tmp_path):
    files = {"a.png": encoded(np.full((3, 4), 999, np.uint16)), "b.png": encoded(pixels(0, 1, 3, 4))}
    with pytest.raises(ValueError, match=r"2 depths: 1 of 16 bits \(e.g. a.png\), 1 of 8 bits \(e.g. b.png\)"):
        read(tmp_path, files)


def test_sixteen_bits_in_colour_are_read_but_not_where_they_would_be_black(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (5, 6 * 3)).astype(">u2")
    bright = raw_png((values * 16).astype(">u2").view(np.uint8), 16, 2, 6, 5)
    found = read(tmp_path, {"a.png": bright})
    assert np.array_equal(found.reshape(5, 18), values * 16 >> 8)
    with pytest.raises(
        ValueError, match=r"1 of 1 images have 16 bits per channel whose upper bits are empty, e.g. b.png"
    ):
        read(tmp_path / "dark", {"b.png": raw_png(values.view(np.uint8), 16, 2, 6, 5)})


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP"])
def test_every_kind_of_picture_is_what_pillow_reads(tmp_path, kind):
    suffix = {"JPEG": "JPEG", "TIFF": "tif"}.get(kind, kind.lower())
    content = encoded(pixels(0), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(read(tmp_path, {f"a.{suffix}": content})[0], expected)


def test_of_several_frames_the_first_is_taken(tmp_path):
    first, second = Image.fromarray(pixels(0)), Image.fromarray(pixels(1))
    folder = write(tmp_path, {"a.tif": encoded(first, "TIFF", save_all=True, append_images=[second])})
    images = load_images(folder)
    assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), pixels(0))
    assert "1 with several frames" in str(images)


def test_sizes_that_differ_are_counted_in_one_message(tmp_path):
    files = {f"{i}.png": png(i) for i in range(9)} | {f"x{i}.png": encoded(pixels(i, 1, 4, 4)) for i in range(3)}
    with pytest.raises(ValueError, match=r"2 sizes: 9 of 6x5 \(e.g. 0.png\), 3 of 4x4 \(e.g. x0.png\)"):
        read(tmp_path, files)


def test_pictures_that_cannot_be_read_are_counted_in_one_message(tmp_path):
    noise = encoded(pixels(0, 3, 64, 64))
    files = {"a.png": png(0), "b.png": b"no picture", "c.png": noise[:2000], "d.png": png(1)}
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be read: b.png \(no picture of a known kind"):
        read(tmp_path, files)


def test_floats_and_more_than_sixteen_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.tif \(its pixels are floating-point"):
        read(tmp_path / "f", {"a.tif": encoded(np.zeros((3, 4), np.float32), "TIFF")})
    with pytest.raises(ValueError, match=r"a.tif \(it has more than 16 bits per pixel"):
        read(tmp_path / "i", {"a.tif": encoded(np.full((3, 4), 2**20, np.int32), "TIFF")})


def test_no_other_reader_of_pillow_is_used(tmp_path):
    """EPS is a program, for which Pillow starts Ghostscript."""
    with pytest.raises(ValueError, match=r"a.png \(no picture of a known kind"):
        read(tmp_path, {"a.png": encoded(pixels(0), "EPS")})


def test_large_notes_in_a_png_are_passed_over(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2**21, zip=True)
    assert np.array_equal(read(tmp_path, {"a.png": encoded(pixels(0), pnginfo=info)})[0], pixels(0))


def test_a_bomb_is_named_and_the_limit_can_be_raised(tmp_path, monkeypatch):
    bomb = raw_png(np.zeros((1, 20_000), np.uint8), 8, 0, 20_000, 20_000)
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read: b.png \(20000 x 20000: 400,000,000 pixels"):
        read(tmp_path, {"a.png": png(0), "b.png": bomb})
    monkeypatch.setattr("distmatch.data.decode.PIXELS", 29)
    with pytest.raises(ValueError, match=r"30 pixels are more than the 29 that are read.* set DISTMATCH_LIMITS=2"):
        read(tmp_path / "small", {"a.png": png(0)})
    monkeypatch.setenv("DISTMATCH_LIMITS", "2")
    assert np.array_equal(read(tmp_path / "small", {"a.png": png(0)})[0], pixels(0))


def test_more_pictures_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("distmatch.data.decode.MEMORY", 3 * 90 - 1)
    with pytest.raises(ValueError, match="3 images of 6x5: 270 bytes are more than the 269"):
        read(tmp_path, {f"{i}.png": png(i) for i in range(3)})


def test_names_are_fit_for_a_terminal(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read: \\x1b\[2Ja\.png") as caught:
        read(tmp_path, {"\x1b[2Ja.png": b"no picture"})
    assert "\x1b" not in str(caught.value)
    images = load_images(write(tmp_path / "classes", {"\x1b[31m/0.png": png(0), "猫/0.png": png(1)}))
    assert images.classes == ("\x1b[31m", "猫")
    assert r"\x1b[31m, 猫" in str(images)
    assert torch.equal(images.labels, torch.tensor([0, 1]))
