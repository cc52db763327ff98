"""The settings that every training of a teacher has."""

from dataclasses import dataclass


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
