"""Which entries of a recipe its terms do not read: `--dry-run` marks them, and a run begins by naming those given.

Without torch, so that a recipe is printed at once.
"""

from collections.abc import Iterable

from distmatch.recipe.consistency import TERMS
from distmatch.recipe.entries import Recipe

READERS = {
    "match": "for the term match",
    "guide": "for the term guide",
    "regress": "for the term regress",
    "gan": "for the term gan",
    "real": "for the term gan or student.inputs=data",
    "pairs": "for the term regress",
    "fake": "for the term match",
}
"""What the groups of entries are for."""

PICTURED = ("sampler", "steps", "guidance")
"""The entries of `pairs` by which the teacher's images are made in a run's picture, whatever its terms."""


def unread(recipe: Recipe) -> set[str]:
    """Return those of `READERS` that the recipe reads in none of its stages; of `pairs` except `PICTURED`.

    Terms of your own may read streams of noise or pairs, and may train the fake score: then these groups count as read.
    """
    terms = {term for stage in recipe.parts for term in stage.terms}
    read = terms | ({"pairs"} if "regress" in terms else set()) | ({"fake"} if "match" in terms else set())
    if recipe.needs_images:
        read.add("real")
    if terms - set(TERMS):
        read |= {"match", "regress", "pairs", "fake"}
    return READERS.keys() - read


def remarks(recipe: Recipe) -> dict[str, str]:
    """Return a sentence about each group that is `unread`."""
    found = dict.fromkeys(unread(recipe), "Nothing in this recipe reads these.")
    if "pairs" in found:
        found["pairs"] = f"This recipe makes none; {', '.join(PICTURED)} are for the teacher's images in its picture."
    return found


def told(recipe: Recipe, given: Iterable[str]) -> str:
    """Return which of the entries `given`, by dotted names, are not read, in words; empty if all of them are.

    `real.images` counts as given wherever it was set: a data set is named in order to be used. A group given as a
    whole, such as pairs={steps: 18}, is not looked into, unless nothing reads any of it.
    """
    names = list(dict.fromkeys(given))
    if recipe.real.images is not None and "real.images" not in names:
        names.append("real.images")
    pictured = {"pairs", *(f"pairs.{name}" for name in PICTURED)}
    lost: dict[str, list[str]] = {}
    groups = unread(recipe)
    for name in names:
        group = name.partition(".")[0]
        if group in groups and name not in pictured:
            lost.setdefault(group, []).append(name)
    if "pairs" in groups and "match" not in groups and recipe.match.pairs and "match.pairs" in names:
        lost.setdefault("pairs", []).append("match.pairs")
    said = [f"{', '.join(entries)} ({READERS[group]})" for group, entries in lost.items()]
    terms = dict.fromkeys(term for stage in recipe.parts for term in stage.terms)
    return f"with the terms {', '.join(terms)} nothing reads {', '.join(said)}" if said else ""
