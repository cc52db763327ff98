"""Names of recipe entries in earlier versions; recipes and overrides with them are still accepted."""

from copy import deepcopy
from typing import Any

from distmatch.recipe.entry import flat, set_entry
from distmatch.system.errors import UserError

EARLIER = {
    "generator": "student.optimizer",
    "critic.steps": "fake.steps",
    "critic": "fake.optimizer",
    "student.t": "student.times",
    "student.lora_rank": "student.adapter.rank",
    "gan.images": "real.images",
    "gan.split": "real.split",
    "gan.classes": "real.classes",
    "gan.cache": "real.cache",
}
"""Present names of entries and groups, by their earlier ones. `student.t` was a single time."""


def present_name(dotted: str) -> str:
    """Return the present name of an entry, given that or an earlier one."""
    for earlier, now in EARLIER.items():
        if f"{dotted}.".startswith(f"{earlier}."):
            return now + dotted.removeprefix(earlier)
    return dotted


def present_text(dotted: str, text: str) -> str:
    """Return the value of an override, written for the entry's present name."""
    return f"[{text}]" if dotted == "student.t" and text not in ("", "~", "null") else text


def renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the nested entries `tree` under their present names. Raises `UserError` if one is given by both names."""
    given = flat(tree)
    earlier = {name: value for name, value in given.items() if present_name(name) != name}
    if not earlier:
        return tree
    found = deepcopy(tree)
    for group in ("generator", "critic"):
        found.pop(group, None)
    for name, value in earlier.items():
        group, _, last = name.rpartition(".")
        found.get(group, {}).pop(last, None)
        if present_name(name) in given:
            raise UserError(f"{name} is the earlier name of {present_name(name)}, which is given as well; leave it out")
        set_entry(found, present_name(name), [value] if name == "student.t" and value is not None else value)
    return found
