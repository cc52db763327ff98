"""Text embeddings of a fixed list of prompts, computed once.

For Stable Diffusion 1.5, a prompt needs 118 kB in half precision: 59 GB for 500,000 prompts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from distmatch.data.computed import Computed, compute
from distmatch.diffusion.denoiser import Cond

BATCH = 64
"""Prompts per pass of the encoders."""


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
) -> Embeddings:
    """Encode those of `texts` that are missing in `folder`, which belongs to these texts and these encoders only.

    Several processes may do so at once and share the work. `progress` is called with numbers of prompts done.
    """

    def tensors(part: range) -> dict[str, Tensor]:
        cond = Cond.cat(*(encode(texts[i : min(i + BATCH, part.stop)]) for i in range(part.start, part.stop, BATCH)))
        assert cond is not None
        assert cond.text is not None
        return {"text": cond.text, **cond.extra}

    return Embeddings(compute(folder, "text", len(texts), tensors, progress))
