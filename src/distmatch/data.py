"""Images in and out: class folders or archives of them become one uint8 tensor; tensors become PNGs and grids."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.storage import local

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Images:
    """`pixels u8[N,C,H,W]`; `labels i64[N]` and their `classes`, or `None` and `()` for a flat folder."""

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(place: str | Path, split: str = "train") -> Images:
    """Read `place`, a folder or a .tar/.tar.gz/.tar.xz/.zip archive, laid out `[split/]class/name.png` or flat.

    An archive may be at a URL.

    Where there is a folder named `split`, only that one is read; without splits all of it is "train". Classes are
    numbered in sorted order. Raises `ValueError` for a missing path or split, for a path without images, and for images
    of different sizes.
    """
    path = local(place)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a folder or an archive of images")
    try:
        entries = sorted(_entries(path), key=lambda e: e[0])
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}") from error
    names = [PurePosixPath(name).parts for name, _ in entries]
    folders = {part for parts in names for part in parts[:-1]}
    if split not in folders and (split != "train" or "test" in folders):
        raise ValueError(f"{path} has no folder {split!r}; it has {', '.join(sorted(folders)[:12]) or 'none'}")
    if split in folders:
        keep = [i for i, parts in enumerate(names) if split in parts[:-1]]
        entries, names = [entries[i] for i in keep], [names[i] for i in keep]
    if not entries:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")

    pixels = []
    for name, content in entries:
        try:
            pixels.append(np.asarray(_plain(Image.open(io.BytesIO(content)))))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: {name} is not an image that Pillow can read ({error})") from error
        if pixels[-1].shape != pixels[0].shape:
            raise ValueError(
                f"{path}: {name} is {pixels[-1].shape}, the first image is {pixels[0].shape}; "
                "bring all images to one size and mode first"
            )
    array = torch.from_numpy(np.stack(pixels))
    array = array[:, None] if array.ndim == 3 else array.permute(0, 3, 1, 2).contiguous()

    parents = [parts[-2] if len(parts) > 1 and parts[-2] != split else None for parts in names]
    if None in parents or len(set(parents)) < 2:
        return Images(array, None, ())
    classes = tuple(sorted({p for p in parents if p is not None}))
    number = {name: i for i, name in enumerate(classes)}
    return Images(array, torch.tensor([number[p] for p in parents if p is not None]), classes)


def to_float(pixels: Tensor) -> Tensor:
    """u8 in 0..255 to f32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """f in [-1, 1] to u8 in 0..255, rounded and clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def picture(samples: Tensor, extent: float = 6.0) -> Tensor:
    """Samples as pictures u8[N,C,H,W]: images f[N,C,H,W] in [-1, 1] one by one, points f[N,2] as dots of one picture.

    Points outside of `[-extent, extent]^2` are left out; the second axis points up.
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
    """`pixels u8[N,C,H,W]` row by row on a light ground: u8[rows * (H + gap) + gap, ..., 3]."""
    n, _, h, w = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 235, dtype=np.uint8)
    for i, tile in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        sheet[y : y + h, x : x + w] = tile
    return sheet


def png(array: np.ndarray, zoom: int = 1) -> bytes:
    """u8[H,W] or u8[H,W,C] as PNG, enlarged `zoom` times without smoothing."""
    image = Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _plain(image: Image.Image) -> Image.Image:
    """Grey stays grey, everything else becomes RGB; of 16 bits the upper eight are taken."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _entries(path: Path) -> Iterator[tuple[str, bytes]]:
    """`(name, content)` of every image file."""

    def wanted(name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in SUFFIXES and not PurePosixPath(name).name.startswith(".")

    if path.is_dir():
        for file in path.rglob("*"):
            if wanted(file.name) and file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if wanted(name):
                    yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name) and (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
