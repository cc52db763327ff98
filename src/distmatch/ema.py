"""Exponential moving average of a network's weights, in fp32."""

import copy

import torch
from torch import nn


class EMA:
    """Keeps `network`, a frozen fp32 copy whose weights trail the trained ones.

    `average <- decay * average + (1 - decay) * weight` after every optimizer step, with the decay ramped up as
    `min(decay, (1 + n) / (10 + n))` so that the start does not linger.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._pairs = (list(self.network.parameters()), [p.detach() for p in network.parameters()])

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(*self._pairs, 1 - decay)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.network.load_state_dict(state["network"])
