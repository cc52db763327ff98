"""Distribution Matching Distillation: the terms of the objective and the step that trains with them (Algorithm 1)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distmatch import data, rng
from distmatch.checkpoint import Stateful
from distmatch.clock import Clock
from distmatch.conditions import WHOLE, Classes, Conditions, Share, rows
from distmatch.denoiser import Cond, Denoiser, guided
from distmatch.ema import EMA
from distmatch.engine import summed, unwrapped
from distmatch.losses import Weighting, denoising_loss, matching_loss
from distmatch.models.folder import Info, save_model
from distmatch.optim import Optimizer
from distmatch.pairs import PairStore
from distmatch.sampler import one_step


@dataclass(frozen=True)
class Batch:
    """All that is random in one use of one term, drawn in advance, so that what follows is arithmetic.

    `z f[B,*D]` and `cond` go into the student; `y f[B,*D]` is the teacher's image for `z`; `t f[N]`, `eps f[N,*D]`
    diffuse the N images that the term sees (see `Term.also`) for the generator's loss, `t_fake`, `eps_fake` for the
    fake score's.
    """

    z: Tensor
    cond: Cond | None
    y: Tensor | None = None
    t: Tensor | None = None
    eps: Tensor | None = None
    t_fake: Tensor | None = None
    eps_fake: Tensor | None = None


@dataclass(frozen=True)
class Images:
    """The student's images `x f[N,*D]` and their conditions."""

    x: Tensor
    cond: Cond | None

    @staticmethod
    def cat(*images: "Images") -> "Images":
        return Images(torch.cat([i.x for i in images]), Cond.cat(*(i.cond for i in images)))

    def detach(self) -> "Images":
        return Images(self.x.detach(), self.cond)


class Term:
    """One summand of the objective: `generator` is the student's loss, `critic`, if any, the fake score's.

    It sees the student's images of its own batch, and behind them those of the terms named in `also`.
    """

    name: str
    weight: float
    batch: int
    also: tuple[str, ...] = ()
    trains_fake = False
    networks: tuple[nn.Module, ...] = ()

    def draw(self, seed: int, index: int, turn: int = 0, share: Share = WHOLE) -> Batch:
        """A share of the batch of step `index`; `turn` counts the fake score's updates within the step."""
        raise NotImplementedError

    def generator(self, batch: Batch, images: Images) -> Tensor:
        """Loss f[] of the student's images, which carry its graph."""
        raise NotImplementedError

    def critic(self, batch: Batch, images: Images) -> Tensor:
        """Loss f[] of the fake score on the student's images, which carry no graph."""
        raise NotImplementedError


class Match(Term):
    """Distribution matching (Section 3.2, Algorithms 2 and 3).

    Args:
        teacher: the real score, frozen; `guidance` applies to it alone (Section 3.4); `None`: the condition's own.
        fake: the fake score, a denoiser of the teacher's kind.
        shape: of one image.
        conditions: drawn uniformly.
        reference: the term whose images are matched too, `concat(x, x_ref)` (Algorithm 1, for LAION).
        weighting: the factor on `mu_fake - mu_real`, one of `losses.WEIGHTINGS`.
        bins: T; the schedule's grid read upwards is the list of noise levels.
        min_step, max_step: the generator's levels are drawn from bins `min_step .. max_step - 1` (0.02 T, 0.98 T); the
            fake score's from all of them.
    """

    name = "match"
    trains_fake = True

    def __init__(
        self,
        teacher: Denoiser,
        fake: nn.Module,
        *,
        shape: Sequence[int],
        conditions: Conditions,
        weighting: Weighting,
        weight: float = 1.0,
        batch: int = 64,
        bins: int = 1000,
        min_step: int = 20,
        max_step: int = 980,
        guidance: float | None = 1.0,
        reference: Term | None = None,
        device: torch.device | str = "cpu",
    ):
        self.real, self.fake, self.weight_at = guided(teacher, guidance), fake, teacher.weight
        self.networks = (teacher, fake)
        self.shape, self.conditions, self.weighting = tuple(shape), conditions, weighting
        self.also = () if reference is None else (reference.name,)
        self.seen = batch if reference is None else batch + reference.batch
        self.weight, self.batch, self.min_step, self.max_step = weight, batch, min_step, max_step
        self.device = torch.device(device)
        self.schedule = teacher.schedule
        self.levels = self.schedule.grid(bins).flip(0).float().to(self.device)

    def draw(self, seed: int, index: int, turn: int = 0, share: Share = WHOLE) -> Batch:
        generator = rng.stream(self.device, seed, self.name, index, turn)

        def mine(v: Tensor) -> Tensor:
            """The share of the term's own rows and, behind it, that of the rows that it sees besides."""
            own, behind = v[: self.batch], v[self.batch :]
            return torch.cat([rows(own, share), rows(behind, share)]) if len(behind) else rows(own, share)

        def normal(n: int) -> Tensor:
            return mine(torch.randn(n, *self.shape, generator=generator, device=self.device))

        def level(low: int, high: int) -> Tensor:
            bins = torch.randint(low, high, (self.seen,), generator=generator, device=self.device)
            return self.levels[mine(bins)]

        return Batch(
            z=normal(self.batch),
            cond=self.conditions.draw(self.batch, generator, share),
            t=level(self.min_step, self.max_step),
            eps=normal(self.seen),
            t_fake=level(0, len(self.levels)),
            eps_fake=normal(self.seen),
        )

    def generator(self, batch: Batch, images: Images) -> Tensor:
        t, eps, x = batch.t, batch.eps, images.x
        assert t is not None
        assert eps is not None
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, eps, t)
            x0_fake = self.fake(x_t, t, images.cond)
            x0_real = self.real(x_t, t, images.cond)
            w = self.weighting(x, x0_real, self.schedule.alpha(t), self.schedule.sigma(t))
        return matching_loss(x, x0_fake, x0_real, w)

    def critic(self, batch: Batch, images: Images) -> Tensor:
        t, eps, x = batch.t_fake, batch.eps_fake, images.x
        assert t is not None
        assert eps is not None
        x0 = self.fake(self.schedule.add_noise(x, eps, t), t, images.cond)
        return denoising_loss(x0, x, self.weight_at(t))


class Regress(Term):
    """Regression to the teacher's deterministic samples (Section 3.3, Eq. 9), conditioned as the pairs were made."""

    name = "regress"

    def __init__(
        self,
        pairs: PairStore,
        conditions: Conditions,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        weight: float = 0.25,
        batch: int = 64,
        device: torch.device | str = "cpu",
    ):
        self.pairs, self.conditions = pairs, conditions
        self.loss, self.weight, self.batch = loss, weight, batch
        self.device = torch.device(device)

    def draw(self, seed: int, index: int, turn: int = 0, share: Share = WHOLE) -> Batch:
        part, size = share[0], self.batch // share[1]
        pairs = self.pairs.draw(seed, index * self.batch + part * size, size)
        cond = self.conditions.at(pairs.index)
        return Batch(z=pairs.z.to(self.device), cond=cond and cond.to(self.device), y=pairs.y.to(self.device))

    def generator(self, batch: Batch, images: Images) -> Tensor:
        assert batch.y is not None
        return self.loss(images.x, batch.y)


class Distiller:
    """The task of `distmatch train`: one step of Algorithm 1, over any terms.

    Args:
        student, fake: trained copies of the teacher; `fake` and its optimizer are `None` where no term trains it.
        forward: what to call in place of the student, where it is spread over processes.
        process: `(rank, world)`; a process makes its share of every batch, and the gradients are those of the whole.
        conditions, decode: of the previews; classes in turn and no decoding unless told.
        t: the time at which the student is evaluated; `None` is the schedule's `t_max`.
        critic_steps: updates of the fake score per update of the student; the first uses the student's images of the
            same step (Algorithm 1), the others fresh ones.
        accumulate: parts that each batch is cut into; gradients are summed over them.
        precision: "fp32", or "bf16" for autocast around the networks; weights and preconditioning stay fp32.
    """

    def __init__(
        self,
        student: Denoiser,
        fake: nn.Module | None,
        terms: Sequence[Term],
        generator: Optimizer,
        critic: Optimizer | None,
        *,
        info: Info,
        forward: nn.Module | None = None,
        process: Share = WHOLE,
        conditions: Conditions | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        t: float | None = None,
        ema: float | EMA[Denoiser] = 0.999,
        seed: int = 0,
        critic_steps: int = 1,
        accumulate: int = 1,
        precision: str = "fp32",
    ):
        self.student, self.fake, self.terms = student, fake, list(terms)
        self.forward = student if forward is None else forward
        self.optimizer, self.critic_optimizer = generator, critic
        self.info, self.t, self.seed = info, t, seed
        self.conditions, self.decode = conditions or Classes(len(info.classes)), decode
        self.critic_steps, self.precision = critic_steps, precision
        rank, world = process
        self.shares = [(rank * accumulate + cut, world * accumulate) for cut in range(accumulate)]
        self.ema = ema if isinstance(ema, EMA) else EMA(student, ema)
        self.device = next(student.parameters()).device
        networks = {student, *(network for term in terms for network in term.networks)}
        self.clock = Clock(networks, self.device)

    @property
    def images_per_step(self) -> int:
        return sum(term.batch for term in self.terms)

    @property
    def parts(self) -> Mapping[str, Stateful]:
        parts: dict[str, Stateful] = {"student": self.student, "ema": self.ema, "generator": self.optimizer}
        if self.fake is not None and self.critic_optimizer is not None:
            parts |= {"fake": unwrapped(self.fake), "critic": self.critic_optimizer}
        return parts

    def step(self, index: int) -> dict[str, Tensor]:
        batches = [{t.name: t.draw(self.seed, index, share=share) for t in self.terms} for share in self.shares]
        images, losses = self.update_student(index, batches)
        if self.fake is None:
            return losses
        for turn in range(self.critic_steps):
            for term in filter(lambda term: turn and term.trains_fake, self.terms):
                for share, batch, made in zip(self.shares, batches, images, strict=True):
                    batch[term.name] = term.draw(self.seed, index, turn, share)
                    made[term.name] = self.generate(batch[term.name])
            losses |= self.update_fake(index * self.critic_steps + turn, batches, images)
        return losses

    def update_student(
        self, index: int, batches: Sequence[Mapping[str, Batch]]
    ) -> tuple[list[dict[str, Images]], dict[str, Tensor]]:
        """Lines 5-13 of Algorithm 1: images of all terms in one forward pass, summed losses, one update.

        `batches` are parts of one batch, by term. Returns the images of each, without graph, and the unweighted losses.
        """
        made: list[dict[str, Images]] = []
        losses = {term.name: torch.zeros((), device=self.device) for term in self.terms}
        for parts in batches:
            total = torch.zeros((), device=self.device)
            with self.autocast(), summed(self.forward, last=parts is batches[-1]):
                z, cond = torch.cat([p.z for p in parts.values()]), Cond.cat(*(p.cond for p in parts.values()))
                x = self.student_forward(z, cond).split([len(p.z) for p in parts.values()])
                images = {name: Images(x, part.cond) for (name, part), x in zip(parts.items(), x, strict=True)}
                for term in self.terms:
                    loss = term.generator(parts[term.name], _seen(term, images)) / len(batches)
                    losses[term.name] += loss.detach()
                    total = total + term.weight * loss
                self.clock.backward(total)
            made.append({name: part.detach() for name, part in images.items()})
        norm = self.optimizer.step(index)
        self.ema.update()
        return made, {**losses, "gradient_norm": norm}

    def update_fake(
        self, index: int, batches: Sequence[Mapping[str, Batch]], images: Sequence[Mapping[str, Images]]
    ) -> dict[str, Tensor]:
        """Lines 15-19 of Algorithm 1: one update of the fake score on the student's images, part by part."""
        assert self.fake is not None
        assert self.critic_optimizer is not None
        losses = {"fake": torch.zeros((), device=self.device)}
        for parts, made in zip(batches, images, strict=True):
            for term in filter(lambda term: term.trains_fake, self.terms):
                with self.autocast(), summed(self.fake, last=parts is batches[-1]):
                    loss = term.critic(parts[term.name], _seen(term, made)) / len(batches)
                    losses["fake"] += loss.detach()
                    self.clock.backward(loss)
        return {**losses, "fake_gradient_norm": self.critic_optimizer.step(index)}

    def student_forward(self, z: Tensor, cond: Cond | None) -> Tensor:
        return one_step(self.forward, self.student.schedule, z, cond, self.t)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Images:
        """The student's images for `batch`, without graph."""
        with self.autocast():
            return Images(self.student_forward(batch.z, batch.cond), batch.cond)

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The EMA student's samples of fixed noises, conditions in turn: 64, or 16 that have to be decoded."""
        rows = range(64 if self.decode is None else 16)
        z = rng.noise(self.seed + 1, rows, self.info.shape).to(self.device)  # noise that no pair has
        cond = self.conditions.at(rows)
        x = one_step(self.ema.network, self.student.schedule, z, cond and cond.to(self.device), self.t)
        return data.picture(x if self.decode is None else self.decode(x))

    def export(self, folder: Path) -> None:
        save_model(folder, self.ema.network, self.info)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _seen(term: Term, images: Mapping[str, Images]) -> Images:
    """The images that `term` sees: its own and, behind them, those of the terms that it names."""
    return Images.cat(*(images[name] for name in (term.name, *term.also))) if term.also else images[term.name]
