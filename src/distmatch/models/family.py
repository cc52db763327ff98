"""The interface of a teacher family: everything asked of a kind of model except evaluating its network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.info import Info
from distmatch.system.errors import UserError


class Encoder(Protocol):
    """Turns prompts into conditions."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...

    def cut(self, prompts: Sequence[str]) -> int:
        """Return how many of `prompts` exceed the encoder's maximum length, with a warning."""
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that determines the conditions."""
        ...

    def weights(self) -> int:
        """Return the number of weights of its networks."""
        ...


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Components:
    """The parts of a model other than its network.

    Args:
        encode: for a text-to-image model, `(prompts) -> Cond`.
        decode: turns the network's output into images f[B,C,H,W] in about [-1, 1].
    """

    encode: Encoder | None = None
    decode: Callable[[Tensor], Tensor] = _unchanged


class Family:
    """A teacher family. The defaults here suit a model that consists only of a network.

    There is one instance per kind of model, without state.
    """

    sampler: ClassVar[str] = "heun"
    """The default sampler of its teachers."""

    steps: ClassVar[int] = 18
    """The default number of sampler steps."""

    text: ClassVar[bool] = False
    """Whether its models make images from prompts."""

    def load(self, source: str) -> tuple[Denoiser, Info]:
        """Load the teacher `source` in evaluation mode. Raises `UserError` if unavailable or not of this family."""
        raise NotImplementedError

    def outline(self, source: str) -> tuple[Denoiser, Info]:
        """Return the teacher `source` on the meta device, for plans, if possible without reading its weights."""
        denoiser, info = self.load(source)
        return denoiser.to("meta"), info

    def components(
        self, info: Info, device: torch.device | str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
    ) -> Components:
        """Load the parts of the model `info` other than its network; `precision` is that of its text encoders."""
        return Components()

    def resized(self, denoiser: Denoiser, info: Info, size: tuple[int, int]) -> Info:
        """Return `info` for images of `size`, (height, width); the network is changed in place if it must be.

        Raises `UserError` if the model cannot make them.
        """
        raise UserError(f"image_size {list(size)}: this teacher makes images of one size; leave it out")

    def merged(self, denoiser: Denoiser, info: Info, file: str, scale: float) -> Info:
        """Merge `scale` times the LoRA in `file` into the network, in place; return the model's `info`.

        Raises `UserError` if it is not a LoRA of this model.
        """
        raise UserError(f"teacher_lora.path {file}: this teacher takes no LoRA; leave it out")

    def distilled(self, source: str, lora: str = "") -> str | None:
        """Return what says that the model `source` is a student already, in words; `None` if nothing does.

        `lora`: a file that was merged into it.
        """
        return None

    def encoders(self, source: str) -> list[nn.Module]:
        """Return the text encoders that `components` would load, on the meta device, without reading any weights."""
        return []

    def component_weights(self, source: str) -> int:
        """Return the number of weights that `components` would load, without reading any."""
        return 0

    def decoder(self, source: str, checkpointing: bool = False, weights: bool = True) -> nn.Module:
        """Return `(latents) -> images` by the model `source`, frozen; gradients pass through.

        Args:
            checkpointing: recompute activations in the backward pass instead of keeping them.
            weights: read the weights; otherwise build the decoder from its settings alone.

        Raises `UserError` for a model that makes pixels.
        """
        raise UserError(f"{source or 'this model'} makes images of its own and has no decoder")

    def image_encoder(self, source: str) -> Callable[..., Tensor]:
        """Return `(images, eps) -> latents` by the model `source`; see `diffusers.autoencoder.ImageEncoder`.

        Raises `UserError` for a model that makes pixels.
        """
        raise UserError(f"{source or 'this model'} makes images of its own and has no encoder")

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond | None:
        """Return a condition of `n` samples for the network `net`; only its shapes matter."""
        return Cond(label=torch.zeros(n, dtype=torch.long)) if info.classes else None
