"""Runs that are killed at every moment of a save, and at any other: they end with the weights of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo  # spreading a network imports it, which takes seconds: here once, not in every fork
from test_engine import weights
from test_parallel import _enter
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from distmatch.commands import distillation
from distmatch.recipe.loading import load_recipe
from distmatch.training import checkpoint, shards, single
from distmatch.training.checkpoint import Checkpoints

STEPS = 9
SHORT = {
    "match": {"batch": 4},
    "regress": {"batch": 2, "weight": 1.0},
    "generator": {"lr": 1e-3},
    "critic": {"lr": 1e-3},
    "log": {"every": 1},
    "checkpoint": {"every": 1, "keep": 1},
}
MOMENTS = ["begun", "shard", "half a shard", "state", "to be moved", "moved", "half deleted", "done"]
"""Where the writing thread is, in this order; from "moved" on there is a new checkpoint."""


def announce(tell: Callable[[str, Path], None]) -> None:
    """Have `tell(moment, folder of the checkpoints)` called, in this process, whenever a save reaches a moment."""
    write_file, write_json, to_disk = single.save_file, checkpoint.write_json, checkpoint._to_disk
    begin, rmtree, prune = single.begin, shutil.rmtree, Checkpoints._prune

    def begun(folder):
        begin(folder)
        tell("begun", folder.parent)

    def filed(tensors, path, meta):
        if not path.parent.name.startswith(".step-"):  # a model's
            return write_file(tensors, path, meta)
        tell("shard", path.parent.parent)
        write_file(tensors, path, meta)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        tell("half a shard", path.parent.parent)
        path.write_bytes(whole)

    def noted(path, data):
        if path.name == "state.json":
            tell("state", path.parent.parent)
        write_json(path, data)

    def synced(folder):
        to_disk(folder)
        if folder.name == "checkpoints":
            tell("moved", folder)
        else:
            tell("to be moved", folder.parent)

    def removed(path, *options, **named):  # by tempfile as well, with a string and `onerror` or `onexc`
        if Path(path).exists() and Path(path).parent.name == "checkpoints":
            tell("half deleted", Path(path).parent)
        rmtree(path, *options, **named)

    def pruned(self):
        gone = prune(self)
        tell("done", self.folder)
        return gone

    single.save_file, checkpoint.write_json, checkpoint._to_disk = filed, noted, synced
    single.begin = shards.begin = begun
    shutil.rmtree, Checkpoints._prune = removed, pruned


def _train(folder: Path, name: str, tell: Callable[[str, Path], None] | None) -> None:
    torch.set_num_threads(1)
    if tell is not None:
        announce(tell)
    distillation.distil(
        load_recipe(str(folder / "tiny.yaml"), [f"pairs.path={folder / 'pairs'}"]), folder / name, folder
    )


def _single(_: int, task: Callable[..., None], *arguments) -> None:
    task(*arguments)


def launch(folder: Path, name: str, tell: Callable[[str, Path], None] | None, world: int) -> ProcessContext:
    """The run `name` in forked processes, without waiting; a single one has no group."""
    task: tuple[Any, ...] = (_train, folder, name, tell)
    enter: Callable[..., None] = _single
    if world > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            enter, task = _enter, (world, free.getsockname()[1], *task)
    context = start_processes(enter, task, nprocs=world, join=False, start_method="fork")
    assert context is not None
    return context


def train(
    folder: Path, name: str, tell: Callable[[str, Path], None] | None = None, world: int = 1, *changes: str
) -> None:
    """The same to its end; an exception in a process is raised here."""
    context = launch(folder, name, tell, world)
    while not context.join():
        pass


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a recipe and the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("kill")
    tiny.recipe_file(folder, **SHORT, steps=STEPS)
    _train(folder, "alone", None)  # here, so that no fork need import what it does
    return folder


def saved(out: Path) -> int:
    """The last checkpoint, 0 if there is none."""
    return max(Checkpoints(out / "checkpoints", {}).steps(), default=0)


def found(out: Path) -> int:
    """The same; all that are there must be whole."""
    checkpoints = Checkpoints(out / "checkpoints", {})
    for step in checkpoints.steps():
        checkpoints.verify(step)
    return saved(out)


def lines(out: Path) -> list[tuple[int, float, float]]:
    return [
        (d["step"], d["match/student"], d["match/fake"])
        for d in map(json.loads, (out / "log.jsonl").read_text().splitlines())
    ]


def same(folder: Path, name: str, undisturbed: str = "alone") -> None:
    """The run ended as the undisturbed one did: to the bit, with each step in its log once, and nothing left over."""
    out, other = folder / name, folder / undisturbed
    assert torch.equal(weights(out), weights(other))
    assert lines(out) == lines(other)
    steps = [step for step, *_ in lines(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{len(steps):08d}"]


def test_killed_at_each_moment_of_a_save(alone):
    """With the one checkpoint that is kept, the last is there at each of them, and the new one from its move on."""
    out, last = alone / "moments", 0
    for turn, moment in enumerate(MOMENTS):
        save = max(last + 1 + turn % 2, 2)  # at once, or later; not the first one, so that there is one to be lost

        def kill(reached: str, folder: Path, moment=moment, save=save) -> None:
            """At `moment` of the save of step `save`."""
            if reached == moment and any(folder.glob(f"*step-{save:08d}")):
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            train(alone, "moments", kill)
        moved = MOMENTS.index(moment) >= MOMENTS.index("moved")
        last = found(out)
        assert last == (save if moved else save - 1), moment
        assert (out / "checkpoints" / f".step-{save:08d}").exists() != moved
        there = list((out / "checkpoints").glob("step-*"))
        assert (len(there) > 1) == (moment in ("moved", "half deleted"))
        assert all((path / "state.json").exists() for path in there) == (moment != "half deleted")
    train(alone, "moments")
    same(alone, "moments")


def slowly(moment: str, folder: Path) -> None:
    """A disk on which a save takes longer than a step; `saving` is there once there was one."""
    if moment == MOMENTS[0]:
        (folder.parent / "saving").touch()
    time.sleep(0.02)


def killed(folder: Path, name: str, seed: int, kills: int, world: int) -> None:
    """Kill a run's processes at once, `kills` times, when a save has begun or some time after one; then let it end."""
    out, chance, last, inside = folder / name, random.Random(seed), 0, 0
    for turn in range(kills):
        (out / "saving").unlink(missing_ok=True)
        context, begun = launch(folder, name, slowly, world), time.monotonic()
        while not (out / "saving").exists() or (turn % 2 and saved(out) == last):
            assert time.monotonic() - begun < 60
            time.sleep(0.001)
        if turn % 2:
            time.sleep(chance.uniform(0, 0.3))
        for pid in context.pids():
            os.kill(pid, signal.SIGKILL)
        for process in context.processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        unfinished = list((out / "checkpoints").glob(".step-*"))
        assert unfinished or turn % 2
        inside += bool(unfinished)
        before, last = last, found(out)
        assert last >= before
        assert last >= max((int(p.name[-8:]) for p in unfinished), default=0) - 1
    assert inside >= kills // 2
    assert last > 0
    (out / "saving").unlink()
    train(folder, name, None, world)


def test_killed_at_random(alone):
    killed(alone, "random", seed=1, kills=4, world=1)
    same(alone, "random")


def test_two_processes_killed_at_once(tmp_path):
    """Each has half of every checkpoint."""
    tiny.recipe_file(tmp_path, **SHORT, steps=4)
    train(tmp_path, "two", world=2)
    killed(tmp_path, "two-killed", seed=2, kills=2, world=2)
    assert len(list((tmp_path / "two-killed" / "checkpoints").glob("step-*/*.safetensors"))) == 2
    same(tmp_path, "two-killed", "two")


def full(moment: str, folder: Path) -> None:
    """A disk that is full when step 3 is saved."""
    if moment == "state" and (folder / ".step-00000003").exists():
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_run_with_its_name_and_the_next_one_goes_on(alone):
    with pytest.raises(
        ProcessRaisedException, match=r"step-00000003 could not be saved .*No space left on device.* from step 2"
    ):
        train(alone, "full", full)
    assert found(alone / "full") == 2
    assert not (alone / "full" / "checkpoints" / ".step-00000003").exists()
    train(alone, "full")
    same(alone, "full")


def _leaves(folder: Path, name: str) -> None:
    """An error of the fourth step while the third is being saved, then an end that waits for no thread."""
    step = distillation.Distiller.step

    def fails(self, index):
        if index == 3:
            raise ArithmeticError
        return step(self, index)

    distillation.Distiller.step = fails
    try:
        _train(folder, name, slowly)
    except ArithmeticError:
        os._exit(0)


def test_what_is_being_written_is_finished_whatever_ended_the_run(alone):
    context = start_processes(_single, (_leaves, alone, "left"), join=False, start_method="fork")
    assert context is not None
    while not context.join():
        pass
    assert found(alone / "left") == 3
    (alone / "left" / "saving").unlink()
