"""A denoiser at a fixed time: what depends on the time alone is computed once, not in every call."""

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import Cond, Denoiser

Fixed = Callable[[Tensor, Cond | None], Tensor]
"""`(x f32[B,*D], cond) -> x0 f32[B,*D]`."""


def fixed(denoiser: Denoiser, t: float, device: torch.device) -> Fixed:
    """Return `denoiser` at time `t`, for inputs on `device`. The result is the same to the last bit."""
    if type(denoiser) is not Denoiser:  # a subclass computes in its own way; a sharded one must gather its weights
        return lambda x, cond: denoiser(x, x.new_full((len(x),), t), cond)
    time = torch.tensor([t], device=device)
    alpha, sigma = denoiser.schedule.alpha(time), denoiser.schedule.sigma(time)
    divisor, noise = denoiser.prediction.divisor(sigma), denoiser.prediction.noise(time, sigma)
    skip, out = (number.item() for number in denoiser.prediction.coefficients(alpha, sigma))
    scale = None if divisor is None else divisor.item()

    def forward(x: Tensor, cond: Cond | None) -> Tensor:
        output = denoiser.net(x if scale is None else x / scale, noise.expand(len(x)), cond)
        return skip * x + out * output[:, : x.shape[1]].to(x.dtype)

    return forward
