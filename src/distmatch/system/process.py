"""Identifies the process that wrote something, so that another process can check whether it is dead."""

import os
import re
import socket
from functools import cache
from hashlib import sha256
from pathlib import Path

FORM = r"[0-9a-f]{8}-\d{1,10}-\d{1,20}"
"""A regular expression that matches what `identity` returns."""

ANYWHERE = "0" * 8
"""The host of a process that cannot tell where it runs: nobody can know whether it is dead."""


def identity(pid: int | None = None) -> str:
    """Return host, process number and start time of this process, or of process `pid`, e.g. `3f0a91bc-4711-893021`."""
    pid = os.getpid() if pid is None else pid
    return f"{_host()}-{pid}-{_started(pid) or 0}"


def is_here(identity: str) -> bool:
    """Return whether the process of this `identity` runs, or ran, where this process could see it."""
    return identity.partition("-")[0] == _host() != ANYWHERE


def is_dead(identity: str) -> bool:
    """Return whether the process of this `identity` is known to have ended; never true for one on another host."""
    if not is_here(identity):
        return False
    _, pid, started = identity.split("-")
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # the process belongs to another user
        pass
    now = _started(int(pid))
    return now is not None and now != int(started)


@cache
def _host() -> str:
    """Return a digest of what defines one process table: this boot, its PID namespace and its host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        table = f"{boot}{os.readlink('/proc/self/ns/pid')}{socket.gethostname()}"
    except OSError:  # not Linux
        return ANYWHERE
    return sha256(table.encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; -1 for a zombie, which is dead but not yet waited for."""
    try:
        # The process name, in parentheses, may itself contain spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if re.match("[ZXx]", state) else int(fields[18])
