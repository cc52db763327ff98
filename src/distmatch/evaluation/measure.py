"""Measures a model: distances in feature spaces, class accuracy, latency and throughput.

FID is the Frechet distance in the features of Inception-v3 (Heusel et al. 2017, arXiv 1706.08500). We follow the
protocol of EDM (Karras et al. 2022, arXiv 2206.00364), as DMD does (arXiv 2311.18828, Appendix D): 50,000 images,
rounded to 8 bits and resized as in TensorFlow 1, against the training images. EDM reports the lowest of three seeds.
Means and covariances are unbiased and float64.

A model is measured in several feature spaces at once, because each is blind to something. A figure in a space is called
`FIGURE/SPACE`, e.g. `frechet/pixels`; Inception's Frechet distance is `fid`.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from rich.cells import cell_len
from rich.table import Column, Table
from torch import Tensor

from distmatch.diffusion.conditions import Classes, Conditions
from distmatch.evaluation.features import FeatureSpace, Reference
from distmatch.evaluation.metrics import Moments, frechet, frechet_bias, kernel_distance, precision_recall
from distmatch.pipeline import Pipeline
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.screen import console, escaped

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
    "top1": ("agreement: own name first", "{:.3f}"),
    "top5": ("own name in the first five", "{:.3f}"),
    "nearest": ("distance to a training picture", "{:.3f}"),
    "copies": ("copies", "{:.3f}"),
    "ratio": ("ratio to the teacher", "{:.2f}"),
    "speedup": ("times as fast as the teacher", "{:.1f}"),
}
"""Heading and format of the figures in a row."""

CHANCE = "real images, expected"
"""Name of the row of `chance`."""

EXPECTED = (
    f"{CHANCE}: the distances that as many images drawn from the reference's own distribution would have on average, "
    "computed for normally distributed features. They are above zero only because the number of images is finite; a "
    "model that comes near one cannot be told from real images by that distance"
)
"""What that row means, for those who read a table."""

SECONDS = 3.0
"""Minimum duration of a latency measurement."""

LONGEST = 16
"""Characters of a word, such as the path of a model, that is not broken in a table."""

Space = tuple[FeatureSpace, Reference]


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return heading and format of each figure in any of `rows`, ordered as in `COLUMNS`; spaces keep their order."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    shown = {}
    for figure, (heading, form) in COLUMNS.items():
        for key in keys:
            base, _, space = key.partition("/")
            if base == figure:
                shown[key] = (f"{heading} ({space})" if space else heading, form)
    return shown


def fewest(features: int) -> int:
    """Return the minimum number of images for a distance in `features` features: twice as many.

    With no more images than features the covariance is singular. With twice as many, chance alone already scores about
    an eighth of the total feature variance (`metrics.frechet_bias` with equal eigenvalues), and differences between
    models would not show with fewer.
    """
    return 2 * features


def enough(features: int, n: int, what: str) -> None:
    """Raise `UserError` if `n` of `what` are too few for distances in `features` features."""
    if n < fewest(features):
        raise UserError(
            f"{n:,} {what} are too few for distances in {features:,} features: chance would decide. Take at least "
            f"{fewest(features):,}, or a space of fewer features"
        )


def judge(spaces: Sequence[Space], classes: Sequence[str]) -> FeatureSpace | None:
    """Return the last space that knows all of `classes` by name, if any: pooled features recognise classes best."""
    return next((space for space, _ in reversed(spaces) if classes and set(classes) <= set(space.classes)), None)


def chance(spaces: Sequence[Space], n: int) -> dict[str, Any]:
    """Return a row of the expected Frechet distances of `n` real images; they are above zero because `n` is finite."""
    expected = {
        space.distance: frechet_bias(real.cov, n) + (frechet_bias(real.cov, real.count) if real.count else 0.0)
        for space, real in spaces
    }
    return {"name": CHANCE, "images": n, **expected}


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
    """Return the figures of `n` images in each of `spaces`.

    Several processes (see `parallel`) share the images batch by batch; all of them must call this. The first one gets
    figures identical to the last bit to those of one process with that batch size; the others get none.

    Args:
        make: `(start, stop) -> pixels u8[stop - start, C, H, W]`, images by index.
        labels: i64[n], the requested classes as indices into `classes`.
        classes: class names. Accuracy is the share of images that a space which knows all of these names assigns to
            the requested class; if no space does, there is no accuracy.
        full: add kernel distance, precision and recall to the Frechet distance; they use as many images as the
            reference kept features of, and are omitted if it kept none.

    Raises `UserError` if a reference has another number of features, or for too few images (see `fewest`).
    """
    for _, real in spaces:
        enough(len(real.mu), n, "images")
        enough(len(real.mu), real.count or n, f"real images ({real.source})")
    expert = judge(spaces, classes)
    numbers = None if expert is None else torch.tensor([list(expert.classes).index(name) for name in classes])

    @torch.inference_mode()  # belongs to a thread
    def look(rows: range) -> tuple[list[Tensor], Tensor | None]:
        pixels = make(rows.start, rows.stop)
        seen, agreed = [], None
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
    tallies, right = [Tally(real.features if full else real.features[:0]) for _, real in spaces], []
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


class Tally:
    """Moments of all features, and as many of the features as there are `real f[n,F]` to compare with."""

    def __init__(self, real: Tensor):
        self.real, self.moments, self.kept = real, Moments(), []

    def update(self, features: Tensor) -> None:
        if self.moments.count < len(self.real):
            self.kept.append(features)
        self.moments.update(features)

    def figures(self) -> dict[str, float]:
        """Return kernel distance, precision and recall; nothing without real features."""
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
    """Return the `score` of images `0 .. n - 1` of `seed`, with `conditions` by number; default: classes in turn."""
    classes = pipeline.info.classes
    labels = torch.arange(n) % len(classes) if classes else None
    conditions = conditions or Classes(len(classes))

    def make(start: int, stop: int) -> Tensor:
        return pipeline.pixels(range(start, stop), conditions.at(range(start, stop)), seed)

    return score(make, labels, n, spaces, classes=classes, batch=batch, progress=progress, full=full)


def speed(pipeline: Pipeline, batch: int = 256) -> dict[str, float]:
    """Return `ms_per_image`, the median latency at batch size 1, and `images_per_second` at `batch`, both warm."""
    one, many = (median_seconds(lambda size=size: pipeline(size, batch=size)) for size in (1, batch))
    return {"ms_per_image": 1000 * one, "images_per_second": batch / many}


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median duration of `call`, which must end on the host, over at least 3 calls and `SECONDS`, warm."""
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
    """Print rows as a table; omit figures that no row has. Below it, say what the row of `chance` means.

    Each model has a column. Where the terminal is too narrow for all of them, each has a line, or, if there are too
    many figures for that, the table becomes several.
    """
    shown = {key: said for key, said in columns(rows).items() if key != "name"}
    gap = 2  # beside each column
    figures = gap + max((len(heading) for heading, _ in shown.values()), default=0)
    cells = [[_written(row.get(key), form) for key, (_, form) in shown.items()] for row in rows]
    word = min(LONGEST, max(cell_len(word) for row in rows for word in row["name"].split()))
    model = gap + max([word, *(len(figure) for row in cells for figure in row)])
    abreast = max(1, (console.width - figures) // model)
    lines = _a_line_each([row["name"] for row in rows], [heading for heading, _ in shown.values()], cells)
    if abreast < len(rows) and sum(gap + (column.width or 0) for column in lines.columns) <= console.width:
        console.print(lines)
    else:
        for start in range(0, len(rows), abreast):
            part = range(start, min(start + abreast, len(rows)))
            first = Column(no_wrap=figures + model <= console.width)  # otherwise it would leave no room for a model
            table = Table(first, *(Column(rows[i]["name"], overflow="fold") for i in part), box=None)
            for number, (heading, _) in enumerate(shown.values()):
                table.add_row(heading, *(cells[i][number] for i in part))
            console.print(table)
    if any(row["name"] == CHANCE for row in rows):
        console.print(EXPECTED)


def _a_line_each(names: Sequence[str], headings: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """Return a table with one model per line, called `names`, its figures in `cells`, and `headings` of two lines."""
    table = Table(Column(width=max(cell_len(escaped(name)) for name in names)), box=None)
    for heading, column in zip(headings, zip(*cells, strict=True), strict=True):
        table.add_column(heading, width=max(_halved(heading), *map(len, column)), justify="right")
    for name, figures in zip(names, cells, strict=True):
        table.add_row(name, *figures)
    return table


def _written(figure: Any, form: str) -> str:
    return "-" if figure is None else form.format(figure)


def _halved(heading: str) -> int:
    """Return the least number of characters in which `heading` takes two lines."""
    words = heading.split()
    return min(max(len(" ".join(words[:n])), len(" ".join(words[n:]))) for n in range(1, len(words) + 1))


def show_spaces(name: str, spaces: Sequence[Space]) -> None:
    """Print what was compared with what."""
    for space, real in spaces:
        count = f"{real.count:,} images, {real.source}" if real.count else real.source
        console.print(f"{space.name}: {len(real.mu)} features of {name}, against {count}")


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
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
