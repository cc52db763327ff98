"""Work shared by processes and machines that come and go, without a coordinator: files in a folder, each made once.

A claim on `name` is the file `name.claim-0`, which only one process can create. Its owner changes it all the time until
the work is done. One that no longer changes, by the clock of whoever looks, is a dead process's: `name.claim-1` may
then be created, again by one process alone. No clocks are compared, and a live claim is never deleted.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from uuid import uuid4

from distmatch.storage import Folder

EXPIRY = 60.0
"""Seconds after which a claim that does not change is a dead process's."""


class Claims:
    """The claims of one process on files in `folder`."""

    def __init__(self, folder: Folder, expiry: float = EXPIRY):
        self.folder, self.expiry = folder, expiry
        self._seen: dict[str, tuple[bytes, float]] = {}

    def expired(self, claim: str) -> bool:
        """Whether the file `claim` has not changed for `expiry` seconds, as far as this process has seen."""
        try:
            beat = self.folder.read(claim)
        except FileNotFoundError:
            return False  # done just now
        now = time.monotonic()
        before, since = self._seen.get(claim, (b"", now))
        if beat != before or claim not in self._seen:
            self._seen[claim] = (beat, now)
            return False
        return now - since > self.expiry

    @contextmanager
    def held(self, name: str, number: int = 0) -> Iterator[bool]:
        """Whether `name.claim-<number>` is this process's; it is renewed within, and removed with all before it."""
        claim = f"{name}.claim-{number}"
        owner = uuid4().hex
        if not self.folder.create(claim, f"{owner} 0".encode()):
            yield False
            return
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(claim, owner, done), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            done.set()
            thread.join()
            for old in range(number + 1):
                self.folder.remove(f"{name}.claim-{old}")

    @contextmanager
    def waited(self, name: str) -> Iterator[None]:
        """Within it, the claim on `name` is this process's; those of others are waited for."""
        pause = 0.0
        while True:
            number = latest(self.folder.sizes()).get(name, -1)
            if number < 0 or self.expired(f"{name}.claim-{number}"):
                with self.held(name, number + 1) as mine:
                    if mine:
                        yield
                        return
            pause = min(2 * pause + 0.02, self.expiry / 20)
            time.sleep(pause)

    def tidy(self, names: Collection[str]) -> None:
        """Remove what dead processes left of claims on `names`, which are done; waits until it is known who is dead."""
        left = [file for file in self.folder.sizes() if file.rpartition(".claim-")[0] in names]
        first: dict[str, bytes] = {}
        pause = 0.0
        while left:
            for claim in list(left):
                try:
                    beat = self.folder.read(claim)
                except FileNotFoundError:
                    left.remove(claim)
                    continue
                if beat != first.setdefault(claim, beat):
                    left.remove(claim)  # its owner lives and removes it, e.g. when the file has grown
                elif self.expired(claim):
                    self.folder.remove(claim)
            if left:
                pause = min(2 * pause + 0.02, self.expiry / 20)
                time.sleep(pause)

    def _renew(self, claim: str, owner: str, done: threading.Event) -> None:
        beat = 0
        while not done.wait(self.expiry / 4):
            beat += 1
            with suppress(OSError, ValueError):  # a network that is down for a moment
                if self.folder.exists(claim):  # else this process stood still, was taken for dead, and others did it
                    self.folder.change(claim, f"{owner} {beat}".encode())


def latest(names: Collection[str]) -> dict[str, int]:
    """The number of the latest claim on each name, among the files `names`."""
    found: dict[str, int] = {}
    for file in names:
        name, separator, number = file.rpartition(".claim-")
        if separator:
            found[name] = max(found.get(name, 0), int(number))
    return found


def make_together(
    folder: Folder,
    names: Sequence[str],
    present: Callable[[str, Mapping[str, int]], bool],
    make: Callable[[str], None],
    found: Callable[[Collection[str]], None] = lambda _: None,
    expiry: float = EXPIRY,
) -> None:
    """Make what is missing of the files `names` in `folder`, together with all other processes that do so.

    Returns when all are there. What a process was making when it died is made by another, `expiry` seconds later.

    Args:
        present: whether the file `name` is there and complete, given the folder's `sizes`.
        make: makes one. Two processes may make the same one only where the first stood still for longer than `expiry`.
        found: called with those that are there at the beginning, and with those that others have made.
    """
    claims, missing, unopposed, pause = Claims(folder, expiry), list(names), True, 0.0

    def is_there(name: str) -> bool:
        return folder.exists(name) and present(name, folder.sizes())

    while True:
        files = folder.sizes()
        there = {name for name in missing if present(name, files)}
        if there:
            found(there)
            missing = [name for name in missing if name not in there]
        if not missing:
            break
        claimed = latest(files)
        free = [name for name in missing if name not in claimed]
        if free:
            name, number = (free[0] if unopposed else random.choice(free)), 0
        else:
            dead = [name for name in missing if claims.expired(f"{name}.claim-{claimed[name]}")]
            if not dead:
                pause = min(2 * pause + 0.02, expiry / 20)
                time.sleep(pause)
                continue
            name = random.choice(dead)
            number = claimed[name] + 1
        with claims.held(name, number) as mine:
            # Another may have finished it between the look and the claim.
            if mine and not is_there(name):
                try:
                    make(name)
                except FileNotFoundError:  # this process stood still while it wrote: others made it, and swept
                    if not is_there(name):
                        raise
                missing.remove(name)
        unopposed, pause = mine, 0.0
    claims.tidy(set(names))
    folder.sweep(names, expiry)
