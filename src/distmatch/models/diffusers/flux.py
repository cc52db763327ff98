"""FLUX.1 (dev): two-stream and one-stream blocks, T5's states and CLIP's pooled text, a guidance scale as an input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.flow import PatchedFamily, packed, positions, unpacked
from distmatch.models.diffusers.hub import Settings, config
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_patched import write_tiny_flux
from distmatch.system.errors import UserError

TOKENS = 512
"""Length of T5's text, in tokens: the pipeline's `max_sequence_length`."""

GUIDANCE = 3.5
"""The scale that the network takes as an input: the pipeline's default.

It was distilled into the network, which at this scale is the teacher. Our own guidance, by the empty prompt, is the
pipeline's `true_cfg_scale`.
"""


class FluxTransformer(PromptedTransformer):
    """diffusers' `FluxTransformer2DModel`: T5's states, and CLIP's `pooled f[B,P]`."""

    kind = "FluxTransformer2DModel"
    image_output = 1
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),  # of the one-stream blocks
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        guided = self.transformer.config.guidance_embeds
        made = self.transformer(
            packed(x),
            text,
            pooled,
            t,
            positions(height // 2, width // 2, 3, x),
            x.new_zeros(text.shape[1], 3),
            guidance=torch.full_like(t, GUIDANCE) if guided else None,
            return_dict=False,
        )[0]
        return unpacked(made, height, width)


class Flux(PatchedFamily):
    """`FluxPipeline`: FLUX.1 dev. FLUX.1 schnell is a student already."""

    steps = 50  # on its model card; the pipeline's default is 28
    plain = f"guidance_scale={GUIDANCE}"
    net = FluxTransformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"flux": FluxTransformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": FluxTransformer.kind, "vae": "AutoencoderKL"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer_2": TOKENS}  # CLIP's, shorter, is pooled

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        channels, made = transformer.get("in_channels"), transformer.get("out_channels")
        if made not in (None, channels):
            raise UserError(f"{source}: its transformer takes {channels} channels and makes {made}; expected the same")

    def channels(self, transformer: Mapping[str, Any], source: str) -> int:
        return numbers(transformer, source, "in_channels")[0] // 4

    def distilled(self, source: str, lora: str = "") -> str | None:
        if not config(source, "config.json", self.network).get("guidance_embeds"):
            return "its transformer takes no guidance scale (guidance_embeds), as FLUX.1 schnell's"
        return super().distilled(source, lora)

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        width, pooled = numbers(transformer, source, "joint_attention_dim", "pooled_projection_dim")
        return {"text": (TOKENS, width), "pooled": (pooled,)}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_flux(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["pooled"] f[B,P]`."""
        text, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, max_sequence_length=TOKENS)
        return Cond(text=text, extra={"pooled": pooled})
