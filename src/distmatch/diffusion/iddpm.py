"""The noise levels of Improved DDPM (Nichol and Dhariwal 2021) in EDM's form (Karras et al. 2022, App. C.3)."""

import math
from functools import cache

import torch
from torch import Tensor

from distmatch.diffusion.schedule import EDM


class IDDPM(EDM):
    """EDM's grid, rounded to the 1000 noise levels on which networks of Improved DDPM were trained."""

    @property
    def t_min(self) -> float:
        return self.nearest(torch.tensor([self.sigma_min])).item()

    @property
    def t_max(self) -> float:
        return self.nearest(torch.tensor([self.sigma_max])).item()

    def grid(self, n: int) -> Tensor:
        return self.nearest(super().grid(n))

    def nearest(self, t: Tensor) -> Tensor:
        return iddpm_sigmas(t.device)[iddpm_step(t)].to(t.dtype)


@cache
def iddpm_sigmas(device: torch.device) -> Tensor:
    """Return the steps' noise levels f32[1000], rising."""
    alpha_bar = (torch.arange(1001, dtype=torch.float64, device="cpu") / 1000 / 1.008 * math.pi / 2).sin() ** 2
    u = [0.0]
    for j in range(1000, 0, -1):
        u.append(((u[-1] ** 2 + 1) / max(float(alpha_bar[j - 1] / alpha_bar[j]), 0.001) - 1) ** 0.5)
    return torch.tensor(u[1:], device=device)


def iddpm_step(sigma: Tensor) -> Tensor:
    """Return the step i64[B], out of 1000, whose noise level is nearest to `sigma f[B]`."""
    return (iddpm_sigmas(sigma.device) - sigma[:, None]).abs().argmin(1)
