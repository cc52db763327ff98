"""Measures how much of a training step is spent inside network passes, and how much outside."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Sums the time that networks spend in `forward` (by hooks) and in backward passes (called through `backward`).

    On a GPU the marks are CUDA events that are read only in `read`, so timing adds no synchronisation to the step.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._open: Any = None
        self._start = self._mark()
        for network in networks:
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)

    def backward(self, loss: Tensor) -> None:
        """Call `loss.backward()`, counted as network time."""
        start = self._mark()
        loss.backward()
        self._spans.append((start, self._mark()))

    def read(self) -> tuple[float, float]:
        """Return `(seconds in networks, seconds in total)` since the last call."""
        end = self._mark()
        if self._cuda:
            torch.cuda.synchronize()
        network = sum(self._between(a, b) for a, b in self._spans)
        total = self._between(self._start, end)
        self._spans.clear()
        self._start = self._mark()
        return network, total

    def _enter(self, *_: Any) -> None:
        self._open = self._mark()

    def _leave(self, *_: Any) -> None:
        self._spans.append((self._open, self._mark()))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self._cuda else b - a
