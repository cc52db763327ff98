"""Downloads files from the web, completely or not at all."""

import re
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic
from distmatch.system.progress import progress

MEGABYTE = 2**20


def download(url: str, file: Path) -> None:
    """Fetch `url` to `file`.

    Raises `UserError`, and leaves nothing behind, if the file cannot be fetched, if fewer bytes arrive than announced,
    or if its SHA-256 does not start with the one in its name (for names that end like `vgg16-397923af.pth`).
    """
    write_atomic(file, lambda beside: _fetch(url, beside))


def _fetch(url: str, file: Path) -> None:
    name = url.partition("?")[0].rpartition("/")[2]
    try:
        with urlopen(Request(url, headers={"User-Agent": "distmatch"}), timeout=60) as answer, file.open("wb") as out:
            announced = answer.headers.get("Content-Length")
            with progress(name, int(announced or 0) // MEGABYTE, unit="MB") as advance:
                while block := answer.read(MEGABYTE):
                    out.write(block)
                    advance(1)
    except (OSError, HTTPException) as error:
        raise UserError(f"{url} cannot be fetched: {error}") from error
    size = file.stat().st_size
    if announced is not None and size != int(announced):
        raise UserError(f"{url} cannot be fetched: {size:,} of {int(announced):,} bytes arrived. Try again")
    known = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if known and not file_sha256(file).startswith(known[1]):
        raise UserError(f"{url} cannot be fetched: what arrived is not the file whose SHA-256 begins {known[1]}")
