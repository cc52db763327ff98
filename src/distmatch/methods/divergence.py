"""Divergences other than the reverse KL, as factors on distribution matching (f-distill, arXiv 2502.15681).

For `D_f = E_student[f(r)]` with the density ratio `r = p_teacher / p_student` at a noise level, the gradient is that of
distribution matching with each sample weighted by `h(r) = f''(r) r^2`.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

FACTORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
}
"""`h(r)` by divergence, up to constant factors; that of the reverse KL is 1."""

RATIOS = (0.1, 20.0)
"""To what `r` is clipped: the estimate is poor where the distributions hardly overlap."""

BINS = 10
"""Ranges of noise levels, each with a mean of `h` of its own."""

DECAY = 0.99
"""Of these means, per update of the head."""
