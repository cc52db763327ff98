"""What the feature spaces of published networks share: where they are, and which pixels they take."""

from typing import Self

import torch
from torch import Tensor, nn

from distmatch.system.errors import UserError


class PublishedSpace:
    """The base of feature spaces (see `features.FeatureSpace`) of one published `network`, which knows no classes."""

    classes = ()

    def __init__(self, network: nn.Module):
        self.network = network.eval()
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> Self:
        self.network.to(device)
        self.device = device
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def check(self, pixels: Tensor) -> None:
        """Raise `UserError` for anything but 8-bit images, grey or of three channels."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise UserError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}; {type(self).__name__} takes uint8 (B, 1 or 3, H, W) "
                "in 0..255"
            )
