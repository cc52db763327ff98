"""Frozen networks that wait in the host's memory, and are on the device only while they compute."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def visiting(networks: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Have copies of the weights of `networks` on `device` inside the with block."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    own = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:  # the copies are freed; frozen weights need not be copied back
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


@contextmanager
def away(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have `network` in the host's memory inside the with block, and on `device` after it."""
    network.to("cpu")
    try:
        yield
    finally:
        network.to(device)


class Visitor:
    """A text encoder or a decoder whose networks are in the host's memory and compute on `device`."""

    def __init__(self, part: Any, device: torch.device | str):
        self.part, self.device = part, device
        parts = [part] if isinstance(part, nn.Module) else part.pipeline.components.values()
        self.networks = [one for one in parts if isinstance(one, nn.Module)]

    def __call__(self, *arguments: Any) -> Any:
        with visiting(self.networks, self.device):
            return self.part(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)
