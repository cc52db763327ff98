"""What a recipe's `memory` leaves to the machine, chosen before a run begins; see `planning.ladder`."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, cast

from distmatch.commands import binding
from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.info import Info
from distmatch.recipe.entries import Recipe
from distmatch.recipe.subjects import device
from distmatch.system import machine, parallel
from distmatch.system.screen import console

P = ParamSpec("P")


@parallel.on_first
def in_memory(recipe: Recipe, began: Recipe | None, own: tuple[Denoiser, Info] | None = None) -> tuple[Recipe, str]:
    """Return `recipe` with what fits this machine's memory, or as the run `began`, and the choice in a line."""
    from distmatch.planning.ladder import fitted  # most recipes do without

    dev, chosen = device(recipe.device), machine.Choice(recipe.precision)
    if recipe.precision == "auto":  # what a step takes depends on it
        chosen = machine.faster_precision(dev) if began is None else machine.Choice(began.precision)
        recipe = recipe.model_copy(update={"precision": chosen.value})
    found, said = fitted(recipe, began, machine.memory(dev), parallel.world(), own, on_cpu=dev.type == "cpu")
    return found, f"{chosen.said}, {said}" if chosen.said else said


def chooses_for_memory(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command that takes `recipe`, `out` and `teacher`: if the recipe asks for it, it fits the memory."""
    signature, work = inspect.signature(command), cast(Any, command)

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if given["recipe"].memory is not None:
            began = binding.begun(given["out"])
            given["recipe"], said = in_memory(given["recipe"], began, given.get("teacher"))
            if parallel.rank() == 0:
                console.print(f"On this machine: {said}")
        work(**given)

    return run
