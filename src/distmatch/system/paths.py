"""Where things are: the package's assets, the user's cache, and what `~` stands for."""

import os
from importlib import resources
from pathlib import Path

from distmatch.system.errors import UserError

ASSETS = Path(str(resources.files("distmatch"))) / "assets"
"""Models, classifiers and references shipped with the package."""

RECIPES = ASSETS.parent / "recipe" / "library"
"""Recipes shipped with the package."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distmatch"
"""Where everything that can be made or fetched again is kept."""

SCHEMES = ("edm:", "diffusers:", "inception:", "file://")
"""Prefixes that may precede a path."""


def expand(place: str) -> str:
    """Return `place` with a leading `~` or `~USER`, also after one of `SCHEMES`, replaced by the home folder.

    A shell expands it only at the start of a word: never in `pairs.path=~/pairs`, `edm:~/net.pkl` or `--out=~/run`.
    URLs and other names are unchanged. Raises `UserError` if the user does not exist.
    """
    scheme = next((s for s in SCHEMES if place.startswith(s)), "")
    path = place.removeprefix(scheme)
    if not path.startswith("~"):
        return place
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(path):
        user = path.partition("/")[0]
        raise UserError(f"{place}: {user} is no user's home here; write {scheme}./{path} for a path of that name")
    return scheme + expanded


def shipped(name: str) -> Path | None:
    """Return the package's folder called `name`; `None` if it has none, or if `name` is a path, such as ./mnist."""
    folder = ASSETS / name
    return folder if name.isidentifier() and folder.is_dir() else None


def located(source: str) -> str:
    """Return the folder of the package's text-to-image teacher called `source`; every other source as it is."""
    folder = shipped(source)
    return str(folder / "teacher") if folder and (folder / "teacher" / "model_index.json").exists() else source


def named(source: str) -> str:
    """Return the name of a teacher in the package whose folder is `source`, so that what is made from it can be used
    where the package is elsewhere; the inverse of `located`."""
    folder = Path(source)
    return folder.parent.name if folder.name == "teacher" and folder.parent.parent == ASSETS else source
