"""Turns prompts into conditions with the text encoders of a diffusers model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Cond
from distmatch.system.digests import weights_digest
from distmatch.system.terminal import notice


class TextEncoder:
    """`(prompts) -> Cond` by the model's own tokenizers and encoders.

    Args:
        pipeline: diffusers' pipeline with these parts, on the device where they compute.
        states: `(pipeline, prompts, negative) -> Cond`, from the family; `negative`: as the `uncond` of guidance.
        limits: see `notice_cut`.
        way: what determines the conditions besides the parts: models of several families share text encoders.
    """

    def __init__(
        self,
        pipeline: Any,
        states: Callable[[Any, list[str], bool], Cond],
        limits: Mapping[str, int] | None = None,
        way: str = "",
    ):
        self.pipeline, self.states, self.limits, self.way = pipeline, states, limits or {}, way

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        return self.states(self.pipeline, list(prompts), False).map(Tensor.float)

    @torch.no_grad()
    def null(self) -> Cond:
        """Return the condition of the empty prompt, the `uncond` of guidance: one row."""
        return self.states(self.pipeline, [""], True).map(Tensor.float)

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that determines the conditions: encoder weights, tokenizer sizes, `way`."""
        tokenizers, encoders = self._parts("tokenizer"), self._parts("text_encoder")
        states = {  # without the prefix that the names have in some versions of transformers
            f"{name}.{key.removeprefix('text_model.')}": value.float()
            for name, part in encoders.items()
            for key, value in part.state_dict().items()
        }
        sizes = {name: len(part) for name, part in tokenizers.items()}
        return weights_digest(states, f"{sizes}{self.way}")

    def weights(self) -> int:
        """Return the number of weights of the encoders."""
        return sum(p.numel() for part in self._parts("text_encoder").values() for p in part.parameters())

    def cut(self, prompts: Sequence[str]) -> int:
        """Return how many of `prompts` are cut, with a warning; see `notice_cut`."""
        return notice_cut(self.pipeline, prompts, self.limits)

    def _parts(self, prefix: str) -> dict[str, Any]:
        """Return the parts of the pipeline whose names begin with `prefix`."""
        found = self.pipeline.components.items()
        return {name: part for name, part in found if name.startswith(prefix) and part is not None}


def notice_cut(pipeline: Any, prompts: Sequence[str], limits: Mapping[str, int] | None = None) -> int:
    """Warn about prompts that are longer than the tokenizers of `pipeline` accept; return how many there are.

    `limits`: the tokenizers that count and how much they accept; default: all of them, and what they say themselves.
    """
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part}
    tokenizers = (
        {parts[name]: limit for name, limit in limits.items()}
        if limits
        else {part: part.model_max_length for part in parts.values()}
    )
    limit = min(tokenizers.values(), default=0)
    # A token is at least one byte, and each text gets two extra: only few prompts need to be tokenized.
    long = [i for i, prompt in enumerate(prompts) if len(prompt.encode()) > limit - 2]
    cut: set[int] = set()
    if long:
        for tokenizer, most in tokenizers.items():
            lengths = map(len, tokenizer([prompts[i] for i in long], truncation=False, verbose=False)["input_ids"])
            cut |= {i for i, length in zip(long, lengths, strict=True) if length > most}
    if cut:
        first = min(cut)
        notice(
            f"{len(cut):,} of {len(prompts):,} prompts are longer than the {limit} tokens that the text encoder takes; "
            f"the rest is cut off. The first: number {first + 1}, {prompts[first]!r:.80}"
        )
    return len(cut)
