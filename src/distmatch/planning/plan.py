"""Works out what a recipe needs on given GPUs: memory, disk, time, traffic, and whether it fits.

`cost` counts what one step costs; this file derives the rest from it.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from distmatch.data.images import count_images
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.solvers import evaluations
from distmatch.models.info import Info
from distmatch.models.library import outline
from distmatch.planning.cost import FP32, Cost, cost, decoder_weights, encoder_weights
from distmatch.planning.gpus import Gpu
from distmatch.planning.ladder import CACHE, CHOSEN, Ladder, changed, kind
from distmatch.planning.rehearsal import evaluated
from distmatch.recipe.entries import Recipe
from distmatch.recipe.objectives import reads_pairs
from distmatch.recipe.real_images import latents_bytes
from distmatch.recipe.subjects import as_used, states_bytes
from distmatch.system.errors import UserError
from distmatch.system.progress import progress
from distmatch.system.screen import FLOPS, console, duration, size, unit
from distmatch.training.engine import blocks

MACHINE = 8
"""GPUs in one machine."""

LAUNCHED, REPLAYED = 30e-6, 7e-6
"""Seconds that a kernel takes at least, on average: launched by Python, and replayed in a CUDA graph. From steps and
pairs of `emoji` on an H100 beside other work, their times in docs/scaling.md over the kernels that a plan counts: 37
and 24 µs launched, 7 replayed."""

SIZES = (12, 16, 24, 48, 80)
"""GB of the cards that a ladder is shown for."""


@dataclass(frozen=True)
class Cluster:
    """`gpus` of one kind, eight per machine; `network` in bytes/s per GPU and direction between machines.

    `utilisation` is the share of the peak arithmetic that networks reach.
    """

    gpus: int
    gpu: Gpu
    network: float
    utilisation: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s per direction that a ring through all GPUs moves. A ring enters and leaves each machine once, so one
        GPU can use the network cards of its whole machine, up to the speed of its own link.
        """
        if self.gpus <= MACHINE:
            return self.gpu.link
        fewest = (self.gpus - 1) % MACHINE + 1  # GPUs, and network cards, in the last machine
        return min(self.gpu.link, fewest * self.network)

    def arithmetic(self, flops: float, precision: str) -> float:
        """Return the seconds that `flops` take."""
        return flops / (self.utilisation * self.gpu.rate(precision) * self.gpus)


@dataclass(frozen=True)
class Pace:
    """Seconds per step spent computing networks, and seconds spent moving data between GPUs; `kernels`: those that the
    step's kernels take however little they compute.
    """

    arithmetic: float
    traffic: float
    kernels: float = 0.0

    @property
    def in_turn(self) -> float:
        """Seconds per step if no traffic overlaps with arithmetic."""
        return self.arithmetic + self.traffic

    @property
    def at_once(self) -> float:
        """Seconds per step if all of it does."""
        return max(self.arithmetic, self.traffic)


def pace(made: Cost, recipe: Recipe, cluster: Cluster) -> Pace:
    arithmetic = cluster.arithmetic(made.step_flops, recipe.precision)
    return Pace(arithmetic, made.traffic.sent / cluster.bandwidth, _per_kernel(recipe) * made.kernels)


def _per_kernel(recipe: Recipe) -> float:
    """Return the seconds that a kernel of a step takes at least; 0 if it is compiled, which leaves far fewer."""
    return 0.0 if recipe.compile else REPLAYED if recipe.cuda_graphs else LAUNCHED


def show(recipe: Recipe, gpu: str, cluster: Cluster, price: float | None = None, ladder: bool = False) -> None:
    """Print the tables of `distmatch plan` and whether the recipe fits.

    Args:
        gpu: the name of the cluster's GPUs.
        price: dollars per GPU-hour, to print what the pairs and the training cost.
        ladder: print what has to be set on cards of several sizes, too.
    """
    gpus = cluster.gpus
    lack = missing_bf16(recipe, gpu, cluster.gpu)
    recipe = settled(recipe, cluster.gpu)
    denoiser, info = outline(recipe.teacher)
    info = as_used(recipe, denoiser, info)
    stages = recipe.parts
    ends = [stage.until for stage in recipe.stages] or [recipe.steps]
    kinds = list(dict.fromkeys(map(kind, stages)))
    both = bool(blocks(denoiser)) and recipe.student.network is None
    with progress("steps rehearsed", len(kinds) + both, unit="step") as advance:
        costs = {}
        for stage in stages:
            if kind(stage) not in costs:
                costs[kind(stage)] = cost(stage, denoiser, info, gpus)
                advance(1)
        heaviest = max(stages, key=lambda stage: costs[kind(stage)].peak)
        made = costs[kind(heaviest)]
        other = None
        if both:
            opposite = changed(heaviest, {"gradient_checkpointing": not recipe.gradient_checkpointing})
            other = cost(opposite, denoiser, info, gpus, once=True)
            advance(1)
    name, value = unit(made.parameters, {"": 1, "k": 1e3, "M": 1e6})
    parameters = f"{made.parameters / value:,.1f} {name} parameters" if made.parameters else "an exact teacher"
    batch = " + ".join(f"{images:,}" for images in heaviest.batches.values())
    parts = f", accumulate={recipe.accumulate}" if recipe.accumulate > 1 else ""
    console.print(f"{recipe.name}: {parameters}, {gpus} x {gpu}, {recipe.parallel}, {batch} images a step{parts}")
    if recipe.stages:
        console.print(f"a step and its memory are those of stage {stages.index(heaviest) + 1}, which takes the most")
    if lack:
        console.print(lack)
    console.print(_work(made))
    console.print(_memory(made, other, recipe.gradient_checkpointing, f"one {gpu}, {cluster.gpu.memory / 1e9:.0f} GB"))
    speed = pace(made, recipe, cluster)
    _tell_pace(made, speed, cluster)
    training = _tell_training(recipe, [costs[kind(stage)] for stage in stages], ends, cluster)
    _tell_disk(recipe, made)
    _tell_host(made, info, cluster)
    if recipe.prompts.cache is not None and info.text:
        console.print(states(recipe, denoiser, info))
    if recipe.real.cache is not None and info.latent and recipe.needs_images:
        console.print(latents(recipe, info))
    paired = [stage for stage in stages if reads_pairs(stage)]
    pairs = _tell_pairs(paired, denoiser, info, cluster) if paired else 0.0
    if price is not None:
        console.print(bill(price, gpus, pairs, training))
    known: dict[tuple[tuple[str, Any], ...], Cost] = {(): made}
    if other is not None and not recipe.gradient_checkpointing:
        known[("gradient_checkpointing", True),] = other
    steps = Ladder(heaviest, denoiser, info, gpus, known=known)
    console.print(verdict(steps, cluster.gpu.memory))
    found = steps.fitting(cluster.gpu.memory)
    if found is not None and found.changes.get("precision") == "bf16" and not cluster.gpu.has_bf16:
        console.print(f"the {gpu} only emulates bf16: there it saves memory, but no time")
    if hint := next_step(steps, cluster.gpu.memory, ladder):
        console.print(hint)
    if ladder:
        console.print(rungs(steps))


def settled(recipe: Recipe, gpu: Gpu) -> Recipe:
    """Replace each `auto` precision by the one in which `gpu` is faster."""
    faster = "bf16" if gpu.has_bf16 else "fp32"
    pairs = recipe.pairs
    if pairs.precision == "auto":
        pairs = pairs.model_copy(update={"precision": faster})
    precision = faster if recipe.precision == "auto" else recipe.precision
    return recipe.model_copy(update={"precision": precision, "pairs": pairs})


def missing_bf16(recipe: Recipe, name: str, gpu: Gpu) -> str:
    """Say what the `recipe` asks for, or leaves to the machine, that `gpu`, called `name`, lacks; empty if nothing."""
    instead = {"auto": "auto is fp32", "bf16": "bf16 is emulated, no faster than fp32"}
    asked = {"precision": recipe.precision}
    if any(map(reads_pairs, recipe.parts)):
        asked["pairs.precision"] = recipe.pairs.precision
    told = [f"{entry} {instead[value]}" for entry, value in asked.items() if value in instead]
    return "" if gpu.has_bf16 or not told else f"the {name} has no bf16: {', '.join(told)}"


def _work(made: Cost) -> Table:
    name, value = unit(made.step_flops, FLOPS)
    table = Table("network", f"{name} per step", box=None)
    for network, flops in made.flops.items():
        table.add_row(network, f"{flops / value:,.2f}")
    table.add_row("together", f"{made.step_flops / value:,.2f}")
    return table


def _memory(made: Cost, other: Cost | None, checkpointing: bool, title: str) -> Table:
    """Return a table of memory by part, with and without gradient checkpointing; the recipe's own setting is marked."""
    kept, recomputed = (other, made) if checkpointing else (made, other)
    columns = {"activations kept": kept, "recomputed": recomputed}
    shown = {column: one for column, one in columns.items() if one is not None}
    heads = (f"{column} (recipe)" if one is made else column for column, one in shown.items())
    table = Table(title, *heads, box=None, caption_justify="left")
    for part in made.memory:
        taken = [one.memory[part] for one in shown.values()]
        if any(taken):
            table.add_row(part, *(size(nbytes) if nbytes else "-" for nbytes in taken))
            if not all(taken):
                table.caption = "-: adds nothing when a step takes the most"
    table.add_row("together", *(size(one.peak) for one in shown.values()))
    return table


def _tell_pace(made: Cost, speed: Pace, cluster: Cluster) -> None:
    console.print(
        f"step: {duration(speed.arithmetic)} of arithmetic at {cluster.utilisation:.0%} of the maker's figure"
    )
    if cluster.gpus == 1:
        return
    sums = {"gathered": made.traffic.gathered, "scattered": made.traffic.scattered, "reduced": made.traffic.reduced}
    parts = ", ".join(f"{size(value)} {name}" for name, value in sums.items() if value)
    console.print(
        f"traffic: {size(made.traffic.sent)} per GPU, step and direction ({parts}), "
        f"{duration(speed.traffic)} at {cluster.bandwidth / 1e9:,.0f} GB/s"
    )
    low, high = (speed.arithmetic / seconds for seconds in (speed.in_turn, speed.at_once))
    console.print(f"efficiency: {low:.1%} if nothing of it happens during arithmetic, {high:.1%} if all does")


def _tell_training(recipe: Recipe, costs: list[Cost], ends: list[int], cluster: Cluster) -> tuple[float, float]:
    """Print the time of training; return seconds, at least and at most."""
    paces = [pace(made, recipe, cluster) for made in costs]
    steps = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    computed = sum(n * each.arithmetic for n, each in zip(steps, paces, strict=True))
    fast = sum(n * max(each.at_once, each.kernels) for n, each in zip(steps, paces, strict=True))
    slow = sum(n * max(each.in_turn, each.kernels) for n, each in zip(steps, paces, strict=True))
    console.print(f"training: {_of_all(cluster, fast, slow)}")
    if any(each.kernels > each.in_turn for each in paces):
        most = max(made.kernels for made in costs)
        how = f"{1e6 * _per_kernel(recipe):.0f} µs {'in a CUDA graph' if recipe.cuda_graphs else 'from Python'}"
        halved = recipe.accumulate // 2
        fewer = f"; fewer with accumulate={halved}, in more memory" if halved else ""
        console.print(
            f"  Arithmetic is {duration(computed)} of it: a step has {most:,} kernels, each of which takes about "
            f"{how}{fewer}"
        )
    elif recipe.compile and any(
        LAUNCHED * made.kernels > each.in_turn for made, each in zip(costs, paces, strict=True)
    ):
        launched = sum(n * LAUNCHED * made.kernels for n, made in zip(steps, costs, strict=True))
        console.print(f"  In practice longer: without compile, launching its kernels would take {duration(launched)}")
    return fast, slow


def _tell_disk(recipe: Recipe, made: Cost) -> None:
    kept = recipe.checkpoint.keep + (recipe.evaluate.every > 0)
    console.print(
        f"checkpoints: {size(made.checkpoint)} each, {size((kept + 1) * made.checkpoint)} at most "
        f"({kept} kept, one being written)"
    )
    if recipe.student.network is None and made.parameters:
        console.print(f"the student's folder: {size(FP32 * made.parameters)}")


def _tell_host(made: Cost, info: Info, cluster: Cluster) -> None:
    """Print the host memory that a process needs besides the GPU's: models are read in fp32 before they go there."""
    read = FP32 * (made.parameters + encoder_weights(info.source) + decoder_weights(info.source))
    saved = made.checkpoint / cluster.gpus
    parts = [f"{size(read)} while the models are read"] if read else []
    parts.append(f"{size(saved)} while a checkpoint is written")
    each = " per process" if cluster.gpus > 1 else ""
    console.print(f"host memory{each}: {', '.join(parts)}")


def _tell_pairs(stages: list[Recipe], denoiser: Denoiser, info: Info, cluster: Cluster) -> float:
    """Print disk and time of the pairs; return seconds."""
    p = stages[0].pairs
    guidance = stages[0].scale(p.guidance)
    count = max(stage.pairs.count for stage in stages)
    nbytes = count * math.prod(info.shape) * (4 if p.dtype == "float32" else 2)
    calls, (flops, kernels) = evaluations(p.sampler, p.steps, guidance, p.taken), evaluated(denoiser, info)
    seconds = cluster.arithmetic(count * calls * flops, p.precision)
    if seconds:
        seconds = max(seconds, math.ceil(count / p.batch) / cluster.gpus * calls * kernels * LAUNCHED)
    console.print(f"pairs: {size(nbytes)}" + (f", {_of_all(cluster, seconds)}" if seconds else ""))  # exact teachers
    return seconds


def _of_all(cluster: Cluster, low: float, high: float | None = None) -> str:
    """Return a time, or the least and the most; and of several GPUs their time together."""
    own, together = duration(low, high), duration(cluster.gpus * low, high and cluster.gpus * high, of="GPU-")
    return f"{own}, {together}" if cluster.gpus > 1 else own


def bill(price: float, gpus: int, pairs: float, training: tuple[float, float]) -> str:
    """Say what seconds of `pairs` and `training` (at least and at most) cost at `price` dollars per GPU-hour."""
    made, low, high = (seconds / 3600 * gpus * price for seconds in (pairs, *training))
    told = f"{_dollars(low, high)} for training"
    if pairs:
        told = f"{_dollars(made)} for the pairs and {told}, {_dollars(made + low, made + high)} in all"
    return f"price: {told}, at ${price:,.2f} per GPU-hour"


def _dollars(*amounts: float) -> str:
    shown = (f"${amount:,.{0 if amount >= 100 else 2}f}" if amount >= 0.01 else "under $0.01" for amount in amounts)
    return " to ".join(dict.fromkeys(shown))


def verdict(ladder: Ladder, memory: float) -> str:
    """Say whether a step fits, or else name the nearest settings with which it does."""
    found = ladder.fitting(memory)
    if found is None:
        return "it fits with no setting that is tried here; take more or larger GPUs"
    if not found.changes:
        return "it fits"
    adapters = "student.adapter.rank" in found.changes and not ladder.recipe.student.adapter.rank
    new = f"; {_retrained(found.retrains)}" if found.retrains else ""
    new += "; adapters learn at rates of their own" if adapters else ""
    disk = f"; {_cached(ladder)}" if CACHE in found.changes else ""
    return f"it does not fit; {found} does, with {size(found.cost.peak)}{new}{disk}"


def _retrained(entries: Iterable[str]) -> str:
    """Say by which `entries` a student differs from the recipe's."""
    return f"another student than the recipe's, by {', '.join(entries)}"


def next_step(ladder: Ladder, memory: float, listed: bool) -> str:
    """Say how to find settings with which a step fits; empty if it fits as it is, or if there is nothing left to say.

    `listed`: the table of `--ladder` follows.
    """
    found = ladder.fitting(memory)
    if found is not None and not found.changes:
        return ""
    told = []
    # What `memory` chooses among is part of the ladder; bf16 arithmetic it leaves to the recipe.
    if found is not None and found.changes.keys() <= {*CHOSEN} - {"precision"}:
        asked = ladder.recipe.memory
        whose = "memory=fit" if asked is None else f"the recipe's memory={asked}"
        told.append(f"{whose} makes such a choice when a run begins")
    if not listed:
        told.append(f"--ladder lists what fits on cards of {SIZES[0]} to {SIZES[-1]} GB")
    return "; ".join(told)


def _cached(ladder: Ladder) -> str:
    told = states(ladder.recipe, ladder.denoiser, ladder.info)
    return told if ladder.recipe.offload else f"{told}; offload=true in its place takes time instead"


def states(recipe: Recipe, denoiser: Denoiser, info: Info) -> str:
    """Say how much of a disk the cached states of prompts take: each of them, and all if they can be counted."""
    each = states_bytes(denoiser, info, 1)
    told = f"states of prompts take {size(each)} each on the disk"
    if recipe.prompts.path is None:
        return told
    try:
        count = len(read_prompts(recipe.prompts.path, recipe.prompts.column))
    except UserError:  # a plan needs none; training says what is wrong with them
        return told
    return f"{told}, {size(count * each)} for {count:,}"


def latents(recipe: Recipe, info: Info) -> str:
    """Say how much of a disk the cached latents of real images take: each of them, and all if they can be counted."""
    told = f"latents of real images take {size(latents_bytes(info, 1))} each on the disk"
    count = None
    if recipe.real.images is not None:
        with suppress(UserError, OSError):  # as with prompts
            count = count_images(recipe.real.images, recipe.real.split)
    return told if count is None else f"{told}, {size(latents_bytes(info, count))} for {count:,}"


def rungs(ladder: Ladder) -> Table:
    """Return a table of what has to be set on cards of several sizes."""
    with progress("cards", len(SIZES), unit="card") as advance:
        table = Table("GB of a card", "a step takes, GB", "student", "settings", box=None, caption_justify="left")
        cached, retrains = "", dict[str, None]()  # a set that keeps its order
        for gigabytes in SIZES:
            found = ladder.fitting(1e9 * gigabytes)
            if found is None:
                table.add_row(str(gigabytes), "-", "-", "nothing fits")
            else:
                cached = _cached(ladder) if CACHE in found.changes else cached
                retrains |= dict.fromkeys(found.retrains)
                student = "another" if found.retrains else "the same"
                table.add_row(str(gigabytes), f"{found.cost.peak / 1e9:.1f}", student, str(found))
            advance(1)
        told = [_retrained(retrains)] if retrains else []
        table.caption = "\n".join([*told, *([cached] if cached else [])]) or None
    return table
