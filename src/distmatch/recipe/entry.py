"""One entry of a recipe: a pydantic field with its description, and facts that the program looks up."""

from collections.abc import Iterator
from typing import Any, TypedDict, Unpack, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from distmatch.system.errors import UserError


class Facts(TypedDict, total=False):
    """What the program knows about an entry. A fact about a group holds for each entry in it."""

    free: bool
    """It may change when a run continues: it does not affect the result, except for rounding."""

    stage: bool
    """A stage may change it."""

    schedule: bool
    """A part of a schedule. If a stage states it, with any value, that schedule is the stage's own: `Recipe.span`."""

    unnamed: bool
    """Overriding it does not change the default name of a run's folder; the same is true of free entries."""

    pairs: bool
    """The noise-image pairs depend on it."""

    small: int | str
    """Its value in a trial (`--scale cpu-smoke`); without this fact, the recipe's own value is used."""


def entry(default: Any, text: str, source: str = "", **facts: Unpack[Facts]) -> Any:
    """Return the pydantic field of an entry, or of a group of them; `...` as the default makes it required.

    Args:
        text: what it does, in plain English, with its unit and what 0 and null mean.
        source: where the paper has it (section, equation, algorithm, table), or "ours"; empty for a group.
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
    """Return the facts given for `field` itself."""
    said: Any = field.json_schema_extra or {}
    return said


def marked(model: type[BaseModel], fact: str) -> dict[str, Any]:
    """Return the entries of `model` that have a `fact`, by dotted name, with the fact's value."""
    return {name: facts[fact] for name, _, facts in walk(model) if fact in facts}


def group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the group of entries that a field of this type is, optional or not; `None` if it is a single entry."""
    kinds = (annotation, *(() if get_origin(annotation) in (list, dict) else get_args(annotation)))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten a nested recipe to dotted keys, as overrides use them."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return rows


def set_entry(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the entry `a.b` of the nested `tree`. Raises `UserError` if `a` is not a group."""
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{dotted}: {parent} is a value, not a group of entries")
    tree[last] = value
