"""Sana: linear attention on latents of a deep compression autoencoder, with Gemma's states of instructed prompts."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.flow import FlowFamily
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_flow import write_tiny_sana
from distmatch.system.errors import UserError

TOKENS = 300
"""Length of a text, in tokens: the pipeline's `max_sequence_length`."""


class SanaTransformer(PromptedTransformer):
    """diffusers' `SanaTransformer2DModel`: Gemma's states, and `mask f[B,L]`, 1 at tokens of the text."""

    kind = "SanaTransformer2DModel"
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ff.conv_inverted", "ff.conv_point"),  # its feed-forward layers
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        time = 1000 * t * self.transformer.config.timestep_scale
        return self.transformer(x, text, time, encoder_attention_mask=mask, return_dict=False)[0]


class Sana(FlowFamily):
    """`SanaPipeline`. Sana-Sprint is a student already, and has a pipeline of its own."""

    steps = 20  # the pipeline's default
    plain = "guidance_scale=1, use_resolution_binning=False"  # which makes images of the nearest size it lists
    scaling = ()
    net = SanaTransformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"sana": SanaTransformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": SanaTransformer.kind, "vae": "AutoencoderDC"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": TOKENS}

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        if transformer.get("guidance_embeds"):
            raise UserError(
                f"{source}: its transformer takes a guidance scale (guidance_embeds): guidance was distilled into it, "
                "as into Sana-Sprint. Take the model that it was made from"
            )

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"text": (TOKENS, *numbers(transformer, source, "caption_channels")), "mask": (TOKENS,)}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_sana(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["mask"] f[B,L]`.

        Prompts follow the pipeline's instruction to enhance them; the empty one of guidance stands alone.
        """
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        text, mask, negative_text, negative_mask = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=negative,
            device=pipe.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        if negative:
            return Cond(text=negative_text, extra={"mask": negative_mask.float()})
        return Cond(text=text, extra={"mask": mask.float()})
