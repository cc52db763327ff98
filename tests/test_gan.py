"""The GAN on noised images: what its head learns, whom it teaches, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from distmatch.commands.distillation import distil
from distmatch.data.reals import Reals
from distmatch.diffusion.conditions import WHOLE, Classes
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import EDM, Flow
from distmatch.methods.adversarial import Adversarial, Settings
from distmatch.methods.divergence import FACTORS
from distmatch.methods.heads import Head
from distmatch.methods.terms import Levels, Match, NoiseStream, Samples
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import save_model
from distmatch.models.mixture import mixture
from distmatch.models.mlp import MLP
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.system.terminal import Notice
from distmatch.training.engine import blocks, compile_blocks
from distmatch.training.optim import Optimizer

SCHEDULE = EDM(sigma_min=0.05, sigma_max=3.0)
DATA = mixture(SCHEDULE, [[1.0], [-1.5]], [0.5, 0.3], [2.0, 1.0])
STUDENT = mixture(SCHEDULE, [[0.3]], [1.2])


def adversarial(judge=None, **settings):
    """A small network for points, and a head on its features, against real samples of `DATA`."""
    torch.manual_seed(0)
    judge = judge or Denoiser(MLP(dim=1, width=32, depth=2), SCHEDULE, DATA.prediction)
    sample = DATA.sample(20_000, torch.Generator().manual_seed(1)).float()
    return judge, Adversarial(
        judge,
        Reals([torch.arange(len(sample))], lambda numbers: sample[numbers]),
        Settings(**{"head_weight": 1.0, "blocks": [0, 1], **settings}),
        example=(torch.zeros(1, 1), torch.ones(1), None),
        optimizer=lambda network: Optimizer(network.parameters(), lr=5e-3, weight_decay=0.0),
    )


def teach(judge, gan, steps=200, batch=1024):
    """Train head and features against `STUDENT`, which stays as it is."""
    stream = NoiseStream((1,), Classes(0), batch)
    optimizers = [Optimizer(judge.parameters(), lr=5e-3, weight_decay=0.0), gan.trained["head"].optimizer]
    for index in range(steps):
        x = STUDENT.sample(batch, torch.Generator().manual_seed(index + 10)).float()
        drawn = gan.draw([stream.draw(0, index, 0, WHOLE)], WHOLE)
        gan.fake_loss(drawn, Samples(x, None)).backward()
        for one in optimizers:
            one.lr = 5e-3 * (1 - index / steps)
            one.step(index)


@pytest.fixture(scope="module")
def taught():
    judge, gan = adversarial(divergence="forward_kl")
    teach(judge, gan)
    return gan


@pytest.mark.parametrize("t", [0.3, 1.0, 2.0])
def test_the_logit_becomes_the_log_density_ratio(taught, t):
    generator = torch.Generator().manual_seed(7)
    x_t = STUDENT.sample(4000, generator).float() + t * torch.randn(4000, 1, generator=generator)
    at = torch.full((4000,), t)
    expected = (DATA.log_density(x_t, at) - STUDENT.log_density(x_t, at)).float()
    with torch.no_grad():
        error = taught.logits(x_t, at, None) - expected
    assert error.abs().mean() < 0.12
    if t < 2:  # where the distributions differ
        assert expected.abs().mean() > 0.16


# On images


def real_folder(folder, classes=("a", "b", "c"), shape=(8, 8), each=5):
    """Pictures of noise, a folder per class; all of class number k have the brightness k in their first pixel."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(each + number):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(folder / "train" / name / f"{i}.png")
    return folder


def recipe(folder, *changes, **entries):
    if not (folder / "real").exists():
        real_folder(folder / "real")
    given = [f"real.images={folder / 'real'}", "terms=match,gan", "gan.weight=0.1", *changes]
    return load_recipe(str(tiny.recipe_file(folder, **entries)), given)


def distiller(folder, *changes):
    found = recipe(folder, *changes)
    return build.distiller(found, subjects.subject(found), None)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def test_real_images_come_with_their_class_each_as_often(tmp_path):
    real = subjects.subject(recipe(tmp_path)).real
    x, cond = real.draw(3000, torch.Generator().manual_seed(0), WHOLE)
    pixels = ((x + 1) * 127.5).round().long()
    assert torch.equal(pixels[:, 0, 0, 0], cond.label)
    assert ((cond.label.bincount() / 1000 - 1).abs() < 0.1).all()
    assert len(pixels.unique(dim=0)) == 5 + 6 + 7
    halves = [real.draw(3000, torch.Generator().manual_seed(0), (part, 2)) for part in (0, 1)]
    assert torch.equal(torch.cat([half for half, _ in halves]), x)
    assert torch.equal(torch.cat([half.label for _, half in halves]), cond.label)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gradients_go_where_they_must_and_nowhere_else(tmp_path, features):
    d = distiller(tmp_path, f"gan.features={features}", "match.weight=0", "gan.r1=1")
    gan = d.terms[1]
    before = {name: weights(one) for name, one in (("student", d.student), ("fake", d.fake), ("head", gan.head))}
    part = d.draw(0, WHOLE)
    images, _ = d.update_student(0, [part])
    assert not torch.equal(weights(d.student), before["student"])
    for network, name in ((d.fake, "fake"), (gan.head, "head")):
        assert torch.equal(weights(network), before[name])
        assert all(p.grad is None for p in network.parameters())
    student = weights(d.student)
    loss = gan.fake_loss(part.drawn["gan"], images[0]["noise"])
    loss.backward()
    assert all(p.grad.any() for p in gan.head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in d.fake.parameters()) == (features == "fake")
    assert all(p.grad is None for p in [*d.student.parameters(), *d.terms[0].teacher.parameters()])
    assert torch.equal(weights(d.student), student)
    d.step(1)
    assert not torch.equal(weights(gan.head), before["head"])


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_adapters_get_the_gradients_of_whole_networks_and_the_shared_weights_get_none(tmp_path, features):
    """Updates begin at zero, `up` being zero: its gradient is that of the weight times `down`, and `down` has none."""
    found = []
    for adapters in ([], ["student.adapter.rank=3", "fake.adapter.rank=3"]):
        d = distiller(tmp_path, f"gan.features={features}", "gan.r1=1", *adapters)
        gan, part = d.terms[1], d.draw(0, WHOLE)
        samples = d.generate_all(part.starts)["noise"]
        gan.student_loss(part.drawn["gan"], samples).backward()
        assert (next(iter(d.fake.parameters())).grad is not None) == (features == "fake")
        for network in (d.fake, gan.head):
            network.zero_grad()
        gan.fake_loss(part.drawn["gan"], samples.detach()).backward()
        found.append((d, gan.head))
    (whole, head), (low, other) = found
    for a, b in zip(head.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    base = low.student.base
    assert base is low.fake.base is low.terms[0].teacher
    assert all(p.grad is None for p in base.parameters())
    seen = 0
    for role in ("student", "fake") if features == "fake" else ("student",):
        layers = dict(getattr(whole, role).net.named_modules())
        for name, one in getattr(low, role).adapter.layers.items():
            gradient = layers[name.replace("/", ".")].weight.grad
            if gradient is None:  # behind the features
                assert one.up.weight.grad is None
                continue
            expected = one.scale * gradient.flatten(1) @ one.down.weight.flatten(1).T
            torch.testing.assert_close(one.up.weight.grad.flatten(1), expected, rtol=1e-4, atol=1e-7)
            assert not one.down.weight.grad.any()
            seen += gradient.any().item()
    assert seen > 5
    if features == "teacher":
        assert all(p.grad is None for p in low.fake.parameters())


def test_the_logit_is_the_mean_over_the_blocks():
    head = Head([(3,), (5, 4), (2, 8, 8)])
    found = [torch.randn(6, 3), torch.randn(6, 5, 4), torch.randn(6, 2, 8, 8)]
    expected = sum(part(one) for part, one in zip(head.parts, found, strict=True)) / 3
    torch.testing.assert_close(head(found), expected)
    assert expected.shape == (6,)


def test_only_the_blocks_that_the_head_reads_are_not_compiled():
    """The backend only traces: to generate code takes a minute."""
    x, t = torch.randn(4, 1), torch.full((4,), 0.5)
    found = []
    for compiled in (False, True):
        judge, gan = adversarial(blocks=[1])
        if compiled:
            compile_blocks(judge, backend="eager")  # before the head is made: a stage may be the first to have one
            judge(x, t, None)
            judge, gan = adversarial(blocks=[1], judge=judge)
            assert [one._compiled_call_impl is None for one in blocks(judge)] == [False, False]
        gan.logits(x, t, None).sum().backward()
        found.append([p.grad for p in judge.parameters() if p.grad is not None])
        assert len(found[0]) > 4
    assert [one._compiled_call_impl is None for one in blocks(judge)] == [False, True]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("flow", [False, True])  # where the image is scaled down as it is noised
def test_its_losses_are_softplus_of_the_logits(tmp_path, flow):
    d = distiller(tmp_path, "gan.r1=3", "gan.r1_noise=0.5", "gan.head_weight=0.7")
    gan, part = d.terms[1], d.draw(0, WHOLE)
    drawn, samples = part.drawn["gan"], d.generate(part.starts["noise"])
    if flow:
        gan.schedule = Flow()
        drawn = replace(drawn, t=drawn.t / 100, t_head=drawn.t_head / 100)
    add_noise = gan.schedule.add_noise
    with torch.no_grad():
        student = gan.logits(add_noise(samples.x, drawn.eps, drawn.t), drawn.t, samples.cond)
        torch.testing.assert_close(gan.student_loss(drawn, samples), (1 + (-student).exp()).log().mean())
        fake = gan.logits(add_noise(samples.x, drawn.eps_head, drawn.t_head), drawn.t_head, samples.cond)
        x, cond = drawn.real.x, drawn.real.cond
        real, moved = (
            gan.logits(add_noise(y, drawn.eps_real, drawn.t_head), drawn.t_head, cond)
            for y in (x, x + 0.5 * drawn.shift)
        )
        expected = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean() + 3 * (real - moved).square().mean()
        torch.testing.assert_close(gan.fake_loss(drawn, samples), 0.7 * expected)
    assert (real - moved).abs().max() > 1e-4


def test_rates_of_fake_score_and_head_are_counted_over_all_their_updates(tmp_path):
    """Three in each of 12 steps, of which the last half decays."""
    d = distiller(tmp_path, "fake.steps=3", "fake.optimizer.decay=0.5", "fake.optimizer.warmup=0")
    seen = {id(own): [] for own in d.fake_optimizers}
    assert len(seen) == 2
    for own in d.fake_optimizers:
        assert [own.rate(update) / own.lr for update in (0, 18, 27, 35)] == pytest.approx([1, 1, 0.5, 1 / 18])
        own.step = lambda update, own=own, step=own.step: seen[id(own)].append(update) or step(update)
    d.step(0)
    d.step(5)
    assert list(seen.values()) == [[0, 1, 2, 15, 16, 17]] * 2


def test_real_images_are_judged_under_the_scales_of_the_students(tmp_path):
    """A fake score that takes a guidance scale needs one for real images, which have none."""
    d = distiller(tmp_path, "student.guidance=[1,4]")
    part = d.draw(0, WHOLE)
    scales = part.starts["noise"].cond.extra["guidance"]
    assert torch.equal(part.drawn["gan"].real.cond.extra["guidance"], scales)
    assert (scales > 1).all()
    assert d.step(0)["gan/student"] > 0


def test_it_judges_at_the_levels_that_a_recipe_names(tmp_path):
    d = distiller(
        tmp_path, "match.bins=100", "match.min_step=1", "match.max_step=99", "gan.min_step=40", "gan.max_step=60"
    )
    levels = set(d.student.schedule.grid(100).flip(0).float()[40:60].tolist())
    drawn = [d.draw(index, WHOLE).drawn["gan"] for index in range(100)]
    assert set(torch.cat([one.t for one in drawn]).tolist()) == levels
    assert set(torch.cat([one.t_head for one in drawn]).tolist()) == levels


HOW = ("gan.balance=0.5", "match.divergence=js", "gan.r1=1")


@pytest.mark.parametrize("changes", [["accumulate=2"], ["workers=2"]])
def test_a_batch_may_be_shared_in_any_way(tmp_path, changes):
    one, other = distiller(tmp_path, *HOW, "workers=1"), distiller(tmp_path, *HOW, "workers=1", *changes)
    for index in range(3):
        losses = [{name: value.item() for name, value in d.step(index).items()} for d in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    gans = [d.terms[1] for d in (one, other)]
    for seen in ([gan.balance.sums[0] for gan in gans], [gan.factors.sums for gan in gans]):
        torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-9)
        assert seen[0].any()
    torch.testing.assert_close(*(gan.balance.scale() for gan in gans), rtol=1e-3, atol=0)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    one = recipe(tmp_path, *HOW, steps=4, checkpoint={"every": 2})
    distil(one, tmp_path / "whole", tmp_path)
    with tiny.stopped_before(3):
        distil(one, tmp_path / "parts", tmp_path)
    distil(one, tmp_path / "parts", tmp_path)
    folders = [tmp_path / run / "checkpoints" / "step-00000004" for run in ("whole", "parts")]
    tensors = [{k: v for f in sorted(run.glob("*.safetensors")) for k, v in load_file(f).items()} for run in folders]
    assert {"gan.head/averages.balance.sums", "gan.head/averages.factors.sums"} <= tensors[0].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_the_balance_keeps_the_ratio_of_the_gradients(tmp_path):
    """Of the batch's gradients at its images, measured one by one here."""
    d = distiller(tmp_path, "gan.balance=0.5", "fake.optimizer.lr=1e-3")
    for index in range(3):
        d.step(index)
    balance, part = d.terms[1].balance, d.draw(3, WHOLE)
    made = d.generate(part.starts["noise"])
    x = made.x.requires_grad_()

    def gradient(term, samples):
        return torch.autograd.grad(term.weight * term.student_loss(part.drawn[term.name], samples), x)[0]

    alone = [gradient(term, made) for term in d.terms]
    seen = [gradient(term, Samples(balance.seen(term.name, x), made.cond)) for term in d.terms]
    torch.testing.assert_close(seen, [alone[0], balance.scale() * alone[1]])
    assert not torch.allclose(seen[1], alone[1])
    before = balance.sums.clone()
    balance.settle()
    squares = torch.stack([one.square().sum() for one in alone])
    torch.testing.assert_close(balance.sums[0], 0.99 * before[0] + squares)
    match, gan = balance.means()
    torch.testing.assert_close(balance.scale() * (gan / match).sqrt(), torch.tensor(0.5))


def test_a_balance_forgets_no_gradient_while_a_term_is_off(tmp_path):
    """Nor takes it for small: that would let the GAN begin with many times its share."""
    d = distiller(tmp_path, "gan.balance=0.5")
    gan, balance = d.terms[1], d.terms[1].balance
    gan.weight = 0.0
    for index in range(3):
        d.step(index)
    assert balance.scale() == 1
    gan.weight = 0.1
    d.step(3)
    assert balance.scale() == pytest.approx(0.5 * (balance.means()[0] / balance.means()[1]).sqrt().item())
    assert balance.sums[1, 1] == 1
    d.terms[0].weight, before = 0.0, balance.means()[0].item()
    d.step(4)
    assert balance.means()[0].item() == pytest.approx(before)


# Latents


def test_latents_are_the_encoders_and_are_encoded_once(tmp_path, monkeypatch):
    """Samples of the encoder's distribution, scaled like the teacher's; captions are their conditions."""
    source = write_tiny_sd(tmp_path / "sd")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        (tmp_path / "real" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / "train" / f"{number}.png")
        (tmp_path / "real" / "train" / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    entries = [f"prompts.path={tmp_path / 'prompts.txt'}", f"teacher=diffusers:{source}"]
    direct = subjects.subject(recipe(tmp_path, *entries)).real
    cache = f"real.cache={tmp_path / 'latents'}"
    cached = subjects.subject(recipe(tmp_path, *entries, cache)).real
    (x, cond), (again, _) = (one.draw(4, torch.Generator().manual_seed(0), WHOLE) for one in (direct, cached))
    torch.testing.assert_close(again, x, atol=2e-3, rtol=2e-3)  # kept in half precision
    assert (x.shape, cond.text.shape) == ((4, 4, 8, 8), (4, 77, 32))
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae")
    with torch.no_grad():
        normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = vae.encode(normalised).latent_dist
        expected = 0.18215 * (found.mean + found.std * rng.noise(0, range(3), (4, 8, 8)))
    numbers = [min(range(3), key=lambda i: (row - expected[i]).abs().sum().item()) for row in x]
    torch.testing.assert_close(x, expected[numbers], atol=1e-4, rtol=1e-3)
    texts = tiny.text_encoder(str(source))([f"picture {i}" for i in numbers]).text
    torch.testing.assert_close(cond.text, texts)

    def fails(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr("distmatch.models.diffusers.autoencoder.ImageEncoder.__call__", fails)
    with pytest.warns(Notice, match=r"real.classes is not used: the teacher .* has prompts, and no classes"):
        subjects.subject(recipe(tmp_path, *entries, cache, "real.classes=number"))
    third = subjects.subject(recipe(tmp_path, *entries, cache)).real
    assert torch.equal(third.draw(4, torch.Generator().manual_seed(0), WHOLE)[0], again)
    with pytest.raises(ValueError, match=r"has no captions, which the teacher needs as prompts"):
        subjects.subject(recipe(tmp_path, *entries, f"real.images={real_folder(tmp_path / 'bare')}"))


# Divergences


DIVERGENCES = {  # f(r) of E_student[f(r)], with the factor by which h is f''(r) r^2
    "reverse_kl": (lambda r: -r.log(), 1.0),
    "forward_kl": (lambda r: r * r.log(), 1.0),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1.0),
    "softened_rkl": (lambda r: (r + 1) * ((r + 1) / (2 * r)).log(), 1.0),
    "hellinger": (lambda r: (1 - r.sqrt()) / 2, 0.5 / 4),
    "jeffreys": (lambda r: (r - 1) * r.log(), 1.0),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_matching_descends_the_divergence_that_it_claims(name):
    """At one noise level, by quadrature: the student is N(m, 1), its scores and its ratios are exact."""
    f, constant = DIVERGENCES[name]
    t, m = torch.tensor(0.8, dtype=torch.float64), 0.4
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)

    def densities(mean):
        """log densities of the noised teacher and student on the grid."""
        normal = torch.distributions.Normal(mean, (1 + t**2).sqrt())
        return DATA.log_density(grid[:, None], t.expand(len(grid))), normal.log_prob(grid)

    def divergence(mean):
        teacher, student = densities(mean)
        return torch.trapezoid(student.exp() * f((teacher - student).exp()), grid)

    mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(divergence(mean), mean)

    nodes = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    z, eps = (axis.reshape(-1, 1) for axis in torch.meshgrid(nodes, nodes, indexing="ij"))
    student = mixture(SCHEDULE, [[m]], [1.0])

    def ratios(x_t, level, cond):
        r = (DATA.log_density(x_t, level) - student.log_density(x_t, level)).exp()
        return FACTORS[name](r)

    match = Match(DATA, student, weighting=lambda x, x0, alpha, sigma: torch.ones_like(alpha) / t**2)
    if name != "reverse_kl":
        match.factor = ratios
    levels = t.expand(len(z))
    x = (mean + z).float()
    loss = match.student_loss(Levels(levels, eps.float(), levels, eps.float()), Samples(x, None))
    (found,) = torch.autograd.grad(loss, mean)
    assert found * constant == pytest.approx(expected.item(), rel=0.02)


def test_the_factors_have_mean_one_in_each_range_of_levels(taught):
    """And are those of the clipped ratio that the head estimates."""
    generator = torch.Generator().manual_seed(3)
    levels = taught.levels[torch.arange(50, 1000, 100)]  # one in each tenth of the grid
    assert taught._bin(levels).tolist() == list(range(len(levels)))
    for number, level in enumerate(levels):
        t = level.expand(4000)
        x_t = STUDENT.sample(4000, generator).float() + t[:, None] * torch.randn(4000, 1, generator=generator)
        factor = taught.factor(x_t, t, None)
        with torch.no_grad():
            ratio = taught.logits(x_t, t, None).exp().clamp(0.1, 20)
        torch.testing.assert_close(factor, ratio / taught.factors.means()[number])
        assert factor.mean() == pytest.approx(1, abs=0.1)


def test_a_recipe_of_another_divergence_weighs_its_matching_in_every_stage(tmp_path):
    stages = json.dumps([{"until": 2}, {"until": 4, "change": {"match.min_step": 30}}])
    found = recipe(tmp_path, "match.divergence=forward_kl", "steps=4", f"stages={stages}")
    subject = subjects.subject(found)
    d = build.distiller(found.parts[0], subject, None)
    d.step(0)
    d.step(1)
    build.enter(d, found.parts[1], subject, None)
    match, gan = d.terms
    part = d.draw(2, WHOLE)
    drawn, samples = part.drawn["match"], d.generate(part.starts["noise"])
    t, cond = drawn.t, samples.cond
    with torch.no_grad():
        x_t = d.student.schedule.add_noise(samples.x, drawn.eps, t)
        fake, real = d.fake(x_t, t, cond), subject.denoiser(x_t, t, cond)
        factor = gan.logits(x_t, t, cond).exp().clamp(0.1, 20) / gan.factors.means()[gan._bin(t)]
        w = factor / (samples.x - real).abs().flatten(1).mean(1)
        expected = 0.5 * (w[:, None, None, None] * (fake - real)).square().mean()
        torch.testing.assert_close(match.student_loss(drawn, samples), expected)
    assert (factor - 1).abs().max() > 1e-3


# What cannot work


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["real.images=null", "teacher=nobody"], r"the term gan needs real images, .* name a folder"),
        (["real.images=none.zip", "teacher=nobody"], r"real.images none.zip does not exist; expected a folder or an"),
        (["gan.blocks=[1, 12]"], r"gan.blocks is \[1, 12\]; the fake score has 7 blocks, numbered 0 to 6: .*12"),
        (["gan.blocks=[1, 1]"], r"a block is named twice"),
        (["terms=gan"], r"the term gan goes with match"),
        (["terms=match", "match.divergence=js"], r"match.divergence js needs the term gan"),
        (["match.divergence=js", "match.sid=1.2"], r"match.divergence js is for Algorithm 2"),
        (["match.divergence=js", "gan.min_step=100"], r"head at all levels of match, bins 20 to 980; gan has"),
        (["gan.min_step=900", "gan.max_step=900"], r"expected gan.min_step < gan.max_step <= match.bins"),
        (['stages=[{until: 12, change: {terms: [match]}}]'], r"stage 1 has the terms \[\] in addition .* weight of 0"),
        (['stages=[{until: 12, change: {"match.divergence": js}}]'], r"stage 1 changes 'match.divergence'"),
        (['stages=[{until: 12, change: {"match.bins": 990}}]'], r"stage 1 changes 'match.bins', by which the term gan"),
        (["gan.head_weight=0"], r"gan.head_weight = 0: expected more than 0"),
        (["gan.r1_noise=0"], r"gan.r1_noise = 0: expected more than 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_before_anything_is_made(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        distil(recipe(tmp_path, *changes), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("images", "changes", "said"),
    [
        ({"shape": (9, 9)}, [], r"holds images of 9x9, grey; the teacher .* makes 8x8, grey"),
        ({"shape": (8, 8, 3)}, [], r"holds images of 8x8, RGB; the teacher .* makes 8x8, grey"),
        ({"classes": ("a", "b", "d")}, [], r"other classes .*: only the images have d; only the teacher c"),
        ({"classes": ("a", "b")}, [], r"other classes than the teacher .*: only the teacher c"),
        ({"classes": ("a", "b")}, ["real.classes=number"], r"has 2 classes, the teacher 3"),
        ({"classes": (".",)}, [], r"has no classes, and the teacher .* has 3"),
    ],
)  # fmt: skip
def test_images_of_another_kind_are_refused(tmp_path, images, changes, said):
    real_folder(tmp_path / "real", **images)
    with pytest.raises(ValueError, match=said):
        subjects.subject(recipe(tmp_path, *changes))


def test_a_cache_of_latents_that_there_are_not_is_said_to_be_unused(tmp_path):
    with pytest.warns(Notice, match=r"real.cache .*latents is not used: the teacher .* makes no latents"):
        subjects.subject(recipe(tmp_path, f"real.cache={tmp_path / 'latents'}"))


def test_classes_are_matched_by_name_or_if_asked_by_number(tmp_path):
    real_folder(tmp_path / "real", classes=("x", "y", "z"))
    real = subjects.subject(recipe(tmp_path, "real.classes=number")).real
    x, cond = real.draw(50, torch.Generator().manual_seed(0), WHOLE)
    assert torch.equal(((x + 1) * 127.5).round().long()[:, 0, 0, 0], cond.label)
    info = replace(tiny.INFO, classes=("c", "a", "b"))
    save_model(tmp_path / "other", tiny.teacher(), info)
    real_folder(tmp_path / "again", classes=("a", "b", "c"))
    found = recipe(tmp_path, f"teacher={tmp_path / 'other'}", f"real.images={tmp_path / 'again'}")
    x, cond = subjects.subject(found).real.draw(50, torch.Generator().manual_seed(0), WHOLE)
    first = ((x + 1) * 127.5).round().long()[:, 0, 0, 0]  # 0 for a, which the teacher calls 1
    assert torch.equal(torch.tensor([1, 2, 0])[first], cond.label)


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    distil(recipe(tmp_path, steps=1), tmp_path / "run", tmp_path)
    (tmp_path / "real" / "train" / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"run with other settings:\n  images: "):
        distil(recipe(tmp_path, steps=1), tmp_path / "run", tmp_path)


def test_a_stage_may_turn_it_off_and_on(tmp_path):
    stages = [{"until": 2, "change": {"gan.weight": 0.0}}, {"until": 4, "change": {"gan.optimizer.warmup": 2}}]
    found = recipe(tmp_path, f"stages={json.dumps(stages)}", "steps=4", "gan.optimizer.lr=3e-4")
    subject = subjects.subject(found)
    d = build.distiller(found.parts[0], subject, None)
    gan = d.terms[1]
    assert (gan.weight, gan.trained["head"].optimizer.lr) == (0, 3e-4)
    build.enter(d, found.parts[1], subject, None)
    build.schedule(d, found, 1)
    assert d.terms[1] is gan
    assert (gan.weight, gan.trained["head"].optimizer.lr, d.fake_optimizer.lr) == (0.1, 3e-4, 1e-3)
    assert [gan.trained["head"].optimizer.rate(step) for step in (2, 3)] == [1.5e-4, 3e-4]  # warms up in the stage
    assert d.fake_optimizer.warmup == found.fake.optimizer.warmup
