"""A stream for students of several steps whose later steps start from real samples."""

from dataclasses import dataclass, field, replace

from distmatch.data.reals import Reals
from distmatch.diffusion.conditions import Share, with_guidance
from distmatch.methods.terms import NoiseStream, Start
from distmatch.system import rng


@dataclass
class RealStream(NoiseStream):
    """Fresh noise, and real samples with their own conditions; of `conditions` only the guidance scales are used."""

    reals: Reals = field(kw_only=True)

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        start = super().draw(seed, index, turn, share)
        # Which samples is needed on the host: a generator there avoids waiting for the device.
        real, cond = self.reals.draw(self.batch, rng.stream("cpu", seed, "inputs", index, turn), share)
        cond = cond and cond.to(self.device)
        if start.cond is not None and "guidance" in start.cond.extra:
            cond = with_guidance(cond, start.cond.extra["guidance"])
        return replace(start, cond=cond, real=real.to(self.device))
