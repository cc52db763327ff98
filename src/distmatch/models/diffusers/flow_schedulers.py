"""Translates the settings of flow models' schedulers, and makes those that take a student's steps."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distmatch.diffusion.flow_solver import SCHEDULERS, log_shift
from distmatch.diffusion.schedule import Flow
from distmatch.diffusion.spacing import shifted
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting

PLAIN = {
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": False, "invert_sigmas": False},
    "DPMSolverMultistepScheduler": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "algorithm_type": "dpmsolver++",
        "thresholding": False,
    },
}
"""Settings that change what is sampled, and the only values supported."""

DEFAULTS = {
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "use_flow_sigmas": False,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "thresholding": False,
}
"""What a scheduler does whose settings lack one of these."""

LEVELS = 1000
"""Noise levels that the schedulers of published flow models have; the lowest is one part of so many."""

SHIFTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""diffusers' settings for a shift that depends on the image's size."""


def own_schedule(scheduler: Mapping[str, Any], passed: Mapping[str, Any], steps: int | None, source: str) -> Flow:
    """Return the schedule of a flow model.

    Args:
        passed: what its pipeline passes to the scheduler, see `flow_solver.PASSED`.
        steps: for which a shift is taken that depends on their number.

    Raises `UserError` for a scheduler or a setting that is not followed.
    """
    kind = str(scheduler.get("_class_name"))
    if kind not in SCHEDULERS:
        raise UserError(f"{source}: its scheduler is a {kind}; expected {' or '.join(SCHEDULERS)}")
    for name, plain in PLAIN[kind].items():
        value = scheduler.get(name, DEFAULTS[name])
        if value != plain:
            raise UserError(f"{source}: the scheduler's {name} {value!r} is not followed; expected {plain}")
    mu = log_shift(passed, steps or 1)
    if mu is None:
        shift = _number(scheduler, "shift" if kind.startswith("Flow") else "flow_shift", 1.0, source)
    else:
        shift = mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
    lowest = scheduler.get("shift_terminal") or shifted(1 / LEVELS, shift)
    try:
        return Flow(lowest, 1.0, shift)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def dynamic(scheduler: Mapping[str, Any], tokens: int, steps: int | None, source: str) -> dict[str, Any]:
    """Return what a pipeline passes for a shift that depends on the image's `tokens`: `mu`, linear in them; or, if it
    also depends on the number of steps, the tokens themselves.
    """
    if steps is not None:
        return {"tokens": tokens}
    few, many, low, high = (_number(scheduler, name, default, source) for name, default in SHIFTS.items())
    return {"mu": low + (high - low) * (tokens - few) / (many - few)}


def _number(scheduler: Mapping[str, Any], name: str, default: float, source: str) -> float:
    return fitting(scheduler.get(name, default), f"{source}: scheduler_config.json: {name}", float)


def flow_student_scheduler(times: tuple[float, ...], sigmas: bool) -> Any:
    """Return diffusers' scheduler that takes a student's steps, given their number.

    Its stochastic sampling is DMD2's: it noises each `x0` to the next level, and ends at the last `x0`.

    Args:
        times: from 1 down, in equal steps before some shift, as `student.nfe` makes them.
        sigmas: whether the pipeline passes levels in equal steps, from 1 to 1 / steps.

    Raises `UserError` if the scheduler cannot take these times.
    """
    need("diffusers", by="export")
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    count, said = len(times), ", ".join(f"{t:g}" for t in times)
    if times[0] != 1:
        raise UserError(f"the student's times are {said}; pipelines of flow models start at 1. Use student.nfe")
    if count == 1:
        return FlowMatchEulerDiscreteScheduler()

    def made(shift: float) -> tuple[Any, list[float]]:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(
            shift=shift, shift_terminal=times[-1], stochastic_sampling=True
        )
        scheduler.set_timesteps(count, sigmas=np.linspace(1, 1 / count, count) if sigmas else None)
        return scheduler, scheduler.sigmas.tolist()[:-1]

    # First and last time are right with every shift. The second rises with it, and tells which shift it is.
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if made(math.exp(middle))[1][1] < times[1] else (low, middle)
    scheduler, found = made(1.0 if count == 2 else math.exp(low))
    if max(abs(a - b) for a, b in zip(found, times, strict=True)) > 1e-5:
        raise UserError(
            f"the student's times are {said}; diffusers' scheduler of flow models takes equal steps before a shift, "
            "such as 1, 0.9, 0.75, 0.5 (student.nfe=4). Use distmatch.DistilledPipeline"
        )
    return scheduler
