"""Guidance as a term of its own: what it descends, in closed form, and how it adds up with matching."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from distmatch.commands.shared import guidance_of
from distmatch.diffusion.conditions import WHOLE
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.losses import WEIGHTINGS
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.methods.guide import Guide, Level
from distmatch.methods.terms import Levels, Match, Samples, Start
from distmatch.models.mixture import mixture
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe


def teacher(schedule):
    return mixture(schedule, [[-1.0], [1.5]], [0.6, 0.9], [0.4, 0.6], labels=[0, 1])


def nodes(n):
    """z and eps f64[n^2, 1] whose uniform mean is an integral over two normal distributions."""
    axis = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return [v.reshape(-1, 1) for v in torch.meshgrid(axis, axis, indexing="ij")]


@pytest.mark.parametrize(("schedule", "t"), [(Flow(), 0.3), (Flow(), 0.8), (VP(), 400.0), (EDM(), 1.5)])
def test_it_ascends_the_log_probability_of_the_condition(schedule, t):
    """With w_t = sigma / alpha: `-(w - 1) (sigma / alpha) d/dm E[log p(c | x_t)]` for the student N(m, .7^2)."""
    real, (z, eps) = teacher(schedule), nodes(40)
    cond, at = Cond(label=torch.ones(len(z), dtype=torch.long)), torch.full((len(z),), t, dtype=torch.float64)
    m = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    term = Guide(real, guidance=4.0, weighting=WEIGHTINGS["dreamfusion"], times=(schedule.t_max,))
    loss = term.student_loss(Level(at, eps), Samples(m + 0.7 * z, cond))
    (found,) = torch.autograd.grad(loss, m)
    x_t = schedule.add_noise(m + 0.7 * z, eps, at)
    posterior = (real.log_density(x_t, at, cond) - real.log_density(x_t, at)).mean()
    (slope,) = torch.autograd.grad(posterior, m)
    expected = -3.0 * schedule.sigma(at[:1]) / schedule.alpha(at[:1]) * slope
    torch.testing.assert_close(found, expected[0])
    assert found < 0  # towards class 1


def test_with_matching_at_the_same_level_it_is_guided_matching():
    schedule, (z, eps) = VP(), nodes(8)
    real = teacher(schedule)
    fake = mixture(schedule, [[0.3]], [0.5])
    cond, t = Cond(label=torch.arange(len(z)) % 2), torch.linspace(50, 900, len(z), dtype=torch.float64)
    weighting = WEIGHTINGS["dreamfusion"]

    def gradient(*losses):
        x = (0.3 + 0.5 * z).requires_grad_()
        return torch.autograd.grad(sum(loss(Samples(x, cond)) for loss in losses), x)[0]

    def match(model):
        term = Match(real, lambda x, t, cond: fake(x, t, None), weighting=weighting, real=model)
        return lambda samples: term.student_loss(Levels(t, eps, t, eps), samples)

    guide = Guide(real, guidance=3.0, weighting=weighting, times=(999.0,))
    apart = gradient(match(real), lambda samples: guide.student_loss(Level(t, eps), samples))
    torch.testing.assert_close(apart, gradient(match(guided(real, 3.0))))
    assert not torch.allclose(apart, gradient(match(real)))


def test_its_levels_are_cleaner_than_the_students_input_and_rows_do_not_depend_on_shares():
    schedule = VP()
    term = Guide(
        teacher(schedule),
        guidance=2.0,
        weighting=WEIGHTINGS["algorithm2"],
        times=(999.0, 499.0, 200.0),
        steps=(100, 980),
    )

    def draw(k, share):
        z = torch.zeros(400 // share[1], 1)
        start = Start(z, None, 400, torch.Generator().manual_seed(3), noise=(z,) * k)
        return term.draw([start], share)

    for k, (low, high) in enumerate([(100, 979), (100, 498), (100, 199)]):
        whole = draw(k, WHOLE)
        assert low <= whole.t.min() < low + 20
        assert high - 20 < whole.t.max() <= high
        halves = [draw(k, (part, 2)) for part in (0, 1)]
        assert torch.equal(torch.cat([half.t for half in halves]), whole.t)
        assert torch.equal(torch.cat([half.eps for half in halves]), whole.eps)
    with pytest.raises(ValueError, match=r"guide: no noise level of bins 300 to 979 is cleaner than .* at 200"):
        Guide(teacher(schedule), guidance=2.0, weighting=WEIGHTINGS["eq8"], times=(999.0, 200.0), steps=(300, 980))


def test_a_recipe_takes_its_scale_from_the_entry_or_from_each_sample(tmp_path):
    """The term's loss is the plain formula on the drawn levels; a range of scales takes the place of the entry."""
    for change, w in (("guide.guidance=3", None), ("student.guidance=[1, 4]", "own")):
        folder = tmp_path / change.partition("=")[0]
        folder.mkdir()
        found = load_recipe(str(tiny.recipe_file(folder)), ["terms=match,guide", change])
        subject = subjects.subject(found, (tiny.teacher(), tiny.INFO))
        d = build.distiller(found, subject, None)
        part = d.draw(0, WHOLE)
        samples, drawn = d.generate_all(part.starts)["noise"], part.drawn["guide"]
        cond, real, scale = samples.cond, subject.denoiser, 3.0
        if w == "own":
            scale = cond.extra["guidance"]
        x_t = d.student.schedule.add_noise(samples.x, drawn.eps, drawn.t)
        with torch.no_grad():
            plain, uncond = real(x_t, drawn.t, cond), real(x_t, drawn.t, cond.null())
        factor = (scale - 1) / (samples.x - plain).abs().flatten(1).mean(1)
        expected = 0.5 * ((factor.reshape(-1, 1, 1, 1) * (uncond - plain)) ** 2).mean()
        torch.testing.assert_close(d.terms[1].student_loss(drawn, samples), expected)
        assert d.step(0).keys() >= {"match/student", "guide/student", "match/fake"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["terms=match,guide", "match.guidance=3"], "would guide twice; use match.guidance=1 and guide.guidance=3"),
        (["terms=guide"], "only goes with match"),
        (["terms=match,guide"], "guide.guidance 1 is no guidance"),
        (
            ["terms=match,guide", "guide.guidance=2", "guide.max_step=1200"],
            "guide.max_step 1200: expected at most match.bins, 1000",
        ),
        (["match.rescale=true"], "match.rescale is for a guided real score; with match.guidance 1 it does nothing"),
        (
            ["terms=match,guide", "guide.guidance=2", "match.rescale=true"],
            "match.rescale is for a guided real score, which the term guide replaces",
        ),
        (["guide.min_step=990"], "expected min_step < max_step, not 990, 980"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tiny.recipe_file(tmp_path)), changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["terms=match,guide", "guide.guidance=4"], 4),
        (["terms=match,regress", "match.guidance=3", "pairs.guidance=2"], 3),
        (["terms=regress", "match.guidance=3", "pairs.guidance=2"], 2),
    ],
)
def test_a_students_guidance_is_that_of_its_terms(tmp_path, changes, expected):
    """Where a comparison with its teacher begins."""
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), changes)
    student = SimpleNamespace(info=SimpleNamespace(guidance=None, card={"recipe": recipe.model_dump()}))
    assert guidance_of(student) == expected


@pytest.mark.parametrize("card", [{}, {"recipe": {}}, {"recipe": {"terms": ["regress"], "match": {"guidance": 2.0}}}])
def test_a_students_guidance_is_unknown_if_its_recipe_does_not_say_it(card):
    assert guidance_of(SimpleNamespace(info=SimpleNamespace(guidance=None, card=card))) is None
