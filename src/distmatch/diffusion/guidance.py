"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

from torch import Tensor, lerp

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.schedule import expand
from distmatch.system.errors import UserError

Model = Callable[[Tensor, Tensor, Cond | None], Tensor]
"""A denoiser's signature, `(x f[B,*D], t f[B], cond) -> x0 f[B,*D]`."""


def guided(denoiser: Denoiser, w: float | None, rescale: bool = False) -> Model:
    """Return `uncond + w * (cond - uncond)`, or what the network's own `combine` makes of the two.

    `w = 1` is the plain conditional model and costs one evaluation; any other `w` costs two. `None` takes each
    sample's scale from `cond.extra["guidance"] f[B]`. `rescale`: give each result the norm of `cond`, against
    over-saturation (as Qwen-Image's pipeline does).
    """
    if w == 1:
        return denoiser

    def forward(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        if cond is None:
            raise UserError(f"guidance {w} needs a condition; this batch has none. Use guidance 1")
        scale = w if w is not None else expand(cond.extra["guidance"].to(x), x)
        uncond, plain = denoiser(x, t, cond.null()), denoiser(x, t, cond)
        combine = getattr(denoiser.net, "combine", None)
        found = combine(x, t, (uncond, plain), scale) if combine else lerp(uncond, plain, scale)
        return found * expand(plain.flatten(1).norm(dim=1) / found.flatten(1).norm(dim=1), x) if rescale else found

    return forward
