"""Schedules against their definitions, written out with numpy."""

import numpy as np
import pytest
import torch

from distmatch.models.folder import schedule_config, schedule_of
from distmatch.schedule import EDM, VP, Flow

ALL = [EDM(), VP(), VP(0.00085, 0.012, 1000, "scaled_linear"), Flow()]


def test_edm_grid_is_karras_equation_5():
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert np.allclose(EDM().grid(18).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (VP(), np.linspace(1e-4, 2e-2, 1000)),
        (VP(0.00085, 0.012, 1000, "scaled_linear"), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ],
    ids=["DDPM", "Stable Diffusion"],
)
def test_vp_is_the_product_of_one_minus_beta(schedule, betas):
    t = torch.tensor([0, 1, 500, 998, 999], dtype=torch.float64)
    expected = np.cumprod(1 - betas)[t.long().numpy()]
    assert np.allclose(schedule.alpha(t).numpy() ** 2, expected, rtol=1e-12)
    assert np.allclose((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).numpy(), 1, rtol=1e-14)
    between = schedule.alpha(torch.tensor([500.25], dtype=torch.float64)).log()
    assert between.item() == pytest.approx(np.interp(500.25, [500, 501], np.log(np.cumprod(1 - betas)[500:502]) / 2))


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_every_schedule_keeps_the_common_rules(schedule):
    grid = schedule.grid(50)
    assert grid.dtype == torch.float64
    assert grid[0].item() == pytest.approx(schedule.t_max)
    assert grid[-1].item() == pytest.approx(schedule.t_min)
    assert (grid.diff() < 0).all()
    noise_to_signal = schedule.sigma(grid[1:]) / schedule.alpha(grid[1:])
    assert (noise_to_signal.diff() < 0).all()  # larger t is noisier
    x, eps = torch.randn(2, 50, 3, 4, dtype=torch.float64)
    expected = schedule.alpha(grid)[:, None, None] * x + schedule.sigma(grid)[:, None, None] * eps
    assert torch.allclose(schedule.add_noise(x, eps, grid), expected, rtol=1e-12)
    # Stable Diffusion's schedule ends at sigma 0.9977; its sampler starts from unit noise all the same.
    assert schedule.prior_std == pytest.approx(schedule.sigma(grid[:1]).item(), rel=3e-3)
    assert schedule_of(schedule_config(schedule)) == schedule


def test_unknown_schedules_and_empty_grids_are_named():
    with pytest.raises(ValueError, match="schedule type 'cosine' is unknown; expected one of edm, vp, flow"):
        schedule_of({"type": "cosine"})
    with pytest.raises(ValueError, match="a grid has 0 steps"):
        EDM().grid(0)
