"""Students of several steps: their times, what they can reach, how they are sampled elsewhere and with other steps."""

from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image

from distmatch import DistilledPipeline
from distmatch.commands import sample
from distmatch.diffusion.conditions import WHOLE
from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.losses import WEIGHTINGS
from distmatch.diffusion.sampler import SAMPLERS, Steps
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.diffusion.solvers import evaluations, solver
from distmatch.methods.intervals import intervals
from distmatch.methods.terms import Levels, Match, Samples, Start
from distmatch.models.folder import load_model, save_model
from distmatch.models.mixture import mixture
from distmatch.planning.preflight import Flight, checks
from distmatch.planning.rehearsal import evaluated, rehearse
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
    target = cdf(x, schedule.alpha(t), schedule.sigma(t))[:, 0]
    quantiles = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    table = cdf(quantiles[:, None], one, 0 * one)[:, 0]
    above = torch.searchsorted(table, target).clamp(1, len(table) - 1)
    part = (target - table[above - 1]) / (table[above] - table[above - 1])
    return torch.lerp(quantiles[above - 1], quantiles[above], part)[:, None]


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


def test_noise_has_the_level_of_the_first_time():
    """Of EDM it is `sigma = t`, also where that is not the schedule's last; others have one level of noise."""
    seen = []
    for schedule, t in ((EDM(), 2.5), (VP(), 399.0), (Flow(), 0.9)):
        Steps((t,)).sample(lambda x, t, cond: seen.append(x) or x, schedule, torch.ones(1, 1), None)
    assert [x.item() for x in seen] == [2.5, 1, 1]


def test_a_denoiser_in_its_place_does_not_reach_it():
    """A teacher's means are too narrow: few steps need a student that was trained for them."""
    teacher = mixture(Flow(), [[-2.0], [1.0]], [0.5, 0.8], [0.3, 0.7])
    z, noise = normals(2, 150)
    made = Steps.spaced(Flow(), 2).sample(teacher, Flow(), z, None, [noise])
    assert made.var() < 0.5 * (WEIGHTS * (MEANS**2 + STDS**2)).sum() - (WEIGHTS * MEANS).sum() ** 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["student.times=[80, 5]", "student.nfe=2"],
            r"expected times or nfe, not both: \[80.0, 5.0\] and 2; set the other",
        ),
        (["student.shift=3"], "shift 3 is for the times that nfe makes"),
        (["student.shift=3", "student.nfe=1"], "shift 3 .* leaves the first where it is; give nfe above 1"),
        (["student.nfe=9"], "student.nfe"),
        (["student.times=[9, 8, 7, 6, 5, 4, 3, 2, 1]"], "student.times.* at most 8"),
        (["student.times=[5, 80]"], r"expected times: \[high, ..., low\], falling, not \[5.0, 80.0\]"),
        (["student.inputs=data"], "student.inputs=data is for students of several steps"),
        (["student.nfe=4", "terms=[match, regress]"], "anchor the first step to a part of the teacher's trajectory"),
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
    with pytest.raises(ValueError, match="2 steps at 1 time;"):
        load(tmp_path / "few", steps=2, times=[80])
    with pytest.raises(ValueError, match="--times is for students"):
        sample.sample(str(tmp_path / "few"), sample.Options(n=1, out=tmp_path / "o", teacher=True, times=(80.0,)))
    sample.sample(str(tmp_path / "few"), sample.Options(n=2, out=tmp_path / "o", times=(80.0, 20.0, 1.0)))
    assert '"times": [' in (tmp_path / "o" / "sample.json").read_text()


@pytest.mark.parametrize("schedule", [VP(), Flow()], ids=lambda s: type(s).__name__)
def test_sub_intervals_descend_each_steps_divergence_between_its_times(schedule):
    """Data N(0, 1), student N(m, 1), w_t = sigma / alpha: the mean over the step's bins of `sigma / alpha dKL_t/dm`."""
    bins, m = 24, torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    times = tuple(schedule.t_max * part for part in (1.0, 0.6, 0.25))
    real, fake = mixture(schedule, [[0.0]], [1.0]), mixture(schedule, [[0.4]], [1.0])
    term = Match(real, fake, weighting=WEIGHTINGS["dreamfusion"], bins=bins, steps=(1, 23))
    term.spans = intervals(schedule, times, bins, (1, 23))
    levels, (z, eps) = term.levels.double(), normals(2, 30)
    seen = []
    for k, (high, low) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        start = Start(torch.zeros(600, 1), None, 600, torch.Generator().manual_seed(0), noise=(z,) * k)
        drawn = term.draw([start], WHOLE)
        inside = [t for t in levels[1:23].tolist() if low < t <= high]
        assert sorted(set(drawn.t.tolist())) == pytest.approx(inside)
        seen.append(set(drawn.t_fake.tolist()))
        loss, expected = torch.zeros((), dtype=torch.float64), 0.0
        for t in inside:
            at = torch.full((len(z),), t, dtype=torch.float64)
            loss = loss + term.student_loss(Levels(at, eps, at, eps), Samples(m + z, None)) / len(inside)
            alpha, sigma = schedule.alpha(at[:1]), schedule.sigma(at[:1])
            expected += sigma / alpha * alpha**2 * m.detach() / (alpha**2 + sigma**2) / len(inside)
        (gradient,) = torch.autograd.grad(loss, m)
        torch.testing.assert_close(gradient, expected[0], rtol=1e-6, atol=1e-9)
    assert set().union(*seen) == set(term.levels.tolist())  # the fake score knows every level, of one step each
    assert sum(map(len, seen)) == bins


def test_a_recipe_of_intervals_judges_each_step_below_its_time(tmp_path):
    file = recipe(tmp_path, "terms=match", "student.times=[80, 5, 0.5]", "match.intervals=true")
    d = build.distiller(file, subjects.subject(file), None)
    between = [(5, 80), (0.5, 5), (0, 0.5)]
    seen = set()
    for index in range(20):
        part = d.draw(index, WHOLE)
        k, drawn = len(part.starts["noise"].noise), part.drawn["match"]
        seen.add(k)
        for levels in (drawn.t, drawn.t_fake):
            assert between[k][0] < levels.min() <= levels.max() <= between[k][1] * (1 + 1e-6)
    assert seen == {0, 1, 2}


def test_intervals_without_a_level_are_refused_at_the_start(tmp_path):
    file = recipe(tmp_path, "terms=match", "student.times=[80, 79.9, 1]", "match.intervals=true")
    with pytest.raises(ValueError, match=r"no noise level lies between the student's times 80 and 79.9 within bins 20"):
        list(checks(Flight(file, tmp_path / "run", tmp_path)))
    for changes, message in (
        (["match.intervals=true"], "match.intervals is for students of several steps"),
        (["match.pairs=true", "student.nfe=2", "pairs.taken=1"], "match.pairs matches images of one step"),
        (["pairs.taken=1"], "pairs.taken 1 makes pairs for the first of several steps"),
        (["student.nfe=2", "pairs.taken=4"], "pairs.taken 4 of 3 steps of heun: expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(tmp_path, *changes)


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_part_of_a_trajectory_is_the_image_of_one_straight_step_to_it(schedule, name):
    teacher = mixture(schedule, [[-1.0], [1.0]], [0.3, 0.2])
    z, states, evaluated = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], [], []

    def model(x, t, cond):
        evaluated.append(t[0].item())
        return teacher(x, t)

    image = SAMPLERS[name](model, schedule, z, None, 7, callback=lambda i, x, x0: states.append(x))
    evaluated.clear()
    y = solver(name, taken=3)(model, schedule, z, None, 7)
    assert len(evaluated) == evaluations(name, 7, taken=3)
    start, end = (schedule.grid(7)[i].expand(len(z)) for i in (0, 3))
    x = schedule.prior_std * z
    noise = (x - schedule.alpha(start)[:, None] * y) / schedule.sigma(start)[:, None]
    torch.testing.assert_close(schedule.add_noise(y, noise, end), states[2])
    assert not torch.allclose(y, image, atol=0.05)
    assert torch.equal(solver(name, taken=7)(model, schedule, z, None, 7), image)


def test_the_first_step_is_anchored_and_the_others_are_matched(tmp_path):
    file = recipe(
        tmp_path,
        *("student.nfe=3", "terms=match,regress", "pairs.sampler=euler", "pairs.steps=6", "pairs.taken=2"),
        *("regress.weight=0.05", f"pairs.path={tmp_path / 'pairs'}"),
    )
    subject = subjects.subject(file)
    store = build.pair_store(file, subject, tmp_path)
    d = build.distiller(file, subject, store)
    assert store.spec.taken == 2
    pair = d.draw(0, WHOLE).starts["pairs"]
    with torch.no_grad():
        expected = solver("euler", taken=2)(subject.denoiser, subject.denoiser.schedule, pair.z, pair.cond, 6)
    torch.testing.assert_close(pair.y, expected, rtol=1e-4, atol=1e-4)
    parts = [d.draw(index, WHOLE) for index in range(20)]
    assert {len(part.starts["pairs"].noise) for part in parts} == {0}
    assert {len(part.starts["noise"].noise) for part in parts} == {1, 2}
    made, (noise, pairs) = d.generate_all(parts[0].starts), parts[0].starts.values()
    high = d.steps.times[0]
    torch.testing.assert_close(made["pairs"].x, d.student(high * pairs.z, torch.full((4,), high), pairs.cond))
    rolled = Steps(d.steps.times[: len(noise.noise) + 1])
    torch.testing.assert_close(
        made["noise"].x, rolled.sample(d.student, d.student.schedule, noise.z, noise.cond, noise.noise)
    )
    losses = d.step(0)
    assert losses["regress/student"] > 0
    with pytest.raises(ValueError, match=r"one-step students\. With several steps"):
        recipe(tmp_path, "student.nfe=3", "terms=match,regress")


def test_later_steps_start_from_real_images(tmp_path):
    """Noised to the step's time, under the condition of their class; the first step starts from noise alone."""
    greys = {"a": 0, "b": 128, "c": 255}
    for name, grey in greys.items():
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(tmp_path / "images" / "train" / name / "0.png")
    few = ("student.nfe=3", "terms=match", "student.inputs=data", f"real.images={tmp_path / 'images'}")
    file = recipe(tmp_path, *few)
    d = build.distiller(file, subjects.subject(file), None)
    seen = set()
    for index in range(12):
        for turn in range(2):  # of the fake score
            start = d.start(d.objective.streams["noise"], index, turn, WHOLE)
            x, t = d.student_input(start)
            k = len(start.noise)
            seen.add((k, turn))
            assert t.tolist() == pytest.approx([d.steps.times[k]] * 4)
            if k == 0:
                assert torch.equal(x, d.steps.times[0] * start.z)
                continue
            grey = torch.tensor(list(greys.values()))[start.cond.label] / 127.5 - 1
            real = x - d.steps.times[k] * start.noise[k - 1]
            torch.testing.assert_close(real, grey.view(4, 1, 1, 1).expand_as(x), rtol=0, atol=2e-5 * d.steps.times[k])
    assert seen == {(k, turn) for k in range(3) for turn in range(2)}
    first, second = (
        torch.cat([d.start(d.objective.streams["noise"], i, turn, WHOLE).real for i in range(4)]) for turn in (0, 1)
    )
    assert not torch.equal(first, second)  # further updates of the fake score see other images
    assert d.step(0)["match/fake"] > 0
    plans = [
        rehearse(recipe(tmp_path, *changes), tiny.teacher(), tiny.INFO, 1).flops
        for changes in (few, ("student.nfe=1", "terms=match"))
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("updates", [1, 3])
def test_a_plan_counts_the_rollouts(tmp_path, updates):
    """Of three steps, one pass more on average for every batch of fresh images; whichever step is drawn."""
    changes = ("terms=match", f"fake.steps={updates}")
    costs = [
        rehearse(recipe(tmp_path, *changes, *few), tiny.teacher(), tiny.INFO, 1).flops
        for few in (("student.nfe=1",), ("student.nfe=3", "match.intervals=true"))
    ]
    more = costs[1]["student"] - costs[0]["student"]
    assert more == pytest.approx(updates * 4 * evaluated(tiny.teacher(), tiny.INFO)[0])
    assert {name: n for name, n in costs[0].items() if name != "student"} == {
        name: n for name, n in costs[1].items() if name != "student"
    }


def test_a_plan_counts_the_passes_of_guidance_and_of_shared_noise(tmp_path):
    """In passes of the teacher for the images of a step: its own, and two of the guide; the fake score loses one."""
    one = 4 * evaluated(tiny.teacher(), tiny.INFO)[0]
    plain, guided, shared = (
        rehearse(recipe(tmp_path, *changes), tiny.teacher(), tiny.INFO, 1).flops
        for changes in (
            ("terms=match",),
            ("terms=match,guide", "guide.guidance=3"),
            ("terms=match", "match.shared=true"),
        )
    )
    assert (plain["teacher"], guided["teacher"]) == (one, 3 * one)
    assert plain["fake score"] - shared["fake score"] == one
