"""FLUX.2 klein (base): Qwen3's states from three layers, latents normalised patch by patch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.autoencoder import Decoder, ImageEncoder
from distmatch.models.diffusers.flow import PatchedFamily, positions
from distmatch.models.diffusers.hub import Settings, config
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_patched import write_tiny_flux2
from distmatch.system.errors import UserError

TOKENS = 512
"""Length of a text, in tokens, with the chat around it: the pipeline's `max_sequence_length`."""

CHAT = 16
"""Tokens of Qwen3's chat around a prompt, at most."""


class Flux2Transformer(PromptedTransformer):
    """diffusers' `Flux2Transformer2DModel` without a guidance scale: `x f[B,128,h,w]`, patches of 2x2 latents."""

    kind = "Flux2Transformer2DModel"
    image_output = 1
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("to_qkv_mlp_proj", "attn.to_out"),  # of the one-stream blocks
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        places = x.new_zeros(text.shape[1], 4)
        places[:, 3] = torch.arange(text.shape[1], device=x.device)
        image = positions(rows, columns, 4, x)
        made = self.transformer(x.flatten(2).mT, text, t, image, places, return_dict=False)[0]
        return made.mT.unflatten(2, (rows, columns))


class Flux2Klein(PatchedFamily):
    """`Flux2KleinPipeline`: the base models. The others, `is_distilled`, are students already."""

    steps = 50  # the pipeline's default
    empirical = 50
    scaling = ()
    net = Flux2Transformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"flux2": Flux2Transformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": Flux2Transformer.kind, "vae": "AutoencoderKLFlux2"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": TOKENS - CHAT}

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        if transformer.get("guidance_embeds", True):
            raise UserError(f"{source}: its transformer takes a guidance scale (guidance_embeds); klein's does not")

    def channels(self, transformer: Mapping[str, Any], source: str) -> int:
        return numbers(transformer, source, "in_channels")[0] // 4

    def latents(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int, int]:
        channels, height, width, pixels = super().latents(transformer, vae, source)
        return 4 * channels, height // 2, width // 2, 2 * pixels

    def patch(self, network: Mapping[str, Any], source: str) -> int:
        return 1  # its latents are patches already

    def distilled(self, source: str, lora: str = "") -> str | None:
        if config(source, "model_index.json").get("is_distilled"):
            return "its model_index.json says is_distilled"
        return super().distilled(source, lora)

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"text": (TOKENS, *numbers(transformer, source, "joint_attention_dim"))}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_flux2(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text`. Its filling counts as text: the transformer has no mask."""
        return Cond(text=pipe.encode_prompt(prompts, pipe.device, max_sequence_length=TOKENS)[0])

    def decoder(self, source: str, checkpointing: bool = False, weights: bool = True) -> Decoder:
        return PatchDecoder(self._autoencoder(source, weights), checkpointing)

    def image_encoder(self, source: str) -> ImageEncoder:
        return PatchEncoder(self._autoencoder(source))


class PatchDecoder(Decoder):
    """A decoder of patches f[B,4C,h,w], which batch statistics of the autoencoder normalise."""

    def __init__(self, vae: Any, checkpointing: bool = False):
        super().__init__(vae, checkpointing)
        self.channels *= 4

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = _moments(self.vae)
        return F.pixel_shuffle(latents * std + mean, 2)


class PatchEncoder(ImageEncoder):
    """The inverse of `PatchDecoder`."""

    def __init__(self, vae: Any):
        super().__init__(vae)
        self.stride *= 2

    def encode(self, image: Tensor, noise: Tensor) -> Tensor:
        mean, std = _moments(self.vae)
        return (F.pixel_unshuffle(self.sample(image, F.pixel_shuffle(noise, 2)), 2) - mean) / std


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean[:, None, None], variance.sqrt()[:, None, None]
