"""What stands around the network of a latent text-to-image model: prompts in, pixels out."""

from functools import cache

import torch
from torch import Tensor

from distmatch.models.codec import Decoder
from distmatch.models.folder import Info
from distmatch.models.text import TextEncoder


class Around:
    """The text encoders and the decoder of a model in diffusers' format.

    `encode(prompts) -> Cond`; `decode(latents f[B,4,h,w]) -> images f[B,3,H,W]` in about [-1, 1].
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        self.encode = TextEncoder(source, device)
        self.decoder = Decoder(source).to(device)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def around(info: Info, device: torch.device | str = "cpu") -> Around | None:
    """What stands around the model that `info` describes, loaded once; `None` for a model of pixels."""
    return _loaded(info.source, str(device)) if info.text or info.latent else None


@cache
def _loaded(source: str, device: str) -> Around:
    return Around(source, device)
