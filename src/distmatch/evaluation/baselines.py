"""The methods that a text-to-image student is compared with, run by diffusers' own pipelines.

They are the teacher with PNDM, fast solvers and LCM-LoRA (DMD, arXiv 2311.18828, Appendix C.3). Each turns prompts and
given noise into 8-bit images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distmatch.data.imaging import to_uint8
from distmatch.diffusion.solvers import STABLE_DIFFUSION
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.hub import index
from distmatch.models.diffusers.stable import StableDiffusion
from distmatch.pipeline import NoiseOf, Pipeline
from distmatch.system import digests, rng
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.finite import check_images

SOLVERS = {"DPM-Solver++ 4": ("DPMSolverMultistepScheduler", 4), "UniPC 4": ("UniPCMultistepScheduler", 4)}
"""The paper's fast solvers, with diffusers' defaults (Appendix C.3), and their number of steps."""

MODELS_OWN = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps"),
)
"""Settings that a solver takes over from the model's own scheduler; all others are the solver's."""

LCM_STEPS = (1, 2, 4)
PNDM_STEPS = 50


@dataclass(frozen=True)
class Method:
    """A column: `make(prompts, z f32[B,C,H,W], noise_of) -> pixels u8[B,3,H',W']` on the CPU, in `nfe` evaluations per
    image. `noise_of` is for students of several steps, see `pipeline.NoiseOf`.

    Evaluations of the U-Net are counted: guidance costs two per step.
    """

    name: str
    nfe: int
    make: Callable[..., Tensor]


def methods(
    pipe: Any, merged: Any | None, student: Pipeline | None, guidance: float, dtype: torch.dtype = torch.float32
) -> list[Method]:
    """Return the columns from left to right as in Figure 6: the student, the fast methods, the teacher.

    Args:
        pipe, merged: made by `load_teacher` and `load_lora`.
        dtype: precision in which the student's network computes, by autocast.
    """
    columns = []
    if student is not None:
        ours = partial(_ours, student, guidance if student.info.guidance else None, dtype)
        columns.append(Method(f"student {student.nfe}", student.nfe, ours))
    columns += [solver(pipe, name, kind, steps, guidance) for name, (kind, steps) in SOLVERS.items()]
    if merged is not None:
        columns += [solver(merged, f"LCM-LoRA {steps}", "LCMScheduler", steps, 1.0) for steps in LCM_STEPS]
    return [*columns, solver(pipe, f"PNDM {PNDM_STEPS}", "PNDMScheduler", PNDM_STEPS, guidance)]


def load_teacher(teacher: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the diffusers pipeline called `teacher`, without progress bars or changes to finished images.

    Raises `UserError` for a family whose own solvers are not those of `SOLVERS`.
    """
    family = family_in(teacher)
    if not isinstance(family, StableDiffusion):
        raise UserError(
            f"{teacher} is a {index(teacher)[0]}; compare runs the solvers of Stable Diffusion (1.x, 2.x, XL). Look at "
            "the images of others with `distmatch sample`, with and without --teacher"
        )
    return family.pipeline(teacher, dtype, **family.untouched).to(device)


def load_lora(teacher: str, lora: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return another copy of the teacher with the LoRA called `lora` merged into its weights, as it would be served."""
    pipe = load_teacher(teacher, device, dtype)
    try:
        pipe.load_lora_weights(lora, use_safetensors=True)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(
            f"LoRA {lora!r} cannot be loaded into {teacher}: {str(error).splitlines()[0]:.300}. Expected "
            "pytorch_lora_weights.safetensors or its folder, or a name on Hugging Face: "
            "latent-consistency/lcm-lora-sdv1-5 for Stable Diffusion 1.5, latent-consistency/lcm-lora-sdxl for SDXL"
        ) from error
    return pipe


def solver(pipe: Any, name: str, kind: str, steps: int, guidance: float) -> Method:
    """Return diffusers' `pipe` with its scheduler `kind` and `steps` steps; PNDM evaluates its first step twice."""
    of_the_model = {name: pipe.scheduler.config[name] for name in MODELS_OWN if name in pipe.scheduler.config}
    plain = STABLE_DIFFUSION if kind == "PNDMScheduler" else {}
    scheduler = getattr(_diffusers(), kind).from_config({**plain, **of_the_model})
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps)

    def make(prompts: list[str], z: Tensor, _: NoiseOf | None = None) -> Tensor:
        pipe.scheduler = scheduler
        images = pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=z.to(pipe.device, pipe.unet.dtype),
            generator=generators(z),
            output_type="pt",
        ).images
        check_images(images)
        return (images.float() * 255).round().to(torch.uint8).cpu()

    return Method(name, calls * (1 if guidance == 1 else 2), make)


def generators(z: Tensor) -> list[torch.Generator]:
    """Return one generator per image, for the noise LCM adds between steps: a function of `z`, whatever the batch."""
    seeds = [rng.key("between steps", digests.digest(row)) for row in z]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def digest(network: torch.nn.Module) -> str:
    """Return the SHA-256 of the network's weights, sorted by name."""
    return digests.weights_digest(dict(sorted(network.state_dict().items())))


def _ours(
    student: Pipeline,
    guidance: float | None,
    dtype: torch.dtype,
    prompts: list[str],
    z: Tensor,
    noise_of: NoiseOf | None = None,
) -> Tensor:
    cond = student.condition(len(prompts), prompts=prompts, guidance_scale=guidance)
    with torch.inference_mode():
        with torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32):
            x = student.make(z.to(student.device), cond, noise_of or student.noise_of(0, range(len(z))))
        images = student.decoded(x.float())  # some decoders overflow in fp16
        check_images(images)
        return to_uint8(images).cpu()


def _diffusers() -> Any:
    need("diffusers", "transformers", by="a comparison")
    return import_module("diffusers")
