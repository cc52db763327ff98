"""Runs one training step on fake tensors (shapes without data) to count FLOPs per network and peak memory.

`build.distiller` makes the recipe's distillation from networks without weights, and `update_student` and `update_fake`
run as in training, while a `Ledger` follows every tensor from creation to release and counts the FLOPs of every matrix
product.
"""

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.conditions import WHOLE, Share
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.methods import guide
from distmatch.methods.adversarial import Adversarial
from distmatch.methods.distill import Distiller
from distmatch.methods.terms import Start
from distmatch.models import attention
from distmatch.models.diffusers import flow
from distmatch.models.diffusers.autoencoder import Decoder
from distmatch.models.info import Info
from distmatch.models.library import family_of
from distmatch.planning.ledger import LOSSES, Ledger, replace_data
from distmatch.planning.weightless import regression
from distmatch.recipe import build, subjects
from distmatch.recipe.entries import Recipe
from distmatch.system.garbage import no_collection
from distmatch.training.engine import blocks


@dataclass(frozen=True)
class Rehearsal:
    """What one process did in a step, and the networks of that step, without data.

    Args:
        networks: student, fake score, GAN head, teacher and average, under these names, if the recipe has them.
        losses: frozen networks of the regression loss.
        flops, kernels: of one part of the step; FLOPs by network, and how many operations compute something.
        gradients, activations: bytes at the time of peak memory; activations are everything that is neither a gradient
            nor was there before the step.
        most_activations: the largest value of these at any time.
        pictures: bytes at the peak of a preview, when there is neither; with the decoder, unless it is always there.
        rolled: passes of the student, on average, that roll noise to the step that is trained, per batch of images.
    """

    networks: dict[str, nn.Module]
    losses: list[nn.Module]
    flops: Counter[str]
    kernels: int
    gradients: int
    activations: int
    most_activations: int
    pictures: int
    rolled: float


def rehearse(
    recipe: Recipe, denoiser: Denoiser, info: Info, parts: int, sharded: bool = False, once: bool = False
) -> Rehearsal:
    """Run a step of `recipe` in one process, on one of `parts` equal parts of its batches at a time.

    Args:
        denoiser: the teacher; its weights are not used.
        sharded: give the weights of student and fake score the precision in which FSDP2 gathers them.
        once: leave out what takes no more memory: further updates of the fake score, and the student's rollout.
    """
    ledger = Ledger()
    ready(denoiser)
    with (
        no_collection(),  # a fifth of the time: a step has many objects
        _in_place(),
        _light_copies(),
        patch.multiple(Decoder, one_by_one=_alike(ledger)),
        patch.multiple(dist, is_initialized=lambda: False),  # processes that share a run do not share its rehearsal
        patch.multiple(guide, cleaner=lambda schedule, bins, t: bins),  # levels without data cannot be compared
        _longest_texts(),
        ledger,
    ):
        stage = _Stage(recipe, denoiser, info, parts, sharded)
        head = next((term.head for term in stage.distiller.terms if isinstance(term, Adversarial)), None)
        trained = {"student": stage.distiller.student, "fake score": stage.distiller.fake, "GAN head": head}
        networks = {name: n for name, n in {**trained, "teacher": stage.teacher}.items() if n is not None}
        held = ledger.start(networks)
        for term in stage.distiller.terms:
            if isinstance(term, Adversarial):
                judge = "fake score" if recipe.gan.features == "fake" else "teacher"
                for number in term.blocks:
                    ledger.enter(judge, blocks(networks[judge])[number])
        arithmetic = nullcontext if recipe.device == "cpu" else _gpu_autocast
        with arithmetic():
            flops, kernels = stage.run(ledger, once)
        drawn = (recipe.accumulate - 1) * stage.drawn  # for the parts that were not run
        peak, gradients = ledger.peak, ledger.gradients_then
        if recipe.accumulate > 1:
            peak, gradients = ledger.later_peak, ledger.later_gradients
        with arithmetic():
            pictures = stage.pictures(ledger)
    return Rehearsal(
        {**networks, "average": stage.distiller.ema.network},
        stage.losses,
        flops,
        kernels,
        gradients,
        drawn + peak - gradients - held,
        drawn + ledger.peak_without_gradients - held,
        pictures,
        stage.rolled,
    )


def evaluated(denoiser: Denoiser, info: Info) -> tuple[float, int]:
    """Return the FLOPs of one evaluation of one sample, and its kernels, which are those of a batch as well."""
    ready(denoiser)
    ledger = Ledger()
    with _in_place(), _light_copies(), _longest_texts(), ledger, torch.no_grad():
        twin = _emptied(denoiser)
        cond = family_of(info).example_cond(twin.net, info, 1)
        ledger.kernels = 0
        twin(torch.empty(1, *info.shape), torch.empty(1), cond)
    return ledger.flops.total(), ledger.kernels


def encoding_peak(encoder: nn.Module, prompts: int, tokens: int, precision: torch.dtype) -> int:
    """Return the most bytes that a text encoder takes, besides its weights, for `prompts` of `tokens` each.

    Args:
        encoder: one of transformers' text encoders, on the meta device. It keeps the states of all its layers, as most
            pipelines ask it to.
        tokens: if the encoder takes fewer, as CLIP's, it gets as many as it takes.
    """
    tokens = min(tokens, getattr(encoder.config, "max_position_embeddings", tokens))  # pyright: ignore
    encoder, ledger = copy.deepcopy(encoder).to(precision), Ledger()
    with _in_place(), _light_copies(), ledger, torch.no_grad():
        twin = _emptied(encoder)
        held = ledger.start({})
        _ = twin(torch.empty(prompts, tokens, dtype=torch.long), output_hidden_states=True)
    return ledger.peak - held


@contextmanager
def _gpu_autocast() -> Iterator[None]:
    """Autocast to bf16 as on GPUs, where normalisations compute and return fp32, weights are cast once per update, and
    attention is always fused.

    See "CUDA Ops that can autocast to float32" in PyTorch's documentation of `torch.amp`.
    """

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return run

    cache = torch.set_autocast_cache_enabled
    with ExitStack() as stack:
        norms: dict[str, Any] = {name: in_fp32(getattr(F, name)) for name in ("group_norm", "layer_norm", "rms_norm")}
        stack.enter_context(patch.multiple(F, **norms))
        stack.enter_context(patch.multiple(attention, SHORT=0))
        stack.enter_context(patch.multiple(torch, set_autocast_cache_enabled=lambda enabled: cache(True)))
        yield


def ready(denoiser: Denoiser) -> None:
    """Build tables that are cached for good: built inside a `Ledger` they would have no data."""
    ones = torch.ones(1)
    denoiser.schedule.add_noise(ones, ones, ones)
    denoiser.prediction.inputs(ones, ones, ones)


def _in_place() -> AbstractContextManager:
    """Modules stay where they are: PyTorch cannot move modules of tensors without data, and none has to be moved."""
    return patch.multiple(nn.Module, _apply=lambda self, fn, recurse=True: self)


def _light_copies() -> AbstractContextManager:
    """Copy modules without a deep copy of each of the dozen empty containers in each, which takes most of the time.

    Tensors that are neither parameters nor buffers, such as tables of positions, are shared: they do not change.
    """

    def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        memo[id(module)] = made = module.__class__.__new__(module.__class__)
        for name, value in vars(module).items():
            if type(value) is Tensor:
                made.__dict__[name] = value
            elif type(value) in (dict, OrderedDict) and not value:
                made.__dict__[name] = type(value)()
            else:
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made

    return patch.multiple(nn.Module, create=True, __deepcopy__=copied)


def _longest_texts() -> AbstractContextManager:
    """Let all texts be as long as they may be: masks without data cannot be counted."""
    return patch.multiple(flow, lengths=lambda mask: [mask.shape[1]] * len(mask))


def _alike(ledger: Ledger) -> Callable[[Decoder, Tensor], Tensor]:
    """Decode only the first and the last image of a batch: what is between costs as much as the first."""

    def run(decoder: Decoder, z: Tensor) -> Tensor:
        first, *between = z.split(1)
        before, kernels = ledger.flops[LOSSES], ledger.kernels
        images = [decoder.decode(first)]
        spent, launched = ledger.flops[LOSSES] - before, ledger.kernels - kernels
        if between:
            images += [torch.empty_like(images[0]) for _ in between[1:]]
            images.append(decoder.decode(between[-1]))
            ledger.flops[LOSSES] += spent * len(between[1:])
            ledger.kernels += launched * len(between[1:])
        return torch.cat(images)

    return run


class _Stage:
    """A recipe's distillation, set up for a rehearsal of one part of one process's share. Of the other parts, what is
    drawn in advance is in memory as well: `drawn` bytes per part.
    """

    drawn = 0

    def __init__(self, recipe: Recipe, denoiser: Denoiser, info: Info, parts: int, sharded: bool):
        self.recipe, self.info = recipe, info
        self.match, self.regress = recipe.match.batch // parts, recipe.regress.batch // parts
        self.teacher = _emptied(denoiser)
        plain = recipe.model_copy(
            update={
                "device": "cpu",
                "compile": False,
                "cuda_graphs": False,
                "workers": 1,  # threads would leave the ledger
                "accumulate": 1,
                "match": recipe.match.model_copy(update={"batch": self.match, "intervals": False}),
                "regress": recipe.regress.model_copy(update={"batch": self.regress, "loss": "mse", "decoder": "none"}),
                "student": recipe.student.model_copy(update={"init": None, "times": None, "nfe": None}),
            }
        )
        no_pairs: Any = object()
        plain_info, cpu = replace(info, source=""), torch.device("cpu")
        real: Any = _Reals(self.example, info.shape)
        subject = subjects.Subject(self.teacher, plain_info, _Examples(self.example), "", cpu, real=real)
        self.distiller: Distiller = build.distiller(plain, subject, no_pairs)
        batches = {"noise": self.match, "pairs": self.regress}
        streams = {n: _Inputs(self.example, n, batches[n], info.shape) for n in self.distiller.objective.streams}
        self.distiller.objective = replace(self.distiller.objective, streams=streams)
        # Of a student of several steps, a random one is trained: on average, fresh noise is rolled this far to it.
        count = recipe.student.nfe or len(recipe.student.times or (0,))
        rolls = count > 1 and recipe.student.inputs == "rollout"
        self.rolled = (count - 1 + ("pairs" in streams)) / 2 if rolls else 0.0
        self.losses: list[nn.Module] = []
        for term in self.distiller.terms:
            if term.name == "regress":
                regress: Any = term
                regress.loss, self.losses = regression(recipe, info)
        if sharded and recipe.precision == "bf16":  # FSDP2 gathers them in this precision, and autocast makes no copies
            for network in filter(None, (self.distiller.student, self.distiller.fake)):
                for parameter in network.parameters():
                    replace_data(parameter, parameter.data.bfloat16())

    def run(self, ledger: Ledger, once: bool) -> tuple[Counter[str], int]:
        """Run one step; return the FLOPs of one part of it, by network, and its kernels. See `rehearse`."""
        before, ledger.kernels = ledger.alive, 0
        parts = [self.distiller.draw(0, WHOLE)]
        images_too = 4 * (self.match + self.regress) * math.prod(self.info.shape)
        self.drawn = ledger.alive - before + images_too
        images, _ = self.distiller.update_student(0, parts)
        ledger.updated()
        again: Counter[str] = Counter()
        kernels_again = 0
        if self.distiller.fake is not None:
            self.distiller.update_fake(0, parts, images)
            ledger.updated()
            if self.recipe.fake.steps > 1 and not once:  # further updates are like the second, which makes new images
                before, kernels = Counter(ledger.flops), ledger.kernels
                for part, made in zip(parts, images, strict=True):
                    self.distiller.renew(part, made, 0, 1, WHOLE)
                ledger.updated()
                self.distiller.update_fake(1, parts, images)
                ledger.updated()
                again, kernels_again = ledger.flops - before, ledger.kernels - kernels
                ledger.flops, ledger.kernels = before, kernels
        names = dict.fromkeys([*ledger.flops, *again])
        more = self.recipe.fake.steps - 1
        flops = Counter({name: ledger.flops[name] + more * again[name] for name in names})
        launched = ledger.kernels + more * kernels_again
        if self.rolled and not once:
            before, kernels = Counter(ledger.flops), ledger.kernels
            self.distiller.generate(parts[0].starts["noise"])
            rolls = self.rolled * (self.recipe.fake.steps if self.distiller.fake is not None else 1)
            flops["student"] += round(rolls * (ledger.flops - before)["student"])
            launched += round(rolls * (ledger.kernels - kernels))
        return flops, launched

    def pictures(self, ledger: Ledger) -> int:
        """Return the most bytes alive at once, besides those that are now, while a preview is made and decoded."""
        if len(self.info.shape) != 3:
            return 0
        before = ledger.alive
        if self.info.latent:
            self.distiller.decode = _emptied(family_of(self.info).decoder(self.info.source, weights=False))
        held = 0 if subjects.offloaded(self.recipe) else ledger.alive - before
        return ledger.most(self.distiller.preview) - before - held

    def example(self, n: int) -> Cond | None:
        return subjects.example_cond(self.teacher, self.info, n, self.recipe.student.guidance is not None)


@dataclass
class _Examples:
    """Conditions without data; see `conditions.Conditions`."""

    example: Callable[[int], Cond | None]

    def at(self, numbers: Sequence[int]) -> Cond | None:
        return self.example(len(numbers))

    def draw(self, n: int, generator: torch.Generator, share: Share = WHOLE) -> Cond | None:
        return self.example(n)


@dataclass
class _Reals:
    """Real images without data; see `data.reals.Reals`."""

    example: Callable[[int], Cond | None]
    shape: tuple[int, ...]

    def draw(self, n: int, generator: torch.Generator, share: Share) -> tuple[Tensor, Cond | None]:
        return torch.empty(n, *self.shape), self.example(n)


@dataclass
class _Inputs:
    """A stream without data; see `terms.Stream`."""

    example: Callable[[int], Cond | None]
    name: str
    batch: int
    shape: tuple[int, ...]

    @property
    def fresh(self) -> bool:
        return self.name == "noise"

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        z, y = (torch.empty(self.batch, *self.shape) for _ in range(2))
        return Start(z, self.example(self.batch), self.batch, torch.Generator(), None if self.fresh else y)


def _emptied(network: Any) -> Any:
    """Return a frozen copy of `network` whose tensors are empty."""
    copies: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        copies[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, copies).eval().requires_grad_(False)
