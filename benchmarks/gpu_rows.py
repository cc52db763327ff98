"""Rows that do not wait for each other, measured side by side, each in a process of its own. For parts of `gpu.py`."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch
from gpu_job import Figures, Job, Target, attempt

GRACE = 5.0
"""Seconds after its limit in which a row may still say where it is."""

IMPORTED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torchvision.models",
    "distmatch.commands.distillation",
    "distmatch.models.perceptual",
)
DIFFUSERS = (
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
)

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Running:
    row: str
    process: BaseProcess
    ends: float


def side_by_side(
    job: Job,
    rows: Mapping[str, Callable[[], Figures]],
    together: int,
    limit: float,
    targets: Mapping[str, Target] | None = None,
    threads: int = 1,
) -> None:
    """Measure `rows`, `together` at a time, each in a process of its own; record each when it ends.

    So an error of CUDA in one does not reach the others. They are forked, and have what this process has imported; it
    may not have touched CUDA, nor computed anything in several threads.

    Args:
        limit: seconds after which a row fails.
        threads: how many each may use on the CPU.
    """
    waiting = [row for row in rows if not job.measured(row)]
    how = context(job)
    running: dict[Connection, Running] = {}
    while waiting or running:
        while waiting and len(running) < together:
            row = waiting.pop(0)
            seconds = max(1.0, min(limit, job.left - GRACE))  # to say where it is before this part is cut
            ours, theirs = how.Pipe(duplex=False)
            process = how.Process(target=_measure, args=(theirs, row, rows[row], seconds, threads))
            process.start()
            theirs.close()
            running[ours] = Running(row, process, time.monotonic() + seconds + GRACE)
        wait(list(running), timeout=1)
        for pipe, one in list(running.items()):
            if time.monotonic() > one.ends:
                one.process.kill()
            alive = one.process.is_alive()
            if alive and not pipe.poll():
                continue
            job.record(one.row, _received(pipe, one.process), targets)
            del running[pipe]


def _received(pipe: Connection, process: BaseProcess) -> dict[str, Any]:
    """Return what a row's process sent, or how it died; see to its end."""
    try:
        done = pipe.recv() if pipe.poll() else None
    except EOFError:
        done = None
    process.join(GRACE)  # what CUDA and NCCL do at an exit may hang
    process.kill()
    process.join()
    pipe.close()
    return done or {"error": f"exit status {process.exitcode}"}


def _measure(pipe: Connection, row: str, work: Callable[[], Figures], limit: float, threads: int) -> None:
    torch.set_num_threads(threads)
    pipe.send(attempt(row, work, limit))
    pipe.close()


def import_first(job: Job, diffusers: bool) -> None:
    """Import what the rows need, once for all of them: each would spend seconds on it."""
    if job.tiny:
        return
    # Some ask at once whether there is a GPU, and a process that has asked CUDA cannot be forked into ones that use it.
    with patch.multiple(torch.cuda, is_available=lambda: job.gpu, device_count=lambda: int(job.gpu)):
        for name in (*IMPORTED, *(DIFFUSERS if diffusers else ())):
            import_module(name)


def context(job: Job) -> Any:
    """Return how to start processes: by forking, unless CUDA cannot be used in what is forked from this one."""
    if not job.gpu:
        return fork
    child = fork.Process(target=torch.empty, args=(1,), kwargs={"device": job.device})
    child.start()
    child.join(30)
    child.kill()
    return multiprocessing.get_context("spawn") if child.exitcode else fork
