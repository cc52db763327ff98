"""A small residual network for points: the student and the fake score of the two-dimensional toy."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond
from distmatch.models.guidance import GuidanceInput


class MLP(nn.Module):
    """`(x f[B,D], noise f[B], cond) -> f[B,D]`, unconditional: it uses nothing of `cond` but a guidance scale.

    Args:
        dim: D.
        width: units per layer.
        depth: number of residual layers.
        guidance: it takes a guidance scale; see `models.guidance`.

    The last layer starts at zero. With EDM's preconditioning a new network is then `x0 = skip x_t`, the exact denoiser
    of `N(0, sigma_data^2 I)`: the best guess for centred data of which only the scale is known.
    """

    def __init__(self, dim: int = 2, width: int = 64, depth: int = 2, guidance: bool = False):
        super().__init__()
        self.config = {"dim": dim, "width": width, "depth": depth, "guidance": guidance}
        self.freqs: Tensor
        self.register_buffer("freqs", 2.0 ** torch.arange(4), persistent=False)
        self.stem = nn.Linear(dim + 8, width)
        self.guidance = GuidanceInput(width) if guidance else None
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None = None) -> Tensor:
        angles = noise[:, None] * self.freqs
        h = self.stem(torch.cat([x, angles.cos(), angles.sin()], dim=1))
        if self.guidance is not None:
            h = h + self.guidance.of(cond)
        for layer in self.layers:
            h = h + layer(F.silu(h))
        return self.head(F.silu(h))
