"""Noise schedules: `x_t = alpha(t) x0 + sigma(t) eps` (DMD, Eq. 3).

A schedule owns its time coordinate `t`; larger is noisier in all of them. EDM: `t` is sigma itself. VP: `t` is the step
number of a discrete diffusion, read continuously. Flow: `t` runs from data (0) to noise (1).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


def expand(v: Tensor, x: Tensor) -> Tensor:
    """`v f[B]` with the trailing axes that make it broadcast against `x f[B,*D]`."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class EDM:
    """`alpha = 1`, `sigma = t` (Karras et al. 2022, arXiv 2206.00364), with its rho-spaced grid (Eq. 5 there)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, n: int) -> Tensor:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return _linspace(*ends, n) ** self.rho

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x + expand(t, x) * eps


@dataclass(frozen=True)
class VP:
    """Variance preserving, `alpha^2 + sigma^2 = 1`, from DDPM's betas (Ho et al. 2020).

    `spacing="linear"` with 1e-4..2e-2 is DDPM; `"scaled_linear"` (linear in sqrt(beta)) with 0.00085..0.012 is Stable
    Diffusion. `t` in [0, steps - 1]; `log alpha` is interpolated linearly between whole steps.
    """

    beta_start: float = 1e-4
    beta_end: float = 2e-2
    steps: int = 1000
    spacing: Literal["linear", "scaled_linear"] = "linear"

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(self.steps - 1)

    @property
    def prior_std(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def grid(self, n: int) -> Tensor:
        return _linspace(self.t_max, self.t_min, n)

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * eps

    def _log_alpha(self, t: Tensor) -> Tensor:
        table = _vp_log_alpha(self, t.device, t.dtype)
        low = t.floor().clamp(0, self.steps - 2)
        index = low.long()
        return torch.lerp(table[index], table[index + 1], t - low)


@dataclass(frozen=True)
class Flow:
    """Straight paths, `alpha = 1 - t`, `sigma = t` (rectified flow, flow matching)."""

    t_min: float = 1e-3
    t_max: float = 1.0

    @property
    def prior_std(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, n: int) -> Tensor:
        return _linspace(self.t_max, self.t_min, n)

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return expand(1 - t, x) * x + expand(t, x) * eps


Schedule = EDM | VP | Flow
"""Every schedule has

- `t_min`, `t_max`: its range; `t_max` is where sampling and the one-step student start;
- `prior_std`: a sampler starts from `prior_std * z`, `z ~ N(0, I)`;
- `alpha(t f[B]) -> f[B]`, `sigma(t f[B]) -> f[B]`;
- `grid(n) -> f64[n]`: falling times from `t_max` to `t_min`, the sampler's steps and, reversed, the paper's T bins;
- `add_noise(x f[B,*D], eps f[B,*D], t f[B]) -> x_t f[B,*D]` (Eq. 3).
"""


def _linspace(start: float, end: float, n: int) -> Tensor:
    if n < 1:
        raise ValueError(f"a grid has {n} steps; expected at least 1")
    return torch.linspace(start, end, n, dtype=torch.float64)


@cache
def _vp_log_alpha(vp: VP, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`log alpha_t f[T] = 1/2 sum_{s<=t} log(1 - beta_s)`, summed in float64."""
    if vp.spacing == "linear":
        betas = torch.linspace(vp.beta_start, vp.beta_end, vp.steps, dtype=torch.float64)
    else:
        betas = torch.linspace(vp.beta_start**0.5, vp.beta_end**0.5, vp.steps, dtype=torch.float64) ** 2
    return (0.5 * torch.log1p(-betas).cumsum(0)).to(device, dtype)
