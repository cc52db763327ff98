"""Writes files atomically: beside their destination, then moved there, so readers see all of one or nothing.

JSON files carry a digest of their content, which `plain.read_json` verifies.

A writer that is killed leaves a hidden file or folder whose name says which process it was:
`.NAME.HOST-PID-START-xxxxxxxx`. The next process that writes to the folder deletes it.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distmatch.system.disk import naming
from distmatch.system.errors import UserError
from distmatch.system.plain import SEAL, json_digest
from distmatch.system.process import FORM, identity, is_dead, is_here

ABANDONED = 3600.0
"""Seconds without a change after which a temporary file is considered abandoned, if nothing else tells."""

_swept: set[Path] = set()
"""The folders that this process has already searched for leftovers of dead writers."""


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary_path)`, then move the finished file to `path`: readers see all of it or none of it.

    Errors of the system are raised as an `OSError` on `path`, whichever library `write` calls; nothing is left behind.
    """
    with naming(path):
        _write_atomic(path, write)


def _write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    handle, name = tempfile.mkstemp(prefix=_prefix(path.name), dir=_tidy(path.parent))
    os.close(handle)
    try:
        write(Path(name))
        _to_disk(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def together(folder: Path, last: str) -> Iterator[Path]:
    """Yield a folder to write to. At the end, its entries move to `folder`, replacing those of the same names.

    The file `last` makes the others valid: it is deleted before they move, and moves last; folders move after files.
    A process that is killed leaves all old entries, all new ones, or no `last`. Other entries of `folder` stay.
    """
    with naming(folder):
        beside = Path(tempfile.mkdtemp(prefix=_prefix(last), dir=_tidy(folder)))
        try:
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            remove(folder / last)
            for entry in sorted(beside.iterdir(), key=lambda entry: (entry.name == last, entry.is_dir())):
                if entry.is_dir():  # a rename cannot replace a folder that is not empty
                    remove(folder / entry.name)
                entry.replace(folder / entry.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _tidy(folder: Path) -> Path:
    """Make `folder` and delete, once per process, what dead writers left in it."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _swept:
        _swept.add(folder)
        sweep(folder, ABANDONED, spare=is_here)
    return folder


def sweep(folder: Path, age: float, spare: Callable[[str], bool] = lambda _: False) -> None:
    """Delete temporary files in `folder` whose writer is known to be dead or that have not changed for `age` seconds.

    Age is measured by the disk's own clock. If there are no such files or the disk is read-only, nothing is written.

    Args:
        spare: whether to ignore the age of the files of this writer (a `process.identity`).
    """
    left = [(path, writer) for path in folder.glob(".*") if (writer := _writer(path.name))]
    if not left:
        return
    with suppress(OSError), tempfile.NamedTemporaryFile(prefix=_prefix("now"), dir=folder) as made:
        now = os.stat(made.name).st_mtime  # a network disk's clock may differ from ours
        for path, writer in left:
            with suppress(FileNotFoundError):
                if is_dead(writer) or (not spare(writer) and now - path.stat().st_mtime > age):
                    remove(path)


def _prefix(name: str) -> str:
    return f".{name}.{identity()}-"


def _writer(name: str) -> str:
    """Return the identity of the process that wrote a temporary file; empty for any other file."""
    found = re.fullmatch(rf"\..+\.({FORM})-\w{{8}}", name)
    return found[1] if found else ""


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to try things in, inside `folder` or, if that does not exist yet, its nearest parent.

    Raises `OSError` on `folder` if it is not writable. What a killed process leaves is swept like temporary files.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    with naming(folder), tempfile.TemporaryDirectory(prefix=_prefix("trial"), dir=there) as name:
        yield Path(name)


def check_writable(file: Path) -> None:
    """Raise `UserError` or `OSError` if `file` cannot be written. For long jobs that write it only at their end."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; expected the name of a file to write")
    with scratch(file.parent):
        pass


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` atomically, as indented JSON with the digest of its content."""
    content = json.loads(json.dumps(data))  # as it will be read back: keys are strings, tuples are lists
    sealed = json.dumps({**content, SEAL: json_digest(content)}, indent=2) + "\n"
    write_atomic(path, lambda p: p.write_text(sealed))


def _to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)
