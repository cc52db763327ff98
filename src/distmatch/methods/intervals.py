"""Sub-interval matching for students of several steps (trajectory distribution matching, arXiv 2503.06674)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from distmatch.diffusion.schedule import Schedule
from distmatch.system.data import with_data
from distmatch.system.errors import UserError

Spans = Callable[[int], tuple[tuple[int, int], tuple[int, int]]]
"""`(the student's step) -> (low, high)`: bins of the levels that its loss draws, and bins for the fake score's loss."""


@with_data
def intervals(schedule: Schedule, times: Sequence[float], bins: int, own: tuple[int, int]) -> Spans:
    """Return the bins between each of the student's times and the next, for its loss and the fake score's.

    Each step's images are then judged only from the noise that the next step will add to them up to the step's own
    time, and the fake score knows one step's images per level. The last step has all levels up to its time.

    Args:
        own: (low, high), the bins within which the student's loss stays.

    Raises `UserError` if no bin of `own` lies between two of the times.
    """
    levels = schedule.grid(bins).flip(0)
    ends = torch.searchsorted(levels, torch.tensor(times, dtype=levels.dtype), right=True).tolist()
    found = []
    for k, (high, low) in enumerate(pairwise([*ends, 0])):
        inside = max(low, own[0]), min(high, own[1])
        if not inside[0] < inside[1]:
            below = times[k + 1] if k + 1 < len(times) else 0
            raise UserError(
                f"match.intervals: no noise level lies between the student's times {times[k]:g} and {below:g} within "
                f"bins {own[0]} to {own[1] - 1} of {bins}; choose times further apart, or other match.min_step and "
                "match.max_step"
            )
        found.append((inside, (low, high)))
    return found.__getitem__
