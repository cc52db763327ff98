"""Saves a checkpoint's tensors in one file and reads them, in a single process.

A group of processes has `shards`, which reads and writes the same files, but takes seconds to import, and longer for
each tensor.
"""

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from distmatch.system.digests import Damaged, load_file, save_file
from distmatch.system.files import remove, write_atomic


def save(tensors: Mapping[str, Tensor], folder: Path, finish: Callable[[], None]) -> Future:
    """Copy `tensors` to host memory; in the background, write them to `folder`, then call `finish()`."""
    copies = {name: value.to("cpu", copy=True) for name, value in tensors.items()}

    def write() -> None:
        begin(folder)
        write_shard(folder, 1, copies, {name: [0] * value.ndim for name, value in copies.items()})
        finish()

    thread = ThreadPoolExecutor(1)
    saving = thread.submit(write)
    thread.shutdown(wait=False)
    return saving


def read(tensors: Mapping[str, Tensor], file: Path, digest: str | None) -> None:
    """Fill `tensors` with what `file` has under their names, once all of it is verified. Raises as `load_file` does."""
    found = load_file(file, digest)
    for name, value in tensors.items():
        if name not in found:
            raise Damaged(f"{name} is missing")
        if found[name].shape != value.shape:
            raise Damaged(f"{name} is {list(found[name].shape)}, not {list(value.shape)}")
    for name, value in tensors.items():
        value.copy_(found[name])


def begin(folder: Path) -> None:
    """Make `folder`; delete what killed processes have left in and beside it of checkpoints that they were writing."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".step-*"):
        if re.fullmatch(r"\.step-\d+", left.name):
            for file in left.iterdir():
                remove(file)
            if left != folder:
                left.rmdir()


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor], offsets: Mapping[str, Any]) -> None:
    """Write the file of process `number`, from 1: parts of tensors, which begin at `offsets` in the whole ones.

    It is the file that `torch.distributed.checkpoint` would write, but by `save_file`: `safetensors.save` holds the
    GIL, and so stalls the training loop, for a second or more per GB.
    """
    about = {name: {"saved_offsets": start} for name, start in offsets.items()}
    meta = {"DCP_SHARDING_INFO": json.dumps(about), "DCP_VERSION": "1.0", "format": "pt"}
    file = folder / f"shard-{number:05d}-model-00001-of-00001.safetensors"
    write_atomic(file, lambda p: save_file(tensors, p, meta))
