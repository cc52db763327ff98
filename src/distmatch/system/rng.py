"""Randomness as a function of position: no generator state is ever saved, so resuming needs only an index.

With per-sample noise, sample `i` of a seed is the same whatever the batch size or the number of processes. A stream is
a generator named by its purpose and its step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Return a 63-bit seed for any sequence of numbers and names."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1  # 63 bits: not negative as an int64


def stream(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Return a fresh generator for `parts`, e.g. `(seed, "critic", step)`."""
    return torch.Generator(device).manual_seed(key(*parts))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's own generators, for what takes no other, such as initial weights; put the CPU's back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def noise(seed: int, indices: Sequence[int] | Tensor, shape: Sequence[int], step: int = 0) -> Tensor:
    """Return normal noise f32[len(indices), *shape]: row `k` is a function of `(seed, indices[k], step)`. On the CPU.

    `step`: which evaluation of a few-step student it is for.
    """
    out = torch.empty(len(indices), *shape)
    generator = torch.Generator()
    for row, index in zip(out, indices, strict=True):
        generator.manual_seed(key(seed, "noise", int(index), *([step] if step else [])))
        torch.randn(tuple(shape), generator=generator, out=row)
    return out


def shuffled(seed: int, size: int, position: int, count: int, window: int = 1, block: int | None = None) -> np.ndarray:
    """Return entries `position .. position + count` of an endless shuffle of `range(size)`: i64[count].

    Each pass over the range is a new permutation, a function of `(seed, pass)`. If the range has more than `window`
    blocks of `block` entries, the blocks are shuffled, then the entries within each group of `window` blocks, so that
    few blocks are in use at a time.
    """
    out = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        epoch, offset = divmod(position + done, size)
        part = _permutation(seed, size, epoch, window, block or size)[offset : offset + count - done]
        out[done : done + len(part)] = part
        done += len(part)
    return out


_cache: dict[tuple[int, ...], dict[int, np.ndarray]] = {}


def _permutation(seed: int, size: int, epoch: int, window: int, block: int) -> np.ndarray:
    """Return the permutation of one pass. Two are cached, because a batch near the end also reads the next pass."""
    kept = _cache.setdefault((seed, size, window, block), {})
    if epoch not in kept:
        if len(kept) == 2:
            del kept[next(iter(kept))]
        kept[epoch] = _permute(np.random.default_rng(key(seed, "epoch", epoch)), size, window, block)
    return kept[epoch]


def _permute(generator: np.random.Generator, size: int, window: int, block: int) -> np.ndarray:
    blocks = -(-size // block)
    if blocks <= window:
        return generator.permutation(size)
    order = generator.permutation(blocks)
    parts = []
    for start in range(0, blocks, window):
        starts = order[start : start + window, None] * block
        entries = (starts + np.arange(block)).reshape(-1)
        parts.append(generator.permutation(entries[entries < size]))
    return np.concatenate(parts)
