"""How many steps have their gradient clipped: a figure in the log, and a word to the user when it is most of them."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from distmatch.terminal import notice

WINDOW = 200
"""Steps that are looked at before anything is said."""


@dataclass(frozen=True)
class Clipped:
    """One network's gradients: the log's name of their norm, the length that they are cut to, and what to turn."""

    norm: str
    clip: float
    turn: str


class Clipping:
    """Called with the losses f[steps] by name whenever the loop has read them; returns the shares that were clipped.

    It computes on the host, with norms that are there anyway. What it says, it says once for each network.
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
        if seen is None:  # all is said
            return
        seen.extend(norms)
        clipped = sum(norm > network.clip for norm in seen)
        if len(seen) == WINDOW and clipped > WINDOW / 2:
            del self.seen[network.norm]
            notice(
                f"{clipped} of the last {WINDOW} steps had their gradient clipped: {network.norm} is "
                f"{median(seen):.3g} in the middle, clipped to {network.clip:g}. {network.turn}"
            )
