"""An object store to test with, `bucket://name/...`: files in a folder that are reached by fsspec alone.

As in S3, a file appears whole and one of many creates it. Every fetch is noted in `fetched.log`.
"""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    protocol = "bucket"
    home = ""
    delay = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        name = str(path).removeprefix("bucket://")
        return name if name.startswith(cls.home) else f"{cls.home}/{name}".rstrip("/")

    def pipe_file(self, path, value, mode="overwrite", **_):
        path = Path(self._strip_protocol(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.home)
        os.write(handle, value)
        os.close(handle)
        try:
            os.link(name, path) if mode == "create" else os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)

    def put_file(self, path1, path2, **_):
        self.pipe_file(path2, Path(path1).read_bytes())

    def get_file(self, path1, path2, **_):
        with open(f"{self.home}/fetched.log", "a") as log:
            log.write(f"{Path(path1).name}\n")
        shutil.copyfile(self._strip_protocol(path1), path2)
        time.sleep(self.delay)


def make(folder: Path, monkeypatch) -> Path:
    """`bucket://` is in `folder`, copies of what is in it in `folder/copies`."""
    from distmatch.system import storage

    (folder / "bucket").mkdir()
    monkeypatch.setattr(Bucket, "home", str(folder / "bucket"))
    monkeypatch.setattr(storage, "COPIES", folder / "copies")
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Bucket.clear_instance_cache()
    return folder / "bucket"


def fetched(home: Path) -> list[str]:
    log = home / "fetched.log"
    return log.read_text().split() if log.exists() else []


def taken() -> int:
    """Bytes of the local copies."""
    from distmatch.system import storage

    total = 0
    for file in storage.COPIES.iterdir():
        with suppress(FileNotFoundError):
            total += 0 if file.name.startswith(".") else file.stat().st_size
    return total
