"""Schedules against their definitions, written out with numpy."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from distmatch import DistilledPipeline, Recipe, distil
from distmatch.data.pairs import fingerprint
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.iddpm import IDDPM, iddpm_sigmas
from distmatch.diffusion.schedule import EDM, VP, Flow, Schedule, expand
from distmatch.diffusion.schedule_config import schedule_config, schedule_of
from distmatch.diffusion.spacing import shifted
from distmatch.system.errors import UserError

BETAS = np.linspace(0.01, 0.2, 100)
ALL = [
    EDM(),
    VP(),
    VP(0.00085, 0.012, 1000, "scaled_linear"),
    VP(spacing="squaredcos_cap_v2"),
    VP(spacing="sigmoid"),
    VP(betas=BETAS),
    Flow(),
]


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.1582, 0.4])
def test_a_flows_grid_is_shifted_as_diffusers_shifts_it(shift):
    flow = Flow(shifted(1e-3, shift), 1.0, shift)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.double()  # 1, .999, ... .001, shifted
    assert torch.allclose(flow.grid(1000), theirs, atol=1e-6)
    assert flow.grid(7)[0] == 1
    assert flow.grid(7)[-1] == pytest.approx(flow.t_min, rel=1e-12)
    assert schedule_of(schedule_config(flow)) == flow
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shifted(u, 1.0), u)
    assert torch.allclose(shifted(shifted(u, shift), 1 / shift), u, rtol=1e-12)


def test_earlier_digests_of_flows_stay():
    assert schedule_config(Flow()) == {"type": "flow", "t_min": 1e-3, "t_max": 1.0}


def test_edm_grid_is_karras_equation_5():
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert np.allclose(EDM().grid(18).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (VP(), np.linspace(1e-4, 2e-2, 1000)),
        (VP(0.00085, 0.012, 1000, "scaled_linear"), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ],
    ids=["DDPM", "Stable Diffusion"],
)
def test_vp_is_the_product_of_one_minus_beta(schedule, betas):
    t = torch.tensor([0, 1, 500, 998, 999], dtype=torch.float64)
    expected = np.cumprod(1 - betas)[t.long().numpy()]
    assert np.allclose(schedule.alpha(t).numpy() ** 2, expected, rtol=1e-12)
    assert np.allclose((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).numpy(), 1, rtol=1e-14)
    between = schedule.alpha(torch.tensor([500.25], dtype=torch.float64)).log()
    assert between.item() == pytest.approx(np.interp(500.25, [500, 501], np.log(np.cumprod(1 - betas)[500:502]) / 2))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 300},
        {"trained_betas": BETAS.tolist(), "num_train_timesteps": 100},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
    ],
    ids=lambda settings: next(iter(settings.values()), "linear") if len(settings) != 2 else "other",
)
@pytest.mark.parametrize("kind", [DDPMScheduler, EulerDiscreteScheduler])
def test_vp_is_diffusers_schedule(kind, settings):
    """Every beta schedule of diffusers, from the scheduler, its settings, and the file that it writes."""
    if kind is EulerDiscreteScheduler and settings.get("beta_schedule") in ("sigmoid", "squaredcos_cap_v2"):
        pytest.skip("diffusers' Euler does not have it")
    if kind is EulerDiscreteScheduler and settings.get("rescale_betas_zero_snr"):
        pytest.skip("diffusers' Euler ends at a small alpha instead of 0")
    scheduler = kind(**settings)
    schedule = VP.from_scheduler(scheduler)
    assert schedule == VP.from_scheduler(json.loads(scheduler.to_json_string()))
    t = torch.arange(len(scheduler.betas), dtype=torch.float64)
    assert schedule.t_max == t[-1]
    alpha, sigma = scheduler.alphas_cumprod.double().sqrt(), (1 - scheduler.alphas_cumprod.double()).sqrt()
    assert (schedule.alpha(t) - alpha).abs().max() < 1e-6
    assert (schedule.sigma(t) - sigma).abs().max() < 1e-5  # diffusers' betas are in single precision


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no betas"),
        (EDMEulerScheduler(), "EDMEulerScheduler has no betas"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas True is flow matching"),
        (CogVideoXDDIMScheduler(rescale_betas_zero_snr=False), "snr_shift_scale 3.0 shifts"),
        (DDPMScheduler(beta_schedule="laplace"), "beta_schedule 'laplace' is not known here; expected one of linear"),
        ({"beta_schedule": "linear", "beta_start": 0.1}, "says no num_train_timesteps"),
        (DDPMScheduler().config | {"beta_start": [1]}, r"VP: beta_start is \[1\]; expected a number"),
        (DDPMScheduler().config | {"num_train_timesteps": None}, "VP: steps is None; expected a number"),
        (DDPMScheduler().config | {"beta_schedule": ["linear"]}, r"beta_schedule \['linear'\] is not known here"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_schedulers_of_another_kind_are_refused_by_name(scheduler, message):
    with pytest.raises(ValueError, match=message):
        VP.from_scheduler(scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": "cosine"}, "spacing 'cosine' is unknown; expected linear, scaled_linear, squaredcos_cap_v2, sig"),
        ({"betas": []}, "expected at least two"),
        ({"steps": 0}, "expected at least two"),
        ({"betas": [1.0, 0.1]}, "all between 0 and 1"),
        ({"beta_end": 2.0}, "all between 0 and 1"),
        ({"betas": [0.1, float("nan")]}, "all between 0 and 1"),
        ({"betas": 5}, "VP: betas is 5; expected a list of numbers"),
        ({"betas": [[0.1, 0.2]]}, "expected a list of numbers"),
        ({"betas": "abc"}, "expected a list of numbers"),
        ({"steps": 2.5}, "VP: steps is 2.5; expected a whole number up to 100,000"),
        ({"steps": 10**9}, "VP: steps is 1000000000; expected"),
        ({"steps": True}, "VP: steps is True; expected a number"),
        ({"beta_start": None}, "VP: beta_start is None; expected a number"),
        ({"beta_start": 0.02, "beta_end": 1e-4}, "VP: beta_start is 0.02, above beta_end, 0.0001"),
    ],
)
def test_what_is_no_vp_schedule_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        VP(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(100, 80), "EDM: sigma_min is 100 and sigma_max 80; expected 0 < sigma_min < sigma_max"),
        (lambda: EDM(-1, 80), "EDM: sigma_min is -1"),
        (lambda: EDM(sigma_max=float("inf")), "EDM: sigma_max is inf; expected a number"),
        (lambda: EDM(rho=0), "EDM: rho is 0; expected 0.1 to 100"),
        (lambda: IDDPM(100), "sigma_min is 100"),
        (lambda: Flow(2.0), "Flow: t_min is 2.0 and t_max 1.0; expected 0 < t_min < t_max <= 1"),
        (lambda: Flow(shift=0.0), "Flow: shift is 0.0; expected 0.01 to 100"),
        (lambda: Flow(t_max=1.5), "Flow: t_min is 0.001 and t_max 1.5"),
        (lambda: Prediction("edm", -0.5), "prediction: sigma_data is -0.5; expected a positive number"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_iddpm_rounds_to_the_nearest_level():
    levels = iddpm_sigmas(torch.device("cpu")).double()
    t = torch.tensor([0.002, 0.5, 5.0, 79.0, 1e9], dtype=torch.float64)
    by_hand = torch.stack([levels[(levels - value).abs().argmin()] for value in t])
    assert torch.equal(IDDPM().nearest(t), by_hand)
    assert set(IDDPM().grid(40).tolist()) <= set(levels.tolist())
    assert schedule_of(schedule_config(IDDPM(0.01))) == IDDPM(0.01)
    assert IDDPM().t_max == IDDPM().prior_std == IDDPM().grid(40)[0] == pytest.approx(80.2037, abs=1e-4)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{type(s).__name__} {getattr(s, 'spacing', '')}")
def test_every_schedule_keeps_the_common_rules(schedule):
    grid = schedule.grid(20)
    assert grid.dtype == torch.float64
    assert grid[0].item() == pytest.approx(schedule.t_max)
    assert grid[-1].item() == pytest.approx(schedule.t_min)
    assert (grid.diff() < 0).all()
    noise_to_signal = schedule.sigma(grid[1:]) / schedule.alpha(grid[1:])
    assert (noise_to_signal.diff() < 0).all()  # larger t is noisier
    x, eps = torch.randn(2, 20, 3, 4, dtype=torch.float64)
    expected = schedule.alpha(grid)[:, None, None] * x + schedule.sigma(grid)[:, None, None] * eps
    assert torch.allclose(schedule.add_noise(x, eps, grid), expected, rtol=1e-12)
    # Stable Diffusion's schedule ends at sigma 0.9977; its sampler starts from unit noise all the same.
    assert schedule.prior_std == pytest.approx(schedule.sigma(grid[:1]).item(), rel=3e-3)
    assert schedule_of(schedule_config(schedule)) == schedule


def test_unknown_schedules_and_empty_grids_are_named():
    with pytest.raises(ValueError, match="schedule type 'cosine' is unknown; expected one of edm, iddpm, vp, flow"):
        schedule_of({"type": "cosine"})
    with pytest.raises(ValueError, match="a grid has 0 steps"):
        EDM().grid(0)


class Cosine:
    """A schedule of one's own: the documented methods, and nothing of ours."""

    t_min, t_max, prior_std = 1e-3, 0.99, 1.0

    def __init__(self, power=1.0):
        self.power = power

    def alpha(self, t):
        return torch.cos(t**self.power * torch.pi / 2)

    def sigma(self, t):
        return torch.sin(t**self.power * torch.pi / 2)

    def grid(self, n):
        return torch.linspace(self.t_max, self.t_min, n, dtype=torch.float64)

    def nearest(self, t):
        return t.clamp(self.t_min, self.t_max)

    def add_noise(self, x, eps, t):
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * eps


def test_a_schedule_of_ones_own_works_everywhere(tmp_path):
    """Samplers, pairs, distillation, a model folder; it is part of the teacher's fingerprint by its values."""
    teacher = Denoiser(tiny.teacher().net, Cosine(), Prediction("v"))
    recipe = {
        "name": "own", "teacher": "own", "steps": 2, "match": {"batch": 2}, "regress": {"batch": 2},
        "pairs": {"count": 4, "steps": 3}, "device": "cpu",
    }  # fmt: skip
    distil(Recipe.model_validate(recipe), tmp_path / "run", tmp_path, teacher=(teacher, tiny.INFO))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "run", schedule=Cosine())
    assert pipe.info.times == (0.99,)
    assert isinstance(pipe.denoiser.schedule, Cosine)
    z = torch.randn(2, 1, 8, 8)
    cond = pipe.condition(2)
    assert torch.equal(pipe.sample(z, cond), pipe.denoiser(z, torch.full((2,), 0.99), cond))
    with pytest.raises(ValueError, match=r"a schedule of its owner's, Cosine; pass one: .*schedule=Cosine\(\.\.\.\)"):
        DistilledPipeline.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="saved with a schedule Cosine of other values"):
        DistilledPipeline.from_pretrained(tmp_path / "run", schedule=Cosine(2.0))
    with pytest.raises(ValueError, match="the model has its own schedule, edm"):
        DistilledPipeline.from_pretrained("mnist", schedule=Cosine())
    prints = {fingerprint(Denoiser(teacher.net, own, teacher.prediction)) for own in (Cosine(), Cosine(2.0), Cosine())}
    assert len(prints) == 2


def test_a_schedule_that_derives_from_ours_needs_five_things():
    class Straight(Schedule):
        t_min, t_max, prior_std = 1e-3, 1.0, 1.0

        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t

    x, eps, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(Straight().add_noise(x, eps, t), Flow().add_noise(x, eps, t))
    assert torch.equal(Straight().grid(7), Flow().grid(7))


def test_the_fingerprint_of_known_teachers_stays():
    """Stores of pairs made before are still theirs."""
    assert schedule_config(VP()) == {
        "type": "vp", "beta_start": 1e-4, "beta_end": 2e-2, "steps": 1000, "spacing": "linear"
    }  # fmt: skip
