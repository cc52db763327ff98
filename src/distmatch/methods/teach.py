"""Trains a teacher on images with the EDM objective (Karras et al. 2022, Section 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distmatch.data import imaging
from distmatch.data.images import Images
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.losses import denoising_loss
from distmatch.diffusion.sampler import heun
from distmatch.models.folder import Info, save_model
from distmatch.system import rng
from distmatch.system.precision import autocast
from distmatch.system.workers import ALONE, Workers
from distmatch.training import teaching
from distmatch.training.checkpoint import Stateful
from distmatch.training.clock import Clock
from distmatch.training.ema import EMA
from distmatch.training.gradients import Adder
from distmatch.training.optim import Optimizer

P_MEAN, P_STD = -1.2, 1.2
"""Noise levels in training: `ln(sigma) ~ N(P_MEAN, P_STD^2)`."""

PREVIEW_STEPS = 18
"""Number of Heun steps for the sample grids."""


@dataclass(frozen=True, kw_only=True)
class Settings(teaching.Settings):
    """How to train a teacher."""

    label_dropout: float = 0.0
    """Probability of hiding the label, which prepares the teacher for guidance."""

    flip: bool = False
    """Mirror half of the images at random, the only augmentation."""


class Teaching:
    """The task of `distmatch teach`, for `train.train`.

    Args:
        denoiser: on its device, in training mode; its schedule is EDM's.
        workers: they share each batch, on a CPU. Changes nothing but rounding.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Images,
        optimizer: Optimizer,
        info: Info,
        settings: Settings,
        workers: Workers = ALONE,
    ):
        self.denoiser, self.images, self.optimizer, self.info = denoiser, images, optimizer, info
        self.settings = settings
        self.ema = EMA(denoiser, settings.ema)
        self.device = next(denoiser.parameters()).device
        self.pixels = images.pixels.to(self.device)
        self.labels = None if images.labels is None else images.labels.to(self.device)
        self.workers = workers
        self.clock = Clock([denoiser], self.device, workers.count)
        # On a GPU each step replays one CUDA graph: small networks wait for Python to launch their kernels.
        replayed = (optimizer,) if self.device.type == "cuda" else ()
        self.gradients = Adder(self.clock, workers, replayed)
        self.images_per_step = settings.batch

    @property
    def parts(self) -> Mapping[str, Stateful]:
        return {"denoiser": self.denoiser, "ema": self.ema, "optimizer": self.optimizer}

    def step(self, index: int) -> dict[str, Tensor]:
        how, batch = self.settings, self.settings.batch
        generator = rng.stream(self.device, how.seed, "teach", index)
        rows = torch.from_numpy(rng.shuffled(how.seed, len(self.images), index * batch, batch)).to(self.device)
        x = imaging.to_float(self.pixels[rows])
        if how.flip:
            mirror = torch.rand(batch, 1, 1, 1, generator=generator, device=self.device) < 0.5
            x = torch.where(mirror, x.flip(-1), x)
        cond = None
        if self.labels is not None:
            drop = torch.rand(batch, generator=generator, device=self.device) < how.label_dropout
            cond = Cond(label=self.labels[rows].masked_fill(drop, len(self.images.classes)))
        sigma = (P_MEAN + P_STD * torch.randn(batch, generator=generator, device=self.device)).exp()
        eps = torch.randn(x.shape, generator=generator, device=self.device)
        noisy = self.denoiser.schedule.add_noise(x, eps, sigma)

        size = -(-batch // self.workers.count)
        cuts = [slice(start, start + size) for start in range(0, batch, size)]
        parts = [(noisy[cut], sigma[cut], None if cond is None else cond[cut], x[cut]) for cut in cuts]
        _, losses = self.gradients.add("loss", parts, self.loss, self.denoiser, self.optimizer.parameters)
        norm = self.optimizer.step(index)
        self.ema.update()
        return {**losses, "gradient_norm": norm}

    def loss(self, part: tuple[Tensor, Tensor, Cond | None, Tensor]) -> tuple[Tensor, dict[str, Tensor], None]:
        """Return the loss of some rows, noisy and clean, as their share of the batch's mean."""
        noisy, sigma, cond, x = part
        with autocast(self.device, self.settings.precision):
            x0 = self.denoiser(noisy, sigma, cond)
        mean = len(x0) / self.settings.batch * denoising_loss(x0, x, self.denoiser.weight(sigma))
        return mean, {"loss": mean}, None

    @torch.no_grad()
    def preview(self) -> Tensor:
        z = rng.noise(self.settings.seed, range(64), self.info.shape).to(self.device)
        classes = len(self.info.classes)
        cond = Cond(label=torch.arange(64, device=self.device) % classes) if classes else None
        return imaging.to_uint8(heun(self.ema.network, self.denoiser.schedule, z, cond, PREVIEW_STEPS))

    def export(self, folder: Path) -> None:
        save_model(folder, self.ema.network, self.info)
