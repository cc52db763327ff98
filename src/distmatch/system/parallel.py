"""Several processes with one job: who this one is, work in turns, results in order.

The processes are those of `torchrun`, or of anything that sets its variables RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Without them, and before `joined`, there is one process, which does all of the work itself.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distmatch.system.errors import Agreed, Lost, UserError
from distmatch.system.heartbeat import watched

Job = TypeVar("Job")
Result = TypeVar("Result")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, of which the first may have to look at a million images."""


_DEATHS = re.compile("closed by peer|reset by peer|Broken pipe|NCCL|timed out|Timed out")
"""What the others' groups say when a process is gone."""


@contextmanager
def joined() -> Iterator[None]:
    """Within it, this process is one of the group that was started; the device `cuda` is the GPU of its own.

    What is on the host is passed around by gloo, what is on GPUs by NCCL. Inside of another `joined` it does nothing.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count())
    # Workers that torchrun has started again meet in the same store, where the dead ones' addresses still are.
    found, number, size = next(rendezvous("env://"))
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        with watched(store, number, size):
            yield
            barrier()  # the first is the last to be missed: the others' store may live in it
    except RuntimeError as error:
        if not _DEATHS.search(str(error)):
            raise
        raise Lost(
            f"process {rank()} of {world()} lost another process of this job ({str(error).strip().splitlines()[0]}). "
            "Its own message says why; the last checkpoint is kept, and torchrun --max-restarts goes on from it"
        ) from error
    finally:
        aside.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


@cache
def aside() -> dist.ProcessGroup:
    """A second group of all processes, for what a thread passes around while the first is in use. On the host; all must
    ask for it."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


def mean(table: torch.Tensor) -> torch.Tensor:
    """The mean of the processes' tables, on the CPU, on all of them."""
    if world() > 1:
        dist.all_reduce(table)
        table /= world()
    return table


def any(here: bool) -> bool:
    """Whether it is so in any of the processes."""
    return bool(mean(torch.tensor(float(here))) > 0)


def told(value: Result) -> Result:
    """The first process's `value`, on all of them."""
    return first(lambda: value)


def first(make: Callable[[], Result]) -> Result:
    """`make()` of the first process, on all of them; a `UserError` or `OSError` that it raises, all of them raise."""
    if world() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except (OSError, UserError) as error:  # else the others would wait for the result and then lose the first
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agreed(make: Callable[[], Result]) -> Result:
    """`make()` of each process; where a `UserError` or `OSError` is raised in any of them, all raise `Agreed`.

    `make` itself must not wait for other processes.
    """
    if world() == 1:
        return make()
    result, problem = None, None
    try:
        result = make()
    except (OSError, UserError) as error:
        problem = str(error)
    problems: list[Any] = [None] * world()
    dist.all_gather_object(problems, problem)
    for number, one in enumerate(problems):
        if one is not None:
            raise Agreed(one if number == 0 else f"process {number} of {world()}: {one}")
    return cast(Result, result)


def same_folder(folder: Path) -> None:
    """Make `folder`; raises `UserError`, in all processes, unless it is the same one for all of them.

    On machines without a common file system each would write its own part of a checkpoint to a disk of its own.
    """
    if world() == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)  # by all: a network disk may remember that it was not there
    name = told(f".seen-by-all-{uuid4().hex}")
    if rank() == 0:
        (folder / name).touch()
    barrier()
    missing = any(not (folder / name).exists())
    if rank() == 0:
        (folder / name).unlink()
    if missing:
        raise UserError(
            f"{folder} is not the same folder for all {world()} processes. Put it on a file system that all machines "
            "share, by the same path (--out)"
        )


def shared(task: Callable[[Job], Result], jobs: Sequence[Job], level: bool = False) -> Iterator[Result]:
    """`task(job)` of all `jobs` in their order, each done by one process: all must iterate, the first gets the results.

    What a job gives and when it is seen don't depend on the number of processes: sums over the results are the same to
    the last bit. Results are pickled on their way; tensors should be on the CPU.

    Args:
        level: every process does as many jobs as the others, the last one again where there is none for it, since work
            with sharded networks needs all of them.
    """
    for turn in range(0, len(jobs), world()):
        mine = [task(job) for job in jobs[turn : turn + world()][rank() : rank() + 1]]
        if level and not mine:
            task(jobs[-1])
        for done in _gather(mine):
            yield from done


def _gather(part: Result) -> list[Result]:
    """What every process brings, by rank, on the first; nothing on the others."""
    if world() == 1:
        return [part]
    parts: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(part, parts)
    return parts or []
