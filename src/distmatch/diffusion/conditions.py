"""What samples are conditioned on: nothing, classes or prompts, optionally with a guidance scale.

Each pair, preview and evaluated image has a number, and its condition is a function of it: nothing has to be stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.system import rng

Share = tuple[int, int]
"""`(part, parts)`: which of how many equal parts of a batch this process makes. Its rows are the same for any share."""

WHOLE: Share = (0, 1)


def rows(v: Tensor, share: Share) -> Tensor:
    """Return this share of a tensor's rows."""
    part, parts = share
    return v.chunk(parts)[part] if parts > 1 else v


class Conditions(Protocol):
    """Where a batch's condition comes from. On the CPU, or on the device where prompts are encoded."""

    def at(self, numbers: Sequence[int]) -> Cond | None:
        """Return the conditions of the samples `numbers`; when all have been used, they start over."""
        ...

    def draw(self, n: int, generator: torch.Generator, share: Share = WHOLE) -> Cond | None:
        """Return this process's share of `n` uniformly random conditions, on the generator's device."""
        ...


class Classes:
    """Labels `0 .. count - 1`; with `count` 0, no condition at all."""

    def __init__(self, count: int):
        self.count = count

    def at(self, numbers: Sequence[int]) -> Cond | None:
        return Cond(label=torch.tensor([i % self.count for i in numbers])) if self.count else None

    def draw(self, n: int, generator: torch.Generator, share: Share = WHOLE) -> Cond | None:
        if not self.count:
            return None
        label = torch.randint(0, self.count, (n,), generator=generator, device=generator.device)
        return Cond(label=rows(label, share))


class Prompts:
    """`count` texts, and `encode`, which turns their numbers into a condition (see `embeddings`)."""

    def __init__(self, count: int, encode: Callable[[Sequence[int]], Cond]):
        self.count, self.encode = count, encode

    def at(self, numbers: Sequence[int]) -> Cond:
        return self.encode([i % self.count for i in numbers])

    def draw(self, n: int, generator: torch.Generator, share: Share = WHOLE) -> Cond:
        # The numbers are needed on the host: a CPU generator with the same seed avoids waiting for the device.
        host = torch.Generator().manual_seed(generator.initial_seed())
        numbers = rows(torch.randint(0, self.count, (n,), generator=host), share)
        return self.encode(numbers.tolist()).to(generator.device)


class Guided:
    """Adds to other conditions a guidance scale between `low` and `high`, in `extra["guidance"] f[B]`."""

    def __init__(self, inner: Conditions, low: float, high: float):
        self.inner, self.low, self.high = inner, low, high

    def at(self, numbers: Sequence[int]) -> Cond:
        draws = [torch.rand((), generator=rng.stream("cpu", "guidance", int(i))) for i in numbers]
        return with_guidance(self.inner.at(numbers), self._between(torch.stack(draws)))

    def draw(self, n: int, generator: torch.Generator, share: Share = WHOLE) -> Cond:
        cond = self.inner.draw(n, generator, share)
        scale = self._between(torch.rand(n, generator=generator, device=generator.device))
        return with_guidance(cond, rows(scale, share))

    def _between(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


def with_guidance(cond: Cond | None, scale: Tensor) -> Cond:
    """Return `cond` with the guidance scales `scale f[B]`."""
    cond = cond or Cond()
    return replace(cond, extra={**cond.extra, "guidance": scale})
