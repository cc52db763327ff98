"""Training a teacher on images: the EDM objective (Karras et al. 2022, Section 5)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from distmatch import data, rng
from distmatch.checkpoint import Stateful
from distmatch.clock import Clock
from distmatch.denoiser import Cond, Denoiser
from distmatch.ema import EMA
from distmatch.images import Images
from distmatch.losses import denoising_loss
from distmatch.models.folder import Info, save_model
from distmatch.optim import Optimizer
from distmatch.sampler import heun


class Teaching:
    """The task of `distmatch teach`, for `train.train`.

    Args:
        denoiser: on its device, in training mode; its schedule is EDM's.
        batch: images per step.
        p_mean, p_std: `ln(sigma) ~ N(p_mean, p_std^2)`.
        label_dropout: probability of training without the label, which makes the teacher fit for guidance.
        flip: mirror every other image at random, the only augmentation.
        precision: "fp32", or "bf16" for autocast around the network.
        steps_preview: Heun steps of the sample grids.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Images,
        optimizer: Optimizer,
        *,
        info: Info,
        batch: int = 128,
        seed: int = 0,
        ema: float = 0.999,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        label_dropout: float = 0.0,
        flip: bool = False,
        precision: str = "fp32",
        steps_preview: int = 18,
    ):
        self.denoiser, self.images, self.optimizer, self.info = denoiser, images, optimizer, info
        self.batch, self.seed, self.p_mean, self.p_std = batch, seed, p_mean, p_std
        self.label_dropout, self.flip, self.precision = label_dropout, flip, precision
        self.steps_preview = steps_preview
        self.ema = EMA(denoiser, ema)
        self.device = next(denoiser.parameters()).device
        self.pixels = images.pixels.to(self.device)
        self.labels = None if images.labels is None else images.labels.to(self.device)
        self.clock = Clock([denoiser], self.device)
        self.images_per_step = batch

    @property
    def parts(self) -> Mapping[str, Stateful]:
        return {"denoiser": self.denoiser, "ema": self.ema, "optimizer": self.optimizer}

    def step(self, index: int) -> dict[str, Tensor]:
        generator = rng.stream(self.device, self.seed, "teach", index)
        rows = torch.from_numpy(rng.shuffled(self.seed, len(self.images), index * self.batch, self.batch))
        rows = rows.to(self.device)
        x = data.to_float(self.pixels[rows])
        if self.flip:
            mirror = torch.rand(self.batch, 1, 1, 1, generator=generator, device=self.device) < 0.5
            x = torch.where(mirror, x.flip(-1), x)
        cond = None
        if self.labels is not None:
            drop = torch.rand(self.batch, generator=generator, device=self.device) < self.label_dropout
            cond = Cond(label=self.labels[rows].masked_fill(drop, len(self.images.classes)))
        sigma = (self.p_mean + self.p_std * torch.randn(self.batch, generator=generator, device=self.device)).exp()
        eps = torch.randn(x.shape, generator=generator, device=self.device)
        with self.autocast():
            x0 = self.denoiser(self.denoiser.schedule.add_noise(x, eps, sigma), sigma, cond)
        loss = denoising_loss(x0, x, self.denoiser.weight(sigma))
        self.clock.backward(loss)
        norm = self.optimizer.step(index)
        self.ema.update()
        return {"loss": loss.detach(), "gradient_norm": norm}

    @torch.no_grad()
    def preview(self) -> Tensor:
        z = rng.noise(self.seed, range(64), self.info.shape).to(self.device)
        classes = len(self.info.classes)
        cond = Cond(label=torch.arange(64, device=self.device) % classes) if classes else None
        return data.to_uint8(heun(self.ema.network, self.denoiser.schedule, z, cond, self.steps_preview))

    def export(self, folder: Path) -> None:
        save_model(folder, self.ema.network, self.info)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
