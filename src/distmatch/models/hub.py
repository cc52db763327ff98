"""Models in diffusers' format, from a folder, the cache or the hub: their settings, and what to do without them."""

from collections.abc import Callable
from typing import Any, TypeVar

from distmatch.extras import need
from distmatch.schedule import VP

T = TypeVar("T")


def fetched(source: str, load: Callable[[], T]) -> T:
    """`load()`; what it raises where `source` cannot be had becomes a `ValueError` that says what to do."""
    need("diffusers", "transformers", by=source)
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # or every caption of more than 77 tokens is printed
    transformers_logging.disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"diffusers model {source!r} cannot be loaded: {reason}. Give a folder in diffusers' format (with "
            "model_index.json), or a model id that the cache has or the hub can give (`hf download ID`)"
        ) from error


def scheduler_config(source: str) -> dict[str, Any]:
    """The scheduler's settings as plain data."""
    need("diffusers", by=source)
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config: Any = fetched(source, lambda: DDIMScheduler.load_config(source, subfolder="scheduler"))
    return dict(config)


def schedule_of(scheduler: dict[str, Any], source: str) -> VP:
    """The noise schedule of a diffusers scheduler's settings. Raises `ValueError` for one that is not DDPM's."""
    spacing = scheduler.get("beta_schedule", "linear")
    if spacing not in ("linear", "scaled_linear") or scheduler.get("trained_betas") is not None:
        raise ValueError(f"{source}: beta_schedule {spacing!r} is not known here; expected linear or scaled_linear")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"{source}: rescale_betas_zero_snr ends at alpha = 0, where x0 cannot be told from eps")
    return VP(
        float(scheduler["beta_start"]), float(scheduler["beta_end"]), int(scheduler["num_train_timesteps"]), spacing
    )


def image_side(source: str) -> int:
    """Side of the images in pixels: that of the latents times the autoencoder's factor."""
    need("diffusers", by=source)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: Any = fetched(source, lambda: UNet2DConditionModel.load_config(source, subfolder="unet"))
    vae: Any = fetched(source, lambda: AutoencoderKL.load_config(source, subfolder="vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
