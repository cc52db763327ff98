"""Checkpoints: saved atomically in the background by any number of processes; keeps the last N and the best.

A checkpoint holds named stateful parts. Nothing in it is executed when it is read: tensors go into safetensors,
everything else into JSON.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from distmatch.system import parallel
from distmatch.system.digests import Damaged, known_digest, load_file
from distmatch.system.errors import UserError
from distmatch.system.files import write_json
from distmatch.system.plain import read_json
from distmatch.training import single

DAMAGE = (Damaged, SafetensorError, OSError, KeyError, TypeError, AttributeError)
"""What reading a damaged checkpoint raises."""


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict, /) -> Any: ...


class Checkpoints:
    """The checkpoints of one run: the folders `folder/step-00001000/`, ...

    Each holds the tensors in safetensors files, one per process that wrote it (see `single` and `shards`), and
    `state.json` with everything else and the digests of the tensor files, which `load` verifies before it changes
    anything. Any number of processes can read it, sharded in any way. All processes must take part in `save` and
    `load`. The folder appears, complete, once all have written.

    `save` copies and returns; a thread writes. Only one such thread runs at a time, and every method that depends on
    its result waits for it: `save`, `load`, `steps`, `improves`, `prune`, `close`. They raise `UserError` if it failed.

    Args:
        parts: what a checkpoint holds, by name: networks, EMA, optimizers. Their `state_dict`s share memory with them.
        keep: how many of the latest to keep, in addition to the best one.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful], keep: int = 2):
        self.folder = folder
        self.parts = parts
        self.keep = keep
        self._saving: tuple[int, Future] | None = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first, as the first process sees them: network disks lag."""
        self.wait()
        return parallel.on_first(self._steps)()

    def _steps(self) -> list[int]:
        names = (re.fullmatch(r"step-(\d+)", p.parent.name) for p in self.folder.glob("step-*/state.json"))
        return sorted(int(m[1]) for m in names if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def best(self) -> dict[str, Any] | None:
        """Return `{"step": ..., "score": ...}` of the best so far. Raises `UserError` if `best.json` is damaged."""
        file = self.folder / "best.json"
        try:
            best = read_json(file, dict[str, Any])
            return best if (self.path(best["step"]) / "state.json").exists() and best["score"] < math.inf else None
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} does not say which checkpoint is the best ({_first_line(error)}). Delete it to go on: the "
                "next one that is evaluated is then the best so far"
            ) from error

    def improves(self, score: float) -> bool:
        """Return whether `score` (lower is better) beats the best so far."""
        self.wait()
        best = self.best()
        return best is None or score < best["score"]

    def save(self, step: int, meta: Mapping[str, Any] | None = None, best: float | None = None) -> None:
        """Copy the parts as they are after `step` steps, then write the copies and delete old ones in the background.

        Each process copies and writes its share of what all of them hold.

        Args:
            best: this checkpoint's score, if it is the best one so far; it is then kept until a better one comes.
        """
        self.wait()
        tensors, tree = self._state()
        header = {"step": step, "meta": dict(meta or {}), "tree": tree, "shapes": _shapes(tensors)}
        how = _together() if parallel.grouped() else single
        saving = how.save(tensors, self._unfinished(step), lambda: self._finish(step, header, best))
        self._saving = step, saving

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete. Raises `UserError` if the disk refused it."""
        if self._saving is None:
            return
        step, saving = self._saving
        error = saving.exception()
        self._saving = None
        if error is None:
            return
        cause = _together().failure(error) if parallel.grouped() else error
        if not isinstance(cause, OSError | SafetensorError):  # not caused by the disk
            raise error
        if parallel.rank() == 0:
            shutil.rmtree(self._unfinished(step), ignore_errors=True)
        last = f"from step {self._steps()[-1]}, which is kept" if self._steps() else "from the beginning"
        raise UserError(
            f"{self.path(step)} could not be saved ({_first_line(cause)}). Make room in {self.folder}, or make it "
            f"writable, and run the same again: it goes on {last}"
        ) from error

    def close(self) -> None:
        """Wait for the checkpoint being written."""
        self.wait()

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def _finish(self, step: int, header: Mapping[str, Any], best: float | None) -> None:
        """Publish a checkpoint. Runs in the first process's thread once all have written and synced their shards."""
        path, unfinished = self.path(step), self._unfinished(step)
        digests = {shard.name: known_digest(shard) for shard in sorted(unfinished.glob("*.safetensors"))}
        write_json(unfinished / "state.json", {**header, "shards": digests})
        _to_disk(unfinished)
        shutil.rmtree(path, ignore_errors=True)  # a partly deleted one, or an old one of the same step
        unfinished.rename(path)
        _to_disk(self.folder)
        if best is not None:
            write_json(self.folder / "best.json", {"step": step, "score": best})
        self._prune()

    def prune(self) -> list[int]:
        """Delete all but the latest `keep` and the best one; return the steps of those deleted."""
        self.wait()
        return self._prune()

    def _prune(self) -> list[int]:
        for path in self.folder.glob("step-*"):
            if re.fullmatch(r"step-\d+", path.name) and not (path / "state.json").exists():
                shutil.rmtree(path, ignore_errors=True)  # partly deleted, by a process that was killed meanwhile
        best, steps = self.best(), self._steps()
        gone = sorted(set(steps) - {*steps[-self.keep :], *([best["step"]] if best else [])})
        for old in gone:
            (self.path(old) / "state.json").unlink(missing_ok=True)  # first: then it no longer counts
            shutil.rmtree(self.path(old), ignore_errors=True)
        return gone

    def verify(self, step: int) -> None:
        """Read all of checkpoint `step`. Raises `UserError` if it is damaged or a number in it is not finite."""
        path = self.path(step)
        found: dict[str, int] = {}
        try:
            header = _header(path)
            for shard, digest in _shards(path, header).items():
                for name, value in load_file(path / shard, digest).items():
                    if value.is_floating_point() and not value.isfinite().all():
                        raise UserError(f"{path / shard}: {name} is not finite")
                    found[name] = found.get(name, 0) + value.numel()
            sizes = {name: math.prod(shape) for name, shape in header["shapes"].items()}
        except DAMAGE as error:
            raise UserError(f"{path} is damaged ({_first_line(error)})") from error
        for name, size in sizes.items():
            if found.get(name, 0) < size:
                raise UserError(f"{path} is not complete: {name} has {found.get(name, 0)} of {size} numbers")

    def load(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Load checkpoint `step` (default: the latest) into the parts; return `(step, meta)`, or `None` without one.

        With several processes, each verifies the digests of its share of the files before any of them loads.

        Raises `UserError` if it is damaged or holds other parts.
        """
        self.wait()
        if step is None:
            steps = self.steps()
            if not steps:
                return None
            step = steps[-1]
        path = self.path(step)
        try:
            header = _header(path)
            if set(header["tree"]) != set(self.parts):
                raise UserError(
                    f"{path} holds {', '.join(sorted(header['tree']))}; this run needs "
                    f"{', '.join(sorted(self.parts))}. It belongs to another recipe: choose another output folder"
                )
            tensors, _ = self._state()
            _same_shapes(path, header["shapes"], _shapes(tensors))
            _read(path, header, tensors)
        except (*DAMAGE, IndexError) as error:
            raise UserError(_damaged(path, error)) from error
        for name, part in self.parts.items():
            part.load_state_dict(_unflatten(header["tree"][name], tensors))
        return header["step"], header["meta"]

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all tensors by name, and the remaining structure of the parts' states."""
        tensors: dict[str, Tensor] = {}
        tree = {name: _flatten(part.state_dict(), name, tensors) for name, part in self.parts.items()}
        return tensors, tree


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a state's JSON skeleton: tensors move to `tensors` and leave their name, dicts keep their key types."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[k, _flatten(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _unflatten(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    (kind, value), *_ = tree.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {k: _unflatten(v, tensors) for k, v in value}
        case "list":
            return [_unflatten(v, tensors) for v in value]
        case _:
            return value


def _header(path: Path) -> dict[str, Any]:
    """Return what `state.json` says about the checkpoint `path`."""
    try:
        header = read_json(path / "state.json", dict[str, Any])
    except UserError as error:
        raise Damaged(str(error)) from error
    if header["step"] != int(path.name.rpartition("-")[2]):
        raise Damaged(f"its state.json is of step {header['step']}")
    return header


def _shards(path: Path, header: Mapping[str, Any]) -> dict[str, str | None]:
    """Return its tensor files with their digests; earlier versions wrote no digests."""
    there = sorted(shard.name for shard in path.glob("*.safetensors"))
    written = header.get("shards", dict.fromkeys(there))
    for name in sorted({*there} ^ {*written}):
        raise Damaged(f"{name} is missing" if name in written else f"{name} does not belong to it")
    if header["shapes"] and not written:
        raise Damaged("its tensors are missing")
    return written


def _together() -> Any:
    """Return the module for processes of a group."""
    from distmatch.training import shards  # takes seconds to import

    return shards


def _read(path: Path, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` with what the files in `path` have under their names, once these are verified."""
    # A group looks for the files within `agreed`: they may be missing for one process alone.
    if parallel.grouped() or len(files := _shards(path, header)) > 1:
        parallel.agreed(lambda: _compare(path, header))
        _together().read(tensors, path)
    else:
        for name, digest in files.items():
            single.read(tensors, path / name, digest)


def _compare(path: Path, header: Mapping[str, Any]) -> None:
    """Verify the digests of this process's share of the files in `path`."""
    try:
        for name, digest in [*_shards(path, header).items()][parallel.rank() :: parallel.world()]:
            load_file(path / name, digest)
    except DAMAGE as error:
        raise UserError(_damaged(path, error)) from error


def _damaged(path: Path, error: BaseException) -> str:
    return (
        f"{path} is damaged ({_first_line(error)}). Delete it to continue from the checkpoint before it, or from the "
        "beginning if there is none"
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of the full tensors, sharded or not."""
    return {name: list(value.shape) for name, value in tensors.items()}


def _same_shapes(path: Path, there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in dict.fromkeys([*there, *here]):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{path} does not fit this run's networks: {name} is {there.get(name)}, not {here.get(name)}"
            )


def _to_disk(folder: Path) -> None:
    """Sync the folder's entries to disk; `write_atomic` has already synced the files' content."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
