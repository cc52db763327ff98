"""What a part of `gpu.py` is given to work with, and the file of results that all parts share."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distmatch.system.files import write_json
from distmatch.system.plain import read_json

NEEDS_GPU = "needs a GPU"

Figures = dict[str, Any]
"""Figures by name; a name says the unit."""

Target = tuple[Literal["at most", "at least", "within 10 % of"], float]


class Results:
    """`results.json`: parts by name, each with a status, seconds and rows. Every change is one atomic write.

    Only one process writes at a time: a part's, or between parts the one that starts them.
    """

    def __init__(self, file: Path):
        self.file = file

    def read(self) -> dict[str, Any]:
        return read_json(self.file, dict[str, Any]) if self.file.exists() else {"parts": {}}

    def part(self, name: str) -> dict[str, Any]:
        return {"status": "", "seconds": 0.0, "rows": {}, **self.read()["parts"].get(name, {})}

    def update(self, name: str, **changes: Any) -> None:
        tree = self.read()
        tree["parts"][name] = {**self.part(name), **changes}
        write_json(self.file, tree)

    def row(self, name: str, row: str, content: Mapping[str, Any]) -> None:
        self.update(name, rows={**self.part(name)["rows"], row: dict(content)})


@dataclass(frozen=True)
class Job:
    """A part at work, in a process of its own.

    Args:
        work: a folder for networks and runs, kept between calls.
        ends: when it will be stopped, in the clock of `time.time`.
        parent: the process that starts the parts.
        cifar: CIFAR-10, in any layout that `distmatch teach` reads.
    """

    name: str
    results: Results
    out: Path
    work: Path
    device: torch.device
    tiny: bool
    ends: float
    parent: int
    cifar: Path | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until this part is stopped."""
        return self.ends - time.time()

    def measure(
        self,
        row: str,
        work: Callable[[], Figures],
        targets: Mapping[str, Target] | None = None,
        *,
        gpu: bool = False,
        limit: float | None = None,
    ) -> bool:
        """Run `work` and record its figures as `row`, or its traceback; return whether there are figures.

        A row that succeeded in an earlier call is kept.

        Args:
            targets: what to compare figures with, by name.
            gpu: record elsewhere than on a GPU that it needs one.
            limit: seconds after which it fails.
        """
        if self.measured(row):
            return True
        done = attempt(row, work, limit) if self.gpu or not gpu else {"figures": {"": NEEDS_GPU}, "seconds": 0.0}
        self.record(row, done, targets)
        return "figures" in done

    def record(self, row: str, done: Mapping[str, Any], targets: Mapping[str, Target] | None = None) -> None:
        """Record what `attempt` returned, with what to compare its figures with, by name."""
        aims = {name: list(target) for name, target in (targets or {}).items()}
        self.results.row(self.name, row, {"targets": aims, **done})
        if self.parent not in (os.getpid(), os.getppid()):  # it was killed, and a new call may be running
            os._exit(1)

    def measured(self, row: str) -> bool:
        """Return whether this part has figures of `row`, perhaps from an earlier call."""
        return "figures" in self.results.part(self.name)["rows"].get(row, {})

    def figure(self, part: str, row: str, name: str) -> float | None:
        """Return a figure of another part, if it was measured."""
        value = self.results.part(part)["rows"].get(row, {}).get("figures", {}).get(name)
        return value if isinstance(value, float) else None


def attempt(row: str, work: Callable[[], Figures], limit: float | None) -> dict[str, Any]:
    """Return the `figures` that `work` makes or, as `error`, its traceback; and the `seconds` that it took."""
    print(f"== {row}", flush=True)
    done: dict[str, Any] = {}
    began = time.perf_counter()
    try:
        with ended_after(limit):
            done["figures"] = work()
    except Exception:
        done["error"] = traceback.format_exc()
        print(done["error"], flush=True)
    return {**done, "seconds": round(time.perf_counter() - began, 2)}


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` where the main thread of Python is by then: its traceback says what takes so long."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ratio(measured: Any, target: Target) -> float | None:
    """Return what was measured in units of its target."""
    return measured / target[1] if isinstance(measured, int | float) else None


def met(measured: float, target: Target) -> bool:
    kind, value = target
    if kind == "within 10 % of":
        return abs(measured / value - 1) <= 0.1
    return measured <= value if kind == "at most" else measured >= value
