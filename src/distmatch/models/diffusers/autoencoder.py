"""Latents to pixels by a latent diffusion model's autoencoder, full or tiny, and pixels to latents."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distmatch.models.diffusers.hub import Count, network, outline
from distmatch.system.digests import weights_digest
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting

WIDTHS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderKLFlux2": "block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderKLQwenImage": "dim_mult",
}
"""Known classes of autoencoders, and the setting with the width of each level; each level after the first halves."""

VIDEO = ("AutoencoderKLQwenImage",)
"""Those of videos: an image is a single frame."""


class Decoder(nn.Module):
    """`(latents f[B,C,h,w]) -> images f[B,3,8h,8w]` in about [-1, 1], not clamped; gradients pass through.

    Latents are scaled as the diffusion model sees them.

    Args:
        vae: diffusers' autoencoder; its decoder is frozen and its encoder is deleted.
        checkpointing: recompute activations in the backward pass instead of keeping them. Without it, the full decoder
            keeps several gigabytes per image at 512 x 512.
    """

    bf16_throughout: ClassVar[bool] = True

    def __init__(self, vae: Any, checkpointing: bool = False):
        super().__init__()
        vae.encoder = nn.Module()
        self.vae: Any = vae.eval().requires_grad_(False)
        self.checkpointing, self.video = checkpointing, type(vae).__name__ in VIDEO
        self.channels: int = vae.config.get("latent_channels") or vae.config["z_dim"]

    def forward(self, latents: Tensor) -> Tensor:
        z = self.unscaled(latents)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.decode, z, use_reentrant=False)  # pyright: ignore[reportReturnType]
        if torch.is_grad_enabled():
            return self.decode(z)
        return self.one_by_one(z)

    def one_by_one(self, z: Tensor) -> Tensor:
        """Decode images one after another: the full decoder uses gigabytes for each."""
        return torch.cat([self.decode(one) for one in z.split(1)])

    def unscaled(self, latents: Tensor) -> Tensor:
        """Convert latents from the diffusion model's scale to the autoencoder's."""
        return unscaled(latents, self.vae.config)

    def decode(self, z: Tensor) -> Tensor:
        z = z.to(next(self.vae.parameters()).dtype)
        if self.video:  # not by `vae.decode`, which keeps the outputs of all layers for a next frame: gigabytes
            return self.vae.decoder(self.vae.post_quant_conv(z.unsqueeze(2))).clamp(-1, 1).squeeze(2)
        return self.vae.decode(z, return_dict=False)[0]


class ImageEncoder:
    """`(images f[B,3,H,W] in [-1, 1], eps f[B,C,h,w]) -> latents f[B,C,h,w]`, scaled as the diffusion model sees them.

    They are samples of the encoder's distribution, as in the model's training, with the standard normal noise `eps`. An
    encoder without a distribution (`AutoencoderDC`) ignores it.

    Args:
        vae: diffusers' autoencoder; its decoder is deleted.
    """

    def __init__(self, vae: Any):
        vae.decoder = nn.Module()
        self.video = type(vae).__name__ in VIDEO
        self.vae: Any = vae.eval().requires_grad_(False)
        self.stride = factor({**vae.config, "_class_name": type(vae).__name__}, "")

    @torch.no_grad()
    def __call__(self, images: Tensor, eps: Tensor) -> Tensor:
        pairs = zip(images.to(self.vae.device).split(1), eps.to(self.vae.device).split(1), strict=True)
        return torch.cat([self.encode(image, noise) for image, noise in pairs])  # each takes gigabytes

    def encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return the latents f[1,C,h,w] of one image."""
        return scaled(self.sample(image, noise), self.vae.config)

    def sample(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return the latents of one image on the autoencoder's own scale."""
        latents = self.vae.encode(image.unsqueeze(2) if self.video else image, return_dict=False)[0]
        if isinstance(latents, Tensor):
            return latents
        mean, std = (one.squeeze(2) if self.video else one for one in (latents.mean, latents.std))
        return mean + std * noise.to(mean)

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that determines the latents."""
        names = ["scaling_factor", "latents_mean", "latents_std"]
        names += ["shift_factor"] if self.vae.config.get("shift_factor") else []  # earlier digests do not count it
        return weights_digest(self.vae.state_dict(), str([self.vae.config.get(name) for name in names]))


def tiny_decoder(source: str, checkpointing: bool = False, weights: bool = True) -> Decoder:
    """Return the decoder of a tiny autoencoder such as madebyollin/taesd (folder or model id).

    Without `weights` it is built from its settings alone.
    """
    need("diffusers", by=source)
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    vae = (network if weights else outline)(source, "", AutoencoderTiny)
    check_scaling(vae.config, source)
    return Decoder(vae, checkpointing)


def unscaled(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Convert latents f[B,C,h,w] from the diffusion model's scale to the autoencoder's."""
    mean, std = _moments(latents, config)
    return latents / config.get("scaling_factor", 1.0) * std + mean


def scaled(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Convert latents f[B,C,h,w] from the autoencoder's scale to the diffusion model's: the inverse of `unscaled`."""
    mean, std = _moments(z, config)
    return (z - mean) / std * config.get("scaling_factor", 1.0)


def factor(vae: Mapping[str, Any], source: str) -> int:
    """Return the pixels per latent, along each side, of an autoencoder with these settings.

    Raises `UserError` unless it is of a known class.
    """
    kind = vae.get("_class_name")
    if kind not in WIDTHS:
        raise UserError(f"{source}: its autoencoder is a {kind}; expected {' or '.join(WIDTHS)}")
    name = WIDTHS[kind]
    return 2 ** (max(1, len(fitting(vae.get(name), f"{source}: vae/config.json: {name}", tuple[Count, ...]))) - 1)


def _moments(z: Tensor, config: Mapping[str, Any]) -> tuple[Tensor | float, Tensor | float]:
    """Return mean and deviation of the autoencoder's latents, by channel if it has them by channel."""
    if config.get("latents_mean") is None:
        return config.get("shift_factor") or 0.0, 1.0
    mean, std = (z.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return mean, std


def check_scaling(vae: Mapping[str, Any], source: str, allowed: Collection[str] = ()) -> None:
    """Raise `UserError` if an autoencoder's settings scale latents differently from the pipeline.

    Beside `scaling_factor` only `allowed` ones are used: by none in Stable Diffusion; both `latents_mean` and
    `latents_std` in XL; `shift_factor` in Stable Diffusion 3.
    """
    scale = vae.get("scaling_factor", 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"{source}: its autoencoder has scaling_factor {scale!r:.80}; expected a positive number")
    shift, mean, std = (vae.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
    if shift and "shift_factor" not in allowed:
        raise UserError(f"{source}: its autoencoder has shift_factor {shift}, which its pipeline leaves out; set 0")
    if (mean is None) != (std is None) or (mean is not None and "latents_mean" not in allowed):
        raise UserError(f"{source}: its autoencoder has latents_mean {mean}, latents_std {std}; expected none")


class Decoded:
    """A distance of latents: the distance of the images that `decode` makes of them. Only `x` gets a gradient."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], decode: Callable[[Tensor], Tensor]):
        self.loss, self.decode = loss, decode

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.decode(y)
        return self.loss(self.decode(x), target)
