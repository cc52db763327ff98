"""Distribution Matching Distillation: the terms of the objective and the step that trains with them (Algorithm 1)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch import data, rng
from distmatch.checkpoint import Stateful
from distmatch.clock import Clock
from distmatch.denoiser import Cond, Denoiser, guided
from distmatch.ema import EMA
from distmatch.losses import Weighting, denoising_loss, matching_loss
from distmatch.models.folder import Info, save_model
from distmatch.optim import Optimizer
from distmatch.pairs import PairStore
from distmatch.sampler import one_step


@dataclass(frozen=True)
class Batch:
    """All that is random in one use of one term, drawn in advance, so that what follows is arithmetic.

    `z f[B,*D]` and `cond` go into the student; `y f[B,*D]` is the teacher's image for `z`; `t f[B]`, `eps f[B,*D]`
    diffuse the student's image for the generator's loss, `t_fake`, `eps_fake` for the fake score's.
    """

    z: Tensor
    cond: Cond | None
    y: Tensor | None = None
    t: Tensor | None = None
    eps: Tensor | None = None
    t_fake: Tensor | None = None
    eps_fake: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, rows: slice) -> "Batch":
        tensors = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


class Term:
    """One summand of the objective: `generator` is the student's loss, `critic`, if any, the fake score's."""

    name: str
    weight: float
    batch: int
    trains_fake = False
    networks: tuple[nn.Module, ...] = ()

    def draw(self, seed: int, index: int, turn: int = 0) -> Batch:
        """The batch of step `index`; `turn` counts the fake score's updates within the step."""
        raise NotImplementedError

    def generator(self, batch: Batch, x: Tensor) -> Tensor:
        """Loss f[] of the student's images `x f[B,*D]`, which carry its graph."""
        raise NotImplementedError

    def critic(self, batch: Batch, x: Tensor) -> Tensor:
        """Loss f[] of the fake score on the student's images `x f[B,*D]`, which carry no graph."""
        raise NotImplementedError


class Match(Term):
    """Distribution matching (Section 3.2, Algorithms 2 and 3).

    Args:
        teacher: the real score, frozen; `guidance` applies to it alone (Section 3.4).
        fake: the fake score.
        shape, classes: of one image; labels are drawn uniformly. 0 classes: unconditional.
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
        fake: Denoiser,
        *,
        shape: Sequence[int],
        classes: int,
        weighting: Weighting,
        weight: float = 1.0,
        batch: int = 64,
        bins: int = 1000,
        min_step: int = 20,
        max_step: int = 980,
        guidance: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        self.real, self.fake = guided(teacher, guidance), fake
        self.networks = (teacher, fake)
        self.shape, self.classes, self.weighting = tuple(shape), classes, weighting
        self.weight, self.batch, self.min_step, self.max_step = weight, batch, min_step, max_step
        self.device = torch.device(device)
        self.schedule = teacher.schedule
        self.levels = self.schedule.grid(bins).flip(0).float().to(self.device)

    def draw(self, seed: int, index: int, turn: int = 0) -> Batch:
        generator = rng.stream(self.device, seed, self.name, index, turn)

        def normal() -> Tensor:
            return torch.randn(self.batch, *self.shape, generator=generator, device=self.device)

        def integers(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (self.batch,), generator=generator, device=self.device)

        return Batch(
            z=normal(),
            cond=Cond(label=integers(0, self.classes)) if self.classes else None,
            t=self.levels[integers(self.min_step, self.max_step)],
            eps=normal(),
            t_fake=self.levels[integers(0, len(self.levels))],
            eps_fake=normal(),
        )

    def generator(self, batch: Batch, x: Tensor) -> Tensor:
        t, eps = batch.t, batch.eps
        assert t is not None
        assert eps is not None
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, eps, t)
            x0_fake = self.fake(x_t, t, batch.cond)
            x0_real = self.real(x_t, t, batch.cond)
            w = self.weighting(x, x0_real, self.schedule.alpha(t), self.schedule.sigma(t))
        return matching_loss(x, x0_fake, x0_real, w)

    def critic(self, batch: Batch, x: Tensor) -> Tensor:
        t, eps = batch.t_fake, batch.eps_fake
        assert t is not None
        assert eps is not None
        x0 = self.fake(self.schedule.add_noise(x, eps, t), t, batch.cond)
        return denoising_loss(x0, x, self.fake.weight(t))


class Regress(Term):
    """Regression to the teacher's deterministic samples (Section 3.3, Eq. 9)."""

    name = "regress"

    def __init__(
        self,
        pairs: PairStore,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        weight: float = 0.25,
        batch: int = 64,
        device: torch.device | str = "cpu",
    ):
        self.pairs, self.loss, self.weight, self.batch = pairs, loss, weight, batch
        self.device = torch.device(device)

    def draw(self, seed: int, index: int, turn: int = 0) -> Batch:
        pairs = self.pairs.draw(seed, index * self.batch, self.batch)
        cond = None if pairs.label is None else Cond(label=pairs.label.to(self.device))
        return Batch(z=pairs.z.to(self.device), cond=cond, y=pairs.y.to(self.device))

    def generator(self, batch: Batch, x: Tensor) -> Tensor:
        assert batch.y is not None
        return self.loss(x, batch.y)


class Distiller:
    """The task of `distmatch train`: one step of Algorithm 1, over any terms.

    Args:
        student, fake: trained copies of the teacher; `fake` and its optimizer are `None` where no term trains it.
        t: the time at which the student is evaluated; `None` is the schedule's `t_max`.
        critic_steps: updates of the fake score per update of the student; the first uses the student's images of the
            same step (Algorithm 1), the others fresh ones.
        accumulate: parts that each batch is cut into; gradients are summed over them.
        precision: "fp32", or "bf16" for autocast around the networks; weights and preconditioning stay fp32.
    """

    def __init__(
        self,
        student: Denoiser,
        fake: Denoiser | None,
        terms: Sequence[Term],
        generator: Optimizer,
        critic: Optimizer | None,
        *,
        info: Info,
        t: float | None = None,
        ema: float = 0.999,
        seed: int = 0,
        critic_steps: int = 1,
        accumulate: int = 1,
        precision: str = "fp32",
    ):
        for term in terms:
            if term.batch % accumulate:
                raise ValueError(
                    f"{term.name}.batch {term.batch} is not a multiple of accumulate {accumulate}; choose one that is"
                )
        self.student, self.fake, self.terms = student, fake, list(terms)
        self.optimizer, self.critic_optimizer = generator, critic
        self.info, self.t, self.seed = info, t, seed
        self.critic_steps, self.accumulate, self.precision = critic_steps, accumulate, precision
        self.ema = EMA(student, ema)
        self.device = next(student.parameters()).device
        networks = {student, *(network for term in terms for network in term.networks)}
        self.clock = Clock(networks, self.device)
        self.images_per_step = sum(term.batch for term in terms)

    @property
    def parts(self) -> Mapping[str, Stateful]:
        parts: dict[str, Stateful] = {"student": self.student, "ema": self.ema, "generator": self.optimizer}
        if self.fake is not None and self.critic_optimizer is not None:
            parts |= {"fake": self.fake, "critic": self.critic_optimizer}
        return parts

    def step(self, index: int) -> dict[str, Tensor]:
        batches = [term.draw(self.seed, index) for term in self.terms]
        images, losses = self.update_student(index, batches)
        if self.fake is None:
            return losses
        critics = [
            (term, batch, x) for term, batch, x in zip(self.terms, batches, images, strict=True) if term.trains_fake
        ]
        for turn in range(self.critic_steps):
            if turn:
                fresh = [(term, term.draw(self.seed, index, turn)) for term, _, _ in critics]
                critics = [(term, batch, self.generate(batch)) for term, batch in fresh]
            losses |= self.update_fake(index * self.critic_steps + turn, critics)
        return losses

    def update_student(self, index: int, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Lines 5-13 of Algorithm 1: images of all terms in one forward pass, summed losses, one update.

        Returns the images, without graph, term by term, and the unweighted losses.
        """
        images: list[list[Tensor]] = [[] for _ in batches]
        losses = {term.name: torch.zeros((), device=self.device) for term in self.terms}
        for cut in range(self.accumulate):
            parts = [_part(batch, cut, self.accumulate) for batch in batches]
            total = torch.zeros((), device=self.device)
            with self.autocast():
                x = self.student_forward(torch.cat([p.z for p in parts]), Cond.cat(*(p.cond for p in parts)))
                for term, part, x_part, kept in zip(
                    self.terms, parts, x.split([len(p) for p in parts]), images, strict=True
                ):
                    loss = term.generator(part, x_part) / self.accumulate
                    losses[term.name] += loss.detach()
                    total = total + term.weight * loss
                    kept.append(x_part.detach())
            self.clock.backward(total)
        norm = self.optimizer.step(index)
        self.ema.update()
        return [torch.cat(kept) for kept in images], {**losses, "gradient_norm": norm}

    def update_fake(self, index: int, critics: Sequence[tuple[Term, Batch, Tensor]]) -> dict[str, Tensor]:
        """Lines 15-19 of Algorithm 1: one update of the fake score on the student's images."""
        assert self.critic_optimizer is not None
        losses = {"fake": torch.zeros((), device=self.device)}
        for cut in range(self.accumulate):
            for term, batch, x in critics:
                with self.autocast():
                    part = _part(batch, cut, self.accumulate)
                    loss = term.critic(part, _part(x, cut, self.accumulate)) / self.accumulate
                losses["fake"] += loss.detach()
                self.clock.backward(loss)
        return {**losses, "fake_gradient_norm": self.critic_optimizer.step(index)}

    def student_forward(self, z: Tensor, cond: Cond | None) -> Tensor:
        return one_step(self.student, self.student.schedule, z, cond, self.t)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """The student's images for `batch`, without graph."""
        with self.autocast():
            return self.student_forward(batch.z, batch.cond)

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The EMA student's samples of 64 fixed noises, labels in turn."""
        z = rng.noise(self.seed + 1, range(64), self.info.shape).to(self.device)  # noise that no pair has
        classes = len(self.info.classes)
        cond = Cond(label=torch.arange(64, device=self.device) % classes) if classes else None
        return data.picture(one_step(self.ema.network, self.student.schedule, z, cond, self.t))

    def export(self, folder: Path) -> None:
        save_model(folder, self.ema.network, self.info)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _part(batch: Any, cut: int, cuts: int) -> Any:
    """Part `cut` of `cuts` equal parts of a batch or a tensor."""
    size = len(batch) // cuts
    return batch[cut * size : (cut + 1) * size]
