"""Models by name or path: `mnist` and other models of the package, a folder of a model or a run, `edm:FILE`,
`diffusers:FOLDER_OR_ID`, `mixture:NAME`.
"""

import re
from pathlib import Path
from typing import Literal

from torch import nn

from distmatch.config import recipes
from distmatch.denoiser import Denoiser
from distmatch.errors import UserError
from distmatch.models.folder import Info, load_model
from distmatch.models.mixture import MIXTURES
from distmatch.paths import ASSETS, expand
from distmatch.schedule import Schedule
from distmatch.terminal import command


def find_model(
    name: str, kind: Literal["teacher", "student"], net: nn.Module | None = None, schedule: Schedule | None = None
) -> tuple[Denoiser, Info]:
    """The model called `name`.

    Args:
        name: `mixture:NAME` (exact Gaussian mixture), `edm:FILE` (a published EDM checkpoint, file or URL),
            `diffusers:FOLDER_OR_ID` (Stable Diffusion), a folder (of a model, or of a run, which has one in `model/`),
            or the name of a model in the package, which has a teacher and a student each.
        kind: which of the two is wanted.
        net, schedule: see `load_model`.

    Raises `UserError` when nothing of that name exists, or when it is of the other kind.
    """
    name = expand(name)
    scheme, _, rest = name.partition(":")
    if scheme == "mixture":
        if rest not in MIXTURES:
            raise UserError(f"mixture {rest!r} is unknown; expected one of {', '.join(MIXTURES)}")
        mixture = MIXTURES[rest]()
        return mixture, Info(shape=(mixture.dim,))
    if scheme == "edm":
        from distmatch.models.published import cached_edm

        denoiser, info = cached_edm(rest)
    elif scheme == "diffusers":
        from distmatch.models.pretrained import load_stable

        if not Path(rest).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", rest):  # or a hub would be asked for it
            raise UserError(f"{name}: {rest!r} is neither a folder here nor a model id, OWNER/NAME")
        denoiser, info = load_stable(rest)
    else:
        denoiser, info = load_model(model_folder(name, kind), net, schedule)
    if bool(info.times) != (kind == "student"):
        have = "student" if info.times else "teacher"
        raise UserError(f"{name} is a {have}; a {kind} is needed here")
    return denoiser, info


def model_folder(name: str, kind: Literal["teacher", "student"]) -> Path:
    """Where the model called `name` lies; see `find_model`."""
    folder = Path(expand(name))
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if folder.is_dir() and (folder / "checkpoints").is_dir():
        raise UserError(f"{name} is an unfinished run: it has no model/ yet; run its command again to continue it")
    if (ASSETS / name / kind / "config.json").exists():
        return ASSETS / name / kind
    if name in recipes():
        raise UserError(f"{name} is a recipe: train it, and name the run's folder: {command('train', name)}")
    known = ", ".join(sorted(p.parent.parent.name for p in ASSETS.glob(f"*/{kind}/config.json")))
    raise UserError(f"{kind} {name!r} is neither a model folder nor a run; the package has {known or 'none'}")
