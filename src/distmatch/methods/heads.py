"""The head of a GAN: small networks that judge samples by features of a denoiser."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.methods.averages import Averages
from distmatch.system.errors import UserError
from distmatch.training.engine import bare, blocks, features, unwrapped

COARSE = 4
"""Pixels per side down to which features are convolved before they are joined."""


class Head(nn.Module):
    """`(features, one tensor per block) -> logits f[B]`, positive for real: the mean over one small network per block.

    Args:
        shapes: of one sample's features, for each block: (C, H, W) of images, (N, C) of N tokens, or (C,).
        averages: what is averaged while it is trained, by name; saved with it.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], averages: Mapping[str, Averages] | None = None):
        super().__init__()
        self.averages = nn.ModuleDict(averages or {})
        self.parts = nn.ModuleList(_KINDS[len(shape)](*shape) for shape in shapes)

    def forward(self, found: Sequence[Tensor]) -> Tensor:
        return torch.stack([part(one).float() for part, one in zip(self.parts, found, strict=True)]).mean(0)


def _of_images(channels: int, height: int, width: int) -> nn.Module:
    """DMD2's: convolutions of stride 2, then one over all that is left."""
    layers: list[nn.Module] = []
    while min(height, width) > COARSE:
        layers += _convolution(channels, (4, 4), stride=2, padding=1)
        height, width = height // 2, width // 2
    layers += _convolution(channels, (height, width))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 1), nn.Flatten(0))


def _convolution(channels: int, kernel: tuple[int, int], stride: int = 1, padding: int = 0) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, kernel, stride, padding)
    return [convolution, nn.GroupNorm(max(1, math.gcd(channels, 32) // 4), channels), nn.SiLU()]


def _of_points(channels: int) -> nn.Module:
    hidden = [nn.Linear(channels, channels), nn.SiLU()]
    more = [nn.Linear(channels, channels), nn.SiLU()]
    return nn.Sequential(*hidden, *more, nn.Linear(channels, 1), nn.Flatten(0))


class _OfTokens(nn.Module):
    def __init__(self, count: int, channels: int):
        super().__init__()
        self.each = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU())
        self.all = _of_points(channels)

    def forward(self, found: Tensor) -> Tensor:
        return self.all(self.each(found).mean(1))


_KINDS: Mapping[int, Any] = {1: _of_points, 2: _OfTokens, 3: _of_images}


@torch.no_grad()
def feature_shapes(network: nn.Module, inputs: tuple[Any, ...]) -> dict[int, tuple[int, ...]]:
    """Return the shape of one sample's features for each block of `network`, by number, in the order in which they run.

    Of a network that names its `main` list of blocks, only these: the others refine texts, or embed patches.

    Args:
        inputs: arguments for one sample.
    """
    main, members = getattr(bare(network), "main", ""), blocks(unwrapped(network))
    listed = {id(one) for name, one in bare(network).named_modules() if f".{name}".rpartition(".")[0].endswith(main)}
    compiled = [one._compiled_call_impl for one in members]
    with features(network, [number for number, one in enumerate(members) if id(one) in listed]) as found:
        network(*inputs)
    for one, call in zip(members, compiled, strict=True):  # all but those that will be chosen stay compiled
        one._compiled_call_impl = call
    return {number: tuple(one.shape[1:]) for number, one in found.items()}


def chosen_blocks(shapes: Mapping[int, tuple[int, ...]], asked: Sequence[int] | None, owner: str) -> list[int]:
    """Return the blocks to judge by: those `asked` for, else the middle one of those with the fewest positions.

    Args:
        shapes: see `feature_shapes`.
        owner: whose blocks they are, for errors.

    Raises `UserError` if there is no such block, or if a head cannot read what it returns.
    """
    if not shapes:
        raise UserError(f"gan: {owner} has no blocks (in nn.ModuleList) whose features a head could read")
    if asked is None:
        places = {number: math.prod(shape[1:] if len(shape) == 3 else shape[:-1]) for number, shape in shapes.items()}
        coarsest = [number for number, count in places.items() if count == min(places.values())]
        asked = [coarsest[len(coarsest) // 2]]
    for number in asked:
        if number not in shapes:
            raise UserError(
                f"gan.blocks is {list(asked)}; {owner} has {len(shapes)} blocks, numbered 0 to {max(shapes)}: there is "
                f"no block {number}"
            )
        if len(shapes[number]) not in _KINDS:
            raise UserError(
                f"gan.blocks is {list(asked)}: block {number} of {owner} returns {list(shapes[number])} per sample; "
                "expected (C, H, W), (N, C) or (C,)"
            )
    return list(asked)
