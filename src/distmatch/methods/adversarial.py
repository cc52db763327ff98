"""A GAN on noised samples: a head tells real ones from the student's (DMD2, arXiv 2405.14867, Section 4.3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.data.reals import Reals
from distmatch.diffusion.conditions import Share, rows, with_guidance
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.methods.averages import Averages
from distmatch.methods.balance import Balance
from distmatch.methods.divergence import BINS, DECAY, FACTORS, RATIOS
from distmatch.methods.heads import Head, chosen_blocks, feature_shapes
from distmatch.methods.terms import Samples, Start, Trained
from distmatch.system import rng
from distmatch.training.engine import features, unwrapped
from distmatch.training.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the student and the head are set against each other."""

    weight: float = 1e-3
    """Weight of the student's loss."""

    head_weight: float = 1e-2
    """Weight of the head's loss. It matters for the features: AdamW trains the head alike at any weight."""

    r1: float = 0.0
    """Weight of `(D(x) - D(x + r1_noise eps))^2` at real samples in the head's loss, an approximate R1 penalty."""

    r1_noise: float = 0.1
    """Standard deviation of the noise in that penalty."""

    bins: int = 1000
    """Noise levels of the schedule's grid."""

    steps: tuple[int, int] = (0, 1000)
    """(low, high): samples are noised to the levels in bins `low .. high - 1`, in rising order."""

    blocks: Sequence[int] | None = None
    """Blocks of the network whose features the head reads; see `heads.chosen_blocks`."""

    balance: float | None = None
    """Ratio of gradient norms to keep; see `balance.Balance`."""

    divergence: str | None = None
    """One of `divergence.FACTORS`, for which the head estimates density ratios."""


@dataclass(frozen=True)
class Trial:
    """What the judgement of N of the student's samples needs.

    Args:
        t, eps: noise level f[N] and noise f[N,*D] in the student's loss.
        t_head: noise level f[N] in the head's loss, of a real and a student's sample each.
        eps_head, eps_real: their noise.
        real: N real samples.
        shift: noise f[N,*D] for the R1 penalty, if it has a weight.
    """

    t: Tensor
    eps: Tensor
    t_head: Tensor
    eps_head: Tensor
    eps_real: Tensor
    real: Samples
    shift: Tensor | None


class Adversarial:
    """The term `gan`: the student learns to have its noised samples taken for real ones (softplus, non-saturating).

    A trained head's logit is the log density ratio of the teacher's data and the student's samples at that noise level.

    Args:
        judge: the network whose features the head reads: the fake score, which the head's loss then trains too, or the
            frozen teacher.
        real: samples of what the teacher was trained on.
        example: arguments of `judge` for one sample.
        optimizer: makes the head's optimizer.
        seed: of the head's weights.
        owner: whose blocks they are, for errors.
    """

    name = "gan"
    reads: tuple[str, ...] = ("noise",)

    def __init__(
        self,
        judge: nn.Module,
        real: Reals,
        settings: Settings,
        *,
        example: tuple[Tensor, Tensor, Cond | None],
        optimizer: Callable[[nn.Module], Optimizer],
        seed: int = 0,
        owner: str = "the fake score",
    ):
        denoiser: Denoiser = unwrapped(judge)
        self.judge, self.real, self.settings, self.schedule = judge, real, settings, denoiser.schedule
        self.weight = settings.weight
        self.levels = self.schedule.grid(settings.bins).flip(0).float().to(example[0].device)
        shapes = feature_shapes(judge, example)
        self.blocks = chosen_blocks(shapes, settings.blocks, owner)
        self.balance = None if settings.balance is None else Balance(settings.balance)
        self.factors = None if settings.divergence is None else Averages(BINS, DECAY)
        averages = {"balance": self.balance, "factors": self.factors}
        with rng.seeded(rng.key(seed, "gan")):
            made = Head([shapes[number] for number in self.blocks], {k: v for k, v in averages.items() if v})
        self.head = made.to(example[0].device)
        own = optimizer(self.head)
        for one in filter(None, averages.values()):
            own.adamw.register_step_post_hook(lambda *_, one=one: one.settle())
        self.trained: Mapping[str, Trained] = {"head": Trained(self.head, own)}

    def draw(self, starts: Sequence[Start], share: Share) -> Trial:
        start, how = starts[0], self.settings
        generator, device = start.generator, start.z.device
        # Which real samples is needed on the host: a generator there avoids waiting for the device.
        real, cond = self.real.draw(start.batch, rng.stream("cpu", generator.initial_seed(), self.name), share)
        cond = cond and cond.to(device)
        if (
            start.cond is not None and "guidance" in start.cond.extra
        ):  # the fake score takes one: any suits real samples
            cond = with_guidance(cond, start.cond.extra["guidance"])

        def level() -> Tensor:
            bins = torch.randint(*how.steps, (start.batch,), generator=generator, device=device)
            return self.levels[rows(bins, share)]

        def normal() -> Tensor:
            shape = (start.batch, *start.z.shape[1:])
            return rows(torch.randn(shape, generator=generator, device=device), share)

        return Trial(
            t=level(),
            eps=normal(),
            t_head=level(),
            eps_head=normal(),
            eps_real=normal(),
            real=Samples(real.to(device), cond),
            shift=normal() if how.r1 else None,
        )

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Return the head's logits f[B] of samples `x_t f[B,*D]` at noise levels `t f[B]`."""
        with features(self.judge, self.blocks) as found:
            self.judge(x_t, t, cond)
        return self.head([found[number] for number in self.blocks])

    def student_loss(self, drawn: Trial, samples: Samples) -> Tensor:
        x_t = self.schedule.add_noise(samples.x, drawn.eps, drawn.t)
        return F.softplus(-self.logits(x_t, drawn.t, samples.cond)).mean()

    def fake_loss(self, drawn: Trial, samples: Samples) -> Tensor:
        t, how, add_noise = drawn.t_head, self.settings, self.schedule.add_noise
        noised = [add_noise(samples.x, drawn.eps_head, t), add_noise(drawn.real.x, drawn.eps_real, t)]
        conds = [samples.cond, drawn.real.cond]
        if drawn.shift is not None:
            noised.append(add_noise(drawn.real.x + how.r1_noise * drawn.shift, drawn.eps_real, t))
            conds.append(drawn.real.cond)
        found = self.logits(torch.cat(noised), t.repeat(len(noised)), Cond.cat(*conds))
        student, real, *shifted = found.chunk(len(noised))
        if self.factors is not None:
            self.factors.note(self._factor(student), self._bin(t))
        loss = F.softplus(student).mean() + F.softplus(-real).mean()
        if shifted:
            loss = loss + how.r1 * (real - shifted[0]).square().mean()
        return how.head_weight * loss

    @torch.no_grad()
    def factor(self, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Return the factor f[B] on distribution matching at the student's `x_t`; its mean is 1 at each noise level."""
        assert self.factors is not None
        return self._factor(self.logits(x_t, t, cond)) / self.factors.means()[self._bin(t)]

    def _factor(self, logits: Tensor) -> Tensor:
        assert self.settings.divergence is not None
        return FACTORS[self.settings.divergence](logits.detach().exp().clamp(*RATIOS))

    def _bin(self, t: Tensor) -> Tensor:
        """Return which of `BINS` equal parts of the grid each level is in: i64[B]."""
        return (
            torch.searchsorted(self.levels, t.contiguous()).clamp(max=len(self.levels) - 1) * BINS // len(self.levels)
        )
