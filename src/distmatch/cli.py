"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import select
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from distmatch.cli_mistakes import explain
from distmatch.cli_models import File, Name, Out
from distmatch.cli_models import app as models
from distmatch.errors import Agreed, Diverged, Lost, Stopped, UserError
from distmatch.options import Count, Range, Rate, Share, Whole

app = App(
    name="distmatch",
    help="""Turn a pretrained diffusion model into a one-step generator (Distribution Matching Distillation).

First look:  distmatch demo            the main job on MNIST, minutes on a CPU
             distmatch sample mnist    images from the student in the package
Own model:   distmatch teach IMAGES    a small teacher from a folder of images
             distmatch train RECIPE    distil a teacher
""",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # it would end in silence; see `main`
)
pairs_app = App(name="pairs", help="Build and check stores of noise-image pairs.")
app.command(pairs_app)
import_app = App(name="import", help="Turn foreign checkpoints into model folders. Nothing in them is executed.")
app.command(import_app)

Runs = Annotated[File, Parameter(name="--runs")]

LONGEST = 4000
"""Characters of an error's message that are shown."""

app.update(models)


@app.command
def demo(which: Literal["mnist", "toy2d"] = "mnist", /, *, out: Out = None, runs: Runs = Path("runs")) -> None:
    """Distil something small and look at it.

    Parameters
    ----------
    which
        mnist: the embedded teacher, pairs, distillation, evaluation, report; about ten minutes on two cores.
        toy2d: Figure 3 of the paper, three objectives on a two-mode toy; seconds.
    out
        Where the results go; runs/demo-WHICH unless told.
    runs
        The folder that runs and pair stores share.
    """
    from distmatch import demo as demos

    demos.DEMOS[which](out or runs / f"demo-{which}", runs)


@app.command
def recipes(*, schema: bool = False) -> None:
    """List the recipes of the package.

    Parameters
    ----------
    schema
        Print the JSON schema of a recipe file instead, with which an editor checks and completes one.
    """
    import json

    from rich.table import Table

    from distmatch import recipe_docs
    from distmatch.config import load_recipe
    from distmatch.config import recipes as known
    from distmatch.screen import console

    if schema:
        print(json.dumps(recipe_docs.schema(), indent=2))
        return
    table = Table("recipe", "what it is", box=None)
    for name in known():
        table.add_row(name, load_recipe(name).description)
    console.print(table)


@app.command
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
        Name of a recipe of the package (see `distmatch recipes`) or a YAML file.
    overrides
        Entries to change, e.g. terms=match match.weighting=dreamfusion student.optimizer.lr=1e-4.
    out
        The run's folder; unless told RUNS/RECIPE with what was overridden, e.g. runs/mnist-terms=match.
    runs
        The folder that runs and pair stores share.
    scale
        cpu-smoke: a trial of every code path in under a minute, in RUNS/cpu-smoke, with small random networks in place
        of what the recipe would fetch.
    dry_run
        Print the resolved recipe, above each entry what it does, and stop.
    check
        Try what the run needs, from packages to disk space, at its smallest, say what was found, and stop. Every run
        begins with it.
    """
    from distmatch.config import load_recipe, run_name
    from distmatch.recipe_docs import commented

    resolved = load_recipe(recipe, overrides)
    name = run_name(load_recipe(recipe), resolved)
    if scale == "cpu-smoke":
        from distmatch.smoke import cpu_smoke, make_networks

        runs = runs / "cpu-smoke" / name
        full, resolved = resolved, load_recipe(recipe, [*cpu_smoke(resolved, runs), *overrides])
        if not dry_run:
            make_networks(full, runs)
    if dry_run:
        print(commented(resolved), end="")
        return
    from distmatch.run import check as only_check
    from distmatch.run import distil

    (only_check if check else distil)(resolved, out or runs / name, runs)


@app.command
def plan(
    recipe: Name,
    /,
    *overrides: str,
    gpus: Count = 1,
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090"] = "a100",
    utilisation: Annotated[float, Parameter(validator=Range(0, 1, open="("))] = 0.4,
    network: Rate = 50.0,
) -> None:
    """Say what a recipe takes before it starts: arithmetic, memory, traffic, disk, time, and whether it fits.

    Counted in a step on tensors without numbers: nothing is downloaded but settings, and no GPU is needed.

    Parameters
    ----------
    recipe
        Name of a recipe of the package or a YAML file.
    overrides
        Entries to change, e.g. accumulate=4 parallel=fsdp.
    gpus
        How many share the batches.
    gpu
        Their kind; its memory and its arithmetic are the maker's figures.
    utilisation
        Share of that arithmetic that is reached; 0.4 is common for these networks.
    network
        GB/s per GPU and direction between machines of eight; 50 is a card of 400 Gb/s for each.
    """
    from distmatch.config import load_recipe
    from distmatch.plan import show

    show(load_recipe(recipe, overrides), gpus, gpu, utilisation, network)


@app.command
def teach(
    images: Name,
    /,
    *,
    out: Out = None,
    steps: Count = 10_000,
    batch: Count = 128,
    lr: Rate = 1e-3,
    widths: Annotated[tuple[int, ...], Parameter(consume_multiple=True, validator=Range(1))] = (32, 64),
    blocks: Count = 1,
    patch: Count = 2,
    split: str = "train",
    label_dropout: Share = 0.0,
    flip: bool = False,
    ema: Share = 0.999,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    save_every: Count = 500,
    preview_every: Whole = 500,
    device: str = "auto",
) -> None:
    """Train a diffusion teacher on your own images (EDM's objective). Run again to continue.

    Parameters
    ----------
    images
        A folder or an archive (.tar, .tar.gz, .tar.xz, .zip) of images of one size, [train/]CLASS/NAME.png or flat;
        labels may also stand in dataset.json, metadata.jsonl or .cls files. CIFAR's batches, MNIST's files and Parquet
        are read too. An archive may be at a URL (s3://, gs://, hf://). All of it: docs/data.md.
    out
        The run's folder; runs/teach-NAME unless told. The model ends up in its model/.
    steps
        Length of the training; the learning rate falls to zero over its last 30 %.
    batch
        Images per step.
    lr
        Peak learning rate of Adam.
    ema
        Decay of the moving average of the weights, which is what is kept.
    precision
        bf16: autocast around the network; worth it on a GPU or a CPU with bf16 arithmetic.
    widths
        U-Net channels per resolution level.
    blocks
        Residual blocks per level and direction.
    patch
        Side of the space-to-depth stem; the image side must be a multiple of patch * 2 ** (levels - 1).
    split
        Which images to read where there are splits: train (also folders called training, train2017, ...), test, val,
        the name of a folder, or all, for which no folder is a split.
    label_dropout
        Share of the images shown without their label; 0.1 makes the teacher fit for guidance.
    flip
        Mirror every other image.
    """
    from distmatch.lessons import teach as run
    from distmatch.storage import name_of

    name = name_of(images).split(".")[0]
    run(
        images,
        out or Path("runs") / f"teach-{name}",
        network={"widths": list(widths), "blocks": blocks, "patch": patch},
        steps=steps,
        batch=batch,
        lr=lr,
        split=split,
        label_dropout=label_dropout,
        flip=flip,
        ema=ema,
        precision=precision,
        seed=seed,
        save_every=save_every,
        preview_every=preview_every,
        device=device,
    )


@app.command
def classifier(
    images: Name,
    /,
    *,
    out: Out = None,
    steps: Count = 3000,
    batch: Count = 128,
    lr: Rate = 2e-3,
    widths: Annotated[tuple[int, int, int], Parameter(consume_multiple=True, validator=Range(1))] = (16, 32, 64),
    positions: Count = 3,
    flip: bool = False,
    seed: int = 0,
) -> None:
    """Make the feature spaces that `distmatch eval` measures in, of images/train, tested on images/test.

    Three unlike ones: two classifiers, of which one averages its features over the whole image and one keeps where
    they are, and the pixels' principal components.

    Parameters
    ----------
    images
        A folder or an archive of images: train/CLASS/NAME.png and test/CLASS/NAME.png, or another of the layouts in
        docs/data.md. Where there is no test, val is taken.
    out
        The classifier's folder; runs/classifier-NAME unless told.
    widths
        Channels at the half resolution (two layers) and at the quarter; the last is the number of features.
    positions
        Per side, of the second classifier's features; 1 leaves it out.
    flip
        Mirror every other image.
    """
    from distmatch.lessons import classifier as run
    from distmatch.storage import name_of

    name = name_of(images).split(".")[0]
    training = {"steps": steps, "batch": batch, "lr": lr, "widths": widths, "flip": flip, "seed": seed}
    run(images, out or Path("runs") / f"classifier-{name}", positions, training)


@pairs_app.command(name="build")
def build_pairs(recipe: Name, /, *overrides: str, out: Out = None, runs: Runs = Path("runs")) -> None:
    """Build the pairs of a recipe ahead of its training. Run again to continue; several processes may share the work.

    Parameters
    ----------
    recipe
        Name of a recipe of the package or a YAML file.
    overrides
        Entries to change, e.g. pairs.count=1000 pairs.steps=40.
    out
        The store's folder; where `distmatch train` looks for it unless told.
    """
    from distmatch.config import load_recipe
    from distmatch.run import pairs

    pairs(load_recipe(recipe, [*overrides, *([f"pairs.path={out}"] if out else [])]), runs)


@pairs_app.command(name="verify")
def verify_pairs(store: Name, /) -> None:
    """Check every byte of a store, a folder or a URL: images, and that the noise still comes out the same."""
    from distmatch.run import verify

    verify(store)


@app.command
def checkpoints(run: File, /, *, verify: bool = False, keep: int | None = None) -> None:
    """List the checkpoints of a run, check them, or delete old ones.

    Parameters
    ----------
    run
        The run's folder.
    verify
        Read every byte, and look for numbers that are not finite.
    keep
        Delete all but the latest KEEP and the best one.
    """
    from distmatch.run import checkpoints as run_checkpoints

    run_checkpoints(run, verify, keep)


@import_app.command(name="edm")
def import_edm(source: Name, /, *, out: Out = None) -> None:
    """Import a checkpoint of Karras et al. 2022. Recipes take it directly, too: teacher=edm:FILE.

    Parameters
    ----------
    source
        A .pkl file or a URL, e.g. https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl.
    out
        The model folder; models/NAME unless told.
    """
    from distmatch.run import import_edm as run

    run(source, out or Path("models") / Path(source).stem)


@app.command
def report(*runs: File, out: Out = None) -> None:
    """Write one HTML page on one or several runs: curves, pictures over time, recipes side by side.

    Parameters
    ----------
    runs
        Folders of runs.
    out
        The page; report.html in the first run unless told.
    """
    from distmatch.report import report as write

    if not runs:
        raise UserError("no run was named; give one or more run folders, e.g. distmatch report runs/mnist")
    print(write(list(runs), out or runs[0] / "report.html"))


def main() -> None:
    """Entry point. A user's mistake is one message without traceback (set DISTMATCH_DEBUG=1 for one); a bug has its."""
    # Waiting OpenMP threads that spin cost a busy CPU more than they save; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if os.environ.get("DISTMATCH_DEBUG"):
        app()
        return
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show
                app(sys.argv[1:], exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()  # what a full disk refuses of it is an error now, rather than after the end
    except CycloptsError as error:
        _fail(explain(error), 2)
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again, and complains, as it exits
        raise SystemExit(141) from None  # as of programs that SIGPIPE ends, such as with `| head`
    except UserError as error:
        if isinstance(error, Agreed) and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None  # the first process says it
        _fail(str(error), 2)
    except (Diverged, Lost) as error:
        _fail(str(error), 1)
    except Stopped as error:
        _fail(f"{error}; to go on: {_command()}", 130)
    except KeyboardInterrupt:  # wherever it comes: in imports, while pairs are built, in an evaluation
        _fail(f"stopped; to go on: {_command()}", 130)
    except Exception as error:
        from distmatch.disk import explained

        if (message := explained(error)) is not None:
            _fail(message, 2)
        traceback.print_exc()
        _fail(
            f"the {type(error).__name__} above is a bug in distmatch or in a package that it uses, not a mistake of "
            f"yours. Please report it with all these lines and the command: {_command()}",
            1,
        )


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Show our own notices as a line, and other packages' warnings as Python does."""
    if category.__name__ == "Notice":
        from distmatch.screen import escaped

        print(f"distmatch: {escaped(message)[:LONGEST]}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")


def _command() -> str:
    """The command line as the user gave it."""
    name = Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m", "distmatch"] if name == "__main__.py" else [name]), *sys.argv[1:]])


def _unread() -> bool:
    """Whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(message: str, code: int) -> None:
    from distmatch.screen import escaped

    print(f"distmatch: {escaped(message)[:LONGEST]}", file=sys.stderr)
    raise SystemExit(code)
