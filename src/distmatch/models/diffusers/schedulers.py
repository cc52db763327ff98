"""Translates the settings of diffusers' schedulers, and makes one whose single step is a student's."""

from collections.abc import Mapping
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


def one_step_scheduler(schedule: VP, t: float, prediction: Any) -> Any:
    """Return diffusers' DDIM with the single step `G(z) = mu(z, t)`: from `t` straight to `x0`.

    With `trailing` spacing, a single step is at the last of the trained times: the betas after `t` are cut off.

    Raises `UserError` if `t` is not a whole step.
    """
    need("diffusers", by="export")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if t != int(t) or not 0 < t <= schedule.t_max:
        raise UserError(f"student.times is {t}; diffusers' schedulers know whole steps from 1 to {schedule.t_max:g}")
    return DDIMScheduler(
        num_train_timesteps=int(t) + 1,
        trained_betas=schedule.table()[: int(t) + 1].tolist(),
        clip_sample=False,
        steps_offset=1,  # unused by this spacing; other values cause a warning
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
