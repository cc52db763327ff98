"""Shared noise: one pass of the fake score serves the student's loss and its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmatch.diffusion.conditions import Share
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.losses import denoising_loss
from distmatch.methods.terms import Levels, Match, Samples, Start


@dataclass(frozen=True)
class Passed(Levels):
    """Levels shared by both losses, and the pass of the fake score that waits, with its graph, for the second one."""

    waiting: list[Tensor] = field(default_factory=list)


class Shared(Match):
    """As `Match`, but the fake score's loss has the student's time and noise, and with them the same pass.

    The fake score must not change between the two losses; further updates of it, on new images, make passes of their
    own. Its activations are kept during the student's update.
    """

    def draw(self, starts: Sequence[Start], share: Share) -> Passed:
        drawn = super().draw(starts, share)
        return Passed(drawn.t, drawn.eps, t_fake=drawn.t, eps_fake=drawn.eps)

    def judged(self, x_t: Tensor, drawn: Levels, cond: Cond | None) -> Tensor:
        assert isinstance(drawn, Passed)
        with torch.enable_grad():
            drawn.waiting.append(self.fake(x_t, drawn.t, cond))
        return drawn.waiting[0].detach()

    def fake_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        assert isinstance(drawn, Passed)
        if not drawn.waiting:
            return super().fake_loss(drawn, samples)
        return denoising_loss(drawn.waiting.pop(), samples.x, self.weight_at(drawn.t))
