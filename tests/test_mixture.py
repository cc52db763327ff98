"""The exact teacher against quadrature and automatic differentiation."""

import pytest
import torch

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.models.mixture import mixture

SCHEDULES = [EDM(), VP(), Flow()]
ids = {"ids": lambda s: type(s).__name__}


def line(schedule, **options):
    return mixture(schedule, [[-1.0], [0.5], [2.0]], [0.3, 0.1, 0.6], [0.2, 0.3, 0.5], **options)


def plane(schedule):
    return mixture(schedule, [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.5], [0.4, 0.6])


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_score_is_the_gradient_of_the_log_density(schedule):
    t = schedule.grid(7)
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(plane(schedule).log_density(x, t).sum(), x)
    assert torch.allclose(plane(schedule).score(x, t), gradient, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_x0_is_the_posterior_mean_by_quadrature(schedule):
    """E[x0 | x_t] by Bayes' rule on a fine grid of x0."""
    model, x0 = line(schedule), torch.linspace(-6, 7, 200_001, dtype=torch.float64)
    prior = model.log_density(x0[:, None])
    for t in schedule.grid(6):
        x = torch.tensor([[0.7]], dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        posterior = (prior - 0.5 * ((x - alpha * x0) / sigma).square()[0]).softmax(0)
        assert model(x, t[None]).item() == pytest.approx((posterior * x0).sum().item(), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_tweedie_ties_x0_and_score(schedule):
    t = schedule.grid(6)[1:]  # a flow's alpha is 0 at its first time
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    expected = (x + sigma**2 * plane(schedule).score(x, t)) / alpha
    assert torch.allclose(plane(schedule)(x, t), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_densities_integrate_to_one(schedule):
    model = line(schedule)
    for t in (None, *schedule.grid(4)):
        width = 12.0 if t is None else 12.0 * (1 + schedule.sigma(t).item())
        x = torch.linspace(-width, width, 400_001, dtype=torch.float64)
        density = model.log_density(x[:, None], None if t is None else t.expand(len(x))).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_densities_in_three_dimensions_are_scipys(schedule):
    """Components of unequal width: a wrong power of the normaliser shows."""
    from scipy.stats import multivariate_normal  # seconds, which only the process of this test need spend

    means, stds, weights = [[-1.0, 0.3, 0.1], [1.0, 0.5, -0.7]], [0.2, 0.9], [0.7, 0.3]
    model = mixture(schedule, means, stds, weights)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for t in (None, *schedule.grid(4)):
        alpha, sigma = (1.0, 0.0) if t is None else (schedule.alpha(t).item(), schedule.sigma(t).item())
        expected = sum(
            w * multivariate_normal([alpha * v for v in m], (alpha * s) ** 2 + sigma**2).pdf(x.numpy())
            for m, s, w in zip(means, stds, weights, strict=True)
        )
        ours = model.log_density(x, None if t is None else t.expand(5)).exp()
        assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-10)


def test_a_flow_at_pure_noise_predicts_the_mean():
    model = line(Flow())
    x = torch.tensor([[-3.0], [4.0]], dtype=torch.float64)
    assert model(x, torch.ones(2, dtype=torch.float64)).flatten().tolist() == pytest.approx([0.2 * -1 + 0.15 + 1.0] * 2)


def test_labels_keep_their_components_alone():
    model, only = line(EDM(), labels=[0, 1, 1]), mixture(EDM(), [[0.5], [2.0]], [0.1, 0.6], [0.3, 0.5])
    x, t = torch.randn(5, 1, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    ones = Cond(label=torch.ones(5, dtype=torch.long))
    for method in ("forward", "score", "log_density"):
        assert torch.allclose(getattr(model, method)(x, t, ones), getattr(only, method)(x, t), rtol=1e-12)
    with pytest.raises(ValueError, match="this mixture has no labels"):
        only(x, t, ones)
    with pytest.raises(ValueError, match=r"no component has label 7; expected one of \[0, 1\]"):
        model(x, t, Cond(label=torch.tensor([0, 7, 1, 0, 0])))


def test_samples_have_the_mixtures_moments():
    samples = line(EDM()).sample(200_000, torch.Generator().manual_seed(0))
    mean = 0.2 * -1 + 0.3 * 0.5 + 0.5 * 2
    second = 0.2 * (1 + 0.09) + 0.3 * (0.25 + 0.01) + 0.5 * (4 + 0.36)
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.var().item() == pytest.approx(second - mean**2, rel=0.01)


def test_samples_under_a_condition_are_of_its_class():
    cond = Cond(label=torch.tensor([0, 1]).repeat(20_000))
    samples = line(EDM(), labels=[0, 1, 1]).sample(40_000, torch.Generator().manual_seed(0), cond).reshape(-1, 2)
    mean = (0.3 * 0.5 + 0.5 * 2) / 0.8
    assert samples.mean(0).tolist() == pytest.approx([-1, mean], abs=0.02)
    assert samples.var(0).tolist() == pytest.approx(
        [0.09, (0.3 * (0.25 + 0.01) + 0.5 * (4 + 0.36)) / 0.8 - mean**2], rel=0.03
    )
