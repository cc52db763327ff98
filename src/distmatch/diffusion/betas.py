"""Betas of discrete diffusions, by diffusers' names or from the settings of its schedulers."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distmatch.system.errors import UserError

SPACINGS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def spaced_betas(spacing: str, start: float, end: float, steps: int) -> Tensor:
    """Return the betas f64[steps] of one of diffusers' `beta_schedule`s.

    `linear` is DDPM's, `scaled_linear` Stable Diffusion's (linear in sqrt(beta)), `sigmoid` GeoDiff's.
    `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672, Eq. 17), capped at 0.999;
    it ignores `start` and `end`.
    """
    match spacing:
        case "linear":
            return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
        case "sigmoid":
            return torch.linspace(-6, 6, steps, dtype=torch.float64, device="cpu").sigmoid() * (end - start) + start
        case _:
            angle = (torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps + 0.008) / 1.008 * math.pi / 2
            alpha_bar = angle.cos() ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


@cache
def log_alphas(vp: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `log alpha_t f[T] = 1/2 sum_{s<=t} log(1 - beta_s)` of a `schedule.VP`, summed in float64.

    The last beta may be 1. Its log alpha is kept finite, so that interpolation is; in float32, alpha is 0 all the same.
    """
    return (0.5 * torch.log1p(-vp.table()).cumsum(0)).clamp(min=-200).to(device, dtype)


def zero_snr(betas: Tensor) -> Tensor:
    """Return betas f64[T] changed so that alpha ends at 0 (Lin et al. 2023, arXiv 2305.08891, Algorithm 1)."""
    alpha = (0.5 * torch.log1p(-betas).cumsum(0)).exp()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return 1 - torch.cat([alpha[:1], alpha[1:] / alpha[:-1]]) ** 2


MARGINALS = {
    "snr_shift_scale": (1.0, "shifts the signal-to-noise ratio"),
    "use_flow_sigmas": (False, "is flow matching, which has no betas"),
    "timestep_type": ("discrete", "is a network that takes noise levels, not steps"),
}
"""Settings of diffusers' schedulers that change what the betas mean: the harmless value, and what others mean."""


def beta_settings(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `schedule.VP` from the settings of a diffusers scheduler.

    Raises `UserError` if it has no betas (flow matching, EDM), or depends on more than its betas.
    """
    kind = scheduler.get("_class_name", "this scheduler")
    for name, (plain, meaning) in MARGINALS.items():
        if scheduler.get(name) not in (None, plain):
            raise UserError(f"{kind}: {name} {scheduler[name]!r} {meaning}; expected {plain!r}")
    if scheduler.get("trained_betas") is not None:
        return {"betas": scheduler["trained_betas"]}
    spacing = scheduler.get("beta_schedule")
    if spacing is None:
        raise UserError(
            f"{kind} has no betas: its model is of flow matching, EDM or another kind that is not known here; expected "
            "a scheduler with a beta_schedule, such as DDIMScheduler or PNDMScheduler"
        )
    if spacing not in SPACINGS:
        raise UserError(f"{kind}: beta_schedule {spacing!r} is not known here; expected one of {', '.join(SPACINGS)}")
    if absent := [name for name in ("num_train_timesteps", "beta_start", "beta_end") if name not in scheduler]:
        raise UserError(f"{kind} says no {absent[0]}; add it to its settings")
    ends = {name: scheduler[name] for name in ("beta_start", "beta_end")}
    return {**ends, "steps": scheduler["num_train_timesteps"], "spacing": spacing}
