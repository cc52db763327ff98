"""Decodes pictures into one array of pixels; every choice is made for all of them together.

- EXIF's orientation is applied.
- Transparent pixels are composited on white.
- All become RGB if any has colour, otherwise all are grey.
- Of 16 bits per pixel, the upper eight of those in use are kept: for 12 bits in 16, bits 4 to 11.
- Of several frames, the first is used.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distmatch.data.archives import printable
from distmatch.system.errors import UserError
from distmatch.system.limits import MEMORY, PIXELS, check

GROUND = "white"
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""The Pillow readers that are used: some of the others start external programs."""
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
ORIENTATION = 0x0112
"""EXIF's orientation tag: 1 is upright, 2 to 8 are rotated or mirrored."""
DEPTHS = (8, 10, 12, 14, 16)
PNG = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt")
XMP = b"XML:com.adobe.xmp\0\0"
"""The start of an uncompressed PNG text chunk that may hold the orientation too."""


class Decoder:
    """Collects `count` pictures of one size.

    Args:
        place: where they come from, for messages.
        fit: brings a picture to its size, after orientation and transparency; without it, all must have one size.
    """

    def __init__(self, place: object, count: int, fit: Callable[[Image.Image], Image.Image] | None = None):
        self.place, self.count, self.fit = place, count, fit
        self.pixels: np.ndarray | None = None
        self.sizes: dict[tuple[int, int], list[str]] = {}
        self.depths: dict[int, list[str]] = {}
        self.broken: list[str] = []
        self.seen, self.grey = Counter[str](), 0
        self.shallow: list[str] = []  # 16-bit colour, of which Pillow keeps only the upper eight, all small
        self.deepest, self.bits = 0, 8

    def add(self, row: int, name: str, content: bytes | Image.Image) -> None:
        """Add the picture `name` as number `row`. Problems with any of them are reported by `finish`."""
        try:
            with _quiet(), _opened(content) as image:
                array = self._array(image, name, content)
        except MemoryError:
            raise
        except UnidentifiedImageError:
            self.broken.append(f"{printable(name)} (no picture of a known kind, or damaged)")
            return
        except Exception as error:  # Pillow's readers raise anything on a malformed file
            self.broken.append(f"{printable(name)} ({printable(error, 300) or type(error).__name__})")
            return
        self.sizes.setdefault((array.shape[1], array.shape[0]), []).append(name)
        self.depths.setdefault(8 * array.itemsize, []).append(name)
        if len(self.sizes) == 1 and len(self.depths) == 1 and not self.broken:
            self._place(row, array)

    def finish(self) -> tuple[np.ndarray, list[str]]:
        """Return `u8[N,C,H,W]`, and in words what was done to the pictures.

        Raises `UserError` that counts and names the pictures that are unreadable or have other sizes or depths.
        """
        if self.broken:
            raise UserError(f"{self.place}: {_many(self.broken, self.count)} cannot be read: {self.broken[0]}")
        for what, groups in (("sizes", {f"{w}x{h}": n for (w, h), n in self.sizes.items()}), ("depths", self._bits())):
            if len(groups) > 1:
                ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
                found = [f"{len(names):,} of {key} (e.g. {printable(names[0])})" for key, names in ordered[:5]]
                more = f" and {len(ordered) - 5} {what} more" if len(ordered) > 5 else ""
                raise UserError(f"{self.place} has images of {len(groups)} {what}: {', '.join(found)}{more}; "
                                 "bring them all to one first")  # fmt: skip
        assert self.pixels is not None
        if self.pixels.shape[1] == 3:
            self.seen["grey as RGB"] = self.grey
        self.seen += Counter()  # drops zeros
        said = [f"{number:,} {what}" for what, number in self.seen.items()]
        if self.pixels.dtype == np.uint16:
            self.bits = next(depth for depth in DEPTHS if int(self.pixels.max()) < 2**depth)
            said.append(f"16 bits per pixel with {self.bits} in use, of which the upper 8 are taken")
            small = np.empty(self.pixels.shape, np.uint8)
            for row, pixels in zip(small, self.pixels, strict=True):  # one by one, to save memory
                row[:] = pixels >> (self.bits - 8)
            self.pixels = small
        elif self.shallow and self.deepest < 64:
            raise UserError(
                f"{self.place}: {_many(self.shallow, self.count)} have 16 bits per channel whose upper bits are empty, "
                f"e.g. {printable(self.shallow[0])}, and would be nearly black; scale them to 8 bits first"
            )
        return self.pixels, said + dark(self.pixels)

    def _array(self, image: Image.Image, name: str, content: bytes | Image.Image) -> np.ndarray:
        """Return u8 or u16 [H,W], or u8[H,W,3]."""
        check(image.width * image.height, PIXELS, f"{image.width} x {image.height}", "pixels")
        several, turned = getattr(image, "is_animated", False), image.getexif().get(ORIENTATION, 1) in range(2, 9)
        deep = isinstance(content, bytes) and _deep(image, content)
        _check_tiff(image)
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
        plain, transparent = _plain(image)
        array = np.asarray(plain if self.fit is None else self.fit(plain))
        self.seen["with several frames, of which the first is taken"] += several
        self.seen["turned upright by EXIF"] += turned
        self.seen[f"with transparency, put on {GROUND}"] += transparent
        self.grey += array.ndim == 2
        if deep and array.dtype == np.uint8:
            self.shallow.append(name)
            self.deepest = max(self.deepest, int(array.max()))
        return array

    def _place(self, row: int, array: np.ndarray) -> None:
        channels = 3 if array.ndim == 3 else 1
        if self.pixels is None:
            size = array.itemsize * self.count * channels * array.shape[0] * array.shape[1]
            check(size, MEMORY, f"{self.place}: {self.count:,} images of {array.shape[1]}x{array.shape[0]}")
            self.pixels = np.empty((self.count, channels, *array.shape[:2]), array.dtype)
        if channels == 3 and self.pixels.shape[1] == 1:  # the first one in colour, after grey ones
            self.pixels = np.repeat(self.pixels, 3, axis=1)
        self.pixels[row] = array.transpose(2, 0, 1) if channels == 3 else array

    def _bits(self) -> dict[str, list[str]]:
        return {f"{bits} bits": names for bits, names in self.depths.items()}


def dark(pixels: np.ndarray) -> list[str]:
    """Return a note if `pixels u8[N,C,H,W]` are nearly black, such as masks of 0 and 1."""
    most = int(pixels.max(initial=0))
    return [f"nearly black: no more than {most} of 255 in use"] if most < 16 else []


def _check_tiff(image: Image.Image) -> None:
    """Raise `UserError` if Pillow would misread a TIFF's numbers."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(262) == 0 and image.mode.startswith("I"):
        raise UserError("0 is white in it, at more than 8 bits; write it with 0 as black")
    if 2 in tags.get(339, ()) and 8 in tags.get(258, ()):
        raise UserError("its pixels are signed, of 8 bits; write them unsigned")


def _plain(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return the picture in mode L, RGB or I;16, and whether any of it was transparent."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise UserError("it has more than 16 bits per pixel; scale it to 8 or 16 first")
        return Image.fromarray(values.astype(np.uint16)), False
    if image.mode == "F":
        raise UserError("its pixels are floating-point, of a range that is not known; write 8 or 16 bits")
    colour = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if not image.has_transparency_data:
        return image.convert(colour), False
    over = image.convert("RGBA")
    transparent = over.getchannel("A").getextrema() != (255, 255)
    return Image.alpha_composite(Image.new("RGBA", over.size, GROUND), over).convert(colour), transparent


def _opened(content: bytes | Image.Image) -> Image.Image:
    if not isinstance(content, bytes):
        return content.copy()
    return Image.open(io.BytesIO(_without_text(content)), formats=_formats())


@cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _without_text(content: bytes) -> bytes:
    """Return a PNG without its text chunks, which may unpack to any size; those with EXIF or XMP data stay."""
    if not content.startswith(PNG) or not any(kind in content for kind in TEXT):
        return content
    kept, at = [PNG], len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] not in TEXT or content.startswith((b"Raw profile type", XMP), at + 8):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _deep(image: Image.Image, content: bytes) -> bool:
    """Return whether it is in colour with 16 bits per channel."""
    if content.startswith(PNG):
        return content[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06")
    return image.format == "TIFF" and 16 in getattr(image, "tag_v2", {}).get(258, ())


@contextmanager
def _quiet() -> Iterator[None]:
    """Use our own pixel limit instead of Pillow's, which DISTMATCH_LIMITS cannot raise, and silence warnings."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _many(names: list[str], of: int) -> str:
    return f"{len(names):,} of {of:,} images"
