"""Predictions are exact inverses of one another; guidance against the exact guided score."""

import pytest
import torch
from torch import nn

from distmatch.diffusion.denoiser import PREDICTIONS, Cond, Denoiser, Prediction
from distmatch.diffusion.fixed import fixed
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.schedule import EDM, VP, Flow
from distmatch.models.attention import attention
from distmatch.models.mixture import mixture

SCHEDULES = [EDM(), VP(), Flow()]
B = 6


def sample(schedule):
    """`(x0, eps, x_t, t)` in float64, all over the schedule but for its very ends."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(B, 1, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    t = schedule.grid(B + 2)[1:-1]
    return x0, eps, schedule.add_noise(x0, eps, t), t


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_native_output_and_x0_are_exact_inverses(schedule, name):
    x0, _, x, t = sample(schedule)
    prediction, alpha, sigma = Prediction(name), schedule.alpha(t), schedule.sigma(t)
    native = prediction.native(x0, x, alpha, sigma)
    assert torch.allclose(prediction.x0(native, x, alpha, sigma), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_native_outputs_are_what_their_names_say(schedule):
    """Eq. 11 for eps; v = alpha eps - sigma x0; velocity = eps - x0; EDM's F from Karras et al. 2022, Eq. 8."""
    x0, eps, x, t = sample(schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, s = (v[:, None, None, None] for v in (alpha, sigma))
    expected = {
        "x0": x0,
        "eps": eps,
        "v": a * eps - s * x0,
        "velocity": eps - x0,
        "edm": (x0 - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25).sqrt() / (s * 0.5),
        "vp": eps,
        "iddpm": eps,
        "ve": -eps,
    }
    assert set(expected) == set(PREDICTIONS)
    for name, native in expected.items():
        ours = Prediction(name).native(x0, x, alpha, sigma)
        assert torch.allclose(ours, native, rtol=1e-7, atol=1e-7), name


def test_the_fake_scores_weight_is_the_teachers():
    """Algorithm 3: SNR + 1 / 0.5^2 for EDM, SNR for eps; under VP SNR + 1 for v; for a flow's velocity 1 / sigma^2."""
    t = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    edm = Denoiser(nn.Identity(), EDM(), Prediction("edm"))
    assert torch.allclose(edm.weight(t), 1 / t**2 + 1 / 0.5**2, rtol=1e-12)
    vp, t = VP(), torch.tensor([1.0, 400.0, 999.0], dtype=torch.float64)
    snr = (vp.alpha(t) / vp.sigma(t)) ** 2
    assert torch.allclose(Denoiser(nn.Identity(), vp, Prediction("eps")).weight(t), snr, rtol=1e-9)
    assert torch.allclose(Denoiser(nn.Identity(), vp, Prediction("v")).weight(t), snr + 1, rtol=1e-9)
    assert torch.equal(Denoiser(nn.Identity(), vp, Prediction("x0")).weight(t), torch.ones(3, dtype=torch.float64))
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(Denoiser(nn.Identity(), Flow(), Prediction("velocity")).weight(t), t**-2, rtol=1e-12)


class Recorder(nn.Module):
    """Remembers its inputs and answers in bf16, as a network under autocast does."""

    def forward(self, x, noise, cond):
        self.seen = x, noise, cond
        return torch.zeros_like(x, dtype=torch.bfloat16)


def test_edm_preconditioning_and_its_precision():
    network = Recorder()
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0.01, 1.0, 80.0])
    x0 = Denoiser(network, EDM(), Prediction("edm"))(x, t)
    scale = (t**2 + 0.25)[:, None, None, None]
    assert torch.allclose(network.seen[0], x / scale.sqrt())
    assert torch.allclose(network.seen[1], t.log() / 4)
    assert x0.dtype == torch.float32
    assert torch.allclose(x0, 0.25 / scale * x, rtol=1e-6)  # fp32 accuracy although the network answered in bf16


def test_under_autocast_the_network_runs_in_bf16_and_the_preconditioning_in_fp32():
    seen = []

    class Zero(nn.Linear):
        def forward(self, x, noise, cond):
            seen.append(super().forward(x))
            return seen[-1]

    network = Zero(4, 4)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    x, t = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.002, 1.0, 80.0])
    with torch.autocast("cpu", torch.bfloat16):
        x0 = Denoiser(network, EDM(), Prediction("edm"))(x, t)
    assert seen[0].dtype == torch.bfloat16
    assert x0.dtype == torch.float32
    assert torch.equal(x0, (0.25 / (t**2 + 0.25))[:, None] * x)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="prediction 'score' is unknown; expected one of edm, eps, x0, v, velocity"):
        Prediction("score")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_guidance_is_the_exact_guided_score(schedule):
    """The score of the guided x0 is `s_uncond + w (s_cond - s_uncond)`, by Eq. 4."""
    model = mixture(schedule, [[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]], [0.3, 0.5, 0.4], [0.2, 0.5, 0.3], [0, 1, 1])
    x = torch.randn(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, cond = schedule.grid(B + 2)[1:-1], Cond(label=torch.tensor([0, 1, 0, 1, 1, 0]))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    for w in (0.0, 1.0, 3.0):
        score = -(x - alpha * guided(model, w)(x, t, cond)) / sigma**2
        exact = (1 - w) * model.score(x, t, None) + w * model.score(x, t, cond)
        assert torch.allclose(score, exact, rtol=1e-6, atol=1e-8)


def test_guidance_costs_one_evaluation_at_one_and_two_elsewhere():
    calls = []

    class Counter(Denoiser):
        def forward(self, x, t, cond=None):
            calls.append(cond)
            return x

    model, cond = Counter(nn.Identity(), EDM(), Prediction("x0")), Cond(label=torch.tensor([1]))
    guided(model, 1.0)(torch.zeros(1, 1), torch.ones(1), cond)
    assert calls == [cond]
    guided(model, 2.0)(torch.zeros(1, 1), torch.ones(1), cond)
    assert len(calls) == 3
    assert calls[1].label is None
    with pytest.raises(ValueError, match=r"guidance 2.0 needs a condition; this batch has none"):
        guided(model, 2.0)(torch.zeros(1, 1), torch.ones(1), None)


def test_conditions_slice_join_and_move_together():
    cond = Cond(torch.arange(4), torch.arange(8.0).reshape(4, 2, 1), {"size": torch.arange(4.0)})
    joined = Cond.cat(cond[:1], cond[1:])
    assert torch.equal(joined.label, cond.label)
    assert torch.equal(joined.text, cond.text)
    assert torch.equal(joined.extra["size"], cond.extra["size"])
    assert Cond.cat(None, None) is None
    assert cond.null().label is None
    assert cond.null().text is None
    assert cond.null().extra is cond.extra


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_fixed_time_is_the_same_to_the_last_bit(name):
    class Net(nn.Module):
        def forward(self, x, noise, cond):
            return (x + noise[:, None, None, None]).tanh()

    denoiser, x = Denoiser(Net(), EDM(), Prediction(name)), torch.randn(3, 1, 4, 4)
    denoiser.net.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    for t in (80.0, 0.7):
        look = fixed(denoiser, t, torch.device("cpu"))
        assert torch.equal(look(x, None), denoiser(x, torch.full((3,), t)))


def test_a_denoiser_with_a_forward_of_its_own_keeps_it_at_a_fixed_time():
    model, x = mixture(EDM(), [[-1.0], [2.0]], [0.3, 0.5]), torch.randn(3, 1)
    assert torch.equal(fixed(model, 5.0, torch.device("cpu"))(x, None), model(x, torch.full((3,), 5.0)))


@pytest.mark.parametrize("positions", [16, 300])
def test_attention_in_bf16_is_that_of_fp32_with_its_gradients(positions, monkeypatch):
    """Written out for short sequences, fused for long ones: both within the rounding of bf16."""
    fused, kinds = nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v):
        kinds.append(q.dtype)
        return fused(q, k, v)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, positions, 8, generator=generator).requires_grad_() for _ in range(3)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    y, rounded = attention(*exact), attention(*low)
    assert kinds == [torch.float32] + [torch.bfloat16] * (positions > 256)
    weights = (exact[0] @ exact[1].transpose(-1, -2) / 8**0.5).softmax(-1)
    assert torch.allclose(y, weights @ exact[2], atol=1e-5)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - y).norm() < 0.02 * y.norm()
    wanted = torch.autograd.grad(y.square().sum(), exact)
    for gradient, expected in zip(torch.autograd.grad(rounded.float().square().sum(), low), wanted, strict=True):
        assert (gradient - expected).norm() < 0.03 * expected.norm()
