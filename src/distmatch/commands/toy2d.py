"""Figure 3 of the paper: what each part of the objective does, on two modes in the plane with exact scores."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.table import Column, Table
from torch import Tensor

from distmatch.diffusion.conditions import Share
from distmatch.diffusion.losses import matching_loss
from distmatch.methods.distill import Distiller
from distmatch.methods.terms import Levels, Match, Samples, Start
from distmatch.models.mixture import MIXTURES, Mixture
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.system.files import write_atomic, write_json
from distmatch.system.ownership import owns_out
from distmatch.system.progress import progress
from distmatch.system.screen import console

SIGMA = 0.25
"""Noise level at which `kl` compares the student's samples with the real distribution."""

BLUES, ORANGE = ("#e6eef7", "#c9dcee", "#a3c4e1", "#76a5cf", "#4a83b8"), "#d9541e"


class RealScore:
    """A term that follows the real score alone, panel (a): distribution matching without its fake score.

    The gradient is `w (x - mu_real(x_t))`. Since `x_t - x` has zero mean, this is on average `-s_real(x_t)` times `w
    sigma^2`: every sample climbs towards a mode, and nothing spreads them. Noise and weighting are those of `match`.
    """

    name = "real_score"

    def __init__(self, match: Match):
        self.match, self.weight, self.reads = match, match.weight, match.reads

    def draw(self, starts: Sequence[Start], share: Share) -> Levels:
        return self.match.draw(starts, share)

    def student_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        m, t, x = self.match, drawn.t, samples.x
        with torch.no_grad():
            x0_real = m.real(m.schedule.add_noise(x, drawn.eps, t), t, samples.cond)
            w = m.weighting(x, x0_real, m.schedule.alpha(t), m.schedule.sigma(t))
        return matching_loss(x, x.detach(), x0_real, w)


OBJECTIVES = ("real score only", "distribution matching", "matching and regression")
"""Panels (a), (b), (c)."""


@dataclass(frozen=True)
class Panel:
    """A cloud of samples and its statistics.

    Args:
        samples: f[N,2].
        shares: share of the samples per mode: those nearest to it and within three of its standard deviations.
        modes: number of modes recovered, i.e. with at least half of the samples that their weight calls for.
        kl: `kl` of the samples at level `SIGMA`, in nats.
        seconds: training time.
    """

    name: str
    samples: Tensor
    shares: list[float]
    modes: int
    kl: float
    seconds: float


def panel(name: str, samples: Tensor, real: Mixture, seconds: float = 0.0) -> Panel:
    """Measure `samples f[N,2]` against the mixture that they should follow."""
    distance, nearest = torch.cdist(samples.double(), real.means).min(1)
    there = distance < 3 * real.stds[nearest]
    shares = [((nearest == k) & there).double().mean().item() for k in range(len(real.means))]
    modes = sum(share >= weight / 2 for share, weight in zip(shares, real.log_weights.exp().tolist(), strict=True))
    return Panel(name, samples, shares, modes, kl(samples, real, SIGMA), seconds)


def kl(x: Tensor, real: Mixture, sigma: float) -> float:
    """Return `KL(p_fake || p_real)` in nats at noise level `sigma` of an EDM schedule, for samples `x f[N,2]`.

    Both densities are exact: `p_fake = (1/N) sum_i N(x_i, sigma^2 I)` is the diffused distribution of the samples
    themselves, `p_real` the diffused mixture. The integral is a sum over square cells of side `sigma / 4` that reach 8
    sigma beyond the samples; its error is far below the sampling error of `x`. A finite set of real samples has a `kl`
    slightly above zero. A student that makes only mode k, perfectly, has `-ln weight_k`.
    """
    x = x.double()
    step = sigma / 4
    low, high = x.min(0).values - 8 * sigma, x.max(0).values + 8 * sigma
    axes = [torch.arange(a, b, step, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    # A round Gaussian is a product of one along each axis, so the sum over samples is a matrix product.
    columns, rows = (
        torch.exp(-0.5 * ((axis[:, None] - v) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        for axis, v in zip(axes, x.unbind(1), strict=True)
    )
    fake = (columns @ rows.T / len(x)).flatten()
    points = torch.cartesian_prod(*axes)
    log_real = real.log_density(points, points.new_full((len(points),), sigma))
    return ((torch.xlogy(fake, fake) - fake * log_real).sum() * step**2).item()


def distiller(recipe: Recipe, objective: str, runs: Path) -> Distiller:
    """Return the recipe's distillation with one of `OBJECTIVES`; all start from the same network."""
    terms = ["match", "regress"] if objective == "matching and regression" else ["match"]
    recipe = recipe.model_copy(update={"terms": terms})
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, runs) if objectives.reads_pairs(recipe) else None
    task = build.distiller(recipe, subject, pairs)
    if objective == "real score only":
        match = task.terms[0]
        assert isinstance(match, Match)
        task.objective, task.fake = replace(task.objective, terms=[RealScore(match)]), None
    return task


def figure3(recipe: Recipe, runs: Path, n: int = 4000) -> list[Panel]:
    """Return the figure's four panels, `n` samples each from the same noise: the start and each objective's result."""
    real = MIXTURES["toy2d"]()
    z = torch.randn(n, 2, generator=rng.stream("cpu", recipe.seed, "figure3"))

    @torch.no_grad()
    def sample(task: Distiller) -> Tensor:
        return task.steps.sample(task.ema.network, task.student.schedule, z.to(task.device), None).cpu()

    panels = []
    for objective in OBJECTIVES:
        task = distiller(recipe, objective, runs)
        if not panels:
            panels.append(panel("start", sample(task), real))
        began = time.perf_counter()
        with progress(objective, recipe.steps, unit="step") as advance:
            for index in range(recipe.steps):
                task.step(index)
                advance(1)
        seconds = time.perf_counter() - began
        panels.append(panel(objective, sample(task), real, seconds))
    return panels


@owns_out
def demo(out: Path, runs: Path) -> None:
    """Draw Figure 3 to `out/figure3.png`, and its numbers to `out/figure3.json`. Pairs go below `runs`."""
    recipe = load_recipe("toy2d")
    real = MIXTURES["toy2d"]()
    panels = figure3(recipe, runs)
    # The best any student can do: as many samples of the real distribution itself.
    exact = real.sample(len(panels[0].samples), rng.stream("cpu", recipe.seed, "exact"))
    rows = [*panels, panel("real samples", exact, real)]

    file = out / "figure3.png"
    write_atomic(file, lambda p: draw(panels, real).savefig(p, format="png", dpi=160))
    write_json(
        out / "figure3.json",
        {
            "kl": f"KL(fake || real) in nats, exact for {len(exact)} samples, both diffused to sigma {SIGMA}",
            "weights": real.log_weights.exp().tolist(),
            "panels": [{k: v for k, v in vars(row).items() if k != "samples"} for row in rows],
            "recipe": recipe.model_dump(mode="json"),
        },
    )

    table = Table(Column("objective", no_wrap=True), box=None)
    for title in ("modes", "near mode", "far mode", f"KL at sigma {SIGMA}", "seconds"):
        table.add_column(title, justify="right")
    for row in rows:
        shares = [f"{share:.1%}" for share in row.shares]
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        table.add_row(row.name, f"{row.modes} of {len(row.shares)}", *shares, f"{row.kl:.3f}", seconds)
    console.print(table)
    heavy = real.log_weights[0]
    console.print(f"One mode without the other, made perfectly, has KL {-heavy:.3f} = -ln {heavy.exp():.2f}.")
    console.print(f"Look at {file.resolve()}")


def draw(panels: Sequence[Panel], real: Mixture, dots: int = 1000) -> Figure:
    """Draw the panels side by side: the real density as contours, the first `dots` samples on top."""
    figure = Figure(figsize=(3.1 * len(panels), 3.15), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, panel, letter in zip(axes, panels, " abc", strict=True):
        contours(axis, real)
        x, y = panel.samples[:dots].T.tolist()
        axis.scatter(x, y, s=5, color=ORANGE, alpha=0.45, linewidths=0, zorder=3)
        axis.set_title(panel.name if letter == " " else f"({letter}) {panel.name}", fontsize=10.5, fontweight="bold")
        modes = f"{panel.modes} of {len(panel.shares)} modes, " if letter != " " else ""
        axis.set_xlabel(f"{modes}KL {panel.kl:.2f}", fontsize=10)
    marks = [Patch(color=BLUES[3], label="real density"), Line2D([], [], color=ORANGE, marker="o", ls="", label="fake")]
    axes[0].legend(handles=marks, loc="lower right", fontsize=8.5, frameon=False)
    return figure


def contours(axis: Axes, real: Mixture, margin: float = 3.6) -> None:
    """Draw the real density in a window that extends `margin` times the widest standard deviation beyond the modes."""
    reach = margin * real.stds.max()
    low, high = real.means.min(0).values - reach, real.means.max(0).values + reach
    x, y = (torch.linspace(a, b, 160, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    density = real.log_density(torch.cartesian_prod(x, y)).exp().reshape(160, 160).T
    levels = density.max() * torch.tensor([0.01, 0.04, 0.12, 0.3, 0.6, 1.0])
    axis.contourf(x, y, density, levels=levels, colors=BLUES)
    axis.set(aspect="equal", xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color("#c8c8c8")
