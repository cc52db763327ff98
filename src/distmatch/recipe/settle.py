"""Settles what a recipe leaves to the machine (`auto`): the precision, and the workers that share a batch."""

from dataclasses import dataclass
from math import gcd
from typing import Any

from distmatch.recipe.entries import Recipe
from distmatch.recipe.subjects import device
from distmatch.system import machine, parallel
from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto`, and what the machine decided, in one line; empty if there was nothing to decide."""

    recipe: Recipe
    said: str


@parallel.on_first
def settled(recipe: Recipe, began: Recipe | None = None) -> Settled:
    """Replace each `auto` by what the run `began` with, so that it goes on bit by bit, or else by what is faster here.

    All processes must call this. Raises `UserError` if several workers are asked for where there can be only one.
    """
    most = 1 if recipe.own_terms else _shared(recipe)  # your own terms need not be safe for threads
    dev, pairs, said = device(recipe.device), recipe.pairs, []

    def choice(asked: Any, before: Any, try_out: Any, of: str = "") -> Any:
        if asked != "auto":
            return asked
        if before not in (None, "auto"):
            return before
        found = try_out()
        said.append(found.said and of + found.said)
        return found.value

    def faster_precision() -> machine.Choice:
        return machine.faster_precision(dev)

    def faster_workers() -> machine.Choice:
        return machine.faster_workers(most)

    precision = choice(recipe.precision, began and began.precision, faster_precision)
    alone = "" if recipe.precision == "auto" else "pairs in "
    of_pairs = choice(pairs.precision, began and began.pairs.precision, faster_precision, alone)
    possible = dev.type == "cpu" and parallel.world() == 1
    workers = recipe.workers
    if possible:
        workers = choice(workers, began and began.workers, faster_workers)
    elif workers not in (1, "auto"):
        raise UserError(
            f"workers={workers}: workers share the cores of a CPU within one process; use workers=1 or auto on "
            "another device, and in the processes of torchrun"
        )
    else:
        workers = 1
    pairs = pairs.model_copy(update={"precision": of_pairs})
    changed = recipe.model_copy(update={"precision": precision, "pairs": pairs, "workers": workers})
    return Settled(changed, ", ".join(dict.fromkeys(filter(None, said))))


def _shared(recipe: Recipe) -> int:
    """Return how many parts the batches of all stages can be split into."""
    sizes = [batch for stage in recipe.parts for batch in stage.batches.values()]
    return gcd(*sizes) // recipe.accumulate
