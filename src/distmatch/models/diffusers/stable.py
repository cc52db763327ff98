"""Stable Diffusion 1.x, 2.x and XL: their U-Net as one of our networks, and the two families.

Everything is read from the model's own configuration; nothing depends on its name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.diffusers.autoencoder import factor
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.hub import CARD, Count, Settings, config, index, place
from distmatch.models.diffusers.lora import ADAPTED
from distmatch.models.diffusers.schedulers import mathematics, scheduler_of
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.guidance import CHANNELS, GuidanceInput, embed_guidance
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting, read_json

TOKENS = 77
"""Length of CLIP's texts, in tokens."""

TEXT_ALONE: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
}
"""Settings for further inputs of a U-Net, and the values that mean it has none except SDXL's."""


PLAIN = {"thresholding": False, "clip_sample": False, "skip_prk_steps": True}
"""Scheduler settings that change what is sampled, and the only values supported."""


class StableUNet(nn.Module):
    """`(x f[B,4,h,w], t f[B], cond) -> f[B,4,h,w]`: diffusers' `UNet2DConditionModel`.

    `cond.text f[B,L,C]` are the text encoders' states; without text the network uses its own `null_text`, the states of
    the empty prompt, so that it can be guided. SDXL's further conditions are `cond.extra["pooled"] f[B,P]` and
    `cond.extra["size"] f[B,6]`.

    Args:
        unet: its configuration, or diffusers' own network.
        text: (L, C).
        pooled: P, for SDXL.
        guidance: it also takes the scale `cond.extra["guidance"] f[B]`; see `models.guidance`.
    """

    adapted: ClassVar[tuple[str, ...]] = ADAPTED
    bf16_throughout: ClassVar[bool] = True

    computed: ClassVar[tuple[str, ...]] = ("null_text", "null_pooled")
    """What is no weight of its own: these come from the text encoders, whose `fingerprint` counts instead."""

    def __init__(self, unet: Any, text: tuple[int, int], pooled: int = 0, guidance: bool = False):
        super().__init__()
        need("diffusers", by="Stable Diffusion")
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.unet: Any = unet if isinstance(unet, nn.Module) else UNet2DConditionModel.from_config(dict(unet))
        self.unet.to(memory_format=torch.channels_last)
        self.null_text: Tensor
        self.null_pooled: Tensor
        self.register_buffer("null_text", torch.zeros(1, *text))
        self.register_buffer("null_pooled", torch.zeros(1, pooled))
        self.guidance = guidance
        if guidance:
            embedding = self.unet.time_embedding
            embedding.cond_proj = GuidanceInput(embedding.linear_1.in_features)
            self.unet.register_to_config(time_cond_proj_dim=CHANNELS)

    @property
    def config(self) -> dict[str, Any]:
        unet = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        text, pooled = list(self.null_text.shape[1:]), self.null_pooled.shape[1]
        return {"unet": unet, "text": text, "pooled": pooled, "guidance": self.guidance}

    def set_null(self, cond: Cond) -> None:
        """Take over the condition of the empty prompt: one row."""
        assert cond.text is not None
        self.null_text = cond.text.to(self.null_text)  # in the encoder's own length
        if "pooled" in cond.extra:
            self.null_pooled = cond.extra["pooled"].to(self.null_pooled)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        cond = cond or Cond()
        absent = cond.text is None
        text = self.null_text.expand(len(x), -1, -1) if cond.text is None else cond.text
        added = None
        if self.null_pooled.shape[1]:
            pooled = self.null_pooled.expand(len(x), -1) if absent else cond.extra["pooled"]
            added = {"text_embeds": pooled.to(x.dtype), "time_ids": cond.extra["size"]}
        scale = None
        if self.guidance:
            scale = embed_guidance(cond.extra["guidance"], CHANNELS).to(x.dtype)
        return self.unet(x, t, text.to(x.dtype), timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0]


class StableDiffusion(DiffusersFamily):
    """Stable Diffusion 1.x and 2.x."""

    sampler, steps = "pndm", 50
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"stable": StableUNet}
    kinds: ClassVar[Mapping[str, str]] = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    untouched: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    scheduler: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    """Settings that its pipeline imposes on the scheduler, whatever the file says."""
    scaling = ()

    def settings(self, source: str) -> Settings:
        _, parts = index(source)
        scheduler = config(source, "scheduler_config.json", "scheduler")
        schedule, prediction = mathematics(scheduler, source)
        scheduler |= self.scheduler
        for name, plain in PLAIN.items():
            if scheduler.get(name, plain) != plain:
                value = scheduler[name]
                raise UserError(f"{source}: the scheduler's {name} {value!r} is not followed; set it to {plain}")
        unet, vae = config(source, "config.json", "unet"), config(source, "config.json", "vae")
        self.check_autoencoder(vae, source)
        pixels = factor(vae, source)
        shape = _latents(unet, vae, source)
        size = (shape[1] * pixels, shape[2] * pixels)
        return Settings(parts, scheduler, schedule, prediction, unet, shape, size)

    def build(self, source: str, known: Settings, network: Any) -> StableUNet:
        unet = known.network
        time = unet.get("addition_time_embed_dim")
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * time if time else 0
        return StableUNet(network, (TOKENS, unet.get("cross_attention_dim", 1280)), pooled)

    def info(self, source: str, known: Settings) -> Info:
        found = super().info(source, known)
        mark = Path(place(source)) / CARD
        made = read_json(mark, dict[str, Any]) if mark.exists() else {}
        if "teach-text" in made:
            found.card["teach-text"] = fitting(made["teach-text"], f"{mark}: teach-text", dict[str, Any])
        return found

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_sd(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        return Cond(text=_states(pipe, prompts, negative)[negative])

    def way_of_encoding(self, known: Settings) -> str:
        return ""  # as earlier versions counted it

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond:
        return Cond(text=torch.empty(n, *_stable(net).null_text.shape[1:]))

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        net, scheduler = _stable(student.net), scheduler_of(student, info)
        theirs, width = self.settings(source), "cross_attention_dim"
        here, there = (info.shape[0], net.unet.config[width]), (theirs.shape[0], theirs.network.get(width))
        if here != there:
            raise UserError(
                f"{source} makes latents of {there[0]} channels from texts {there[1]} wide, the student of {here[0]} "
                f"from {here[1]}; expected the model that it was made from, {info.source}"
            )
        pipe = self.pipeline(source, dtype, unet=net.unet)
        self.merge_text(pipe, theirs, info)
        pipe.register_modules(scheduler=scheduler)
        return pipe.to(dtype=dtype)  # the source's files may mix precisions

    def student_scheduler(self, student: Denoiser, info: Info) -> Any:
        if _stable(student.net).guidance:
            raise UserError("the student takes a guidance scale, which a LoRA cannot carry; export diffusers")
        return scheduler_of(student, info)


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, pooled text, and the image size as a condition."""

    untouched: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    scheduler: ClassVar[Mapping[str, Any]] = {}
    scaling = ("latents_mean", "latents_std")

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_sd(folder, kind="sdxl")

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text`, `extra["pooled"] f[B,P]` and `extra["size"] f[B,6]`, for images not scaled or cropped."""
        text, negative_text, pooled, negative_pooled = _states(pipe, prompts, negative)
        size = torch.tensor([*known.size, 0, 0, *known.size], device=pipe.device, dtype=torch.float32)
        size = size.expand(len(prompts), -1)
        if negative:
            return Cond(text=negative_text, extra={"pooled": negative_pooled, "size": size})
        return Cond(text=text, extra={"pooled": pooled, "size": size})

    def way_of_encoding(self, known: Settings) -> str:
        return str(known.size)

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond:
        pooled = torch.empty(n, _stable(net).null_pooled.shape[1])
        return Cond(text=super().example_cond(net, info, n).text, extra={"pooled": pooled, "size": torch.empty(n, 6)})


def _stable(net: nn.Module) -> StableUNet:
    if not isinstance(net, StableUNet):
        raise UserError(f"the network {type(net).__name__} is none of Stable Diffusion's")
    return net


def _states(pipe: Any, prompts: list[str], negative: bool) -> Any:
    """Return (text, negative text) and for SDXL also (pooled, negative pooled); negative ones only if asked for."""
    return pipe.encode_prompt(
        prompts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=negative
    )


def _latents(unet: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents. Raises `UserError` if the U-Net takes anything but latents and text."""
    channels = unet.get("in_channels", 4)
    if not channels == unet.get("out_channels", 4) == vae.get("latent_channels", 4):
        raise UserError(
            f"{source}: its U-Net takes {channels} channels and makes {unet.get('out_channels', 4)} of latents of "
            f"{vae.get('latent_channels', 4)}; models of inpainting, depth or instructions (Pix2Pix) are not known here"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{source}: its U-Net takes a guidance scale (time_cond_proj_dim {unet['time_cond_proj_dim']}): guidance "
            "was distilled into it, as into latent consistency models. Take the model that it was made from"
        )
    for name, plain in TEXT_ALONE.items():
        if unet.get(name) not in plain:
            raise UserError(f"{source}: its U-Net has {name} {unet[name]!r}; expected a network of text alone")
    side = unet.get("sample_size")
    if side is None:
        raise UserError(f"{source}: unet/config.json has no sample_size; add it: 64 for images of 512 x 512")
    both = side if isinstance(side, list | tuple) else (side, side)
    where = f"{source}: unet/config.json: in_channels and sample_size"
    return fitting((channels, *both), where, tuple[Count, Count, Count])
