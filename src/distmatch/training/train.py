"""The training loop: steps, log, previews, evaluation, checkpoints, and stopping without losing work."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distmatch.data import imaging
from distmatch.system import parallel
from distmatch.system.errors import Diverged, Stopped
from distmatch.system.files import write_atomic
from distmatch.system.interrupt import Interrupt
from distmatch.system.progress import progress
from distmatch.training.checkpoint import Checkpoints, Stateful
from distmatch.training.clock import Clock
from distmatch.training.log import Log


class Task(Protocol):
    """What the loop drives: `Distiller`, `Teaching`. The loop knows nothing about any method."""

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """Everything that a checkpoint must hold to continue bit-exactly."""
        ...

    @property
    def clock(self) -> Clock: ...

    @property
    def images_per_step(self) -> int: ...

    def step(self, index: int) -> dict[str, Tensor]:
        """Run step `index` (from 0), a function of the parts and `index`. Returns losses f[] by name, on the device."""
        ...

    def preview(self) -> Tensor:
        """Return a fixed grid of samples, u8[N,C,H,W]."""
        ...

    def export(self, folder: Path) -> None:
        """Write the current model."""
        ...


@dataclass(frozen=True)
class Plan:
    """When the loop does what, in steps; 0 means never. `keep` checkpoints stay, in addition to the best one.

    `run`: steps of the whole run, of which this is the part up to step `steps`; 0: there are no more.
    """

    steps: int
    run: int = 0
    log_every: int = 20
    save_every: int = 500
    preview_every: int = 0
    evaluate_every: int = 0
    keep: int = 2


def train(
    task: Task,
    out: Path,
    plan: Plan,
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    watch: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None,
    trackers: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    title: str = "training",
) -> None:
    """Run `task` to `plan.steps`, continuing from the latest checkpoint in `out` if there is one.

    Writes `log.jsonl`, `previews/step-*.png`, `checkpoints/` and, at the end, `model/`. `evaluate` returns figures, the
    first of which (lower is better) decides which checkpoint is the best. `watch` is called with the losses f[steps] by
    name whenever they have been read, and returns further figures for the log.

    Raises `Diverged` if a loss is not finite, `Stopped` after SIGINT or SIGTERM, and `UserError` if the checkpoint is
    damaged.
    """
    checkpoints = Checkpoints(out / "checkpoints", task.parts, plan.keep)
    start, meta = checkpoints.load() or (0, {"seconds": 0.0})
    log = Log(out, start, trackers, config)
    pending: list[dict[str, Tensor]] = []
    began, before = time.perf_counter(), meta["seconds"]

    def seconds() -> float:
        return before + time.perf_counter() - began

    def flush(done: int) -> None:
        """Read the losses of the steps since the last flush: the only synchronisation with the device."""
        if not pending:
            return
        table = parallel.mean(torch.stack([torch.stack(list(row.values())) for row in pending]).cpu())
        names = list(pending[0])
        _check_finite(table, names, done, checkpoints)
        network, total = task.clock.read()
        rate = task.images_per_step * len(pending) / total
        values = dict(zip(names, table.mean(0).tolist(), strict=True))
        if watch is not None:
            values |= watch(dict(zip(names, table.unbind(1), strict=True)))
        log.scalars(done, {**values, "images_per_second": rate, "outside": 1 - network / total, "seconds": seconds()})
        pending.clear()

    def preview(done: int) -> None:
        sheet = imaging.grid(task.preview())
        zoom = 2 if len(sheet) < 1000 else 1
        if parallel.rank() == 0:
            file = out / "previews" / f"step-{done:08d}.png"
            write_atomic(file, lambda p: p.write_bytes(imaging.png(sheet, zoom=zoom)))
        log.image(done, "preview", sheet)

    def save(done: int, best: float | None = None) -> None:
        flush(done)
        checkpoints.save(done, {"seconds": seconds()}, best)

    def between_steps(done: int, stopping: bool) -> None:
        """Make the previews, figures and checkpoints that are due. Their time does not count for any step."""
        look, measure = due(done, plan.preview_every), evaluate is not None and due(done, plan.evaluate_every)
        keep, score = stopping or due(done, plan.save_every), None
        if not (look or measure or keep):
            return
        flush(done)  # stops at a loss that is not finite, before it is shown, measured or saved
        if look:
            preview(done)
        if evaluate is not None and measure:
            figures = parallel.broadcast(evaluate())
            log.scalars(done, figures)
            score = next(iter(figures.values()))
        better = score is not None and parallel.broadcast(checkpoints.improves(score))
        if keep or better:
            save(done, score if better else None)
        task.clock.read()  # restarts the clock

    def due(done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done == plan.steps)

    try:
        if start == 0 and plan.preview_every:
            preview(0)
        task.clock.read()  # starts the clock
        total = plan.run or plan.steps
        with Interrupt() as interrupt, progress(title, total, start, unit="step") as advance:
            for index in range(start, plan.steps):
                pending.append(task.step(index))
                done = index + 1
                stopping = parallel.world() == 1 and bool(interrupt.received)
                if due(done, plan.log_every):
                    flush(done)
                    stopping = parallel.any(bool(interrupt.received))  # together, or some would wait forever
                between_steps(done, stopping)
                if stopping:
                    raise Stopped(f"stopped by {interrupt.received} after step {done} of {total}; all is saved")
                advance(1)
        flush(plan.steps)
        if plan.steps not in checkpoints.steps():
            save(plan.steps)
        task.export(out / "model")
    finally:
        with ExitStack() as stack:  # closes each, even if closing the other fails
            stack.callback(checkpoints.close)  # finishes writing, however the run ended
            stack.callback(log.close)


def _check_finite(table: Tensor, names: Sequence[str], done: int, checkpoints: Checkpoints) -> None:
    """Raise `Diverged` if a number in `table f[steps, names]`, of the steps up to `done`, is not finite."""
    if table.isfinite().all():
        return
    row, column = (~table.isfinite()).nonzero()[0].tolist()
    saved = checkpoints.steps()
    last = f"the last good checkpoint is {checkpoints.path(saved[-1])}" if saved else "no checkpoint was saved yet"
    raise Diverged(
        f"{names[column]} is {table[row, column].item()} at step {done - len(table) + row + 1}; {last}. "
        "Lower the learning rate or clip the gradient, in a folder of its own (--out)"
    )
