"""Streams and terms: where the student's images come from, and the losses computed on them.

The paper has two of each (Figure 2). Images made from fresh noise are matched to the teacher's distribution; images
made from noise that the teacher has already sampled are compared with the teacher's images. Your own term is a class
like `Match` or `Regress`, see examples/own_term.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distmatch.data.pairs import PairStore
from distmatch.diffusion.conditions import Conditions, Share, rows
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.guidance import Model
from distmatch.diffusion.losses import Weighting, denoising_loss, matching_loss
from distmatch.methods.balance import Balance
from distmatch.methods.intervals import Spans
from distmatch.system import rng
from distmatch.training.optim import Optimizer


@dataclass(frozen=True)
class Start:
    """What the student starts from: this process's share of a stream's batch.

    Args:
        z: f[B,*D], standard normal.
        cond: condition of each row.
        batch: rows of the whole batch, over all processes and parts.
        generator: random source of the stream's terms, which draw from it in turn after the stream itself.
        y: f[B,*D], the teacher's image of each row, for pairs.
        noise: f[B,*D] for each of the student's steps before the one whose image is trained; see `sampler.Steps`.
        real: f[B,*D], samples to start later steps from, noised, instead of the student's own; see `RealStream`.
    """

    z: Tensor
    cond: Cond | None
    batch: int
    generator: torch.Generator
    y: Tensor | None = None
    noise: tuple[Tensor, ...] = ()
    real: Tensor | None = None


class Stream(Protocol):
    """A source of the student's inputs.

    `fresh`: whether each update of the fake score gets new images. Otherwise it reuses those of the student's update.
    """

    name: str
    batch: int
    fresh: bool

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        """Draw a share of the batch of step `index`; `turn` counts the updates of the fake score in this step."""
        ...


@dataclass
class NoiseStream:
    """Fresh noise under random conditions, for images of `shape`."""

    shape: Sequence[int]
    conditions: Conditions
    batch: int = 64
    device: torch.device | str = "cpu"
    name: str = "noise"
    fresh: bool = True

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        generator = rng.stream(self.device, seed, "match", index, turn)  # named "match" so that older runs can continue
        z = torch.randn(self.batch, *self.shape, generator=generator, device=self.device)
        return Start(rows(z, share), self.conditions.draw(self.batch, generator, share), self.batch, generator)


@dataclass
class PairStream:
    """The teacher's noise-image pairs, shuffled endlessly, with the conditions they were made under."""

    store: PairStore
    conditions: Conditions
    batch: int = 64
    device: torch.device | str = "cpu"
    name: str = "pairs"
    fresh: bool = False

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        part, size = share[0], self.batch // share[1]
        pairs = self.store.draw(seed, index * self.batch + part * size, size)
        cond = self.conditions.at(pairs.index)
        z, y = pairs.z.to(self.device), pairs.y.to(self.device)
        generator = rng.stream(self.device, seed, self.name, index, turn)
        return Start(z, cond and cond.to(self.device), self.batch, generator, y)


@dataclass(frozen=True)
class Samples:
    """The student's images `x f[N,*D]` and their conditions."""

    x: Tensor
    cond: Cond | None

    def detach(self) -> "Samples":
        return Samples(self.x.detach(), self.cond)


@dataclass(frozen=True)
class Trained:
    """A network that a term trains in addition to the fake score, e.g. a discriminator's head, and its optimizer."""

    network: nn.Module
    optimizer: Optimizer


class Term(Protocol):
    """One summand of the student's loss, weighted by `weight`. It sees the images of the streams that it `reads`."""

    name: str
    weight: float
    reads: tuple[str, ...]

    def draw(self, starts: Sequence[Start], share: Share) -> Any:
        """Draw everything random that the term needs for one step, as its own dataclass. `starts`: one per stream.

        Drawing it first makes the rest deterministic.
        """
        ...

    def student_loss(self, drawn: Any, samples: Samples) -> Tensor:
        """Return the loss f[] of the student's images, from all the term's streams in order, with their graph."""
        ...


@runtime_checkable
class FakeTerm(Term, Protocol):
    """A term that also trains the fake score, and optionally `trained` networks of its own, by name."""

    trained: Mapping[str, Trained]

    def fake_loss(self, drawn: Any, samples: Samples) -> Tensor:
        """Return the loss f[] of the fake score on the student's images, which carry no graph."""
        ...


@dataclass(frozen=True)
class Objective:
    """The terms of a distillation, the streams they read, by name, and the balance of two of them, if any."""

    streams: Mapping[str, Stream]
    terms: Sequence[Term]
    balance: Balance | None = None

    @cached_property  # looked up several times in each step, and protocols are slow to compare
    def fake_terms(self) -> list[FakeTerm]:
        return [term for term in self.terms if isinstance(term, FakeTerm)]

    @property
    def trained(self) -> dict[str, Trained]:
        """The terms' own networks, as `TERM.NAME`."""
        return {f"{term.name}.{name}": one for term in self.fake_terms for name, one in term.trained.items()}


@dataclass(frozen=True)
class Levels:
    """Times `t f[N]` and noise `eps f[N,*D]` for the N images, for the student's loss and for the fake score's."""

    t: Tensor
    eps: Tensor
    t_fake: Tensor
    eps_fake: Tensor


class Match:
    """Distribution matching (Section 3.2, Algorithms 2 and 3).

    Args:
        teacher: frozen. `real`: the real score, default `teacher`; only it is guided (Section 3.4).
        fake: the fake score, a denoiser like the teacher.
        weighting: the factor on `mu_fake - mu_real`, one of `losses.WEIGHTINGS`.
        reads: the streams whose images are matched; with "pairs" it is `concat(x, x_ref)` (Algorithm 1, for LAION).
        bins: T; the noise levels are the schedule's grid in rising order.
        steps: (low, high): the student's levels are drawn from bins `low .. high - 1` (0.02 T to 0.98 T); the
            fake score's from all bins.
    """

    name = "match"

    def __init__(
        self,
        teacher: Denoiser,
        fake: nn.Module,
        *,
        weighting: Weighting,
        weight: float = 1.0,
        reads: tuple[str, ...] = ("noise",),
        bins: int = 1000,
        steps: tuple[int, int] = (20, 980),
        real: Model | None = None,
    ):
        self.real, self.fake, self.weight_at = real or teacher, fake, teacher.weight
        self.teacher, self.schedule, self.weighting = teacher, teacher.schedule, weighting
        self.weight, self.reads, (self.min_step, self.max_step) = weight, reads, steps
        self.levels = self.schedule.grid(bins).flip(0).float()
        self.trained: Mapping[str, Trained] = {}
        self.spans: Spans = lambda k: (steps, (0, bins))
        self.factor: Callable[..., Tensor | float] = lambda *_: 1.0  # of another divergence, see `Adversarial`

    def draw(self, starts: Sequence[Start], share: Share) -> Levels:
        generator, device = starts[0].generator, starts[0].z.device
        self.levels = self.levels.to(device)
        batches = [start.batch for start in starts]

        def mine(v: Tensor) -> Tensor:
            """Return the share of each stream's rows. All rows are drawn: no row's value depends on the share."""
            shares = [rows(own, share) for own in v.split(batches)]
            return torch.cat(shares) if len(shares) > 1 else shares[0]

        def level(low: int, high: int) -> Tensor:
            bins = torch.randint(low, high, (sum(batches),), generator=generator, device=device)
            return self.levels[mine(bins)]

        def normal() -> Tensor:
            shape = starts[0].z.shape[1:]
            return mine(torch.randn(sum(batches), *shape, generator=generator, device=device))

        own, fakes = self.spans(len(starts[0].noise))
        return Levels(t=level(*own), eps=normal(), t_fake=level(*fakes), eps_fake=normal())

    def student_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        t, x, cond = drawn.t, samples.x, samples.cond
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, drawn.eps, t)
            x0_fake = self.judged(x_t, drawn, cond)
            x0_real = self.real(x_t, t, cond)
            w = self.weighting(x, x0_real, self.schedule.alpha(t), self.schedule.sigma(t))
        return matching_loss(x, x0_fake, x0_real, w * self.factor(x_t, t, cond))

    def judged(self, x_t: Tensor, drawn: Levels, cond: Cond | None) -> Tensor:
        """Return the fake score's `x0` of the student's noised images, without graph."""
        return self.fake(x_t, drawn.t, cond)

    def fake_loss(self, drawn: Levels, samples: Samples) -> Tensor:
        t, x = drawn.t_fake, samples.x
        x0 = self.fake(self.schedule.add_noise(x, drawn.eps_fake, t), t, samples.cond)
        return denoising_loss(x0, x, self.weight_at(t))


@dataclass
class Regress:
    """Regression to the teacher's deterministic samples (Section 3.3, Eq. 9). `loss` is the distance of Eq. 9."""

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float = 0.25
    reads: tuple[str, ...] = ("pairs",)
    name: str = field(default="regress", init=False)

    def draw(self, starts: Sequence[Start], share: Share) -> Tensor | None:
        return starts[0].y

    def student_loss(self, drawn: Tensor, samples: Samples) -> Tensor:
        return self.loss(samples.x, drawn)
