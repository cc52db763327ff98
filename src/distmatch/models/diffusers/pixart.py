"""PixArt-alpha and PixArt-Sigma: a transformer on latents with T5's states, also told the image's size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.schedule import Schedule
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.prompted import PromptedFamily, PromptedTransformer, numbers
from distmatch.models.diffusers.schedulers import mathematics, scheduler_of
from distmatch.models.diffusers.small import libraries
from distmatch.models.diffusers.tiny_flow import t5_tokenizer, tiny_t5, tiny_vae
from distmatch.models.info import Info
from distmatch.system import rng

PIXELS = 8
"""Pixels per latent of its autoencoder, Stable Diffusion's."""


class PixArtTransformer(PromptedTransformer):
    """diffusers' `PixArtTransformer2DModel`: T5's states, and `mask f[B,L]`, 1 at tokens of the text.

    The larger alpha is told the height and width of the image, and their ratio; here these follow from the latents.
    The second half of the output is a variance, which `Prediction.x0` leaves out.
    """

    kind = "PixArtTransformer2DModel"
    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[-2] * PIXELS, x.shape[-1] * PIXELS
        told: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            told["resolution"] = x.new_tensor([[height, width]]).expand(len(x), -1)
            told["aspect_ratio"] = x.new_full((len(x), 1), height / width)
        return self.transformer(x, text, t, added_cond_kwargs=told, encoder_attention_mask=mask, return_dict=False)[0]


class PixArt(PromptedFamily):
    """`PixArtAlphaPipeline`. Prompts are in lower case, as in its pipeline, but not cleaned of web addresses."""

    sampler, steps = "dpm", 20  # the pipeline's defaults
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": 120}  # its `max_sequence_length`
    scaling = ()
    outputs = (1, 2)
    plain = "guidance_scale=1, clean_caption=False, use_resolution_binning=False"
    net = PixArtTransformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"pixart": PixArtTransformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": PixArtTransformer.kind, "vae": "AutoencoderKL"}

    def diffusion(
        self, scheduler: Mapping[str, Any], transformer: Mapping[str, Any], shape: Sequence[int], source: str
    ) -> tuple[Schedule, str, dict[str, Any]]:
        return *mathematics(scheduler, source), dict(scheduler)

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        length = self.limits["tokenizer"]
        return {"text": (length, *numbers(transformer, source, "caption_channels")), "mask": (length,)}

    def student_scheduler(self, student: Denoiser, info: Info) -> Any:
        self._own(student.net)
        return scheduler_of(student, info)

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_pixart(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["mask"] f[B,L]`."""
        text, mask, negative_text, negative_mask = pipe.encode_prompt(
            prompts, negative, device=pipe.device, max_sequence_length=self.limits["tokenizer"]
        )
        if negative:
            return Cond(text=negative_text, extra={"mask": negative_mask.float()})
        return Cond(text=text, extra={"mask": mask.float()})


class PixArtSigma(PixArt):
    """`PixArtSigmaPipeline`."""

    limits: ClassVar[Mapping[str, int]] = {"tokenizer": 300}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_pixart(folder, sigma=True)


def write_tiny_pixart(folder: Path, *, sigma: bool = False, side: int = 8) -> Path:
    """Write a tiny random PixArt to `folder`; return `folder`. Latents 4x8x8, images 64x64.

    Args:
        sigma: PixArt-Sigma instead of alpha.
        side: of the latents; at 128, alpha's network is told the image's size.
    """
    diffusers, _ = libraries()
    with rng.seeded(0):
        transformer = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,  # a third of it for each of height, width and ratio
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=side,
            use_additional_conditions=False if sigma else None,  # None: at the side 128
            caption_channels=16,
        )
        kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
        pipe = kind(
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(),  # PixArt's betas are its defaults: linear, 1e-4 to 0.02
            vae=tiny_vae(scaling_factor=0.13025),
            text_encoder=tiny_t5(width=16),
            tokenizer=t5_tokenizer(),
        )
    pipe.save_pretrained(folder)
    return folder
