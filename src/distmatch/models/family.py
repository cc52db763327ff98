"""A family of teachers: what the rest asks of a kind of model, besides evaluating its network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.info import Info
from distmatch.system.errors import UserError


class Encoder(Protocol):
    """Prompts to conditions."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...

    def cut(self, prompts: Sequence[str]) -> int:
        """Return how many of `prompts` are longer than it takes, and warn of them."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the conditions."""
        ...


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Components:
    """What a model has besides its network.

    Args:
        encode: for a model of prompts, `(prompts) -> Cond`.
        decode: turns what the network makes into images f[B,C,H,W] in about [-1, 1].
    """

    encode: Encoder | None = None
    decode: Callable[[Tensor], Tensor] = _unchanged


class Family:
    """What a family answers; the answers here are those of models that are a network and nothing else.

    One of them is made per kind of model, and keeps nothing.
    """

    sampler: ClassVar[str] = "heun"
    """The sampler of its teachers, unless another is asked for."""

    steps: ClassVar[int] = 18
    """How many of its steps, unless others are asked for."""

    def load(self, source: str) -> tuple[Denoiser, Info]:
        """The teacher `source`, in evaluation mode. Raises `UserError` where it cannot be had or is none of these."""
        raise NotImplementedError

    def outline(self, source: str) -> tuple[Denoiser, Info]:
        """The teacher `source` on the meta device, for plans; families that can do so read no weights."""
        denoiser, info = self.load(source)
        return denoiser.to("meta"), info

    def components(self, source: str, device: torch.device | str = "cpu") -> Components:
        """What the model `source` has besides its network, loaded anew."""
        return Components()

    def component_weights(self, source: str) -> int:
        """How many weights `components` loads; none is read."""
        return 0

    def decoder(self, source: str, checkpointing: bool = False, weights: bool = True) -> nn.Module:
        """`(latents) -> images` by the model `source`, frozen; gradients go through.

        Args:
            checkpointing: recompute activations in the backward pass instead of keeping them.
            weights: read them; without, it is built from its settings alone.

        Raises `UserError` for a model of pixels.
        """
        raise UserError(f"{source or 'this model'} makes images of its own and has no decoder")

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond | None:
        """A condition of `n` samples for the network `net`: its shapes count, not its values."""
        return Cond(label=torch.zeros(n, dtype=torch.long)) if info.classes else None
