"""Heartbeats between the processes of a job: if one goes silent, the job exits instead of waiting forever.

`torchrun` notices when a process on its own machine dies. It does not notice one that hangs, and if a machine is gone,
the others notice nothing at all. So every process writes a heartbeat to the job's store; the first process watches all
others, and they watch the first. What counts is how long a heartbeat has not changed, by the observer's clock.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.distributed_c10d import Store

EVERY = 5.0
"""Seconds between two heartbeats."""

SILENCE = 35.0
"""Seconds without a heartbeat after which a process is considered lost."""


@contextmanager
def watched(store: Store, rank: int, world: int) -> Iterator[None]:
    """Have the processes watch each other inside the with block. One that finds another silent reports it and exits.

    The report goes to standard error. All processes must leave the block at about the same time.
    """
    done = threading.Event()
    own = store.clone()  # a separate connection: on a shared one, a waiting caller blocks all others
    own.set(f"alive-{rank}", "0")  # must be set first: `get` waits for a key that does not exist
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
    """Write this process's heartbeat and check those of others; `reached` is when the store last answered."""
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
                    done.wait(3 * EVERY)  # the store may live in this process: let the others read the message first
            reached[0] = time.monotonic()
        except RuntimeError:  # the store lives in the first process or its torchrun, so that one is gone
            lost = "0"
            done.wait(1.0)  # the job may have just ended normally
        if lost and not done.is_set():
            _leave(rank, world, lost)


def _time(rank: int, world: int, reached: list[float], done: threading.Event) -> None:
    """Exit if the store, which belongs to the first process, stops answering: `_watch` then hangs in a call."""
    while not done.wait(EVERY):
        if time.monotonic() - reached[0] > SILENCE + 4 * EVERY and not done.is_set():
            _leave(rank, world, "0")


def _leave(rank: int, world: int, lost: str) -> None:
    """Exit, even if the main thread is blocked."""
    message = (
        f"distmatch: process {rank} of {world} lost process {lost} of this job: no sign of life for {SILENCE:.0f} "
        "seconds, its machine may be gone. The last checkpoint is kept, and torchrun --max-restarts goes on from it\n"
    )
    with suppress(OSError):
        os.write(2, message.encode())  # bypasses sys.stderr's lock, which the main thread may hold
    os._exit(1)
