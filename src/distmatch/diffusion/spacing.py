"""Times in equal steps, and the shift of flows' times towards noise."""

from typing import TypeVar

import torch
from torch import Tensor

from distmatch.system.errors import UserError

T = TypeVar("T", float, Tensor)


def evenly(start: float, end: float, n: int) -> Tensor:
    """Return `n` times f64[n] in equal steps, both ends included. Raises `UserError` unless `n` is at least 1."""
    if n < 1:
        raise UserError(f"a grid has {n} steps; expected at least 1")
    return torch.linspace(start, end, n, dtype=torch.float64)


def shifted(u: T, shift: float) -> T:
    """Return `shift u / (1 + (shift - 1) u)`, in [0, 1] like `u` (Stable Diffusion 3, arXiv 2403.03206, Eq. 23).

    Large images need more noise to hide as much of them, so their models are trained and sampled with `shift` above 1.
    A shift by `1 / shift` undoes it.
    """
    return shift * u / (shift * u + (1 - u))  # the same, and exact at 0, at 1 and without shift
