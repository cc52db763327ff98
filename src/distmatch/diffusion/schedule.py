"""Noise schedules: `x_t = alpha(t) x0 + sigma(t) eps` (DMD, Eq. 3).

Each schedule defines its own time `t`; in all of them, larger is noisier. EDM: `t` is sigma itself. VP: `t` is the step
number of a discrete diffusion, taken as continuous. Flow: `t` runs from data (0) to noise (1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from distmatch.diffusion.betas import beta_settings, log_alphas, spaced_betas, zero_snr
from distmatch.diffusion.ranges import betas_of, check_betas, check_edm, check_flow, check_vp
from distmatch.diffusion.spacing import evenly, shifted


def expand(v: Tensor, x: Tensor) -> Tensor:
    """Return `v f[B]` with trailing axes added, so that it broadcasts against `x f[B,*D]`."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


class Schedule(Protocol):
    """What a schedule provides. A custom one inherits the last three methods from here or defines them.

    `t_max` is where sampling and the one-step student start: from `prior_std * z`, `z ~ N(0, I)`.
    """

    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def prior_std(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...  # f[B] -> f[B], and so is sigma
    def sigma(self, t: Tensor) -> Tensor: ...

    def grid(self, n: int) -> Tensor:
        """Return falling times f64[n] from `t_max` to `t_min`: a sampler's steps and, reversed, the paper's T bins."""
        return evenly(self.t_max, self.t_min, n)

    def nearest(self, t: Tensor) -> Tensor:
        """Return the times f[B] nearest to `t f[B]` that the schedule's networks were trained on."""
        return t.clamp(self.t_min, self.t_max)

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return `x_t f[B,*D]` from `x f[B,*D]`, `eps f[B,*D]`, `t f[B]` (Eq. 3)."""
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * eps


@dataclass(frozen=True)
class EDM(Schedule):
    """`alpha = 1`, `sigma = t` (Karras et al. 2022, arXiv 2206.00364), with its rho-spaced grid (its Eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_edm(self.sigma_min, self.sigma_max, self.rho)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        return self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, n: int) -> Tensor:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return evenly(*ends, n) ** self.rho

    def nearest(self, t: Tensor) -> Tensor:
        return t  # not clamped at sigma_max: churn starts beyond it (Algorithm 2)


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving, `alpha^2 + sigma^2 = 1`, from the betas of a discrete diffusion (Ho et al. 2020).

    `linear` from 1e-4 to 2e-2 is DDPM, `scaled_linear` from 0.00085 to 0.012 Stable Diffusion; for the others see
    `betas.spaced_betas`. `betas`, if given, replaces the other four arguments. `t` is in [0, steps - 1]; between whole
    steps, `log alpha` is interpolated linearly. Raises `UserError` unless all 0 < beta < 1; the last may be 1.
    """

    beta_start: float = 1e-4
    beta_end: float = 2e-2
    steps: int = 1000
    spacing: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    betas: Sequence[float] | None = None
    t_min: ClassVar[float] = 0.0
    prior_std: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", betas_of(self.betas))
            object.__setattr__(self, "steps", len(self.betas))
        check_vp(self.spacing, self.beta_start, self.beta_end, self.steps)
        check_betas(self.table() if self.steps > 0 else torch.empty(0))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "VP":
        """Build it from a diffusers scheduler or its settings. Raises `UserError` if the scheduler has no betas."""
        config = getattr(scheduler, "config", scheduler)
        found = cls(**beta_settings({"_class_name": type(scheduler).__name__, **config}))
        return cls(betas=zero_snr(found.table()).tolist()) if config.get("rescale_betas_zero_snr") else found

    @property
    def t_max(self) -> float:
        return float(self.steps - 1)

    def table(self) -> Tensor:
        """Return the betas, f64[steps]."""
        if self.betas is not None:
            return torch.tensor(self.betas, dtype=torch.float64, device="cpu")
        return spaced_betas(self.spacing, self.beta_start, self.beta_end, self.steps)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def _log_alpha(self, t: Tensor) -> Tensor:
        table = log_alphas(self, t.device, t.dtype)
        low = t.floor().clamp(0, self.steps - 2)  # so that low + 1 is in the table, also at t_max
        index = low.long()
        return torch.lerp(table[index], table[index + 1], t - low)


@dataclass(frozen=True)
class Flow(Schedule):
    """Straight paths, `alpha = 1 - t`, `sigma = t` (rectified flow, flow matching). `shift`: of its grid."""

    t_min: float = 1e-3
    t_max: float = 1.0
    shift: float = 1.0
    prior_std: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_flow(self.t_min, self.t_max, self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, n: int) -> Tensor:
        ends = shifted(self.t_max, 1 / self.shift), shifted(self.t_min, 1 / self.shift)
        return shifted(evenly(*ends, n), self.shift)
