"""Qwen-Image: joint attention to the states of Qwen2.5-VL, on latents of a video autoencoder's single frames."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, lerp, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.flow import PatchedFamily, packed, padded, unpacked
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_patched import write_tiny_qwen_image
from distmatch.system.errors import UserError

TOKENS = 512
"""Longest text, in tokens: the pipeline's `max_sequence_length`. Of them, some end the chat around the prompt."""

CHAT = 5

UNWANTED = " "
"""The prompt to guide away from: this pipeline guides only if there is one, and its makers give a space."""

UNKNOWN = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of the transformers of other pipelines: distilled, editing, layers."""


class QwenImageTransformer(PromptedTransformer):
    """diffusers' `QwenImageTransformer2DModel`: states, and `mask f[B,L]`, 1 at tokens of the text."""

    kind = "QwenImageTransformer2DModel"
    image_output = 1
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        shapes = [[(1, height // 2, width // 2)]] * len(x)
        made = self.transformer(packed(x), text, mask.bool(), t, shapes, return_dict=False)[0]
        return unpacked(made, height, width)

    def combine(self, x: Tensor, t: Tensor, x0: tuple[Tensor, Tensor], scale: Any) -> Tensor:
        """Return the guided `x0`: each token's velocity keeps the norm that it has without guidance.

        Args:
            x0: without and with the condition.
        """
        plain, found = (packed(x - one) for one in (x0[1], lerp(*x0, scale)))  # velocities, times t
        found = found * (plain.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))
        return x - unpacked(found, *x.shape[-2:])


class QwenImage(PatchedFamily):
    """`QwenImagePipeline`."""

    steps = 50  # the pipeline's default
    plain = "true_cfg_scale=1"
    scaling = ("latents_mean", "latents_std")
    net = QwenImageTransformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"qwen-image": QwenImageTransformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": QwenImageTransformer.kind, "vae": "AutoencoderKLQwenImage"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": TOKENS - CHAT}

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        for name in UNKNOWN:
            if transformer.get(name):
                raise UserError(f"{source}: its transformer has {name} {transformer[name]!r}; expected false")

    def channels(self, transformer: Mapping[str, Any], source: str) -> int:
        return numbers(transformer, source, "out_channels")[0]

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"text": (TOKENS, *numbers(transformer, source, "joint_attention_dim")), "mask": (TOKENS,)}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_qwen_image(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["mask"] f[B,L]`."""
        texts = [UNWANTED] * len(prompts) if negative else prompts
        states, mask = pipe.encode_prompt(texts, pipe.device, max_sequence_length=TOKENS)
        mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
        return padded([row[: int(kept.sum())] for row, kept in zip(states, mask, strict=True)], TOKENS)
