"""Images that the processes of a machine share: decoded once, into a file that all of them map into memory.

A process for each GPU would otherwise hold a copy of its own. The file is a temporary one, in a folder whose name no
other start of the job has: it is never out of date, and needs no name that the user would have to think of. Whichever
process comes first makes it and the others wait for it, so machines need not know of each other. It is deleted when the
job ends; what a killed job leaves is deleted by the next one.
"""

import errno
import json
import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

from distmatch.data.images import Images, load_images
from distmatch.system import parallel
from distmatch.system.claims import make_together
from distmatch.system.digests import Damaged, read_file, save_file
from distmatch.system.disk import naming
from distmatch.system.errors import UserError
from distmatch.system.files import ABANDONED, sweep
from distmatch.system.process import identity, is_here
from distmatch.system.storage import Folder

FILE = "images.safetensors"


def shared_images(place: str, split: str) -> Images:
    """Return `load_images(place, split)`; of several processes on one machine, only one reads and decodes them.

    The others' images have the same pixels, labels, classes and captions, but no account of how they were read. Waits
    for no other process but the one that decodes.

    Raises `UserError` as `load_images` does, in all processes; if the file with the pixels is damaged or of other
    images; and if the disk for temporary files has no room for it.
    """
    if parallel.world() == 1:
        return load_images(place, split)
    of = f"{parallel.start()} {split} {place}"
    folder = _temporary(sha256(of.encode()).hexdigest()[:8])
    make_together(Folder(folder), [FILE], lambda name, sizes: name in sizes, lambda _: _make(folder, place, split, of))
    images = _read(folder / FILE, of)
    parallel.at_end(lambda: shutil.rmtree(folder, ignore_errors=True))
    return images


def _temporary(name: str) -> Path:
    """Make this machine's folder for temporary files of this job, after deleting those of jobs that have ended.

    It belongs to what started this process, which on each machine is one `torchrun`. One that starts its processes
    again has ended those of its earlier starts.
    """
    root, owner = Path(tempfile.gettempdir()), identity(os.getppid())
    sweep(root, ABANDONED, spare=is_here)
    folder = root / f".images.{owner}-{name}"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        for left in set(root.glob(f".images.{owner}-*")) - {folder}:
            shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user, who could change what is read from it; delete it")
    return folder


def _make(folder: Path, place: str, split: str, of: str) -> None:
    """Write what `load_images` returns, or says is wrong with the images: the others need not find that out again."""
    tensors, metadata = {}, {"of": of}
    try:
        images = load_images(place, split)
        about = json.dumps({"classes": images.classes, "captions": images.captions}).encode()
        tensors = {"pixels": images.pixels, "about": torch.frombuffer(bytearray(about), dtype=torch.uint8)}
        if images.labels is not None:
            tensors["labels"] = images.labels
    except UserError as error:
        metadata["problem"] = str(error)
    beside = folder / f"{FILE}.{identity()}"
    try:
        with naming(beside):
            save_file(tensors, beside, metadata)
            beside.replace(folder / FILE)  # without waiting for the disk: the file need not outlive the machine's boot
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder} has no room for the decoded images of {place}, which the processes of this machine share "
            f"there: {error.strerror}. Set TMPDIR to a folder on a larger disk"
        ) from error


def _read(file: Path, of: str) -> Images:
    tensors, metadata = read_file(file)
    if metadata.get("of") != of:
        raise Damaged(f"{file} holds other images than those that this job has made; delete it, and start again")
    if "problem" in metadata:
        raise UserError(metadata["problem"])
    about = json.loads(tensors["about"].numpy().tobytes())
    captions = about["captions"]
    return Images(
        tensors["pixels"],
        tensors.get("labels"),
        tuple(about["classes"]),
        captions=None if captions is None else tuple(map(tuple, captions)),
    )
