"""Measuring a model: distances in a feature space, class accuracy, latency and throughput.

FID is the Frechet distance in the features of Inception-v3 (Heusel et al. 2017, arXiv 1706.08500). By the protocol of
EDM (Karras et al. 2022, arXiv 2206.00364), which DMD follows (arXiv 2311.18828, Appendix D), it is that of 50,000
images, rounded to 8 bits and enlarged as TensorFlow 1 did it, to the training images; EDM gives the least of three
seeds. Means and covariances are unbiased and of float64.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distmatch import parallel
from distmatch.conditions import Classes, Conditions
from distmatch.features import FeatureSpace, Reference
from distmatch.metrics import Moments, frechet, kernel_distance, precision_recall
from distmatch.pipeline import Pipeline

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
}
"""Figures of a row: heading and format."""


@torch.inference_mode()
def score(
    make: Callable[[int, int], Tensor],
    labels: Tensor | None,
    n: int,
    space: FeatureSpace,
    reference: Reference,
    *,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """Figures of `n` images against `reference`, in the features of `space`.

    Several processes (see `parallel`) share the images batch by batch, all of them call this. The first gets the
    figures, the same to the last bit as those of one process with that batch; the others get none.

    Args:
        make: `(start, stop) -> pixels u8[stop - start, C, H, W]`, images by index.
        labels: i64[n], the classes that were asked for; the accuracy is the share that the network agrees with. A
            space without classes has no accuracy.
        full: kernel distance, precision and recall besides the Frechet distance; they use as many images as the
            reference kept features of, and are left out where it kept none.

    Raises `ValueError` where the reference is of another number of features.
    """

    def look(rows: range) -> tuple[Tensor, Tensor | None]:
        features, logits = space.both(make(rows.start, rows.stop))
        if features.shape[1] != len(reference.mu):
            raise ValueError(
                f"the reference ({reference.source}) is of {len(reference.mu)} features, the network has "
                f"{features.shape[1]}; use the reference of these features"
            )
        if labels is None or logits is None:
            return features.float().cpu(), None
        return features.float().cpu(), logits.argmax(1).cpu() == labels[rows.start : rows.stop].cpu()

    jobs = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
    moments, kept, right = Moments(), [], []
    for features, agreed in parallel.shared(look, jobs, level=True):
        if full and moments.count < len(reference.features):
            kept.append(features)
        if agreed is not None:
            right.append(agreed)
        moments.update(features)
        if progress is not None:
            progress(len(features))
    if parallel.rank() > 0:
        return {}
    figures = {space.distance: frechet(moments.mean, moments.cov, reference.mu, reference.cov)}
    if right:
        figures["accuracy"] = int(torch.cat(right).sum()) / n
    if full and len(reference.features):
        fake = torch.cat(kept)[: len(reference.features)]
        figures["kernel_distance"] = kernel_distance(reference.features, fake)[0]
        figures["precision"], figures["recall"] = precision_recall(reference.features[: len(fake)], fake)
    return figures


def evaluate(
    pipeline: Pipeline,
    space: FeatureSpace,
    reference: Reference,
    *,
    n: int,
    seed: int = 0,
    conditions: Conditions | None = None,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """`score` of images `0 .. n - 1` of `seed`, of `conditions` by number: the classes in turn unless told."""
    classes = len(pipeline.info.classes)
    labels = torch.arange(n) % classes if classes else None
    conditions = conditions or Classes(classes)

    def make(start: int, stop: int) -> Tensor:
        return pipeline.pixels(range(start, stop), conditions.at(range(start, stop)), seed)

    return score(make, labels, n, space, reference, batch=batch, progress=progress, full=full)


def speed(pipeline: Pipeline, batch: int = 256, seconds: float = 3.0) -> dict[str, float]:
    """`ms_per_image`, the median latency at batch 1, and `images_per_second` at `batch`; warm, about `seconds` each."""

    def median(size: int) -> float:
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            pipeline(size, batch=size)  # ends on the host: the pixels are there
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[(len(times) - 1) // 2]

    return {"ms_per_image": 1000 * median(1), "images_per_second": batch / median(batch)}


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
