"""Figure 3 of the paper: what each part of the objective does, on two modes in the plane with exact scores."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distmatch import build, rng
from distmatch.checkpoint import write_atomic, write_json
from distmatch.config import Recipe, load_recipe
from distmatch.distill import Batch, Match, Term
from distmatch.losses import matching_loss
from distmatch.models.mixture import MIXTURES, Mixture
from distmatch.progress import progress
from distmatch.sampler import one_step

SIGMA = 0.25
"""Noise level at which `kl` compares the student's samples with the real distribution."""

REAL, FAKE = "#3b6ea8", "#d9601a"


class RealScore(Term):
    """Follow the real score alone, panel (a): distribution matching without its fake score.

    The gradient is `w (x - mu_real(x_t))`. As `x_t - x` has mean zero, that is on average `-s_real(x_t)` times
    `w sigma^2`: every sample climbs towards a mode, and nothing spreads them. Noise and weighting are those of `match`.
    """

    name = "real_score"

    def __init__(self, match: Match):
        self.match, self.weight, self.batch = match, match.weight, match.batch

    def draw(self, seed: int, index: int, turn: int = 0) -> Batch:
        return self.match.draw(seed, index, turn)

    def generator(self, batch: Batch, x: Tensor) -> Tensor:
        m, t, eps = self.match, batch.t, batch.eps
        assert t is not None and eps is not None
        with torch.no_grad():
            x0_real = m.real(m.schedule.add_noise(x, eps, t), t, batch.cond)
            w = m.weighting(x, x0_real, m.schedule.alpha(t), m.schedule.sigma(t))
        return matching_loss(x, x.detach(), x0_real, w)


OBJECTIVES = {"real score only": "a", "distribution matching": "b", "with regression": "c"}
"""The paper's panels."""


@dataclass(frozen=True)
class Panel:
    """What a cloud of samples is like.

    Args:
        shares: of the samples, by mode: those that are nearest to it and within three of its standard deviations.
        modes: how many modes are recovered, that is have at least half the samples that their weight calls for.
        kl: `kl` of the samples, in nats.
        seconds: of training.
    """

    shares: list[float]
    modes: int
    kl: float
    seconds: float = 0.0


def measure(x: Tensor, real: Mixture, seconds: float = 0.0) -> Panel:
    """The figures of samples `x f[N,2]`."""
    distance, nearest = torch.cdist(x.double(), real.means).min(1)
    there = distance < 3 * real.stds[nearest]
    shares = [((nearest == k) & there).double().mean().item() for k in range(len(real.means))]
    modes = sum(share >= weight / 2 for share, weight in zip(shares, real.log_weights.exp().tolist(), strict=True))
    return Panel(shares, modes, kl(x, real, SIGMA), seconds)


def kl(x: Tensor, real: Mixture, sigma: float) -> float:
    """`KL(p_fake || p_real)` in nats, both diffused to noise level `sigma`, for samples `x f[N,2]`.

    Both densities are exact: `p_fake = (1/N) sum_i N(x_i, sigma^2 I)` is the diffused distribution of the samples as
    they are, `p_real` the diffused mixture. The integral is a sum over square cells of side `sigma / 4`, out to 8 sigma
    beyond the samples; for functions that smooth its error is far below the sampling error of `x`. A finite sample of
    the real distribution itself has a `kl` a little above zero. A student that has mode k alone, perfectly, has
    `-ln weight_k`.
    """
    x = x.double()
    step = sigma / 4
    axes = [torch.arange(v.min() - 8 * sigma, v.max() + 8 * sigma, step, dtype=torch.float64) for v in x.unbind(1)]
    # A round Gaussian is the product of one along each axis, so that the sum over samples is a matrix product.
    columns, rows = (
        torch.exp(-0.5 * ((axis[:, None] - v) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        for axis, v in zip(axes, x.unbind(1), strict=True)
    )
    fake = (columns @ rows.T / len(x)).flatten()
    points = torch.cartesian_prod(*axes)
    log_real = real.log_density(points, points.new_full((len(points),), sigma))
    return ((torch.xlogy(fake, fake) - fake * log_real).sum() * step**2).item()


def run(
    recipe: Recipe, objective: str, runs: Path, n: int = 4000, advance: Callable[[int], None] = lambda _: None
) -> tuple[Tensor, Tensor, float]:
    """Train with one of `OBJECTIVES`: the student's samples before and after, each f[n,2], and the seconds it took."""
    terms = ["match", "regress"] if objective == "with regression" else ["match"]
    recipe = recipe.model_copy(update={"terms": terms})
    teacher, info = build.teacher(recipe)
    pairs = build.pair_store(recipe, teacher, info, runs) if "regress" in terms else None
    task = build.distiller(recipe, teacher, info, pairs)
    if objective == "real score only":
        match = task.terms[0]
        assert isinstance(match, Match)
        task.terms, task.fake = [RealScore(match)], None
    z = torch.randn(n, *info.shape, generator=rng.stream("cpu", recipe.seed, "figure"))

    @torch.no_grad()
    def sample() -> Tensor:
        return one_step(task.ema.network, teacher.schedule, z.to(task.device), None, task.t).cpu()

    before, began = sample(), time.perf_counter()
    for index in range(recipe.steps):
        task.step(index)
        advance(1)
    return before, sample(), time.perf_counter() - began
