"""One-step latency and throughput at the size of Stable Diffusion 1.5, by the pipeline that users call.

A part of `gpu.py`. `latency.py` looks into one call, part by part.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any, Literal

import matplotlib
import torch
from gpu_job import Figures, Job, Target
from gpu_steps import captured, stable
from step import timed

from distmatch import DistilledPipeline
from distmatch.diffusion.denoiser import Cond
from distmatch.models.diffusers.autoencoder import tiny_decoder
from distmatch.models.family import Components
from distmatch.models.library import components, find_model
from distmatch.system import rng
from distmatch.system.files import write_atomic

PROMPT = "a picture of things"
BATCHES = (1, 2, 4, 8, 16, 32)
Decoder = Literal["tiny", "full"]


def latency(job: Job) -> None:
    """One image from noise to 8-bit pixels on the host: bf16, eager, as one CUDA graph, and compiled.

    Away from a GPU, what is the same call there is made in fp32, and nothing is compiled.
    """
    loaded = cache(lambda: Loaded(job))
    target: dict[str, Target] = {"ms": ("at most", 10.0)}
    for decoder in ("tiny", "full"):
        goal = target if decoder == "tiny" and not job.tiny else {}
        eager = cache(lambda d=decoder: loaded().pipeline(d))
        compiled = cache(lambda d=decoder: loaded().pipeline(d, compile=True))
        job.measure(f"{decoder} decoder, eager", lambda e=eager: loaded().call(e()))
        job.measure(f"{decoder} decoder, CUDA graph", lambda e=eager: loaded().graph(e()), gpu=True)
        job.measure(f"{decoder} decoder, eager, with the text encoder", lambda e=eager: loaded().prompted(e()))
        if decoder == "tiny":
            for batch in BATCHES[: 2 if job.tiny else None]:
                job.measure(f"batch {batch}", lambda b=batch: loaded().many(b))
            draw(job)
        job.measure(f"{decoder} decoder, compile=True", lambda c=compiled: loaded().call(c()), goal, gpu=True)


class Loaded:
    """The student, with the teacher's random weights, and its parts."""

    def __init__(self, job: Job):
        self.job, self.folder = job, stable(job)
        self.precision: Literal["fp32", "bf16"] = "bf16" if job.gpu else "fp32"
        denoiser, info = find_model(f"diffusers:{self.folder}", "teacher")
        self.denoiser = denoiser.to(job.device).requires_grad_(False)
        if self.precision == "bf16":
            for weights in denoiser.parameters():  # as `from_pretrained` does
                if weights.ndim > 1:
                    weights.data = weights.data.bfloat16()
        self.info = replace(info, times=(denoiser.schedule.t_max,))
        self.parts = components(info, job.device)

    def pipeline(self, decoder: Decoder, compile: bool = False) -> DistilledPipeline:
        parts = self.parts
        if decoder == "tiny":
            parts = Components(parts.encode, tiny_decoder(str(self.folder / "taesd")).to(self.job.device))
        return DistilledPipeline(self.denoiser, self.info, parts, compile=compile, precision=self.precision)

    @cache  # noqa: B019  lives as long as the part
    def cond(self, n: int) -> Cond:
        assert self.parts.encode is not None
        return self.parts.encode([PROMPT] * n).to(self.job.device)

    def call(self, pipe: DistilledPipeline) -> Figures:
        cond = self.cond(1)
        return {"ms": 1000 * self.seconds(lambda: pipe.pixels([0], cond, 0))}

    def prompted(self, pipe: DistilledPipeline) -> Figures:
        return {"ms": 1000 * self.seconds(lambda: pipe(prompts=PROMPT))}

    def many(self, n: int) -> Figures:
        pipe, cond = self.pipeline("tiny"), self.cond(n)
        seconds = self.seconds(lambda: pipe.pixels(range(n), cond, 0), 1 if self.job.tiny else 8)
        return {"images per second": n / seconds, "ms per batch": 1000 * seconds}

    def graph(self, pipe: DistilledPipeline) -> Figures:
        """Of the eager network and decoder alone: what compiling adds to a graph, and what the rest of a call takes."""
        cond, z = self.cond(1), rng.noise(0, [0], self.info.shape).to(self.job.device)
        t = torch.full((1,), self.info.times[0], device=self.job.device)

        @torch.inference_mode()
        def passes() -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                return pipe.parts.decode(pipe.denoiser.net(z, t, cond))

        return {"ms, network and decoder": 1000 * self.seconds(captured(passes))}

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
    axes.set(xscale="log", xlabel="batch", ylabel="images per second", title="One step, tiny decoder, eager")
    axes.set_xticks([batch for batch, _ in points], [str(batch) for batch, _ in points])
    write_atomic(job.out / "throughput.png", lambda path: figure.savefig(path, format="png", dpi=120))
    pyplot.close(figure)
