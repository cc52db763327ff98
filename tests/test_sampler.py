"""Samplers against exact solutions: measured orders, exact distributions, counted evaluations."""

import math

import pytest
import torch

from distmatch import rng
from distmatch.models.mixture import mixture
from distmatch.sampler import SAMPLERS, euler, evaluations, heun, one_step
from distmatch.schedule import EDM, VP, Flow

SCHEDULES = [EDM(), VP(), Flow()]
ids = {"ids": lambda s: type(s).__name__}


def modes(schedule):
    return mixture(schedule, [[-1.0], [1.5]], [0.4, 0.3], [0.35, 0.65])


def noise(n: int) -> torch.Tensor:
    return rng.noise(0, range(n), (1,)).double()


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(schedule, sampler, order):
    """The error against a very fine solution falls as `steps ** -order`: slope fitted over three doublings."""
    model, z = modes(schedule), noise(200)
    exact = heun(model, schedule, z, None, 4000)
    steps = [60, 120, 240, 480]
    errors = [(sampler(model, schedule, z, None, n) - exact).square().mean().sqrt().log2().item() for n in steps]
    slope = (errors[-1] - errors[0]) / math.log2(steps[-1] / steps[0])
    assert slope == pytest.approx(-order, abs=0.25)


@pytest.mark.parametrize("schedule", [EDM(), Flow()], **ids)
def test_one_gaussian_is_carried_along_its_exact_path(schedule):
    """For N(m, s^2) the ODE's solution is linear in the noise: `x = m + s (x_T - alpha_T m) / std_T` at the end."""
    model, z = mixture(schedule, [[0.7]], [0.5]), noise(50)
    t = torch.tensor([schedule.t_max], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    start = schedule.prior_std * z
    exact = 0.7 + 0.5 * (start - alpha * 0.7) / ((0.5 * alpha) ** 2 + sigma**2).sqrt()
    assert torch.allclose(heun(model, schedule, z, None, 400), exact, atol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_samples_follow_the_exact_distribution(schedule, churn):
    """Kolmogorov-Smirnov against the mixture's own distribution function, with and without churn."""
    model, n = modes(schedule), 4000
    x = heun(model, schedule, noise(n), None, 60, churn=churn, generator=torch.Generator().manual_seed(1))[:, 0]
    x = x.sort().values
    cdf = sum(w * 0.5 * (1 + torch.erf((x - m) / s / 2**0.5)) for w, m, s in ((0.35, -1.0, 0.4), (0.65, 1.5, 0.3)))
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (cdf - empirical).abs().max() < 1.63 / n**0.5 + 0.01  # the 1 % point, and the solver's own error


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_counted_right(schedule, name, steps):
    calls = []
    model = modes(schedule)

    def counted(x, t, cond):
        calls.append(t)
        return model(x, t, cond)

    seen = []
    x = SAMPLERS[name](counted, schedule, noise(2), None, steps, callback=lambda i, x, x0: seen.append((i, x)))
    assert len(calls) == evaluations(name, steps)
    assert [i for i, _ in seen] == list(range(steps))
    assert torch.equal(seen[-1][1], x)
    assert calls[0][0].item() == schedule.t_max  # the pair's noise and the student's meet at the very same time


def test_one_step_is_the_denoiser_at_the_end_of_time():
    schedule = EDM()
    model, z = modes(schedule), noise(3)
    expected = model(80.0 * z, torch.full((3,), 80.0, dtype=torch.float64))
    assert torch.equal(one_step(model, schedule, z, None), expected)
    assert torch.equal(one_step(model, schedule, z, None), euler(model, schedule, z, None, 1))
    other = model(80.0 * z, torch.full((3,), 5.0, dtype=torch.float64))
    assert torch.equal(one_step(model, schedule, z, None, t=5.0), other)


def test_churn_adds_what_the_forward_process_adds():
    """EDM, Algorithm 2: `t_hat = t (1 + min(S_churn / N, sqrt(2) - 1))`; no noise outside its range."""
    schedule = EDM()
    model, z, times = modes(schedule), noise(2), []

    def recorded(x, t, cond):
        times.append(t[0].item())
        return model(x, t, cond)

    heun(recorded, schedule, z, None, 4, churn=1.0, churn_range=(0.01, 50.0), generator=torch.Generator())
    grid = schedule.grid(4).tolist()
    expected = [grid[0], grid[1], grid[1] * 1.25, grid[2], grid[2] * 1.25, grid[3], grid[3]]
    assert times == pytest.approx(expected)
