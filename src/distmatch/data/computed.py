"""Tensors that are computed once for each entry of a fixed list, and read from memory-mapped files.

Text embeddings of prompts and latents of images, for all epochs and runs.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distmatch.system.claims import make_together
from distmatch.system.digests import Damaged, read_file, save_file
from distmatch.system.files import write_atomic
from distmatch.system.progress import console
from distmatch.system.storage import Folder

SHARD = 1024
"""Entries per file."""

STORED = 2
"""Bytes of a number in these files, unless half precision is too narrow for some."""


class Computed:
    """`(numbers) -> tensors f32[len(numbers),...] by name`, from the files that `compute` wrote to `folder`.

    A file is verified against its digest on first use; if it is damaged, `make(name)` makes it again.
    """

    def __init__(self, folder: Path, kind: str, make: Callable[[str], None]):
        self.folder, self.kind, self.make = folder, kind, make
        self._shards: dict[str, dict[str, Tensor]] = {}

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = [(self._shard(_name(self.kind, i // SHARD)), i % SHARD) for i in numbers]
        return {name: torch.stack([shard[name][row].float() for shard, row in rows]) for name in rows[0][0]}

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


def compute(
    folder: Path,
    kind: str,
    count: int,
    tensors: Callable[[range], dict[str, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> Computed:
    """Compute those of `count` entries that are missing in `folder`, which belongs to this list and this function only.

    Several processes may do so at once and share the work.

    Args:
        kind: what the entries are; the files are named `KIND-00000.safetensors` and so on.
        tensors: returns the tensors of a range of entries by name, f[len(range),...]; they are kept in half precision
            where it holds their largest numbers.
        progress: called with numbers of entries done.
    """
    parts = _parts(kind, count)
    advance = progress or (lambda _: None)

    def make(name: str) -> None:
        file = folder / name
        made = {k: _kept(v.cpu()) for k, v in tensors(parts[name]).items()}
        write_atomic(file, lambda path: save_file(made, path, {"place": _place(file)}))

    def make_new(name: str) -> None:
        make(name)
        advance(len(parts[name]))

    def found(there: Collection[str]) -> None:
        advance(sum(len(parts[name]) for name in there))

    make_together(Folder(folder), list(parts), lambda name, sizes: name in sizes, make_new, found)
    return Computed(folder, kind, make)


def complete(folder: Path, kind: str, count: int) -> bool:
    """Return whether `folder` has the tensors of all `count` entries; see `compute`."""
    return all((folder / name).exists() for name in _parts(kind, count))


def _parts(kind: str, count: int) -> dict[str, range]:
    """Return which entries are in which file."""
    return {_name(kind, start // SHARD): range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)}


def _kept(value: Tensor) -> Tensor:
    """Return `value` in half precision; in full if that is too narrow, as for inner states of language models."""
    half = value.half().contiguous()
    return half if torch.equal(half.isfinite(), value.isfinite()) else value.float().contiguous()


def _name(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}.safetensors"


def _place(file: Path) -> str:
    """Return which entries a file belongs to: `compute`'s folder has its own name for each list of them."""
    return f"{file.parent.name}/{file.name}"


def _read(file: Path) -> dict[str, Tensor]:
    tensors, metadata = read_file(file)
    if metadata.get("place", _place(file)) != _place(file):
        raise Damaged(f"{file} was written as {metadata['place']}")
    return tensors
