"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

app = App(
    name="distmatch",
    help="""Turn a pretrained diffusion model into a one-step generator (Distribution Matching Distillation).

First look:  distmatch demo            the main job on MNIST, minutes on a CPU
             distmatch sample mnist    images from the student in the package
Own model:   distmatch teach IMAGES    a small teacher from a folder of images
             distmatch train RECIPE    distil a teacher
""",
    help_format="plaintext",
)
pairs_app = App(name="pairs", help="Build and check stores of noise-image pairs.")
app.command(pairs_app)
import_app = App(name="import", help="Turn foreign checkpoints into model folders. Nothing in them is executed.")
app.command(import_app)

export_app = App(name="export", help="Turn students into other libraries' formats.")
app.command(export_app)

Out = Annotated[Path | None, Parameter(name=["--out", "-o"])]
Runs = Annotated[Path, Parameter(name="--runs")]


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
def recipes() -> None:
    """List the recipes of the package."""
    from rich.console import Console
    from rich.table import Table

    from distmatch.config import load_recipe
    from distmatch.config import recipes as known

    table = Table("recipe", "what it is", box=None)
    for name in known():
        table.add_row(name, load_recipe(name).description)
    Console().print(table)


@app.command
def train(
    recipe: str,
    /,
    *overrides: str,
    out: Out = None,
    runs: Runs = Path("runs"),
    scale: Literal["full", "cpu-smoke"] = "full",
    dry_run: bool = False,
) -> None:
    """Distil a teacher by a recipe. Run the same command again to continue an interrupted run.

    Parameters
    ----------
    recipe
        Name of a recipe of the package (see `distmatch recipes`) or a YAML file.
    overrides
        Entries to change, e.g. terms=match match.weighting=dreamfusion generator.lr=1e-4.
    out
        The run's folder; RUNS/RECIPE unless told.
    runs
        The folder that runs and pair stores share.
    scale
        cpu-smoke: a trial of every code path in under a minute, in RUNS/cpu-smoke, with small random networks in place
        of what the recipe would fetch.
    dry_run
        Print the resolved recipe and stop.
    """
    from distmatch.config import dump, load_recipe

    resolved = load_recipe(recipe, overrides)
    if scale == "cpu-smoke":
        from distmatch.smoke import cpu_smoke, make_networks

        runs = runs / "cpu-smoke" / resolved.name
        full, resolved = resolved, load_recipe(recipe, [*cpu_smoke(resolved, runs), *overrides])
        if not dry_run:
            make_networks(full, runs)
    if dry_run:
        print(dump(resolved), end="")
        return
    from distmatch.run import distil

    distil(resolved, out or runs / resolved.name, runs)


@app.command
def teach(
    images: Path,
    /,
    *,
    out: Out = None,
    steps: int = 10_000,
    batch: int = 128,
    lr: float = 1e-3,
    widths: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (32, 64),
    blocks: int = 1,
    patch: int = 2,
    split: str = "train",
    label_dropout: float = 0.0,
    flip: bool = False,
    ema: float = 0.999,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    save_every: int = 500,
    preview_every: int = 500,
    device: str = "auto",
) -> None:
    """Train a diffusion teacher on your own images (EDM's objective). Run again to continue.

    Parameters
    ----------
    images
        A folder or an archive (.tar, .tar.gz, .tar.xz, .zip) of images of one size: [train/]CLASS/NAME.png, or flat.
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
        Sub-folder to read where there is one of that name.
    label_dropout
        Share of the images shown without their label; 0.1 makes the teacher fit for guidance.
    flip
        Mirror every other image.
    """
    from distmatch.run import teach as run

    name = images.name.split(".")[0]
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
def sample(
    model: str,
    /,
    *,
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 64,
    seed: int = 0,
    label: str | None = None,
    prompt: Annotated[list[str] | None, Parameter(name=["--prompt", "-p"])] = None,
    out: Out = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    device: str = "auto",
) -> None:
    """Make images: a grid and single PNGs.

    Parameters
    ----------
    model
        A model or run folder, or a model of the package: mnist.
    label
        Class name or number for all images; the classes in turn unless told.
    prompt
        For a text-to-image model, what to draw; several take turns.
    out
        Where the images go; samples/MODEL unless told.
    steps
        Sample the teacher called MODEL with so many steps of Heun (PNDM for Stable Diffusion) instead of the student.
    guidance
        Classifier-free guidance, uncond + w (cond - uncond): of the teacher, or of a student that learnt a range.
    """
    from distmatch.run import sample as run

    name = Path(model).name
    run(model, out or Path("samples") / name, n, seed, label, prompt, steps, guidance, batch, device)


@app.command(name="eval")
def evaluate(
    model: str,
    /,
    *,
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 50_000,
    seed: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    features: str = "mnist",
    resize: Literal["legacy", "clean"] = "legacy",
    reference: Path | None = None,
    batch: int = 256,
    out: Out = None,
    device: str = "auto",
) -> None:
    """Measure a model: Frechet and kernel distance, precision and recall, class accuracy, latency, throughput.

    FID by EDM's protocol: --features inception:FILE --reference STATISTICS.npz, 50,000 images. Several GPUs share the
    images, and the figures stay the same: torchrun --nproc-per-node 8 -m distmatch eval ...

    Parameters
    ----------
    model
        A model or run folder, or a model of the package: mnist.
    n
        Number of images, classes in turn.
    seed
        Of the images' noise. 0 is the seed of the recipes' pairs: a student has seen the first of that noise.
    steps
        Measure the teacher called MODEL with so many Heun steps instead of the student.
    guidance
        Classifier-free guidance, uncond + w (cond - uncond); only with --steps.
    features
        The network in whose features images are compared: a folder made by `distmatch classifier`, or mnist, or
        inception:FILE for FID. FILE holds the weights: inception-2015-12-05.pt (TorchScript, a program that is run: use
        one that you trust), a state dict of the PyTorch port (.pth, .safetensors), or NVIDIA's .pkl.
    resize
        How Inception's images are enlarged. legacy: as TensorFlow 1 did it, for FID as EDM and DMD report it;
        clean: bicubic with antialiasing, as clean-fid does it.
    reference
        Real images (folder, archive, or u8[N,H,W,C] in an .npy or .npz), or their statistics (.npz with mu and sigma,
        made with the same features and resize); the reference that comes with FEATURES unless told.
    out
        Write the figures there as JSON as well.
    """
    from distmatch.run import evaluate as run

    run(model, n, seed, steps, guidance, features, resize, reference, batch, out, device)


@app.command
def classifier(
    images: Path,
    /,
    *,
    out: Out = None,
    steps: int = 3000,
    batch: int = 128,
    lr: float = 2e-3,
    widths: Annotated[tuple[int, int, int], Parameter(consume_multiple=True)] = (16, 32, 64),
    flip: bool = False,
    seed: int = 0,
) -> None:
    """Train the classifier whose features `distmatch eval` measures in, on images/train, tested on images/test.

    Parameters
    ----------
    images
        A folder or an archive of images: train/CLASS/NAME.png and test/CLASS/NAME.png.
    out
        The classifier's folder; runs/classifier-NAME unless told.
    widths
        Channels at the half resolution (two layers) and at the quarter; the last is the number of features.
    flip
        Mirror every other image.
    """
    from distmatch.run import classifier as run

    name = images.name.split(".")[0]
    run(images, out or Path("runs") / f"classifier-{name}", steps, batch, lr, widths, flip, seed)


@app.command
def compare(
    teacher: str,
    student: str | None = None,
    /,
    *,
    prompts: str = "coco",
    coco: Path | None = None,
    column: str | None = None,
    n: Annotated[int | None, Parameter(name=["-n", "--n"])] = None,
    seed: int = 1,
    guidance: float = 8.0,
    lora: str | None = None,
    features: str | None = None,
    reference: Path | None = None,
    clip: Path | None = None,
    clip_model: str = "ViT-g-14",
    picture: int = 7,
    batch: int = 16,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    out: Out = None,
    device: str = "auto",
) -> None:
    """Compare a text-to-image student with its teacher, fast solvers and LCM-LoRA: figures, latencies, one picture.

    All make the same prompts from the same noise. Run again to continue. Several GPUs share the images:
    torchrun --nproc-per-node 8 -m distmatch compare ...

    Parameters
    ----------
    teacher
        A folder in diffusers' format, or the name of one on Hugging Face.
    student
        A model or run folder; left out unless told.
    prompts
        A file (.txt, .jsonl, .parquet, or .json captions of MS-COCO), or coco: random captions of --coco.
    coco
        captions_val2014.json, from annotations_trainval2014.zip.
    column
        Key or column of the prompts; prompt, caption or text unless told.
    n
        Images that are measured; 30,000 of coco, one per prompt of a file. Without --features and --clip only those of
        the picture are made.
    seed
        Of the noise and of coco's captions.
    guidance
        Of the teacher and its solvers, and of a student that takes one. The paper's: 3 and 8.
    lora
        An LCM-LoRA for 1, 2 and 4 steps: a file, a folder, or latent-consistency/lcm-lora-sdv1-5.
    features
        inception:FILE for FID, see `distmatch eval`; images are enlarged as clean-fid does it.
    reference
        The real images for FID: their folder (val2014), or statistics made with --resize clean.
    clip
        OpenCLIP's weights for the CLIP score: the file, or its folder.
    clip_model
        OpenCLIP's name of their network.
    picture
        Rows of the picture: the first prompts.
    precision
        Of the teacher's weights; the student computes in it by autocast.
    out
        Where figures and pictures go; runs/compare-TEACHER unless told.
    """
    from distmatch.compare import command

    command(
        teacher, student, out or Path("runs") / f"compare-{Path(teacher).name}", prompts=prompts, coco=coco,
        column=column, guidance=guidance, n=n, seed=seed, lora=lora, features=features, reference=reference, clip=clip,
        clip_model=clip_model, batch=batch, picture=picture, precision=precision, device=device,
    )  # fmt: skip


@export_app.command(name="diffusers")
def export_diffusers(run: str, /, *, out: Out = None, source: str | None = None, half: bool = False) -> None:
    """Write a text-to-image student as a folder that DiffusionPipeline.from_pretrained opens.

    It makes the student's image with num_inference_steps=1, guidance_scale=1: the student's time and prediction are
    in the scheduler's settings. A student that learnt a range of guidance takes guidance_scale from that range.

    Parameters
    ----------
    run
        A run or model folder.
    out
        The folder; RUN-diffusers unless told.
    source
        The teacher in diffusers' format whose text encoders and autoencoder go along; that of the run unless told.
    half
        Weights in half precision.
    """
    from distmatch.export import export_diffusers as export

    export(run, out or Path(f"{run.rstrip('/')}-diffusers"), source, half)


@export_app.command(name="lora")
def export_lora(run: str, /, *, out: Out = None) -> None:
    """Write the adapters of a student trained with student.lora_rank as a LoRA in diffusers' format, and its scheduler.

    Parameters
    ----------
    run
        A run folder.
    out
        The folder; RUN-lora unless told.
    """
    from distmatch.export import export_lora as export

    export(run, out or Path(f"{run.rstrip('/')}-lora"))


@pairs_app.command(name="build")
def build_pairs(recipe: str, /, *overrides: str, out: Out = None, runs: Runs = Path("runs")) -> None:
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
def verify_pairs(store: Path, /) -> None:
    """Check every byte of a store: images, and that the noise still comes out the same."""
    from distmatch.run import verify

    verify(store)


@import_app.command(name="edm")
def import_edm(source: str, /, *, out: Out = None) -> None:
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
def report(*runs: Path, out: Out = None) -> None:
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
        raise ValueError("no run was named; give one or more run folders, e.g. distmatch report runs/mnist")
    print(write(list(runs), out or runs[0] / "report.html"))


def main() -> None:
    """Entry point: a user's mistake is one message, not a traceback (set DISTMATCH_DEBUG=1 for one)."""
    # Waiting OpenMP threads that spin cost a busy CPU more than they save; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if os.environ.get("DISTMATCH_DEBUG"):
        app()
        return
    try:
        app()
    except ValueError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(f"stopped; to go on: {_command()}", 130)
    except Exception as error:
        if type(error).__name__ == "Stopped":
            _fail(f"{error}; to go on: {_command()}", 130)
        if type(error).__name__ == "Diverged":
            _fail(str(error), 1)
        raise


def _command() -> str:
    """The command line as the user gave it."""
    name = Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m", "distmatch"] if name == "__main__.py" else [name]), *sys.argv[1:]])


def _fail(message: str, code: int) -> None:
    print(f"distmatch: {message}", file=sys.stderr)
    raise SystemExit(code)
