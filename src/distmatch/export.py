"""Students in diffusers' format: a pipeline of its own, or a LoRA for the teacher's.

Both come with a scheduler that makes diffusers' one step ours: DDIM (arXiv 2010.02502) that ends at the student's time
`t`, counted down to a last step that returns `x0` as it is.
"""

import math
from pathlib import Path
from typing import Any

import torch

from distmatch.extras import need
from distmatch.models.folder import Info, load_model
from distmatch.models.hub import fetched
from distmatch.models.library import model_folder
from distmatch.models.pretrained import PREDICTIONS
from distmatch.models.stable import StableUNet, write_adapters
from distmatch.schedule import VP
from distmatch.screen import console


def export_diffusers(run: str, out: Path, source: str | None = None, half: bool = False) -> None:
    """`distmatch export diffusers`: the student `run` as a folder that `DiffusionPipeline.from_pretrained` opens.

    `pipe(prompt, num_inference_steps=1, guidance_scale=1)` makes the student's image from its noise, adapters merged.
    Raises `ValueError` where the student is none of a model in diffusers' format.
    """
    need("diffusers", "transformers", by="export")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    net, scheduler, info = _student(run)
    source, dtype = source or info.source, torch.float16 if half else torch.float32
    pipeline: Any = fetched(
        source, lambda: DiffusionPipeline.from_pretrained(source, unet=net.merged().unet, torch_dtype=dtype)
    )
    pipeline.register_modules(scheduler=scheduler)
    pipeline.to(dtype=dtype)  # all of one kind, whatever the source's files have
    pipeline.save_pretrained(out)
    scale = "guidance_scale=1" if info.guidance is None else f"guidance_scale={info.guidance[1]:g}"
    console.print(
        f"In {out}. Next: DiffusionPipeline.from_pretrained({str(out)!r})(prompt, num_inference_steps=1, {scale})"
    )


def export_lora(run: str, out: Path) -> None:
    """`distmatch export lora`: the adapters of the student `run` and its scheduler, for the teacher's pipeline.

    Raises `ValueError` where the student has no adapters.
    """
    need("diffusers", "transformers", "peft", by="export")
    net, scheduler, info = _student(run)
    if not net.lora:
        raise ValueError(f"{run} has no adapters: its student was trained without student.lora_rank; export diffusers")
    if net.guidance:
        raise ValueError(f"{run} takes a guidance scale, which a LoRA cannot carry; export diffusers")
    write_adapters(net, out)
    scheduler.save_pretrained(out / "scheduler")
    console.print(
        f"In {out}. Next: pipe = DiffusionPipeline.from_pretrained({info.source!r}); "
        f"pipe.load_lora_weights({str(out)!r}); pipe.scheduler = DDIMScheduler.from_pretrained({str(out)!r}, "
        'subfolder="scheduler"); pipe(prompt, num_inference_steps=1, guidance_scale=1)'
    )


def _student(run: str) -> tuple[StableUNet, Any, Info]:
    """The student's network, its scheduler in diffusers, and what goes with it."""
    denoiser, info = load_model(model_folder(run, "student"))
    if type(denoiser.net) is not StableUNet or type(denoiser.schedule) is not VP or info.t is None:
        raise ValueError(f"{run} is no student of a model in diffusers' format; nothing else can be exported to it")
    prediction = next(theirs for theirs, ours in PREDICTIONS.items() if ours == denoiser.prediction.name)
    return denoiser.net, one_step_scheduler(denoiser.schedule, info.t, prediction), info


def one_step_scheduler(schedule: VP, t: float, prediction: Any) -> Any:
    """diffusers' DDIM with the one step of `G(z) = mu(z, t)`: at `t`, straight to `x0`.

    With `trailing` spacing, a single step is at the last of the trained times. The schedule is cut behind `t`: what is
    left of it has the same betas, because both spacings are straight lines in the square root of beta or in beta.

    Raises `ValueError` for a `t` that is no whole step.
    """
    need("diffusers", by="export")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if t != int(t) or not 0 < t <= schedule.t_max:
        raise ValueError(f"student.t is {t}; diffusers' schedulers know whole steps from 1 to {schedule.t_max:g}")
    power = 1 if schedule.spacing == "linear" else 2
    low, high = schedule.beta_start ** (1 / power), schedule.beta_end ** (1 / power)
    end = math.pow(low + (high - low) * t / schedule.t_max, power)
    return DDIMScheduler(
        num_train_timesteps=int(t) + 1,
        beta_start=schedule.beta_start,
        beta_end=end,
        beta_schedule=schedule.spacing,
        clip_sample=False,
        steps_offset=1,  # not used by this spacing; others are warned of
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
