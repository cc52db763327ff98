"""Samplers for any schedule, as pure functions, and the step list of a student (`Steps`).

All of them follow the probability-flow ODE in a form without singular quotients, `dx = x0 d(alpha) + eps d(sigma)`,
with the denoiser's `x0` and `eps = (x - alpha x0) / sigma`. Euler on this form is DDIM; Heun is EDM's solver if
`alpha = 1`, and the trapezoid rule on the velocity for flows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.fixed import Fixed
from distmatch.diffusion.schedule import EDM, VP, Schedule, expand
from distmatch.diffusion.spacing import shifted
from distmatch.system.data import with_data
from distmatch.system.errors import UserError

Model = Callable[[Tensor, Tensor, Cond | None], Tensor]
"""`(x f[B,*D], t f[B], cond) -> x0 f[B,*D]`: a `Denoiser`, or one with guidance."""

AtTimes = Sequence[Fixed]
"""A model at each of a student's times, which saves work in every call."""

Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with `(step, x, x0)`."""


@dataclass(frozen=True)
class Steps:
    """A step list: the times at which a student is evaluated, falling.

    One time is DMD's one-step student, `G(z) = mu(prior_std z, t)` (Section 3.1); of EDM, the first time takes the
    place of `prior_std`, since its networks expect `sigma = t` of noise. With more times, each image but the last is
    noised to the next one, as in DMD2 (arXiv 2405.14867).
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times or any(later >= time for time, later in pairwise(self.times)):
            raise UserError(f"the student's times are {list(self.times)}; expected one or more, falling")

    @classmethod
    @with_data
    def spaced(cls, schedule: Schedule, count: int, shift: float = 1.0) -> "Steps":
        """Return `count` times in equal parts of the schedule's own scale: its grid of one more, without the last.

        For EDM these are rho-spaced (its Eq. 5), for VP whole steps (4 of 1000: 999, 749, 499, 249, as DMD2 has them),
        for Flow equal steps of t before the model's own shift. `shift`: a larger one puts more of them at high noise,
        by the rule of Stable Diffusion 3 for flows (`spacing.shifted`), applied to the place on the scale, from 0
        (clean) to 1.
        """
        parts = 1000 * count  # of the scale: every unshifted time is one of its points
        u = 1 - torch.arange(count, dtype=torch.float64) / count
        places = ((1 - shifted(u, shift)) * parts).round().long()
        times = schedule.grid(parts + 1)[places]
        if isinstance(schedule, VP):
            times = (times + 1e-6).floor()  # its networks were trained at whole steps
        if bool((times.diff() >= 0).any()):
            raise UserError(f"student.shift {shift:g} puts two of the {count} times at one level; use one nearer to 1")
        return cls(tuple(times.tolist()))

    def __len__(self) -> int:
        """Return the network evaluations (NFE) per image."""
        return len(self.times)

    def sample(
        self,
        model: Model | AtTimes,
        schedule: Schedule,
        z: Tensor,
        cond: Cond | None,
        noise: Sequence[Tensor] = (),
        most: int | None = None,
    ) -> Tensor:
        """Return the student's images f[B,*D] from `z f[B,*D]`; `noise` has one f[B,*D] per step after the first.

        `most`: images at once; default: all.
        """
        last, made = len(self) - 1, []
        most = most or max(1, len(z))
        for i in range(0, max(1, len(z)), most):  # also for no images at all
            rows = slice(i, i + most)
            own = cond and cond[rows]
            x = self.start(model, schedule, z[rows], own, [one[rows] for one in noise], last)
            made.append(self.step(model, x, own, last))
        return made[0] if len(made) == 1 else torch.cat(made)

    def start(
        self,
        model: Model | AtTimes,
        schedule: Schedule,
        z: Tensor,
        cond: Cond | None,
        noise: Sequence[Tensor],
        k: int,
        real: Tensor | None = None,
    ) -> Tensor:
        """Return the student's input at step `k` (from 0), made by its own first `k` steps (DMD2's simulation).

        `real`: f[B,*D], samples that are noised to the time of a later step instead.
        """
        if k and real is not None:
            return schedule.add_noise(real, noise[k - 1], real.new_full((len(real),), self.times[k]))
        x = (self.times[0] if isinstance(schedule, EDM) else schedule.prior_std) * z
        for step in range(k):
            x0 = self.step(model, x, cond, step)
            x = schedule.add_noise(x0, noise[step], x.new_full((len(x),), self.times[step + 1]))
        return x

    def step(self, model: Model | AtTimes, x: Tensor, cond: Cond | None, k: int) -> Tensor:
        """Return the image `x0 f[B,*D]` of step `k`."""
        if isinstance(model, Sequence):
            return model[k](x, cond)
        return model(x, x.new_full((len(x),), self.times[k]), cond)


def euler(
    model: Model, schedule: Schedule, z: Tensor, cond: Cond | None, steps: int, callback: Callback | None = None
) -> Tensor:
    """First order, `steps` evaluations, from `z ~ N(0, I)` to a clean image. The same as DDIM."""
    grid = schedule.grid(steps)
    x = schedule.prior_std * z
    for i in range(steps):
        t = _at(grid[i], z)
        x0 = model(x, t, cond)
        x = _move(schedule, x, x0, t, _at(grid[i + 1], z)) if i + 1 < steps else x0
        if callback is not None:
            callback(i, x, x0)
    return x


@dataclass(frozen=True)
class Churn:
    """How much noise Heun's sampler adds again before a step (Karras et al. 2022, Algorithm 2)."""

    amount: float  # S_churn
    low: float = 0.0  # S_tmin: no noise below this time
    high: float = float("inf")  # S_tmax: nor above this one
    noise: float = 1.0  # S_noise, its standard deviation


def heun(
    model: Model,
    schedule: Schedule,
    z: Tensor,
    cond: Cond | None,
    steps: int,
    churn: Churn | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Second order, `2 * steps - 1` evaluations (Karras et al. 2022, Algorithm 2; 1 without churn).

    Args:
        z: f[B,*D], standard normal; without `churn`, the same `z` gives the same image.
        churn: noise from `generator` that is added again. The first step of VP and Flow adds none: they have no time
            beyond `t_max`.
    """
    grid = schedule.grid(steps)
    churn = churn or Churn(0.0)
    gamma = min(churn.amount / steps, 2**0.5 - 1)  # the cap of Algorithm 2
    x = schedule.prior_std * z
    for i in range(steps):
        t = _at(grid[i], z)
        if gamma > 0 and churn.low <= grid[i] <= churn.high:
            noisier = schedule.nearest(grid[i : i + 1] * (1 + gamma))[0]
            if noisier > grid[i]:
                x, t = _renoise(schedule, x, t, _at(noisier, z), churn.noise, generator)
        x0 = model(x, t, cond)
        if i + 1 < steps:
            t_next = _at(grid[i + 1], z)
            ahead = _move(schedule, x, x0, t, t_next)
            x = _move(schedule, x, x0, t, t_next, ahead, model(ahead, t_next, cond))
        else:
            x = x0
        if callback is not None:
            callback(i, x, x0)
    return x


Sampler = Callable[..., Tensor]
"""`(model, schedule, z f[B,*D], cond, steps, callback=None) -> x f[B,*D]`, from `z ~ N(0, I)` to clean samples."""

SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}


def _at(t: Tensor, z: Tensor) -> Tensor:
    return t.to(z).expand(len(z))


def _eps(schedule: Schedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    return (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x)


def _move(
    schedule: Schedule,
    x: Tensor,
    x0: Tensor,
    t: Tensor,
    t_next: Tensor,
    ahead: Tensor | None = None,
    x0_ahead: Tensor | None = None,
) -> Tensor:
    """Take one step of `dx = x0 d(alpha) + eps d(sigma)`: Euler or, given the prediction at `ahead`, the trapezoid."""
    d_alpha = expand(schedule.alpha(t_next) - schedule.alpha(t), x)
    d_sigma = expand(schedule.sigma(t_next) - schedule.sigma(t), x)
    eps = _eps(schedule, x, x0, t)
    if ahead is not None and x0_ahead is not None:
        x0 = (x0 + x0_ahead) / 2
        eps = (eps + _eps(schedule, ahead, x0_ahead, t_next)) / 2
    return x + d_alpha * x0 + d_sigma * eps


def _renoise(
    schedule: Schedule, x: Tensor, t: Tensor, t_up: Tensor, scale: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return `x_t` noised further, to the time `t_up`, by the forward process."""
    ratio = schedule.alpha(t_up) / schedule.alpha(t)
    added = (schedule.sigma(t_up) ** 2 - (ratio * schedule.sigma(t)) ** 2).clamp(min=0).sqrt()
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return expand(ratio, x) * x + scale * expand(added, x) * eps, t_up
