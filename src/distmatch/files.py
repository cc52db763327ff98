"""Files that are written beside their place and moved there: a reader sees all of one or none of it.

A writer that is killed leaves a hidden file, which names its process: `.NAME.HOST-PID-START-xxxxxxxx`. The next process
that writes into the folder deletes it.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distmatch.disk import naming
from distmatch.process import FORM, identity, is_dead, is_here

ABANDONED = 3600.0
"""Seconds without a change after which a temporary file is a dead writer's, where nothing else tells."""

_swept: set[Path] = set()
"""The folders that this process has looked through for what dead writers left."""


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary_path)`, then move the finished file to `path`: readers see all of it or none of it.

    What the system refuses is an `OSError` on `path`, whichever library `write` calls; nothing is left beside it.
    """
    with naming(path):
        _write_atomic(path, write)


def _write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    folder = path.parent.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _swept:
        _swept.add(folder)
        sweep(folder, ABANDONED, spare=is_here)
    handle, name = tempfile.mkstemp(prefix=_prefix(path.name), dir=folder)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def sweep(folder: Path, age: float, spare: Callable[[str], bool] = lambda _: False) -> None:
    """Delete the temporary files in `folder` whose writer is known to be dead, or that are unchanged for `age` seconds.

    Their age is taken by the disk's own clock. Where nothing is left, or the disk is read-only, nothing is written.

    Args:
        spare: whether the age of a file by this writer (a `process.identity`) says nothing.
    """
    left = [(path, writer) for path in folder.glob(".*") if (writer := _writer(path.name))]
    if not left:
        return
    with suppress(OSError), tempfile.NamedTemporaryFile(prefix=_prefix("now"), dir=folder) as made:
        now = os.stat(made.name).st_mtime
        for path, writer in left:
            with suppress(FileNotFoundError):
                if is_dead(writer) or (not spare(writer) and now - path.stat().st_mtime > age):
                    path.unlink()


def _prefix(name: str) -> str:
    return f".{name}.{identity()}-"


def _writer(name: str) -> str:
    """The identity of the process that wrote a temporary file; empty for any other file."""
    found = re.fullmatch(rf"\..+\.({FORM})-\w{{8}}", name)
    return found[1] if found else ""


def write_json(path: Path, data: Any) -> None:
    """`data` as indented JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=2) + "\n"))
