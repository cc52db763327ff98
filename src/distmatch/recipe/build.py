"""Builds what a recipe trains with: pairs, networks, optimizers, the distiller."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from distmatch.data.pair_builder import build
from distmatch.data.pairs import MANIFEST, PairSpec, PairStore, prompts_digest
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.sampler import SAMPLERS
from distmatch.diffusion.solvers import evaluations
from distmatch.methods.distill import Distiller, Networks, Settings
from distmatch.models.folder import NETWORKS
from distmatch.models.guidance import GuidanceInput, with_guidance
from distmatch.models.info import Info
from distmatch.models.library import find_model
from distmatch.recipe.entries import Pairs, Recipe
from distmatch.recipe.entry import marked
from distmatch.recipe.network_entries import Adapter as AdapterEntries
from distmatch.recipe.network_entries import Optimiser
from distmatch.recipe.objectives import objective, trains_fake
from distmatch.recipe.steps import student_steps
from distmatch.recipe.subjects import Subject, components_of, example, records_graphs
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.progress import console, progress
from distmatch.system.screen import counted, size
from distmatch.system.storage import Folder, is_url
from distmatch.system.workers import Workers
from distmatch.training.adapters import Adapted, Adapter
from distmatch.training.ema import EMA, frozen_copy
from distmatch.training.engine import blocks, checkpoint_gradients, compile_blocks, shard, spread
from distmatch.training.optim import Optimizer
from distmatch.training.rounded import hold


def pair_spec(recipe: Recipe, subject: Subject) -> PairSpec:
    """Return the description of the recipe's pair store."""
    info = subject.info
    asked = {name: getattr(recipe.pairs, name) for name in marked(Pairs, "pairs")}
    asked["guidance"] = recipe.scale(asked["guidance"])
    return PairSpec(
        teacher=recipe.teacher,
        fingerprint=subject.fingerprint,
        shard_size=asked.pop("shard"),
        shape=info.shape,
        classes=len(info.classes),
        scheduler={} if asked["sampler"] in SAMPLERS else info.scheduler,
        prompts=prompts_digest(subject.prompts) if subject.prompts else "",
        guidances=recipe.student.guidance,
        encoders=subject.encoders,
        **asked,
    )


def pairs_folder(recipe: Recipe, spec: PairSpec, runs: Path) -> str:
    """Return `pairs.path` (a path or a URL), or a folder next to the runs, named by what distinguishes stores."""
    p = recipe.pairs
    if p.path is not None:
        return p.path
    teacher_name = Path(recipe.teacher).name.replace(":", "-")
    return str(runs / "pairs" / f"{teacher_name}-{p.sampler}{p.steps}-{spec.digest()[:8]}")


def unwritten(folder: str, spec: PairSpec) -> list[tuple[Path, int]]:
    """Return `folder`, and the bytes that its pairs have yet to take there; nothing if it is no folder on a disk."""
    if is_url(folder):
        return []
    return [(Path(folder), max(0, spec.nbytes - sum(Folder(folder).sizes().values())))]


def pair_store(recipe: Recipe, subject: Subject, runs: Path) -> PairStore:
    """Return the recipe's pairs; missing ones, e.g. after an interrupted build, are built first. Print their cost."""
    spec = pair_spec(recipe, subject)
    folder = pairs_folder(recipe, spec, runs)
    if parallel.rank() == 0 and not Folder(folder).exists(MANIFEST):
        nfe = counted(evaluations(spec.sampler, spec.steps, spec.guidance, spec.taken), "evaluation")
        console.print(f"{counted(spec.count, 'pair')} of {nfe} each, {size(spec.nbytes)}, in {folder}")
        if spec.count < len(subject.prompts):  # pair i has prompt i
            console.print(f"They have the first of {len(subject.prompts):,} prompts; if the file is sorted, shuffle it")
    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None

        def ready(pairs: int) -> None:
            nonlocal advance
            if pairs < spec.count:  # otherwise there is nothing to wait for
                advance = advance or stack.enter_context(progress("pairs", spec.count, unit="pair"))
                advance(pairs)

        sampled = build(
            folder,
            spec,
            subject.denoiser,
            subject.conditions,
            prompts=subject.prompts,
            batch=recipe.pairs.batch,
            progress=ready,
        )
    if not sampled and advance is None and parallel.rank() == 0:
        console.print(f"pairs: all {spec.count:,} are there, in {folder}")
    return PairStore.open(folder, spec.fingerprint, spec.count)


def workers(recipe: Recipe) -> Workers:
    """Return the workers that share a batch: one for `auto`, which `settle` replaces first."""
    return Workers(1 if recipe.workers == "auto" else recipe.workers)


def check_batches(recipe: Recipe) -> None:
    """Raise `UserError` if the processes cannot share a batch equally."""
    world, cuts = parallel.world(), 1 if recipe.workers == "auto" else recipe.workers
    for name, batch in recipe.batches.items():
        if batch % (recipe.accumulate * world * cuts):
            raise UserError(
                f"{name}.batch {batch} is not a multiple of accumulate {recipe.accumulate}"
                + (f" times {world} processes" if world > 1 else "")
                + (f" times {cuts} workers" if cuts > 1 else "")
                + "; choose one that is"
            )


def check_alone(recipe: Recipe, device: str) -> None:
    """Raise `UserError` if the recipe, on this type of device, works only in one process and there are several."""
    alone = {
        "match.shared": recipe.match.shared and "match" in recipe.terms,
        "cuda_graphs": records_graphs(recipe, device),
    }
    used = [name for name, is_set in alone.items() if is_set]
    if used and parallel.world() > 1:
        raise UserError(f"{used[0]} is for one process, not for {parallel.world()}; use false")


def distiller(recipe: Recipe, subject: Subject, pairs: PairStore | None, fake_score: bool | None = None) -> Distiller:
    """Return the recipe's distillation. Student and fake score start as copies of one network, see `start`.

    `fake_score`: whether there is one; default: if a term trains it. A later stage may be the first to do so.

    The learning rates are the recipe's over its steps, so that whatever this returns can be trained; in a run of
    stages, `schedule` gives it those of each.

    Each of several processes holds its share; `parallel` says how networks are distributed over them.
    """
    check_batches(recipe)
    check_alone(recipe, subject.device.type)
    dev, info = subject.device, subject.info
    graphs = records_graphs(recipe, dev.type)
    networks, fake = _networks(recipe, subject, trains_fake(recipe) if fake_score is None else fake_score)
    own = Optimizer(networks.student.parameters(), steps=recipe.steps, **recipe.student.optimizer.model_dump())
    own.wait = _wait(recipe)
    critic = None
    if fake is not None:
        steps = recipe.steps * recipe.fake.steps
        critic = Optimizer(fake.parameters(), steps=steps, **recipe.fake.optimizer.model_dump())
    return Distiller(
        networks,
        objective(recipe, subject, networks.fake, pairs),
        own,
        critic,
        info=student_info(recipe, subject),
        settings=Settings(
            steps=student_steps(recipe, subject.denoiser.schedule),
            fake_updates=recipe.fake.steps,
            ida=recipe.fake.ida,
            seed=recipe.seed,
            accumulate=recipe.accumulate,
            workers=workers(recipe),
            precision=recipe.precision,
            cuda_graphs=graphs,
            process=(parallel.rank(), parallel.world()),
            conditions=subject.conditions,
            decode=components_of(recipe, info, dev).decode if info.latent else None,
        ),
    )


def _networks(recipe: Recipe, subject: Subject, fake_score: bool) -> tuple[Networks, Denoiser | None]:
    """Return the networks as they are distributed over the processes, and the fake score, if any, before it is."""
    inputs = example(subject, recipe.student.guidance is not None)
    hold(subject.denoiser.net, recipe.base_weights, subject.device.type)
    first = start(recipe, subject)
    hold(first.net, recipe.base_weights, subject.device.type)  # as in the teacher, unless it is the teacher
    trained = student(recipe, first)
    fake = fake_network(recipe, first) if fake_score else None
    average = frozen_copy(trained)
    bases = {id(n.base): n.base for n in (trained, fake) if isinstance(n, Adapted)}
    if recipe.gradient_checkpointing:
        for network in filter(None, (trained, fake)):
            checkpoint_gradients(network)
    if recipe.parallel == "fsdp" and parallel.grouped():
        if not isinstance(average, Adapted):
            shard(average)
        # In the fake score's precision: their difference must start at zero. Adapted networks call the base's `net`.
        for network in (bases | {id(subject.denoiser): subject.denoiser}).values():
            shard(network.net if bases else network, recipe.precision)
    forward = spread(trained, recipe.parallel, recipe.precision, inputs)
    score = fake
    # DDP needs one forward pass per backward pass. If other terms also use the fake score, the distiller averages its
    # gradients instead.
    only_match = not recipe.own_terms and "gan" not in recipe.terms
    sharded = recipe.parallel == "fsdp" and not isinstance(fake, Adapted)
    if fake is not None and (sharded or only_match):
        score = spread(fake, recipe.parallel, recipe.precision, inputs)
    if recipe.compile:
        for network in filter(None, (trained, fake, subject.denoiser)):
            compile_blocks(network)
    networks = Networks(trained, score, subject.denoiser, forward, EMA(trained, recipe.student.ema, average))
    return networks, fake


def enter(distiller: Distiller, stage: Recipe, subject: Subject, pairs: PairStore | None) -> None:
    """Go on with the objective of the next stage; networks and optimizers stay."""
    distiller.objective = objective(stage, subject, distiller.fake, pairs, distiller.objective)
    distiller.gradients.forget()


def schedule(distiller: Distiller, recipe: Recipe, number: int) -> None:
    """Give optimizers and average the rates of stage `number` of the recipe, from 0; moments and weights stay.

    A schedule that is the stage's own (`Recipe.span`) is counted over the stage, others over the run.
    """
    stage = recipe.stage(number)
    distiller.ema.decay = stage.student.ema

    def give(name: str, optimizer: Optimizer, entries: Optimiser, updates: int = 1) -> None:
        first, end = recipe.span(number, name) or (0, recipe.steps)
        optimizer.lr, optimizer.warmup, optimizer.decay = entries.lr, entries.warmup, entries.decay
        optimizer.first, optimizer.steps = first * updates, (end - first) * updates

    give("student.optimizer", distiller.optimizer, stage.student.optimizer)
    distiller.optimizer.wait = _wait(stage)
    for optimizer in distiller.fake_optimizers:
        give("fake.optimizer", optimizer, stage.fake.optimizer, recipe.fake.steps)
    if stage.gan.optimizer is not None and "gan" in stage.terms:
        head = distiller.objective.trained["gan.head"].optimizer
        give("gan.optimizer", head, stage.gan.optimizer, recipe.fake.steps)


def _wait(recipe: Recipe) -> int:
    """Return the steps that the student waits. Without a fake score, nothing would be trained meanwhile."""
    return recipe.fake.alone if trains_fake(recipe) else 0


def start(recipe: Recipe, subject: Subject) -> Denoiser:
    """Return what student and fake score start from: the teacher (Algorithm 1, line 2) or the recipe's own new network.

    A new network takes over the teacher's schedule and prediction. If the student takes a guidance scale, so does the
    fake score: it models the student's images at each scale; what it starts from shares the teacher's weights. Raises
    `UserError` if the teacher does not allow this.
    """
    denoiser = subject.denoiser
    net = _network(recipe, subject)
    if recipe.student.guidance is not None:
        net = with_guidance(net, share=recipe.parallel == "ddp")  # FSDP2 shards networks one by one
    if net is denoiser.net:
        return denoiser
    return Denoiser(net, denoiser.schedule, denoiser.prediction).to(subject.device)


def _network(recipe: Recipe, subject: Subject) -> nn.Module:
    denoiser, info = subject.denoiser, subject.info
    network = recipe.student.network
    if network is None:
        if next(denoiser.parameters(), None) is None:
            raise UserError(
                f"teacher {recipe.teacher!r} has no weights that the student could start from; "
                "give the student a network of its own, e.g. student.network={type: mlp}"
            )
        return denoiser.net
    if len(info.shape) != 1:
        raise UserError(f"student.network {network.type!r} is for points; this teacher makes samples of {info.shape}")
    with rng.seeded(rng.key(recipe.seed, "network")):
        return NETWORKS[network.type](dim=info.shape[0], width=network.width, depth=network.depth)


def student(recipe: Recipe, first: Denoiser) -> Denoiser:
    """Return the network to train: a copy of `first` (see `start`) or of `student.init`, or adapters on it.

    Raises `UserError` for a network that does not fit the recipe's entries.
    """
    begin = first if recipe.student.init is None else _earlier(recipe, first)
    if (recipe.gradient_checkpointing or recipe.compile) and not blocks(begin):
        raise UserError(
            f"gradient_checkpointing and compile are for networks of blocks, in nn.ModuleList; "
            f"{type(begin.net).__name__} has none: use false"
        )
    return _adapted(recipe, begin, recipe.student.adapter) if recipe.student.adapter.rank else _trained_copy(begin)


def fake_network(recipe: Recipe, first: Denoiser) -> Denoiser:
    """Return the fake score: a copy of `first` (see `start`) to train, or adapters on it."""
    return _adapted(recipe, first, recipe.fake.adapter) if recipe.fake.adapter.rank else _trained_copy(first)


def student_info(recipe: Recipe, subject: Subject) -> Info:
    """Return what the student's model folder records about it."""
    times = student_steps(recipe, subject.denoiser.schedule).times
    card: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    if subject.prompts:
        card["prompts"] = {"count": len(subject.prompts), "cut": subject.cut}
    if "pixels" in subject.info.card:
        card["pixels"] = subject.info.card["pixels"]  # which images it makes: `eval` compares like with like
    return replace(subject.info, times=times, guidance=recipe.student.guidance, card=card)


def _earlier(recipe: Recipe, denoiser: Denoiser) -> Denoiser:
    """Load the student `student.init`; one without a guidance scale gets it as an input, and computes as before.

    Raises `UserError` if its network differs from that of `denoiser`.
    """
    assert recipe.student.init is not None
    student, info = find_model(recipe.student.init, kind="student")
    if recipe.student.guidance is not None and info.guidance is None:
        student = Denoiser(with_guidance(student.net), student.schedule, student.prediction)
    here, there = ({k: v.shape for k, v in m.state_dict().items()} for m in (denoiser, student))
    if here != there:
        raise UserError(f"student.init {recipe.student.init!r} has another network than the teacher {recipe.teacher!r}")
    return student.to(next(denoiser.parameters()).device)


def _adapted(recipe: Recipe, base: Denoiser, how: AdapterEntries) -> Adapted:
    """Return `base`, frozen, with an adapter. Equal ones begin equal, in every role and every process."""
    if recipe.compile:
        raise UserError("compile does not work with adapters; use compile=false")
    net = base.requires_grad_(False).net
    with rng.seeded(rng.key(recipe.seed, "adapters")):
        targets = getattr(net, "adapted", ()) if how.targets is None else how.targets
        inputs = [name for name, layer in net.named_modules() if isinstance(layer, GuidanceInput)]
        adapter = Adapter(net, how.rank, how.alpha or how.rank, targets, whole=inputs)
    return Adapted(base, adapter.to(next(base.parameters()).device)).eval()


def _trained_copy(denoiser: Denoiser) -> Denoiser:
    """Return a copy to train. It stays in evaluation mode: dropout is off in distillation."""
    return copy.deepcopy(denoiser).eval().requires_grad_(True)
