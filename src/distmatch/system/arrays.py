"""Reads NumPy's .npz and .npy files, checking headers before allocating memory. Nothing is unpickled."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Array:
    """An array in a file; `read()` loads it. Raises `UserError` if the file is damaged or the array holds objects."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def arrays(file: Path) -> dict[str, Array]:
    """Return the arrays in an .npz by name, or the one in an .npy as `arr_0`.

    Raises `UserError` if the file is missing or damaged, or holds something else.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected an .npz or .npy")
    with _damage(file):
        if file.suffix == ".npy":
            mapped: Any = np.load(file, mmap_mode="r", allow_pickle=False)  # raises if the file is too short
            return {"arr_0": Array(mapped.dtype, mapped.shape, lambda: np.array(mapped))}
        with ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {}
            for name, info in members.items():
                with archive.open(info) as member:
                    version = npy.read_magic(member)
                    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = header(member)
                    found[name] = Array(dtype, shape, partial(_read, file, name))
                    if not dtype.hasobject and found[name].nbytes + member.tell() != info.file_size:
                        raise UserError(f"{name} has not the size that its header says")
            return found


def _read(file: Path, name: str) -> np.ndarray:
    with _damage(file), np.load(file, allow_pickle=False) as content:
        return content[name]


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever zipfile, zlib and NumPy raise
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{file} is damaged, or holds something other than arrays of numbers") from error
