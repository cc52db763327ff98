"""Translates the settings of diffusers' schedulers, and makes those that take a student's steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import EDM, VP, Schedule
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.extras import need

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' `prediction_type` -> our name."""


def mathematics(scheduler: Mapping[str, Any], source: str) -> tuple[Schedule, str]:
    """Return the noise schedule of a model with this scheduler, and what its network predicts, by our name.

    The class of the scheduler does not matter, only its betas or, if its name begins with EDM, its sigmas.
    Raises `UserError` for a scheduler with neither, and for settings that leave x0 undetermined.
    """
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise UserError(f"{source}: prediction_type {kind!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
    if str(scheduler.get("_class_name")).startswith("EDM"):
        return _edm(scheduler, kind, source), "edm"
    try:
        schedule = VP.from_scheduler(scheduler)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if schedule.table()[-1] == 1 and kind == "epsilon":
        raise UserError(
            f"{source}: its scheduler's noise ends at alpha = 0 (rescale_betas_zero_snr), where prediction_type "
            "'epsilon' does not determine x0; expected v_prediction or sample"
        )
    return schedule, PREDICTIONS[kind]


def _edm(scheduler: Mapping[str, Any], prediction: str, source: str) -> EDM:
    """Return the schedule of diffusers' EDM schedulers (Karras et al. 2022), as Playground v2.5 has one."""
    for name, plain in {"prediction_type": "epsilon", "sigma_data": 0.5, "sigma_schedule": "karras"}.items():
        if (found := {**scheduler, "prediction_type": prediction}.get(name, plain)) != plain:
            raise UserError(f"{source}: {scheduler['_class_name']} has {name} {found!r}; expected {plain!r}")
    names = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    try:
        return EDM(**{name: scheduler.get(name, default) for name, default in names.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def scheduler_of(student: Denoiser, info: Info) -> Any:
    """Return a scheduler whose steps are those of the student `info`. Raises `UserError` if diffusers has none."""
    if type(student.schedule) is not VP or not info.times:
        raise UserError(
            f"the student's schedule is {student.schedule}; only those of discrete diffusions can be exported"
        )
    prediction = next(theirs for theirs, ours in PREDICTIONS.items() if ours == student.prediction.name)
    return student_scheduler(student.schedule, info.times, prediction)


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
