"""Finds models and their families by name or path.

Names are `mnist` and other models of the package, a model or run folder, `edm:FILE`, `diffusers:FOLDER_OR_ID` and
`mixture:NAME`. If a folder here and a model of the package have one name, the folder's model is taken; a path such as
./mnist always means the folder.
"""

import difflib
from dataclasses import fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import Schedule
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.hub import without_weights
from distmatch.models.edm.checkpoints import Published
from distmatch.models.family import Components, Family
from distmatch.models.folder import is_student, load_model, text_in
from distmatch.models.info import Info, Lora
from distmatch.models.mixture import Mixtures
from distmatch.models.offload import Visitor
from distmatch.system.errors import UserError
from distmatch.system.paths import ASSETS, RECIPES, expand, located, shipped
from distmatch.system.terminal import command, notice

FAMILIES: dict[str, Family] = {"mixture": Mixtures(), "edm": Published()}
"""Families by scheme; those of `diffusers:` have their own table."""

SEARCHED = 1000
"""Files looked at to tell a folder of images."""

BARE = Family()
"""The family of models that consist only of a network."""


def find_model(
    name: str, kind: Literal["teacher", "student"], net: nn.Module | None = None, schedule: Schedule | None = None
) -> tuple[Denoiser, Info]:
    """Load the model called `name`.

    Args:
        name: `mixture:NAME` (exact Gaussian mixture), `edm:FILE` (a published EDM checkpoint, file or URL),
            `diffusers:FOLDER_OR_ID` (see docs/teachers.md), a folder (of a model, also in diffusers' format, or of a
            run, which has one in `model/`), or the name of a model in the package.
        kind: which of the two to load.
        net, schedule: see `load_model`.

    Raises `UserError` if there is nothing of that name, or if it is of the other kind.
    """
    family, source = _by_scheme(name, kind)
    if family:
        _check_kind(name, "teacher", kind)
        return family.load(source)
    folder = model_folder(source, kind)
    _check_kind(name, "student" if is_student(folder) else "teacher", kind)
    return load_model(folder, net, schedule)


def _check_kind(name: str, have: str, needed: str) -> None:
    if have != needed:
        raise UserError(f"{name} is a {have}; a {needed} is needed here")


def source_of(name: str, kind: Literal["teacher", "student"]) -> str:
    """Return where the model called `name` is: a folder, or what follows the scheme in `name`; see `find_model`."""
    family, source = _by_scheme(name, kind)
    return source if family else str(model_folder(source, kind))


def takes_prompts(name: str, kind: Literal["teacher", "student"]) -> bool:
    """Return whether the model called `name` makes images of prompts, without reading its weights; see `find_model`."""
    family, source = _by_scheme(name, kind)
    return family.text if family else text_in(model_folder(source, kind))


def outline(teacher: str) -> tuple[Denoiser, Info]:
    """Return the teacher called `teacher` on the meta device, for plans.

    Published checkpoints are known by name, models in diffusers' format by their settings; their weights are not read.
    The settings of the recipes' models are in the package. Raises `UserError` if a model is unknown.
    """
    scheme, _, source = teacher.partition(":")
    name = f"diffusers:{without_weights(source)}" if scheme == "diffusers" else teacher
    family, source = _by_scheme(name, "teacher")
    if family:
        return family.outline(source)
    denoiser, info = find_model(teacher, "teacher")
    return denoiser.to("meta"), info


def family_of(info: Info) -> Family:
    """Return the family of the model described by `info`. Raises `UserError` if its source is unavailable."""
    return family_in(info.source) if info.source else BARE


def image_shape(info: Info) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the model's images, which is not `info.shape` if it makes latents."""
    if not info.latent:
        return info.shape
    return 3, *family_in(info.source).settings(info.source).of_shape(info.shape).size


def diffusers_source(name: str) -> str | None:
    """Return where the teacher called `name` is if it is in diffusers' format: a folder or a model id."""
    name = expand(name)
    if name.startswith("diffusers:"):
        source = name.removeprefix("diffusers:")
        return source if (Path(source) / "model_index.json").exists() else located(source)
    folders = (name, f"{name}/model", located(name))
    return next((folder for folder in folders if (Path(folder) / "model_index.json").exists()), None)


def components(
    info: Info,
    device: torch.device | str = "cpu",
    offload: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Components:
    """Return the parts of a model other than its network, loaded once for each way of using it.

    Args:
        offload: they are in the host's memory, and on the device only while they compute.
        precision: of the text encoders.
    """
    if not info.source:
        return Components()
    return _components(info.source, info.shape, info.lora, str(device), offload, precision)


@cache
def _components(
    source: str,
    shape: tuple[int, ...],
    lora: Lora | None,
    device: str,
    offload: bool,
    precision: Literal["fp32", "bf16"],
) -> Components:
    info = Info(shape, source=source, lora=lora)
    parts = family_in(source).components(info, "cpu" if offload else device, precision)
    if not offload:
        return parts
    moved: dict[str, Any] = {
        field.name: Visitor(part, device)
        for field in fields(parts)
        if (part := getattr(parts, field.name)) not in (None, field.default)
    }
    return replace(parts, **moved)


def _by_scheme(name: str, kind: str) -> tuple[Family | None, str]:
    """Split `name` into a family and a source; the family is None if `name` is a model folder of ours."""
    if not name:
        raise UserError(f"the name of the {kind} is empty; give a model of the package, a folder or a run")
    name = expand(name)
    scheme, _, source = name.partition(":")
    if scheme in FAMILIES:
        return FAMILIES[scheme], source
    found = diffusers_source(name)
    if found is None or (kind == "student" and found == located(name) != name):  # the package may have a student too
        return None, name
    tell_which(name, kind, found)
    return family_in(found), found


def tell_which(name: str, kind: str, found: str | Path) -> None:
    """Say which model is taken, if a folder here and a model of the package are called `name`: that in `found`."""
    if (package := shipped(name)) is None or not (package / kind).is_dir() or not Path(name).is_dir():
        return
    if Path(found).is_relative_to(package):
        notice(f"{name}: the {kind} of the package; the folder of this name here has none (./{name} names the folder)")
    else:
        notice(f"{name}: the {kind} in the folder of this name here, not that of the package")


def model_folder(name: str, kind: Literal["teacher", "student"]) -> Path:
    """Return the folder of the model called `name`; see `find_model`."""
    folder = _model_folder(name, kind)
    tell_which(name, kind, folder)
    return folder


def _model_folder(name: str, kind: Literal["teacher", "student"]) -> Path:
    folder, package = Path(expand(name)), shipped(name)
    own = package / kind if package and (package / kind / "config.json").exists() else None
    if own and kind == "teacher" and (folder / "recipe.yaml").exists():
        return own  # a distillation's run has no teacher: it may be called like the one that it distils
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if folder.is_dir() and (folder / "checkpoints").is_dir():
        raise UserError(f"{name} is an unfinished run: it has no model/ yet; run its command again to continue it")
    if own:
        return own
    if Path(name).name == name and (RECIPES / f"{name}.yaml").exists():
        raise UserError(f"{name} is a recipe: train it, and name the run's folder: {command('train', name)}")
    if (teach := _teaches(folder)) is not None:
        raise UserError(f"{name} holds images, not a model; train a teacher on them: {command(teach, name)}")
    files = ("config.json", "model_index.json")
    known = sorted({p.parent.parent.name for file in files for p in ASSETS.glob(f"*/{kind}/{file}")})
    close = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        f"{kind} {name!r} is neither a model folder nor a run"
        + (f"; did you mean {close[0]!r}?" if close else f"; the package ships {', '.join(known) or 'none'}")
    )


def _teaches(folder: Path) -> str | None:
    """Return the command that trains a teacher on the images in `folder`; `None` if it has none."""
    from distmatch.data.decode import SUFFIXES
    from distmatch.data.prompts import KEYS

    files = list(islice((file for file in folder.rglob("*") if file.is_file()), SEARCHED))
    pictures = {file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES}
    if not pictures:
        return None
    captioned = any(file.suffix == ".txt" and file.with_suffix("") in pictures for file in files)
    tables = folder.glob("metadata.jsonl")
    if captioned or any(f'"{key}"' in _head(table) for table in tables for key in KEYS):
        return "teach-text"
    return "teach"


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(4096).decode(errors="replace")
