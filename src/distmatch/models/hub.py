"""Models in diffusers' format, from a folder, the cache or the hub: the one place that reads them.

Settings are checked before anything is computed: what changes the mathematics is followed or refused by name. Weights
are read from safetensors alone, in full or half precision, and all of them have to be there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from distmatch import limits
from distmatch.errors import UserError
from distmatch.extras import need
from distmatch.models.layout import at_most
from distmatch.plain import read_json
from distmatch.schedule import VP

T = TypeVar("T")

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' `prediction_type` in our words."""

TEXT_ALONE: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "addition_embed_type": (None, "text_time"),
}
"""Settings of a U-Net's further inputs, and their values where it has none but SDXL's."""

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that it can do without."""


@dataclass(frozen=True)
class Settings:
    """What a model's own files say of it.

    Args:
        pipeline: its class in diffusers, one of `PIPELINES`.
        parts: library and class of each of its parts, by name.
        scheduler: its scheduler's settings, as the pipeline uses them.
        schedule, prediction: the same in our words.
        unet: its U-Net's settings.
        shape: (C, h, w) of latents.
        size: (H, W) of images.
    """

    pipeline: str
    parts: dict[str, tuple[str, str]]
    scheduler: dict[str, Any]
    schedule: VP
    prediction: str
    unet: dict[str, Any]
    shape: tuple[int, int, int]
    size: tuple[int, int]


def settings(source: str) -> Settings:
    """The settings of the model `source`. Raises `UserError` where it cannot be had, or is of an unknown kind."""
    index = _config(source, "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise UserError(f"{source} is a {kind}; expected {' or '.join(PIPELINES)}")
    scheduler = _config(source, "scheduler_config.json", "scheduler")
    schedule, prediction = schedule_of(scheduler, source), _prediction(scheduler, source)
    if kind == "StableDiffusionPipeline":  # which sets these, whatever the file says
        scheduler |= {"steps_offset": 1, "clip_sample": False}
    for name, plain in {"thresholding": False, "clip_sample": False, "skip_prk_steps": True}.items():
        if scheduler.get(name, plain) != plain:
            raise UserError(f"{source}: the scheduler's {name} {scheduler[name]!r} is not followed; set it to {plain}")
    unet, vae = _config(source, "config.json", "unet"), _config(source, "config.json", "vae")
    if vae.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{source}: its autoencoder is a {vae.get('_class_name')}; expected AutoencoderKL")
    check_scaling(vae, source, means=kind == "StableDiffusionXLPipeline")
    shape = _latents(unet, vae, source)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    parts = {name: tuple(part) for name, part in index.items() if isinstance(part, list | tuple) and part[0]}
    size = shape[1] * factor, shape[2] * factor
    return Settings(kind, parts, scheduler, schedule, prediction, unet, shape, size)


def schedule_of(scheduler: Mapping[str, Any], source: str) -> VP:
    """The noise schedule of a diffusers scheduler's settings. Raises `UserError` for one without betas."""
    try:
        return VP.from_scheduler(scheduler)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _prediction(scheduler: Mapping[str, Any], source: str) -> str:
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise UserError(f"{source}: prediction_type {kind!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind]


def _latents(unet: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    """(C, h, w) of the latents, where the U-Net takes them, text, and nothing besides."""
    channels = unet.get("in_channels", 4)
    if not channels == unet.get("out_channels", 4) == vae.get("latent_channels", 4):
        raise UserError(
            f"{source}: its U-Net takes {channels} channels and makes {unet.get('out_channels', 4)} of latents of "
            f"{vae.get('latent_channels', 4)}; models of inpainting, depth or instructions (Pix2Pix) are not known here"
        )
    for name, plain in TEXT_ALONE.items():
        if unet.get(name) not in plain:
            raise UserError(f"{source}: its U-Net has {name} {unet[name]!r}; expected a network of text alone")
    side = unet.get("sample_size")
    if side is None:
        raise UserError(f"{source}: unet/config.json has no sample_size; add it: 64 for images of 512 x 512")
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return channels, height, width


def check_scaling(vae: Mapping[str, Any], source: str, means: bool) -> None:
    """Raise `UserError` where an autoencoder's settings scale latents otherwise than the pipeline does.

    Stable Diffusion's has `scaling_factor` alone, that of XL (`means`) also both of `latents_mean`, `latents_std`.
    """
    shift, mean, std = (vae.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
    if shift:
        raise UserError(f"{source}: its autoencoder has shift_factor {shift}, which its pipeline leaves out; set 0")
    if (mean is None) != (std is None) or (mean is not None and not means):
        raise UserError(f"{source}: its autoencoder has latents_mean {mean}, latents_std {std}; expected none")


def network(source: str, name: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The network `name` of the model, of the class `kind`; `name` is empty where the source is that network.

    Raises `UserError` where it cannot be had, or where weights are missing or left over.
    """
    _no_pickles(source, name)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
    if name:
        options["subfolder"] = name
    found, info = _in_any_precision(source, lambda half: kind.from_pretrained(source, **options, **half))
    wrong = [str(key) for faults in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in info[faults]]
    wrong = sorted(key for key in wrong if not key.endswith("position_ids"))  # which older files have, of no effect
    if wrong:
        raise UserError(
            f"{source}: {len(wrong)} weights of {name or kind.__name__} are missing, left over or of another shape, "
            f"first {wrong[0]}; diffusers would go on with random ones. The file is incomplete, or its config.json is "
            "another model's: fetch both again"
        )
    return found


def pipeline(source: str, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    """diffusers' pipeline of the model, quiet; `parts` are given in place of its own, and its arguments.

    Optional parts that the folder lists and lacks are left out. Raises `UserError` where it cannot be had.
    """
    known = settings(source)
    need("diffusers", "transformers", by=source)
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    for name, (_, kind) in known.parts.items():
        if name in parts:
            continue
        if name.startswith("text_encoder"):
            parts[name] = network(source, name, getattr(transformers, kind), dtype)
        elif name in ("unet", "vae"):
            parts[name] = network(source, name, {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name], dtype)
        elif name in OPTIONAL and Path(source).is_dir() and not (Path(source) / name).is_dir():
            parts[name] = None
        elif name == "safety_checker":
            _no_pickles(source, name)
    if "safety_checker" in parts and parts["safety_checker"] is None:
        parts["requires_safety_checker"] = False
    options = {**parts, "use_safetensors": True, "dtype": dtype}
    pipe: Any = _in_any_precision(source, lambda half: DiffusionPipeline.from_pretrained(source, **options, **half))
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None and part.model_max_length > 1_000_000:  # it is not said
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
            part.model_max_length = encoder.config.max_position_embeddings
    return pipe


def fetched(source: str, load: Callable[[], T]) -> T:
    """`load()`; what it raises where `source` cannot be had becomes a `UserError` that says what to do."""
    need("diffusers", "transformers", by=source)
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # or every caption of more than 77 tokens is printed
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for file in [*Path(source).glob("*.json"), *Path(source).glob("*/*config.json")]:
        read_json(file, dict[str, Any])  # diffusers takes them as they are
    try:
        with at_most(limits.limit(limits.TENSORS)):
            return load()
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"diffusers model {source!r} cannot be loaded: {reason:.300}. Give a folder in diffusers' format (with "
            "model_index.json and .safetensors), or a model id that the cache has or the hub can give "
            "(`hf download ID`)"
        ) from error


def _config(source: str, file: str, folder: str | None = None) -> dict[str, Any]:
    """A file of settings, as plain data."""
    need("diffusers", by=source)
    from diffusers.configuration_utils import ConfigMixin

    class File(ConfigMixin):
        config_name = file

    found: Any = fetched(source, lambda: File.load_config(source, subfolder=folder))
    if not isinstance(found, dict):
        raise UserError(f"{source}: {folder or ''}/{file} holds no settings; expected a JSON object")
    return dict(found)


def _in_any_precision(source: str, load: Callable[[dict[str, str]], T]) -> T:
    """What `load` makes of the weights in full precision or, where there are no such files, in half."""

    def either() -> T:
        try:
            return load({})
        except (OSError, ValueError) as error:
            try:
                return load({"variant": "fp16"})
            except (OSError, ValueError):
                raise error from None

    return fetched(source, either)


def _no_pickles(source: str, name: str) -> None:
    """Raise `UserError` where a folder has weights as pickles alone."""
    files = [file.name for file in (Path(source) / name).glob("*")] if Path(source).is_dir() else []
    pickles = [file for file in files if file.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{Path(source) / name} has its weights in {pickles[0]} alone, a pickle, which is a program. If you trust "
            'it, convert it: python -c "from diffusers import DiffusionPipeline as P; P.from_pretrained('
            f"'{source}', use_safetensors=False).save_pretrained('NEW')\""
        )
