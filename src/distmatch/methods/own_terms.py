"""What a loss term of your own is built from; see examples/own_term.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from distmatch.diffusion.denoiser import Denoiser
from distmatch.training.optim import Optimizer


@dataclass(frozen=True)
class TermContext:
    """What your own term can be built from: `CLASS(context, **arguments)`, with the arguments in the recipe.

    Args:
        name: the term's name in the recipe.
        teacher: the real score, frozen.
        fake: the fake score, if a term of the recipe trains one.
        shape: shape of one image (or latent).
        optimizer: makes the optimizer of a network, with the settings of the fake score's.
        seed: the recipe's seed, for the weights of new networks.
    """

    name: str
    teacher: Denoiser
    fake: nn.Module | None
    shape: tuple[int, ...]
    device: torch.device
    optimizer: Callable[[nn.Module], Optimizer]
    seed: int
