"""Processes forked from the tests' own, which need not import torch for seconds: `distmatch ...`, scripts, others."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch
import torch._dynamo  # optimizers import it, which takes seconds: here once, not in every fork

from distmatch.commands import cli
from distmatch.system import progress, screen

fork = multiprocessing.get_context("fork")


class Forked:
    """`task()` with `sys.argv`, in a process that was started; what it prints is kept.

    Unless it is `alone`, it ends with the tests, and cannot fork in turn.
    """

    def __init__(self, task: Callable[[], object], *argv: object, cwd: Path | None = None, alone: bool = False):
        self._task, self._argv, self._cwd = task, [str(argument) for argument in argv], cwd
        # Both sides share one position, which only reading moves: "a" writes at the end.
        self._files = [tempfile.TemporaryFile("a+b") for _ in range(2)]  # noqa: SIM115
        self.process = fork.Process(target=self._run, daemon=not alone)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def _run(self) -> None:
        torch.set_num_threads(1)  # a forked process cannot use its parent's thread pool
        for number, file in enumerate(self._files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        for console in (progress.console, screen.console):  # made in the tests' process, with its width
            console.width = 200
        os.chdir(self._cwd or ".")
        sys.argv = self._argv
        self._task()

    @property
    def stdout(self) -> str:
        return self._said(0)

    @property
    def stderr(self) -> str:
        return self._said(1)

    def _said(self, number: int) -> str:
        self._files[number].seek(0)
        return self._files[number].read().decode()

    def wait(self, until: Callable[[], object]) -> None:
        """Return when `until()`, which must be while the process runs."""
        while not until():
            self.process.join(0.002)
            assert self.process.is_alive(), self.stderr

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait for the end of the process and return its status."""
        self.process.join(120)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{self._argv} goes on after two minutes: {self.stderr}")
        return self.process.exitcode

    def done(self) -> CompletedProcess[str]:
        """The same with what it printed."""
        return CompletedProcess(self._argv, self.end(), self.stdout, self.stderr)


def start(*arguments: object, **options) -> Forked:
    """Start `distmatch ...` and leave it running."""
    return Forked(cli.main, "distmatch", *arguments, **options)


def command(*arguments: object, **options) -> CompletedProcess[str]:
    """Run `distmatch ...`."""
    return start(*arguments, **options).done()


def script(file: Path, *arguments: object, **options) -> CompletedProcess[str]:
    """Run `python FILE ...`."""

    def run() -> None:
        sys.path.insert(0, str(file.parent))
        runpy.run_path(str(file), run_name="__main__")

    return Forked(run, file, *arguments, **options).done()
