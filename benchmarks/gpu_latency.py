"""One-step latency and throughput at the size of Stable Diffusion 1.5, by the pipeline that users call.

Parts of `gpu.py`. `latency.py` looks into one call, part by part.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import Any, Literal

import matplotlib
import torch
from gpu_job import NEEDS_GPU, Figures, Job, Target
from gpu_rows import import_first, side_by_side
from gpu_steps import captured, stable
from step import timed
from torch import Tensor, nn

from distmatch import DistilledPipeline
from distmatch.diffusion.denoiser import Cond
from distmatch.models.bf16 import round_weights
from distmatch.models.diffusers.autoencoder import tiny_decoder
from distmatch.models.family import Components
from distmatch.models.library import components, find_model
from distmatch.system import rng
from distmatch.system.files import write_atomic
from distmatch.training.engine import RECOMPILATIONS

PROMPT = "a picture of things"
BATCHES = (1, 2, 4, 8, 16, 32)
AIM: dict[str, Target] = {"ms": ("at most", 10.0)}
Decoder = Literal["tiny", "full"]

SEARCHED, FUSED = "cudnn.benchmark", "query, key and value as one product"

WAYS = ("", SEARCHED, FUSED)
"""Changes of how network and decoder compute, each by itself."""

REPEATED = ("ResnetBlock2D", "BasicTransformerBlock", "AutoencoderTinyBlock")
"""Blocks of Stable Diffusion's networks that occur often, and hold most of the arithmetic."""

COMPILED = {
    "compile=True": 110.0,
    "repeated blocks compiled, one CUDA graph": 60.0,
    "compile=True, cuda_graphs=True": 80.0,
}
"""Ways to compile one image with the tiny decoder, and the seconds after which each is given up."""


def latency(job: Job) -> None:
    """One image from noise to 8-bit pixels on the host: bf16, as one CUDA graph and eager. The most valuable row first.

    Away from a GPU, what is the same call there is made in fp32, and nothing is recorded.
    """
    loaded = cache(lambda: Loaded(job))
    recorded = cache(lambda decoder: loaded().pipeline(decoder, cuda_graphs=True))
    eager = cache(lambda decoder: loaded().pipeline(decoder))
    job.measure("writing and loading random networks", lambda: {"s": loaded().loading})
    row = "tiny decoder, cuda_graphs=True"
    job.measure(row, lambda: loaded().call(recorded("tiny")), {} if job.tiny else AIM, gpu=True)
    for change in WAYS:
        row = "network and decoder alone, as one CUDA graph" + (change and f"; {change}")
        job.measure(row, lambda c=change: loaded().alone(c))
    job.measure("noise alone, made on the host and copied", lambda: loaded().noise())
    for batch in BATCHES[: 2 if job.tiny else None]:
        job.measure(f"batch {batch}", lambda b=batch: loaded().many(b, recorded("tiny")))
    draw(job)
    job.measure("full decoder, cuda_graphs=True", lambda: loaded().call(recorded("full")), gpu=True)
    for decoder in ("tiny", "full"):
        row = f"{decoder} decoder, cuda_graphs=True, with the text encoder"
        job.measure(row, lambda d=decoder: loaded().prompted(recorded(d)), gpu=True)
    for decoder in ("tiny", "full"):
        job.measure(f"{decoder} decoder, eager", lambda d=decoder: loaded().call(eager(d)))
        row = f"{decoder} decoder, eager, with the text encoder"
        job.measure(row, lambda d=decoder: loaded().prompted(eager(d)))


def latency_compiled(job: Job) -> None:
    """One image with the tiny decoder, compiled in several ways; each in a process of its own, one after another.

    A way that is given up is recorded with where it was: compiling the whole network takes a minute or more.
    """
    if not job.gpu:
        for row in COMPILED:
            job.record(row, {"figures": {"": NEEDS_GPU}})
        return
    import_first(job, diffusers=True)
    for row, limit in COMPILED.items():
        side_by_side(job, {row: partial(compiled, job, row)}, 1, limit, AIM, threads=4)


def compiled(job: Job, way: str) -> Figures:
    loaded = Loaded(job)
    cond = loaded.cond(1)
    began = time.perf_counter()
    if way.startswith("compile=True"):
        pipe = loaded.pipeline("tiny", compile=True, cuda_graphs="cuda_graphs" in way)
    else:
        pipe = loaded.pipeline("tiny", cuda_graphs=True)
        assert isinstance(pipe.parts.decode, nn.Module)
        compile_repeated(pipe.denoiser, pipe.parts.decode)
    pipe.pixels([0], cond, 0)
    first = time.perf_counter() - began
    return {**loaded.call(pipe), "s until the first image": first, **compiling_seconds()}


def compile_repeated(*networks: nn.Module) -> None:
    """Compile the blocks that occur often, in place: one of each kind and size."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    for network in networks:
        for part in network.modules():
            if type(part).__name__ in REPEATED:
                part.compile(dynamic=False)


def compiling_seconds() -> Figures:
    """Where the compiler spent its time, by its own count; phases contain others."""
    from torch._dynamo.utils import calculate_time_spent

    return {f"s in {phase}": seconds for phase, seconds in calculate_time_spent().items() if seconds > 1}


class Loaded:
    """The student, with the teacher's random weights, and its parts."""

    def __init__(self, job: Job):
        began = time.perf_counter()
        self.job, self.folder = job, stable(job)
        self.precision: Literal["fp32", "bf16"] = "bf16" if job.gpu else "fp32"
        denoiser, info = find_model(f"diffusers:{self.folder}", "teacher")
        self.denoiser = denoiser.to(job.device).requires_grad_(False)
        if self.precision == "bf16":
            round_weights(denoiser.net)  # as `from_pretrained` does
        self.info = replace(info, times=(denoiser.schedule.t_max,))
        self.parts = components(info, job.device)
        self.loading = time.perf_counter() - began

    def pipeline(self, decoder: Decoder, **how: Any) -> DistilledPipeline:
        parts = self.parts
        if decoder == "tiny":
            parts = Components(parts.encode, self.tiny())
        return DistilledPipeline(self.denoiser, self.info, parts, precision=self.precision, **how)

    def tiny(self) -> nn.Module:
        return tiny_decoder(str(self.folder / "taesd")).to(self.job.device)

    @cache  # noqa: B019  lives as long as the part
    def cond(self, n: int) -> Cond:
        assert self.parts.encode is not None
        return self.parts.encode([PROMPT] * n).to(self.job.device)

    def call(self, pipe: DistilledPipeline) -> Figures:
        cond = self.cond(1)
        return {"ms": 1000 * self.seconds(lambda: pipe.pixels([0], cond, 0))}

    def prompted(self, pipe: DistilledPipeline) -> Figures:
        return {"ms": 1000 * self.seconds(lambda: pipe(prompts=PROMPT))}

    def many(self, n: int, pipe: DistilledPipeline) -> Figures:
        cond = self.cond(n)
        seconds = self.seconds(lambda: pipe.pixels(range(n), cond, 0), 1 if self.job.tiny else 8)
        return {"images per second": n / seconds, "ms per batch": 1000 * seconds}

    def noise(self) -> Figures:
        return {"ms": 1000 * self.seconds(lambda: rng.noise(0, [0], self.info.shape).to(self.job.device))}

    def alone(self, change: str) -> Figures:
        """Network and decoder without the rest of a call, together and each: what the card itself needs."""
        pipe = self.pipeline("tiny")
        net, decode = pipe.denoiser.net, pipe.parts.decode
        if change == FUSED:
            net = copy.deepcopy(net)
            net.get_submodule("unet").fuse_qkv_projections()  # pyright: ignore[reportCallIssue]
        dtype = next(net.parameters()).dtype
        z, cond = rng.noise(0, [0], self.info.shape).to(self.job.device, dtype), self.cond(1)
        t = torch.full((1,), self.info.times[0], device=self.job.device)

        def passes(work: Callable[[], Tensor]) -> Callable[[], Any]:
            run = torch.inference_mode()(work)
            return captured(run) if self.job.gpu else run

        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = change == SEARCHED
        try:
            return {
                "ms": 1000 * self.seconds(passes(lambda: decode(net(z, t, cond)))),
                "ms, network": 1000 * self.seconds(passes(lambda: net(z, t, cond))),
                "ms, decoder": 1000 * self.seconds(passes(lambda: decode(z))),
            }
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def seconds(self, work: Callable[[], Any], rounds: int = 30) -> float:
        rounds = 1 if self.job.tiny else rounds
        return median(timed({"": work}, self.job.device, rounds)[""])


def draw(job: Job) -> None:
    """Write throughput.png: images per second over the batch."""
    rows = job.results.part(job.name)["rows"]
    points = [
        (batch, rows[f"batch {batch}"]["figures"]["images per second"])
        for batch in BATCHES
        if "figures" in rows.get(f"batch {batch}", {})
    ]
    if not points:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(*zip(*points, strict=True), marker="o")
    how = "by CUDA graphs" if job.gpu else "eager"
    axes.set(xscale="log", xlabel="batch", ylabel="images per second", title=f"One step, tiny decoder, {how}")
    axes.set_xticks([batch for batch, _ in points], [str(batch) for batch, _ in points])
    write_atomic(job.out / "throughput.png", lambda path: figure.savefig(path, format="png", dpi=120))
    pyplot.close(figure)
