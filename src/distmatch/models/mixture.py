"""The exact teacher: a Gaussian mixture, whose diffused density, score and posterior mean have closed forms.

With `p(x0) = sum_k w_k N(m_k, s_k^2 I)` the diffused marginal is `sum_k w_k N(alpha m_k, ((alpha s_k)^2 + sigma^2) I)`.
Tests measure against it: any schedule, any dimension, with labels, and nothing to train.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.schedule import EDM, Schedule
from distmatch.models.family import Family
from distmatch.models.info import Info
from distmatch.system.errors import UserError


class Mixture(Denoiser):
    """A `Denoiser` without a network.

    Args:
        means: f[K,D].
        stds: f[K], isotropic.
        weights: f[K], positive; normalised to sum 1.
        labels: i64[K], the class of each component; a condition with label `c` keeps only those of class `c`.
            A label that no component has raises `UserError`.
        prediction: only determines `weight(t)`; the denoiser is exact in any case.
    """

    def __init__(
        self,
        schedule: Schedule,
        means: Tensor,
        stds: Tensor,
        weights: Tensor,
        labels: Tensor | None = None,
        prediction: Prediction | None = None,
    ):
        super().__init__(nn.Identity(), schedule, prediction or Prediction("edm"))
        self.means: Tensor
        self.stds: Tensor
        self.log_weights: Tensor
        self.labels: Tensor | None
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        self.register_buffer("labels", labels)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the posterior mean `E[x0 | x_t]`, computed in float64 and returned in `x`'s precision."""
        return self._x0(x.double(), t.double(), cond).to(x.dtype)

    def score(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Return `grad_x log q_t(x)`: f[B,D]."""
        x, t = x.double(), t.double()
        responsibility, variance = self._responsibility(x, t, cond)
        pull = (self.schedule.alpha(t)[:, None, None] * self.means - x[:, None]) / variance[..., None]
        return (responsibility[..., None] * pull).sum(1)

    def log_density(self, x: Tensor, t: Tensor | None = None, cond: Cond | None = None) -> Tensor:
        """Return `log q_t(x)`: f[B]; without `t`, the density of the data itself, `log p(x)`."""
        x = x.double()
        alpha, sigma = (x.new_ones(len(x)), x.new_zeros(len(x))) if t is None else self._levels(t.double())
        return torch.logsumexp(self._joint(x, alpha, sigma, cond), dim=1)

    def sample(self, n: int, generator: torch.Generator | None = None, cond: Cond | None = None) -> Tensor:
        """Return `n` exact samples of the data: f64[n,D]; with `cond`, one for each of its `n` labels."""
        weights = self._log_weights(n, cond).exp()
        k = torch.multinomial(weights, 1, replacement=True, generator=generator)[:, 0]
        eps = torch.randn(n, self.dim, dtype=torch.float64, generator=generator, device=self.means.device)
        return self.means[k] + self.stds[k, None] * eps

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.alpha(t), self.schedule.sigma(t)

    def _x0(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Return `sum_k r_k (m_k sigma^2 + alpha s_k^2 x) / variance_k`, which stays regular if alpha or sigma is 0."""
        alpha, sigma = (v[:, None] for v in self._levels(t))
        responsibility, variance = self._responsibility(x, t, cond)
        pull = (sigma**2)[..., None] * self.means + (alpha * self.stds**2)[..., None] * x[:, None]
        return (responsibility[..., None] * pull / variance[..., None]).sum(1)

    def _responsibility(self, x: Tensor, t: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """Return `(p(k | x_t), variance of component k)`, each f[B,K]."""
        alpha, sigma = self._levels(t)
        return self._joint(x, alpha, sigma, cond).softmax(1), _variance(alpha, sigma, self.stds)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond | None) -> Tensor:
        """Return `log w_k N(x; alpha m_k, variance_k)`: f[B,K]."""
        variance = _variance(alpha, sigma, self.stds)
        distance = (x[:, None] - alpha[:, None, None] * self.means).square().sum(-1)
        normal = -0.5 * (distance / variance + self.dim * (2 * math.pi * variance).log())
        return self._log_weights(len(x), cond) + normal

    def _log_weights(self, n: int, cond: Cond | None) -> Tensor:
        """Return log weights f[n,K] under the condition, `-inf` for components of other classes."""
        weights = self.log_weights.expand(n, -1)
        if cond is None or cond.label is None:
            return weights
        if self.labels is None:
            raise UserError("this mixture has no labels; leave the condition out")
        other = cond.label[:, None] != self.labels
        if other.all(1).any():
            absent = cond.label[other.all(1)][0].item()
            raise UserError(f"no component has label {absent}; expected one of {self.labels.unique().tolist()}")
        return weights.masked_fill(other, -math.inf).log_softmax(1)


def _variance(alpha: Tensor, sigma: Tensor, stds: Tensor) -> Tensor:
    return (alpha[:, None] * stds) ** 2 + sigma[:, None] ** 2


def mixture(
    schedule: Schedule,
    means: Sequence[Sequence[float]],
    stds: Sequence[float],
    weights: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
) -> Mixture:
    """Make a `Mixture` from plain numbers; default: equal weights."""
    return Mixture(
        schedule,
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(stds, dtype=torch.float64),
        torch.tensor(weights if weights is not None else [1.0] * len(means), dtype=torch.float64),
        None if labels is None else torch.tensor(labels),
    )


def _toy2d() -> Mixture:
    """Two modes in the plane, as in Figure 3 of the paper.

    They have weights 3 and 1 and lie 1.5 and 4.5 from the origin, which is the mean of the data. A one-step student
    that knows only the scale of the data starts at the origin: near the heavy mode, far from the other one.
    """
    return Mixture(
        EDM(sigma_min=0.02, sigma_max=10.0),
        means=torch.tensor([[1.2, 0.9], [-3.6, -2.7]]),
        stds=torch.tensor([0.6, 0.6]),
        weights=torch.tensor([3.0, 1.0]),
        prediction=Prediction("edm", sigma_data=1.9),  # root mean square of the data's coordinates
    )


MIXTURES: dict[str, Callable[[], Mixture]] = {"toy2d": _toy2d}
"""Mixtures by name, for `teacher: mixture:NAME`."""


class Mixtures(Family):
    """The family of mixtures, found by name."""

    def load(self, source: str) -> tuple[Denoiser, Info]:
        if source not in MIXTURES:
            raise UserError(f"mixture {source!r} is unknown; expected one of {', '.join(MIXTURES)}")
        mixture = MIXTURES[source]()
        return mixture, Info(shape=(mixture.dim,))
