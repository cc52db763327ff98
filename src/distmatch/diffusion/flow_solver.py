"""The solver that a flow model comes with: diffusers' own scheduler, called as the model's pipeline calls it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.sampler import Callback, Model, Sampler
from distmatch.diffusion.schedule import Flow, Schedule, expand
from distmatch.system.errors import UserError
from distmatch.system.extras import need

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
"""The classes that published flow models name in their settings; both are deterministic and multistep at most."""

PASSED = "passed"
"""Entry of the settings, beside diffusers' own: what the model's pipeline passes to its scheduler.

`sigmas: true`, levels from 1 to 1 / steps in equal steps; `mu`, the logarithm of the shift for the image's size; or
`tokens` of the image, of which together with the number of steps FLUX.2's pipelines compute it.
"""


def flow(settings: Mapping[str, Any]) -> Sampler:
    """Return the sampler by the scheduler with these `settings`, and what they say under `PASSED`.

    It works on the velocity, made from `x0` in `x`'s precision, at the scheduler's own levels. Raises `UserError` for
    another class of schedulers and, when sampling, for a schedule other than `Flow`.
    """
    kind = settings.get("_class_name")
    if kind not in SCHEDULERS:
        raise UserError(
            f"flow is for models with a scheduler of their own, {' or '.join(SCHEDULERS)}; this one has "
            f"{kind or 'none'}. Use euler or heun"
        )

    def sample(
        model: Model, schedule: Schedule, z: Tensor, cond: Cond | None, steps: int, callback: Callback | None = None
    ) -> Tensor:
        if type(schedule) is not Flow:
            raise UserError(f"flow is for flow models; this model's schedule is {schedule}. Use heun")
        need("diffusers", by="flow")
        import diffusers

        scheduler: Any = getattr(diffusers, kind).from_config({k: v for k, v in settings.items() if k != PASSED})
        scheduler.set_timesteps(steps, **_passed(settings.get(PASSED, {}), steps))
        scheduler.set_begin_index(0)
        x = z
        for i, step in enumerate(scheduler.timesteps):
            t = (step / scheduler.config.num_train_timesteps).to(z).expand(len(z))
            x0 = model(x, t, cond)
            x = scheduler.step((x - x0) / expand(t, x), step, x, return_dict=False)[0]
            if callback is not None:
                callback(i, x, x0)
        return x

    return sample


def log_shift(asked: Mapping[str, Any], steps: int) -> float | None:
    """Return `mu`, the logarithm of the shift for so many steps; `None` for a scheduler with a shift of its own."""
    if "tokens" not in asked:
        return asked.get("mu")
    need("diffusers", by="the shift of FLUX.2")
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return compute_empirical_mu(asked["tokens"], steps)


def _passed(asked: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the arguments of `set_timesteps`."""
    found: dict[str, Any] = {} if (mu := log_shift(asked, steps)) is None else {"mu": mu}
    return {**found, "sigmas": np.linspace(1, 1 / steps, steps)} if asked.get("sigmas") else found
