"""Reads recipes: every number of an experiment in one strict YAML file, with dotted overrides."""

import json
import re
from collections.abc import Iterable
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from distmatch.recipe.earlier import present_name, present_text, renamed
from distmatch.recipe.entries import Recipe
from distmatch.recipe.entry import flat, marked, set_entry, walk
from distmatch.recipe.mistakes import explain, nearest, similar
from distmatch.system.errors import UserError
from distmatch.system.paths import RECIPES, expand
from distmatch.system.plain import fitting, read_yaml, yaml_of

SHOWN = 80
"""Characters of a value that a message shows."""


def recipes() -> dict[str, Path]:
    """Return the recipes of the package, by name."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"), key=lambda file: file.stem)}


def load_recipe(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Return the recipe called `name`, or in the file `name`, with `key=value` overrides such as `match.weighting=eq8`.

    Raises `UserError` for an unknown recipe, an unknown key (suggesting the nearest one) or a bad value, naming the
    override if one is to blame.
    """
    path, tree = _read(name)
    tree.setdefault("name", path.stem)
    file = deepcopy(tree)
    keys = overridden(overrides)
    overrides = [_trimmed(override) for override in overrides]
    for override in overrides:
        _apply(tree, override)
    if "stages" not in keys:
        groups = tuple(f"{key}." for key in keys)  # student.optimizer={lr: 1e-3}
        given = {key: value for key, value in flat(tree).items() if key in keys or key.startswith(groups)}
        _hold_in_stages(tree, given, path)
    source = f"recipe {name}" if name in recipes() else str(path)
    # A mistake that is in the file as well is not blamed on an override.
    found, own = _errors(tree), {error["loc"] for error in _errors(file)}
    if found:

        def guilty(error: Any) -> list[str]:
            return [] if error["loc"] in own else overrides

        raise UserError(explain(found, Recipe, source, guilty, lambda entry: _standing(name, entry)))
    return Recipe.model_validate(tree)


def overridden(overrides: Iterable[str]) -> list[str]:
    """Return the present names of the entries, or groups, that `overrides` set."""
    return [_trimmed(override).partition("=")[0] for override in overrides]


def _read(name: str, above: tuple[str, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """Return the path of a recipe's file, and its entries merged with those of its base."""
    path = Path(expand(name))
    if path.suffix not in (".yaml", ".yml"):
        if "=" in name:
            raise UserError(f"{name!r} is no recipe; the recipe comes first, what it changes after it: RECIPE {name}")
        if len(path.parts) > 1 or (path.exists() and name not in recipes()):
            raise UserError(f"{name} is neither a recipe of the package nor a file called .yaml or .yml")
        if name not in recipes():
            said = f"{above[-1]}: its base {name!r}" if above else f"recipe {name!r}"
            raise UserError(f"{said} is unknown{nearest(name, recipes(), 'see `distmatch recipes`')}")
        path = recipes()[name]
    elif not path.exists():
        raise UserError(f"recipe file {name} does not exist")
    tree = renamed(read_yaml(path))
    if "base" in tree:
        base = str(tree.pop("base"))
        if base in (*above, name):
            raise UserError(f"{path}: its base {base!r} has itself as base")
        below = _read(base, (*above, name))[1]
        for about in ("description", "expected"):  # of the base, and no longer true
            below.pop(about, None)
        if "stages" not in tree:
            _hold_in_stages(below, flat(tree), path)
        tree = _merged(below, tree)
    return path, tree


def _standing(name: str, entry: str) -> str:
    """Say what `entry` is in the recipe called `name`, or in the one of its bases where it stands; empty if in none."""
    while name:
        tree = renamed(read_yaml(_read(name)[0]))
        if entry in (own := flat(tree)):
            value = json.dumps(own[entry])
            said = f"{entry}: {value}" if len(value) <= SHOWN else entry  # as of stages, which would fill the screen
            return f"{said} in {'recipe ' * (name in recipes())}{name}"
        name = str(tree.get("base") or "")
    return ""


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base`, group by group."""
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def _hold_in_stages(tree: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """Have the entries `given`, of an override or of a file with this base, hold in every stage of `tree`, in place."""
    stages = fitting(tree.get("stages") or [], f"{path}: stages", list[dict[str, Any]])
    for stage in stages:
        change = fitting(stage.get("change") or {}, f"{path}: stages.change", dict[str, Any])
        stage["change"] = _overridden(change, given)
    tree["stages"] = stages


def _overridden(change: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's changes without the entries that are `given` for the whole run.

    Parts of a schedule stay, with the value that is given, so that the schedule remains the stage's own.
    """
    left = {key: value for key, value in change.items() if present_name(key) not in given}
    stated = {present_name(key) for key in change} & marked(Recipe, "schedule").keys() & given.keys()
    return left | {name: given[name] for name in sorted(stated) if given[name] is not None}


def _errors(tree: dict[str, Any]) -> list[Any]:
    """Return pydantic's errors about `tree`."""
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        # A list whose items are wrong is also said to be too short: without them.
        whole = {e["loc"][: len(e["loc"]) - 1] for e in found}
        return [e for e in found if not (e["type"] == "too_short" and e["loc"] in whole)]
    return []


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def run_name(base: Recipe, recipe: Recipe) -> str:
    """Return the default name of a run's folder: the recipe's name, and what was overridden in `base`.

    For example `mnist-terms=match`. Entries that are `free` or `unnamed` are left out, and paths are shortened to their
    last part. Runs that differ in nothing else get the same folder, and the second one is refused.
    """
    before, now = (flat(r.model_dump(mode="json")) for r in (base, recipe))
    aside = free_entries() | marked(Recipe, "unnamed").keys()
    changed = [key for key, value in now.items() if before.get(key) != value and key not in aside]
    name = recipe.name + "".join(f"-{key}={_in_a_name(now[key])}" for key in changed)
    return name if len(name) <= 120 else f"{name[:111]}-{sha256(name.encode()).hexdigest()[:8]}"


def _in_a_name(value: Any) -> str:
    """Format an entry's value for use in a file name."""
    if isinstance(value, list):
        return ",".join(map(_in_a_name, value))
    text = value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.,+-]", "_", text)


def entries() -> list[str]:
    """Return the dotted names of all entries that an override can set."""
    return [name for name, _, _ in walk(Recipe)]


def free_entries() -> set[str]:
    """Return the entries that may change when a run continues: they do not affect the result, except for rounding."""
    return set(marked(Recipe, "free"))


def meant(name: str) -> list[str]:
    """Return the entries that `name` may refer to: itself, or those that end like it or are spelled like it."""
    name, known = present_name(name), entries()
    return [name] if name in known else [entry for entry in similar(name, Recipe) if entry in known]


def _trimmed(override: str) -> str:
    """Strip an override of spaces that were inside quotes, and use its entry's present name."""
    key, equals, value = override.partition("=")
    return f"{present_name(key.strip())}{equals}{present_text(key.strip(), value.strip())}"


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in the nested `tree`."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(f"override {override!r} is not of the form key=value, e.g. match.weighting=eq8")
    if not text:  # YAML's null, which nobody means who leaves out a value, or whose shell variable is not set
        field = next((field for name, field, _ in walk(Recipe) if name == dotted), None)
        none = field is not None and NoneType in get_args(field.annotation)
        raise UserError(f"a value is missing after {dotted}={'; null means none' if none else ''}")
    value = yaml_of(text, f"override {override!r}: the value")
    if dotted == "terms" and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    set_entry(tree, dotted, value)
