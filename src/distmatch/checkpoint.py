"""Checkpoints: named stateful parts in one safetensors file, written atomically, kept last-N plus best.

Nothing in a checkpoint is executed when it is read: tensors go into safetensors, everything else into its JSON header.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
    """The checkpoints of one run: `folder/step-00001000.safetensors`, ...

    Args:
        parts: what a checkpoint holds, by name: networks, EMA, optimizers.
        keep: how many of the latest stay; the best one (see `mark_best`) stays besides.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful], keep: int = 2):
        self.folder = folder
        self.parts = parts
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        names = (re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(m[1]) for m in names if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

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
        write_json(self.folder / "best.json", {"step": step, "score": score})

    def save(self, step: int, meta: Mapping[str, Any] | None = None) -> Path:
        """Write the parts as they are after `step` steps and drop what is too old."""
        tensors: dict[str, Tensor] = {}
        tree = {name: _flatten(part.state_dict(), name, tensors) for name, part in self.parts.items()}
        header = {"step": step, "meta": dict(meta or {}), "tree": tree}
        write_atomic(self.path(step), lambda p: save_file(tensors, p, metadata={"distmatch": json.dumps(header)}))
        best = self.best()
        kept = {*self.steps()[-self.keep :], best["step"] if best else step}
        for old in set(self.steps()) - kept:
            self.path(old).unlink(missing_ok=True)
        return self.path(step)

    def load(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Put checkpoint `step` (the latest unless told) back into the parts: `(step, meta)`, `None` if there is none.

        Raises `ValueError` when the file is damaged or holds other parts.
        """
        if step is None:
            steps = self.steps()
            if not steps:
                return None
            step = steps[-1]
        path = self.path(step)
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["distmatch"])
                if set(header["tree"]) != set(self.parts):
                    raise ValueError(
                        f"{path} holds {', '.join(sorted(header['tree']))}; this run needs "
                        f"{', '.join(sorted(self.parts))}. It belongs to another recipe: choose another output folder"
                    )
                states = {name: _unflatten(tree, file) for name, tree in header["tree"].items()}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Delete it to continue from the checkpoint before it, "
                f"or from the beginning if there is none"
            ) from error
        try:
            for name, part in self.parts.items():
                part.load_state_dict(states[name])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit this run's networks: {error}") from error
        return header["step"], header["meta"]


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


def _unflatten(tree: dict[str, Any], file: Any) -> Any:
    (kind, value), *_ = tree.items()
    match kind:
        case "tensor":
            return file.get_tensor(value)
        case "dict":
            return {k: _unflatten(v, file) for k, v in value}
        case "list":
            return [_unflatten(v, file) for v in value]
        case _:
            return value
