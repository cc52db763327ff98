"""What a run logs: always JSON lines, and on request TensorBoard and Weights & Biases."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from distmatch.system import limits, parallel
from distmatch.system.disk import naming
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import write_atomic
from distmatch.system.plain import json_of


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, image: np.ndarray) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """`log.jsonl`: one object per line, `{"step": ..., name: value, ...}`.

    Opening it drops the lines after step `start`, because a resumed run writes them again.
    """

    def __init__(self, path: Path, start: int = 0):
        kept = [line for line in read(path) if line["step"] <= start]
        write_atomic(path, lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self._path, self._file = path, path.open("a", buffering=1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        pass  # the training loop saves pictures as files beside the log

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


EARLIER = {"match": "match/student", "regress": "regress/student", "fake": "match/fake"}
"""What earlier versions called the losses of the terms."""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, ignoring a last one that was cut off; empty if there is no log.

    Raises `UserError` that names the first invalid line.
    """
    if not path.exists():
        return []
    limits.check(path.stat().st_size, limits.LOG, str(path))
    texts = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(texts, 1):
        if number == len(texts) and not text.endswith((b"}", b"]")):
            break  # blank, or the start of a line from a process that was killed
        line = json_of(text, f"{path}, line {number}", dict[str, int | float], "Delete the line")
        if not isinstance(line.get("step"), int):
            raise UserError(f"{path}, line {number} has no step. Delete the line")
        lines.append({EARLIER.get(name, name): value for name, value in line.items()})
    return lines


class TensorBoard:
    @staticmethod
    def ready() -> None:
        """Raise `UserError` if it cannot start."""
        need("tensorboard", by="log.track")

    def __init__(self, out: Path, config: Mapping[str, Any], start: int):
        need("tensorboard", by="log.track")
        from torch.utils.tensorboard import SummaryWriter

        self._folder = out / "tensorboard"
        with naming(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=start + 1)
            self._writer.add_text("recipe", f"```\n{json.dumps(config, indent=2)}\n```")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self._folder):  # its thread writes, and reports errors only at a later call
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        with naming(self._folder):
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        with naming(self._folder):
            self._writer.flush()
            self._writer.close()


class Wandb:
    @staticmethod
    def ready() -> None:
        """Raise `UserError` if it cannot start: not installed, or no API key, which it asks for on a terminal."""
        need("wandb", by="log.track")
        wandb: Any = import_module("wandb")
        try:
            wandb.login()
        except Exception as error:
            raise UserError(f"log.track: wandb cannot start: {error}. Run `wandb login`, or leave it out") from error

    def __init__(self, out: Path, config: Mapping[str, Any], start: int):
        need("wandb", by="log.track")
        self._wandb: Any = import_module("wandb")
        mark = out / "wandb-id"  # one W&B run per folder, even if the folder is renamed
        if not mark.exists():
            write_atomic(mark, lambda p: p.write_text(uuid4().hex[:12]))
        options = {"project": "distmatch", "name": out.name, "id": mark.read_text(), "resume": "allow"}
        self._run = self._wandb.init(dir=str(out), config=dict(config), **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


class Log:
    """Everywhere a run logs to. Only the first of several processes writes."""

    def __init__(self, out: Path, start: int, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None):
        self._trackers: list[Tracker] = []
        if parallel.rank() > 0:
            return
        self._trackers = [JsonLines(out / "log.jsonl", start)]
        self._trackers += [TRACKERS[name](out, config or {}, start) for name in trackers]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        for tracker in self._trackers:
            tracker.image(step, name, image)

    def close(self) -> None:
        with ExitStack() as stack:  # closes all of them, even if one fails
            for tracker in self._trackers:
                stack.callback(tracker.close)
