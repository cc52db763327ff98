"""The one type everything is written against: a `Denoiser` maps `(x_t, t, cond)` to an estimate of `x0`.

Teacher, student and fake score are all denoisers. What a network predicts natively is hidden by its wrapper.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distmatch.diffusion.iddpm import iddpm_step
from distmatch.diffusion.ranges import check_sigma_data
from distmatch.diffusion.schedule import Schedule, expand
from distmatch.system.errors import UserError


@dataclass(frozen=True)
class Cond:
    """What a batch is conditioned on; the first axis of every entry is the batch. `None` stands for unconditional.

    `label i64[B]`, `text f[B,L,C]`, `extra: name -> f[B,...]`.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Cond":
        """Return the same condition with `f` applied to every tensor in it."""
        return Cond(
            label=None if self.label is None else f(self.label),
            text=None if self.text is None else f(self.text),
            extra={k: f(v) for k, v in self.extra.items()},
        )

    def __getitem__(self, index: slice | Tensor) -> "Cond":
        return self.map(lambda v: v[index])

    def to(self, device: torch.device | str) -> "Cond":
        return self.map(lambda v: v.to(device))

    def null(self) -> "Cond":
        """Return the empty condition, the `uncond` of guidance: no label, no text."""
        return Cond(extra=self.extra)

    @staticmethod
    def cat(*conds: "Cond | None") -> "Cond | None":
        """Concatenate batches in order; all must be of one kind."""
        real = [c for c in conds if c is not None]
        if not real:
            return None
        first = real[0]
        assert len(real) == len(conds), "conditional and unconditional batches do not join"
        return Cond(
            label=None if first.label is None else torch.cat([c.label for c in real if c.label is not None]),
            text=None if first.text is None else torch.cat([c.text for c in real if c.text is not None]),
            extra={k: torch.cat([c.extra[k] for c in real]) for k in first.extra},
        )


@dataclass(frozen=True)
class Prediction:
    """How a network's output `F` becomes `x0 = skip x_t + out F(scale x_t, noise)`.

    Named cases, with `a = alpha(t)`, `s = sigma(t)` (Eq. 11 and Appendix H for eps):

        name       skip                out               native output F
        x0         0                   1                 x0
        eps        1 / a               -s / a            eps
        v          a / (a^2 + s^2)     -s / (a^2 + s^2)  a eps - s x0
        velocity   1 / (a + s)         -s / (a + s)      eps - x0
        edm        d^2 / (s^2 + d^2)   s d / sqrt(...)   d = sigma_data
        vp, iddpm  1 / a               -s / a            eps
        ve         1 / a               s / a             -eps

    The last four are from Karras et al. 2022, Table 1, for the schedule `EDM`; their inputs differ too, see `inputs`.
    """

    name: str = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in PREDICTIONS:
            raise UserError(f"prediction {self.name!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
        check_sigma_data(self.sigma_data)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(skip, out)`, each f[B]."""
        a, s, d = alpha, sigma, self.sigma_data
        match self.name:
            case "x0":
                return torch.zeros_like(a), torch.ones_like(a)
            case "eps" | "vp" | "iddpm":
                return 1 / a, -s / a
            case "ve":
                return 1 / a, s / a
            case "v":
                return a / (a**2 + s**2), -s / (a**2 + s**2)
            case "velocity":
                return 1 / (a + s), -s / (a + s)
            case _:
                return d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()

    def inputs(self, x: Tensor, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network sees: `(input f[B,*D], noise f[B])`."""
        divisor = self.divisor(sigma)
        return x if divisor is None else x / expand(divisor, x), self.noise(t, sigma)

    def divisor(self, sigma: Tensor) -> Tensor | None:
        """Return what the network's input is divided by, f[B], if it is scaled."""
        match self.name:
            case "edm":
                return (sigma**2 + self.sigma_data**2).sqrt()
            case "vp" | "iddpm":
                return (sigma**2 + 1).sqrt()
            case _:
                return None

    def noise(self, t: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's encoding of the noise level, f[B]."""
        match self.name:
            case "edm":
                return sigma.log() / 4
            case "vp":  # 999 times the time in a linear schedule beta(t) = 0.1 + 19.9 t
                return 999 * (((0.1**2 + 2 * 19.9 * (sigma**2).log1p()).sqrt() - 0.1) / 19.9)
            case "ve":
                return (sigma / 2).log()
            case "iddpm":  # the step, out of 1000, with the nearest sigma
                return iddpm_step(sigma).to(sigma.dtype)
            case _:
                return t

    def x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean image for a native output, in `x`'s precision. Ignores iDDPM's extra variance channels."""
        skip, out = self.coefficients(alpha, sigma)
        return expand(skip, x) * x + expand(out, x) * output[:, : x.shape[1]].to(x.dtype)

    def native(self, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the native output whose clean image is `x0`: the inverse of `x0()`."""
        skip, out = self.coefficients(alpha, sigma)
        return (x0 - expand(skip, x) * x) / expand(out, x)


PREDICTIONS = ("edm", "eps", "x0", "v", "velocity", "vp", "ve", "iddpm")


class Denoiser(nn.Module):
    """`forward(x f[B,*D], t f[B], cond) -> x0 f[B,*D]`.

    Wraps `net(input f[B,*D], noise f[B], cond) -> f[B,*D]`. The arithmetic around the network keeps `x`'s precision, so
    under autocast the network runs in bf16 and the preconditioning in fp32.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction):
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        output = self.net(*self.prediction.inputs(x, t, sigma), cond)
        return self.prediction.x0(output, x, alpha, sigma)

    def weight(self, t: Tensor) -> Tensor:
        """Return the denoising-loss weight f[B] that makes the native output's squared error count equally everywhere.

        `1 / out^2`: EDM `SNR + 1 / sigma_data^2`, eps `SNR` (Algorithm 3), v `SNR + 1`, x0 `1`, velocity `1 / sigma^2`.
        """
        _, out = self.prediction.coefficients(self.schedule.alpha(t), self.schedule.sigma(t))
        return out**-2
