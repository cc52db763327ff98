"""Preflight checks: try everything that a distillation needs, at minimal size, before anything long begins.

A check is a function of the `Flight`. It returns what it found, or None if it does not apply to the recipe, and raises
`UserError` if the run would fail hours later. Together the checks cost about ten evaluations of one sample, plus
writing and reading the student's folder once.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from distmatch.data import imaging
from distmatch.data.pairs import PairSpec, agree
from distmatch.diffusion.conditions import WHOLE, with_guidance
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.solvers import solver
from distmatch.evaluation.measure import Space
from distmatch.methods.terms import Samples, Start
from distmatch.models.folder import load_model, save_model
from distmatch.models.info import Info
from distmatch.models.library import diffusers_source
from distmatch.planning.recording import record
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.real_images import latents_bytes
from distmatch.system import parallel
from distmatch.system.disk import check_room
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import scratch
from distmatch.system.plain import read_json
from distmatch.system.precision import autocast
from distmatch.system.screen import counted, size
from distmatch.system.storage import Folder, filesystem, is_url
from distmatch.training.adapters import Adapted, network_of
from distmatch.training.engine import try_compiler
from distmatch.training.log import TRACKERS

FP32 = 4
"""Bytes of a number in a checkpoint."""


class Flight:
    """A run before it begins: its recipe, its folder, and what checks load for it on first use.

    Args:
        own: your own teacher; see `distillation.distil`.
    """

    def __init__(self, recipe: Recipe, out: Path, runs: Path, own: tuple[Denoiser, Info] | None = None):
        self.recipe, self.out, self.runs, self.own = recipe, out, runs, own
        self.stages = recipe.parts
        self.device = subjects.device(recipe.device)

    @cached_property
    def subject(self) -> subjects.Subject:
        net = self.own and self.own[0].net
        odd = [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)] if net else []
        if odd:
            raise UserError(f"the state of {type(net).__name__} holds more than tensors ({odd[0]}); it cannot be saved")
        return subjects.subject(self.recipe, self.own)

    @cached_property
    def spaces(self) -> list[Space]:
        """The spaces in which the student is measured during training, with their references."""
        return subjects.recipe_spaces(self.recipe.evaluate, self.recipe.teacher, self.subject.info, self.device)

    @cached_property
    def fake(self) -> Denoiser:
        """What the fake score starts from: the teacher itself, unless the recipe changes the network."""
        return build.start(self.recipe, self.subject)

    @cached_property
    def student(self) -> Denoiser:
        with tried("a copy of the network to train"):
            if self.recipe.fake.adapter.rank:
                build.fake_network(self.recipe, self.fake)
            return build.student(self.recipe, self.fake)

    @cached_property
    def info(self) -> Info:
        return build.student_info(self.recipe, self.subject)

    @cached_property
    def z(self) -> Tensor:
        """Noise for one sample."""
        return torch.randn(1, *self.subject.info.shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    @cached_property
    def cond(self) -> Cond | None:
        """The condition of the first sample. A prompt is encoded directly; `prompts.cache` is filled later."""
        encode = subjects.components_of(self.recipe, self.subject.info, self.device).encode
        scales = self.recipe.student.guidance
        if encode is None:
            cond = self.subject.conditions.at([0])
        else:
            before = subjects.encoded_before(self.recipe)
            with subjects.alone(encode, self.subject.denoiser) if before else nullcontext():
                cond = encode(self.subject.prompts[:1])
            if scales is not None:
                cond = with_guidance(cond, torch.tensor([scales[0]]))
        return cond and cond.to(self.device)

    @cached_property
    def sample(self) -> Tensor:
        """The student's sample, with its graph."""
        with autocast(self.device, self.recipe.precision), tried("the student, one sample"):
            steps = Steps(self.info.times)
            last = len(steps) - 1
            with torch.no_grad():  # as in training: only one step keeps its graph
                x = steps.start(self.student, self.student.schedule, self.z, self.cond, [self.z] * last, last)
            x = steps.step(self.student, x, self.cond, last)
        return checked(x, self.z, "the student")

    @cached_property
    def pixels(self) -> Tensor:
        """The student's sample as an image u8[1,C,H,W]."""
        decode = subjects.components_of(self.recipe, self.subject.info, self.device).decode
        with torch.no_grad():
            return imaging.picture(decode(self.sample))

    def pairs(self) -> dict[str, PairSpec]:
        """Return the largest pair store that the stages need at each place."""
        found: dict[str, PairSpec] = {}
        for stage in filter(objectives.reads_pairs, self.stages):
            spec = build.pair_spec(stage, self.subject)
            place = build.pairs_folder(stage, spec, self.runs)
            found[place] = max(spec, found.get(place, spec), key=lambda spec: spec.count)
        return found


@contextmanager
def tried(what: str) -> Iterator[None]:
    """Turn any error inside the with block into a `UserError`: custom networks may raise anything."""
    try:
        yield
    except (UserError, OSError):  # the command line explains errors of the disk
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(f"{what}, cannot be made: {type(error).__name__}: {reason[0]}") from error


def checked(x: Tensor, like: Tensor, maker: str) -> Tensor:
    """Return `x`. Raises `UserError` unless it is finite and has the shape of `like`."""
    if x.shape != like.shape:
        raise UserError(f"{maker} makes a sample of shape {list(x.shape[1:])}; expected {list(like.shape[1:])}")
    if not x.isfinite().all():
        raise UserError(f"{maker} makes a sample that is not finite; check its weights, its schedule and prediction")
    return x


def packages(flight: Flight) -> str | None:
    """The optional packages that the recipe needs are installed. Checked before anything heavy is loaded."""
    recipe, needed = flight.recipe, list(flight.recipe.log.track)
    if diffusers_source(recipe.teacher):
        needed += ["diffusers", "transformers"]
    if any(stage.regress.loss == "lpips" for stage in flight.stages if "regress" in stage.terms):
        needed += ["piq", "torchvision"]
    if str(recipe.prompts.path).endswith(".parquet"):
        needed += ["pyarrow"]
    need(*needed, by=f"recipe {recipe.name}")
    for place in filter(None, (*(stage.pairs.path for stage in flight.stages), recipe.evaluate.reference)):
        if is_url(place):
            filesystem(place)
    return ", ".join(needed)


def batches(flight: Flight) -> str:
    """The processes can share the batches equally, in every stage, and no stage is for one process alone."""
    for stage in flight.stages:
        build.check_batches(stage)
        build.check_alone(stage, flight.device.type)
    terms = [name for name in ("match", "regress") if name in flight.recipe.terms]
    sizes = [f"{name} {getattr(flight.recipe, name).batch}" for name in terms]
    return f"{', '.join(sizes)} over {parallel.world()} process{'es' if parallel.world() > 1 else ''}"


def folder(flight: Flight) -> str | None:
    """The run's folder and that of the prompts' states are writable."""
    if parallel.rank() == 0:
        for place in filter(None, (flight.out, flight.recipe.prompts.cache, flight.recipe.real.cache)):
            with scratch(Path(place)):
                pass
    return f"{flight.out} can be written"


def compiler(flight: Flight) -> str | None:
    if not flight.recipe.compile:
        return None
    with tried("compile: true, which needs a C++ compiler and on a GPU also Triton: a first function"):
        try_compiler(flight.device)
    return "compiles a first function"


def trackers(flight: Flight) -> str | None:
    if parallel.rank() == 0:
        for name in flight.recipe.log.track:
            TRACKERS[name].ready()
    return ", ".join(flight.recipe.log.track)


def teacher(flight: Flight) -> str:
    """It loads, and one step of its sampler, guided as for pairs and matching, makes a valid sample."""
    recipe, info, denoiser = flight.recipe, flight.subject.info, flight.subject.denoiser
    guidances = [scale for stage in flight.stages for scale in (stage.match.guidance, stage.guide.guidance)]
    scales = {recipe.scale(scale) for scale in (recipe.pairs.guidance, *guidances)}
    with torch.no_grad(), tried("the teacher, one sample"):
        sampler = solver(recipe.pairs.sampler, info.scheduler)
        for scale in scales:
            x = sampler(guided(denoiser, scale), denoiser.schedule, flight.z, flight.cond, 1)
            checked(x, flight.z, "the teacher")
    prompts = f", {counted(len(flight.subject.prompts), 'prompt')}" if flight.subject.prompts else ""
    return f"{recipe.teacher}, {_weights(denoiser)}, samples {list(info.shape)}{prompts}"


def student(flight: Flight) -> str:
    """It starts from what the recipe names and makes a valid sample; so does the fake score from that sample."""
    made = flight.sample
    if objectives.trains_fake(flight.recipe):
        with torch.no_grad(), autocast(flight.device, flight.recipe.precision), tried("the fake score, one sample"):
            t = torch.full((1,), flight.student.schedule.t_max, device=flight.device)
            checked(flight.fake(made.detach(), t, flight.cond), made, "the fake score")
    times = ", ".join(f"{t:g}" for t in flight.info.times)
    begun = flight.recipe.student.init or ("a new network" if flight.recipe.student.network else "the teacher")
    return f"from {begun}, {_weights(flight.student)}, at t = {times}"


def losses(flight: Flight) -> str:
    """Every stage's loss of one sample is finite, and its gradient reaches the student."""
    found, x = {}, flight.sample.detach().requires_grad_()
    for stage in flight.stages:
        for name in ("match", "guide"):
            if name in stage.terms:  # its noise levels must exist between the student's times
                objectives.TERMS[name](stage, flight.subject, flight.student, name)
        if "regress" in stage.terms:
            distance = objectives.regression(stage, flight.subject)
            with (
                autocast(flight.device, flight.recipe.precision),
                tried(f"regress.loss {stage.regress.loss}, of one sample"),
            ):
                value = distance(x, torch.zeros_like(x))
                value.backward()
            found[f"{stage.regress.loss}, decoder {stage.regress.decoder}"] = value
    for name in (name for name in flight.recipe.terms if name not in ("match", "guide", "regress")):
        found[name] = _other_loss(flight, name, x)
    with tried("the gradient, of one sample"):
        flight.sample.backward(torch.ones_like(x) if x.grad is None else x.grad)
    weights = [weight for weight in flight.student.parameters() if weight.requires_grad]
    if not any(weight.grad is not None for weight in weights):
        raise UserError("no gradient reaches the student's weights; its forward must not run under torch.no_grad()")
    for weight in weights:
        weight.grad = None
    for name, value in found.items():
        if not value.isfinite():
            raise UserError(f"{name} of one sample is {value.item()}")
    return "; ".join([*found, "the gradient reaches the student"])


def _other_loss(flight: Flight, name: str, x: Tensor) -> Tensor:
    """Return the student loss of the term `name`, gan or your own, for one sample, backpropagated to `x`."""
    make = objectives.TERMS.get(name, objectives.own_term)
    term, said = make(flight.recipe, flight.subject, flight.fake, name), name if name == "gan" else f"own_terms.{name}"
    generator = torch.Generator(flight.device).manual_seed(0)
    if unknown := [stream for stream in term.reads if stream not in objectives.STREAMS]:
        raise UserError(f"{said} reads {unknown[0]!r}; expected {' or '.join(objectives.STREAMS)}")
    start = Start(flight.z, flight.cond, 1, generator, y=torch.zeros_like(x))
    cond = Cond.cat(*[flight.cond for _ in term.reads])
    with autocast(flight.device, flight.recipe.precision), tried(f"{said}, of one sample"):
        drawn = term.draw([start for _ in term.reads], WHOLE)
        samples = Samples(torch.cat([x for _ in term.reads]), cond)
        value = term.student_loss(drawn, samples)
        value.backward()
    return value


def recording(flight: Flight) -> str | None:
    """With `cuda_graphs`, on a GPU, every stage's updates can be recorded, and what was recorded can be replayed."""
    if not subjects.records_graphs(flight.recipe, flight.device.type):
        return None
    with tried("cuda_graphs: true, a step of one sample"):
        count = record(flight.stages, flight.subject, flight.z, flight.cond)
    return f"{counted(count, 'step')} recorded and replayed"


def pictures(flight: Flight) -> str | None:
    shape = flight.subject.info.shape
    if len(shape) != 3 and not flight.recipe.log.preview:
        return None
    channels = flight.pixels.shape[1]
    if channels not in (1, 3):
        raise UserError(f"samples have {channels} channels; a run shows them as pictures, of 1 or 3")
    imaging.png(imaging.grid(flight.pixels))
    return f"{flight.pixels.shape[2]} x {flight.pixels.shape[3]}"


def reference(flight: Flight) -> str | None:
    """Feature spaces and references load, and accept the student's images."""
    for space, real in flight.spaces:
        with tried(f"evaluate.features {flight.recipe.evaluate.features}, of one picture"):
            features, _ = space.both(flight.pixels)
        if features.shape[1] != len(real.mu):
            raise UserError(
                f"evaluate.features {flight.recipe.evaluate.features} has {features.shape[1]} features, its reference "
                f"{real.source} {len(real.mu)}; they were not made for each other"
            )
    return "; ".join(f"{len(real.mu)} features against {real.source}" for _, real in flight.spaces)


def saving(flight: Flight) -> str | None:
    """The student's folder is written and read back with equal weights. A custom network is passed in for reading."""
    if parallel.rank() > 0:
        return None
    with scratch(flight.out) as place, tried("the student's folder"):
        save_model(place, flight.student, flight.info)
        config = read_json(place / "config.json", dict[str, Any])
        network = network_of(flight.student)
        net = copy.deepcopy(network) if config["network"]["type"] is None else None
        schedule = flight.student.schedule if config["schedule"]["type"] is None else None
        back, _ = load_model(place, net, schedule)
        nbytes = sum(file.stat().st_size for file in place.iterdir())
    here = dict(flight.student.merged()) if isinstance(flight.student, Adapted) else network.state_dict()
    there = back.net.state_dict()
    for name, value in here.items():
        if name not in there or not torch.equal(there[name].cpu(), value.cpu().to(there[name].dtype)):
            kind = _kind(flight.student)
            raise UserError(f"{kind} is not the same after it was saved and loaded: net.{name} differs")
    own = [name for name, part in (("net", net), ("schedule", schedule)) if part is not None]
    return f"{size(nbytes)}, equal when read" + (f" (give {' and '.join(own)} to load it)" if own else "")


def prompts(flight: Flight) -> str | None:
    """Say how many there are, and how large their cached states are."""
    cache, subject = flight.recipe.prompts.cache, flight.subject
    if not subject.prompts:
        return None
    said = f"{len(subject.prompts):,}, encoded batch by batch"
    if cache is not None:
        nbytes = subjects.states_bytes(subject.denoiser, subject.info, len(subject.prompts))
        said = f"{len(subject.prompts):,}, whose states take {size(nbytes)} in {cache}"
    return said + (f"; {subject.cut:,} are cut" if subject.cut else "")


def pairs(flight: Flight) -> str | None:
    """The stages' pair stores do not belong to other settings, and are writable if pairs are missing."""
    recipe, found = flight.recipe, []
    for place, spec in flight.pairs().items():
        store = Folder(place)
        stored, sizes = agree(store, spec), store.sizes()
        there = min(spec.shards, sum(name.endswith(".safetensors") for name in sizes))
        if parallel.rank() == 0 and (stored is None or stored.count < spec.count or there < spec.shards):
            _writable(store)
        few = spec.count < recipe.regress.batch
        small = ", fewer than regress.batch, so some pairs appear twice in a batch" if few else ""
        found.append(f"{spec.count:,} in {place}, {there} of {counted(spec.shards, 'shard')} there{small}")
    return "; ".join(found)


def disk(flight: Flight) -> str | None:
    """Every disk has room for what the run will write to it."""
    remedy = "choose other folders (--out, --runs, pairs.path), or lower checkpoint.keep or pairs.count"
    return check_room(_sizes(flight), "the run writes", remedy)


Check = Callable[[Flight], str | None]
CHECKS: Sequence[Check] = (
    packages,
    batches,
    folder,
    trackers,
    compiler,
    teacher,
    student,
    losses,
    recording,
    pictures,
    reference,
    saving,
    prompts,
    pairs,
    disk,
)


def checks(flight: Flight) -> Iterator[tuple[str, str]]:
    """Yield the name and the finding of each check. If one process has a problem, all of them raise."""
    for check in CHECKS:
        # `reference` waits for other processes itself, which `agreed` does not allow.
        found = check(flight) if check is reference else parallel.agreed(lambda check=check: check(flight))
        if found:
            yield check.__name__, found


def cleared(flight: Flight) -> tuple[subjects.Subject, list[Space]]:
    """Run all checks, and return what they loaded for the run."""
    for _ in checks(flight):
        pass
    return flight.subject, flight.spaces


def _sizes(flight: Flight) -> Iterator[tuple[Path, int]]:
    """Yield folders on disks, and the bytes that the run has yet to write there."""
    for place, spec in flight.pairs().items():
        yield from build.unwritten(place, spec)
    cache, subject = flight.recipe.prompts.cache, flight.subject
    if cache is not None and subject.prompts:
        folder = subjects.states_folder(cache, subject.encoders, subject.prompts)
        nbytes = subjects.states_bytes(subject.denoiser, subject.info, len(subject.prompts))
        yield folder, _left(nbytes, folder.glob("*"))
    if subject.real is not None and subject.real.cache is not None:
        nbytes = latents_bytes(subject.info, len(subject.real.order))
        yield subject.real.cache, _left(nbytes, subject.real.cache.glob("*"))
    state = _state(flight.student, copies=2)
    if objectives.trains_fake(flight.recipe):
        state += sum(p.numel() for p in flight.fake.parameters()) * 3 * FP32
    kept = flight.recipe.checkpoint.keep + 1 + bool(flight.spaces)
    saved = flight.out.glob("checkpoints/step-*/*")
    yield flight.out, _left(kept * state, saved) + _state(flight.student, copies=1, trained=0)


def _left(nbytes: int, files: Iterable[Path]) -> int:
    """Return how many of `nbytes` are still to be written beside `files`."""
    return max(0, nbytes - sum(file.stat().st_size for file in files))


def _state(network: Denoiser, copies: int, trained: int = 2) -> int:
    """Return the bytes of `copies` of the network's state plus `trained` numbers per trained weight."""
    weights = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return FP32 * (copies * sum(v.numel() for v in network.state_dict().values()) + trained * weights)


def _writable(store: Folder) -> None:
    if store.path is not None:
        with scratch(store.path):
            return
    name = f".preflight-{os.getpid()}-{uuid4().hex}"
    store.create(name, b"")
    store.remove(name)


def _weights(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:,.1f} M weights"


def _kind(network: Denoiser) -> str:
    return f"the student's network {type(network.net).__name__}"
