"""Does it run on this device, and does it compute the same as on the CPU? Parts of `gpu.py`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_job import NEEDS_GPU, Figures, Job, Target
from gpu_rows import import_first, side_by_side

from distmatch.commands.train import train
from distmatch.methods.distill import Distiller
from distmatch.recipe import build, subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.loading import load_recipe, recipes
from distmatch.recipe.objectives import reads_pairs
from distmatch.recipe.smoke import cpu_smoke, make_networks
from distmatch.system import parallel
from distmatch.training.replay import mapped

OTHER_WAYS = (
    ("mnist", "compile=true"),
    ("cifar10-cond", "compile=true", "precision=bf16"),
    ("cifar10-cond", "precision=bf16"),
    ("imagenet64-cond", "precision=bf16", "gradient_checkpointing=true"),
    ("sd15-laion-6.25", "precision=bf16"),
    ("mnist", "cuda_graphs=true"),
    ("sd15-laion-6.25", "cuda_graphs=true", "precision=bf16"),
    ("emoji-4step", "cuda_graphs=true", "precision=bf16"),
)
"""What compiles comes first, since it takes longest."""

SPREAD = (
    ("cifar10-cond", "parallel=ddp"),
    ("cifar10-cond", "parallel=fsdp", "precision=bf16"),
    ("sd15-laion-6.25", "parallel=ddp", "precision=bf16"),
    ("sd15-laion-6.25", "parallel=fsdp", "precision=bf16"),
    ("mnist", "parallel=ddp", "compile=true"),
    ("mnist", "parallel=fsdp", "compile=true", "precision=bf16"),
)
TINY_SPREAD = (("toy2d", "parallel=fsdp"),)
TORCHRUN = "torchrun cifar10-cond parallel=fsdp"

TOLERANCES = {"fp32": (1e-4, 1e-2), "bf16": (0.05, 0.05)}
"""Relative, for the losses of the first step and of later ones.

In fp32 without TF32 the devices differ only in the order of their sums, about 1e-6 per layer. Later losses follow
AdamW, whose first updates are nearly `lr sign(g)`: a gradient close to zero may have either sign. bf16 rounds every
activation to 8 bits, one part in 256.
"""

FLOOR = 1e-6
"""Absolute: the first matching loss is zero, as the fake score starts as the teacher."""

STEPS = 3

TOGETHER = max(2, (os.cpu_count() or 2) - 2)
"""Rows at a time: they wait for Python, not for the card."""

LIMIT = 75.0
"""Seconds for one recipe."""


def smoke(job: Job) -> None:
    """Every recipe, cut to a minute of a CPU, in one process; and some compiled, in bf16 and by CUDA graphs."""
    longest_first = sorted(recipes(), key=lambda name: -len(load_recipe(name).stages))
    ways = [*OTHER_WAYS, *((name,) for name in longest_first)]
    if not job.gpu:
        for words in OTHER_WAYS:
            job.record(" ".join(words), {"figures": {"": NEEDS_GPU}})
        ways = ways[len(OTHER_WAYS) :]
    if job.tiny:
        ways = [("toy2d",)]
    import_first(job, diffusers=True)
    side_by_side(job, {" ".join(words): partial(trained, job, *words) for words in ways}, TOGETHER, LIMIT)


def processes(job: Job) -> None:
    """As torchrun starts it: a group of one process, with NCCL on a GPU, under DDP and FSDP2."""
    rows = {" ".join(words): partial(in_a_group, job, *words) for words in (TINY_SPREAD if job.tiny else SPREAD)}
    if job.gpu:
        rows[TORCHRUN] = partial(torchrun, job)
    else:
        job.record(TORCHRUN, {"figures": {"": NEEDS_GPU}})
    import_first(job, diffusers=True)
    side_by_side(job, rows, TOGETHER, LIMIT)


def in_a_group(job: Job, *words: str) -> Figures:
    with one_process():
        return trained(job, *words)


def trained(job: Job, name: str, *overrides: str) -> Figures:
    began, runs = time.perf_counter(), job.work / "smoke" / job.name / "-".join([name, *overrides])
    train(name, f"device={job.device}", *overrides, out=runs / "run", runs=runs, scale="cpu-smoke")
    return {"s": time.perf_counter() - began}


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, by the variables that torchrun would set."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {
        name: str(value) for name, value in {**numbers, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items()
    }
    with parallel.process_group():
        yield
    for name in (*numbers, "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]


def torchrun(job: Job) -> Figures:
    began, runs = time.perf_counter(), job.work / "smoke" / "torchrun"
    line = [*("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "distmatch", "train")]
    line += ["cifar10-cond", f"device={job.device.type}", "parallel=fsdp", "--scale", "cpu-smoke", "--runs", str(runs)]
    subprocess.run([sys.executable, "-m", *line, "-o", str(runs / "run")], check=True)
    return {"s": time.perf_counter() - began}


def agreement(job: Job) -> None:
    """The losses of the first steps, of the same draws, on this device and on the CPU.

    Away from a GPU, the CPU is compared with itself without oneDNN: other kernels, other orders of sums.
    """
    few_steps = "mnist terms=match student.nfe=4"
    agree(job, ["mnist", few_steps] if job.tiny else ["mnist", few_steps, "cifar10-cond", "imagenet64-cond"])


def agreement_sd15(job: Job) -> None:
    """The same for a small Stable Diffusion."""
    agree(job, ["sd15-laion-6.25"])


def agree(job: Job, recipes: Sequence[str]) -> None:
    """Compare each of the recipes, given by its name and overrides."""
    rows = {}
    for name, *overrides in map(str.split, recipes):
        for precision in ["fp32"] if job.tiny else TOLERANCES:
            for graphs in ("false", "true"):
                what = " ".join([name, *overrides])
                row = f"{what}, {precision}, cuda_graphs={graphs}, against fp32 on the CPU"
                rows[row] = partial(compared, job, name, precision, *overrides, f"cuda_graphs={graphs}")
    targets: dict[str, Target] = {"of the tolerance": ("at most", 1.0)}
    import_first(job, diffusers=any(one.startswith("sd15") for one in recipes))
    side_by_side(job, rows, 2 if job.tiny else 4, LIMIT, targets, threads=1 if job.tiny else 4)


def compared(job: Job, name: str, precision: str, *overrides: str) -> Figures:
    """Raises `AssertionError` if the devices differ by more than the tolerance."""
    torch.backends.cudnn.allow_tf32 = False
    folder = job.work / "agreement" / "-".join([name, precision, *overrides])
    ours, theirs = distillers(job, name, precision, folder, *overrides)
    here: list[dict[str, float]] = []
    there: list[dict[str, float]] = []
    for index in range(STEPS):
        parts = [theirs.draw(index, share) for share in theirs.shares]
        there.append(stepped(theirs, index, parts))
        with nullcontext() if job.gpu else torch.backends.mkldnn.flags(enabled=False):
            here.append(stepped(ours, index, mapped(parts, lambda tensor: tensor.to(job.device))))
    worst = of_the_tolerance(here, there, precision)
    assert worst <= 1, f"{worst:.2f} times the tolerance {TOLERANCES[precision]}: {here} here, {there} on the CPU"
    return {"of the tolerance": worst, "largest loss": max(max(row.values()) for row in there)}


def distillers(job: Job, name: str, precision: str, folder: Path, *overrides: str) -> tuple[Distiller, Distiller]:
    """The same distillation on this device in `precision`, and on the CPU in fp32."""
    full = load_recipe(name)
    make_networks(full, folder)
    small = cpu_smoke(full, folder)

    def made(*settings: str) -> tuple[Recipe, subjects.Subject]:
        recipe = load_recipe(name, [*small, "gradient_checkpointing=false", *settings])
        return recipe, subjects.subject(recipe)

    recipe, subject = made(*overrides, "device=cpu", "precision=fp32")
    pairs = build.pair_store(recipe, subject, folder) if reads_pairs(recipe) else None
    theirs = build.distiller(recipe, subject, pairs)
    return build.distiller(*made(*overrides, f"device={job.device}", f"precision={precision}"), pairs), theirs


def stepped(distiller: Distiller, index: int, parts: Sequence[Any]) -> dict[str, float]:
    """One step of what was drawn before."""
    images, losses = distiller.update_student(index, parts)
    if distiller.fake is not None:
        losses |= distiller.update_fake(index, parts, images)
    return {name: loss.item() for name, loss in losses.items()}


def of_the_tolerance(here: Sequence[dict[str, float]], there: Sequence[dict[str, float]], precision: str) -> float:
    """The largest difference in units of its tolerance. In bf16, of the losses that are no small differences."""
    first, later = TOLERANCES[precision]
    worst = 0.0
    for index, (a, b) in enumerate(zip(here, there, strict=True)):
        names = b.keys() if precision == "fp32" else b.keys() & {"regress/student", "match/fake"}
        for name in names:
            allowed = FLOOR + (first if index == 0 else later) * max(abs(a[name]), abs(b[name]))
            worst = max(worst, abs(a[name] - b[name]) / allowed)
    return worst
