"""Measuring a model: distances in a classifier's feature space, class accuracy, latency and throughput."""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from distmatch.features import Reference
from distmatch.metrics import Moments, frechet, kernel_distance, precision_recall
from distmatch.models.classifier import Classifier
from distmatch.pipeline import Pipeline

COLUMNS = {
    "name": ("model", "{}"),
    "nfe": ("network evaluations", "{}"),
    "images": ("images", "{:,}"),
    "ms_per_image": ("ms per image", "{:.1f}"),
    "images_per_second": ("images per second", "{:,.0f}"),
    "frechet": ("Frechet distance", "{:.3f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("class accuracy", "{:.3f}"),
}
"""Figures of a row: heading and format."""


@torch.inference_mode()
def score(
    make: Callable[[int, int], torch.Tensor],
    labels: torch.Tensor | None,
    n: int,
    classifier: Classifier,
    reference: Reference,
    *,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """Figures of `n` images against `reference`, in the features of `classifier`.

    Args:
        make: `(start, stop) -> pixels u8[stop - start, C, H, W]`, images by index.
        labels: i64[n], the classes that were asked for; the accuracy is the share that the classifier agrees with.
        full: kernel distance, precision and recall besides the Frechet distance; they use as many images as the
            reference kept features of.
    """
    moments, kept, right = Moments(), [], 0
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        features, logits = classifier.both(make(start, stop))
        moments.update(features)
        if full and start < len(reference.features):
            kept.append(features.float())
        if labels is not None:
            right += int((logits.argmax(1) == labels[start:stop].to(logits.device)).sum())
        if progress is not None:
            progress(stop - start)
    figures = {"frechet": frechet(moments.mean, moments.cov, reference.mu, reference.cov)}
    if labels is not None:
        figures["accuracy"] = right / n
    if full:
        fake = torch.cat(kept)[: len(reference.features)]
        figures["kernel_distance"] = kernel_distance(reference.features, fake)[0]
        figures["precision"], figures["recall"] = precision_recall(reference.features[: len(fake)], fake)
    return figures


def evaluate(
    pipeline: Pipeline,
    classifier: Classifier,
    reference: Reference,
    *,
    n: int,
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    full: bool = True,
) -> dict[str, float]:
    """`score` of images `0 .. n - 1` of `seed`, classes in turn."""
    classes = len(pipeline.info.classes)
    labels = torch.arange(n) % classes if classes else None

    def make(start: int, stop: int) -> torch.Tensor:
        return pipeline.pixels(range(start, stop), None if labels is None else labels[start:stop], seed)

    return score(make, labels, n, classifier, reference, batch=batch, progress=progress, full=full)


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
