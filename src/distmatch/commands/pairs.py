"""`distmatch pairs build` and `distmatch pairs verify`: build and check stores of noise-image pairs."""

from pathlib import Path

from cyclopts import App

from distmatch.system.options import Name, Out, Runs

app = App(name="pairs", help="Build and check stores of noise-image pairs.")


@app.command
def build(recipe: Name, /, *overrides: str, out: Out = None, runs: Runs = Path("runs")) -> None:
    """Build the pairs of a recipe ahead of its training. Run again to continue; several processes can share the work.

    Parameters
    ----------
    recipe
        Name of a recipe of the package, or a YAML file.
    overrides
        Entries to change, e.g. pairs.count=1000 pairs.steps=40.
    out
        The store's folder; default: where `distmatch train` looks for it.
    runs
        The folder that holds runs and pair stores.
    """
    from distmatch.recipe.loading import load_recipe

    asked = load_recipe(recipe, [*overrides, *([f"pairs.path={out}"] if out else [])])  # before torch is imported
    from distmatch.recipe.build import pair_spec, pair_store, pairs_folder, unwritten, workers
    from distmatch.recipe.settle import settled
    from distmatch.recipe.subjects import subject
    from distmatch.system import parallel
    from distmatch.system.disk import check_room
    from distmatch.system.screen import console
    from distmatch.system.workers import using

    with parallel.process_group():
        found = settled(asked)
        if found.said and parallel.rank() == 0:
            console.print(f"On this machine: {found.said}")
        with using(workers(found.recipe)):
            teacher = subject(found.recipe)
            spec = pair_spec(found.recipe, teacher)
            missing = unwritten(pairs_folder(found.recipe, spec, runs), spec)
            remedy = "choose another folder with --out, or lower pairs.count"
            parallel.agreed(lambda: check_room(missing, "the pairs take", remedy))
            pair_store(found.recipe, teacher, runs)


@app.command
def verify(store: Name, /) -> None:
    """Check every byte of a store (folder or URL): its images, and that its noise can still be regenerated exactly."""
    from distmatch.data.pairs import PairStore
    from distmatch.system.progress import progress
    from distmatch.system.screen import console, counted

    pairs = PairStore.open(store)
    with progress("verify", len(pairs), unit="pair") as advance:
        pairs.verify(advance)
    console.print(f"{store}: {counted(len(pairs), 'pair')}, every byte as it was written, noise regenerated and equal")
