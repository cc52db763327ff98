"""Real samples with their conditions, drawn at random."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distmatch.diffusion.conditions import Share, rows
from distmatch.diffusion.denoiser import Cond

Describe = Callable[[Tensor, Tensor], Cond | None]
"""`(numbers i64[B], u f[B]) -> their conditions`; `u` is uniform in [0, 1), for a choice among several captions."""


class Reals:
    """Draws a class, then one of its samples: all classes are equally frequent, as in the student's batches.

    Args:
        classes: the numbers i64[N] of the samples of each class; a single entry if there are no classes.
        read: `(numbers i64[B]) -> samples f[B,*D]`.
        describe: see `Describe`.
        fingerprint: SHA-256 of all that decides what they are.
        cache: the folder in which they are kept once they have been computed, if any.
    """

    def __init__(
        self,
        classes: Sequence[Tensor],
        read: Callable[[Tensor], Tensor],
        describe: Describe = lambda _numbers, _u: None,
        fingerprint: str = "",
        cache: Path | None = None,
    ):
        self.order = torch.cat(list(classes))
        self.counts = torch.tensor([len(one) for one in classes])
        self.read, self.describe, self.fingerprint, self.cache = read, describe, fingerprint, cache

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator, share: Share) -> tuple[Tensor, Cond | None]:
        """Return a share of `n` samples and their conditions; the generator is the CPU's."""
        label = torch.randint(len(self.counts), (n,), generator=generator)
        u, v = torch.rand(2, n, dtype=torch.float64, generator=generator)
        first = self.counts.cumsum(0) - self.counts
        numbers = self.order[first[label] + (u * self.counts[label]).long()]
        mine, chosen = rows(numbers, share), rows(v, share)
        return self.read(mine), self.describe(mine, chosen)
