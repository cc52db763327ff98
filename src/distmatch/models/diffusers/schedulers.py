"""Translates the settings of diffusers' schedulers, and makes those that take a student's steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from distmatch.diffusion.schedule import VP
from distmatch.system.errors import UserError
from distmatch.system.extras import need

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' `prediction_type` -> our name."""


def schedule_of(scheduler: Mapping[str, Any], source: str) -> VP:
    """Return the noise schedule of a diffusers scheduler's settings. Raises `UserError` for one without betas."""
    try:
        return VP.from_scheduler(scheduler)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def prediction_of(scheduler: Mapping[str, Any], source: str) -> str:
    """Return what the network of a model with this scheduler predicts."""
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise UserError(f"{source}: prediction_type {kind!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind]


def student_scheduler(schedule: VP, times: tuple[float, ...], prediction: Any) -> Any:
    """Return diffusers' scheduler that takes a student's steps, given their number.

    Raises `UserError` if there is none: `times` must be whole steps, and several must be equal parts of the first one.
    """
    for t in times:
        if t != int(t) or not 0 < t <= schedule.t_max:
            raise UserError(
                f"student.times is {t:g}; diffusers' schedulers know whole steps from 1 to {schedule.t_max:g}"
            )
    first, *later = (int(t) for t in times)
    made = _several_steps(times) if later else _one_step()
    # The first time is the last of the trained ones: the betas after it are cut off.
    betas = schedule.table()[: first + 1].tolist()
    return made(
        num_train_timesteps=first + 1,
        trained_betas=betas,
        clip_sample=False,
        steps_offset=1,  # unused by the spacings below; other values cause a warning
        prediction_type=prediction,
    )


def _one_step() -> Callable[..., Any]:
    """Return DDIM with the single step `G(z) = mu(z, t)`, from the last of its times straight to `x0`."""
    need("diffusers", by="export")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return partial(DDIMScheduler, set_alpha_to_one=True, timestep_spacing="trailing")


def _several_steps(times: tuple[float, ...]) -> Callable[..., Any]:
    """Return the scheduler of latent consistency models (arXiv 2310.04378), whose sampler is DMD2's: it noises each
    `x0` to the next time.
    """
    need("diffusers", by="export")
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    count = len(times)
    part, rest = divmod(int(times[0]) + 1, count)
    equal = [part * (count - k) - 1 for k in range(count)]
    if rest or equal != list(times):
        said = ", ".join(f"{t:g}" for t in times)
        raise UserError(
            f"the student's times are {said}; diffusers' schedulers only take equal parts of a time plus one, such as "
            "999, 749, 499, 249 (student.nfe=4, without shift). Use distmatch.DistilledPipeline"
        )
    # `timestep_scaling` weighs the input against x0 as consistency models do; so large, only x0 is left.
    return partial(LCMScheduler, original_inference_steps=count, timestep_scaling=1e6)
