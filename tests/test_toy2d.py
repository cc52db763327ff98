"""Figure 3: the outcome of the three objectives, and the integral that measures it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import dblquad

from distmatch.commands import toy2d
from distmatch.commands.toy2d import OBJECTIVES, RealScore, distiller, figure3, kl, panel
from distmatch.data import imaging
from distmatch.diffusion.conditions import WHOLE, Classes
from distmatch.diffusion.losses import WEIGHTINGS
from distmatch.diffusion.schedule import EDM
from distmatch.methods.terms import Match, NoiseStream, Samples
from distmatch.models.folder import Info, load_model
from distmatch.models.mixture import MIXTURES, mixture
from distmatch.pipeline import TeacherPipeline
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.training.train import Plan, train


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    return dict(
        zip(["start", *OBJECTIVES], figure3(load_recipe("toy2d"), tmp_path_factory.mktemp("runs")), strict=True)
    )


def test_the_real_score_alone_collapses_onto_the_nearest_mode(panels):
    only = panels["real score only"]
    assert only.shares[0] == 1
    real = MIXTURES["toy2d"]()
    assert (only.samples.mean(0) - real.means[0]).norm() < 0.1
    assert only.samples.std(0).max() < 0.1 * real.stds[0]


def test_matching_alone_has_the_near_mode_right_and_misses_the_other(panels):
    matched = panels["distribution matching"]
    assert matched.modes == 1
    assert matched.shares[0] > 0.95
    assert matched.shares[1] < 0.01
    # One mode of two, with its true spread: the KL of that is -ln of its weight.
    assert matched.kl == pytest.approx(-math.log(0.75), abs=0.05)


def test_the_full_objective_has_both_modes(panels):
    full = panels["matching and regression"]
    assert full.modes == 2
    assert full.shares == pytest.approx([0.75, 0.25], abs=0.05)
    assert full.kl < 0.7 * panels["distribution matching"].kl < 0.3 * panels["real score only"].kl


def test_the_start_is_the_mean_of_the_data(panels):
    real = MIXTURES["toy2d"]()
    assert (real.log_weights.exp() @ real.means).norm() < 1e-6
    scale = real.prediction.sigma_data
    spread = (real.log_weights.exp() @ (real.means.square().mean(1) + real.stds**2)).sqrt().item()
    assert scale == pytest.approx(spread, rel=0.03)
    # The new network is the exact denoiser of N(0, scale^2 I), which maps sigma_max z to this.
    start, t_max = panels["start"].samples, real.schedule.t_max
    z = torch.randn(len(start), 2, generator=rng.stream("cpu", 0, "figure3"))
    torch.testing.assert_close(start, z * t_max * scale**2 / (scale**2 + t_max**2))


def test_kl_of_one_sample_is_that_of_two_gaussians():
    sigma, variance = 0.25, 0.25**2 + 1.125**2  # exact in binary, as all numbers here
    real = mixture(EDM(), [[0.5, -1.0]], [1.125])
    squared = (2.0 - 0.5) ** 2 + (0.25 + 1.0) ** 2
    expected = math.log(variance / sigma**2) + sigma**2 / variance - 1 + squared / (2 * variance)
    assert kl(torch.tensor([[2.0, 0.25]]), real, sigma) == pytest.approx(expected, rel=1e-9)


def test_kl_of_some_samples_against_scipy():
    sigma, x = 0.5, np.array([[0.0, 0.0], [0.6, -0.2], [-0.3, 0.7]])
    real = mixture(EDM(), [[0.0, 0.5], [1.5, 0.0]], [0.4, 0.9], [1.0, 2.0])

    def normal(point, mean, variance):
        return np.exp(-((point - mean) ** 2).sum(-1) / (2 * variance)) / (2 * np.pi * variance)

    def integrand(b, a):
        point = np.array([a, b])
        fake = normal(point, x, sigma**2).mean()
        means, variances = np.array([[0.0, 0.5], [1.5, 0.0]]), np.array([0.4, 0.9]) ** 2 + sigma**2
        return fake * np.log(fake / (normal(point, means, variances) @ [1 / 3, 2 / 3]))

    expected, _ = dblquad(integrand, -4, 4, -4, 4, epsabs=1e-7)
    assert kl(torch.tensor(x), real, sigma) == pytest.approx(expected, abs=1e-6)


def test_real_samples_have_both_modes_and_next_to_no_kl():
    real = MIXTURES["toy2d"]()
    exact = panel("real", real.sample(4000, torch.Generator().manual_seed(0)), real, 0.0)
    assert exact.modes == 2
    # All of a two-dimensional Gaussian but exp(-9/2) lies within three standard deviations.
    assert exact.shares == pytest.approx([0.75 * (1 - math.exp(-4.5)), 0.25 * (1 - math.exp(-4.5))], abs=0.03)
    assert 0 < exact.kl < 0.02


def test_the_real_score_gradient_is_minus_the_score():
    """Averaged over noise, `x - mu_real` is `-sigma^2 s_real`, with weights that leave the mean alone."""
    real = MIXTURES["toy2d"]()
    match, n = Match(real, real, weighting=WEIGHTINGS["prolificdreamer"]), 200_000
    start = NoiseStream((2,), Classes(0), n).draw(0, 0, 0, WHOLE)
    t = torch.full((n,), 0.8)
    levels = replace(match.draw([start], WHOLE), t=t)
    x = torch.tensor([[0.4, 1.3]]).repeat(n, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(RealScore(match).student_loss(levels, Samples(x, None)), x)
    score = real.score(x.detach() + 0.8 * levels.eps, t)
    # The loss is a mean over elements and its weight is sigma.
    expected = -(0.8**3) * score.mean(0)
    assert gradient.double().mean(0) * x.numel() == pytest.approx(expected, abs=0.01)


def test_the_recipe_trains_and_exports(tmp_path):
    recipe = load_recipe("toy2d", ["steps=20", "pairs.count=200", "log.preview=10"])
    task = distiller(recipe, "matching and regression", tmp_path)
    train(task, tmp_path / "run", Plan(20, log_every=10, preview_every=10))
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 3
    denoiser, info = load_model(tmp_path / "run" / "model")
    x, t = torch.randn(5, 2), torch.full((5,), 0.7)
    torch.testing.assert_close(denoiser(x, t), task.ema.network(x, t))
    assert (info.shape, info.times) == ((2,), (10.0,))


def test_a_teacher_without_weights_needs_a_network_for_the_student():
    recipe = load_recipe("toy2d", ["student.network=null", "terms=match"])
    with pytest.raises(ValueError, match=r"'mixture:toy2d' has no weights .* student.network=\{type: mlp\}"):
        build.distiller(recipe, subjects.subject(recipe), None)
    again = load_recipe("toy2d", ["student.network={type: mlp}", "terms=match"])
    assert build.distiller(again, subjects.subject(again), None).student.prediction.sigma_data == 1.9


def test_points_become_one_picture_with_the_second_axis_up():
    pixels = imaging.picture(torch.tensor([[-5.99, 5.99], [0.01, 0.01], [7.0, 0.0]]))
    assert pixels.shape == (1, 1, 128, 128)
    assert (pixels[0, 0] == 0).nonzero().tolist() == [[0, 0], [63, 64]]


def test_the_demo_writes_the_figure_and_its_numbers(panels, tmp_path, monkeypatch):
    monkeypatch.setattr(toy2d, "figure3", lambda recipe, runs: list(panels.values()))
    toy2d.demo(tmp_path, tmp_path / "runs")
    rows = json.loads((tmp_path / "figure3.json").read_text())["panels"]
    for row, p in zip(rows, panels.values(), strict=False):
        assert (row["name"], row["shares"], row["kl"]) == (p.name, p.shares, p.kl)
    assert min(rows, key=lambda row: row["kl"])["name"] == "real samples"
    # Orange is where the samples are: many dots in (b) and (c), one spot in (a).
    pixels = np.asarray(Image.open(tmp_path / "figure3.png").convert("RGB")).astype(int)
    orange = (pixels[..., 0] - pixels[..., 2]) > 60
    start, a, b, c = (part.sum() for part in np.array_split(orange, 4, axis=1))
    assert a < start < b
    assert a < b / 10 < c / 10 * 2


def test_points_are_not_sampled_as_images():
    real = MIXTURES["toy2d"]()
    with pytest.raises(ValueError, match=r"makes samples of shape \(2,\), not images"):
        TeacherPipeline(real, Info((2,)))(4)
