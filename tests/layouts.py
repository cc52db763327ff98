"""Small data sets to read, in a folder or an archive, of pictures that a number decides."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CONTAINERS = ("folder", "tar", "tar.xz", "zip")


def pixels(number: int, channels: int = 3, height: int = 5, width: int = 6) -> np.ndarray:
    """u8[H,W,3] or u8[H,W]: random, a function of `number`."""
    array = np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return array if channels > 1 else array[..., 0]


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, kind, **options)
    return file.getvalue()


def png(number: int) -> bytes:
    return encoded(pixels(number))


def write(place: Path, files: dict[str, bytes], container: str = "folder") -> Path:
    """`files` by name, at `place` with the container's suffix."""
    if container == "folder":
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    place = place.with_name(f"{place.name}.{container}")
    if container == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return place
    with tarfile.open(place, f"w:{container.partition('.')[2]}") as archive:
        for name, content in reversed(files.items()):  # not in the order in which they are numbered
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


def lines(*rows: dict) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()
