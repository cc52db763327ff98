"""Makes a table of docs/results.md from a YAML file: trains its rows, measures them and prints it as Markdown.

    python benchmarks/table.py benchmarks/tables/mnist-table2.yaml --out runs/table2 --jobs 2
    python benchmarks/table.py benchmarks/tables/cifar10.yaml --out runs/cifar10 --jobs 6 --data FOLDER --seconds 540
    python benchmarks/table.py benchmarks/tables/cifar10.yaml --out runs/cifar10 --dry-run

Each seed of a row is `distmatch train` and then `distmatch eval`, as processes of the command line in the folder --out:
the figures are those of the commands that `--dry-run` prints. Run the same command again to continue: what is done is
skipped, what was stopped goes on. `table_rows.py` says what such a YAML file holds.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter
from table_rows import Table, Task, load_table, markdown, plan

from distmatch.system.errors import UserError
from distmatch.system.interrupt import ends_unread
from distmatch.system.options import Count

DISTMATCH = [sys.executable, "-m", "distmatch"]

NOTHING = "Cut by --tiny to a try of the commands: these figures mean nothing."


def main(
    file: Path,
    /,
    *,
    out: Path,
    jobs: Count = 1,
    seeds: Count | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    seconds: float = float("inf"),
    data: Path = Path("data"),
    tiny: bool = False,
    dry_run: bool = False,
) -> int:
    """Make a table. Run the same command again to continue. The exit status is 1 if something failed.

    Parameters
    ----------
    file
        The table's YAML file.
    out
        A folder for networks, runs, logs and `table.md`.
    jobs
        How many commands run at once; each has its part of the cores.
    seeds
        Of each row; default: as many as the file says.
    only
        Rows to make, by name, with those that they come after. The table names the others once, unless they have
        been measured before.
    seconds
        Start nothing more after this time. What runs by then goes on to its end.
    data
        Where the table's data sets are.
    tiny
        Cut everything to a try on a CPU, as the file says. The figures mean nothing.
    dry_run
        Print the commands, which a shell could run, and stop.
    """
    ends = time.monotonic() + seconds
    table = load_table(file, tiny, seeds)
    tasks = plan(table, out, only)
    if dry_run:
        print(f"# {NOTHING}\n" * tiny + script(table, tasks, out, data))
        return 0
    same_commands(plan(table, out), out)  # of all rows: `table.md` shows what others have measured, too
    from distmatch.system.ownership import owned  # imports torch

    try:
        with owned(out):  # two tables in one folder would start the same commands
            link(table, out, data)
            left = work(tasks, out, jobs, ends)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue")
        return 130
    shown = markdown(table, out, only) + f"\n\n{NOTHING}" * tiny
    (out / "table.md").write_text(shown + "\n")
    print(shown)
    for name, why in left.items():
        print(f"{name}: {why}")
    return 1 if any(why.startswith("failed") for why in left.values()) else 0


def script(table: Table, tasks: Sequence[Task], out: Path, data: Path) -> str:
    """Return `tasks` as lines for a shell, which may be run again: what `link` does is done once, `out` is absolute."""
    folder = shlex.quote(str(out.resolve()))
    lines = [f"mkdir -p {folder} && cd {folder}"]
    lines += [f"test -e {name} || ln -s {shlex.quote(str((data / name).resolve()))} {name}" for name in table.files]
    return "\n".join([*lines, *(task.said for task in tasks)])


def same_commands(tasks: Sequence[Task], out: Path) -> None:
    """Raise `UserError` if a result is there that another command has made: the table would not be true."""
    for task in tasks:
        record = out / "logs" / f"{task.name}.command"
        if task.result.exists() and record.exists() and record.read_text() != task.said:
            made = task.result.parent if task.name.endswith("-train") else task.result  # a run's folder as a whole
            raise UserError(
                f"{task.result} was made by another command: {record.read_text()}\nnow it is: {task.said}\n"
                f"Delete {made}, or choose another folder with --out"
            )


def link(table: Table, out: Path, data: Path) -> None:
    """Link the table's data sets into `out`, so that commands name them as docs/results.md does.

    Raises `UserError` for one that is missing, or if `out` has another of its own, which is not replaced.
    """
    for name in table.files:
        file, place = (data / name).resolve(), out / name
        if not file.exists():
            raise UserError(f"{data / name} does not exist; say with --data FOLDER where {name} is")
        if place.resolve() == file:  # linked before, or `data` is `out`
            continue
        if place.exists() and not place.is_symlink():
            raise UserError(f"{place} is there already; delete it, or say --data {out} to use it")
        place.unlink(missing_ok=True)
        place.symlink_to(file)


def work(tasks: Sequence[Task], out: Path, jobs: int, ends: float) -> dict[str, str]:
    """Run `tasks`, at most `jobs` at once, each when those before it are done; return why others have no result.

    If this process is stopped, so are they, by a signal after which commands save what they have.

    Args:
        ends: when to start nothing more, in the clock of `time.monotonic`.
    """
    cores = len(os.sched_getaffinity(0))
    waiting = [task for task in tasks if not task.result.exists()]
    left = {task.name: "not begun" for task in waiting}
    running: dict[Task, subprocess.Popen[bytes]] = {}
    try:
        while True:
            for task, process in list(running.items()):
                if process.poll() is not None:
                    del running[task]
                    ended(task, process.returncode, out, left)
            ready = [task for task in waiting if left.keys().isdisjoint(task.after)]
            for task in ready[: jobs - len(running)] if time.monotonic() < ends else ():
                waiting.remove(task)
                running[task] = start(task, out, cores if task.alone else max(1, cores // jobs))
            if not running:
                return left
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(task: Task, out: Path, threads: int) -> "subprocess.Popen[bytes]":
    """Start a command in the folder `out`, in a session of its own: Ctrl-C reaches it only once, through us."""
    print(f"{task.name}: {task.said}", flush=True)
    log = out / "logs" / f"{task.name}.log"
    log.parent.mkdir(exist_ok=True)
    log.with_suffix(".command").write_text(task.said)
    task.result.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*DISTMATCH, *task.command], cwd=out, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def ended(task: Task, status: int, out: Path, left: dict[str, str]) -> None:
    """Record the end of a command in `left`, or by its result if it succeeded."""
    if status == 0:
        task.result.touch()
        del left[task.name]
        print(f"{task.name}: done", flush=True)
        return
    log = out / "logs" / f"{task.name}.log"
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    left[task.name] = f"failed with exit status {status}, see {log}: {last:.300}"
    print(f"{task.name}: {left[task.name]}", flush=True)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    app = cyclopts.App()
    app.default(main)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with ends_unread():
            status = app(result_action="return_value")
        sys.exit(status)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
