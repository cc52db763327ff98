"""The settings and the optimizer that every training of a teacher has."""

from dataclasses import dataclass

from torch import nn

from distmatch.training.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train a teacher or a part of it."""

    batch: int = 128
    """Images per step."""

    seed: int = 0
    """Seed of the image order and of all noise."""

    ema: float = 0.999
    """Decay of the moving average of the weights."""

    precision: str = "fp32"
    """fp32, or bf16 for autocast around the networks."""


def optimizer(network: nn.Module, lr: float, *, warmup: int, steps: int) -> Optimizer:
    return Optimizer(network.parameters(), lr=lr, weight_decay=0.0, warmup=warmup, steps=steps, decay=0.3, clip=1.0)
