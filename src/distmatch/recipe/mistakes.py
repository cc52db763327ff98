"""Explains mistakes in a recipe: the entry, its value, what was expected, and where it was set."""

import difflib
from collections.abc import Collection, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from distmatch.recipe.entry import group_of

KINDS = {
    "tuple_type": "expected a list of values, e.g. [1, 2]",
    "list_type": "expected a list of values, e.g. [a, b]",
    "model_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
    "model_attributes_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
}
"""Plain words for pydantic's errors about the kind of a value."""


def explain(error: Any, model: type[BaseModel], source: str, overrides: Sequence[str] = ()) -> str:
    """Return one of pydantic's errors about a `model` in terms of the recipe.

    Args:
        source: where the recipe comes from.
        overrides: those on the command line; one of them may have caused the error.
    """
    *parents, last = [str(part) for part in error["loc"]] or [""]
    key, kind = ".".join([*parents, last]), error["type"]
    if guilty := [o for o in overrides if _touches(o.partition("=")[0], key)]:
        source = f"{' '.join(guilty)} on the command line"
    if kind == "extra_forbidden":
        fields = _fields(model, parents)
        where = f"in {'.'.join(parents)}" if parents else "at the top level"
        known = f"{where} there are {', '.join(fields)}"
        return f"{source}: unknown key {key!r}{nearest(last, fields, known)}"
    if kind == "missing":
        return f"{source}: {key!r} is missing"
    if kind == "value_error":  # raised by us, and already says what it is about
        return f"{source}: {error['msg'].removeprefix('Value error, ')}"
    expected = KINDS.get(kind) or f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{source}: {key} = {error['input']!r:.80}: {expected}"


def _touches(entry: str, key: str) -> bool:
    """Return whether an override of `entry` may cause an error at `key`: it is the same, a parent or a child."""
    return f"{key}.".startswith(f"{entry}.") or f"{entry}.".startswith(f"{key}.") or not key


def _fields(model: Any, parents: list[str]) -> list[str]:
    """Return the entries of the group of `model` at `parents`."""
    for parent in parents:
        if not parent.isdigit():  # an index of a list
            annotation = model.model_fields[parent].annotation
            model = group_of(annotation) or group_of(get_args(annotation)[0])
    return list(model.model_fields)


def nearest(name: str, known: Collection[str], more: str) -> str:
    """Return what to append to a message about the unknown `name`: one of the `known` if it is similar, and `more`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}? {more[0].upper()}{more[1:]}" if close else f"; {more}"
