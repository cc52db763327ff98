"""Stops at a convenient moment: SIGINT and SIGTERM set a flag. Elsewhere SIGTERM raises, as SIGINT does.

A program whose output nobody reads any longer ends, too: see `ends_unread`.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal has its usual effect."""

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread, where Python allows no signal handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextmanager
def raises_terminated() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, so that what is held is released.

    One of several processes may wait for the others where Python cannot raise anything: there SIGTERM ends at once.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminated(number: int, _: FrameType | None) -> None:
    raise Terminated


@contextmanager
def ends_unread() -> Iterator[None]:
    """Exit without a traceback, as a program killed by SIGPIPE, if the reader of standard output has gone: `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # so that a full disk is an error now rather than after the program has ended
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python tries to flush again at exit, and complains
        raise SystemExit(141) from None


def _unread() -> bool:
    """Return whether the reader of standard output has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
