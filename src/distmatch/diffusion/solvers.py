"""Samplers by name: our own, and diffusers' PNDM, which the paper uses for its text-to-image pairs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.partial import first_steps
from distmatch.diffusion.sampler import SAMPLERS, Callback, Model, Sampler
from distmatch.diffusion.schedule import VP, Schedule, expand
from distmatch.system.errors import UserError
from distmatch.system.extras import need

NAMES = (*SAMPLERS, "pndm")

STABLE_DIFFUSION = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
"""PNDM's settings in Stable Diffusion's own configurations, for models that come without a scheduler."""


def solver(name: str, scheduler: Mapping[str, Any] | None = None, taken: int | None = None) -> Sampler:
    """Return the sampler called `name`; see `sampler.Sampler`.

    Args:
        scheduler: the settings of the model's diffusers scheduler, for `pndm`.
        taken: take only this many of its steps, see `partial.first_steps`; not for `pndm`.

    Raises `UserError` for an unknown name and, when sampling, for `pndm` on a schedule other than `VP`.
    """
    if name not in NAMES:
        raise UserError(f"sampler {name!r} is unknown; expected one of {', '.join(NAMES)}")
    if name not in SAMPLERS:
        return pndm(scheduler or STABLE_DIFFUSION)
    return SAMPLERS[name] if taken is None else first_steps(SAMPLERS[name], taken)


def evaluations(name: str, steps: int, guidance: float | None = 1.0, taken: int | None = None) -> int:
    """Return the network evaluations (NFE) per image. PNDM evaluates its second time twice, Heun its last once.

    Guidance other than 1 needs two per step, and so does a guidance range, `None`. `taken`: only the first steps.
    """
    calls = {"euler": steps, "heun": 2 * steps - 1, "pndm": steps + 1 if steps > 1 else 1}[name]
    if taken is not None and taken < steps:
        calls = {"euler": taken, "heun": 2 * taken}[name]
    return calls if guidance == 1 else 2 * calls


def pndm(settings: Mapping[str, Any]) -> Sampler:
    """Pseudo numerical methods (Liu et al. 2022, arXiv 2202.09778), as implemented in diffusers.

    The solver works on eps or v, whichever the settings' `prediction_type` names, made from `x0` in `x`'s precision.
    """
    velocity = settings.get("prediction_type") == "v_prediction"

    def sample(
        model: Model, schedule: Schedule, z: Tensor, cond: Cond | None, steps: int, callback: Callback | None = None
    ) -> Tensor:
        if type(schedule) is not VP:
            raise UserError(f"pndm is for the schedules of discrete diffusions; this model's is {schedule}. Use heun")
        need("diffusers", by="pndm")
        from diffusers.schedulers.scheduling_pndm import PNDMScheduler

        betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": schedule.spacing}
        if schedule.betas is not None or schedule.spacing == "sigmoid":  # PNDM does not know these by name
            betas = {"trained_betas": schedule.table().tolist()}
        known = {**STABLE_DIFFUSION, **{k: v for k, v in settings.items() if not k.startswith("_")}}
        kind = {"num_train_timesteps": schedule.steps, "prediction_type": "v_prediction" if velocity else "epsilon"}
        scheduler: Any = PNDMScheduler.from_config({**known, **betas, **kind})
        scheduler.set_timesteps(steps)
        x = schedule.prior_std * z
        for i, step in enumerate(scheduler.timesteps.tolist()):
            t = z.new_full((len(z),), float(step))
            x0 = model(x, t, cond)
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            eps = (x - alpha * x0) / sigma
            output = alpha * eps - sigma * x0 if velocity else eps
            x = scheduler.step(output, step, x, return_dict=False)[0]
            if callback is not None:
                callback(i, x, x0)
        return x

    return sample
