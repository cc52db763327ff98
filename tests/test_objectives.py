"""Objectives past the paper's: Score identity Distillation in closed form, and how the fake score is trained."""

import numpy as np
import pytest
import tiny
import torch

from distmatch.commands import distillation
from distmatch.diffusion.conditions import WHOLE
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.losses import WEIGHTINGS
from distmatch.diffusion.schedule import Flow
from distmatch.methods.identity import Identity, identity_loss
from distmatch.methods.terms import Levels, Samples
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError

A, SIGMA = 0.8, 0.6
"""Signal and noise at one level."""


@pytest.fixture
def noise():
    """z and eps f64[N] whose uniform mean over N is an integral over two normal distributions."""
    nodes = torch.special.ndtri((torch.arange(300, dtype=torch.float64) + 0.5) / 300)
    nodes = nodes / nodes.square().mean().sqrt()
    return [axis.reshape(-1, 1) for axis in torch.meshgrid(nodes, nodes, indexing="ij")]


def slope(variance):
    """Of the denoiser of `N(0, variance)`: `E[x | x_t] = slope x_t`."""
    return A * variance / (A**2 * variance + SIGMA**2)


def unweighted(x, fake, real, alpha):
    """The loss with weight 1."""
    return identity_loss(x, fake, real, alpha, torch.ones(len(x)).to(x))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_identity_loss_descends_the_fisher_divergence_of_shifted_gaussians(noise, alpha):
    """Data N(0, s^2), student N(m, s^2), fake score exact but frozen: half the gradient of `m^2 (1 - c a)^2`."""
    z, eps = noise
    m, c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), slope(1.5**2)
    x = m + 1.5 * z
    x_t = A * x + SIGMA * eps
    fake = m.detach() + c * (x_t - A * m.detach())
    (gradient,) = torch.autograd.grad(unweighted(x, fake, c * x_t, alpha), m)
    torch.testing.assert_close(gradient, m.detach() * (1 - c * A) ** 2)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_its_alpha_weighs_the_difference_of_the_scores(noise, alpha):
    """Data N(0, 1), student N(0, tau^2): the derivative in tau of `k (c v - a tau^2) - alpha k^2 v`, k and c frozen."""
    z, eps = noise
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    real, fake = slope(1.0), slope(0.25)
    x = tau * z
    x_t = A * x + SIGMA * eps
    (gradient,) = torch.autograd.grad(unweighted(x, fake * x_t, real * x_t, alpha), tau)
    k = real - fake
    expected = k * (real * 2 * A**2 * 0.5 - 2 * A * 0.5) - alpha * k**2 * 2 * A**2 * 0.5
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_it_is_weighted_by_the_distance_of_sample_and_real_score_or_as_it_is_told(weighting):
    """The weight is a constant in the gradient. With `eq8` it has a factor alpha, which is `1 - t` for flows."""
    schedule, t = Flow(), torch.tensor([0.3, 0.8])
    x, eps, f, r = (torch.randn(2, 3, 4, 4, requires_grad=i == 0) for i in range(4))
    identity = Identity(tiny.teacher(), tiny.teacher(), 1.2, weighting=WEIGHTINGS[weighting])
    identity.schedule, identity.fake, identity.real = schedule, lambda *_: f, lambda *_: r
    found = identity.student_loss(Levels(t, eps, t, eps), Samples(x, None))
    distances = [(y - one).abs().mean().item() for y, one in zip(x, r, strict=True)]
    factors = {
        "algorithm2": [1 / distance for distance in distances],
        "eq8": [(1 - time) / distance for time, distance in zip(t.tolist(), distances, strict=True)],
        "dreamfusion": [0.7 / 0.3, 0.2 / 0.8],
        "prolificdreamer": [0.7 * 0.3, 0.2 * 0.8],
    }[weighting]
    each = [
        factor * ((b - a) * ((b - y) - 1.2 * (b - a))).mean() for factor, y, a, b in zip(factors, x, f, r, strict=True)
    ]
    expected = torch.stack(each).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))


def test_a_rescaled_guidance_keeps_the_direction_and_takes_the_conditional_norm():
    denoiser = tiny.teacher()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    cond = Cond(label=torch.tensor([0, 1, 2]))
    with torch.no_grad():
        plain, usual = denoiser(x, t, cond).flatten(1), guided(denoiser, 4.0)(x, t, cond).flatten(1)
        found = guided(denoiser, 4.0, rescale=True)(x, t, cond).flatten(1)
    torch.testing.assert_close(found.norm(dim=1), plain.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(found, usual), torch.ones(3))
    assert (usual.norm(dim=1) / plain.norm(dim=1) - 1).abs().min() > 1e-3


def distiller(folder, *changes):
    file = str(tiny.recipe_file(folder))
    recipe = load_recipe(file, ["terms=match", "fake.optimizer.warmup=0", "student.optimizer.warmup=0", *changes])
    return build.distiller(recipe, subjects.subject(recipe), None)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


@pytest.mark.parametrize(("rescale", "alike"), [("true", True), ("false", False)])
def test_a_recipe_rescales_its_real_score_if_asked(tmp_path, rescale, alike):
    d = distiller(tmp_path, "match.guidance=4", f"match.rescale={rescale}")
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), Cond(label=torch.tensor([0, 1, 2]))
    with torch.no_grad():
        found, plain = (one(x, t, cond).flatten(1).norm(dim=1) for one in (d.terms[0].real, d.terms[0].teacher))
    assert torch.allclose(found, plain, rtol=1e-4) == alike


def test_weights_and_levels_of_a_recipe_reach_the_terms(tmp_path):
    d = distiller(
        tmp_path,
        *("terms=match,guide", "match.bins=100", "match.weight=0.3", "match.min_step=10", "match.max_step=30"),
        *("guide.guidance=3", "guide.weight=0.7", "guide.min_step=40", "guide.max_step=60"),
    )
    assert [(term.name, term.weight) for term in d.terms] == [("match", 0.3), ("guide", 0.7)]
    levels = d.student.schedule.grid(100).flip(0).float()
    drawn = [d.draw(index, WHOLE).drawn for index in range(100)]
    for name, (low, high) in {"match": (10, 30), "guide": (40, 60)}.items():
        assert set(torch.cat([one[name].t for one in drawn]).tolist()) == set(levels[low:high].tolist())
    assert len(torch.cat([one["match"].t_fake for one in drawn]).unique()) > 90  # of 400: all levels
    part = d.draw(0, WHOLE)
    samples = d.generate_all(part.starts)["noise"]
    total = sum(term.weight * term.student_loss(part.drawn[term.name], samples) for term in d.terms)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(d.student.parameters()))])
    torch.testing.assert_close(d.update_student(0, [part])[1]["gradient_norm"], expected.norm())


def test_the_fake_score_is_drawn_to_the_student(tmp_path):
    d = distiller(tmp_path, "fake.ida=0.25")
    d.step(0)
    fake = weights(d.fake)
    d.update_student(1, [d.draw(1, WHOLE)])
    torch.testing.assert_close(weights(d.fake), 0.75 * fake + 0.25 * weights(d.student))
    assert not torch.equal(weights(d.fake), fake)


def test_the_fake_score_is_trained_alone_first(tmp_path):
    d, plain = distiller(tmp_path, "fake.alone=2"), distiller(tmp_path)
    first, fake = weights(d.student), weights(d.fake)
    seen = [d.step(0), d.step(1)]
    assert torch.equal(weights(d.student), first)
    assert not torch.equal(weights(d.fake), fake)
    assert {k: v.item() for k, v in seen[0].items()} == {k: v.item() for k, v in plain.step(0).items()}
    assert seen[1]["gradient_norm"] > 0  # said, but not followed
    assert [d.optimizer.rate(index) for index in range(3)] == [0, 0, d.optimizer.lr]
    d.step(2)
    assert not torch.equal(weights(d.student), first)


def test_the_fake_score_is_not_drawn_to_a_student_that_waits(tmp_path):
    d, plain = distiller(tmp_path, "fake.alone=2", "fake.ida=0.25"), distiller(tmp_path, "fake.alone=2")
    for index in range(2):
        d.step(index)
        plain.step(index)
        assert torch.equal(weights(d.fake), weights(plain.fake))
    d.step(2)
    plain.step(2)
    assert not torch.equal(weights(d.fake), weights(plain.fake))


def test_the_student_does_not_wait_for_a_fake_score_that_no_term_trains(tmp_path):
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), ["terms=regress", "fake.alone=2"])
    subject = subjects.subject(recipe)
    d = build.distiller(recipe, subject, build.pair_store(recipe, subject, tmp_path))
    assert d.optimizer.rate(0) > 0


def test_a_run_that_would_train_only_the_fake_score_is_refused(tmp_path):
    file = str(tiny.recipe_file(tmp_path, steps=12))
    assert load_recipe(file, ["fake.alone=11"]).fake.alone == 11
    with pytest.raises(UserError, match=r"fake\.alone 12: all 12 steps would train only the fake score"):
        load_recipe(file, ["fake.alone=12"])


def test_sid_sends_the_students_gradient_through_both_scores(tmp_path):
    """One update written out, on networks with weights everywhere; the fake score's own gradient starts from none."""
    d = distiller(tmp_path, "match.sid=1.2", "student.optimizer.clip=0", "fake.optimizer.clip=0")
    d.step(0)  # after which the fake score is no longer the teacher
    part, term = d.draw(1, WHOLE), d.terms[0]
    start, drawn = part.starts["noise"], part.drawn["match"]
    x = d.generate_all(part.starts)["noise"].x
    x_t = d.student.schedule.add_noise(x, drawn.eps, drawn.t)
    fake, real = d.fake(x_t, drawn.t, start.cond), term.teacher(x_t, drawn.t, start.cond)
    loss = identity_loss(x, fake, real, 1.2, 1 / (x - real).abs().flatten(1).mean(1).detach())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(d.student.parameters()))]).norm()
    _, found = d.update_student(1, [part])
    torch.testing.assert_close(found["gradient_norm"], expected)
    torch.testing.assert_close(found["match/student"], loss.detach())
    assert all(p.grad is None for p in d.fake.parameters())


@pytest.mark.parametrize("updates", [1, 3])
def test_shared_noise_is_algorithm_1_with_equal_levels_in_fewer_passes(tmp_path, updates):
    """Bit for bit, where Algorithm 1 is given the student's time and noise for the first update of the fake score."""
    changes = (f"fake.steps={updates}", "match.min_step=0", "match.max_step=1000")
    shared, plain = distiller(tmp_path, "match.shared=true", *changes), distiller(tmp_path, *changes)
    draw, passes = plain.terms[0].draw, []
    plain.terms[0].draw = lambda *given: equal_levels(draw(*given))
    shared.fake.register_forward_hook(lambda *_: passes.append("shared"))
    plain.fake.register_forward_hook(lambda *_: passes.append("plain"))
    for index in range(3):
        losses, expected = shared.step(index), plain.step(index)
        assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert torch.equal(weights(shared.student), weights(plain.student))
    assert torch.equal(weights(shared.fake), weights(plain.fake))
    assert (passes.count("shared"), passes.count("plain")) == (3 * updates, 3 * (1 + updates))


def equal_levels(drawn):
    return Levels(drawn.t, drawn.eps, drawn.t, drawn.eps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["match.sid=1.2"], "shared sends no gradient through the fake score, sid=1.2 does"),
        (["fake.ida=0.03"], "fake.ida 0.03 moves the fake score between the two losses"),
    ],
)
def test_shared_noise_does_not_go_with_what_changes_the_fake_score(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distiller(tmp_path, "match.shared=true", *changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fake: fake.requires_grad_(False), "needs a fake score that is trained; this one is frozen"),
        (
            lambda fake: fake.to(torch.float8_e4m3fn),
            "the fake score, whose weight .* is float8_e4m3fn: quantised",
        ),
    ],
)
def test_sid_refuses_a_frozen_or_quantised_fake_score(change, message):
    teacher = tiny.teacher()
    with pytest.raises(ValueError, match=message):
        Identity(teacher, change(tiny.teacher()), 1.2, weighting=WEIGHTINGS["algorithm2"])


@pytest.mark.parametrize(("varied", "said"), [(0.02, True), (0.5, False)])
def test_a_student_whose_images_are_alike_is_named_at_the_end(tmp_path, monkeypatch, recwarn, varied, said):
    """Without regression a slow fake score can drive it to one image, with losses that tell nothing."""
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    monkeypatch.setattr(distillation, "side_by_side", lambda *_: (picture, varied))
    found = load_recipe(str(tiny.recipe_file(tmp_path)), ["terms=match", "steps=1"])
    distillation.distil(found, tmp_path / "run", tmp_path)
    told = [
        str(one.message) for one in recwarn if "nearly alike: they differ from one another by 2% of" in str(one.message)
    ]
    assert bool(told) == said
