"""What the families of flow-matching transformers share beside prompts: levels, export, patches, padded texts.

Their paths are straight, `x_t = (1 - t) x0 + t eps`, and their networks predict the velocity `eps - x0`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.flow_solver import PASSED
from distmatch.diffusion.schedule import Flow, Schedule
from distmatch.models.diffusers.autoencoder import factor
from distmatch.models.diffusers.flow_schedulers import dynamic, flow_student_scheduler, own_schedule
from distmatch.models.diffusers.hub import CARD
from distmatch.models.diffusers.prompted import PromptedFamily
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.plain import fitting, read_json

SIDE = 1024
"""Side of the images that pipelines make by default whose settings name none."""


class FlowFamily(PromptedFamily):
    """A family of flow-matching transformers: they predict the velocity."""

    sampler = "flow"
    scaling = ("shift_factor",)

    passes_sigmas: ClassVar[bool] = False
    """Whether its pipeline passes levels in equal steps to the scheduler, see `flow_solver.PASSED`."""

    empirical: ClassVar[int | None] = None
    """Steps for which the shift is taken, if it depends on their number, see `flow_solver.PASSED`."""

    def tokens(self, transformer: Mapping[str, Any], shape: Sequence[int], source: str) -> int:
        """Return the image's tokens, on which a dynamic shift depends."""
        return shape[1] * shape[2] // self.patch(transformer, source) ** 2

    def diffusion(
        self, scheduler: Mapping[str, Any], transformer: Mapping[str, Any], shape: Sequence[int], source: str
    ) -> tuple[Schedule, str, dict[str, Any]]:
        schedule, settings = self.levels(scheduler, self.tokens(transformer, shape, source), source)
        return schedule, "velocity", settings

    def levels(self, scheduler: Mapping[str, Any], tokens: int, source: str) -> tuple[Flow, dict[str, Any]]:
        """Return the schedule for an image of `tokens`, and the scheduler's settings with what the pipeline passes."""
        passed: dict[str, Any] = {"sigmas": True} if self.passes_sigmas else {}
        if scheduler.get("use_dynamic_shifting"):
            passed |= dynamic(scheduler, tokens, self.empirical, source)
        return own_schedule(scheduler, passed, self.empirical, source), {**scheduler, PASSED: passed}

    def resized(self, denoiser: Denoiser, info: Info, size: tuple[int, int]) -> Info:
        found, transformer = super().resized(denoiser, info, size), self._own(denoiser.net).transformer.config
        tokens = self.tokens(transformer, found.shape, info.source)
        schedule, scheduler = self.levels(info.scheduler, tokens, info.source)
        denoiser.schedule = schedule
        return replace(found, scheduler=scheduler)

    def student_scheduler(self, student: Denoiser, info: Info) -> Any:
        self._own(student.net)
        if type(student.schedule) is not Flow or not info.times:
            raise UserError("the student has another schedule than a flow model has; it cannot be exported")
        return flow_student_scheduler(info.times, self.passes_sigmas)


class PatchedFamily(FlowFamily):
    """A family of transformers on patches of 2x2 latents, whose settings do not say how large its images are.

    They are as large as its pipeline makes them by default, `SIDE`. In a tiny model's folder, `distmatch.json` says how
    large its images are.
    """

    passes_sigmas = True

    def channels(self, transformer: Mapping[str, Any], source: str) -> int:
        """Return the channels of the latents."""
        raise NotImplementedError

    def latents(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int, int]:
        card, pixels = Path(source) / CARD, factor(vae, source)
        asked = read_json(card, dict[str, Any]).get("size", SIDE) if card.exists() else SIDE
        side, channels = fitting(asked, f"{card}: size", int), self.channels(transformer, source)
        held = vae.get("latent_channels", vae.get("z_dim"))
        if channels != held:
            raise UserError(
                f"{source}: its transformer makes latents of {channels} channels; its autoencoder's are {held}"
            )
        if side < 1 or side % (2 * pixels):
            raise UserError(f"{card}: size is {side}; expected a multiple of {2 * pixels}")
        return channels, side // pixels, side // pixels, pixels

    def patch(self, network: Mapping[str, Any], source: str) -> int:
        return 2


def packed(x: Tensor) -> Tensor:
    """Return latents f[B,C,h,w] as tokens f[B,N,4C], one for each patch of 2x2."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens f[B,N,4C] as latents f[B,C,h,w]: the inverse of `packed`."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def positions(rows: int, columns: int, axes: int, like: Tensor) -> Tensor:
    """Return each token's coordinates f[N,axes]: row and column in the second and third, zero in the others."""
    found = like.new_zeros(rows, columns, axes)
    found[..., 1] = torch.arange(rows, device=like.device)[:, None]
    found[..., 2] = torch.arange(columns, device=like.device)
    return found.flatten(0, 1)


def padded(states: Sequence[Tensor], length: int) -> Cond:
    """Return `text f[B,length,C]` from states f[L,C] of each text, and `extra["mask"] f[B,length]`, 1 at tokens."""
    text = torch.stack([F.pad(one, (0, 0, 0, length - len(one))) for one in states])
    mask = [F.pad(one.new_ones(len(one)), (0, length - len(one))) for one in states]
    return Cond(text=text, extra={"mask": torch.stack(mask).float()})


def lengths(mask: Tensor) -> list[int]:
    """Return the tokens of each text from `mask f[B,L]`. Plans, whose tensors have no data, replace this function."""
    return mask.sum(1).long().tolist()
