"""Builds all objects of a run from its recipe; the only file that knows both."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.data.embeddings import Embeddings, embed
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, PairStore, fingerprint, prompts_digest
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.conditions import Classes, Conditions, Guided, Prompts
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.losses import REGRESSIONS, WEIGHTINGS
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import Schedule
from distmatch.evaluation.measure import Space
from distmatch.evaluation.spaces import enough, find_spaces, of_its_images
from distmatch.methods.distill import Distiller
from distmatch.methods.terms import Match, NoiseStream, Objective, PairStream, Regress, Stream, Term, TermContext
from distmatch.models.diffusers.autoencoder import Decoded, tiny_decoder
from distmatch.models.family import Encoder
from distmatch.models.folder import NETWORKS
from distmatch.models.guidance import with_guidance
from distmatch.models.info import Info
from distmatch.models.library import components, family_of, find_model
from distmatch.recipe.entries import Evaluation, Optimiser, OwnTerm, Pairs, Recipe
from distmatch.recipe.entry import marked
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.paths import ASSETS, expand
from distmatch.system.progress import progress
from distmatch.training.ema import EMA, frozen_copy
from distmatch.training.engine import blocks, checkpoint_gradients, compile_blocks, replicate, shard, spread
from distmatch.training.optim import Optimizer


def device(name: str) -> torch.device:
    """Return the device; `auto` is CUDA if available, else the CPU. Raises `UserError` for an unavailable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()  # `meta` is also a device, but it cannot compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here = ["auto", "cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
        raise UserError(f"device {name!r} is not available here; use {' or '.join(here)}") from error
    return found


@dataclass(frozen=True)
class Subject:
    """What a recipe distils: the frozen teacher on its device, its samples' shape, and what they are conditioned on."""

    denoiser: Denoiser
    info: Info
    conditions: Conditions
    fingerprint: str
    prompts: Sequence[str] = ()
    cut: int = 0
    """Number of prompts that are longer than the text encoder accepts."""


def subject(recipe: Recipe, own: tuple[Denoiser, Info] | None = None) -> Subject:
    """Return the recipe's subject; `own` is your own teacher, used instead of the one that the recipe names."""
    denoiser, info = own or find_model(recipe.teacher, kind="teacher")
    for stage in [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]:
        for scale in _scales(stage):
            info.check_guidance(scale)
    dev = device(recipe.device)
    conditions, prompts, cut = Classes(len(info.classes)), [], 0
    if info.text:
        if recipe.prompts.path is None:
            raise UserError(
                f"teacher {recipe.teacher!r} makes images of prompts; name a file, e.g. prompts.path=prompts.txt"
            )
        prompts = read_prompts(Path(recipe.prompts.path), recipe.prompts.column)
        encoder = components(info, dev).encode
        assert encoder is not None
        cut = encoder.cut(prompts)
        conditions = Prompts(len(prompts), _encode(recipe, encoder, prompts))
    if recipe.student.guidance is not None:
        conditions = Guided(conditions, *recipe.student.guidance)
    return Subject(frozen(denoiser, dev), info, conditions, fingerprint(denoiser), prompts, cut)


def _scales(recipe: Recipe) -> list[float | None]:
    """Return the scales with which the recipe guides its teacher; `None` stands for a range."""
    if recipe.student.guidance is not None:
        return [None]
    by_term = {"match": recipe.match.guidance, "regress": recipe.pairs.guidance}
    return [by_term[term] for term in recipe.terms if term in by_term]


def _encode(recipe: Recipe, encoder: Encoder, prompts: Sequence[str]) -> Callable[[Sequence[int]], Cond]:
    """Map prompt numbers to conditions: encoded batch by batch, or from the cache, which is filled on first use."""
    place = recipe.prompts.cache
    if place is None:
        return lambda numbers: encoder([prompts[i] for i in numbers])

    @cache
    def states() -> Embeddings:
        folder = Path(place) / f"{encoder.fingerprint()[:16]}-{prompts_digest(prompts)[:16]}"
        with progress("prompts", len(prompts), unit="prompt") as advance:
            return embed(folder, prompts, encoder, advance)

    return lambda numbers: states()(numbers)


def recipe_spaces(evaluation: Evaluation, teacher: str, info: Info, device: torch.device) -> list[Space]:
    """Return the spaces in which the student is measured during training; none if the recipe names none.

    Raises `UserError` if they belong to other images than the teacher's, or if `evaluate.images` is too small for them.
    """
    name = evaluation.features
    if not evaluation.every or not name:
        return []
    packaged = not Path(name).is_dir() and (ASSETS / name).is_dir()
    if packaged and evaluation.reference is None and not of_its_images(info, ASSETS / name):
        raise UserError(
            f"evaluate.features is {name}, and the teacher {teacher} is not known to be of the same images. Set "
            "evaluate.features=FOLDER (`distmatch classifier IMAGES` makes one), or evaluate.every=0"
        )
    try:
        spaces = find_spaces(name, evaluation.reference, device=device, shape=info.shape)
    except UserError as error:
        raise UserError(f"evaluate.features {name}, evaluate.reference {evaluation.reference}: {error}") from error
    for _, real in spaces:
        enough(len(real.mu), evaluation.images, "images (evaluate.images)")
    return spaces


def frozen(denoiser: Denoiser, dev: torch.device) -> Denoiser:
    """Make `denoiser` a teacher: on its device, without dropout, never trained."""
    return denoiser.to(dev).eval().requires_grad_(False)


def pair_spec(recipe: Recipe, subject: Subject) -> PairSpec:
    """Return the description of the recipe's pair store."""
    info, guidances = subject.info, recipe.student.guidance
    asked = {name: getattr(recipe.pairs, name) for name in marked(Pairs, "pairs")}
    if guidances is not None:
        asked["guidance"] = None
    return PairSpec(
        teacher=recipe.teacher,
        fingerprint=subject.fingerprint,
        shard_size=asked.pop("shard"),
        shape=info.shape,
        classes=len(info.classes),
        scheduler=info.scheduler if asked["sampler"] == "pndm" else {},
        prompts=prompts_digest(subject.prompts) if subject.prompts else "",
        guidances=guidances,
        **asked,
    )


def pairs_folder(recipe: Recipe, spec: PairSpec, runs: Path) -> str:
    """Return `pairs.path` (a path or a URL), or a folder next to the runs, named by what distinguishes stores."""
    p = recipe.pairs
    if p.path is not None:
        return p.path
    teacher_name = Path(recipe.teacher).name.replace(":", "-")
    return str(runs / "pairs" / f"{teacher_name}-{p.sampler}{p.steps}-{spec.digest()[:8]}")


def pair_store(recipe: Recipe, subject: Subject, runs: Path) -> PairStore:
    """Return the recipe's pairs; missing ones, e.g. after an interrupted build, are built first."""
    spec = pair_spec(recipe, subject)
    folder = pairs_folder(recipe, spec, runs)
    with progress("pairs", spec.count, unit="pair") as advance:
        build(
            folder,
            spec,
            subject.denoiser,
            subject.conditions,
            prompts=subject.prompts,
            batch=recipe.pairs.batch,
            device=device(recipe.device),
            progress=advance,
        )
    return PairStore.open(folder, spec.fingerprint, spec.count)


def check_batches(recipe: Recipe) -> None:
    """Raise `UserError` if the processes cannot share a batch equally."""
    world = parallel.world()
    for name, batch in (("match", recipe.match.batch), ("regress", recipe.regress.batch)):
        if name in recipe.terms and batch % (recipe.accumulate * world):
            raise UserError(
                f"{name}.batch {batch} is not a multiple of accumulate {recipe.accumulate}"
                + (f" times {world} processes" if world > 1 else "")
                + "; choose one that is"
            )


def distiller(recipe: Recipe, subject: Subject, pairs: PairStore | None) -> Distiller:
    """Return the recipe's distillation. Student and fake score start as copies of one network, see `start`.

    Each of several processes holds its share; `parallel` says how networks are distributed over them.
    """
    check_batches(recipe)
    dev, info = device(recipe.device), subject.info
    first = start(recipe, subject)
    trained = student(recipe, first)
    fake = _trained_copy(first) if trains_fake(recipe) else None
    average = frozen_copy(trained)
    if recipe.gradient_checkpointing:
        for network in filter(None, (trained, fake)):
            checkpoint_gradients(network)
    if recipe.parallel == "fsdp" and parallel.world() > 1:
        shard(average)
        shard(subject.denoiser, recipe.precision)  # in the fake score's precision: their difference must start at zero
    inputs = example(subject, dev)
    forward = spread(trained, recipe.parallel, recipe.precision, inputs)
    score = fake
    # DDP needs one forward pass per backward pass. If own terms also use the fake score, the distiller averages its
    # gradients instead.
    if fake is not None and (recipe.parallel == "fsdp" or set(recipe.terms) <= TERMS.keys()):
        score = spread(fake, recipe.parallel, recipe.precision, inputs)
    if recipe.compile:
        for network in filter(None, (trained, fake, subject.denoiser)):
            compile_blocks(network)
    return Distiller(
        trained,
        score,
        objective(recipe, subject, score, pairs),
        _optimizer(recipe.student.optimizer, trained, recipe.steps),
        None if fake is None else _optimizer(recipe.fake.optimizer, fake, recipe.steps * recipe.fake.steps),
        info=student_info(recipe, subject),
        teacher=subject.denoiser,
        forward=forward,
        process=(parallel.rank(), parallel.world()),
        conditions=subject.conditions,
        decode=components(info, dev).decode if info.latent else None,
        steps=student_steps(recipe, subject.denoiser.schedule),
        ema=EMA(trained, recipe.student.ema, average),
        seed=recipe.seed,
        fake_updates=recipe.fake.steps,
        accumulate=recipe.accumulate,
        precision=recipe.precision,
    )


def start(recipe: Recipe, subject: Subject) -> Denoiser:
    """Return what student and fake score start from: the teacher (Algorithm 1, line 2) or the recipe's own new network.

    A new network takes over the teacher's schedule and prediction. If the student takes a guidance scale, so does the
    fake score: it models the student's images at each scale. Raises `UserError` if the teacher does not allow this.
    """
    denoiser = _network(recipe, subject.denoiser, subject.info)
    if recipe.student.guidance is None:
        return denoiser
    return Denoiser(with_guidance(denoiser.net), denoiser.schedule, denoiser.prediction).to(device(recipe.device))


def _network(recipe: Recipe, denoiser: Denoiser, info: Info) -> Denoiser:
    network = recipe.student.network
    if network is None:
        if next(denoiser.parameters(), None) is None:
            raise UserError(
                f"teacher {recipe.teacher!r} has no weights that the student could start from; "
                "give the student a network of its own, e.g. student.network={type: mlp}"
            )
        return denoiser
    if len(info.shape) != 1:
        raise UserError(f"student.network {network.type!r} is for points; this teacher makes samples of {info.shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(recipe.seed, "network"))
        net = NETWORKS[network.type](dim=info.shape[0], width=network.width, depth=network.depth)
    return Denoiser(net, denoiser.schedule, denoiser.prediction).to(device(recipe.device))


def student(recipe: Recipe, first: Denoiser) -> Denoiser:
    """Return the network to train: a copy of `first` (see `start`) or of `student.init`, with adapters if it has any.

    Raises `UserError` for a network that does not fit the recipe's entries.
    """
    made = _trained_copy(first if recipe.student.init is None else _earlier(recipe, first, device(recipe.device)))
    if recipe.student.lora_rank:
        made = _adapted(made, recipe.student.lora_rank, rng.key(recipe.seed, "adapters"))
    if (recipe.gradient_checkpointing or recipe.compile) and not blocks(made):
        raise UserError(
            f"gradient_checkpointing and compile are for networks of blocks, in nn.ModuleList; "
            f"{type(made.net).__name__} has none: use false"
        )
    return made


def student_info(recipe: Recipe, subject: Subject) -> Info:
    """Return what the student's model folder records about it."""
    times = student_steps(recipe, subject.denoiser.schedule).times
    card: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if subject.prompts:
        card["prompts"] = {"count": len(subject.prompts), "cut": subject.cut}
    if "pixels" in subject.info.card:
        card["pixels"] = subject.info.card["pixels"]  # which images it makes: `eval` compares like with like
    return replace(subject.info, times=times, guidance=recipe.student.guidance, card=card)


def student_steps(recipe: Recipe, schedule: Schedule) -> Steps:
    """Return the student's times. Raises `UserError` if one is outside the schedule."""
    times = (schedule.t_max,) if recipe.student.times is None else recipe.student.times
    if not all(schedule.t_min < t <= schedule.t_max for t in times):
        said = ", ".join(f"{t:g}" for t in times)
        raise UserError(
            f"student.times is {said}; the teacher's times go from {schedule.t_min:g} to {schedule.t_max:g}"
        )
    return Steps(times)


def _earlier(recipe: Recipe, denoiser: Denoiser, dev: torch.device) -> Denoiser:
    """Load the student `student.init`. Raises `UserError` if its network differs from that of `denoiser`."""
    assert recipe.student.init is not None
    student, _ = find_model(recipe.student.init, kind="student")
    here, there = ({k: v.shape for k, v in m.state_dict().items()} for m in (denoiser, student))
    if here != there:
        raise UserError(f"student.init {recipe.student.init!r} has another network than the teacher {recipe.teacher!r}")
    return student.to(dev)


def _adapted(denoiser: Denoiser, rank: int, seed: int) -> Denoiser:
    """Add adapters of `rank` to the student; only they are trained."""
    with_adapters: Callable[[int], nn.Module] | None = getattr(denoiser.net, "with_adapters", None)
    if with_adapters is None:
        raise UserError(f"student.lora_rank {rank} is for Stable Diffusion's networks; use 0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # identical in every process
        net = with_adapters(rank)
    return Denoiser(net, denoiser.schedule, denoiser.prediction)


def example(subject: Subject, dev: torch.device) -> tuple[Tensor, Tensor, Cond | None]:
    """Return an example input of student and fake score, a batch of one: `(x, t, cond)`."""
    cond = subject.conditions.at([0])
    return torch.zeros(1, *subject.info.shape, device=dev), torch.ones(1, device=dev), cond and cond.to(dev)


def _trained_copy(denoiser: Denoiser) -> Denoiser:
    """Return a copy to train. It stays in evaluation mode: dropout is off in distillation."""
    return copy.deepcopy(denoiser).eval().requires_grad_(True)


def _optimizer(settings: Optimiser, network: nn.Module, steps: int) -> Optimizer:
    return Optimizer(
        network.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        steps=steps,
        decay=settings.decay,
        clip=settings.clip,
    )


def objective(
    recipe: Recipe,
    subject: Subject,
    fake: nn.Module | None,
    pairs: PairStore | None,
    before: Objective | None = None,
) -> Objective:
    """Return the recipe's terms, in its order, and the streams that they read.

    Own terms of the stage `before` continue with the networks they train: no stage changes them.
    """
    kept = {term.name: term for term in before.terms if term.name not in TERMS} if before else {}
    terms = [kept.get(name) or TERMS.get(name, own_term)(recipe, subject, fake, name) for name in recipe.terms]
    streams = [STREAMS[name](recipe, subject, pairs) for name in dict.fromkeys(n for t in terms for n in t.reads)]
    made = Objective({stream.name: stream for stream in streams}, terms)
    for trained in made.trained.values():
        replicate(trained.network)
    return made


def trains_fake(recipe: Recipe) -> bool:
    """Return whether a term of the recipe trains the fake score."""
    own = (own_class(recipe.own_terms[name]) for name in recipe.terms if name not in TERMS)
    return "match" in recipe.terms or any(hasattr(kind, "fake_loss") for kind in own)


def reads_pairs(recipe: Recipe) -> bool:
    """Return whether a term of the recipe reads the teacher's pairs."""
    own = (own_class(recipe.own_terms[name]) for name in recipe.terms if name not in TERMS)
    return "regress" in recipe.terms or any("pairs" in getattr(kind, "reads", ()) for kind in own)


def own_class(entry: OwnTerm) -> type:
    """Import the class of your own term. Raises `UserError` if that fails."""
    place, _, name = entry.source.partition(":")
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
    except (ImportError, OSError, SyntaxError, AttributeError) as error:
        raise UserError(
            f"own_terms: source {entry.source!r} cannot be imported ({type(error).__name__}: {error}); expected "
            "MODULE:CLASS or FILE.py:CLASS"
        ) from error


def own_term(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    """Make your own term. Raises `UserError` if its class cannot be imported or does not accept its entries."""
    entry = recipe.own_terms[name]
    steps = recipe.steps * recipe.fake.steps
    context = TermContext(
        name=name,
        teacher=subject.denoiser,
        fake=fake,
        shape=subject.info.shape,
        device=device(recipe.device),
        optimizer=lambda network: _optimizer(recipe.fake.optimizer, network, steps),
        seed=recipe.seed,
    )
    arguments = entry.model_extra or {}
    try:
        return own_class(entry)(context, **arguments)
    except TypeError as error:
        raise UserError(f"own_terms.{name}: {entry.source} does not take {arguments}: {error}") from error


def _noise(recipe: Recipe, subject: Subject, pairs: PairStore | None) -> Stream:
    shape, dev = subject.info.shape, device(recipe.device)
    return NoiseStream(shape, subject.conditions, recipe.match.batch, dev)


def _pairs(recipe: Recipe, subject: Subject, pairs: PairStore | None) -> Stream:
    assert pairs is not None
    return PairStream(pairs, subject.conditions, recipe.regress.batch, device(recipe.device))


STREAMS = {"noise": _noise, "pairs": _pairs}


def _match(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    assert fake is not None
    m = recipe.match
    return Match(
        subject.denoiser,
        fake,
        weighting=WEIGHTINGS[m.weighting],
        weight=m.weight,
        reads=("noise", "pairs") if m.pairs and reads_pairs(recipe) else ("noise",),
        bins=m.bins,
        min_step=m.min_step,
        max_step=m.max_step,
        guidance=m.guidance if recipe.student.guidance is None else None,
    )


def _regress(recipe: Recipe, subject: Subject, fake: nn.Module | None, name: str) -> Term:
    return Regress(regression(recipe, subject.info), recipe.regress.weight)


TERMS = {"match": _match, "regress": _regress}


def regression(recipe: Recipe, info: Info) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the distance of Eq. 9 between images; latents are decoded first if the recipe names a decoder."""
    r = recipe.regress
    loss = REGRESSIONS.get(r.loss)
    if loss is None:
        from distmatch.models.perceptual import Lpips  # needs the `metrics` extra

        loss = _kept(Lpips, r.weights, r.size)
    if r.decoder == "none":
        return loss
    if not info.latent:
        raise UserError(f"regress.decoder {r.decoder!r} is for latents; {recipe.teacher!r} makes images: use none")
    if r.decoder == "tiny":
        source, make = r.tiny, tiny_decoder
    else:
        source, make = info.source, family_of(info).decoder
    decoder = _kept(make, source, recipe.gradient_checkpointing).to(device(recipe.device))
    channels = decoder.vae.config.latent_channels
    if channels != info.shape[0]:
        raise UserError(
            f"{source} decodes latents of {channels} channels; those of {recipe.teacher!r} are {info.shape}"
        )
    return Decoded(loss, decoder)


@cache
def _kept(kind: Callable[..., Any], *arguments: Any) -> Any:
    """Return `kind(*arguments)`, made only once: stages share their frozen networks."""
    return kind(*arguments)
