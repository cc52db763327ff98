"""The training step of Distribution Matching Distillation (Algorithm 1), over any streams and terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.data import imaging
from distmatch.diffusion.conditions import WHOLE, Classes, Conditions, Share, rows
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.sampler import Steps
from distmatch.methods.balance import Balance
from distmatch.methods.terms import Objective, Samples, Start, Stream, Term
from distmatch.models.folder import Info, save_model
from distmatch.system import rng
from distmatch.system.precision import autocast
from distmatch.system.workers import ALONE, Workers
from distmatch.training.checkpoint import Stateful
from distmatch.training.clock import Clock
from distmatch.training.ema import EMA, draw_towards
from distmatch.training.engine import average_gradients, unwrapped
from distmatch.training.gradients import Adder
from distmatch.training.optim import Optimizer


@dataclass
class Part:
    """One part of a step's batch: the start of each stream and what each term drew, by name."""

    starts: dict[str, Start]
    drawn: dict[str, Any]


@dataclass(frozen=True)
class Networks:
    """The networks of a distillation. `student` and `fake` are trained copies of the teacher."""

    student: Denoiser
    fake: nn.Module | None = None  # if a term trains it
    teacher: Denoiser | None = None  # its passes count as network time
    forward: nn.Module | None = None  # what to call instead of the student, if it is distributed over processes
    average: EMA[Denoiser] | None = None  # default: of the student, with decay 0.999


@dataclass(frozen=True)
class Settings:
    """How a step is done."""

    steps: Steps | None = None  # the student's times; default: only the schedule's t_max
    fake_updates: int = 1  # of the fake score per update of the student; the first uses the same images (Algorithm 1)
    ida: float = 0.0  # share of the student that the fake score takes over in steps that train both (arXiv 2506.00523)
    seed: int = 0
    accumulate: int = 1  # parts that each worker's share of a batch is split into; gradients are summed over them
    workers: Workers = ALONE  # threads that share a batch, on a CPU and in a single process
    precision: str = "fp32"  # or "bf16", autocast around the networks; weights and preconditioning stay fp32
    cuda_graphs: bool = False  # on a GPU, in one process and one part: record each update once and replay it
    process: Share = WHOLE  # (rank, world): a process makes its share of a batch, with gradients of the whole
    conditions: Conditions | None = None  # of the previews; default: classes in turn
    decode: Callable[[Tensor], Tensor] | None = None  # latents to images, for the previews


class Distiller:
    """The task of `distmatch train`: one step of Algorithm 1. `fake_optimizer`: `None` without a fake score."""

    def __init__(
        self,
        networks: Networks,
        objective: Objective,
        optimizer: Optimizer,
        fake_optimizer: Optimizer | None,
        *,
        info: Info,
        settings: Settings = Settings(),
    ):
        student = networks.student
        self.student, self.fake, self.objective = student, networks.fake, objective
        self.forward = student if networks.forward is None else networks.forward
        self.optimizer, self.fake_optimizer, self.info = optimizer, fake_optimizer, info
        self.seed, self.precision, self.fake_updates = settings.seed, settings.precision, settings.fake_updates
        self.steps = settings.steps or Steps((student.schedule.t_max,))
        self.conditions = settings.conditions or Classes(len(info.classes))
        self.ida, self.decode, workers = settings.ida, settings.decode, settings.workers
        (rank, world), cuts = settings.process, settings.accumulate * settings.workers.count
        self.shares = [(rank * cuts + cut, world * cuts) for cut in range(cuts)]
        self.ema = networks.average or EMA(student, 0.999)
        self.device = next(student.parameters()).device
        self.clock = Clock(filter(None, (student, networks.fake, networks.teacher)), self.device, workers.count)
        recorded = (optimizer, *self.fake_optimizers) if settings.cuda_graphs else ()
        self.gradients = Adder(self.clock, workers, recorded)

    @property
    def terms(self) -> Sequence[Term]:
        return self.objective.terms

    @property
    def fake_optimizers(self) -> list[Optimizer]:
        """The optimizers of the fake score and of the terms' own networks."""
        return [*filter(None, [self.fake_optimizer]), *(one.optimizer for one in self.objective.trained.values())]

    @property
    def images_per_step(self) -> int:
        return sum(stream.batch for stream in self.objective.streams.values())

    @property
    def parts(self) -> Mapping[str, Stateful]:
        # "generator" and "critic" are earlier names, kept so that older checkpoints load.
        parts: dict[str, Stateful] = {"student": self.student, "ema": self.ema, "generator": self.optimizer}
        if self.fake is not None and self.fake_optimizer is not None:
            parts |= {"fake": unwrapped(self.fake), "critic": self.fake_optimizer}
        for name, trained in self.objective.trained.items():
            parts |= {name: trained.network, f"{name}.optimizer": trained.optimizer}
        return parts

    def step(self, index: int) -> dict[str, Tensor]:
        parts = [self.draw(index, share) for share in self.shares]
        images, losses = self.update_student(index, parts)
        if not self.objective.fake_terms:
            return losses
        for turn in range(self.fake_updates):
            if turn > 0:
                for part, made, share in zip(parts, images, self.shares, strict=True):
                    self.renew(part, made, index, turn, share)
            losses |= self.update_fake(index * self.fake_updates + turn, parts, images)
        return losses

    def draw(self, index: int, share: Share) -> Part:
        """Draw everything random in one part of step `index`."""
        starts = {name: self.start(stream, index, 0, share) for name, stream in self.objective.streams.items()}
        return Part(starts, {term.name: term.draw([starts[name] for name in term.reads], share) for term in self.terms})

    def start(self, stream: Stream, index: int, turn: int, share: Share) -> Start:
        """Draw a share of the stream's batch. One draw per batch decides which student step makes its images.

        Pairs are of the first step; if there are any, fresh noise is of the others.
        """
        start = stream.draw(self.seed, index, turn, share)
        if len(self.steps) == 1 or start.y is not None:
            return start
        first = int("pairs" in self.objective.streams)
        k = first + rng.key(self.seed, "student step", index, turn) % (len(self.steps) - first)
        generator = rng.stream(self.device, self.seed, "student noise", stream.name, index, turn)
        shape = (stream.batch, *start.z.shape[1:])
        noise = [torch.randn(shape, generator=generator, device=self.device) for _ in range(k)]
        return replace(start, noise=tuple(rows(one, share) for one in noise))

    def renew(self, part: Part, made: dict[str, Samples], index: int, turn: int, share: Share) -> None:
        """Redraw a part for a further update of the fake score: fresh images, and what its terms need for them."""
        for name, stream in self.objective.streams.items():
            if stream.fresh:
                part.starts[name] = self.start(stream, index, turn, share)
                made[name] = self.gradients.make("generate", self.generate, part.starts[name])
        for term in self.objective.fake_terms:
            part.drawn[term.name] = term.draw([part.starts[name] for name in term.reads], share)

    def update_student(self, index: int, parts: Sequence[Part]) -> tuple[list[dict[str, Samples]], dict[str, Tensor]]:
        """Lines 5-13 of Algorithm 1: make the images of all streams in one forward pass, sum the losses, update once.

        Returns the images of each part by stream, without graph, and the unweighted losses.
        """

        def loss(part: Part) -> tuple[Tensor, dict[str, Tensor], dict[str, Samples]]:
            with autocast(self.device, self.precision):
                samples, balance = self.generate_all(part.starts), self.objective.balance
                losses = {
                    f"{t.name}/student": t.student_loss(part.drawn[t.name], _read(t, samples, balance)) / len(parts)
                    for t in self.terms
                }
            total = torch.stack([t.weight * loss for t, loss in zip(self.terms, losses.values(), strict=True)]).sum()
            return total, losses, {name: one.detach() for name, one in samples.items()}

        made, losses = self.gradients.add("student", parts, loss, self.forward, self.optimizer.parameters)
        norm = self.optimizer.step(index)
        self.ema.update()
        if self.ida and self.fake is not None and self.objective.fake_terms and self.optimizer.rate(index):
            draw_towards(self.fake, self.student, self.ida)
        for own in self.fake_optimizers:
            own.clear()  # gradients that the student's loss sent through the fake score, as in a GAN
        return made, {**losses, "gradient_norm": norm}

    def update_fake(
        self, index: int, parts: Sequence[Part], images: Sequence[Mapping[str, Samples]]
    ) -> dict[str, Tensor]:
        """Lines 15-19 of Algorithm 1: update the fake score and the terms' own networks once, part by part."""
        assert self.fake is not None
        assert self.fake_optimizer is not None

        def loss(one: tuple[Part, Mapping[str, Samples]]) -> tuple[Tensor, dict[str, Tensor], None]:
            (part, made), terms = one, self.objective.fake_terms
            with autocast(self.device, self.precision):
                losses = {f"{t.name}/fake": t.fake_loss(part.drawn[t.name], _read(t, made)) / len(parts) for t in terms}
            return torch.stack(list(losses.values())).sum(), losses, None

        given = list(zip(parts, images, strict=True))
        parameters = [parameter for own in self.fake_optimizers for parameter in own.parameters]
        _, losses = self.gradients.add("fake", given, loss, self.fake, parameters)
        average_gradients(self.fake)
        for trained in self.objective.trained.values():
            average_gradients(trained.network)
            trained.optimizer.step(index)
        return {**losses, "fake_gradient_norm": self.fake_optimizer.step(index)}

    def generate_all(self, starts: Mapping[str, Start]) -> dict[str, Samples]:
        """Return the student's images for several streams from one forward pass."""
        inputs, times = zip(*map(self.student_input, starts.values()), strict=True)
        cond = Cond.cat(*(one.cond for one in starts.values()))
        images = self.forward(torch.cat(inputs), torch.cat(times), cond).split([len(one) for one in inputs])
        return {name: Samples(x, start.cond) for (name, start), x in zip(starts.items(), images, strict=True)}

    @torch.no_grad()
    def student_input(self, start: Start) -> tuple[Tensor, Tensor]:
        """Return what the student sees at its step `len(start.noise)`, f[B,*D], and that step's time, f[B]."""
        k = len(start.noise)
        x = self.steps.start(self.forward, self.student.schedule, start.z, start.cond, start.noise, k, start.real)
        return x, x.new_full((len(x),), self.steps.times[k])

    @torch.no_grad()
    def generate(self, start: Start) -> Samples:
        """Return the student's images for `start`, without graph."""
        with autocast(self.device, self.precision):
            return Samples(self.forward(*self.student_input(start), start.cond), start.cond)

    @torch.no_grad()
    def preview(self) -> Tensor:
        """Return the EMA student's samples of fixed noise, conditions in turn: 64, or 16 if they have to be decoded."""
        numbers, most = (range(64), 64) if self.decode is None else (range(16), 4)  # latents are of large networks
        z, *noise = (  # a seed that no pair uses
            rng.noise(self.seed + 1, numbers, self.info.shape, step).to(self.device) for step in range(len(self.steps))
        )
        cond = self.conditions.at(numbers)
        x = self.steps.sample(self.ema.network, self.student.schedule, z, cond and cond.to(self.device), noise, most)
        return imaging.picture(x if self.decode is None else self.decode(x))

    def export(self, folder: Path) -> None:
        save_model(folder, self.ema.network, self.info)


def _read(term: Term, samples: Mapping[str, Samples], balance: Balance | None = None) -> Samples:
    """Concatenate the images of the streams that `term` reads; a `balance` watches their gradients."""
    read = [samples[name] for name in term.reads]
    x = read[0].x if len(read) == 1 else torch.cat([one.x for one in read])
    return Samples(x if balance is None else balance.seen(term.name, x), Cond.cat(*(one.cond for one in read)))
