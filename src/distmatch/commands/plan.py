"""`distmatch plan`. The work is `plan.show`."""

from typing import Annotated, Literal

from cyclopts import Parameter

from distmatch.system.options import Count, Name, Range, Rate


def plan(
    recipe: Name,
    /,
    *overrides: str,
    gpus: Count = 1,
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090"] = "a100",
    utilisation: Annotated[float, Parameter(validator=Range(0, 1, open="("))] = 0.4,
    network: Rate = 50.0,
) -> None:
    """Estimate what a recipe takes: arithmetic, memory, traffic, disk, time, and whether it fits.

    Counted in one step on fake tensors: nothing but settings is downloaded, and no GPU is needed.

    Parameters
    ----------
    recipe
        Name of a recipe of the package or a YAML file.
    overrides
        Entries to change, e.g. accumulate=4 parallel=fsdp.
    gpus
        How many GPUs share the batches.
    gpu
        Their kind; its memory and its arithmetic are the maker's figures.
    utilisation
        Share of that arithmetic that is reached; 0.4 is common for these networks.
    network
        GB/s per GPU and direction between machines of eight; 50 is one card of 400 Gb/s for each.
    """
    from distmatch.planning.plan import show
    from distmatch.recipe.loading import load_recipe

    show(load_recipe(recipe, overrides), gpus, gpu, utilisation, network)
