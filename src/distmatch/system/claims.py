"""Work shared by processes and machines that come and go, without a coordinator: files in a folder, each made once.

A claim on `name` is the file `name.claim-0`, which only one process can create. Its owner changes it all the time until
the work is done. One that no longer changes, by the clock of whoever looks, is a dead process's, and so is one whose
process ran on this host and has ended: `name.claim-1` may then be created, again by one process alone. No clocks are
compared, and a live claim is never deleted.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from uuid import uuid4

from distmatch.system.process import FORM, identity, is_dead
from distmatch.system.storage import Folder

EXPIRY = 60.0
"""Seconds after which a claim that does not change is a dead process's."""


class Claims:
    """The claims of one process on files in `folder`."""

    def __init__(self, folder: Folder, expiry: float = EXPIRY):
        self.folder, self.expiry = folder, expiry
        self._seen: dict[str, tuple[bytes, float]] = {}

    def expired(self, claim: str) -> bool:
        """Whether the owner of the file `claim` is dead: known to have ended, or silent for `expiry` seconds.

        Silent is a file that has not changed, as far as this process has seen.
        """
        try:
            beat = self.folder.read(claim)
        except FileNotFoundError:
            return False  # done just now
        if is_dead(owner(beat)):
            return True
        now = time.monotonic()
        before, since = self._seen.get(claim, (b"", now))
        if beat != before or claim not in self._seen:
            self._seen[claim] = (beat, now)
            return False
        return now - since > self.expiry

    @contextmanager
    def held(
        self,
        name: str,
        number: int = 0,
        *,
        dead: bytes | None = None,
        about: str = "",
        lost: Callable[[], None] | None = None,
    ) -> Iterator[bool]:
        """Whether `name.claim-<number>` is this process's; it is renewed within, and removed with all before it.

        Args:
            dead: the content of the claim before it, for one process alone even where that death is an old story:
                another has taken over since, finished, and made room for a third. Empty for a first claim.
            about: what others may read of the owner.
            lost: called, in a thread, when this process was taken for dead and the claim is no longer its own.
        """
        claim, mark, done = f"{name}.claim-{number}", f"{identity()}-{uuid4().hex}", threading.Event()

        def content(beat: int) -> bytes:
            return f"{mark} {beat:08d} {about}".encode()  # always as long, so that a full disk does not refuse it

        def renew() -> None:
            beat = 0
            while not done.wait(self.expiry / 4):
                beat += 1
                with suppress(OSError, ValueError):  # a network that is down for a moment
                    if lost is not None and latest(self.folder.sizes()).get(name) != number:
                        lost()
                    if self.folder.exists(claim):  # else this process stood still, was taken for dead, others did it
                        self.folder.change(claim, content(beat))

        if not self.folder.create(claim, content(0)):
            yield False
            return
        if dead is not None and not self._follows(name, number, dead):
            self.folder.remove(claim)
            yield False
            return
        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield True
        finally:
            done.set()
            thread.join()
            for old in range(number + 1):
                self.folder.remove(f"{name}.claim-{old}")

    def _follows(self, name: str, number: int, dead: bytes) -> bool:
        """Whether claim `number` is the last, and the one before it is still the `dead` one."""
        if latest(self.folder.sizes()).get(name) != number:
            return False
        with suppress(FileNotFoundError):
            return number == 0 or self.folder.read(f"{name}.claim-{number - 1}") == dead
        return False

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
        """Remove what dead processes left of claims on `names`, which are done; waits until it is known who is dead.

        In a folder that is not to be written they stay.
        """
        left = [file for file in self.folder.sizes() if _parts(file)[0] in names]
        if left and not self.folder.is_writable():
            return
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
                    left.remove(claim)
                    with suppress(OSError):  # it may stay where it cannot be removed: what it was for is done
                        self.folder.remove(claim)
            if left:
                pause = min(2 * pause + 0.02, self.expiry / 20)
                time.sleep(pause)


def owner(content: bytes) -> str:
    """The `process.identity` in a claim's content; empty where it has none."""
    found = re.match(FORM, content.decode(errors="replace"))
    return found[0] if found else ""


def _parts(file: str) -> tuple[str, int]:
    """Name and number of a claim; an empty name for any other file, such as an editor's copy of one."""
    found = re.fullmatch(r"(.+)\.claim-(\d{1,9})", file)
    return (found[1], int(found[2])) if found else ("", -1)


def latest(names: Collection[str]) -> dict[str, int]:
    """The number of the latest claim on each name, among the files `names`."""
    found: dict[str, int] = {}
    for name, number in map(_parts, names):
        if name:
            found[name] = max(found.get(name, 0), number)
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
    folder.sweep(expiry)
