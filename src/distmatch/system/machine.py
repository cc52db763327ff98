"""What this machine has, and which way of computing is faster on it, by trying: about a second, once per process.

What is tried is a small convolutional network, forward and backward: the kind of work that the choice matters for.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.system.workers import Workers

WORTH = 1.1
"""How much faster the less plain way must be. Far above the noise of the trial, so that a machine decides the same way
each time."""


@cache
def bf16_gain(device: torch.device) -> float:
    """Return how many times faster bf16 autocast is than fp32 on `device`; below 1 where it is emulated.

    Of a CPU it is the ratio in one thread, in time that this thread computed: others that are busy move it little.
    """
    if device.type == "cuda":
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    if device.type != "cpu":
        return 0.0
    network, x = _network(), torch.randn(4, 64, 16, 16)  # few images: emulated arithmetic is up to 40 times slower

    def run(low: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            _backward(network, x)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another, and each in turn for a core that something else has
    try:
        ways = {"fp32": lambda: run(False), "bf16": lambda: run(True)}
        fp32, bf16 = map(min, _seconds(ways, rounds=5, clock=time.thread_time).values())
    finally:
        torch.set_num_threads(threads)
    return fp32 / bf16


@cache
def workers_gain(count: int) -> float:
    """Return how many times faster `count` workers do a batch on the CPU than one with all its cores."""
    network, x = _network(), torch.randn(32, 64, 16, 16)
    workers, parts = Workers(count), x.chunk(count)
    ways: dict[str, Callable[[], Any]] = {
        "one": lambda: _backward(network, x),
        "many": lambda: list(workers.map(lambda part: _backward(network, part), parts)),
    }
    one, many = map(median, _seconds(ways, rounds=7).values())
    return one / many


@dataclass(frozen=True)
class Choice:
    """What is faster here, and why, in a few words; nothing is said of what could not be chosen."""

    value: Any
    said: str = ""


def faster_precision(device: torch.device) -> Choice:
    """Return "bf16" or "fp32"."""
    gain = bf16_gain(device)
    chosen = "bf16" if gain > WORTH else "fp32"
    if device.type == "cuda":
        return Choice(chosen, f"{chosen} (this GPU has {'it' if chosen == 'bf16' else 'no bf16'})")
    if device.type != "cpu":
        return Choice(chosen)
    said = f"{gain:.2g} times as fast as" if gain >= 1 else f"1/{1 / gain:.2g} as fast as"
    return Choice(chosen, f"{chosen} (bf16 is {said} fp32)")


def faster_workers(most: int) -> Choice:
    """Return the number of workers on the CPU, a divisor of `most`, the number of images that they share."""
    cores = torch.get_num_threads()
    counts = [count for count in range(2, min(cores, most) + 1) if most % count == 0 and cores % count == 0]
    gains = {1: WORTH} | {count: workers_gain(count) for count in counts}
    best = max(gains, key=lambda count: gains[count])
    if not counts:
        return Choice(1)
    if best == 1:
        return Choice(1, f"one worker on all {cores} cores ({max(counts)} are no faster)")
    return Choice(best, f"{best} workers on {cores} cores ({gains[best]:.2g} times as fast as one)")


def memory(device: torch.device) -> int:
    """Return the bytes of memory that `device` has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _network() -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU())]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _backward(network: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(network(x).square().mean(), list(network.parameters()))


def _seconds(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds, by `clock`, of each round of each way, tried in turn so that a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            began = clock()
            run()
            if turn:  # the first is to warm up
                seconds[name].append(clock() - began)
    return seconds
