"""A stream for students of several steps whose later steps start from real samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distmatch.data.reals import Reals
from distmatch.diffusion.conditions import Conditions, Share, rows, with_guidance
from distmatch.methods.terms import Start
from distmatch.system import rng


@dataclass
class RealStream:
    """Fresh noise, and real samples with their conditions; it takes the place of `terms.NoiseStream`.

    Args:
        conditions: those of the student; only their guidance scales are used, if they have some.
    """

    reals: Reals
    shape: Sequence[int]
    conditions: Conditions
    batch: int = 64
    device: torch.device | str = "cpu"
    name: str = "noise"
    fresh: bool = True

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        generator = rng.stream(self.device, seed, "match", index, turn)
        z = torch.randn(self.batch, *self.shape, generator=generator, device=self.device)
        drawn = self.conditions.draw(self.batch, generator, share)
        # Which samples is needed on the host: a generator there avoids waiting for the device.
        real, cond = self.reals.draw(self.batch, rng.stream("cpu", seed, "inputs", index, turn), share)
        cond = cond and cond.to(self.device)
        if drawn is not None and "guidance" in drawn.extra:
            cond = with_guidance(cond, drawn.extra["guidance"])
        return Start(rows(z, share), cond, self.batch, generator, real=real.to(self.device))
