"""Safetensors files that carry a digest of their whole content, which is verified on reading.

The digest is the SHA-256 of the tensors' names, types, shapes and bytes and of the metadata, whatever their order.
Files without one, from older versions or other tools, are accepted as they are.
"""

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as _save_file
from torch import Tensor

from distmatch.system.errors import UserError
from distmatch.system.plain import SEAL


class Damaged(UserError):
    """A file does not hold what was written to it."""


def save_file(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Like safetensors' `save_file`, with the digest added to the metadata. Returns the digest."""
    metadata = dict(metadata or {})
    found = content_digest(tensors, metadata)
    _save_file(tensors, path, {**metadata, SEAL: found})
    return found


def load_file(path: Path, expected: str | None = None) -> dict[str, Tensor]:
    """Return the tensors in `path`, memory-mapped; see `read_file`."""
    return read_file(path, expected)[0]


def read_file(path: Path, expected: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in `path`, memory-mapped, and its metadata without the digest. Reads and verifies all of it.

    Args:
        expected: the digest that another file records for this one.

    Raises `OSError`, and `Damaged` if the file has changed since it was written or is not the `expected` one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    known = metadata.pop(SEAL, None)
    if known is not None and known != content_digest(tensors, metadata):
        raise Damaged(f"{path} is damaged: its digest is not that of its content")
    if expected is not None and known != expected:
        raise Damaged(f"{path} is another file than the one that was written there")
    return tensors, metadata


def known_digest(path: Path) -> str | None:
    """Return the digest stored in `path`, without verifying it. Raises `OSError` and `SafetensorError`."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(SEAL)


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything that a safetensors file of these holds."""
    names = sorted(tensors)
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    h = sha256(json.dumps([layout, dict(metadata)], sort_keys=True).encode())
    for name in names:
        h.update(_bytes(tensors[name]))
    return h.hexdigest()


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of the tensors' values in row-major order, one tensor after the other."""
    h = sha256()
    for tensor in tensors:
        h.update(_bytes(tensor))
    return h.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and values."""
    h = sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    h.update(_bytes(tensor))
    return h.hexdigest()


def weights_digest(weights: Mapping[str, Tensor], head: str = "") -> str:
    """Return the SHA-256 of `head` and of the names and values of `weights`, in their order."""
    h = sha256(head.encode())
    for name, value in weights.items():
        h.update(name.encode())
        h.update(_bytes(value))
    return h.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
