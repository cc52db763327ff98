"""Trains an autoencoder for latent diffusion (Rombach et al. 2022, arXiv 2112.10752, Section 3.1), without its GAN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.data import imaging
from distmatch.data.images import Images
from distmatch.system import rng
from distmatch.system.files import together
from distmatch.system.precision import autocast
from distmatch.training import teaching
from distmatch.training.checkpoint import Stateful
from distmatch.training.clock import Clock
from distmatch.training.ema import EMA
from distmatch.training.optim import Optimizer
from distmatch.training.replay import Replay

PREVIEWED = 32
"""Images in a preview, each above its reconstruction."""

ENCODED = 256
"""Images encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Settings(teaching.Settings):
    """How to train an autoencoder."""

    perceptual: float = 1.0
    """Weight of LPIPS beside the mean absolute difference."""

    kl: float = 1e-4
    """Weight of the mean KL divergence per number of a latent. At 1e-3, channels of the latents die."""


class Autoencoding:
    """The task of training diffusers' `AutoencoderKL`, for `train.train`.

    Args:
        autoencoder: on its device, in training mode.
        perceptual: LPIPS, if it has a weight.
    """

    def __init__(
        self,
        autoencoder: Any,
        images: Images,
        optimizer: Optimizer,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        settings: Settings,
    ):
        self.autoencoder, self.images, self.optimizer = autoencoder, images, optimizer
        self.perceptual, self.settings = perceptual, settings
        self.ema = EMA(autoencoder, settings.ema)
        self.device = next(autoencoder.parameters()).device
        self.pixels = images.pixels.to(self.device)
        self.clock = Clock([], self.device)
        self.images_per_step = settings.batch
        self.gradients = Replay(self.losses, optimizer.parameters)

    @property
    def parts(self) -> Mapping[str, Stateful]:
        return {"autoencoder": self.autoencoder, "ema": self.ema, "optimizer": self.optimizer}

    def step(self, index: int) -> dict[str, Tensor]:
        how, batch = self.settings, self.settings.batch
        rows = torch.from_numpy(rng.shuffled(how.seed, len(self.images), index * batch, batch)).to(self.device)
        x = imaging.to_float(self.pixels[rows])
        config = self.autoencoder.config
        side = [length // 2 ** (len(config.block_out_channels) - 1) for length in x.shape[2:]]
        generator = rng.stream(self.device, how.seed, "autoencode", index)
        eps = torch.randn(batch, config.latent_channels, *side, generator=generator, device=self.device)
        with self.clock.counted():
            losses, _ = self.gradients((x, eps))
        norm = self.optimizer.step(index)
        self.ema.update()
        return {**losses, "gradient_norm": norm}

    def losses(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor], None]:
        (x, eps), how = inputs, self.settings
        with autocast(self.device, how.precision):
            mean, std = moments(self.autoencoder, x)
            y = self.autoencoder.decode(mean + std * eps, return_dict=False)[0].float()
            losses = {"difference": F.l1_loss(y, x), "kl": divergence(mean, std)}
            if self.perceptual is not None:
                losses["lpips"] = self.perceptual(y, x)
        total = losses["difference"] + how.kl * losses["kl"]
        if self.perceptual is not None:
            total = total + how.perceptual * losses["lpips"]
        return total, losses, None

    @torch.no_grad()
    def preview(self) -> Tensor:
        rows = torch.from_numpy(rng.shuffled(self.settings.seed, len(self.images), 0, PREVIEWED)).to(self.device)
        x = self.pixels[rows]
        y = imaging.to_uint8(reconstruct(self.ema.network, imaging.to_float(x)))
        across = 8  # images in a row of `imaging.grid`
        return torch.stack([x.reshape(-1, across, *x.shape[1:]), y.reshape(-1, across, *x.shape[1:])], 1).flatten(0, 2)

    def export(self, folder: Path) -> None:
        with together(folder, "config.json") as beside:
            self.ema.network.save_pretrained(beside)


def moments(autoencoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of `x f[B,3,H,W]`, each f[B,C,h,w] in fp32."""
    latents = autoencoder.encode(x, return_dict=False)[0]
    return latents.mean.float(), latents.std.float()


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Return the mean over all numbers of `KL(N(mean, std^2) || N(0, 1))`, f[]."""
    return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()


def reconstruct(autoencoder: Any, x: Tensor) -> Tensor:
    """Return what becomes of `x f[B,3,H,W]`, encoded to the latents' means and decoded."""
    return autoencoder.decode(moments(autoencoder, x)[0], return_dict=False)[0]


@torch.no_grad()
def encoded(autoencoder: Any, pixels: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Return `moments` of all images u8[N,3,H,W], on the autoencoder's device."""
    device = next(autoencoder.parameters()).device
    parts = []
    for part in pixels.split(ENCODED):
        with autocast(device, precision):
            parts.append(moments(autoencoder, imaging.to_float(part.to(device))))
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)
