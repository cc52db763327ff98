"""What `distmatch teach` and `distmatch classifier` do: networks trained on images."""

import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from distmatch import build
from distmatch.clipping import Clipped, Clipping
from distmatch.denoiser import Denoiser, Prediction
from distmatch.errors import UserError
from distmatch.features import image_fingerprint
from distmatch.images import Images, load_images
from distmatch.models.folder import Info
from distmatch.models.unet import UNet
from distmatch.optim import Optimizer
from distmatch.ownership import owns_out
from distmatch.run import print_rows, same_settings
from distmatch.schedule import EDM
from distmatch.screen import console
from distmatch.spaces import train_spaces
from distmatch.storage import is_url, name_of
from distmatch.teach import Teaching
from distmatch.terminal import command
from distmatch.train import Plan, train


@owns_out
def teach(
    images: str | Path | Images,
    out: Path,
    *,
    network: dict[str, Any] | None = None,
    steps: int = 10_000,
    batch: int = 128,
    lr: float = 1e-3,
    split: str = "train",
    label_dropout: float = 0.0,
    flip: bool = False,
    ema: float = 0.999,
    precision: str = "fp32",
    seed: int = 0,
    save_every: int = 500,
    preview_every: int = 500,
    device: str = "auto",
) -> None:
    """`distmatch teach`: a teacher trained on `images`, into `out`. Called again, it goes on where it was.

    Args:
        images: a place to read (see `images.load_images`), or images at hand, e.g. `Images.of(tensor, labels)`.
        network: `widths`, `blocks` and `patch` of `models.unet.UNet`.

    All else is as in `distmatch teach --help`. Raises `UserError` where the images cannot be read or do not fit the
    network, and where `out` is a run with other settings or images.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("distmatch teach runs in one process; start it without torchrun")
    network = {"widths": [32, 64], "blocks": 1, "patch": 2, **(network or {})}
    given = isinstance(images, Images)
    name, real = ("given in Python", images) if given else (name_of(images), _read(images, split, out))
    shape = tuple(real.pixels.shape[1:])
    multiple = network["patch"] * 2 ** (len(network["widths"]) - 1)
    if shape[1] % multiple or shape[2] % multiple:
        raise UserError(
            f"images of {shape[1]}x{shape[2]} don't fit this network: the sides must be multiples of {multiple} "
            "(patch * 2 ** (levels - 1)); change --patch or --widths"
        )
    console.print(str(real))
    torch.manual_seed(seed)  # the initial weights
    net = UNet(channels=shape[0], classes=len(real.classes), **network)
    denoiser = Denoiser(net, EDM(), Prediction("edm")).to(build.device(device)).train()
    settings = {
        "images": name, "split": split, "count": len(real), "steps": steps, "batch": batch, "lr": lr,
        "ema": ema, "label_dropout": label_dropout, "flip": flip, "precision": precision, "seed": seed,
        "objective": "EDM",
    }  # fmt: skip
    labels = None if real.labels is None else sha256(real.labels.numpy().data).hexdigest()
    content = {"pixels": image_fingerprint(real.pixels), "labels": labels, "classes": list(real.classes)}
    same_settings({**settings, "network": network, **content}, out / "settings.json")
    task = Teaching(
        denoiser,
        real,
        Optimizer(denoiser.parameters(), lr=lr, weight_decay=0.0, warmup=200, steps=steps, decay=0.3, clip=1.0),
        info=Info(shape, real.classes, card={"teach": settings, "pixels": content["pixels"]}),
        batch=batch,
        seed=seed,
        ema=ema,
        label_dropout=label_dropout,
        flip=flip,
        precision=precision,
    )
    plan = Plan(steps, log_every=50, save_every=save_every, preview_every=preview_every)
    watch = Clipping(Clipped("gradient_norm", task.optimizer.clip, "Lower --lr"))
    train(task, out, plan, watch=watch, config=settings, title="teach")
    console.print(
        f"The teacher is in {out / 'model'}. Next: {command('sample', out, '--steps', 18)}, "
        f"{command('train', 'mnist', f'teacher={out}', 'evaluate.every=0')}"
    )


@owns_out
def classifier(images: str, out: Path, positions: int, training: dict[str, Any]) -> None:
    """`distmatch classifier`: feature spaces, and the reference statistics of the training images in each.

    Args:
        positions: see `train_spaces`.
        training: arguments of `train_classifier`.
    """
    real, test = _read(images, "train", out), _read(images, "test", out)
    console.print(f"trained on {real}\ntested on {test}")
    if real.account.bits != test.account.bits:
        raise UserError(
            f"training images use {real.account.bits} bits per pixel and test images {test.account.bits}, of which the "
            "upper 8 would be taken; bring them to one scale first"
        )
    began = time.perf_counter()
    rows = train_spaces(real, test, out, f"{name_of(images)}, train", positions=positions, **training)
    print_rows(rows)
    console.print(f"{time.perf_counter() - began:.0f} s; in {out}. Next: {command('eval', 'MODEL', '--features', out)}")


def _read(images: str | Path, split: str, out: Path) -> Images:
    """The images of a split, among which results are not to be written."""
    if not is_url(images) and Path(images).resolve() == out.resolve():
        raise UserError(f"{out} holds the images; choose another folder for the results with --out")
    with console.status(f"reading {images}"):
        return load_images(images, split, without=out)
