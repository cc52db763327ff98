"""Measuring a model: distances in a feature space, class accuracy, latency and throughput.

FID is the Frechet distance in the features of Inception-v3 (Heusel et al. 2017, arXiv 1706.08500). By the protocol of
EDM (Karras et al. 2022, arXiv 2206.00364), which DMD follows (arXiv 2311.18828, Appendix D), it is that of 50,000
images, rounded to 8 bits and enlarged as TensorFlow 1 did it, to the training images; EDM gives the least of three
seeds. Means and covariances are unbiased and of float64.

A model is measured in several feature spaces at once, since each is blind to something. A figure in a space is called
`FIGURE/SPACE`, e.g. `frechet/pixels`; Inception's Frechet distance is `fid`.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from distmatch.diffusion.conditions import Classes, Conditions
from distmatch.evaluation.features import FeatureSpace, Reference
from distmatch.evaluation.metrics import Moments, frechet, frechet_bias, kernel_distance, precision_recall
from distmatch.pipeline import Pipeline
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.screen import console

COLUMNS = {
    "name": ("model", "{}"),
    "nfe": ("network evaluations", "{}"),
    "images": ("images", "{:,}"),
    "ms_per_image": ("ms per image", "{:.1f}"),
    "images_per_second": ("images per second", "{:,.0f}"),
    "fid": ("FID", "{:.3f}"),
    "clip_score": ("CLIP score", "{:.3f}"),
    "frechet": ("Frechet distance", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("class accuracy", "{:.3f}"),
    "ratio": ("ratio to the teacher", "{:.2f}"),
}
"""Figures of a row: heading and format."""

SECONDS = 3.0
"""How long a latency is measured for, at least."""

Space = tuple[FeatureSpace, Reference]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Heading and format of each figure that one of `rows` has, in the order of `COLUMNS`; spaces in their own."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    shown = {}
    for figure, (heading, form) in COLUMNS.items():
        for key in keys:
            base, _, space = key.partition("/")
            if base == figure:
                shown[key] = (f"{heading} ({space})" if space else heading, form)
    return shown


def fewest(features: int) -> int:
    """The fewest images that a distance in so many features is given for: twice as many.

    No more images than features have a singular covariance. From twice as many, chance alone scores about an eighth of
    the features' whole variance (`metrics.frechet_bias` with equal eigenvalues), and no model's difference would show.
    """
    return 2 * features


def enough(features: int, n: int, what: str) -> None:
    """Raises `UserError` where `n` of `what` are too few for distances in `features`."""
    if n < fewest(features):
        raise UserError(
            f"{n:,} {what} are too few for distances in {features:,} features: chance would decide. Take at least "
            f"{fewest(features):,}, or a space of fewer features"
        )


def judge(spaces: Sequence[Space], classes: Sequence[str]) -> FeatureSpace | None:
    """The last space that knows all of `classes` by name, if there is one: classes are best told by pooled features."""
    return next((space for space, _ in reversed(spaces) if classes and set(classes) <= set(space.classes)), None)


def chance(spaces: Sequence[Space], n: int) -> dict[str, Any]:
    """A row: the Frechet distances that `n` real images have on average, for they are finitely many."""
    expected = {
        space.distance: frechet_bias(real.cov, n) + (frechet_bias(real.cov, real.count) if real.count else 0.0)
        for space, real in spaces
    }
    return {"name": "real images, expected", "images": n, **expected}


@torch.inference_mode()
def score(
    make: Callable[[int, int], Tensor],
    labels: Tensor | None,
    n: int,
    spaces: Sequence[Space],
    *,
    classes: Sequence[str] = (),
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """Figures of `n` images in each of `spaces`.

    Several processes (see `parallel`) share the images batch by batch, all of them call this. The first gets the
    figures, the same to the last bit as those of one process with that batch; the others get none.

    Args:
        make: `(start, stop) -> pixels u8[stop - start, C, H, W]`, images by index.
        labels: i64[n], the classes that were asked for, by their numbers in `classes`.
        classes: their names. The accuracy is the share of images that a space which knows all of these names takes for
            the class asked for; where none does, there is no accuracy.
        full: kernel distance, precision and recall besides the Frechet distance; they use as many images as the
            reference kept features of, and are left out where it kept none.

    Raises `UserError` where a reference is of another number of features, and for too few images (see `fewest`).
    """
    for _, real in spaces:
        enough(len(real.mu), n, "images")
        enough(len(real.mu), real.count or n, f"real images ({real.source})")
    expert = judge(spaces, classes)
    numbers = None if expert is None else torch.tensor([list(expert.classes).index(name) for name in classes])

    def look(rows: range) -> tuple[list[Tensor], Tensor | None]:
        pixels, seen, agreed = make(rows.start, rows.stop), [], None
        for space, real in spaces:
            features, logits = space.both(pixels)
            if features.shape[1] != len(real.mu):
                raise UserError(
                    f"the reference ({real.source}) is of {len(real.mu)} features, the network has "
                    f"{features.shape[1]}; use the reference of these features"
                )
            seen.append(features.float().cpu())
            if space is expert and labels is not None and logits is not None and numbers is not None:
                agreed = logits.argmax(1).cpu() == numbers[labels[rows.start : rows.stop].cpu()]
        return seen, agreed

    jobs = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
    tallies, right = [_Tally(real.features if full else real.features[:0]) for _, real in spaces], []
    for seen, agreed in parallel.shared(look, jobs, level=True):
        for tally, features in zip(tallies, seen, strict=True):
            tally.update(features)
        if agreed is not None:
            right.append(agreed)
        if progress is not None:
            progress(len(seen[0]))
    if parallel.rank() > 0:
        return {}
    figures: dict[str, float] = {}
    for (space, real), tally in zip(spaces, tallies, strict=True):
        figures |= {space.distance: frechet(tally.moments.mean, tally.moments.cov, real.mu, real.cov)}
        figures |= {f"{figure}/{space.name}": value for figure, value in tally.figures().items()}
    if right:
        figures["accuracy"] = int(torch.cat(right).sum()) / n
    return figures


class _Tally:
    """Moments of all features, and as many of the features as there are `real f[n,F]` to compare with."""

    def __init__(self, real: Tensor):
        self.real, self.moments, self.kept = real, Moments(), []

    def update(self, features: Tensor) -> None:
        if self.moments.count < len(self.real):
            self.kept.append(features)
        self.moments.update(features)

    def figures(self) -> dict[str, float]:
        """Kernel distance, precision and recall; none without real features."""
        if not len(self.real):
            return {}
        fake = torch.cat(self.kept)[: len(self.real)]
        precision, recall = precision_recall(self.real[: len(fake)], fake)
        return {"kernel_distance": kernel_distance(self.real, fake)[0], "precision": precision, "recall": recall}


def evaluate(
    pipeline: Pipeline,
    spaces: Sequence[Space],
    *,
    n: int,
    seed: int = 0,
    conditions: Conditions | None = None,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """`score` of images `0 .. n - 1` of `seed`, of `conditions` by number: the classes in turn unless told."""
    classes = pipeline.info.classes
    labels = torch.arange(n) % len(classes) if classes else None
    conditions = conditions or Classes(len(classes))

    def make(start: int, stop: int) -> Tensor:
        return pipeline.pixels(range(start, stop), conditions.at(range(start, stop)), seed)

    return score(make, labels, n, spaces, classes=classes, batch=batch, progress=progress, full=full)


def speed(pipeline: Pipeline, batch: int = 256) -> dict[str, float]:
    """`ms_per_image`, the median latency at batch 1, and `images_per_second` at `batch`; warm."""
    one, many = (median_seconds(lambda size=size: pipeline(size, batch=size)) for size in (1, batch))
    return {"ms_per_image": 1000 * one, "images_per_second": batch / many}


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of `call`, which ends on the host, of at least 3 and of `SECONDS`, after one more."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def named(model: str, nfe: int) -> str:
    """Return the heading of a row's column."""
    return f"{model}, {nfe} evaluation{'s' if nfe > 1 else ''}"


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table with one model per column, which fits any terminal; leave out figures that none has."""
    table = Table("", *(row["name"] for row in rows))
    for key, (heading, form) in columns(rows).items():
        if key != "name":
            table.add_row(heading, *("-" if row.get(key) is None else form.format(row[key]) for row in rows))
    console.print(table)


def show_spaces(name: str, spaces: Sequence[Space]) -> None:
    """Print what was compared with what."""
    for space, real in spaces:
        count = f"{real.count:,} images, {real.source}" if real.count else real.source
        console.print(f"{space.name}: {len(real.mu)} features of {name}, against {count}")


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
