"""Students of several steps: their times, what they can reach, how they are sampled elsewhere and with other steps."""

from dataclasses import replace

import pytest
import tiny
import torch

from distmatch import DistilledPipeline
from distmatch.commands import sample
from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.models.folder import load_model, save_model
from distmatch.models.mixture import mixture
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe


def recipe(folder, *changes):
    return load_recipe(str(tiny.recipe_file(folder)), changes)


def test_spaced_times_are_dmd2s_edms_and_stable_diffusion_3s():
    stable = VP(0.00085, 0.012, 1000, "scaled_linear")
    assert Steps.spaced(stable, 4).times == (999, 749, 499, 249)
    assert [Steps.spaced(stable, n).times[1:] for n in (1, 2, 3)] == [(), (499,), (666, 333)]
    assert Steps.spaced(EDM(), 3).times == pytest.approx(EDM().grid(4)[:3].tolist(), rel=1e-6)
    assert Steps.spaced(Flow(), 4, 3.0).times == pytest.approx((1, 0.9, 0.75, 0.5), abs=1e-3)
    shifted = Steps.spaced(stable, 4, 3.0).times
    assert shifted == (999, 899, 749, 499)
    levels = IDDPM()
    assert all(levels.nearest(torch.tensor([t])).item() == pytest.approx(t) for t in Steps.spaced(levels, 8).times)


MEANS, STDS, WEIGHTS = (torch.tensor(v, dtype=torch.float64) for v in ([-2.0, 1.0], [0.5, 0.8], [0.3, 0.7]))


def cdf(x, alpha, sigma):
    """Of the data N(-2, .5^2) and N(1, .8^2), 3 to 7, noised to `alpha x0 + sigma eps`."""
    spread = ((alpha[:, None] * STDS) ** 2 + sigma[:, None] ** 2).sqrt()
    return (WEIGHTS * torch.special.ndtr((x - alpha[:, None] * MEANS) / spread)).sum(1, keepdim=True)


def exact_student(x, t, cond):
    """The map of the probability-flow ODE: each quantile at time `t` to the same quantile of the data."""
    schedule = Flow()
    target = cdf(x, schedule.alpha(t), schedule.sigma(t))
    low, high = torch.full_like(x, -8.0), torch.full_like(x, 8.0)
    for _ in range(40):
        middle = (low + high) / 2
        below = cdf(middle, torch.ones_like(t), torch.zeros_like(t)) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def normals(axes, n):
    """`axes` tensors f64[n^axes, 1] whose uniform mean is an integral over as many normal distributions."""
    nodes = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    nodes = nodes / nodes.square().mean().sqrt()
    return [axis.reshape(-1, 1) for axis in torch.meshgrid(*[nodes] * axes, indexing="ij")]


@pytest.mark.parametrize(("steps", "n"), [(1, 2000), (2, 150), (3, 60)])
def test_k_steps_of_an_exact_student_have_the_exact_distribution(steps, n):
    """Nothing of the rollout moves it: neither renoising nor the order of times."""
    z, *noise = normals(steps, n)
    made = Steps.spaced(Flow(), steps, 2.0).sample(exact_student, Flow(), z, None, noise)
    mean = (WEIGHTS * MEANS).sum()
    second = (WEIGHTS * (MEANS**2 + STDS**2)).sum()
    third = (WEIGHTS * (MEANS**3 + 3 * MEANS * STDS**2)).sum()
    found = torch.stack([made.mean(), made.square().mean(), (made**3).mean()])
    torch.testing.assert_close(found, torch.stack([mean, second, third]), rtol=0.02, atol=0.01)
    for x in (-2.5, -1.0, 0.5, 2.0):
        one = torch.ones(1, dtype=torch.float64)
        assert (made <= x).double().mean().item() == pytest.approx(
            cdf(torch.tensor([[x]]), one, 0 * one).item(), abs=0.01
        )


def test_a_denoiser_in_its_place_does_not_reach_it():
    """A teacher's means are too narrow: few steps need a student that was trained for them."""
    teacher = mixture(Flow(), [[-2.0], [1.0]], [0.5, 0.8], [0.3, 0.7])
    z, noise = normals(2, 150)
    made = Steps.spaced(Flow(), 2).sample(teacher, Flow(), z, None, [noise])
    assert made.var() < 0.5 * (WEIGHTS * (MEANS**2 + STDS**2)).sum() - (WEIGHTS * MEANS).sum() ** 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["student.times=[80, 5]", "student.nfe=2"], r"expected times or nfe, not both: \[80.0, 5.0\] and 2"),
        (["student.shift=3"], "shift 3 is for the times that nfe makes"),
        (["student.nfe=9"], "student.nfe"),
        (["student.times=[9, 8, 7, 6, 5, 4, 3, 2, 1]"], "student.times.* at most 8"),
        (["student.times=[5, 80]"], r"expected times: \[high, ..., low\], falling, not \[5.0, 80.0\]"),
        (["student.nfe=4", "terms=[match, regress]"], "regress"),
    ],
)
def test_bad_steps_are_refused_in_the_recipe(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, "terms=match", *changes)


def test_nfe_and_shift_make_the_times_of_the_model_card(tmp_path):
    found = recipe(tmp_path, "terms=match", "student.nfe=2", "student.shift=2")
    subject = subjects.subject(found)
    info = build.student_info(found, subject)
    assert info.times == Steps.spaced(EDM(), 2, 2.0).times
    assert (info.card["recipe"]["student"]["nfe"], info.card["recipe"]["student"]["shift"]) == (2, 2.0)
    save_model(tmp_path / "student", subject.denoiser, info)
    assert load_model(tmp_path / "student")[1].times == info.times


def test_other_steps_than_the_trained_ones_have_to_be_named(tmp_path):
    student = tiny.teacher()
    save_model(tmp_path / "few", student, replace(tiny.INFO, times=(80.0, 5.0)))
    load = DistilledPipeline.from_pretrained
    assert torch.equal(load(tmp_path / "few", steps=2)(3).pixels, load(tmp_path / "few")(3).pixels)
    with pytest.raises(ValueError, match=r"4 steps: this student was trained for 2, at t = 80, 5, .* expect blur"):
        load(tmp_path / "few", steps=4)
    other = load(tmp_path / "few", times=[80, 20, 1])
    z, first, second = torch.randn(3, 2, 1, 8, 8).unbind()
    cond = other.condition(2)
    found = other.sample(z, cond, lambda step: (first, second)[step - 1])
    with torch.no_grad():
        expected = Steps((80.0, 20.0, 1.0)).sample(student, student.schedule, z, cond, [first, second])
    torch.testing.assert_close(found, expected)
    assert other.nfe == 3
    for times, message in (([80, 81], "falling"), ([90, 1], "up to 80; the student was trained at 80, 5")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "few", times=times)
    with pytest.raises(ValueError, match="2 steps at 1 times"):
        load(tmp_path / "few", steps=2, times=[80])
    with pytest.raises(ValueError, match="--times is for students"):
        sample.sample(str(tmp_path / "few"), sample.Options(n=1, out=tmp_path / "o", teacher=True, times=(80.0,)))
    sample.sample(str(tmp_path / "few"), sample.Options(n=2, out=tmp_path / "o", times=(80.0, 20.0, 1.0)))
    assert '"times": [' in (tmp_path / "o" / "sample.json").read_text()
