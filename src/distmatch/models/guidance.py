"""The guidance scale as an input of a network, so that a student's guidance can be chosen when sampling.

The scale is embedded and added to the time embedding through a projection initialised to zero, so a network with the
new input first computes the same as before. DMD, Section 5, leaves this open; the embedding is that of Meng et al. 2023
(arXiv 2210.03142), as implemented in diffusers' pipelines.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond
from distmatch.system.errors import UserError

CHANNELS = 256
"""Width of the embedding, as in published guidance-conditioned U-Nets (`time_cond_proj_dim`)."""

Network = TypeVar("Network", bound=nn.Module)


class GuidanceInput(nn.Linear):
    """`cond.extra["guidance"] f[B] -> f[B,width]`, initially zero."""

    def __init__(self, width: int):
        super().__init__(CHANNELS, width, bias=False)
        nn.init.zeros_(self.weight)

    def of(self, cond: Cond | None) -> Tensor:
        if cond is None or "guidance" not in cond.extra:
            raise UserError("this network takes a guidance scale: cond.extra['guidance'] f[B]")
        return self(embed_guidance(cond.extra["guidance"], CHANNELS).to(self.weight.dtype))


def embed_guidance(scale: Tensor, channels: int) -> Tensor:
    """Return sinusoids f[B,channels] of guidance scales f[B]: of `1000 (w - 1)`, as in diffusers' pipelines."""
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=scale.device))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def with_guidance(net: Network, share: bool = False) -> Network:
    """Return the same network with a guidance scale as an extra input. Raises `UserError` if it cannot have one.

    `share`: let it have the weights of `net` themselves, not copies.
    """
    config: dict[str, Any] = dict(getattr(net, "config", {}))
    if "guidance" not in config:
        raise UserError(f"student.guidance: the network {type(net).__name__} takes no guidance scale")
    given = type(net)(**{**config, "guidance": True})
    absent = given.load_state_dict(net.state_dict(keep_vars=share), strict=False, assign=share)
    assert not absent.unexpected_keys
    return given
