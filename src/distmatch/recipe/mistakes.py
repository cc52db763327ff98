"""Explains mistakes in a recipe: the entry, its value, what was expected, and where it was set."""

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from distmatch.recipe.entry import flat, group_of, walk
from distmatch.system.errors import advised
from distmatch.system.plain import expected_by
from distmatch.system.screen import printable

KINDS = {
    "tuple_type": "expected a list of values, e.g. [1, 2]",
    "list_type": "expected a list of values, e.g. [a, b]",
    "model_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
    "model_attributes_type": "expected a group of entries; set them one by one, as GROUP.ENTRY=VALUE",
}
"""Plain words for the errors about a recipe's value that `plain.EXPECTED` has other words for."""

EXAMPLE = "match.weight: 2"
"""What a stage may change."""

LISTED = "listed by `distmatch train RECIPE --dry-run` and in docs/recipe.md"
"""Where the entries of a recipe are listed: too many for a message."""


def explain(
    errors: Sequence[Any],
    model: type[BaseModel],
    source: str,
    overrides: Callable[[Any], Sequence[str]] = lambda _: (),
    standing: Callable[[str], str] = lambda _: "",
) -> str:
    """Return pydantic's `errors` about a `model` in terms of the recipe; each source, and each advice, is given once.

    Args:
        source: where the recipe comes from.
        overrides: those on the command line that may have caused an error.
        standing: says where an entry that none of these sets has its value; empty if it is the default.
    """
    said: dict[str, list[str]] = {}
    given: set[str] = set()
    for same in _by_entry(errors, model).values():
        key = _dotted(same[0]["loc"])
        guilty = [o for o in overrides(same[0]) if _touches(o.partition("=")[0], key)]
        blamed = f"{' '.join(printable(o) for o in guilty)} on the command line" if guilty else source
        if guilty and (about := _about(same[0], model, guilty)) and (place := standing(about)):
            blamed = f"{place}, with {blamed}"
        mistake, advice = _explained(same, model)
        said.setdefault(blamed, []).append(mistake if advice in given else advised(mistake, advice))
        given.add(advice)
    return "\n".join(
        f"{blamed}: {told[0]}" if len(told) == 1 else "\n  ".join([f"{blamed}:", *told])
        for blamed, told in said.items()
    )


def _about(error: Any, model: type[BaseModel], overrides: Sequence[str]) -> str:
    """Return the entry that an error of the whole recipe begins with, such as `cuda_graphs works with`; empty if there
    is none, or if one of the `overrides` sets it.
    """
    words = error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" and not error["loc"] else ""
    first = words.partition(" ")[0].partition("=")[0].rstrip(":")
    known = first in {name for name, _, _ in walk(model)}
    return first if known and not any(_touches(o.partition("=")[0], first) for o in overrides) else ""


def _by_entry(errors: Sequence[Any], model: type[BaseModel]) -> dict[str, list[Any]]:
    """Group errors: an entry of several types has one for each type that its value is not."""
    found: dict[str, list[Any]] = {}
    for error in errors:
        loc = error["loc"] if error["type"] == "extra_forbidden" else _entry(error["loc"], model)
        found.setdefault(_dotted(loc), []).append({**error, "loc": loc})
    return found


def _entry(loc: tuple[Any, ...], model: Any) -> tuple[Any, ...]:
    """Return the part of a location that names an entry, without the types that follow where several are possible."""
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return loc
        inner = group_of(field.annotation) or next(filter(None, map(group_of, get_args(field.annotation))), None)
        if inner is None:
            kind, end = field.annotation, depth + 1
            if get_origin(kind) is dict:  # from a key to a value
                kind, end = get_args(kind)[1], depth + 2
            return loc[:end] if get_origin(kind) in (Union, UnionType) else loc
        model = inner
    return loc


def _explained(errors: Sequence[Any], model: type[BaseModel]) -> tuple[str, str]:
    """Return what is wrong with one entry, and advice, or none, that holds for other entries too."""
    error = errors[0]
    *parents, last = [str(part) for part in error["loc"]] or [""]
    key, kind = ".".join([*parents, last]), error["type"]
    within = f"stage {int(parents[1]) + 1}" if len(parents) == 2 and parents[0] == "stages" else ".".join(parents)
    if kind == "extra_forbidden":
        fields = _fields(model, parents)
        if within.startswith("stage "):
            known = f"a stage takes until, its last step, and change, e.g. {{until: 600, change: {{{EXAMPLE}}}}}"
            return f"unknown key {last!r} in {within}{_nearest(last, fields)}", known
        known = f"at the top level there are {len(fields)}, {LISTED}"
        if parents:
            known = f"in {within} there are {', '.join(fields)}"
        within_it = list(flat(error["input"])) if isinstance(error["input"], dict) else []
        written = f"{key}.{within_it[0]}" if len(within_it) == 1 else key  # `matching.guidance=3` is one entry
        return f"unknown key {key!r}{_did_you_mean(similar(written, model))}", known
    if kind == "missing" and isinstance(error["input"], list | tuple):
        return f"{key} = {list(error['input'])!r:.80}: expected more values than these", ""
    if kind == "missing":
        return f"{last!r} is missing in {within}" if within.startswith("stage ") else f"{key!r} is missing", ""
    if kind == "value_error":  # raised by us, and already says what it is about
        return error["msg"].removeprefix("Value error, "), ""
    if "change" in parents and len(errors) > 1:
        group = f", as {last}.{next(iter(error['input']), 'ENTRY')}" if isinstance(error["input"], dict) else ""
        return f"{key} = {error['input']!r:.80}: expected one value or a list of names" + (
            f"; name the entries of a group one by one{group}" if group else ""
        ), ""
    if listed := _in_a_list(key, error["input"], model):
        return f"{key} = {error['input']!r:.80}: expected a list of values, {listed}", ""
    expected = ", or ".join(dict.fromkeys(KINDS.get(e["type"]) or expected_by(e) for e in errors))
    values = re.findall("'([^']*)'", " ".join(e["ctx"]["expected"] for e in errors if e["type"] == "literal_error"))
    close = difflib.get_close_matches(str(error["input"]), values, n=1, cutoff=0.5)
    return f"{key} = {error['input']!r:.80}: {expected}" + (f"; did you mean {close[0]!r}?" if close else ""), ""


def _in_a_list(key: str, value: Any, model: type[BaseModel]) -> str:
    """Return `value` as the list that the entry `key` would take, of one; empty if it would not."""
    field = next((field for name, field, _ in walk(model) if name == key), None)
    try:
        if field is not None and not isinstance(value, list | tuple | dict):
            TypeAdapter(field.rebuild_annotation()).validate_python([value])
            return f"[{value}]"
    except ValidationError:
        pass
    return ""


def _dotted(loc: tuple[Any, ...]) -> str:
    return ".".join(map(str, loc))


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


def similar(name: str, model: type[BaseModel]) -> list[str]:
    """Return the dotted names of entries or groups of `model` that the unknown `name` may stand for.

    They end as it does (match.batch, regress.batch and pairs.batch for batch), in the group that it names if there are
    any; or they are spelled like it.
    """
    entries = [entry for entry, _, _ in walk(model)]
    groups = list(dict.fromkeys(entry[: dot.start()] for entry in entries for dot in re.finditer(r"\.", entry)))
    if found := _ending(name, entries):
        return found
    group, _, last = name.rpartition(".")
    if not group and (close := difflib.get_close_matches(name, [*entries, *groups], n=1, cutoff=0.85)):
        return close
    if group not in groups:
        group = next(iter(difflib.get_close_matches(group, groups, n=1, cutoff=0.6)), "")
    if group:
        beside = [entry for entry in entries if entry.rpartition(".")[0] == group]
        inside = [entry for entry in entries if entry.startswith(f"{group}.")]
        if found := _ending(last, inside) or _spelled_like(last, beside, 0.5):
            return found
    if found := _ending(last, entries) or _spelled_like(last, entries, 0.75):
        return found
    return [] if "." in name else difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.6)


def _ending(part: str, entries: Sequence[str]) -> list[str]:
    return [entry for entry in entries if f".{entry}".endswith(f".{part}")]


def _spelled_like(part: str, entries: Sequence[str], cutoff: float) -> list[str]:
    """Return those of `entries` whose last part is the most like `part`; none if that is too little, see difflib."""
    parts = [entry.rpartition(".")[2] for entry in entries]
    close = difflib.get_close_matches(part, parts, n=1, cutoff=cutoff)
    return _ending(close[0], entries) if close else []


def _did_you_mean(names: Sequence[str]) -> str:
    *others, last = map(repr, names) if names else [""]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


def nearest(name: str, known: Collection[str], more: str) -> str:
    """Return what to append to a message about the unknown `name`: one of the `known` if it is similar, and `more`."""
    return advised(_nearest(name, known), more)


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
