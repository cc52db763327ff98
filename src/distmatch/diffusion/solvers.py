"""Samplers by name: our own, and diffusers' with the settings of a model's own scheduler: DDIM, PNDM, and of flows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.flow_solver import flow
from distmatch.diffusion.partial import first_steps
from distmatch.diffusion.sampler import SAMPLERS, Callback, Model, Sampler
from distmatch.diffusion.schedule import VP, Schedule, expand
from distmatch.system.errors import UserError
from distmatch.system.extras import need

DISCRETE = {"ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler", "pndm": "PNDMScheduler"}
"""Samplers of diffusers, which follow the settings of a model's scheduler, and their classes."""

NAMES = (*SAMPLERS, *DISCRETE, "flow")

STABLE_DIFFUSION = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
"""PNDM's settings in Stable Diffusion's own configurations, for models that come without a scheduler."""

CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""Schedulers that clip x0 unless their settings say otherwise."""


def solver(name: str, scheduler: Mapping[str, Any] | None = None, taken: int | None = None) -> Sampler:
    """Return the sampler called `name`; see `sampler.Sampler`.

    Args:
        scheduler: the settings of the model's diffusers scheduler, for diffusers' samplers.
        taken: take only this many of its steps, see `partial.first_steps`; for `euler` and `heun`.

    Raises `UserError` for an unknown name and, when sampling, for `DISCRETE` ones on a schedule other than `VP`.
    """
    if name not in NAMES:
        raise UserError(f"sampler {name!r} is unknown; expected one of {', '.join(NAMES)}")
    if name == "flow":
        return flow(scheduler or {})
    if name in DISCRETE:
        return discrete(name, scheduler or {})
    return SAMPLERS[name] if taken is None else first_steps(SAMPLERS[name], taken)


def evaluations(name: str, steps: int, guidance: float | None = 1.0, taken: int | None = None) -> int:
    """Return the network evaluations (NFE) per image. PNDM evaluates its second time twice, Heun its last once.

    Guidance other than 1 needs two per step, and so does a guidance range, `None`. `taken`: only the first steps.
    """
    pndm = steps + 1 if steps > 1 else 1
    calls = {"euler": steps, "heun": 2 * steps - 1, "ddim": steps, "dpm": steps, "pndm": pndm, "flow": steps}[name]
    if taken is not None and taken < steps:
        calls = {"euler": taken, "heun": 2 * taken}[name]
    return calls if guidance == 1 else 2 * calls


def discrete(name: str, settings: Mapping[str, Any]) -> Sampler:
    """Return a solver of diffusers: `ddim` (Song et al. 2020, arXiv 2010.02502), `dpm` (DPM-Solver++, Lu et al. 2022,
    arXiv 2211.01095) or `pndm` (pseudo numerical methods, Liu et al. 2022, arXiv 2202.09778).

    The solver works on what the settings' `prediction_type` names, made from `x0` in `x`'s precision. DDIM without
    noise; it clips `x0` as the settings say (`clip_sample`, `thresholding`).
    """
    predicted = str(settings.get("prediction_type", "epsilon"))
    if name == "pndm" and predicted == "sample":  # which it does not know
        predicted = "epsilon"

    def sample(
        model: Model, schedule: Schedule, z: Tensor, cond: Cond | None, steps: int, callback: Callback | None = None
    ) -> Tensor:
        if type(schedule) is not VP:
            raise UserError(f"{name} is for the schedules of discrete diffusions; this model's is {schedule}. Use heun")
        if steps > schedule.steps:
            raise UserError(f"{steps} steps of {name}: this model has only {schedule.steps}")
        scheduler = _scheduler(name, {**settings, "prediction_type": predicted}, schedule)
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        if name != "ddim" and not schedule.alpha(z.new_tensor([float(times[0])])):
            raise UserError(f"{name} divides by alpha, which is 0 at this model's step {times[0]}; use ddim")
        x = schedule.prior_std * z
        for i, step in enumerate(times):
            t = z.new_full((len(z),), float(step))
            x0 = model(x, t, cond)
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            eps = (x - alpha * x0) / sigma
            output = {"sample": x0, "v_prediction": alpha * eps - sigma * x0}.get(predicted, eps)
            x = scheduler.step(output, step, x, return_dict=False)[0]
            if callback is not None:
                callback(i, x, x0)
        return x

    return sample


def _scheduler(name: str, settings: Mapping[str, Any], schedule: VP) -> Any:
    """Return diffusers' scheduler called `name`, with the betas of `schedule`."""
    need("diffusers", by=name)
    import diffusers

    kind = getattr(diffusers, DISCRETE[name])
    betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": schedule.spacing}
    if schedule.betas is not None or schedule.spacing == "sigmoid":  # these solvers do not know sigmoid by name
        betas = {"trained_betas": schedule.table().tolist(), "rescale_betas_zero_snr": False}
    clips = {"clip_sample": settings.get("_class_name") in CLIPPING}
    plain = {"pndm": STABLE_DIFFUSION, "ddim": clips}.get(name, {})
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    return kind.from_config({**plain, **known, **betas, "num_train_timesteps": schedule.steps})
