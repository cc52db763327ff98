"""`distmatch teach`: trains a diffusion teacher on a folder of images."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from distmatch.commands.shared import TeachingOptions, find_precision, find_workers, read_images, starting
from distmatch.system.errors import UserError
from distmatch.system.options import WHOLE, Count, Name, Out, Range, Share, WorkerCount

if TYPE_CHECKING:
    from distmatch.data.images import Images


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options(TeachingOptions):
    """How to train a teacher."""

    widths: Annotated[tuple[int, ...], WHOLE, Parameter(consume_multiple=True, validator=Range(1))] = (32, 64)
    """U-Net channels per resolution level."""

    blocks: Count = 1
    """Residual blocks per level and direction."""

    patch: Count = 2
    """Side of the space-to-depth stem; the image side must be a multiple of patch * 2 ** (levels - 1)."""

    label_dropout: Share = 0.0
    """Share of the images shown without their label; 0.1 prepares the teacher for guidance."""

    flip: bool = False
    """Mirror half of the images."""

    workers: WorkerCount = "auto"
    """Threads that share each batch, on a CPU; auto: as many as are fastest here."""


def teach(images: Name, /, *, out: Out = None, options: Options = Options()) -> None:
    """Train a diffusion teacher on your own images (EDM's objective). Run again to continue.

    Parameters
    ----------
    images
        A folder or an archive (.tar, .tar.gz, .tar.xz, .zip) of images of one size, [train/]CLASS/NAME.png or flat;
        labels may also be in dataset.json, metadata.jsonl or .cls files. CIFAR's batches, MNIST's files and Parquet
        work too. An archive may be at a URL (s3://, gs://, hf://). For details see docs/data.md.
    out
        The run's folder; default: runs/teach-NAME. The model is saved in its model/ folder.
    """
    starting(f"Loading PyTorch, then reading {images}")
    from distmatch.system.storage import name_of

    train_teacher(images, out or Path("runs") / f"teach-{name_of(images).split('.')[0]}", options)


def train_teacher(images: "str | Path | Images", out: Path, options: Options = Options()) -> None:
    """Train a teacher on `images`, into `out`. If called again, continue the run.

    Args:
        images: a place to read from (see `images.load_images`), or loaded images, e.g. `Images.of(tensor, labels)`.

    Raises `UserError` if the images cannot be read or do not fit the network, or if `out` is a run with other settings
    or images.
    """
    from distmatch.system.ownership import owned

    with owned(out):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("distmatch teach runs in one process; start it without torchrun")
        _train(images, out, options)


def _train(images: "str | Path | Images", out: Path, options: Options) -> None:
    from hashlib import sha256

    import torch

    from distmatch.commands.binding import begun_settings, same_settings
    from distmatch.data.images import Images
    from distmatch.diffusion.denoiser import Denoiser, Prediction
    from distmatch.diffusion.schedule import EDM
    from distmatch.evaluation.features import image_fingerprint
    from distmatch.methods import teach
    from distmatch.models.folder import Info
    from distmatch.models.unet import UNet
    from distmatch.recipe import subjects
    from distmatch.system.screen import console
    from distmatch.system.storage import name_of
    from distmatch.system.terminal import command
    from distmatch.training import teaching
    from distmatch.training.clip_share import Clipped, Clipping
    from distmatch.training.train import Plan, train

    given = isinstance(images, Images)
    name, real = ("given in Python", images) if given else (name_of(images), read_images(images, options.split, out))
    shape = tuple(real.pixels.shape[1:])
    multiple = options.patch * 2 ** (len(options.widths) - 1)
    if shape[1] % multiple or shape[2] % multiple:
        raise UserError(
            f"images of {shape[1]}x{shape[2]} don't fit this network: the sides must be multiples of {multiple} "
            "(patch * 2 ** (levels - 1)); change --patch or --widths"
        )
    console.print(str(real))
    torch.manual_seed(options.seed)  # for the initial weights
    network = {"widths": list(options.widths), "blocks": options.blocks, "patch": options.patch}
    net = UNet(channels=shape[0], classes=len(real.classes), **network)
    device = subjects.device(options.device)
    denoiser = Denoiser(net, EDM(), Prediction("edm")).to(device).train()
    precision = find_precision(options.precision, begun_settings(out / "settings.json").get("precision"), device)
    how = teach.Settings(
        batch=options.batch,
        seed=options.seed,
        ema=options.ema,
        label_dropout=options.label_dropout,
        flip=options.flip,
        precision=precision,
    )
    settings = {"images": name, "split": options.split, "count": len(real), "steps": options.steps, "lr": options.lr}
    settings |= {**vars(how), "objective": "EDM"}
    labels = None if real.labels is None else sha256(real.labels.numpy().data).hexdigest()
    content = {"pixels": image_fingerprint(real.pixels), "labels": labels, "classes": list(real.classes)}
    same_settings({**settings, "network": network, **content}, out / "settings.json")
    optimizer = teaching.optimizer(denoiser, options.lr, warmup=200, steps=options.steps)
    info = Info(shape, real.classes, card={"teach": settings, "pixels": content["pixels"]})
    task = teach.Teaching(denoiser, real, optimizer, info, how, find_workers(options.workers, device))
    plan = Plan(options.steps, log_every=50, save_every=options.save_every, preview_every=options.preview_every)
    watch = Clipping(Clipped("gradient_norm", optimizer.clip, "Lower --lr"))
    train(task, out, plan, watch=watch, config=settings, title="teach")
    console.print(
        f"The teacher is in {out / 'model'}. Next: {command('sample', out, '--teacher', '--steps', 18)}, "
        f"{command('train', 'mnist', f'teacher={out}', 'evaluate.every=0')}"
    )
