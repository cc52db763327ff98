"""Samplers against exact solutions: measured orders, exact distributions, counted evaluations."""

import itertools
import math

import numpy as np
import pytest
import torch

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.sampler import SAMPLERS, Churn, Steps, euler, heun
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.diffusion.solvers import evaluations
from distmatch.models.mixture import mixture
from distmatch.system import rng

SCHEDULES = [EDM(), VP(), Flow()]
ids = {"ids": lambda s: type(s).__name__}


def modes(schedule):
    return mixture(schedule, [[-1.0], [1.5]], [0.4, 0.3], [0.35, 0.65])


def noise(n: int) -> torch.Tensor:
    return rng.noise(0, range(n), (1,)).double()


def distribution(model, x, t):
    """The diffused mixture's distribution function at `x f[n]`."""
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    std = ((alpha * model.stds) ** 2 + sigma**2).sqrt()
    normal = 0.5 * (1 + torch.erf((x[:, None] - alpha * model.means[:, 0]) / std / 2**0.5))
    return (model.log_weights.exp() * normal).sum(1)


def exact(model, z):
    """What a sampler of infinitely many steps gives for `z f[n,1]`.

    On a line the flow of the ODE keeps quantiles, `F_min(x) = F_max(prior_std z)`; the last evaluation denoises.
    """
    t_max, t_min = (torch.tensor(v, dtype=torch.float64) for v in (model.schedule.t_max, model.schedule.t_min))
    quantile = distribution(model, model.schedule.prior_std * z[:, 0], t_max)
    low, high = torch.full_like(quantile, -10.0), torch.full_like(quantile, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(model, middle, t_min) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return model(low[:, None], t_min.expand(len(z)), None)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(schedule, sampler, order):
    """The error against the exact solution falls as `steps ** -order`: slope over two doublings."""
    model, z = modes(schedule), noise(200)
    expected = exact(model, z)
    steps = [80, 160, 320]
    errors = [(sampler(model, schedule, z, None, n) - expected).square().mean().sqrt().log2().item() for n in steps]
    slope = (errors[-1] - errors[0]) / math.log2(steps[-1] / steps[0])
    assert slope == pytest.approx(-order, abs=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_one_gaussian_is_carried_along_its_exact_path(schedule):
    """For N(m, s^2) the ODE's solution is linear in the noise: `(x_t - alpha_t m) / std_t` is the same for all t."""
    model, z = mixture(schedule, [[0.7]], [0.5]), noise(50)

    def level(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * 0.7, ((0.5 * alpha) ** 2 + sigma**2).sqrt()

    grid = schedule.grid(2)
    (mean, std), (mean_end, std_end) = level(grid[0]), level(grid[1])
    end = mean_end + std_end * (schedule.prior_std * z - mean) / std
    assert torch.allclose(heun(model, schedule, z, None, 200), model(end, grid[1].expand(50)), atol=1e-3)


def test_a_sample_is_the_same_in_every_batch():
    """Per-sample seeds: image `i` depends on `(seed, i)` and its own label, not on its neighbours."""
    model = mixture(VP(), [[-1.0, 0.0], [1.5, 0.5], [0.0, 2.0]], [0.4, 0.3, 0.2], labels=[0, 1, 1])
    label = torch.arange(7) % 2

    def draw(indices):
        return heun(model, VP(), rng.noise(5, indices, (2,)), Cond(label=label[indices]), 8)

    whole = draw(list(range(7)))
    for batch in ([3], [6, 0], [5, 4, 3, 2, 1]):
        assert torch.equal(draw(batch), whole[batch])


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_samples_follow_the_exact_distribution(schedule, churn):
    """Kolmogorov-Smirnov against the mixture's own distribution function, with and without churn."""
    model, n = modes(schedule), 4000
    x = heun(model, schedule, noise(n), None, 60, Churn(churn), torch.Generator().manual_seed(1))[:, 0]
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
    assert torch.equal(Steps((80.0,)).sample(model, schedule, z, None), expected)
    assert torch.equal(Steps((80.0,)).sample(model, schedule, z, None), euler(model, schedule, z, None, 1))
    other = model(5.0 * z, torch.full((3,), 5.0, dtype=torch.float64))  # its noise is of that level, too
    assert torch.equal(Steps((5.0,)).sample(model, schedule, z, None), other)


def test_a_student_makes_no_more_images_at_once_than_it_may():
    """And each is the same as among all: with its own condition, and its own noise at each step."""
    sizes, schedule = [], EDM()
    z, *noise = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    cond = Cond(label=torch.arange(7))

    def model(x, t, cond):
        sizes.append(len(x))
        return x / 2 + cond.label[:, None]

    whole, parts = (Steps((80.0, 5.0, 1.0)).sample(model, schedule, z, cond, noise, most) for most in (None, 3))
    assert torch.equal(whole, parts)
    assert sizes == [7] * 3 + [3] * 6 + [1] * 3
    assert Steps((80.0,)).sample(lambda x, t, cond: x, schedule, z, None, most=3).shape == z.shape
    assert Steps((80.0,)).sample(lambda x, t, cond: x, schedule, z[:0], None).shape == z[:0].shape


def test_churn_adds_what_the_forward_process_adds():
    """EDM, Algorithm 2: `t_hat = t (1 + min(S_churn / N, sqrt(2) - 1))`; no noise outside its range."""
    schedule = EDM()
    model, z, times = modes(schedule), noise(2), []

    def recorded(x, t, cond):
        times.append(t[0].item())
        return model(x, t, cond)

    heun(recorded, schedule, z, None, 4, Churn(1.0, 0.01, 50.0), torch.Generator())
    grid = schedule.grid(4).tolist()
    expected = [grid[0], grid[1], grid[1] * 1.25, grid[2], grid[2] * 1.25, grid[3], grid[3]]
    assert times == pytest.approx(expected)


def algorithm_2(model, z, levels, churn, bounds, scale, generator, rounded=lambda t: t):
    """Karras et al. 2022, Algorithm 2, line by line, from falling levels f64[n]; `rounded` is the reference's."""
    levels = [*levels, 0.0]
    x = levels[0] * z
    for t, t_next in itertools.pairwise(levels):
        gamma = min(churn / (len(levels) - 1), 2**0.5 - 1) if bounds[0] <= t <= bounds[1] else 0.0
        t_hat = rounded(t + gamma * t)
        if t_hat > t:
            x = x + (t_hat**2 - t**2) ** 0.5 * scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        d = (x - model(x, torch.full((len(x),), t_hat, dtype=x.dtype), None)) / t_hat
        euler_step = x + (t_next - t_hat) * d
        if t_next != 0:
            later = model(euler_step, torch.full((len(x),), t_next, dtype=x.dtype), None)
            d = (d + (euler_step - later) / t_next) / 2
        x = x + (t_next - t_hat) * d
    return x


@pytest.mark.parametrize("churn", [0.0, 3.0, 1e3])
def test_heun_is_algorithm_2(churn):
    """From the first step on, which starts above sigma_max."""
    schedule = EDM()
    model, z, bounds = modes(schedule), noise(20), (0.05, float("inf"))
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    x = heun(model, schedule, z, None, 9, Churn(churn, *bounds, 1.01), ours)
    assert torch.allclose(x, algorithm_2(model, z, schedule.grid(9).tolist(), churn, bounds, 1.01, theirs), rtol=1e-9)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("churn", [0.0, 8.0])
def test_an_iddpm_network_is_sampled_at_its_own_levels(churn):
    """As the reference does (`round_sigma`): relative rms 1e-7, where times between the levels are off by 1e-3."""
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    levels = (1 / np.cumprod(1 - np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)) - 1) ** 0.5

    def rounded(t):
        return levels[np.abs(levels - t).argmin()]

    class Network(torch.nn.Module):
        def forward(self, x, step, cond):
            return torch.tanh(3 * x + torch.sin(0.05 * step)[:, None])

    def by_hand(x, t, cond):
        step = float(np.abs(levels - t[0].item()).argmin())
        return x - t[0] * torch.tanh(3 * x / (1 + t[0] ** 2) ** 0.5 + math.sin(0.05 * step))

    n, (low, high) = 18, (levels[0] ** (1 / 7), 80 ** (1 / 7))
    grid = [rounded((high + i / (n - 1) * (low - high)) ** 7) for i in range(n)]
    denoiser, z = Denoiser(Network(), IDDPM(levels[0]), Prediction("iddpm")), noise(50)
    expected = algorithm_2(by_hand, z, grid, churn, (0.0, 50.0), 1.0, torch.Generator().manual_seed(2), rounded)

    def error(schedule):
        generator = torch.Generator().manual_seed(2)
        x = heun(denoiser, schedule, z, None, n, Churn(churn, 0.0, 50.0), generator)
        return ((x - expected).square().mean() / expected.square().mean()).sqrt().item()

    assert error(denoiser.schedule) < 1e-6
    assert error(EDM(levels[0])) > 1e-4


@pytest.mark.parametrize("schedule", [VP(), Flow()], **ids)
def test_churn_leaves_the_first_step_of_a_schedule_that_ends(schedule):
    times, model = [], modes(schedule)

    def recorded(x, t, cond):
        times.append(t[0].item())
        return model(x, t, cond)

    heun(recorded, schedule, noise(2), None, 4, Churn(1.0), torch.Generator())
    grid = schedule.grid(4).tolist()
    assert times[0] == grid[0]
    assert times[2] == pytest.approx(min(1.25 * grid[1], schedule.t_max))


def test_churn_noise_scales_what_is_added():
    """S_noise: the model sees a Gaussian of variance `t^2 + S_noise^2 (t_hat^2 - t^2)` after the noise is put back."""
    schedule, seen = EDM(), []

    def to_zero(x, t, cond):
        seen.append((x, t[0].item()))
        return torch.zeros_like(x)

    heun(to_zero, schedule, torch.zeros(20_000, 1), None, 4, Churn(1.0, noise=1.5), torch.Generator())
    x, t_hat = seen[0]
    assert t_hat == 100
    expected = 1.5 * (100**2 - 80**2) ** 0.5
    assert x.std().item() == pytest.approx(expected, rel=0.03)
