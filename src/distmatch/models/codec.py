"""Latents to pixels: the autoencoder's decoder of a latent diffusion model, full or tiny."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distmatch.extras import need
from distmatch.finite import check_weights
from distmatch.models.hub import check_scaling, network


class Decoder(nn.Module):
    """`(latents f[B,4,h,w]) -> images f[B,3,8h,8w]` in about [-1, 1], not clamped; gradients go through.

    Latents are scaled as the diffusion model sees them.

    Args:
        source: a model in diffusers' format, whose own autoencoder it is; or, `tiny`, a tiny autoencoder for its
            latents such as madebyollin/taesd (folder or model id).
        checkpointing: recompute activations in the backward pass instead of keeping them. At 512 x 512 the full decoder
            keeps some gigabytes per image otherwise.
    """

    def __init__(self, source: str, tiny: bool = False, checkpointing: bool = False):
        super().__init__()
        need("diffusers", by=source)
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        vae: Any = network(source, "", AutoencoderTiny) if tiny else network(source, "vae", AutoencoderKL)
        check_scaling(vae.config, source, means=not tiny)
        del vae.encoder
        check_weights(vae.state_dict(), f"{source}, autoencoder")
        self.vae: Any = vae.eval().requires_grad_(False)
        self.checkpointing = checkpointing

    def forward(self, latents: Tensor) -> Tensor:
        z = unscaled(latents, self.vae.config)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._decode, z, use_reentrant=False)  # pyright: ignore[reportReturnType]
        if torch.is_grad_enabled():
            return self._decode(z)
        return torch.cat([self._decode(one) for one in z.split(1)])  # the full decoder takes gigabytes per image

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


def unscaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Latents f[B,C,h,w] as the autoencoder has them, from those that the diffusion model sees."""
    z = latents / config["scaling_factor"]
    if config.get("latents_mean") is None:
        return z
    mean, std = (z.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return z * std + mean


class Decoded:
    """A distance of latents: that of the images that `decode` makes of them. Only `x` gets a gradient."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], decode: Callable[[Tensor], Tensor]):
        self.loss, self.decode = loss, decode

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decode(y)
        return self.loss(self.decode(x), target)
