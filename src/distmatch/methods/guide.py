"""Guidance as a term of its own: decoupled distribution matching (arXiv 2511.22677).

The matching gradient under guidance `w` is a sum, `F - R_w = (F - R_c) - (w - 1) (R_c - R_u)`, with `F` the fake score,
`R_c` and `R_u` the real score with and without condition. `Match` with guidance 1 is the first part, this the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.diffusion.conditions import Share, rows
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.losses import Weighting, matching_loss
from distmatch.diffusion.schedule import Schedule
from distmatch.methods.terms import Samples, Start
from distmatch.system.data import with_data
from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Level:
    """Time `t f[B]` and noise `eps f[B,*D]` for the images."""

    t: Tensor
    eps: Tensor


@with_data
def cleaner(schedule: Schedule, bins: int, t: float) -> int:
    """Return how many of the schedule's levels are cleaner than the time `t`."""
    return int((schedule.grid(bins).float() < t).sum())


class Guide:
    """The part of the matching gradient that comes from guidance: ascent on `log p(condition | x_t)`.

    Args:
        teacher: frozen; evaluated with and without condition.
        guidance: w; `None` takes each sample's scale from `cond.extra["guidance"]`.
        weighting: the factor on `R_u - R_c`; its norm is that of the distance to `R_c`.
        bins: T; the noise levels are the schedule's grid in rising order.
        steps: (low, high): levels are drawn from bins `low .. high - 1`, of these only from those that are cleaner than
            the student's input.
        times: the student's; see `sampler.Steps`. Raises `UserError` if no bin is cleaner than the last.
    """

    name = "guide"

    def __init__(
        self,
        teacher: Denoiser,
        *,
        guidance: float | None,
        weighting: Weighting,
        times: Sequence[float],
        weight: float = 1.0,
        bins: int = 1000,
        steps: tuple[int, int] = (20, 980),
    ):
        self.reads: tuple[str, ...] = ("noise",)
        self.teacher, self.guidance, self.weighting, self.weight = teacher, guidance, weighting, weight
        self.levels, self.low = teacher.schedule.grid(bins).flip(0).float(), steps[0]
        self.highs = [min(cleaner(teacher.schedule, bins, t), steps[1]) for t in times]
        if min(self.highs) <= self.low:
            raise UserError(
                f"guide: no noise level of bins {steps[0]} to {steps[1] - 1} is cleaner than the student's input at "
                f"{min(times):g}; lower guide.min_step"
            )

    def draw(self, starts: Sequence[Start], share: Share) -> Level:
        (start,), device = starts, starts[0].z.device
        self.levels = self.levels.to(device)
        high = self.highs[len(start.noise)]
        bins = torch.randint(self.low, high, (start.batch,), generator=start.generator, device=device)
        eps = torch.randn(start.batch, *start.z.shape[1:], generator=start.generator, device=device)
        return Level(self.levels[rows(bins, share)], rows(eps, share))

    def student_loss(self, drawn: Level, samples: Samples) -> Tensor:
        t, x, cond, schedule = drawn.t, samples.x, samples.cond, self.teacher.schedule
        assert cond is not None
        with torch.no_grad():
            x_t = schedule.add_noise(x, drawn.eps, t)
            uncond, plain = self.teacher(x_t, t, cond.null()), self.teacher(x_t, t, cond)
            w = self.weighting(x, plain, schedule.alpha(t), schedule.sigma(t))
            scale = cond.extra["guidance"].to(w) if self.guidance is None else self.guidance
        return matching_loss(x, uncond, plain, w * (scale - 1))
