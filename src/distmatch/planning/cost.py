"""The cost of one training step: arithmetic, memory by part, and traffic between processes.

Arithmetic and activations come from rehearsing the step in one process. How networks, gradients and moments are
distributed over several processes, and the traffic between these, are computed in closed form.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from distmatch.data.embeddings import per_pass
from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.info import Info
from distmatch.models.library import family_in, family_of
from distmatch.planning.ledger import LOSSES
from distmatch.planning.rehearsal import encoding_peak, rehearse
from distmatch.recipe.entries import Recipe
from distmatch.recipe.objectives import reads_pairs
from distmatch.recipe.subjects import encoded_before, offloaded, records_graphs
from distmatch.system.errors import UserError
from distmatch.training.adapters import Adapted
from distmatch.training.engine import blocks

FP32 = 4
"""Bytes per number."""


@dataclass(frozen=True)
class Traffic:
    """Bytes exchanged between processes in one step, as seen by one process: the full size of what its collectives
    gather, scatter or reduce.

    A ring, which moves the least, sends `(N - 1) / N` of what is gathered or scattered and twice that of what is
    reduced.
    """

    processes: int
    gathered: float = 0.0
    scattered: float = 0.0
    reduced: float = 0.0

    @property
    def sent(self) -> float:
        """Bytes that each process sends; it receives as many."""
        return (self.processes - 1) / self.processes * (self.gathered + self.scattered + 2 * self.reduced)


@dataclass(frozen=True)
class Cost:
    """The cost of one step: FLOPs of all processes, by network; peak bytes and kernels of one process; traffic.

    What previews and prompts take between steps counts as far as it exceeds the gradients and activations of a step.
    `checkpoint` is the size of one checkpoint in bytes, over all processes.
    """

    parameters: int
    flops: dict[str, float]
    memory: dict[str, float]
    traffic: Traffic
    checkpoint: float
    kernels: int = 0

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_flops(self) -> float:
        return sum(self.flops.values())


def cost(recipe: Recipe, denoiser: Denoiser, info: Info, processes: int = 1, once: bool = False) -> Cost:
    """Return the cost of a step of `recipe` in `processes` processes, once AdamW's moments exist.

    Memory is that of a GPU, whose autocast keeps normalisations in fp32, or of a CPU if the recipe's `device` is `cpu`.
    It counts tensors only, without the overhead of the allocator, the kernels and the driver.

    Args:
        denoiser, info: the teacher; its weights are not used. See `library.outline`.
        once: count the arithmetic of one update of the fake score, and of one of the student's steps. It halves the
            time that this takes, and memory is the same.

    Raises `UserError` if the processes cannot share the batches in equal parts.
    """
    parts = processes * recipe.accumulate
    for name, batch in recipe.batches.items():
        if batch % parts:
            raise UserError(
                f"{name}.batch {batch} is not a multiple of accumulate {recipe.accumulate} times {processes} GPUs; "
                "choose one that is"
            )
    sharded = recipe.parallel == "fsdp" and processes > 1
    done = rehearse(recipe, denoiser, info, parts, sharded, once)
    trained = {name: done.networks[name] for name in ("student", "fake score") if name in done.networks}
    sizes = {name: numel(network, trained=True) for name, network in trained.items()}
    head = numel(done.networks["GAN head"]) if "GAN head" in done.networks else 0  # never sharded
    spread = {name: sharded and name != "GAN head" and not adapted(n) for name, n in done.networks.items()}
    cuts = {name: processes if spread[name] else 1 for name in spread}
    memory: dict[str, float] = {name: FP32 * slices(network, cuts[name]) for name, network in done.networks.items()}
    teacher = done.networks["teacher"]
    if recipe.base_weights != "fp32":
        memory["teacher"] = _stored(teacher) / cuts["teacher"]
    bases = [n.base for n in trained.values() if isinstance(n, Adapted)]
    first = next(teacher.parameters(), None)
    if bases and next(bases[0].parameters()) is not first:  # one of its own; see `build.start`
        memory["base of adapters"] = _stored(bases[0]) / cuts["teacher"]
    memory["optimizer"] = 2 * FP32 * (head + sum(slices(n, cuts[name], trained=True) for name, n in trained.items()))
    memory[LOSSES] = FP32 * sum(numel(network) for network in done.losses)
    texts, away = _texts(recipe, denoiser, info, parts), offloaded(recipe)
    memory["text encoder, decoder"] = 0 if away else texts.weights + FP32 * decoder_weights(info.source)
    graphs = records_graphs(recipe, "cuda" if recipe.device == "auto" else recipe.device.partition(":")[0])
    freed = processes == 1 and not graphs  # gradients come and go: what counts is the peak of both together
    memory["gradients"] = done.gradients if freed else FP32 * _gradients(recipe, trained, cuts, processes, head)
    if sharded:
        memory["gathered blocks"] = max(_gathered(network, recipe) for network in trained.values())
    memory["activations"] = done.activations if freed else done.most_activations
    between = done.pictures
    if not texts.before:
        between = max(between, texts.activations + texts.weights * away)
    unused = 0 if graphs else memory["gradients"] + memory["activations"]  # what graphs keep is for them alone
    more = between - unused
    if texts.before:  # alone on the device, before training
        more = max(more, texts.weights + texts.activations - sum(memory.values()))
    memory["previews, prompts"] = max(0, more)
    average = numel(done.networks["average"])
    states = sum(numel(network) + 2 * sizes[name] for name, network in trained.items())
    checkpoint = FP32 * (average + states + 3 * head)
    flops: dict[str, float] = {name: parts * value for name, value in done.flops.items() if value}
    traffic = _traffic(recipe, trained, teacher, processes, done.rolled)
    if processes > 1:
        traffic = replace(traffic, reduced=traffic.reduced + recipe.fake.steps * FP32 * head)
    return Cost(numel(denoiser), flops, memory, traffic, checkpoint, recipe.accumulate * done.kernels)


def _gradients(recipe: Recipe, trained: dict[str, nn.Module], cuts: dict[str, int], processes: int, head: int) -> float:
    """Return the most numbers held as gradients of the networks `trained` and of a GAN's `head`: by CUDA graphs in one
    process, or in several.

    `cuts`: of how many parts of each network a process holds one.
    """
    sizes = {name: numel(network, trained=True) for name, network in trained.items()}
    if processes == 1:  # each graph keeps the gradients that it writes
        return _graphs(recipe) * sum(sizes.values())
    if recipe.parallel != "fsdp":  # DDP never frees its buckets; sums over parts are held beside them until the last
        return head + sum(sizes.values()) + (max(sizes.values()) if recipe.accumulate > 1 else 0)
    # FSDP2 keeps sums over parts unsharded until the last part; adapters are as in DDP.
    kept = {n: 1 if recipe.accumulate > 1 else cuts[n] for n in trained if not adapted(trained[n])}
    largest = max((slices(trained[name], cut, trained=True) for name, cut in kept.items()), default=0)
    return head + largest + sum(sizes[n] for n in trained if adapted(trained[n]))


def _graphs(recipe: Recipe) -> int:
    """Return how many CUDA graphs each network's update has: one for each of the student's steps that is trained.

    Fresh noise trains all of them, or with pairs, which are for the first, the later ones.
    """
    steps = recipe.student.nfe or len(recipe.student.times or (0,))
    return 1 if recipe.terms == ["regress"] else max(1, steps - reads_pairs(recipe))


@dataclass(frozen=True)
class _Texts:
    """Bytes of the text encoders, and of what else they take in a pass; whether they are done before training."""

    weights: int
    activations: int
    before: bool


def _texts(recipe: Recipe, denoiser: Denoiser, info: Info, parts: int) -> _Texts:
    """Return what it takes to encode the prompts, for the cache or else for one of `parts` parts of a batch."""
    before = encoded_before(recipe)
    weights = encoder_weights(info.source)
    if not weights:
        return _Texts(0, 0, before)
    cond = family_of(info).example_cond(denoiser.net, info, 1)
    assert cond is not None
    assert cond.text is not None
    batch = max((size // parts for size in recipe.batches.values()), default=1)
    precision = recipe.prompts.precision
    taken = _encoding(info.source, per_pass(weights) if before else batch, cond.text.shape[1], precision)
    return _Texts((2 if precision == "bf16" else FP32) * weights, taken, before)


@cache
def _encoders(source: str) -> list[nn.Module]:
    """Return a model's text encoders without weights, which take long to build."""
    return family_in(source).encoders(source) if source else []


def encoder_weights(source: str) -> int:
    """Return the number of weights of a model's text encoders."""
    return sum(map(numel, _encoders(source)))


@cache
def decoder_weights(source: str) -> int:
    """Return the number of weights of a model's decoder."""
    return family_in(source).component_weights(source) - encoder_weights(source) if source else 0


@cache
def _encoding(source: str, prompts: int, tokens: int, precision: str) -> int:
    """Return the bytes that a model's text encoders take besides their weights, one encoder after another."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    return max(encoding_peak(encoder, prompts, tokens, kind) for encoder in _encoders(source))


def _stored(network: nn.Module) -> int:
    """Return the bytes of a network's weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def adapted(network: nn.Module) -> bool:
    """Return whether `network` is an adapter on a base, which `fsdp` shards, while every process holds the adapter."""
    return isinstance(network, Adapted)


def numel(network: nn.Module, trained: bool = False) -> int:
    """Return the number of weights of `network`, or of its trained weights."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


def slices(network: nn.Module, processes: int, trained: bool = False) -> int:
    """Return the number of weights in one slice of `network`. FSDP2 cuts each along its first axis, with padding."""
    if processes == 1:
        return numel(network, trained)
    shapes = (p.shape for p in network.parameters() if p.requires_grad or not trained)
    return sum(math.ceil(shape[0] / processes) * math.prod(shape[1:]) for shape in shapes)


def _traffic(recipe: Recipe, trained: dict[str, nn.Module], teacher: nn.Module, n: int, rolled: float) -> Traffic:
    """Return the traffic of one step, with the networks distributed as `engine` does it.

    Gradients are reduced in fp32 with the last part of each update. FSDP2 gathers a network for every pass, forward and
    backward (recomputing activations gathers nothing), and frees it afterwards.

    Args:
        rolled: see `rehearsal.Rehearsal`.
    """
    updates = {"student": 1, "fake score": _sums_of_fake(recipe, trained)}
    if recipe.parallel == "ddp" or n == 1:
        sums = sum(updates[name] * FP32 * numel(network, True) for name, network in trained.items())
        return Traffic(n, reduced=sums if n > 1 else 0)
    low = 2 if recipe.precision == "bf16" else FP32
    matched = "fake score" in trained
    guided = recipe.student.guidance is not None or recipe.match.guidance != 1
    # Per part: two with a graph; one for both scores; one for the images of each further fake-score update; and what
    # rolls noise to the step that makes these, and the first ones.
    made = recipe.fake.steps if matched else 1  # batches of images
    passes = {"student": 1 + made * (1 + rolled), "fake score": 1 + 2 * recipe.fake.steps}
    teachers = matched * (1 + guided) * (1 if recipe.match.sid is None else 2) + 2 * ("guide" in recipe.terms)
    if recipe.match.sid is not None:
        passes["fake score"] += 1
    if "gan" in recipe.terms:  # a judgement for the student, one for the head, and one for ratios of densities
        ratios = recipe.match.divergence != "reverse_kl"
        if recipe.gan.features == "fake":
            passes["fake score"] += 2 + 2 * recipe.fake.steps + ratios
        else:
            teachers += 2 + recipe.fake.steps + ratios
    gathered = sum(passes[name] * low * n * slices(_held(network), n) for name, network in trained.items())
    gathered += teachers * low * n * slices(teacher, n)
    scattered = sum(updates[k] * FP32 * n * slices(v, n, True) for k, v in trained.items() if not adapted(v))
    reduced = sum(updates[k] * FP32 * numel(v, True) for k, v in trained.items() if adapted(v))
    return Traffic(n, gathered=recipe.accumulate * gathered, scattered=scattered, reduced=reduced)


def _sums_of_fake(recipe: Recipe, trained: dict[str, nn.Module]) -> int:
    """Return how often a step sums the fake score's gradients over the processes: after each of its updates.

    Where it is wrapped by DDP or FSDP2, these also sum what a student's loss sends it, in vain.
    """
    judged = "gan" in recipe.terms and recipe.gan.features == "fake"
    sharded = recipe.parallel == "fsdp" and not adapted(trained.get("fake score", nn.Identity()))
    wrapped = sharded or not (recipe.own_terms or "gan" in recipe.terms)
    return recipe.fake.steps + (wrapped and (judged or recipe.match.sid is not None))


def _held(network: nn.Module) -> nn.Module:
    """Return what is sharded: the network, or the base of its adapter."""
    return network.base if isinstance(network, Adapted) else network


def _gathered(network: nn.Module, recipe: Recipe) -> float:
    """Return an upper bound on the bytes that FSDP2 holds gathered at once: everything outside the blocks, one block
    with its gradients and the buffer they are reduced from, and the next block, already on its way.
    """
    low = 2 if recipe.precision == "bf16" else FP32
    sizes = [numel(block) for block in blocks(network)]
    trained = 0 if adapted(network) else low + FP32
    pairs = [(low + trained) * b + low * a for a, b in zip([0, *sizes], [*sizes, 0], strict=True)]
    return low * (numel(_held(network)) - sum(sizes)) + max(pairs)
