"""Several processes working on one job: their ranks, broadcasts, and shared work with results in order.

The processes are started by `torchrun`, or anything that sets its variables RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Without these, and outside of `process_group`, there is one process, which does all of the work itself.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distmatch.system import workers
from distmatch.system.errors import Agreed, Lost, UserError
from distmatch.system.heartbeat import watched

Job = TypeVar("Job")
P = ParamSpec("P")
Result = TypeVar("Result")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others. Long, because the first one may have to evaluate a million images."""

_for_all: ContextVar[bool] = ContextVar("for_all", default=False)
"""Whether this process is at a task that it does for all: the others wait for that task's result, not for another's."""

_ending = ExitStack()
"""What this process does when it leaves the group; see `at_end`."""

_DEATHS = re.compile("closed by peer|reset by peer|Broken pipe|NCCL|timed out|Timed out")
"""What gloo and NCCL say in the remaining processes when one is gone."""


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group of processes inside the with block; the device `cuda` is then this process's own GPU.

    Tensors on the host travel by gloo, those on GPUs by NCCL. Nested inside another `process_group`, it does nothing.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count())
    # Workers that torchrun restarts get the same store, which still has the dead ones' addresses: use a prefix.
    found, number, size = next(rendezvous("env://"))
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        with _ending, watched(store, number, size):
            start()
            yield
            barrier()  # the first process must leave last: the others' store may live in it
    except RuntimeError as error:
        if not _DEATHS.search(str(error)):
            raise
        raise Lost(
            f"process {rank()} of {world()} lost another process of this job ({str(error).strip().splitlines()[0]}). "
            "Its own message says why; the last checkpoint is kept, and torchrun --max-restarts goes on from it"
        ) from error
    finally:
        background_group.cache_clear()
        start.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process; process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def grouped() -> bool:
    """Return whether there is a group of processes, if only of this one."""
    return dist.is_initialized()


def barrier() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


@cache
def start() -> str:
    """Return a name of this start of the group, which all its processes know from then on, and no other start has."""
    return broadcast(uuid4().hex)


def at_end(task: Callable[[], object]) -> None:
    """Call `task()` when this process leaves the group, also by an error."""
    _ending.callback(task)


@cache
def background_group() -> dist.ProcessGroup:
    """Return a second group of all processes, on the host, for use by threads. All processes must call it."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


def mean(table: torch.Tensor) -> torch.Tensor:
    """Return the mean of the processes' tables (on the CPU) to all of them."""
    if world() > 1:
        dist.all_reduce(table)
        table /= world()
    return table


def any(here: bool) -> bool:
    """Return whether `here` is true in any of the processes."""
    return bool(mean(torch.tensor(float(here))) > 0)


def broadcast(value: Result) -> Result:
    """Return the first process's `value` to all of them."""
    return on_first(lambda: value)()


def on_first(task: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate what all processes call and the first one does: all get its result.

    A `UserError` or `OSError` is raised in all of them too. `task` itself must not wait for other processes; what it
    calls that is decorated too is simply done.
    """

    @wraps(task)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        if world() == 1 or _for_all.get():
            return task(*args, **kwargs)
        box: list[Any] = [None, None]
        if rank() == 0:
            inside = _for_all.set(True)
            try:
                box[0] = task(*args, **kwargs)
            except (OSError, UserError) as error:  # otherwise the others would wait for a result that never comes
                box[1] = error
            finally:
                _for_all.reset(inside)
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    return run


def agreed(make: Callable[[], Result]) -> Result:
    """Return `make()`, called in every process; if any of them raises `UserError` or `OSError`, all raise `Agreed`.

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
    """Make `folder`; raise `UserError` in all processes if they do not all see the same one.

    Without a shared file system, each machine would write its part of a checkpoint to its own disk.
    """
    if world() == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)  # in every process: a network disk may have cached that it does not exist
    name = broadcast(f".seen-by-all-{uuid4().hex}")
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
    """Yield `task(job)` for all `jobs` in order, each computed by one process. All must iterate; the first gets them.

    A single process shares them with its `workers`, if it uses any.
    Results and their order do not depend on the number of processes: sums over them are the same to the last bit.
    Results are pickled for transport, so tensors should be on the CPU.

    Args:
        level: have every process do equally many jobs, repeating the last one if none is left for it: sharded networks
            need all processes to take part.
    """
    if world() == 1:
        yield from workers.current().map(task, jobs)
        return
    for turn in range(0, len(jobs), world()):
        index = turn + rank()  # in each turn, every process takes the job at its own rank
        mine: list[Result] = []
        if index < len(jobs):
            mine = [task(jobs[index])]
        elif level:
            task(jobs[-1])
        for done in _gather(mine):
            yield from done


def _gather(part: Result) -> list[Result]:
    """Return every process's `part` by rank, in the first process; an empty list in the others."""
    if world() == 1:
        return [part]
    parts: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(part, parts)
    return parts or []
