"""`distmatch plan`: estimates the cost of a recipe on given GPUs; `planning.plan` does the work."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token, convert

from distmatch.system.garbage import no_collection
from distmatch.system.options import Count, Name, Range, Rate

Gpu = Literal["a10", "a100", "b200", "h100", "h200", "l40s", "mi300x", "rtx4090", "rtx5090", "t4"]


def _in_any_case(kind: Any, tokens: Sequence[Token]) -> Any:
    """Read the name of a card as its maker writes it, or in small letters."""
    return convert(kind, [token.evolve(value=token.value.lower()) for token in tokens])


def plan(
    recipe: Name,
    /,
    *overrides: str,
    gpus: Count = 1,
    gpu: Annotated[Gpu, Parameter(converter=_in_any_case)] = "a100",
    utilisation: Annotated[float, Parameter(validator=Range(0, 1, open="("))] = 0.4,
    network: Rate = 50.0,
    price: Rate | None = None,
    ladder: bool = False,
) -> None:
    """Estimate what a recipe costs: arithmetic, memory, traffic, disk and time, and whether it fits.

    Runs one step on fake tensors: it downloads only settings and needs no GPU.

    Parameters
    ----------
    recipe
        Name of a recipe of the package, or a YAML file.
    overrides
        Entries to change, e.g. accumulate=4 parallel=fsdp.
    gpus
        Number of GPUs that share the batches.
    gpu
        Kind of GPU; its memory and arithmetic are taken from the maker's data sheet, without sparsity. The T4 has no
        bf16, which then runs as slowly as fp32.
    utilisation
        Share of that arithmetic that is reached in practice; 0.4 is common for these networks.
    network
        GB/s per GPU and direction between machines of eight GPUs; 50 is one 400 Gb/s card per GPU.
    price
        Dollars per GPU-hour, to see what pairs and training cost. No prices are built in.
    ladder
        List which settings make a step fit on cards of 12 to 80 GB, the cheapest of them first. A step is tried with
        each: seconds for Stable Diffusion, minutes for the largest.
    """
    with no_collection():  # among so many modules and layers it takes a sixth of the time
        from distmatch.recipe.loading import load_recipe

        resolved = load_recipe(recipe, overrides)  # what is misspelt is said before torch is imported
        from distmatch.planning.gpus import GPUS
        from distmatch.planning.plan import Cluster, show

        cluster = Cluster(gpus, GPUS[gpu], network * 1e9, utilisation)
        show(resolved, gpu, cluster, price, ladder)
