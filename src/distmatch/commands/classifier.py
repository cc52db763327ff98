"""`distmatch classifier`: trains the feature spaces that `distmatch eval` measures in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from distmatch.commands.shared import read_images
from distmatch.system.errors import UserError
from distmatch.system.options import WHOLE, Count, Integer, Name, Out, Range, Rate


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    out: Out = None
    """The classifier's folder; default: runs/classifier-NAME."""

    steps: Count = 3000
    """Training steps of each classifier."""

    batch: Count = 128
    """Images per step."""

    lr: Rate = 2e-3
    """Peak learning rate of AdamW."""

    widths: Annotated[tuple[int, int, int], WHOLE, Parameter(consume_multiple=True, validator=Range(1))] = (16, 32, 64)
    """Channels at half resolution (two layers) and at quarter resolution; the last is the number of features."""

    positions: Count = 3
    """Positions per side in the second classifier's features; 1 omits that classifier."""

    flip: bool = False
    """Mirror half of the images."""

    seed: Integer = 0
    """Seed of the initial weights and of the image order."""


def classifier(images: Name, /, options: Options = Options()) -> None:
    """Train the feature spaces that `distmatch eval` measures in, on images/train, and test them on images/test.

    There are three, chosen to differ: a classifier whose features are averaged over the whole image, one whose features
    keep their positions, and the principal components of the pixels.

    Parameters
    ----------
    images
        A folder or an archive of images: train/CLASS/NAME.png and test/CLASS/NAME.png, or another layout of
        docs/data.md. If there is no test split, val is used.
    """
    import time

    from distmatch.evaluation.measure import show_rows
    from distmatch.evaluation.spaces import train_spaces
    from distmatch.models.classifier import Training
    from distmatch.system.ownership import owned
    from distmatch.system.screen import console
    from distmatch.system.storage import name_of
    from distmatch.system.terminal import command

    out = options.out or Path("runs") / f"classifier-{name_of(images).split('.')[0]}"
    training = Training(
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        widths=options.widths,
        flip=options.flip,
        seed=options.seed,
    )
    with owned(out):
        real, test = read_images(images, "train", out), read_images(images, "test", out)
        console.print(f"trained on {real}\ntested on {test}")
        if real.account.bits != test.account.bits:
            raise UserError(
                f"training images use {real.account.bits} bits per pixel and test images {test.account.bits}, of which "
                "the upper 8 would be taken; bring them to one scale first"
            )
        began = time.perf_counter()
        rows = train_spaces(real, test, out, f"{name_of(images)}, train", options.positions, training)
        show_rows(rows)
    console.print(f"{time.perf_counter() - began:.0f} s; in {out}. Next: {command('eval', 'MODEL', '--features', out)}")
