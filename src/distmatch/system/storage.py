"""Folders on a disk or at a URL (`s3://`, `gs://`, `hf://`, ... via fsspec), read and written in whole files.

Files at a URL are read from local copies. When the copies take too much space, the least recently used are deleted.
"""

import base64
import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from distmatch.system.digests import file_sha256
from distmatch.system.disk import naming
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import sweep, write_atomic
from distmatch.system.paths import CACHE, expand
from distmatch.system.progress import console

Value = TypeVar("Value")

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""The package that fsspec needs for each kind of URL."""

COPIES = CACHE / "copies"
"""Where copies of remote files are kept, shared by all processes of a machine."""


def is_url(place: str | Path) -> bool:
    """Return whether `place` is a URL other than `file://`."""
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme not in ("file", "local")


def name_of(place: str | Path) -> str:
    """Return the last part of a URL or of a path, also of one such as `.`."""
    return Path(place if is_url(place) else os.path.abspath(str(place).removeprefix("file://"))).name


class Folder:
    """A folder at a path or URL. Its files are written whole: by a rename on a disk, by the store itself at a URL.

    Raises `UserError` for a file, and for a URL that fsspec does not know or whose package is missing.
    """

    def __init__(self, place: "str | Path | Folder"):
        self.place = expand(str(place)).removeprefix("file://").rstrip("/")
        self.path = None if is_url(self.place) else Path(self.place)
        self.fs: Any = None
        if self.path is None:
            self.fs, self.root = filesystem(self.place)
        elif self.path.is_file():
            raise UserError(f"{self.place} is a file; expected a folder")

    def __str__(self) -> str:
        return self.place

    def at(self, name: str) -> str:
        """Return where the file `name` is, for people."""
        return f"{self.place}/{name}"

    def sizes(self) -> dict[str, int]:
        """Return the files that exist now, with their sizes in bytes."""
        if self.path is not None:
            if not self.path.is_dir():
                return {}
            found = {}
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found[entry.name] = entry.stat().st_size
            return found
        self.fs.invalidate_cache()
        listed = []
        with _reached(self.place), suppress(FileNotFoundError):
            listed = self.fs.ls(self.root, detail=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}

    def exists(self, name: str) -> bool:
        if self.path is not None:
            return (self.path / name).exists()
        self.fs.invalidate_cache()
        with _reached(self.place):
            return self.fs.exists(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        """Return the file's content. Raises `FileNotFoundError`."""
        if self.path is not None:
            return (self.path / name).read_bytes()
        with _reached(self.place):
            return self.fs.cat_file(f"{self.root}/{name}")

    def opened(self, name: str, read: Callable[[Path], Value]) -> Value:
        """Return `read(file)` for the file or its local copy. Raises `FileNotFoundError`."""
        if self.path is not None:
            return read(self.path / name)
        while True:
            with _reached(self.place):
                file = copied(self.fs, f"{self.root}/{name}")
            with suppress(FileNotFoundError):  # another process has just deleted the copy to make room
                return read(file)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Call `write(temporary_path)` and move what it wrote to `name` atomically."""
        if self.path is not None:
            return write_atomic(self.path / name, write)
        with tempfile.TemporaryDirectory(prefix="distmatch-") as folder:
            file = Path(folder) / name
            write(file)
            with _written(self.place):
                self.fs.put_file(str(file), f"{self.root}/{name}")

    def create(self, name: str, content: bytes) -> bool:
        """Create the file `name` and return True, or return False if it exists: only one of many callers succeeds.

        S3 and Google Cloud Storage guarantee this, others may not. Raises `UserError` if the store is not writable.
        """
        if self.path is None:
            try:
                with _written(self.place):
                    self.fs.pipe_file(f"{self.root}/{name}", content, mode="create")
            except FileExistsError:
                return False
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            file = (self.path / name).open("xb")
        except FileExistsError:
            return False
        try:
            with naming(self.path / name), file:
                file.write(content)
        except OSError:  # the disk is full
            self.remove(name)
            raise
        return True

    def change(self, name: str, content: bytes) -> None:
        """Replace the content of a small file that only one process writes."""
        if self.path is not None:
            with (self.path / name).open("rb+") as file:  # in place, so that a reader never sees an empty file
                file.write(content)
                file.truncate()
        else:
            with _written(self.place):
                self.fs.pipe_file(f"{self.root}/{name}", content)

    def remove(self, name: str) -> None:
        """Delete the file, if it exists."""
        with suppress(FileNotFoundError):
            if self.path is not None:
                (self.path / name).unlink()
            else:
                with _reached(self.place):
                    self.fs.rm_file(f"{self.root}/{name}")

    def is_writable(self) -> bool:
        """Return whether this disk is writable; for a URL, always True: only an attempt can tell."""
        return self.path is None or os.access(self.path, os.W_OK)

    def sweep(self, age: float) -> None:
        """Delete what killed writers left on a disk; see `files.sweep`."""
        if self.path is not None:
            sweep(self.path, age)


@contextmanager
def _reached(place: str) -> Iterator[None]:
    """Turn errors of a store's own package into `UserError`, except those that say whether a file exists."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{place} cannot be reached: {error}") from error


@contextmanager
def _written(place: str) -> Iterator[None]:
    try:
        with _reached(place):
            yield
    except (FileNotFoundError, NotImplementedError) as error:
        raise UserError(f"{place} cannot be written: {error}") from error


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for `url`, and the path in it."""
    from fsspec.core import url_to_fs

    package = PACKAGES.get(url.partition("://")[0])
    if package is not None:
        need(package, by=url)
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} cannot be opened: {error}. Install with pip what is named there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}") from error
    return fs, root.rstrip("/")


def local(place: str | Path) -> Path:
    """Return a file or folder on the disk unchanged, or the local copy of a file at a URL.

    Raises `UserError` if there is no file at the URL.
    """
    if not is_url(place):
        return Path(expand(str(place)).removeprefix("file://"))
    fs, path = filesystem(str(place))
    try:
        with _reached(str(place)):
            return copied(fs, path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{place} is no file; expected one, e.g. an archive of images (a folder would take a request for each)"
        ) from error


def limit() -> float:
    """Return the most bytes that the copies of remote files may use."""
    given = os.environ.get("DISTMATCH_CACHE_GB", "20")
    try:
        return 1e9 * float(given)
    except ValueError as error:
        raise UserError(f"DISTMATCH_CACHE_GB is {given!r}; expected a number, e.g. 20") from error


def copied(fs: Any, path: str) -> Path:
    """Return the local copy of the current version of a remote file, fetching it if needed.

    Raises `FileNotFoundError`, and `UserError` if it is larger than all copies may be, does not say its size, or has
    another size or hash on arrival than the store states.
    """
    info = fs.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(path)
    version = [fs.ukey(path), info["size"], info.get("ETag"), info.get("Last-Modified")]  # HTTP's ukey is only the URL
    suffix = Path(path.partition("?")[0]).suffix
    file = COPIES / (hashlib.sha256(f"{fs.protocol}{path}{version}".encode()).hexdigest()[:32] + suffix)
    if copy := kept(file):
        return copy
    COPIES.mkdir(parents=True, exist_ok=True)
    with FileLock(COPIES / f".{file.stem}.lock") as lock:  # so that only one process of a machine fetches it
        copy = kept(file)
        if copy is None:
            reserved = _reserve(file.stem, info["size"], path)
            try:
                copy = keep(file, lambda p: _fetch(fs, path, info, p), _replacing(reserved))
            finally:
                reserved.unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
    return copy


def keep(file: Path, fetch: Callable[[Path], Any], appearing: AbstractContextManager[object] | None = None) -> Path:
    """Have `fetch(temporary_path)` write a copy, and keep it beside `file` under a name with its SHA-256.

    It takes this name within `appearing`.
    """
    write_atomic(file, fetch)
    copy = file.with_stem(f"{file.stem}-{file_sha256(file)}")
    with appearing or nullcontext():
        file.replace(copy)
    _compared.add(copy)
    return copy


def kept(file: Path) -> Path | None:
    """Return what `keep` made of `file`. If its content has changed, delete it and return None.

    Each process verifies a copy only once.
    """
    for copy in file.parent.glob(f"{glob.escape(file.stem)}-*{glob.escape(file.suffix)}"):
        with suppress(FileNotFoundError):  # another process deleted it to make room
            if copy in _compared or copy.stem.endswith(file_sha256(copy)):
                os.utime(copy)  # marks it as recently used
                _compared.add(copy)
                return copy
            copy.unlink()
            console.print(f"{copy} is damaged; it is fetched again", soft_wrap=True)
    return None


_compared: set[Path] = set()
"""The copies that this process has verified."""


def _fetch(fs: Any, path: str, info: dict[str, Any], file: Path) -> None:
    """Fetch a remote file and check it against the store's description."""
    fs.get_file(path, str(file))
    size = file.stat().st_size
    if size != info["size"]:
        raise UserError(f"{path} did not arrive whole: {size:,} of {info['size']:,} bytes. Run the same again")
    kind, known = "", ""
    if info.get("lfs"):  # Hugging Face
        kind, known = "sha256", info["lfs"]["sha256"]
    elif info.get("md5Hash"):  # Google Cloud Storage
        kind, known = "md5", base64.b64decode(info["md5Hash"]).hex()
    if kind:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, kind).hexdigest()
        if found != known:
            raise UserError(f"{path} did not arrive whole: its {kind} is {found}, not {known}. Run the same again")


def _reserve(stem: str, size: int | None, path: str) -> Path:
    """Wait until there is room for `size` more bytes, then reserve it with a sparse file of that size."""
    if size is None:
        raise UserError(f"{path} does not say its size, which decides whether there is room; download it first")
    if size > limit():
        raise UserError(
            f"{path} has {size / 1e9:.3g} GB, copies of remote files may take {limit() / 1e9:.3g} GB in all; "
            "set DISTMATCH_CACHE_GB"
        )
    reserved = COPIES / f".{stem}.reserved"
    while True:
        with FileLock(COPIES / ".lock"):
            _sweep(stem)
            reserved.unlink(missing_ok=True)  # left by a process that was killed
            if _make_room(size):
                reserved.touch()
                os.truncate(reserved, size)
                return reserved
        time.sleep(0.1)


@contextmanager
def _replacing(reserved: Path) -> Iterator[None]:
    """Have a copy appear in the place of `reserved`: who looks for room at this moment must find one of the two."""
    with FileLock(COPIES / ".lock"):
        yield
        reserved.unlink()


def _make_room(size: int) -> bool:
    """Delete the least recently used copies until `size` more bytes are within the limit.

    If the files being fetched leave no room, return False and delete nothing.
    """
    copies, fetching = [], 0
    for file in COPIES.iterdir():
        with suppress(FileNotFoundError):
            found = file.stat()
            if file.suffix == ".reserved":
                fetching += found.st_size
            elif "-" in file.stem and not file.name.startswith("."):  # without its digest it is still reserved
                copies.append((found.st_mtime, found.st_size, file))
    if size + fetching > limit():
        return False
    taken = size + fetching + sum(bytes_ for _, bytes_, _ in copies)
    for _, bytes_, file in sorted(copies):
        if taken > limit():
            file.unlink(missing_ok=True)
            taken -= bytes_
    return True


def _sweep(own: str) -> None:
    """Delete reservations and partial files of killed processes. A live one holds its file's lock; `own` is ours."""
    for stem in {file.name[1:].partition(".")[0] for file in COPIES.glob(".?*.*")} - {own}:
        with suppress(Timeout), FileLock(COPIES / f".{stem}.lock", blocking=False):
            for file in (COPIES / stem, *COPIES.glob(f"{stem}.*"), *COPIES.glob(f".{stem}.*")):
                file.unlink(missing_ok=True)
