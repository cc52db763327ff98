"""Exponential moving average of a network's weights, in fp32."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from distmatch.training.engine import local

Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network) -> Network:
    """Return an fp32 copy that is never trained."""
    return copy.deepcopy(network).float().eval().requires_grad_(False)


@torch.no_grad()
def draw_towards(network: nn.Module, other: nn.Module, share: float) -> None:
    """Move the weights of `network` towards those of `other`, of the same shapes, by `share` of the difference."""
    weights: list[Tensor] = list(map(local, network.parameters()))
    goals: list[Tensor] = list(map(local, other.parameters()))
    torch._foreach_lerp_(weights, goals, share)  # pyright: ignore[reportPrivateImportUsage]


class EMA(Generic[Network]):
    """Maintains `network`, a frozen fp32 copy whose weights trail the trained ones; `average` is that copy, if made.

    `average <- decay * average + (1 - decay) * weight` after every optimizer step, with the decay ramped up as
    `min(decay, (1 + n) / (10 + n))` so that the initial weights are forgotten quickly.
    """

    def __init__(self, network: Network, decay: float, average: Network | None = None):
        self.decay = decay
        self.updates = 0
        self.network = average if average is not None else frozen_copy(network)
        self._average = [p.data for p in self.network.parameters()]  # collected once: `update` runs in every step
        self._trained = [p.detach() for p in network.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, trained = map(local, self._average), map(local, self._trained)
        torch._foreach_lerp_(list(average), list(trained), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict:
        return {"updates": self.updates, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.network.load_state_dict(state["network"])
