"""Stable Diffusion 3 and 3.5: two CLIP texts beside a T5 text, joint attention, latents of 16 channels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.flow import FlowFamily
from distmatch.models.diffusers.hub import Settings, config, index
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_flow import write_tiny_sd3
from distmatch.system.errors import UserError
from distmatch.system.plain import fitting

T5_TOKENS = 256
"""Length of T5's part of a text, in tokens: the pipeline's `max_sequence_length`."""


class SD3Transformer(PromptedTransformer):
    """diffusers' `SD3Transformer2DModel`: states of the three texts, and CLIP's `pooled f[B,P]`."""

    kind = "SD3Transformer2DModel"
    image_output = 1
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(x, text, pooled, 1000 * t, return_dict=False)[0]


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5."""

    steps = 28  # the pipeline's default
    net = SD3Transformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"sd3": SD3Transformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": SD3Transformer.kind, "vae": "AutoencoderKL"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer_3": T5_TOKENS}  # CLIP's, shorter, only add to it

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        if "text_encoder_3" not in index(source)[1]:
            raise UserError(f"{source}: it comes without text_encoder_3, T5; its states are part of every text here")

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        clip = config(source, "config.json", "text_encoder").get("max_position_embeddings", 77)
        clip = fitting(clip, f"{source}: text_encoder/config.json: max_position_embeddings", int)
        width, pooled = numbers(transformer, source, "joint_attention_dim", "pooled_projection_dim")
        return {"text": (clip + T5_TOKENS, width), "pooled": (pooled,)}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_sd3(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["pooled"] f[B,P]`."""
        text, negative_text, pooled, negative_pooled = pipe.encode_prompt(
            prompts, None, None, device=pipe.device, do_classifier_free_guidance=negative, max_sequence_length=T5_TOKENS
        )
        if negative:
            return Cond(text=negative_text, extra={"pooled": negative_pooled})
        return Cond(text=text, extra={"pooled": pooled})
