"""Text embeddings of a fixed list of prompts, computed once.

For Stable Diffusion 1.5, a prompt needs 118 kB in half precision: 59 GB for 500,000 prompts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from distmatch.data.computed import Computed, complete, compute
from distmatch.diffusion.denoiser import Cond

KIND = "text"
"""What the files are named by, see `data.computed`."""

BATCH = 64
"""Prompts per pass of the encoders."""

FEW, LARGE = 4, 1_000_000_000
"""Prompts per pass of encoders of more than `LARGE` weights. Those take long texts, of which they keep the states of
all layers, and some make logits of a large vocabulary: gigabytes for 64.
"""


class Embeddings:
    """`(numbers) -> Cond` for prompts; see `embed`."""

    def __init__(self, computed: Computed):
        self.computed = computed

    def __call__(self, numbers: Sequence[int]) -> Cond:
        tensors = self.computed(numbers)
        return Cond(text=tensors.pop("text"), extra=tensors)


def embed(
    folder: Path,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], Cond],
    progress: Callable[[int], None] | None = None,
    batch: int | None = None,
) -> Embeddings:
    """Encode those of `texts` that are missing in `folder`, which belongs to these texts and these encoders only.

    Several processes may do so at once and share the work.

    Args:
        progress: called with numbers of prompts done.
        batch: prompts per pass of the encoders; default: `BATCH`.
    """
    batch = batch or BATCH

    def tensors(part: range) -> dict[str, Tensor]:
        starts = range(part.start, part.stop, batch)
        # To the host one by one: a file's states may take more of a device than the encoders.
        cond = Cond.cat(*(encode(texts[i : min(i + batch, part.stop)]).to("cpu") for i in starts))
        assert cond is not None
        assert cond.text is not None
        return {"text": cond.text, **cond.extra}

    return Embeddings(compute(folder, KIND, len(texts), tensors, progress))


def embedded(folder: Path, count: int) -> bool:
    """Return whether `folder` has the states of all `count` texts; see `embed`."""
    return complete(folder, KIND, count)


def per_pass(weights: int) -> int:
    """Return how many prompts encoders of so many weights take at once."""
    return FEW if weights > LARGE else BATCH
