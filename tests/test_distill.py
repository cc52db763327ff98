"""The distillation step: gradients against closed forms, the step against Algorithm 1 written out, exact resume."""

import copy

import graphs
import pytest
import tiny
import torch
from forked import command, start
from torch import nn

from distmatch.diffusion.conditions import WHOLE, Classes, with_guidance
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.losses import WEIGHTINGS
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.methods.distill import Distiller
from distmatch.methods.terms import Match, NoiseStream, Samples, Start
from distmatch.models.folder import Info, save_model
from distmatch.models.mixture import mixture
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.training import log
from distmatch.training.gradients import Adder


def one_dimensional(schedule):
    return mixture(schedule, [[-1.0], [2.0]], [0.3, 0.5], [0.4, 0.6])


def drawn(match, conditions, batch, index=0):
    """What the stream of noise gives in step `index`, and what `match` draws for it."""
    start = NoiseStream((1,), conditions, batch).draw(0, index, 0, WHOLE)
    return start, match.draw([start], WHOLE)


def kl_gradient(schedule, real, m: float, s: float, t: float) -> torch.Tensor:
    """d/d(m, s) of KL(N(alpha m, (alpha s)^2 + sigma^2) || q_t), by quadrature: Eq. 1 for the diffused densities."""
    parameters = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64) * (8 * (sigma + alpha) + 4) + alpha * m
    variance = (alpha * parameters[1]) ** 2 + sigma**2
    log_fake = -0.5 * ((x - alpha * parameters[0]) ** 2 / variance + torch.log(2 * torch.pi * variance))
    log_real = real.log_density(x[:, None], time.expand(len(x)))
    torch.trapezoid(log_fake.exp() * (log_fake - log_real), x).backward()
    return parameters.grad


@pytest.mark.parametrize("schedule", [EDM(sigma_max=10.0), VP(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("noise", [0.1, 0.4, 0.8])
def test_the_matching_gradient_is_the_kl_gradient(schedule, noise):
    """Eq. 7 with w_t = 1: with exact scores the generator's gradient is that of the diffused KL, at every level.

    The generator is `x = m + s z`; its fake distribution is a Gaussian, its exact score a one-component mixture.
    """
    m, s = 0.5, 0.7
    real, fake = one_dimensional(schedule), mixture(schedule, [[m]], [s])
    n = 200_000
    match = Match(
        real,
        fake,
        weighting=lambda x, x0_real, alpha, sigma: (alpha / sigma) ** 2,  # w_t = 1 on the scores of Eq. 7
        steps=(int(1000 * noise), int(1000 * noise) + 1),
    )
    start, levels = drawn(match, Classes(0), n)
    parameters = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    loss = match.student_loss(levels, Samples(parameters[0] + parameters[1] * start.z.double(), None))
    (gradient,) = torch.autograd.grad(loss, parameters)
    expected = kl_gradient(schedule, real, m, s, levels.t[0].item())
    assert torch.allclose(gradient, expected, rtol=0.03, atol=0.01 * expected.norm().item() + 1e-4)


def test_matching_moves_a_gaussian_onto_a_gaussian():
    """With exact scores throughout, the fake distribution's mean and spread arrive at the real ones."""
    schedule = EDM(sigma_max=10.0)
    real = mixture(schedule, [[1.0]], [0.5])
    parameters = torch.tensor([-2.0, 1.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 400)
        fake = mixture(schedule, [[parameters[0].item()]], [abs(parameters[1].item())])
        match = Match(real, fake, weighting=WEIGHTINGS["prolificdreamer"])
        start, levels = drawn(match, Classes(0), 256, step)
        optimizer.zero_grad()
        match.student_loss(levels, Samples(parameters[0] + parameters[1] * start.z.double(), None)).backward()
        optimizer.step()
    assert parameters[0].item() == pytest.approx(1.0, abs=0.08)
    assert abs(parameters[1].item()) == pytest.approx(0.5, abs=0.08)


def test_guidance_applies_to_the_real_score_alone():
    schedule = EDM(sigma_max=10.0)
    real = mixture(schedule, [[-1.0], [2.0]], [0.3, 0.5], labels=[0, 1])
    fake = mixture(schedule, [[0.0], [0.5]], [1.0, 1.0], labels=[0, 1])
    match = Match(real, fake, weighting=WEIGHTINGS["dreamfusion"], real=guided(real, 3.0))
    start, levels = drawn(match, Classes(2), 64)
    x = start.z.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(match.student_loss(levels, Samples(x, start.cond)), x)
    x_t = x.detach() + levels.t[:, None] * levels.eps
    expected_real = 3 * real(x_t, levels.t, start.cond) - 2 * real(x_t, levels.t, None)
    expected = (fake(x_t, levels.t, start.cond) - expected_real) / levels.t[:, None] / 64
    assert torch.allclose(gradient, expected, rtol=1e-5)


def test_levels_are_drawn_from_the_papers_bins():
    match = Match(
        one_dimensional(EDM()),
        one_dimensional(EDM()),
        weighting=WEIGHTINGS["eq8"],
    )
    _, batch = drawn(match, Classes(0), 20_000)
    rho_bins = (
        0.002 ** (1 / 7) + torch.arange(1000, dtype=torch.float64) / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    ) ** 7
    assert torch.allclose(match.levels.double(), rho_bins, rtol=1e-5)
    assert batch.t.min() == match.levels[20]
    assert batch.t.max() == match.levels[979]
    assert batch.t_fake.min() == match.levels[0]
    assert batch.t_fake.max() == match.levels[999]
    counts = torch.bincount((batch.t[:, None] >= match.levels[None, 20:980:96]).sum(1) - 1)
    assert (counts.float() / 20_000 - 0.1).abs().max() < 0.01  # uniform over bins


def distiller(folder, *overrides) -> Distiller:
    recipe = load_recipe(str(tiny.recipe_file(folder)), list(overrides))
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, folder / "runs") if objectives.reads_pairs(recipe) else None
    return build.distiller(recipe, subject, pairs)


def test_a_step_is_algorithm_1(tmp_path):
    """Two steps against Algorithm 1 written out with plain AdamW: the same weights of student and fake score."""
    d = distiller(
        tmp_path,
        "student.optimizer.warmup=0",
        "student.optimizer.decay=0",
        "fake.optimizer.warmup=0",
        "fake.optimizer.decay=0",
    )
    match = d.terms[0]
    student, fake, teacher = (copy.deepcopy(network) for network in (d.student, d.fake, match.teacher))
    adam = [
        torch.optim.AdamW(n.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False)
        for n in (student, fake)
    ]
    t_max = 80.0 * torch.ones(4)
    for step in range(2):
        part = d.draw(step, WHOLE)
        s, r, b = part.starts["noise"], part.starts["pairs"], part.drawn["match"]
        losses = d.step(step)

        x, x_ref = student(80.0 * s.z, t_max, s.cond), student(80.0 * r.z, t_max, r.cond)
        with torch.no_grad():
            noisy = x + b.eps * b.t[:, None, None, None]
            pred_fake, pred_real = fake(noisy, b.t, s.cond), teacher(noisy, b.t, s.cond)
            grad = (pred_fake - pred_real) / (x - pred_real).abs().mean(dim=[1, 2, 3], keepdim=True)
        l_kl = 0.5 * nn.functional.mse_loss(x, (x - grad).detach())
        l_reg = nn.functional.mse_loss(x_ref, r.y)
        adam[0].zero_grad()
        (l_kl + 1.0 * l_reg).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        adam[0].step()

        x = x.detach()
        sigma = b.t_fake[:, None, None, None]
        pred = fake(x + b.eps_fake * sigma, b.t_fake, s.cond)
        l_denoise = ((1 / sigma**2 + 1 / 0.5**2) * (pred - x) ** 2).mean()
        adam[1].zero_grad()
        l_denoise.backward()
        nn.utils.clip_grad_norm_(fake.parameters(), 10.0)
        adam[1].step()

        assert losses["match/student"].item() == pytest.approx(l_kl.item(), rel=1e-4)
        assert losses["regress/student"].item() == pytest.approx(l_reg.item(), rel=1e-4)
        assert losses["match/fake"].item() == pytest.approx(l_denoise.item(), rel=1e-3)
    for ours, plain in ((d.student, student), (d.fake, fake)):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-5)


def test_the_student_starts_as_the_teacher_and_the_teacher_stays(tmp_path):
    d = distiller(tmp_path)
    teacher = d.terms[0].teacher
    before = copy.deepcopy(teacher.state_dict())
    z = torch.randn(3, 1, 8, 8)
    start = Start(z, Cond(label=torch.tensor([0, 1, 2])), 3, torch.Generator())
    assert torch.equal(d.generate(start).x, teacher(80.0 * z, torch.full((3,), 80.0), start.cond))
    for index in range(3):
        d.step(index)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not torch.equal(d.student.net.head.weight, before["net.head.weight"])
    assert not torch.equal(d.fake.net.head.weight, before["net.head.weight"])


def test_a_student_goes_on_from_an_earlier_one(tmp_path):
    earlier = tiny.teacher(seed=1)
    save_model(tmp_path / "earlier", earlier, Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    d = distiller(tmp_path, f"student.init={tmp_path / 'earlier'}")
    assert all(torch.equal(v, d.student.state_dict()[k]) for k, v in earlier.state_dict().items())
    assert all(torch.equal(v, d.fake.state_dict()[k]) for k, v in tiny.teacher().state_dict().items())
    with pytest.raises(ValueError, match=r"student.init 'mnist' has another network"):
        distiller(tmp_path, "student.init=mnist")


def test_a_student_of_a_fixed_guidance_learns_others(tmp_path):
    earlier = tiny.teacher(seed=1)
    save_model(tmp_path / "earlier", earlier, Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    d = distiller(tmp_path, f"student.init={tmp_path / 'earlier'}", "student.guidance=[1,4]")
    x, t, cond = torch.randn(3, 1, 8, 8), torch.full((3,), 80.0), Cond(label=torch.arange(3))
    scaled = with_guidance(cond, torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(d.student(x, t, scaled), earlier(x, t, cond))
    d.step(0)
    d.step(1)
    x0 = d.student(
        x[:1].expand(2, -1, -1, -1), t[:2], with_guidance(Cond(torch.zeros(2).long()), torch.tensor([1.0, 4.0]))
    )
    assert not torch.equal(x0[0], x0[1])


@pytest.mark.parametrize("terms", ["[match, regress]", "[match]", "[regress]"])
def test_accumulation_changes_nothing_but_rounding(tmp_path, terms):
    whole = distiller(tmp_path, f"terms={terms}", "fake.steps=2")
    parts = distiller(tmp_path, f"terms={terms}", "fake.steps=2", "accumulate=2")
    for index in range(2):
        a, b = whole.step(index), parts.step(index)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].item() == pytest.approx(b[name].item(), rel=1e-3), name
    for p, q in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=5e-5)


def test_ablations_leave_out_what_they_say(tmp_path):
    assert distiller(tmp_path, "terms=[regress]").fake is None
    assert set(distiller(tmp_path, "terms=[regress]").step(0)) == {"regress/student", "gradient_norm"}
    names = {"match/student", "match/fake", "gradient_norm", "fake_gradient_norm"}
    assert set(distiller(tmp_path, "terms=[match]").step(0)) == names
    with pytest.raises(ValueError, match=r"match.batch 4 is not a multiple of accumulate 3"):
        distiller(tmp_path, "accumulate=3")


def test_critic_steps_draw_fresh_fakes(tmp_path):
    d = distiller(tmp_path, "fake.steps=3")
    d.step(0)
    steps = next(iter(d.fake_optimizer.adamw.state.values()))["step"]
    assert steps.item() == 3
    assert next(iter(d.optimizer.adamw.state.values()))["step"].item() == 1
    first, second = (d.start(d.objective.streams["noise"], 0, turn, WHOLE) for turn in (0, 1))
    assert not torch.equal(first.z, second.z)


def test_each_update_of_the_fake_score_has_noise_and_levels_of_its_own(tmp_path):
    d = distiller(tmp_path, "terms=match", "fake.steps=3")
    term, seen = d.terms[0], []
    loss = term.fake_loss
    term.fake_loss = lambda drawn, samples: (
        seen.append((drawn.t_fake, drawn.eps_fake, samples.x)) or loss(drawn, samples)
    )
    student = d.student.forward
    inputs = []
    d.forward = lambda x, t, cond: inputs.append(x) or student(x, t, cond)
    d.step(0)
    d.step(1)
    assert (len(seen), len(inputs)) == (6, 6)
    for kind in (*zip(*seen, strict=True), inputs):
        assert len({tuple(one.flatten().tolist()) for one in kind}) == 6


def test_bf16_keeps_fp32_weights_and_preconditioning(tmp_path):
    d = distiller(tmp_path, "precision=bf16")
    plain = distiller(tmp_path)
    d.step(0), plain.step(0)  # the first step has no matching loss: the fake score is the teacher
    losses, plain = d.step(1), plain.step(1)
    assert {p.dtype for p in (*d.student.parameters(), *d.fake.parameters(), *d.ema.network.parameters())} == {
        torch.float32
    }
    assert losses["match/student"].dtype == torch.float32
    assert losses["match/student"].item() == pytest.approx(plain["match/student"].item(), rel=0.1)
    assert losses["match/student"].item() != plain["match/student"].item()


def test_golden_loss_curve(tmp_path):
    """The losses of a short seeded run. A change here is a change of the method, or of torch's random numbers."""
    d = distiller(tmp_path)
    curve = [d.step(i) for i in range(6)]
    for name, golden in GOLDEN.items():
        assert [row[name].item() for row in curve] == pytest.approx(golden, rel=2e-3), name


GOLDEN = {
    "match/student": [0.0, 0.01028, 0.05274, 0.04344, 0.06314, 0.02743],
    "regress/student": [4.3264, 4.22149, 4.50336, 4.1205, 3.86211, 4.44795],
    "match/fake": [0.31074, 0.33689, 0.21132, 0.484, 0.50958, 0.69698],
}


def test_log_and_checkpoint_of_a_killed_run_equal_the_undisturbed(tmp_path):
    """`distmatch train`, killed with SIGKILL after its first checkpoint and run again: bit for bit the same."""
    from safetensors.torch import load_file

    recipe = tiny.recipe_file(tmp_path, steps=28)
    arguments = ["train", recipe, "--runs", tmp_path / "runs"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = command(*arguments, "-o", straight)
    assert done.returncode == 0, done.stderr
    started = start(*arguments, "-o", broken)
    started.wait(lambda: list((broken / "checkpoints").glob("step-*")))
    started.kill()
    started.end()
    assert not (broken / "model").exists()
    assert command(*arguments, "-o", broken).returncode == 0
    for part in ("model/model.safetensors", "checkpoints/step-00000028/shard-00001-model-00001-of-00001.safetensors"):
        a, b = load_file(straight / part), load_file(broken / part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), part
    curves = [
        [
            (line["step"], line["match/student"], line["regress/student"], line["match/fake"])
            for line in log.read(run / "log.jsonl")
        ]
        for run in (straight, broken)
    ]
    assert curves[0][-1] == curves[1][-1]
    assert set(curves[1]) <= set(curves[0])


def test_matching_sees_the_pairs_images_as_well(tmp_path):
    """`concat(x, x_ref)`: the step of Algorithm 1 for LAION, written out; accumulation changes nothing but rounding."""
    d = distiller(tmp_path, "match.pairs=true", "student.optimizer.warmup=0", "fake.steps=2")
    match = d.terms[0]
    student, fake, teacher = (copy.deepcopy(network) for network in (d.student, d.fake, match.teacher))
    part = d.draw(0, WHOLE)
    s, r, b = part.starts["noise"], part.starts["pairs"], part.drawn["match"]
    assert (len(s.z), len(b.t), len(b.eps_fake)) == (4, 8, 8)
    losses = d.step(0)

    with torch.no_grad():
        x = student(80.0 * torch.cat([s.z, r.z]), torch.full((8,), 80.0), Cond.cat(s.cond, r.cond))
        cond, noisy = Cond.cat(s.cond, r.cond), x + b.eps * b.t[:, None, None, None]
        pred_fake, pred_real = fake(noisy, b.t, cond), teacher(noisy, b.t, cond)
        w = (x - pred_real).abs().mean(dim=[1, 2, 3], keepdim=True)
        l_kl = 0.5 * (((pred_fake - pred_real) / w) ** 2).mean()
    assert losses["match/student"].item() == pytest.approx(l_kl.item(), rel=1e-4, abs=1e-9)
    assert losses["regress/student"].item() == pytest.approx(nn.functional.mse_loss(x[4:], r.y).item(), rel=1e-4)

    whole, parts = (distiller(tmp_path, "match.pairs=true", "fake.steps=2", f"accumulate={n}") for n in (1, 2))
    for index in range(2):
        a, b = whole.step(index), parts.step(index)
        for name in a:
            assert a[name].item() == pytest.approx(b[name].item(), rel=1e-3), name
    for p, q in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=5e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pairs.count=8", "student.adapter.rank=2", "fake.adapter.rank=2", "gradient_checkpointing=true"],
        ["student.nfe=2", "terms=match", "fake.steps=2", "student.guidance=null", "fake.ida=0.1", "fake.alone=2"],
        ["student.nfe=4", "terms=match", "fake.steps=3", "precision=bf16"],
    ],
    ids=["pairs", "two steps", "four steps in bf16"],
)
def test_recorded_updates_are_the_steps_own(tmp_path, overrides):
    plain, recorded = distiller(tmp_path, *overrides), distiller(tmp_path, *overrides)
    recorded.gradients = Adder(recorded.clock, recorded=[recorded.optimizer, *recorded.fake_optimizers])
    with graphs.on_a_cpu():
        for index in range(4):
            expected = plain.step(index)
            for name, loss in recorded.step(index).items():
                assert torch.equal(loss, expected[name]), name
    for ours, theirs in zip(recorded.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stage_is_recorded_anew(tmp_path):
    stages = "stages=[{until: 1}, {until: 2, change: {match.weight: 3}}]"
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), ["terms=match", "steps=2", stages])
    subject = subjects.subject(recipe)
    plain, recorded = (build.distiller(recipe.parts[0], subject, None) for _ in range(2))
    recorded.gradients = Adder(recorded.clock, recorded=[recorded.optimizer, *recorded.fake_optimizers])
    with graphs.on_a_cpu():
        for index, stage in enumerate(recipe.parts):
            for one in (plain, recorded):
                build.enter(one, stage, subject, None)
            assert torch.equal(recorded.step(index)["gradient_norm"], plain.step(index)["gradient_norm"])


def test_cuda_graphs_change_nothing_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(build.parallel, "world", lambda: 2)  # on GPUs they are for one process
    assert not distiller(tmp_path, "terms=match", "cuda_graphs=true").gradients.reached


def test_under_bf16_only_networks_compute_in_it(tmp_path):
    """Levels, `x0`, losses, weights, their average and AdamW's moments are fp32."""
    d = distiller(tmp_path, "precision=bf16", "fake.steps=2")
    seen = []

    def look(network, given, made):
        seen.append((type(network).__name__, given[1].dtype, made.dtype))

    teacher = next(term.teacher for term in d.terms if isinstance(term, Match))
    for denoiser in (d.student, d.fake, teacher):
        denoiser.register_forward_hook(look)
        denoiser.net.register_forward_hook(look)
    losses = d.step(0)
    kinds = {("Denoiser", torch.float32, torch.float32), ("UNet", torch.float32, torch.bfloat16)}
    assert {*seen} == kinds
    moments = [value for own in (d.optimizer, *d.fake_optimizers) for value in own.adamw.state.values()]
    kept = [*d.student.parameters(), *d.fake.parameters(), *d.ema.network.parameters(), *losses.values()]
    kept += [tensor for one in moments for tensor in one.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
