"""Reports how many steps have their gradient clipped: a figure in the log, and a notice if it is most of them."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser
from distmatch.system.terminal import notice

WINDOW = 200
"""Steps to look at before giving a notice."""

LOUD = 5.0
"""From this output factor on, the student's network is named as the cause of large gradients."""


@dataclass(frozen=True)
class Clipped:
    """One network's gradients: the log's name for their norm, the length they are clipped to, and what to change."""

    norm: str
    clip: float
    turn: str


class Clipping:
    """Called with the losses f[steps] by name whenever the loop has read them; returns the clipped shares.

    Runs on the host, with norms that are there anyway. It gives at most one notice per network.
    """

    def __init__(self, *networks: Clipped):
        self.networks = [network for network in networks if network.clip]
        self.seen = {network.norm: deque[float](maxlen=WINDOW) for network in self.networks}

    def __call__(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        shares = {}
        for network in self.networks:
            norms = losses[network.norm].tolist() if network.norm in losses else []
            if norms:
                name = network.norm.replace("gradient_norm", "clipped")
                shares[name] = sum(norm > network.clip for norm in norms) / len(norms)
                self._look(network, norms)
        return shares

    def _look(self, network: Clipped, norms: list[float]) -> None:
        seen = self.seen.get(network.norm)
        if seen is None:  # already noticed
            return
        seen.extend(norms)
        clipped = sum(norm > network.clip for norm in seen)
        if len(seen) == WINDOW and clipped > WINDOW / 2:
            del self.seen[network.norm]
            notice(
                f"{clipped} of the last {WINDOW} steps had their gradient clipped: {network.norm} is "
                f"{median(seen):.3g} in the middle, clipped to {network.clip:g}. {network.turn}"
            )


def distillation(student: Denoiser, t: float, generator: float, critic: float) -> Clipping:
    """Watch a distillation whose student is first evaluated at `t`, given the `clip` entries of both networks."""
    schedule = student.schedule
    time = torch.tensor([t], dtype=torch.double)
    gain = student.prediction.coefficients(schedule.alpha(time), schedule.sigma(time))[1].abs().item()
    turn = "Raise student.optimizer.clip, or lower student.optimizer.lr"
    if gain > LOUD:
        turn = (
            f"At the student's time its network's output is multiplied by {gain:.3g} (prediction "
            f"{student.prediction.name}), and so are gradients, which Adam evens out, and the network's own errors, "
            "such as a grid, which it does not: evaluate it at an earlier time (student.times=[399] for Stable "
            "Diffusion, whose last is 999), and train longer"
        )
    return Clipping(
        Clipped("gradient_norm", generator, f"{turn}; see 'Sparse pictures' in docs/results.md"),
        Clipped("fake_gradient_norm", critic, "Raise fake.optimizer.clip, or lower fake.optimizer.lr"),
    )
