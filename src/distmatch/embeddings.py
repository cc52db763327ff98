"""The text encoders' states of a fixed list of prompts, computed once and read from memory-mapped files.

A text is then encoded once for all epochs and runs. Stable Diffusion 1.5 takes 118 kB per prompt in half precision:
59 GB for 500,000 prompts.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmatch.claims import make_together
from distmatch.denoiser import Cond
from distmatch.files import write_atomic
from distmatch.storage import Folder

SHARD = 1024
"""Prompts per file."""

BATCH = 64
"""Prompts per pass of the encoders."""


class Embeddings:
    """`(numbers) -> Cond` of the prompts `0 .. count - 1`, from the files that `embed` wrote to `folder`."""

    def __init__(self, folder: Path, count: int):
        self.shards = [_read(folder / _name(i)) for i in range(-(-count // SHARD))]

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
    names = [_name(shard) for shard in range(-(-len(texts) // SHARD))]
    parts = {name: texts[number * SHARD : (number + 1) * SHARD] for number, name in enumerate(names)}
    advance = progress or (lambda _: None)

    def make(name: str) -> None:
        part = parts[name]
        tensors = _tensors([encode(part[i : i + BATCH]) for i in range(0, len(part), BATCH)])
        write_atomic(folder / name, lambda path: save_file(tensors, path))
        advance(len(part))

    def found(there: Collection[str]) -> None:
        advance(sum(len(parts[name]) for name in there))

    make_together(Folder(folder), names, lambda name, sizes: name in sizes, make, found)
    return Embeddings(folder, len(texts))


def _tensors(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """All conditions as one, by name, in half precision."""
    cond = Cond.cat(*conds)
    assert cond is not None
    assert cond.text is not None
    return {k: v.cpu().half().contiguous() for k, v in {"text": cond.text, **cond.extra}.items()}


def _name(shard: int) -> str:
    return f"text-{shard:05d}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
