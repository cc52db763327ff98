"""Weak scaling of the training step: images per second of N processes against one, at fixed work per process, and what
share of the time goes into communication.

    uv run python benchmarks/scaling.py                                              MNIST, two processes, two cores
    uv run python benchmarks/scaling.py mnist --batch 128 --parallel fsdp
    uv run python benchmarks/scaling.py cifar10-cond regress.loss=mse --small --batch 16 --processes 4
    uv run torchrun --standalone --nproc-per-node 8 benchmarks/scaling.py imagenet64-cond precision=bf16 --batch 48 \\
        --device cuda

Started alone it starts its processes itself, on a CPU with gloo; under torchrun it is one of those, and with `--device
cuda` they use NCCL. On a CPU each process has a core and a thread of its own; on GPUs an equal part of the cores.

Three ways take turns, so that a slow moment of the machine hits all, and the medians are compared: one process alone;
all of them apart, side by side without a word; all together, with shared gradients. What is lost from the first to the
second is the price of sharing the machine (memory bandwidth, clock, other people's work), from there on communication.
`exposed` is the part of the step that is lost to one process alone, `1 - t1 / tN`; `busy` the part in which some
collective was under way. Networks are random where the recipe would have to fetch them, as in `step.py`.
"""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Literal

import cyclopts
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

from distmatch.evaluation.measure import hardware
from distmatch.methods.distill import Distiller
from distmatch.models.folder import save_model
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.smoke import make_networks, random_edm
from distmatch.system import parallel

console = Console(width=100)


def main(
    recipe: str = "mnist",
    /,
    *overrides: str,
    batch: int = 64,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    processes: int = 2,
    rounds: int = 15,
    small: bool = False,
    device: str = "cpu",
) -> None:
    """
    Args:
        batch: of each term, per process.
        processes: how many to start; under torchrun it is torchrun's business.
        rounds: measured steps of each way.
        small: EDM's networks in their smoke-test size.
    """
    task = (recipe, overrides, batch, parallel, rounds, small, device)
    if "WORLD_SIZE" in os.environ:
        measure(*task)
        return
    if device != "cpu":
        sys.exit("processes on GPUs are torchrun's: torchrun --standalone --nproc-per-node N benchmarks/scaling.py ...")
    enough(processes)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(worker, (processes, port, task), nprocs=processes)


def worker(rank: int, world: int, port: int, task: tuple) -> None:
    """One of the processes that `main` starts, with the variables that torchrun would set."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in {**address, **numbers}.items()}
    measure(*task)


def cores() -> list[int]:
    """One logical processor of each physical core that this process may use."""
    found: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else str(number), number)
    return list(found.values())


def enough(processes: int) -> None:
    """End here where the processes on this machine cannot have a core each."""
    if len(cores()) < processes:
        sys.exit(
            f"{processes} processes need {processes} physical cores for themselves; this machine gives {len(cores())}: "
            "start fewer"
        )


def pin(device: str) -> None:
    """Give this process a core of its own, or on GPUs an equal part of them."""
    local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    enough(beside)
    each = 1 if device == "cpu" else len(cores()) // beside
    os.sched_setaffinity(0, cores()[local * each : (local + 1) * each])
    torch.set_num_threads(each)


def measure(
    recipe: str, overrides: tuple[str, ...], batch: int, how: str, rounds: int, small: bool, device: str
) -> None:
    pin(device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        make = prepare(recipe, [*overrides, f"device={device}", f"parallel={how}"], small, Path(temporary))
        alone = make(batch)  # before the group is there: this one knows of no other process
        with parallel.process_group():
            shared = make(batch * parallel.world())
            report(alone, shared, rounds, f"{recipe}, {how}, batch {batch} per process and term")


def prepare(recipe: str, overrides: list[str], small: bool, folder: Path) -> Callable[[int], Distiller]:
    """`make(batch) -> Distiller` of the recipe, whose networks and few pairs are in `folder`."""
    overrides = ["pairs.count=16", "pairs.steps=1", "pairs.shard=16", "pairs.batch=8", *overrides]
    resolved = load_recipe(recipe, overrides)
    if resolved.teacher.startswith("edm:"):
        save_model(folder / "teacher", *random_edm(Path(resolved.teacher).stem, small=small))
        overrides.append(f"teacher={folder / 'teacher'}")
    if resolved.regress.loss == "lpips":
        overrides.append(f"regress.weights={folder / 'weights'}")
    make_networks(resolved, folder, teacher=False)

    def make(batch: int) -> Distiller:
        final = load_recipe(recipe, [*overrides, f"match.batch={batch}", f"regress.batch={batch}"])
        subject = subjects.subject(final)
        pairs = build.pair_store(final, subject, folder) if objectives.reads_pairs(final) else None
        return build.distiller(final, subject, pairs)

    return make


def report(alone: Distiller, shared: Distiller, rounds: int, title: str) -> None:
    """Time the three ways; the first process prints."""
    world, index = parallel.world(), iter(range(10**9))
    ways: dict[str, Callable[[], None]] = {
        "1 process": lambda: None if parallel.rank() else run(alone, next(index)),
        f"{world} apart": lambda: run(alone, next(index)),
        f"{world} together": lambda: run(shared, next(index)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, rounds):
        for name, way in ways.items():
            parallel.mean(torch.zeros(1))  # wait, by gloo, which leaves GPUs alone
            began = time.perf_counter()
            way()
            slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 0:
                seconds[name].append(slowest.item())
    busy = busy_share(shared, [next(index) for _ in range(3)])
    if parallel.rank() > 0:
        return
    t1, images = median(seconds["1 process"]), alone.images_per_step
    print(title)
    table = Table("", "step, ms", "middle half", "images/s", "of ideal", "exposed", "busy")
    for name, each in seconds.items():
        count, t, ordered = (1 if name == "1 process" else world), median(each), sorted(each)
        low, high = (1000 * ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.75))
        last = name.endswith("together")
        table.add_row(
            name,
            f"{1000 * t:.1f}",
            f"{low:.1f} - {high:.1f}",
            f"{count * images / t:.1f}",
            f"{t1 / t:.1%}",
            f"{1 - t1 / t:.1%}" if count > 1 else "-",
            f"{busy:.1%}" if last else "-",
        )
    console.print(table)
    parameters = sum(p.numel() for p in alone.student.parameters())
    mine = sorted(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print({**hardware(alone.device), "rounds": rounds, "parameters": parameters, "first's cores": mine})
    print(f"load of the machine at the end {load:.1f}, of which {world} are these processes")


def run(distiller: Distiller, index: int) -> None:
    distiller.step(index)
    if distiller.device.type == "cuda":
        torch.cuda.synchronize()


def busy_share(distiller: Distiller, indices: Iterable[int]) -> float:
    """The part of the time of these steps in which a collective was under way on this process's device."""
    cuda = distiller.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        began = time.perf_counter()
        for index in indices:
            run(distiller, index)
        whole = time.perf_counter() - began
    spans = []
    for event in recorded.events() or ():
        on_device = event.device_type.name == "CUDA"
        if "nccl" in event.name.lower() if cuda and on_device else not cuda and event.name.startswith("gloo:"):
            spans.append((event.time_range.start, event.time_range.end))
    return covered(spans) / 1e6 / whole


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    cyclopts.run(main)
