"""Measures how much of a training step is spent inside network passes, and how much outside."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn


class Clock:
    """Sums the time that networks spend in `forward` (by hooks) and in backward passes (within `counted`).

    On a GPU the marks are CUDA events that are read only in `read`, so timing adds no synchronisation to the step.
    Of `workers` that compute at the same time, each thread's seconds count as a share.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device, workers: int = 1):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any, int]] = []
        self._entered: dict[int, Any] = {}  # by thread
        self._counting: set[int] = set()  # threads
        self._main, self._workers = get_ident(), workers
        self._start = self._mark()
        for network in networks:
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the with block does as network time, passes of networks within it once."""
        start = self._mark()
        self._counting.add(get_ident())
        try:
            yield
        finally:
            self._counting.discard(get_ident())
        self._add(start)

    def read(self) -> tuple[float, float]:
        """Return `(seconds in networks, seconds in total)` since the last call."""
        end = self._mark()
        if self._cuda:
            torch.cuda.synchronize()
        network = sum(self._between(a, b) / shared for a, b, shared in self._spans)
        total = self._between(self._start, end)
        self._spans.clear()
        self._start = self._mark()
        return network, total

    def _enter(self, *_: Any) -> None:
        if get_ident() not in self._counting:
            self._entered[get_ident()] = self._mark()

    def _leave(self, *_: Any) -> None:
        if get_ident() not in self._counting:
            self._add(self._entered[get_ident()])

    def _add(self, start: Any) -> None:
        self._spans.append((start, self._mark(), 1 if get_ident() == self._main else self._workers))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self._cuda else b - a
