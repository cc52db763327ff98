"""The text encoders' states of a fixed list of prompts, computed once and read from memory-mapped files.

A text is then encoded once for all epochs and runs. Stable Diffusion 1.5 takes 118 kB per prompt in half precision:
59 GB for 500,000 prompts.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmatch.checkpoint import write_atomic
from distmatch.denoiser import Cond

SHARD = 1024
"""Prompts per file."""

BATCH = 64
"""Prompts per pass of the encoders."""


class Embeddings:
    """`(numbers) -> Cond` of the prompts `0 .. count - 1`, from the files that `embed` wrote to `folder`."""

    def __init__(self, folder: Path, count: int):
        self.shards = [_read(_path(folder, i)) for i in range(-(-count // SHARD))]

    def __call__(self, numbers: Sequence[int]) -> Cond:
        rows = [(self.shards[i // SHARD], i % SHARD) for i in numbers]
        stacked = {name: torch.stack([shard[name][row] for shard, row in rows]).float() for name in self.shards[0]}
        return Cond(text=stacked.pop("text"), extra=stacked)


def embed(
    folder: Path,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], Cond],
    progress: Callable[[int], None] | None = None,
) -> Embeddings:
    """Encode what is missing of `texts` in `folder`, which is of these texts and these encoders alone.

    Several processes may do so at once: they share the files. `progress` is called with numbers of prompts done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = list(range(-(-len(texts) // SHARD)))
    while missing:
        busy = []
        for shard in missing:
            part, file = texts[shard * SHARD : (shard + 1) * SHARD], _path(folder, shard)
            try:
                with FileLock(file.with_suffix(".lock"), timeout=0):
                    if not file.exists():
                        tensors = _tensors([encode(part[i : i + BATCH]) for i in range(0, len(part), BATCH)])
                        write_atomic(file, lambda path, tensors=tensors: save_file(tensors, path))
            except Timeout:
                busy.append(shard)
                continue
            if progress is not None:
                progress(len(part))
        if busy:
            time.sleep(0.2)  # others are at work on these; should they die, their locks are free
        missing = busy
    return Embeddings(folder, len(texts))


def _tensors(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """All conditions as one, by name, in half precision."""
    cond = Cond.cat(*conds)
    assert cond is not None
    assert cond.text is not None
    return {k: v.cpu().half().contiguous() for k, v in {"text": cond.text, **cond.extra}.items()}


def _path(folder: Path, shard: int) -> Path:
    return folder / f"text-{shard:05d}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
