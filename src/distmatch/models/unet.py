"""A small U-Net for small images: the network of `distmatch teach` and of the teacher in the package.

Residual blocks with adaptive group normalisation and one attention layer at the lowest resolution, after Dhariwal and
Nichol (2021) and Karras et al. (2022). A space-to-depth stem trades resolution for channels, which is faster on a CPU.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond
from distmatch.models.attention import attention
from distmatch.models.guidance import GuidanceInput


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 16), channels, eps=1e-5)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Initialise the end of a residual branch to zero, so that every block starts as the identity."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """norm - SiLU - conv - norm * (1 + scale) + shift - SiLU - conv, around a skip connection."""

    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm0 = _norm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm1 = _norm(outputs)
        self.conv1 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm1(h), scale + 1)
        return self.skip(x) + self.conv1(F.silu(h))


class Attention(nn.Module):
    """Self-attention over positions, as a residual."""

    def __init__(self, channels: int, head: int = 32):
        super().__init__()
        self.heads = channels // head if channels % head == 0 else 1
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        y = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x + self.proj(y.transpose(-1, -2).reshape(b, c, h, w))


class Level(nn.Module):
    """Residual blocks at one resolution, all given the same embedding."""

    def __init__(self, inputs: int, outputs: int, blocks: int, embedding: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(outputs if i else inputs, outputs, embedding) for i in range(blocks))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
        return x


class UNet(nn.Module):
    """`(x f[B,C,H,W], noise f[B], cond) -> f[B,C,H,W]`.

    Args:
        channels: image channels.
        classes: number of labels; 0 for an unconditional network.
        widths: channels per level; the resolution halves between levels.
        blocks: residual blocks per level and direction.
        patch: side of the space-to-depth stem; H and W must be multiples of `patch * 2 ** (len(widths) - 1)`.
        guidance: it takes a guidance scale; see `models.guidance`.

    `noise` is the prediction wrapper's encoding of the noise level (EDM: `ln(sigma) / 4`). Label number `classes` means
    "no label", so that a network trained with label dropout can be guided.
    """

    bf16_throughout: ClassVar[bool] = True

    def __init__(
        self,
        channels: int = 1,
        classes: int = 0,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        patch: int = 2,
        guidance: bool = False,
    ):
        super().__init__()
        self.config = {
            "channels": channels,
            "classes": classes,
            "widths": list(widths),
            "blocks": blocks,
            "patch": patch,
            "guidance": guidance,
        }
        embedding = 4 * widths[0]
        self.freqs: Tensor
        self.register_buffer("freqs", torch.exp(torch.linspace(0, math.log(64.0), widths[0])), persistent=False)
        self.embed = nn.Sequential(nn.Linear(2 * widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.guidance = GuidanceInput(embedding) if guidance else None
        self.patch = patch
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(Level(width, width, blocks, embedding) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], embedding) for _ in range(2))
        self.attention = Attention(widths[-1])
        below = [*widths[1:], widths[-1]]
        self.decoder = nn.ModuleList(Level(low + w, w, blocks, embedding) for low, w in zip(below, widths, strict=True))
        self.norm = _norm(widths[0])
        self.head = _zero(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None = None) -> Tensor:
        embedding = self.embedding(noise, cond, x.dtype)
        h = self.stem(F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        h = self.encoder[0](h, embedding)
        skips = [h]
        for down, level in zip(self.down, self.encoder[1:], strict=True):
            h = level(down(h), embedding)
            skips.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, embedding)), embedding)
        for i in reversed(range(len(skips))):
            h = self.decoder[i](torch.cat([h, skips[i]], dim=1), embedding)
            if i:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)

    def embedding(self, noise: Tensor, cond: Cond | None, dtype: torch.dtype) -> Tensor:
        """Return noise level and label as one vector per sample: f[B,E]. The level's sinusoids become `dtype`."""
        angles = noise[:, None] * self.freqs
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))
        if self.label is not None:
            if cond is not None and cond.label is not None:
                embedding = embedding + self.label(cond.label)
            else:
                embedding = embedding + self.label.weight[-1]
        if self.guidance is not None:
            embedding = embedding + self.guidance.of(cond)
        return F.silu(embedding)
