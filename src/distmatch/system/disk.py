"""Checks that a disk has room; turns errors of the machine (disk, permissions, memory) into one message that says what
to do next."""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distmatch.system.errors import UserError
from distmatch.system.screen import size

MEMORY = re.compile(r"can't allocate memory|not enough memory|[Oo]ut of memory|Unable to allocate")
"""What PyTorch and NumPy say when they cannot allocate memory."""

RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which are written in Rust, report an error of the operating system."""

ZIP = re.compile(r"inline_container|PytorchStreamWriter failed")
"""What PyTorch says when it cannot write an archive, whatever the reason."""

ADVICE = {
    errno.EROFS: "choose another place, e.g. with --out",
    errno.EACCES: "give yourself the right to it, or choose another place, e.g. with --out",
    errno.EPERM: "give yourself the right to it, or choose another place, e.g. with --out",
    errno.ENOENT: "check its name, or choose another place",
    errno.ENOTDIR: "a file is where a folder is wanted; move it, or choose another place, e.g. with --out",
    errno.EEXIST: "a file is where a folder is wanted; move it, or choose another place, e.g. with --out",
    errno.EISDIR: "a folder is where a file is wanted; move it, or choose another name",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.EFBIG: "the file system, or `ulimit -f`, does not allow a file of this size",
    errno.EIO: "the disk may be full, or it or the network to it fails",
    errno.ESTALE: "the network disk was mounted anew; run the same again",
}


def check_room(wanted: Iterable[tuple[Path, int]], writes: str, remedy: str) -> str:
    """Return how much of what is free will be written to each disk.

    Args:
        wanted: places and the bytes that will be written there.
        writes: what writes them, with a verb: "the run writes".
        remedy: what to do about too little room, besides making room.

    Raises `UserError` if a disk has too little room.
    """
    disks: dict[Path, list[tuple[Path, int]]] = {}
    for place, nbytes in wanted:
        disks.setdefault(_mount(place), []).append((place, nbytes))
    said = []
    for mount, parts in disks.items():
        total, free = sum(nbytes for _, nbytes in parts), shutil.disk_usage(mount).free
        if total > free:
            listed = ", ".join(f"{size(nbytes)} in {place}" for place, nbytes in parts)
            raise UserError(
                f"the disk of {parts[0][0]} has {size(free)} free, and {writes} {size(total)}"
                f"{f': {listed}' if len(parts) > 1 else ''}. Make room, {remedy}"
            )
        said.append(f"{size(total)} of {size(free)} free")
    return "; ".join(said)


def _mount(place: Path) -> Path:
    """Return the mount point of the nearest existing folder."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    while there.parent != there and there.stat().st_dev == there.parent.stat().st_dev:
        there = there.parent
    return there


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise every system error in the with block as an `OSError` on `path`, whichever library met it."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def explained(error: BaseException) -> str | None:
    """Return one message for an error caused by the machine, or `None` for any other error."""
    if isinstance(error, MemoryError) or MEMORY.search(str(error)) or _number(error) == errno.ENOMEM:
        first = (str(error).strip().splitlines() or ["no more can be had"])[0]
        return (
            f"the memory does not suffice ({first:.300}). In training, take accumulate=N, gradient_checkpointing=true "
            "or smaller batches (match.batch, regress.batch, pairs.batch); otherwise a smaller --batch"
        )
    number = _number(error)
    if number is not None:
        place = _place(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"{place}{os.strerror(number)}{_free(error)}. Make room, or choose another place, e.g. with --out, and "
                "run the same again: what is complete is kept"
            )
        return f"{place}{os.strerror(number)}" + (f"; {ADVICE[number]}" if number in ADVICE else "")
    if isinstance(error, OSError):  # e.g. network errors, from libraries that subclass OSError
        return f"{type(error).__name__}: {error}"
    return None


def _number(error: BaseException) -> int | None:
    """Return the errno of an error, as reported by the system, by Rust or by PyTorch's archive writer."""
    if isinstance(error, OSError):
        return error.errno
    if found := RUST.search(str(error)):
        return int(found[1])
    return errno.EIO if ZIP.search(str(error)) else None


def _place(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""


def _free(error: BaseException) -> str:
    """Return how much space is left on the disk that the error is about."""
    name = getattr(error, "filename", None)
    if isinstance(name, str):
        for folder in (Path(name), *Path(name).parents):
            with suppress(OSError):
                return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free)"
    return ""
