"""Makes a folder belong to one job at a time; a second job is told which job owns it.

The owner is the process that holds the claim `.owner` in the folder (see `claims`); under `torchrun`, the first process
holds it for all. A second job is refused as soon as it sees that the owner is alive. An owner that died on this host is
known to be dead, and its folder is taken over at once. An owner on another host counts as dead only after
`claims.EXPIRY` seconds of silence.
"""

import inspect
import json
import os
import random
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from distmatch.system import parallel
from distmatch.system.claims import EXPIRY, Claims, latest, owner
from distmatch.system.disk import naming
from distmatch.system.errors import UserError
from distmatch.system.process import identity, is_here
from distmatch.system.storage import Folder

OWNER = ".owner"

P = ParamSpec("P")
R = TypeVar("R")


def owns_out(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: while it runs, the folder passed as `out` belongs to it alone (see `owned`)."""
    parameters = inspect.signature(command)

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with owned(parameters.bind(*args, **kwargs).arguments["out"]):
            return command(*args, **kwargs)

    return run


@contextmanager
def owned(folder: Path, expiry: float = EXPIRY) -> Iterator[None]:
    """Own `folder` inside the with block, creating it if needed. All processes of the job must take part.

    Raises `UserError` naming the owner if another job has it, or if it is not writable.
    """
    parallel.same_folder(folder)
    with ExitStack() as until_the_end:

        @parallel.on_first
        def take() -> None:
            until_the_end.enter_context(_taken(folder, expiry))

        take()
        yield


@contextmanager
def _taken(folder: Path, expiry: float) -> Iterator[None]:
    """Take the claim, from a dead owner if need be, or raise `UserError`."""
    place = Folder(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not place.is_writable():
        raise UserError(f"{folder} is not to be written by this user or at all; choose another folder with --out")
    claims, about = Claims(place, expiry), json.dumps(_about())
    try:
        while True:
            number, content = _without_owner(folder, claims)
            with claims.held(OWNER, number + 1, dead=content, about=about, lost=lambda: _leave(folder)) as mine:
                if mine:
                    yield
                    return
            time.sleep(random.uniform(0.01, 0.05))
    finally:
        with suppress(OSError):  # rmdir removes the folder only if it is empty
            folder.rmdir()


def _without_owner(folder: Path, claims: Claims) -> tuple[int, bytes]:
    """Return the number and content of the last claim, once its owner is dead; the number is -1 if there is none.

    Raises `UserError` if the owner is alive.
    """
    first: dict[str, bytes] = {}
    while True:
        number = latest(claims.folder.sizes()).get(OWNER, -1)
        if number < 0:
            return number, b""
        claim = f"{OWNER}.claim-{number}"
        try:
            content = claims.folder.read(claim)
        except FileNotFoundError:  # removed just now
            continue
        if claims.expired(claim):
            return number, content
        lives = is_here(owner(content)) or content != first.get(claim, content)
        if lives and not _is_own_job(content):
            raise UserError(
                f"{folder} belongs to another job that is running: {_described(content)}. Wait for it or stop it, then "
                "run this again to go on from there; or choose another folder with --out"
            )
        if not first:
            print(
                f"distmatch: {folder} was left by, or still belongs to, another job: {_described(content)}. Waiting "
                f"until it ends or is silent for {claims.expiry:.0f} seconds",
                file=sys.stderr,
            )
        first.setdefault(claim, content)
        time.sleep(min(0.2, claims.expiry / 20))


def _about() -> dict[str, Any]:
    """Return what the next job is told about this one."""
    name = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["distmatch" if name == "__main__.py" else name, *sys.argv[1:]])[:1000],
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "job": _job(),
    }


def _job() -> str | None:
    """Return the name of this `torchrun` job, shared by all its starts and restarts; torchrun's default is "none"."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def _read(content: bytes) -> dict[str, Any]:
    """Return the owner's `_about`; empty if the claim cannot be understood."""
    try:
        about = json.loads(content.split(b" ", 2)[2])
    except (IndexError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_own_job(content: bytes) -> bool:
    """Return whether the owner belongs to this `torchrun`, which has restarted its processes: it is about to end."""
    return _job() is not None and _read(content).get("job") == _job() and owner(content) != identity()


def _described(content: bytes) -> str:
    """Describe the owner for people, escaped: text from a file we did not write must not control the terminal."""
    about = _read(content)
    if not about:
        return "one that does not say who it is"
    command, host, process, since = (
        "".join(c if c.isprintable() else "?" for c in str(about.get(key, "?")))[:300]
        for key in ("command", "host", "process", "since")
    )
    return f"`{command}`, process {process} on {host}, since {since}"


def _leave(folder: Path) -> None:
    """Exit at once, whatever the main thread is doing: the folder no longer belongs to this job."""
    message = (
        f"distmatch: {folder} no longer belongs to this job: it was deleted, or this process stood still for so long "
        "that another job took it over. This process ends and leaves it alone\n"
    )
    with suppress(OSError):
        os.write(2, message.encode())
    os._exit(1)
