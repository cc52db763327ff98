"""Z-Image: one stream of image and text tokens, with Qwen3's states of a chat about the prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers import flow
from distmatch.models.diffusers.flow import PatchedFamily, padded
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.prompted import PromptedTransformer, numbers
from distmatch.models.diffusers.tiny_patched import write_tiny_z_image
from distmatch.system.errors import UserError

TOKENS = 512
"""Longest text, in tokens, with the chat around it: the pipeline's `max_sequence_length`."""

CHAT = 12
"""Tokens of Qwen3's chat around a prompt, at most."""


class ZImageTransformer(PromptedTransformer):
    """diffusers' `ZImageTransformer2DModel`: Qwen3's states, and `mask f[B,L]`, 1 at tokens of the text.

    Its time runs the other way, from noise 0 to data 1, and so does its velocity. Positions of the image follow those
    of the text, so texts go in at their own lengths.
    """

    kind = "ZImageTransformer2DModel"
    main = "layers"
    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        texts = [row[:length] for row, length in zip(text, flow.lengths(mask), strict=True)]
        made = self.transformer(list(x.unsqueeze(2)), 1 - t, texts, return_dict=False)[0]
        return -torch.stack(made).squeeze(2)


class ZImage(PatchedFamily):
    """`ZImagePipeline`. Z-Image-Turbo is a student already."""

    steps = 50  # the pipeline's default
    plain = "guidance_scale=0"  # it computes c + w (c - u): our scale less 1
    net = ZImageTransformer
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"z-image": ZImageTransformer}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": ZImageTransformer.kind, "vae": "AutoencoderKL"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": TOKENS - CHAT}

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        super().check(transformer, vae, source)
        patches = transformer.get("all_patch_size", [2]), transformer.get("all_f_patch_size", [1])
        if patches != ([2], [1]) or transformer.get("siglip_feat_dim") is not None:
            raise UserError(
                f"{source}: its transformer has patches {patches} and siglip_feat_dim "
                f"{transformer.get('siglip_feat_dim')}; expected ([2], [1]) and none, as for images of prompts"
            )

    def channels(self, transformer: Mapping[str, Any], source: str) -> int:
        return numbers(transformer, source, "in_channels")[0]

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"text": (TOKENS, *numbers(transformer, source, "cap_feat_dim")), "mask": (TOKENS,)}

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_z_image(folder)

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return `text` and `extra["mask"] f[B,L]`."""
        states, _ = pipe.encode_prompt(
            list(prompts), pipe.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return padded(states, TOKENS)
