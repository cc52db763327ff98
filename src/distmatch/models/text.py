"""Prompts to conditions, by the text encoders that a diffusers model comes with."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch

from distmatch.denoiser import Cond
from distmatch.finite import check_weights
from distmatch.models.hub import pipeline, settings
from distmatch.terminal import notice


class TextEncoder:
    """`(prompts) -> Cond` by the model's own tokenizers and encoders.

    `text f[B,L,C]`; for SDXL also `extra["pooled"] f[B,P]` and `extra["size"] f[B,6]`, the sizes that it was told of in
    training: those of an image that was neither scaled nor cropped.

    Args:
        source: a folder in diffusers' format or a model id.
        device: where the encoders compute.

    Raises `UserError` where the model cannot be had.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        known = settings(source)
        absent: dict[str, Any] = dict.fromkeys(
            name for name in known.parts if not name.startswith(("text_encoder", "tokenizer", "scheduler"))
        )
        self.pipeline: Any = pipeline(source, **absent)  # in fp32, as the networks that conditions go into
        for name, part in self.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                check_weights(part.state_dict(), f"{source}, {name}")
        self.device = torch.device(device)
        self.pipeline.to(self.device)
        self.size = known.size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        return self._cond(self._encode(list(prompts), guided=False), len(prompts), 0)

    @torch.no_grad()
    def null(self) -> Cond:
        """The condition of no prompt, the `uncond` of guidance: one row."""
        return self._cond(self._encode([""], guided=True), 1, 1)

    def fingerprint(self) -> str:
        """SHA-256 of what decides the conditions: the encoders' weights and the tokenizers' sizes."""
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        h = sha256(str({name: len(part) for name, part in parts.items() if name.startswith("tokenizer")}).encode())
        for name, part in parts.items():
            for key, value in part.state_dict().items() if name.startswith("text_encoder") else ():
                h.update(f"{name}.{key}".encode())
                h.update(value.detach().float().cpu().contiguous().numpy().data)
        return h.hexdigest()

    def cut(self, prompts: Sequence[str]) -> int:
        """How many of `prompts` are cut, of which `notice_cut` warns."""
        return notice_cut(self.pipeline, prompts)

    def _encode(self, prompts: list[str], guided: bool) -> Sequence[Any]:
        return self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )

    def _cond(self, encoded: Sequence[Any], n: int, negative: int) -> Cond:
        """diffusers gives (text, negative text) and, for SDXL, (pooled, negative pooled) besides."""
        if len(encoded) == 2:
            return Cond(text=encoded[negative])
        size = torch.tensor([*self.size, 0, 0, *self.size], device=self.device, dtype=torch.float32)
        return Cond(text=encoded[negative], extra={"pooled": encoded[2 + negative], "size": size.expand(n, -1)})


def notice_cut(pipeline: Any, prompts: Sequence[str]) -> int:
    """Warn of prompts that are longer than a tokenizer of diffusers' `pipeline` takes; return how many there are."""
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    limit = min((tokenizer.model_max_length for tokenizer in tokenizers), default=0)
    # A token is a byte or more, and two stand around each text: few prompts have to be looked at.
    long = [i for i, prompt in enumerate(prompts) if len(prompt.encode()) > limit - 2]
    cut: set[int] = set()
    for tokenizer in tokenizers if long else ():
        lengths = map(len, tokenizer([prompts[i] for i in long], truncation=False, verbose=False)["input_ids"])
        cut |= {i for i, length in zip(long, lengths, strict=True) if length > tokenizer.model_max_length}
    if cut:
        first = min(cut)
        notice(
            f"{len(cut):,} of {len(prompts):,} prompts are longer than the {limit} tokens that the text encoder takes; "
            f"what is behind them is left out. The first: number {first + 1}, {prompts[first]!r:.80}"
        )
    return len(cut)
