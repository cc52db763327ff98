"""Checkpoints: named stateful parts, written atomically by any number of processes, kept last-N plus best.

Nothing in a checkpoint is executed when it is read: tensors go into safetensors, everything else into JSON.
"""

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distmatch import parallel


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict, /) -> Any: ...


def write_atomic(path: Path, write) -> None:
    """Call `write(temporary_path)`, then move the finished file to `path`: readers see all of it or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """`data` as indented JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=2) + "\n"))


class Checkpoints:
    """The checkpoints of one run: the folders `folder/step-00001000/`, ...

    Each holds the tensors in safetensors shards, as many as processes wrote it, by `torch.distributed.checkpoint`, and
    `state.json` with all else. It can be read by any number of processes, sharded in any way. All of them must take
    part in `save` and `load`; the folder appears, whole, when all have written.

    Args:
        parts: what a checkpoint holds, by name: networks, EMA, optimizers. Their `state_dict`s share memory with them.
        keep: how many of the latest stay; the best one (see `mark_best`) stays besides.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful], keep: int = 2):
        self.folder = folder
        self.parts = parts
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        names = (re.fullmatch(r"step-(\d+)", p.parent.name) for p in self.folder.glob("step-*/state.json"))
        return sorted(int(m[1]) for m in names if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def best(self) -> dict[str, Any] | None:
        """`{"step": ..., "score": ...}` of the best one so far."""
        file = self.folder / "best.json"
        best = json.loads(file.read_text()) if file.exists() else None
        return best if best is not None and self.path(best["step"]).exists() else None

    def improves(self, score: float) -> bool:
        """Whether `score` (lower is better) beats the best so far."""
        best = self.best()
        return best is None or score < best["score"]

    def mark_best(self, step: int, score: float) -> None:
        """Keep the checkpoint of `step`, which is saved already, until a better one comes."""
        if parallel.rank() == 0:
            write_json(self.folder / "best.json", {"step": step, "score": score})

    def save(self, step: int, meta: Mapping[str, Any] | None = None) -> Path:
        """Write the parts as they are after `step` steps and drop what is too old."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        tensors, tree = self._state()
        path, unfinished = self.path(step), self.folder / f".step-{step:08d}"
        if parallel.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            unfinished.mkdir(parents=True)
        parallel.barrier()
        writer = HuggingFaceStorageWriter(path=str(unfinished), save_distributed=True)
        _quietly(lambda: save(tensors, storage_writer=writer, no_dist=parallel.world() == 1))
        parallel.barrier()
        if parallel.rank() == 0:
            header = {"step": step, "meta": dict(meta or {}), "tree": tree, "shapes": _shapes(tensors)}
            write_json(unfinished / "state.json", header)
            for file in unfinished.iterdir():
                _to_disk(file)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            self.prune()
        parallel.barrier()
        return path

    def prune(self) -> list[int]:
        """Delete all but the latest `keep` and the best one; returns the steps of those deleted."""
        best, steps = self.best(), self.steps()
        gone = sorted(set(steps) - {*steps[-self.keep :], *([best["step"]] if best else [])})
        for old in gone:
            (self.path(old) / "state.json").unlink(missing_ok=True)  # half a checkpoint is none
            shutil.rmtree(self.path(old), ignore_errors=True)
        return gone

    def verify(self, step: int) -> None:
        """Read all of checkpoint `step`. Raises `ValueError` where it is damaged or a number in it is not finite."""
        path = self.path(step)
        try:
            expected = json.loads((path / "state.json").read_text())["shapes"]
            found: dict[str, int] = {}
            for shard in sorted(path.glob("*.safetensors")):
                with safe_open(shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        value = file.get_tensor(name)
                        if value.is_floating_point() and not value.isfinite().all():
                            raise ValueError(f"{shard}: {name} is not finite")
                        found[name] = found.get(name, 0) + value.numel()
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({_first_line(error)})") from error
        for name, shape in expected.items():
            if found.get(name, 0) < math.prod(shape):
                raise ValueError(
                    f"{path} is not complete: {name} has {found.get(name, 0)} of {math.prod(shape)} numbers"
                )

    def load(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Put checkpoint `step` (the latest unless told) back into the parts: `(step, meta)`, `None` if there is none.

        Raises `ValueError` when it is damaged or holds other parts.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        if step is None:
            steps = self.steps()
            if not steps:
                return None
            step = steps[-1]
        path = self.path(step)
        try:
            header = json.loads((path / "state.json").read_text())
            if set(header["tree"]) != set(self.parts):
                raise ValueError(
                    f"{path} holds {', '.join(sorted(header['tree']))}; this run needs "
                    f"{', '.join(sorted(self.parts))}. It belongs to another recipe: choose another output folder"
                )
            tensors, _ = self._state()
            _same_shapes(path, header["shapes"], _shapes(tensors))
            reader = HuggingFaceStorageReader(path=str(path))
            _quietly(lambda: load(tensors, storage_reader=reader, no_dist=parallel.world() == 1))
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError, CheckpointException, IndexError) as error:
            raise ValueError(
                f"{path} is damaged ({_first_line(error)}). Delete it to continue from the checkpoint before it, "
                f"or from the beginning if there is none"
            ) from error
        for name, part in self.parts.items():
            part.load_state_dict(_unflatten(header["tree"][name], tensors))
        return header["step"], header["meta"]

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and what remains of the parts' states without them."""
        tensors: dict[str, Tensor] = {}
        tree = {name: _flatten(part.state_dict(), name, tensors) for name, part in self.parts.items()}
        return tensors, tree


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of a state: tensors move to `tensors` and leave their name, dicts keep their key types."""
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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of whole tensors, sharded or not."""
    return {name: list(value.shape) for name, value in tensors.items()}


def _same_shapes(path: Path, there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in dict.fromkeys([*there, *here]):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{path} does not fit this run's networks: {name} is {there.get(name)}, not {here.get(name)}"
            )


def _quietly(work: Callable[[], Any]) -> None:
    """Without PyTorch's warnings that there is one process, or that its interface may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()


def _to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
