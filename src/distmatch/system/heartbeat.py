"""Signs of life between the processes of a job: where one is silent, all others would wait for it for ever.

`torchrun` sees a process of its own machine die. It does not see one that stands still, and where a machine is gone,
the others see nothing at all. So every process says in the job's store that it lives; the first watches all others, and
they watch the first. What counts is how long a sign has not changed, by the clock of whoever looks.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.distributed_c10d import Store

EVERY = 5.0
"""Seconds between two signs of life."""

SILENCE = 35.0
"""Seconds without one after which a process is taken for lost."""


@contextmanager
def watched(store: Store, rank: int, world: int) -> Iterator[None]:
    """Within it, the processes watch each other. Who finds one silent says so on standard error and exits at once.

    All of them must leave it at about the same time.
    """
    done = threading.Event()
    own = store.clone()  # a connection of its own: on the first one, whoever waits keeps all others waiting
    own.set(f"alive-{rank}", "0")  # `get` waits for what is not there
    if rank == 0:
        own.set("lost", "")
    reached = [time.monotonic()]
    threads = [
        threading.Thread(target=_watch, args=(own, rank, world, reached, done), daemon=True),
        threading.Thread(target=_time, args=(rank, world, reached, done), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(EVERY)


def _watch(store: Any, rank: int, world: int, reached: list[float], done: threading.Event) -> None:
    """Say that this process lives, look whether the others do; `reached` is when the store last answered."""
    others = [f"alive-{other}" for other in (range(1, world) if rank == 0 else [0])]
    seen = dict.fromkeys(others, (b"", time.monotonic()))
    beat, lost = 0, ""
    while not done.wait(EVERY):
        beat += 1
        try:
            store.set(f"alive-{rank}", str(beat))
            lost = store.get("lost").decode()
            for name in others:
                sign, now = store.get(name), time.monotonic()
                if sign != seen[name][0]:
                    seen[name] = (sign, now)
                elif now - seen[name][1] > SILENCE and not lost:
                    lost = name.removeprefix("alive-")
                    store.set("lost", lost)
                    done.wait(3 * EVERY)  # the store may live in this process: the others read it first
            reached[0] = time.monotonic()
        except RuntimeError:  # the store is that of the first process, or of its torchrun
            lost = "0"
            done.wait(1.0)  # which may have just ended
        if lost and not done.is_set():
            _leave(rank, world, lost)


def _time(rank: int, world: int, reached: list[float], done: threading.Event) -> None:
    """A store that stands still answers nothing at all: it is the first process's."""
    while not done.wait(EVERY):
        if time.monotonic() - reached[0] > SILENCE + 4 * EVERY and not done.is_set():
            _leave(rank, world, "0")


def _leave(rank: int, world: int, lost: str) -> None:
    """Exit, whatever the main thread waits for."""
    message = (
        f"distmatch: process {rank} of {world} lost process {lost} of this job: no sign of life for {SILENCE:.0f} "
        "seconds, its machine may be gone. The last checkpoint is kept, and torchrun --max-restarts goes on from it\n"
    )
    with suppress(OSError):
        os.write(2, message.encode())  # standard error without its lock, which the main thread may hold
    os._exit(1)
