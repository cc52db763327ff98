"""Shares jobs among threads, each with its share of the CPU's cores.

PyTorch uses several cores by splitting every operation. For small networks it is often faster to split the batch
instead, one part per worker. Threads suffice: PyTorch releases Python's lock while it computes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """`count` threads for jobs that run at the same time. With one, the calling thread does everything, on all cores.

    Grad mode, inference mode and autocast belong to a thread: a job must enter them itself.
    """

    def __init__(self, count: int = 1):
        self.count = count
        if count > 1:
            cores = max(1, torch.get_num_threads() // count)
            self.pool = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (cores,))

    def map(self, task: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield `task(job)` for all `jobs`, in order; at most `count` jobs are begun ahead of the result asked for."""
        if self.count == 1:
            yield from map(task, jobs)
            return
        begun: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                begun.append(self.pool.submit(task, job))
                if len(begun) > self.count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:  # after an error or Ctrl-C, jobs that run are waited for, and the others never begin
            wait([future for future in begun if not future.cancel()])


ALONE = Workers()
"""One worker: the calling thread, on all cores."""

_current = ContextVar("workers", default=ALONE)


@contextmanager
def using(workers: Workers) -> Iterator[None]:
    """Let `workers` share what is called in the with block: pairs, and the images of an evaluation."""
    before = _current.set(workers)
    try:
        yield
    finally:
        _current.reset(before)


def current() -> Workers:
    """Return the workers to share work with; in a worker itself, this is `ALONE`."""
    return _current.get()
