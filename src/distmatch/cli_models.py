"""The commands for finished models: sample, measure, compare, serve, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, Parameter, Token

from distmatch.extras import need
from distmatch.options import Count, Range, Scale
from distmatch.paths import expand

app = App(help_format="plaintext")
export_app = App(name="export", help="Turn students into other libraries' formats.")
app.command(export_app)


def _place(kind: Any, tokens: Sequence[Token]) -> Any:
    """The one place where the home folder takes the place of `~` in what a command is given."""
    (token,) = tokens
    return Path(expand(token.value)) if Path in (kind, *get_args(kind)) else expand(token.value)


PLACE = Parameter(converter=_place)
Name = Annotated[str, PLACE]
"""A model, by name, path or URL, or data by path or URL."""

File = Annotated[Path, PLACE]
Out = Annotated[Path | None, Parameter(name=["--out", "-o"], converter=_place)]


@app.command
def sample(
    model: Name,
    /,
    *,
    n: Annotated[int, Parameter(name=["-n", "--n"], validator=Range(1))] = 64,
    seed: int = 0,
    label: str | None = None,
    prompt: Annotated[list[str] | None, Parameter(name=["--prompt", "-p"])] = None,
    out: Out = None,
    steps: Count | None = None,
    guidance: Scale | None = None,
    batch: Count | None = None,
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
        Where the images go, in place of an earlier call's; samples/MODEL unless told.
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
    model: Name,
    /,
    *,
    n: Annotated[int, Parameter(name=["-n", "--n"], validator=Range(1))] = 50_000,
    seed: int = 1,
    steps: Count | None = None,
    guidance: Scale | None = None,
    features: Name | None = None,
    resize: Literal["legacy", "clean"] = "legacy",
    reference: Name | None = None,
    batch: Count = 256,
    out: Out = None,
    device: str = "auto",
) -> None:
    """Measure a model: Frechet and kernel distance, precision and recall, class accuracy, latency, throughput.

    All in several feature spaces, beside real images: a model that is good in one and bad in another is not good.

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
        What images are compared in: a folder made by `distmatch classifier`, or mnist; pixels, the principal components
        of --reference's; or inception:FILE for FID. Unless told those of the package, if the model was taught on its
        images, or pixels, if there is a --reference. FILE holds the weights: inception-2015-12-05.pt (TorchScript, a
        program that is run: use one that you trust), a state dict of the PyTorch port (.pth, .safetensors), or
        NVIDIA's .pkl.
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
def compare(
    teacher: Name,
    student: Name | None = None,
    /,
    *,
    prompts: Name = "coco",
    coco: File | None = None,
    column: str | None = None,
    n: Annotated[int | None, Parameter(name=["-n", "--n"], validator=Range(1))] = None,
    seed: int = 1,
    guidance: Annotated[float, Parameter(validator=Range(1))] = 8.0,
    lora: Name | None = None,
    features: Name | None = None,
    reference: File | None = None,
    clip: File | None = None,
    clip_model: str = "ViT-g-14",
    picture: Count = 7,
    batch: Count = 16,
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

    teacher = teacher.removeprefix("diffusers:")
    command(
        teacher, student, out or Path("runs") / f"compare-{Path(teacher).name}", prompts=prompts, coco=coco,
        column=column, guidance=guidance, n=n, seed=seed, lora=lora, features=features, reference=reference, clip=clip,
        clip_model=clip_model, batch=batch, picture=picture, precision=precision, device=device,
    )  # fmt: skip


@app.command
def serve(
    model: Name,
    /,
    *,
    teacher: Name | None = None,
    steps: Count | None = None,
    guidance: Scale | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Range(0, 65535))] = 7860,
    device: str = "auto",
    open_browser: bool = False,
) -> None:
    """Open a local web page that draws as you type, and asks which picture is the teacher's.

    Parameters
    ----------
    model
        A student: a model or run folder, or one of the package: mnist.
    teacher
        Its teacher, for the game: a model folder, mnist, diffusers:FOLDER_OR_ID.
    steps
        The teacher's sampler steps; 18 of Heun, 50 of PNDM for Stable Diffusion, unless told.
    guidance
        The teacher's; that of the student's training unless told.
    host
        Address to listen at. Others than 127.0.0.1 let everybody in your network use the page.
    port
        Where it is taken, a free one is used.
    """
    need("fastapi", "uvicorn", "websockets", by="the web page")
    from distmatch.run import pipeline
    from distmatch.serve import serve as run

    steps = steps or (50 if str(teacher).startswith("diffusers:") else 18)
    student = pipeline(model, None, None, device)
    if guidance is None:
        trained = student.info.card.get("recipe", {}).get("match", {}).get("guidance", 1.0)
        guidance = sum(student.info.guidance) / 2 if student.info.guidance else trained
    run(student, pipeline(teacher, steps, guidance, device) if teacher else None, host, port, open_browser)


@export_app.command(name="diffusers")
def export_diffusers(run: Name, /, *, out: Out = None, source: Name | None = None, half: bool = False) -> None:
    """Write a text-to-image student as a folder that DiffusionPipeline.from_pretrained opens.

    It makes the student's image with num_inference_steps=1, guidance_scale=1: the student's time and prediction are
    in the scheduler's settings. A student that learnt a range of guidance takes guidance_scale from that range.

    Parameters
    ----------
    run
        A run or model folder.
    out
        The folder; RUN-diffusers unless told. An older export in it is replaced when the new one is written.
    source
        The teacher in diffusers' format whose text encoders and autoencoder go along; that of the run unless told.
    half
        Weights in half precision.
    """
    from distmatch.export import export_diffusers as export

    export(run, out or Path(f"{run.rstrip('/')}-diffusers"), source, half)


@export_app.command(name="lora")
def export_lora(run: Name, /, *, out: Out = None) -> None:
    """Write the adapters of a student trained with student.lora_rank as a LoRA in diffusers' format, and its scheduler.

    Parameters
    ----------
    run
        A run folder.
    out
        The folder; RUN-lora unless told. An older export in it is replaced when the new one is written.
    """
    from distmatch.export import export_lora as export

    export(run, out or Path(f"{run.rstrip('/')}-lora"))
