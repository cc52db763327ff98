"""What an entry of a recipe is: a field with its description and, beside them, the facts that the program asks for."""

from collections.abc import Iterator
from typing import Any, TypedDict, Unpack, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from distmatch.system.errors import UserError


class Facts(TypedDict, total=False):
    """What the program knows of an entry. A fact of a group holds for each entry in it."""

    free: bool
    """It may change when a run continues: it does not touch the result, except for rounding."""

    stage: bool
    """A stage may change it."""

    unnamed: bool
    """An override of it is left out of the default name of a run's folder, as is that of a free one."""

    pairs: bool
    """The noise-image pairs depend on it."""

    small: int | str
    """Its value in a trial, `--scale cpu-smoke`, which is otherwise the recipe's own."""


def entry(default: Any, text: str, source: str = "", **facts: Unpack[Facts]) -> Any:
    """Return the pydantic field of an entry, or of a group of them; `...` as the default makes it required.

    Args:
        text: what it does, in plain English, with its unit and what 0 and null mean.
        source: where it stands in the paper (section, equation, algorithm, table), or "ours"; none for a group.
    """
    said: Any = facts
    return Field(default, description=f"{text} [{source}]" if source else text, json_schema_extra=said or None)


def walk(model: type[BaseModel], above: str = "", known: Facts | None = None) -> Iterator[tuple[str, FieldInfo, Facts]]:
    """Yield the dotted name, the field and the facts of every entry of `model`, group by group."""
    for name, field in model.model_fields.items():
        facts: Any = {**(known or {}), **facts_of(field)}
        inner = group_of(field.annotation)
        if inner is None:
            yield above + name, field, facts
        else:
            yield from walk(inner, f"{above}{name}.", facts)


def facts_of(field: FieldInfo) -> Facts:
    """Return what is said of `field` itself."""
    said: Any = field.json_schema_extra or {}
    return said


def marked(model: type[BaseModel], fact: str) -> dict[str, Any]:
    """Return the entries of `model` that have a `fact`, by dotted name, with what it says."""
    return {name: facts[fact] for name, _, facts in walk(model) if fact in facts}


def group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the group of entries that a field of this type is, optional or not; `None` where it is an entry."""
    kinds = (annotation, *(() if get_origin(annotation) in (list, dict) else get_args(annotation)))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return a nested recipe with dotted keys, as overrides name them."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return rows


def set_entry(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the entry `a.b` of the nested `tree`. Raises `UserError` where `a` is not a group."""
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{dotted}: {parent} is a value, not a group of entries")
    tree[last] = value
