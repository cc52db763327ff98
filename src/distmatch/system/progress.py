"""Progress bars with rate and time left, on standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from distmatch.system import parallel
from distmatch.system.screen import Screen, named, printable

console = Screen(stderr=True)

UNTOLD = 0.1
"""Seconds after which a rate means something."""

EARLY = 3.0
"""Seconds after which a first line says the rate, where the first tenth takes longer."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(_said(speed, self.unit))


def _said(rate: float, unit: str) -> str:
    return f"{rate:,.1f} {named(rate, unit)}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{unit}"


@contextmanager
def progress(title: str, total: int, done: int = 0, unit: str = "item") -> Iterator[Callable[[int], None]]:
    """Show a bar of `total`, of which `done` is already complete; yields `advance(n)`.

    If standard error is not a terminal, a line with the rate and the time left is printed after a few seconds and at
    each tenth instead. With several processes, only the first shows it.
    """
    title = printable(title)
    if parallel.rank() > 0:
        yield lambda n: None
        return
    if not console.is_terminal:
        yield _lines(title, total, done, unit)
        return
    name = TextColumn("{task.description}", markup=False)
    columns = name, BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn()
    with Progress(*columns, console=console, speed_estimate_period=60) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


def _lines(title: str, total: int, done: int, unit: str) -> Callable[[int], None]:
    state = {"done": done, "tenth": 10 * done // max(total, 1), "lines": 0}
    began = time.monotonic()

    def advance(n: int) -> None:
        state["done"] += n
        tenth, seconds = 10 * state["done"] // max(total, 1), time.monotonic() - began
        if tenth > state["tenth"] or (not state["lines"] and seconds > EARLY):
            state["tenth"] = tenth
            state["lines"] += 1
            rate, paced = (state["done"] - done) / max(seconds, 1e-9), ""
            if rate and seconds > UNTOLD:
                paced = f", {_said(rate, unit)}, {timedelta(seconds=round((total - state['done']) / rate))} left"
            console.print(f"{title}: {state['done']} of {total} {named(total, unit)}{paced}")

    return advance
