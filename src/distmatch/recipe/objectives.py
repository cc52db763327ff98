"""Builds a recipe's objective: the streams, the paper's terms, and your own terms."""

import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.data.pairs import PairStore
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.losses import REGRESSIONS, WEIGHTINGS
from distmatch.methods.adversarial import Adversarial, Settings
from distmatch.methods.guide import Guide
from distmatch.methods.identity import Identity
from distmatch.methods.intervals import intervals
from distmatch.methods.own_terms import TermContext
from distmatch.methods.real_stream import RealStream
from distmatch.methods.shared import Shared
from distmatch.methods.terms import Match, NoiseStream, Objective, PairStream, Regress, Stream, Term
from distmatch.models.diffusers.autoencoder import Decoded, tiny_decoder
from distmatch.models.info import Info
from distmatch.models.library import family_of
from distmatch.recipe.entries import Recipe
from distmatch.recipe.steps import student_steps
from distmatch.recipe.subjects import Subject, example
from distmatch.system.errors import UserError
from distmatch.system.paths import expand
from distmatch.training.engine import replicate
from distmatch.training.optim import Optimizer


def objective(
    recipe: Recipe,
    subject: Subject,
    fake: nn.Module | None,
    pairs: PairStore | None,
    before: Objective | None = None,
) -> Objective:
    """Return the recipe's terms, in its order, and the streams that they read.

    Terms that train networks of their own continue with these from the stage `before`.
    """
    kept = (
        {term.name: term for term in before.terms if term.name not in ("match", "guide", "regress")} if before else {}
    )
    terms = {
        name: kept[name] if name in kept else TERMS.get(name, own_term)(recipe, subject, fake, name)
        for name in recipe.terms
    }
    names = dict.fromkeys(stream for term in terms.values() for stream in term.reads)
    streams = [STREAMS[name](recipe, subject, pairs) for name in names]
    balance = None
    if "gan" in terms:
        gan: Any = terms["gan"]
        gan.weight, balance = recipe.gan.weight, gan.balance
        if recipe.match.divergence != "reverse_kl":
            match: Any = terms["match"]
            match.factor = gan.factor
    made = Objective({stream.name: stream for stream in streams}, list(terms.values()), balance)
    if before is None:  # later the processes' copies stay equal by themselves
        for trained in made.trained.values():
            replicate(trained.network)
    return made


def trains_fake(recipe: Recipe) -> bool:
    """Return whether a term of the recipe trains the fake score."""
    return "match" in recipe.terms or any(hasattr(kind, "fake_loss") for kind in _own_classes(recipe))


def reads_pairs(recipe: Recipe) -> bool:
    """Return whether a term of the recipe reads the teacher's pairs."""
    return "regress" in recipe.terms or any("pairs" in getattr(kind, "reads", ()) for kind in _own_classes(recipe))


def _own_classes(recipe: Recipe) -> list[type]:
    """Return the classes of your own terms that the recipe uses."""
    return [own_class(recipe.own_terms[name].source) for name in recipe.terms if name not in TERMS]


@cache  # a file must run only once: each run of it makes another class
def own_class(source: str) -> type:
    """Import the class of your own term. Raises `UserError` if that fails, whatever the file raises."""
    place, _, name = source.partition(":")
    try:
        if place.endswith(".py"):
            spec = spec_from_file_location(Path(place).stem, expand(place))
            assert spec is not None
            assert spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = import_module(place)
        return getattr(module, name)
    except Exception as error:
        raise UserError(
            f"own_terms: source {source!r} cannot be imported ({_raised(error)}); expected MODULE:CLASS or "
            "FILE.py:CLASS"
        ) from error


def _raised(error: Exception) -> str:
    """Return what was raised, and the last line of code on the way there: it is the user's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, in {last.filename}, line {last.lineno}"


def own_term(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    """Make your own term. Raises `UserError` if its class cannot be imported or does not accept its entries."""
    entry = recipe.own_terms[name]
    steps = recipe.steps * recipe.fake.steps
    context = TermContext(
        name=name,
        teacher=subject.denoiser,
        fake=fake,
        shape=subject.info.shape,
        device=subject.device,
        optimizer=lambda network: Optimizer(network.parameters(), steps=steps, **recipe.fake.optimizer.model_dump()),
        seed=recipe.seed,
    )
    kind, arguments = own_class(entry.source), entry.model_extra or {}
    try:
        signature(kind).bind(context, **arguments)
    except TypeError as error:
        raise UserError(f"own_terms.{name}: {entry.source} does not take {arguments}: {error}") from error
    try:
        return kind(context, **arguments)
    except Exception as error:
        raise UserError(f"own_terms.{name}: {entry.source} raised {_raised(error)}") from error


def _noise(recipe: Recipe, subject: Subject, pairs: PairStore | None) -> Stream:
    shape, dev = subject.info.shape, subject.device
    if recipe.student.inputs == "data":
        assert subject.real is not None
        return RealStream(shape, subject.conditions, recipe.match.batch, dev, reals=subject.real)
    return NoiseStream(shape, subject.conditions, recipe.match.batch, dev)


def _pairs(recipe: Recipe, subject: Subject, pairs: PairStore | None) -> Stream:
    assert pairs is not None
    return PairStream(pairs, subject.conditions, recipe.regress.batch, subject.device)


STREAMS = {"noise": _noise, "pairs": _pairs}


def _match(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    assert fake is not None
    m = recipe.match
    settings: dict[str, Any] = {
        "weighting": WEIGHTINGS[m.weighting],
        "weight": m.weight,
        "reads": ("noise", "pairs") if m.pairs and reads_pairs(recipe) else ("noise",),
        "bins": m.bins,
        "steps": (m.min_step, m.max_step),
        "real": guided(subject.denoiser, 1.0 if "guide" in recipe.terms else recipe.scale(m.guidance), m.rescale),
    }
    if m.sid is not None:
        term = Identity(subject.denoiser, fake, m.sid, **settings)
    else:
        term = (Shared if m.shared else Match)(subject.denoiser, fake, **settings)
    if m.intervals:
        times = student_steps(recipe, subject.denoiser.schedule).times
        term.spans = intervals(term.schedule, times, m.bins, (m.min_step, m.max_step))
    return term


def _guide(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    g = recipe.guide
    if subject.info.condition == "none":
        raise UserError(f"the term guide needs classes or prompts to guide by; teacher {recipe.teacher!r} has neither")
    return Guide(
        subject.denoiser,
        guidance=recipe.scale(g.guidance),
        weighting=WEIGHTINGS[g.weighting],
        times=student_steps(recipe, subject.denoiser.schedule).times,
        weight=g.weight,
        bins=recipe.match.bins,
        steps=(g.min_step, g.max_step),
    )


def _regress(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    return Regress(regression(recipe, subject), recipe.regress.weight)


def _gan(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    assert fake is not None
    assert subject.real is not None
    g, m = recipe.gan, recipe.match
    settings = Settings(
        weight=g.weight,
        head_weight=g.head_weight,
        r1=g.r1,
        r1_noise=g.r1_noise,
        bins=m.bins,
        steps=(g.min_step, m.bins if g.max_step is None else g.max_step),
        blocks=g.blocks,
        balance=g.balance,
        divergence=m.divergence if m.divergence != "reverse_kl" else None,
    )
    own, steps = g.optimizer or recipe.fake.optimizer, recipe.steps * recipe.fake.steps
    return Adversarial(
        fake if g.features == "fake" else subject.denoiser,
        subject.real,
        settings,
        example=example(subject, recipe.student.guidance is not None),
        optimizer=lambda head: Optimizer(head.parameters(), steps=steps, **own.model_dump()),
        seed=recipe.seed,
        owner="the fake score" if g.features == "fake" else "the teacher",
    )


TERMS = {"match": _match, "guide": _guide, "regress": _regress, "gan": _gan}


def regression(recipe: Recipe, subject: Subject) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the distance of Eq. 9 between images; latents are decoded first if the recipe names a decoder."""
    r, info = recipe.regress, subject.info
    loss = REGRESSIONS.get(r.loss)
    if loss is None:
        loss = _lpips(r.weights, r.size)
    if r.decoder == "none":
        return loss
    check_latents(recipe, info)
    if r.decoder == "tiny":
        source, make = r.tiny, tiny_decoder
    else:
        source, make = info.source, family_of(info).decoder
    decoder = _decoder(make, source, recipe.gradient_checkpointing, subject.device)
    check_latents(recipe, info, decoder.channels)
    return Decoded(loss, decoder)


def check_latents(recipe: Recipe, info: Info, channels: int | None = None) -> None:
    """Raise `UserError` unless the teacher has latents for the decoder of the loss, of so many `channels` if given."""
    r = recipe.regress
    if not info.latent:
        raise UserError(f"regress.decoder {r.decoder!r} is for latents; {recipe.teacher!r} makes images: use none")
    if channels not in (None, info.shape[0]):
        source = r.tiny if r.decoder == "tiny" else info.source
        raise UserError(
            f"{source} decodes latents of {channels} channels; those of {recipe.teacher!r} are {info.shape}"
        )


@cache
def _decoder(make: Callable[..., Any], source: str, recompute: bool, device: torch.device) -> Any:
    """Return the decoder on `device`, made only once for each."""
    return make(source, recompute).to(device)


@cache
def _lpips(weights: str | None, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS, made only once: stages share their frozen networks."""
    from distmatch.models.perceptual import Lpips  # needs the `metrics` extra

    return Lpips(weights, size)
