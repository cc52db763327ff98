"""What `distmatch plan` says of a step's time against what steps take.

    uv run python benchmarks/plan.py                                       the embedded MNIST teacher
    uv run python benchmarks/plan.py imagenet64-cond --rounds 20           on a GPU

The rate of the machine is that of the bare network passes of one setting, the recipe's own (see `step.py`). At this
rate the planner predicts the step of other settings, which are timed in turn, all of them beside each other.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import cyclopts
from rich.console import Console
from rich.table import Table
from step import bare, timed
from step import step as stepping
from torch.utils.flop_counter import FlopCounterMode

from distmatch.evaluation.measure import hardware
from distmatch.models.folder import save_model
from distmatch.planning.cost import cost
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.smoke import make_networks, random_edm

OTHERS = (
    ("match.batch=16", "regress.batch=16"),
    ("match.batch=128", "regress.batch=128"),
    ("terms=match",),
    ("terms=regress",),
    ("fake.steps=3",),
    ("match.pairs=true",),
    ("match.guidance=2",),
    ("accumulate=4",),
    ("gradient_checkpointing=true",),
)


def main(recipe: str = "mnist", /, *overrides: str, rounds: int = 7) -> None:
    """Compare predicted and measured times."""
    with tempfile.TemporaryDirectory() as temporary:
        compare(recipe, list(overrides), Path(temporary), rounds)


def compare(name: str, overrides: list[str], folder: Path, rounds: int) -> None:
    own = ["pairs.count=256", "pairs.steps=1", "pairs.shard=256", *overrides]  # the pairs' content does not matter here
    recipe = load_recipe(name, own)
    if recipe.teacher.startswith("edm:"):
        save_model(folder / "teacher", *random_edm(Path(recipe.teacher).stem, small=False))
        own.append(f"teacher={folder / 'teacher'}")
    if recipe.regress.loss == "lpips":
        own.append(f"regress.weights={folder / 'weights'}")
    make_networks(recipe, folder, teacher=False)
    recipe = load_recipe(name, own)
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, folder)
    first = build.distiller(recipe, subject, pairs)
    passes = bare(first, subject.denoiser, subject.info, recipe)
    with FlopCounterMode(display=False) as counter:
        passes()
    work: dict[str, Callable[[], None]] = {"bare passes": passes}
    flops = {"bare passes": float(counter.get_total_flops())}
    for changes in ((), *OTHERS):
        changed = load_recipe(name, [*own, *changes])
        title = " ".join(changes) or "the recipe's own"
        work[title] = stepping(build.distiller(changed, subject, pairs))
        flops[title] = cost(changed, subject.denoiser, subject.info).step_flops
    # The fastest round, since others who use the machine can only slow it down.
    seconds = {title: min(each) for title, each in timed(work, first.device, rounds).items()}
    rate = flops["bare passes"] / seconds["bare passes"]
    table = Table("setting", "TFLOP", "predicted, ms", "measured, ms", "predicted / measured", box=None)
    for title, count in flops.items():
        row = count / rate, seconds[title]
        table.add_row(title, f"{count / 1e12:.3f}", *(f"{1000 * s:,.0f}" for s in row), f"{row[0] / row[1]:.2f}")
    console = Console()
    console.print({**hardware(first.device), "recipe": recipe.name, "rounds": rounds})
    console.print(f"{rate / 1e9:,.1f} GFLOP/s in bare passes")
    console.print(table)
    ratios = sorted(count / rate / seconds[title] for title, count in flops.items() if title != "bare passes")
    console.print(f"predicted / measured: {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
