"""Everything that has to be measured on a GPU, in one command of a quarter of an hour: the most valuable part first.

    uv sync --all-extras && uv run python benchmarks/gpu.py                    nine minutes
    uv run python benchmarks/gpu.py --cifar cifar10.tar.xz --seconds 300       goes on: what is done is skipped
    uv run python benchmarks/gpu.py --only step-sd15 --only latency
    uv run python benchmarks/gpu.py --tiny                                     on a CPU: the command itself works

Without uv: `python benchmarks/gpu.py` where this package is installed (`pip install --no-deps .` in an environment that
has the packages of pyproject.toml with the extras `diffusers` and `metrics`). It needs no network and no weights:
networks are random. On a GPU, compiling needs a C compiler, and Triton, which comes with PyTorch.

Figures go to OUT/results.json, after each of them and atomically, with a few pictures beside it; networks, runs and
each part's log go to WORK. A cut loses only the figure being measured. Each part runs in a process of its own, so an
error of CUDA does not reach the next one; its traceback is recorded, and the next call tries it again. The exit status
is 1 if anything failed. A target that is missed is shown and is no failure.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from gpu_cifar import cifar10
from gpu_job import Job, Results, met, ratio
from gpu_latency import latency, latency_compiled
from gpu_smoke import agreement, agreement_sd15, processes, smoke
from gpu_steps import matrix, step_cifar10, step_imagenet64, step_sd15, step_sdxl_lora
from rich.console import Console
from rich.table import Table

from distmatch.evaluation.measure import hardware
from distmatch.system.errors import UserError
from distmatch.system.files import write_json


@dataclass(frozen=True)
class Part:
    """A part of the measurements. It is not begun with less than `least` seconds left, and stopped after `most`."""

    run: Callable[[Job], None]
    least: float
    most: float


PARTS: dict[str, Part] = {
    "matrix": Part(matrix, 10, 60),
    "latency": Part(latency, 40, 120),
    "latency-compiled": Part(latency_compiled, 60, 200),
    "step-sd15": Part(step_sd15, 60, 240),
    "step-sdxl-lora": Part(step_sdxl_lora, 60, 200),
    "smoke": Part(smoke, 30, 110),
    "processes": Part(processes, 30, 90),
    "agreement-sd15": Part(agreement_sd15, 20, 60),
    "agreement": Part(agreement, 20, 60),
    "step-imagenet64": Part(step_imagenet64, 30, 90),
    "step-cifar10": Part(step_cifar10, 30, 90),
    "cifar10": Part(cifar10, 120, 900),
}
"""In order of worth. On an H100 `matrix` takes 3 s, loading for `latency` 12 to 29, the first row of `step-sd15` 80."""

fork = multiprocessing.get_context("fork")  # a new interpreter would spend ten seconds of each part on imports


def main(
    *,
    out: Path = Path("gpu-results"),
    work: Path = Path("runs/gpu"),
    seconds: float = 540,
    cifar: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    tiny: bool = False,
    device: str = "auto",
) -> int:
    """Measure what fits into the time, and show all results so far.

    Parameters
    ----------
    out
        Folder of results.json and the pictures.
    work
        Folder of networks, runs and logs.
    seconds
        When to stop, from now.
    cifar
        CIFAR-10 as `distmatch teach` reads it; without it that part is left out.
    only
        Parts to run: matrix, latency, latency-compiled, step-sd15, step-sdxl-lora, smoke, processes, agreement-sd15,
        agreement, step-imagenet64, step-cifar10, cifar10.
    tiny
        Tiny sizes on a CPU; what only a GPU can show is marked.
    device
        cuda or cuda:1; with --tiny, the CPU.
    """
    ends, results = time.time() + seconds, Results(out / "results.json")
    unknown = set(only) - PARTS.keys()
    if unknown:
        raise UserError(f"--only {' '.join(sorted(unknown))} is unknown; expected some of {', '.join(PARTS)}")
    device = "cpu" if tiny else "cuda" if device == "auto" else device
    out.mkdir(parents=True, exist_ok=True)
    check_machine(results, {"tiny": tiny, "device": device})
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a log may be wide
    for name, part in PARTS.items():
        left = ends - time.time()
        if (only and name not in only) or results.part(name)["status"] == "done":
            continue
        if left < part.least:
            console.print(f"{name}: not begun, {left:.0f} s are left")
            continue
        console.print(f"{name}: at most {min(left, part.most):.0f} s")
        limit = time.time() + min(left, part.most)
        job = Job(name, results, out, work, torch.device(device), tiny, limit, os.getpid(), cifar)
        status = run(part, job)
        console.print(f"{name}: {status}, {results.part(name)['seconds']:.0f} s")
    console.print(table(results.read()))
    failed = [name for name, part in results.read()["parts"].items() if part["status"] == "failed"]
    if failed:
        console.print(f"failed: {', '.join(failed)}; the tracebacks are in {results.file}")
    return 1 if failed else 0


def check_machine(results: Results, settings: dict[str, Any]) -> None:
    """Record the machine. Raises `UserError` if there is no such device, or if `results` are another machine's."""

    def look() -> None:
        try:
            machine = hardware(torch.device(settings["device"]))
            torch.empty(1, device=settings["device"])
        except (RuntimeError, AssertionError):
            os._exit(3)
        tree = results.read()
        known = tree.setdefault("machine", {**settings, **machine})
        if (known["tiny"], known["device"]) != (settings["tiny"], machine["device"]):
            os._exit(4)
        write_json(results.file, tree)

    child = fork.Process(target=look)  # this process never touches CUDA, or parts could not be forked from it
    child.start()
    child.join()
    if child.exitcode == 3:
        raise UserError(f"device {settings['device']!r} is not available here; `--tiny` tries the command on a CPU")
    if child.exitcode == 4:
        raise UserError(f"{results.file} holds results of another machine or size; choose another folder with --out")
    if child.exitcode:
        raise UserError(f"{settings['device']} could not be used: exit status {child.exitcode}")


def run(part: Part, job: Job) -> str:
    """Run a part in a process of its own until `job.ends`; record and return its status."""
    log, began = job.work / "logs" / f"{job.name}.log", time.time()
    log.parent.mkdir(parents=True, exist_ok=True)
    before = job.results.part(job.name)["seconds"]
    job.results.update(job.name, status="begun", error=None)
    child = fork.Process(target=work, args=(part, job, log))
    child.start()
    try:
        child.join(max(0.0, job.left))
        cut = child.is_alive()
    finally:  # also after Ctrl-C: nothing that a part started may outlive it
        assert child.pid is not None
        with suppress(ProcessLookupError):  # as a rule, nothing is left
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
    changes: dict[str, Any] = {"seconds": before + time.time() - began}
    lines = log.read_text(errors="replace").splitlines()[-30:]
    if cut:  # its rows are kept, and the next call goes on
        changes |= {"status": "cut", "error": "\n".join(lines)}
    elif job.results.part(job.name)["status"] == "begun":
        changes |= {"status": "failed", "error": "\n".join([*lines, f"exit status {child.exitcode}"])}
    job.results.update(job.name, **changes)
    return job.results.part(job.name)["status"]


def work(part: Part, job: Job, log: Path) -> None:
    """Run in the part's own process: its own group, so that its children can be stopped with it, and its own log."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    try:
        part.run(job)
    except Exception:
        job.results.update(job.name, status="failed", error=traceback.format_exc())
        raise
    rows = job.results.part(job.name)["rows"].values()
    job.results.update(job.name, status="failed" if any("error" in row for row in rows) else "done")


def table(tree: dict[str, Any]) -> Table:
    """Return all figures, with their targets and the ratio to them."""
    out = Table("part", "what", "figure", "measured", "target", "ratio", title=str(tree.get("machine", "")))
    for name, part in tree["parts"].items():
        if part["status"] != "done":
            reason = (part.get("error") or "").strip().splitlines()[-1:]
            out.add_row(name, "", "", f"[red]{part['status']}[/]" if part["status"] == "failed" else part["status"])
            if reason:
                out.add_row("", "", "", plain(reason[0]))
        for row, content in part["rows"].items():
            if "error" in content:
                out.add_row(name, row, "", f"[red]failed[/]: {plain(content['error'].strip().splitlines()[-1])}")
            for figure, value in content.get("figures", {}).items():
                target = content["targets"].get(figure)
                shown = f"{value:,.4g}" if isinstance(value, int | float) else plain(value)
                if target is None or ratio(value, target) is None:
                    out.add_row(name, row, figure, shown)
                    continue
                style = "green" if met(value, target) else "red"
                aim = f"{target[0]} {target[1]:g}"
                out.add_row(name, row, figure, shown, aim, f"[{style}]{ratio(value, target):.3f}[/]")
    return out


def plain(value: object) -> str:
    return str(value).replace("[", r"\[")


if __name__ == "__main__":
    app = cyclopts.App()
    app.default(main)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work is stopped too
    try:
        sys.exit(app(result_action="return_value"))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
