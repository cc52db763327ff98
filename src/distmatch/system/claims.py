"""Shares work between processes that come and go, without a coordinator: files in a folder, each made once.

A claim on `name` is the file `name.claim-0`, created by only one process. The owner rewrites it every `expiry / 4`
seconds until the work is done. If it stops changing for `expiry` seconds by the observer's clock, or if its owner ran
on this host and has ended, the owner is considered dead: `name.claim-1` may then be created, again by one process only.
Clocks of different machines are never compared, and a live claim is never deleted.
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
"""Seconds without a change after which the owner of a claim is considered dead."""


class Claims:
    """The claims of one process on files in `folder`."""

    def __init__(self, folder: Folder, expiry: float = EXPIRY):
        self.folder, self.expiry = folder, expiry
        self._seen: dict[str, tuple[bytes, float]] = {}

    def expired(self, claim: str) -> bool:
        """Return whether the owner of the file `claim` is dead: known to have ended, or silent for `expiry` seconds.

        Silent means that this process has not seen the file change.
        """
        try:
            beat = self.folder.read(claim)
        except FileNotFoundError:
            return False  # finished just now
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
        """Try to claim `name.claim-<number>`: yield whether this process got it. Renewed inside the with block.

        At the end, this claim and all earlier ones on `name` are removed.

        Args:
            dead: the content of the previous claim; empty for a first one. If it is gone, this process looked too long
                ago: another has since taken over, finished and made room for a third. The claim then fails.
            about: what others can read about the owner.
            lost: called from a thread when this process was considered dead and the claim is no longer its own.
        """
        claim, mark, done = f"{name}.claim-{number}", f"{identity()}-{uuid4().hex}", threading.Event()

        def content(beat: int) -> bytes:
            return f"{mark} {beat:08d} {about}".encode()  # constant length, so that a full disk cannot refuse a rewrite

        def renew() -> None:
            beat = 0
            while not done.wait(self.expiry / 4):
                beat += 1
                with suppress(OSError, ValueError):  # the network may be down for a moment
                    if lost is not None and latest(self.folder.sizes()).get(name) != number:
                        lost()
                    if self.folder.exists(claim):  # if it is gone, this process hung and was considered dead
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
        """Return whether claim `number` is the latest, and the one before it is still the `dead` one."""
        if latest(self.folder.sizes()).get(name) != number:
            return False
        with suppress(FileNotFoundError):
            return number == 0 or self.folder.read(f"{name}.claim-{number - 1}") == dead
        return False

    @contextmanager
    def waited(self, name: str) -> Iterator[None]:
        """Hold the claim on `name` inside the with block, waiting for the claims of others first."""
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
        """Remove the claims that dead processes left on `names`, whose work is done. In a read-only folder they stay.

        Waits until it is clear which owners are dead.
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
                    left.remove(claim)  # its owner is alive and will remove it, e.g. when the file has grown
                elif self.expired(claim):
                    left.remove(claim)
                    with suppress(OSError):  # harmless if it cannot be removed: the work is done
                        self.folder.remove(claim)
            if left:
                pause = min(2 * pause + 0.02, self.expiry / 20)
                time.sleep(pause)


def owner(content: bytes) -> str:
    """Return the `process.identity` in a claim's content, or an empty string if there is none."""
    found = re.match(FORM, content.decode(errors="replace"))
    return found[0] if found else ""


def _parts(file: str) -> tuple[str, int]:
    """Return the name and number of a claim; the name is empty for any other file, such as an editor's backup."""
    found = re.fullmatch(r"(.+)\.claim-(\d{1,9})", file)
    return (found[1], int(found[2])) if found else ("", -1)


def latest(names: Collection[str]) -> dict[str, int]:
    """Return the number of the latest claim on each name, among the files `names`."""
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
    """Make the missing ones of the files `names` in `folder`, together with all other processes that do the same.

    Returns when all are there. If a process dies while making one, another takes it over `expiry` seconds later.

    Args:
        present: whether the file `name` is there and complete, given the folder's `sizes`.
        make: makes one file. Two processes make the same one only if the first hung for longer than `expiry`.
        found: called with the names present at the start, and with those that other processes have made.
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
            # Another process may have finished it between our look at the folder and the claim.
            if mine and not is_there(name):
                try:
                    make(name)
                except FileNotFoundError:  # this process hung while writing; others made the file and swept ours
                    if not is_there(name):
                        raise
                missing.remove(name)
        unopposed, pause = mine, 0.0
    claims.tidy(set(names))
    folder.sweep(expiry)
