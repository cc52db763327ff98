"""Trains a text-to-image teacher on latents, as Stable Diffusion's (arXiv 2112.10752), the text encoder with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.diffusion.losses import denoising_loss
from distmatch.diffusion.schedule import VP
from distmatch.models.diffusers.hub import CARD
from distmatch.models.diffusers.small import SCHEDULER, TextDenoiser, make_pipeline
from distmatch.system import rng
from distmatch.system.files import together, write_json
from distmatch.system.precision import autocast
from distmatch.training import teaching
from distmatch.training.checkpoint import Stateful
from distmatch.training.clock import Clock
from distmatch.training.ema import EMA
from distmatch.training.optim import Optimizer
from distmatch.training.replay import Replay

MAX_SNR = 5.0
"""Noise levels of a larger signal-to-noise ratio count less: min-SNR weighting, Hang et al. 2023, arXiv 2303.09556."""

PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 4.0
"""How the sample grids are made."""


@dataclass(frozen=True, kw_only=True)
class Settings(teaching.Settings):
    """How to train a text-to-image teacher."""

    text_dropout: float = 0.1
    """Share of the images shown with the empty caption, which prepares the teacher for guidance."""


class TextTeaching:
    """The task of `distmatch teach-text`, for `train.train`.

    Args:
        network: on its device, in training mode.
        autoencoder: frozen; see `small.standardise`.
        latents: mean and standard deviation of each image's latents, f[N,C,h,w] each, on the network's device.
        captions: of each image, one or more, one of which is drawn whenever the image is shown.
        prompts: for the previews.
    """

    def __init__(
        self,
        network: TextDenoiser,
        autoencoder: Any,
        tokenizer: Any,
        latents: tuple[Tensor, Tensor],
        captions: Sequence[Sequence[str]],
        prompts: Sequence[str],
        optimizer: Optimizer,
        settings: Settings,
    ):
        self.network, self.autoencoder, self.tokenizer = network, autoencoder, tokenizer
        self.mean, self.std = latents
        self.prompts, self.optimizer, self.settings = prompts, optimizer, settings
        self.ema = EMA(network, settings.ema)
        self.device = next(network.parameters()).device
        self.schedule = VP.from_scheduler(SCHEDULER)
        texts = {text: row for row, text in enumerate(dict.fromkeys(["", *(c for all in captions for c in all)]))}
        self.ids = tokenized(tokenizer, list(texts)).to(self.device)  # the empty text first
        counts = torch.tensor([len(all) for all in captions])
        self.texts = torch.zeros(len(captions), int(counts.max()), dtype=torch.long)
        for row, all in enumerate(captions):
            self.texts[row, : len(all)] = torch.tensor([texts[caption] for caption in all])
        self.texts, self.counts = self.texts.to(self.device), counts.to(self.device)
        self.clock = Clock([], self.device)
        self.images_per_step = settings.batch
        self.gradients = Replay(self.losses, optimizer.parameters)

    @property
    def parts(self) -> Mapping[str, Stateful]:
        return {"network": self.network, "ema": self.ema, "optimizer": self.optimizer}

    def step(self, index: int) -> dict[str, Tensor]:
        how, batch, device = self.settings, self.settings.batch, self.device
        g = rng.stream(device, how.seed, "teach-text", index)
        rows = torch.from_numpy(rng.shuffled(how.seed, len(self.mean), index * batch, batch)).to(device)
        mean = self.mean[rows]
        x0 = mean + self.std[rows] * torch.randn(mean.shape, generator=g, device=device)
        which = (torch.rand(batch, generator=g, device=device) * self.counts[rows]).long()
        texts = self.texts[rows].gather(1, which[:, None])[:, 0]
        texts = texts.masked_fill(torch.rand(batch, generator=g, device=device) < how.text_dropout, 0)
        t = torch.randint(int(self.schedule.t_max) + 1, (batch,), generator=g, device=device)
        eps = torch.randn(x0.shape, generator=g, device=device)
        times = t.float()
        snr = (self.schedule.alpha(times) / self.schedule.sigma(times)) ** 2
        noisy = self.schedule.add_noise(x0, eps, times)
        with self.clock.counted():
            losses, _ = self.gradients((noisy, t, self.ids[texts], eps, snr.clamp(max=MAX_SNR) / snr))
        norm = self.optimizer.step(index)
        self.ema.update()
        return {**losses, "gradient_norm": norm}

    def losses(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor], None]:
        noisy, t, ids, eps, weight = inputs
        with autocast(self.device, self.settings.precision):
            predicted = self.network(noisy, t, ids)
        loss = denoising_loss(predicted.float(), eps, weight)
        return loss, {"loss": loss}, None

    @torch.no_grad()
    def preview(self) -> Tensor:
        """Return the images of the prompts, by the pipeline that `export` writes, each from noise of its own."""
        pipe = make_pipeline(self.ema.network, self.autoencoder, self.tokenizer)
        z = rng.noise(self.settings.seed, range(len(self.prompts)), self.mean.shape[1:]).to(self.device)
        how = {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": PREVIEW_GUIDANCE, "output_type": "np"}
        images = pipe(list(self.prompts), latents=z, **how).images
        return torch.from_numpy((255 * images).round().astype(np.uint8)).permute(0, 3, 1, 2)

    def export(self, folder: Path) -> None:
        with together(folder, "model_index.json") as beside:
            make_pipeline(self.ema.network, self.autoencoder, self.tokenizer).save_pretrained(beside)
            write_json(beside / CARD, {"teach-text": {"text_dropout": self.settings.text_dropout}})


def tokenized(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return i64[N,L] as Stable Diffusion's pipeline makes them: padded and cut to the tokenizer's length."""
    how = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(texts), **how, return_tensors="pt")["input_ids"]
