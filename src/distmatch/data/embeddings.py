"""Text embeddings of a fixed list of prompts, computed once and read from memory-mapped files.

Each text is thus encoded once for all epochs and runs. For Stable Diffusion 1.5, a prompt needs 118 kB in half
precision: 59 GB for 500,000 prompts.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.system.claims import make_together
from distmatch.system.digests import Damaged, read_file, save_file
from distmatch.system.files import write_atomic
from distmatch.system.progress import console
from distmatch.system.storage import Folder

SHARD = 1024
"""Prompts per file."""

BATCH = 64
"""Prompts per pass of the encoders."""


class Embeddings:
    """`(numbers) -> Cond` for prompts, from the files that `embed` wrote to `folder`.

    A file is verified against its digest on first use; if it is damaged, `make(name)` makes it again.
    """

    def __init__(self, folder: Path, make: Callable[[str], None]):
        self.folder, self.make = folder, make
        self._shards: dict[str, dict[str, Tensor]] = {}

    def __call__(self, numbers: Sequence[int]) -> Cond:
        rows = [(self._shard(_name(i // SHARD)), i % SHARD) for i in numbers]
        stacked = {name: torch.stack([shard[name][row] for shard, row in rows]).float() for name in rows[0][0]}
        return Cond(text=stacked.pop("text"), extra=stacked)

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._shards:
            file = self.folder / name
            try:
                self._shards[name] = _read(file)
            except (Damaged, OSError) as error:
                console.print(f"{error}\nIt is made again", soft_wrap=True)
                self.make(name)
                self._shards[name] = _read(file)
        return self._shards[name]


def embed(
    folder: Path,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], Cond],
    progress: Callable[[int], None] | None = None,
) -> Embeddings:
    """Encode those of `texts` that are missing in `folder`, which belongs to these texts and these encoders only.

    Several processes may do so at once and share the work. `progress` is called with numbers of prompts done.
    """
    names = [_name(shard) for shard in range(-(-len(texts) // SHARD))]
    parts = {name: texts[number * SHARD : (number + 1) * SHARD] for number, name in enumerate(names)}
    advance = progress or (lambda _: None)

    def make(name: str) -> None:
        part, file = parts[name], folder / name
        tensors = _tensors([encode(part[i : i + BATCH]) for i in range(0, len(part), BATCH)])
        write_atomic(file, lambda path: save_file(tensors, path, {"place": _place(file)}))

    def make_new(name: str) -> None:
        make(name)
        advance(len(parts[name]))

    def found(there: Collection[str]) -> None:
        advance(sum(len(parts[name]) for name in there))

    make_together(Folder(folder), names, lambda name, sizes: name in sizes, make_new, found)
    return Embeddings(folder, make)


def _tensors(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Return all conditions joined into one, by name, in half precision."""
    cond = Cond.cat(*conds)
    assert cond is not None
    assert cond.text is not None
    return {k: v.cpu().half().contiguous() for k, v in {"text": cond.text, **cond.extra}.items()}


def _name(shard: int) -> str:
    return f"text-{shard:05d}.safetensors"


def _place(file: Path) -> str:
    """Return which texts a file belongs to: `embed`'s folder has its own name for each list of them."""
    return f"{file.parent.name}/{file.name}"


def _read(file: Path) -> dict[str, Tensor]:
    tensors, metadata = read_file(file)
    if metadata.get("place", _place(file)) != _place(file):
        raise Damaged(f"{file} was written as {metadata['place']}")
    return tensors
