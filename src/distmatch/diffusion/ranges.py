"""Valid ranges for the numbers of schedules and predictions, which may come from files. Raises `UserError`."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from distmatch.diffusion.betas import SPACINGS
from distmatch.system.errors import UserError

STEPS = 100_000
"""The most steps of a discrete diffusion, whose table is held in memory; all known models have a few thousand."""


def check_edm(low: float, high: float, rho: float) -> None:
    """Check `0 < sigma_min < sigma_max <= 1e9` and `0.1 <= rho <= 100`."""
    _numbers("EDM", sigma_min=low, sigma_max=high, rho=rho)
    if not 0 < low < high <= 1e9:
        raise UserError(f"EDM: sigma_min is {low} and sigma_max {high}; expected 0 < sigma_min < sigma_max")
    if not 0.1 <= rho <= 100:
        raise UserError(f"EDM: rho is {rho}; expected 0.1 to 100, in the paper 7")


def check_vp(spacing: str, start: float, end: float, steps: int) -> None:
    """Check for a known spacing, `beta_start <= beta_end`, and at most `STEPS` steps."""
    if spacing not in SPACINGS:
        raise UserError(f"VP: spacing {spacing!r} is unknown; expected {', '.join(SPACINGS)}, or betas=[...]")
    _numbers("VP", beta_start=start, beta_end=end, steps=steps)
    if not isinstance(steps, int) or steps > STEPS:
        raise UserError(f"VP: steps is {steps}; expected a whole number up to {STEPS:,}")
    if start > end:
        raise UserError(f"VP: beta_start is {start}, above beta_end, {end}; swap them")


def betas_of(values: Iterable[Any]) -> tuple[float, ...]:
    """Return `values` as floats."""
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise UserError(f"VP: betas is {values!r:.80}; expected a list of numbers") from error


def check_betas(betas: Tensor) -> None:
    """Check for at least two betas, all between 0 and 1; the last may be 1."""
    if len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all() or not (betas[:-1] < 1).all():
        raise UserError(f"VP: the betas are {betas}; expected at least two, all between 0 and 1")


def check_flow(low: float, high: float, shift: float) -> None:
    """Check `0 < t_min < t_max <= 1` and `0.01 <= shift <= 100`."""
    _numbers("Flow", t_min=low, t_max=high, shift=shift)
    if not 0 < low < high <= 1:
        raise UserError(f"Flow: t_min is {low} and t_max {high}; expected 0 < t_min < t_max <= 1")
    if not 0.01 <= shift <= 100:
        raise UserError(f"Flow: shift is {shift}; expected 0.01 to 100, in Stable Diffusion 3 3")


def check_sigma_data(value: float) -> None:
    _numbers("prediction", sigma_data=value)
    if value <= 0:
        raise UserError(f"prediction: sigma_data is {value}; expected a positive number, in EDM 0.5")


def _numbers(owner: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{owner}: {name} is {value!r:.80}; expected a number")
