"""Lists and reads the files in a folder, tar or zip, one file at a time and with bounded size.

Nothing is unpacked to disk. The total that comes out of an archive is bounded too, so that one made to fill the memory
or take forever is refused.
"""

import bz2
import gzip
import io
import itertools
import lzma
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from distmatch.system.errors import UserError
from distmatch.system.limits import FILE, UNPACKED, check, limit
from distmatch.system.screen import printable

LINKS = 3
"""How many symbolic links to folders may follow one another; without a limit, a few links make millions of paths."""
EXPANSION = 100
"""An archive may unpack to this many times its own size plus `limits.UNPACKED`: pictures do not compress further."""
REPLACED = "replaced by later ones of the same name"
MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x5d\x00\x00": lzma.open}
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError,
    NotImplementedError, RuntimeError, UnicodeError, ValueError, KeyError, OverflowError,
)  # fmt: skip
"""What Python's readers raise on damaged or unusual archives."""


class Files:
    """The files in a folder.

    Args:
        path: the folder or the archive.
        without: a folder below `path` to skip.

    Attributes:
        sizes: bytes by name, sorted by name; names are relative, with `/`.
        left_out: what is not listed here, counted by reason.

    Raises `UserError` for anything unreadable, as does `read`, naming the archive and the file.
    """

    def __init__(self, path: Path, without: Path | None = None):
        self.path, self.left_out = path, Counter[str]()
        self.sizes: dict[str, int] = dict(sorted(self._list(without)))

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield `(name, content)` for each of `names`, in the order in which they are stored."""
        for name in names:
            check(self.sizes[name], FILE, f"{self.path}: {printable(name)}")
        return self._read(names)

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """Open one file for random access. In an archive, its content is held in memory."""
        if self.path.is_dir():
            with _named(self.path, name):
                file = (self.path / name).open("rb")
            with file:
                yield file
        else:
            ((_, content),) = self.read([name])
            yield io.BytesIO(content)

    def _list(self, without: Path | None) -> Iterator[tuple[str, int]]:
        """List files and their sizes, following symbolic links to folders unless they lead back to a parent."""
        excluded = _identity(without) if without is not None and without.exists() else None
        todo: list[tuple[Path, str, tuple[tuple[int, int], ...], int]] = [(self.path, "", (_identity(self.path),), 0)]
        while todo:
            folder, prefix, above, links = todo.pop()
            with _named(folder), os.scandir(folder) as entries:
                found = list(entries)
            for entry in found:
                name = f"{prefix}{entry.name}"
                if entry.is_file():
                    yield name, entry.stat().st_size
                elif entry.is_dir():
                    identity, followed = _identity(Path(entry.path)), links + entry.is_symlink()
                    if identity == excluded:
                        self.left_out["the run's own folder"] += 1
                    elif identity in above or followed > LINKS:
                        self.left_out["links that lead in a circle"] += 1
                    else:
                        todo.append((Path(entry.path), f"{name}/", (*above, identity), followed))
                elif entry.is_symlink():
                    self.left_out["broken links"] += 1

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            with _named(self.path, name), (self.path / name).open("rb") as file:
                content = file.read(limit(FILE))  # the file may have grown since it was listed
            yield name, content


class OneFile(Files):
    """A single file, presented as a folder with one entry."""

    def __init__(self, path: Path):
        super().__init__(path.parent)
        self.sizes = {path.name: path.stat().st_size}

    def _list(self, without: Path | None) -> Iterator[tuple[str, int]]:
        return iter(())


class TarFiles(Files):
    """The files in a tar archive, plain or compressed (gzip, bzip2, xz). If a name occurs twice, the later wins."""

    def _list(self, without: Path | None) -> Iterator[tuple[str, int]]:
        self.position: dict[str, int] = {}
        sizes: dict[str, int] = {}
        with _named(self.path), self._opened() as (archive, file):
            for number, member in enumerate(iter(archive.next, None)):
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep a kilobyte of each
                name = _clean(member.name)
                if member.isfile():
                    self.left_out[REPLACED] += name in sizes
                    sizes[name], self.position[name] = member.size, number
                elif not member.isdir():
                    self.left_out["links in the archive"] += 1
            _check_end(archive, file)
        self.left_out += Counter()  # drops zeros
        yield from sizes.items()

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = {self.position[name]: name for name in names}
        with self._opened() as (archive, _):
            for number in itertools.count():
                if not wanted:
                    return
                with _named(self.path):
                    member = archive.next()
                    archive.members = []  # type: ignore[attr-defined]
                if member is None:
                    raise UserError(f"{self.path} has changed while it was read; start again")
                if (name := wanted.pop(number, None)) is not None:
                    with _named(self.path, name):
                        file = archive.extractfile(member)
                        assert file is not None
                        content = file.read()
                    yield name, content

    @contextmanager
    def _opened(self) -> Iterator[tuple[tarfile.TarFile, "_Bounded"]]:
        with self.path.open("rb") as raw:
            head = raw.read(6)
        opened: Any = next((function for magic, function in MAGIC.items() if head.startswith(magic)), open)
        most = sys.maxsize if opened is open else EXPANSION * self.path.stat().st_size + limit(UNPACKED)
        with opened(self.path, "rb") as content:
            file = _Bounded(content, most)
            with tarfile.open(fileobj=file, mode="r:") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
                yield archive, file


class ZipFiles(Files):
    """The files in a zip archive."""

    def _list(self, without: Path | None) -> Iterator[tuple[str, int]]:
        with _named(self.path), zipfile.ZipFile(self.path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
        self.infos = {_clean(info.filename): info for info in infos}
        if len(self.infos) < len(infos):
            self.left_out[REPLACED] = len(infos) - len(self.infos)
        for name, info in self.infos.items():
            yield name, info.file_size

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        size, most = sum(self.sizes[name] for name in names), EXPANSION * self.path.stat().st_size
        check(size - most, UNPACKED, f"{self.path} unpacks to {size:,} bytes, of which all above {EXPANSION} times it")
        with zipfile.ZipFile(self.path) as archive:
            for name in names:
                info = self.infos[name]
                if info.flag_bits & 1:
                    raise UserError(
                        f"{self.path}: {printable(name)} is encrypted; unpack the archive with its password and give "
                        "the folder"
                    )
                with _named(self.path, name):
                    content = archive.read(info)
                yield name, content


def open_files(path: Path, without: Path | None = None) -> Files:
    """Return the files of the folder or archive `path`.

    Raises `UserError` if it is neither.
    """
    if path.is_dir():
        return Files(path, without)
    with _named(path):
        with path.open("rb") as file:
            head = file.read(4)
        return ZipFiles(path) if head.startswith(b"PK") else TarFiles(path)


class _Bounded:
    """A file that yields at most `most` bytes, with the methods that tarfile needs."""

    def __init__(self, file: Any, most: int):
        self.file, self.most, self.tell = file, most, file.tell

    def read(self, count: int) -> bytes:
        check(count, FILE, "a header or file in it")
        content = self.file.read(count)
        self._check(self.tell())
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0:
            self._check(position)
        return self.file.seek(position, whence)

    def _check(self, position: int) -> None:
        if position > self.most:
            raise UserError(
                f"it unpacks to more than {self.most:,} bytes; if that is meant, unpack it and give the folder"
            )


def _check_end(archive: tarfile.TarFile, file: _Bounded) -> None:
    """Raise `UserError` if an archive was cut off or has a damaged header: tarfile silently stops there."""
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"it breaks off after {archive.offset:,} bytes: it was cut, or is damaged there; get it again")
    rest = file.read(2**16)
    if rest.strip(b"\0"):
        raise UserError("more follows after its end, as in archives put together; unpack it with `tar -i`")


@contextmanager
def _named(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn what a reader raises into a `UserError` that names the archive and the file in it."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, UserError) and str(error).startswith(str(path)):
            raise
        if name is None and path.is_dir():
            raise UserError(f"{path} cannot be read: {_reason(error)}") from error
        if name is None:
            raise UserError(f"{path} cannot be read as an archive (.tar, .tar.gz, .zip): {_reason(error)}") from error
        raise UserError(f"{path}: {printable(name)} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = printable(getattr(error, "strerror", None) or error, 200)
    way = "; unpack the archive and give the folder" if isinstance(error, NotImplementedError) else ""
    return f"{text or type(error).__name__}{way}"


def _identity(path: Path) -> tuple[int, int]:
    with _named(path):
        found = path.stat()
    return found.st_dev, found.st_ino


def _clean(name: str) -> str:
    """Return a name from an archive without the parts that would lead out of it."""
    return "/".join(p for p in name.replace("\\", "/").split("/") if p not in ("", "..", "."))
