"""`distmatch train`: runs a recipe to a finished student; `distillation` does the work."""

from pathlib import Path
from typing import Literal

from distmatch.commands.shared import starting
from distmatch.system.options import Name, Out, Runs


def train(
    recipe: Name,
    /,
    *overrides: str,
    out: Out = None,
    runs: Runs = Path("runs"),
    scale: Literal["full", "cpu-smoke"] = "full",
    dry_run: bool = False,
    check: bool = False,
) -> None:
    """Distil a teacher by a recipe. Run the same command again to continue an interrupted run.

    Parameters
    ----------
    recipe
        Name of a recipe of the package (see `distmatch recipes`), or a YAML file.
    overrides
        Entries to change, e.g. terms=match match.weighting=dreamfusion student.optimizer.lr=1e-4.
    out
        The run's folder; default: RUNS/RECIPE plus the overrides, e.g. runs/mnist-terms=match.
    runs
        The folder that holds runs and pair stores.
    scale
        cpu-smoke: try every code path in under a minute, in RUNS/cpu-smoke, with small random networks instead of those
        that the recipe would download.
    dry_run
        Print the resolved recipe, with a comment on every entry, and stop.
    check
        Try everything the run needs, from packages to disk space, at minimal size; report the results and stop. Every
        run begins with these checks.
    """
    from distmatch.recipe.docs import commented, heading
    from distmatch.recipe.loading import load_recipe, overridden, run_name
    from distmatch.recipe.unread import told
    from distmatch.system.terminal import notice

    resolved = load_recipe(recipe, overrides)
    if unread := told(resolved, overridden(overrides)):
        notice(unread)
    asked = load_recipe(recipe)
    name = run_name(asked, resolved)
    if scale == "cpu-smoke":
        from distmatch.recipe.smoke import cpu_smoke, make_networks

        runs = runs / "cpu-smoke" / name
        small = cpu_smoke(resolved, runs)
        full, asked, resolved = resolved, load_recipe(recipe, small), load_recipe(recipe, [*small, *overrides])
        if not dry_run:
            make_networks(full, runs)
    if dry_run:
        if resolved.memory is not None:
            from distmatch.commands.binding import begun
            from distmatch.commands.memory import in_memory

            resolved, said = in_memory(resolved, begun(out or runs / name))
            notice(f"On this machine: {said}")
        print(heading(resolved, asked, out or runs / name, runs) + commented(resolved), end="")
        return
    starting(f"Loading PyTorch, then checking what {out or name} needs")
    from distmatch.commands import distillation

    work = distillation.check if check else distillation.distil
    work(resolved, out or runs / name, runs)
