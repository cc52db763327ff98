"""Networks and decoders held wholly in bf16, for making images: autocast has nothing left to convert in any call."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser

Module = TypeVar("Module", bound=nn.Module)


def allows_bf16(module: object) -> bool:
    """Return whether all weights of `module` may be bf16, which its class says by `bf16_throughout = True`.

    Such a network takes `x` in bf16 and the noise level in fp32, and computes what it makes of the level, such as
    sinusoids, in fp32 before it rounds it; a decoder rounds its latents itself. PyTorch's normalisations compute in
    fp32 inside. All others need autocast: transformers that take prompts, of which some round the time itself to the
    precision of `x`, so that it is no longer the time they were trained at, and networks that we do not know.
    """
    return isinstance(module, nn.Module) and getattr(module, "bf16_throughout", False)


def round_weights(module: nn.Module) -> None:
    """Round the weights of `module` to bf16, in place: all of them if its class allows it, otherwise its matrices.

    Buffers stay fp32. Convolutions that are rounded with all the rest become channels last, which is faster on a GPU.
    """
    whole = allows_bf16(module)
    for weights in module.parameters():
        if whole and weights.ndim == 4:
            weights.data = weights.data.to(torch.bfloat16, memory_format=torch.channels_last)
        elif whole or weights.ndim > 1:
            weights.data = weights.data.bfloat16()


def in_bf16(module: Module) -> Module:
    """Return `module` with all weights in bf16: itself if they are already, otherwise a copy, as others may use it."""
    if all(weights.dtype == torch.bfloat16 for weights in module.parameters()):
        return module
    rounded = copy.deepcopy(module)
    round_weights(rounded)
    return rounded


def rounding_inputs(denoiser: Denoiser) -> Denoiser:
    """Return `denoiser`, whose network is in bf16, for inputs in fp32: it computes `x0` in fp32 as ever."""
    return Denoiser(_Border(denoiser.net), denoiser.schedule, denoiser.prediction)


class _Border(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None) -> Tensor:
        return self.network(x.bfloat16(), noise, cond)
