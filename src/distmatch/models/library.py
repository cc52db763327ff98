"""Models by name or path: `mnist` and other models of the package, a folder of a model or a run, `edm:FILE`,
`diffusers:FOLDER_OR_ID`, `mixture:NAME`; and the family of each.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import Schedule
from distmatch.models.diffusers.families import family_in
from distmatch.models.edm.checkpoints import Published
from distmatch.models.family import Components, Family
from distmatch.models.folder import load_model
from distmatch.models.info import Info
from distmatch.models.mixture import Mixtures
from distmatch.system.errors import UserError
from distmatch.system.paths import ASSETS, RECIPES, expand
from distmatch.system.terminal import command

FAMILIES: dict[str, Family] = {"mixture": Mixtures(), "edm": Published()}
"""By scheme; those of `diffusers:` have a table of their own."""

BARE = Family()
"""Of models that are a network and nothing else."""


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
    family, source = _by_scheme(name)
    denoiser, info = family.load(source) if family else load_model(model_folder(source, kind), net, schedule)
    if bool(info.times) != (kind == "student"):
        have = "student" if info.times else "teacher"
        raise UserError(f"{name} is a {have}; a {kind} is needed here")
    return denoiser, info


def outline(teacher: str) -> tuple[Denoiser, Info]:
    """The teacher called `teacher` on the meta device, for plans.

    Published checkpoints are known by name and models in diffusers' format by their settings; their weights are not
    read. Raises `UserError` where a model is not known.
    """
    family, source = _by_scheme(teacher)
    if family:
        return family.outline(source)
    denoiser, info = find_model(teacher, "teacher")
    return denoiser.to("meta"), info


def family_of(info: Info) -> Family:
    """The family that answers for the model of `info`. Raises `UserError` where its source cannot be had."""
    return family_in(info.source) if info.source else BARE


def components(info: Info, device: torch.device | str = "cpu") -> Components:
    """What the model of `info` has besides its network, loaded once per source and device."""
    return _components(info.source, str(device)) if info.source else Components()


@cache
def _components(source: str, device: str) -> Components:
    return family_in(source).components(source, device)


def _by_scheme(name: str) -> tuple[Family | None, str]:
    """The family that `name` says, and what it says of it; none for the name of a folder."""
    name = expand(name)
    scheme, _, source = name.partition(":")
    if scheme == "diffusers":
        return family_in(source), source
    return (FAMILIES[scheme], source) if scheme in FAMILIES else (None, name)


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
    if (RECIPES / f"{name}.yaml").exists():
        raise UserError(f"{name} is a recipe: train it, and name the run's folder: {command('train', name)}")
    known = ", ".join(sorted(p.parent.parent.name for p in ASSETS.glob(f"*/{kind}/config.json")))
    raise UserError(f"{kind} {name!r} is neither a model folder nor a run; the package has {known or 'none'}")
