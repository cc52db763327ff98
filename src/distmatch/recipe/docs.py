"""What the entries of a recipe say of themselves: docs/recipe.md, the JSON schema of a file, comments in a recipe.

`python -m distmatch.recipe.docs > docs/recipe.md` writes the page again when an entry has changed.
"""

import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from distmatch.recipe.entries import Recipe

Schema = dict[str, Any]
"""JSON schema of an entry or of a group, as pydantic makes it of the fields, the facts among its keys."""

WIDTH = 100
"""Columns of a recipe with comments."""

KINDS = {
    "boolean": "true or false",
    "integer": "whole number",
    "null": "null",
    "number": "number",
    "object": "values by name",
    "string": "text",
}
"""JSON's types in words."""

OBVIOUS = ("group", "text", "text or null", "true or false")
"""Kinds that a comment does not name."""

BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}

CHANGES = {"free": "when a run continues", "stage": "in a stage"}
"""The facts that say when an entry may change."""

INTRODUCTION = """\
# The entries of a recipe

*Generated from `src/distmatch/recipe/entries.py` by `python -m distmatch.recipe.docs`.*

A recipe is a YAML file of these entries. `distmatch train RECIPE match.batch=32` overrides the entry `batch` of the
group `match`. A file may name another recipe as its `base` and hold only what differs. `distmatch train RECIPE
--dry-run` prints a recipe with all of its values and the descriptions below; `distmatch recipes --schema` prints a
JSON schema, with which an editor checks and completes a file.

The source of an entry stands in brackets: a section, equation, algorithm, table or appendix of the paper
([arXiv 2311.18828](https://arxiv.org/abs/2311.18828)) with its value there, or "ours". A step is one update of the
student.
"""


@cache
def _recipe() -> Schema:
    return Recipe.model_json_schema()


def schema() -> Schema:
    """Return the JSON schema of a recipe file, which may leave out its name, and with a `base` everything."""
    found = _recipe()
    base = {"type": "string", "description": "Recipe, by name or file, whose entries hold where this file has none."}
    needed = [name for name in found["required"] if name != "name"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **{key: value for key, value in found.items() if key != "required"},
        "properties": {"base": base, **found["properties"]},
        "anyOf": [{"required": ["base"]}, {"required": needed}],
    }


def commented(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, above each entry what it does."""
    return "\n".join(_lines(recipe.model_dump(mode="json"), _recipe())).lstrip("\n") + "\n"


def _lines(tree: dict[str, Any], group: Schema, indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        spec = group["properties"][name]
        inner = _group(spec)
        if not indent:
            yield ""
        comment = textwrap.TextWrapper(WIDTH, f"{indent}# ", f"{indent}# ", break_on_hyphens=False)
        expected = "" if _kind(spec) in OBVIOUS else f" Expected: {_kind(spec)}."
        yield from comment.wrap(_text(spec) + expected)
        if inner is not None and isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, inner, f"{indent}  ")
        else:
            written = yaml.safe_dump({name: value}, sort_keys=False, width=WIDTH)
            yield from (indent + line for line in written.splitlines())


def page() -> str:
    """Return docs/recipe.md: a table of entries for each group."""
    return "\n".join([INTRODUCTION, *_tables("At the top level", _recipe(), {})])


def _tables(title: str, group: Schema, own: Schema) -> Iterator[str]:
    """Yield the lines of a group's section, then those of the groups in it; `own` is the group as an entry."""
    yield f"## {title}\n"
    if own:
        yield f"{_text(own)}\n"
    yield "| entry | type and range | default | what it does | may change |"
    yield "|---|---|---|---|---|"
    inner = {}
    for name, spec in group["properties"].items():
        facts = {fact for fact in CHANGES if fact in own or fact in spec}
        if "$ref" not in spec:
            default = f"`{_inline(spec['default'])}`" if "default" in spec else "required"
            changes = " and ".join(CHANGES[fact] for fact in CHANGES if fact in facts)
            cells = (f"`{name}`", _kind(spec), default, _text(spec), changes)
            yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
        if _group(spec) is not None:
            inner[name] = spec | dict.fromkeys(facts, True)
    yield ""
    for name, spec in inner.items():
        yield from _tables(f"{title}.{name}" if own else name, _group(spec) or {}, spec)


def _group(spec: Schema) -> Schema | None:
    """Return the schema of the group that an entry is, or may be, or is a list of."""
    for part in (spec, spec.get("items", {}), *spec.get("anyOf", ())):
        if "$ref" in part:
            return _recipe()["$defs"][part["$ref"].rpartition("/")[2]]
    return None


def _text(spec: Schema) -> str:
    """Return what an entry does; pydantic leaves it out where the docstring of the group's class says the same."""
    return spec.get("description") or (_group(spec) or {})["description"]


def _kind(spec: Schema) -> str:
    """Return the type and the range of an entry in words."""
    if "$ref" in spec:
        return "group"
    if "anyOf" in spec:
        return " or ".join(map(_kind, spec["anyOf"]))
    if "const" in spec:
        return str(spec["const"])
    if "enum" in spec:
        *others, last = spec["enum"]
        return f"{', '.join(others)} or {last}"
    if "prefixItems" in spec:
        return f"list of {len(spec['prefixItems'])}: {_kind(spec['prefixItems'][0])}"
    if spec["type"] == "array":
        return f"list: {_kind(spec['items'])}"
    bounds = [f"{sign} {spec[bound]:g}" for bound, sign in BOUNDS.items() if bound in spec]
    return " ".join([KINDS[spec["type"]], ", ".join(bounds)]).strip()


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").removesuffix("\n")


if __name__ == "__main__":
    print(page(), end="")
