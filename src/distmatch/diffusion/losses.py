"""Loss functions and weightings, as pure functions of tensors."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from distmatch.diffusion.schedule import expand

Weighting = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(x f[B,*D], x0_real f[B,*D], alpha f[B], sigma f[B]) -> w f[B]`, the factor on `mu_fake - mu_real`."""


def _distance(x: Tensor, x0_real: Tensor) -> Tensor:
    """Return the mean absolute difference over all axes but the batch: f[B]."""
    return (x - x0_real).abs().flatten(1).mean(1)


# Written with denoised images, Eq. 7 is `w_t alpha (s_fake - s_real) = w_t (alpha / sigma)^2 (mu_fake - mu_real)`.
# Each entry is `w_t (alpha / sigma)^2` for one choice of `w_t`.
WEIGHTINGS: dict[str, Weighting] = {
    # The paper's pseudo-code, and our default: normalised by the denoiser's distance from the sample, no factor alpha.
    "algorithm2": lambda x, x0_real, alpha, sigma: 1 / _distance(x, x0_real),
    # Eq. 8 taken literally, w_t = (sigma^2 / alpha) / distance: one factor alpha stays. The same for EDM, alpha = 1.
    "eq8": lambda x, x0_real, alpha, sigma: alpha / _distance(x, x0_real),
    # Table 2, w_t = sigma / alpha (DreamFusion).
    "dreamfusion": lambda x, x0_real, alpha, sigma: alpha / sigma,
    # Table 2, w_t = sigma^3 / alpha (ProlificDreamer).
    "prolificdreamer": lambda x, x0_real, alpha, sigma: alpha * sigma,
}


def matching_loss(x: Tensor, x0_fake: Tensor, x0_real: Tensor, w: Tensor) -> Tensor:
    """Return a loss f[] whose gradient in `x` is `w (mu_fake - mu_real)` over the number of elements (Algorithm 2).

    `x f[B,*D]` carries the student's graph; `x0_fake` and `x0_real` are constants; `w f[B]`.
    """
    gradient = expand(w, x) * (x0_fake - x0_real)
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising_loss(x0: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`mean(weight (x0 - x)^2)`, f[] (Eq. 6, Algorithm 3): `x0` the prediction, `x` the clean image, `weight f[B]`."""
    return (expand(weight, x) * (x0 - x) ** 2).mean()


def pseudo_huber(x: Tensor, y: Tensor, c: float = 0.03) -> Tensor:
    """`mean(sqrt((x - y)^2 + c^2) - c)`, f[]: like squared error below `c`, like absolute error above."""
    return (((x - y) ** 2 + c**2).sqrt() - c).mean()


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "huber": pseudo_huber}
"""`(x f[B,*D], y f[B,*D]) -> f[]`, the distance of Eq. 9."""
