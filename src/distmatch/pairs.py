"""The noise-image pairs `D = {z, y}` of the regression loss (DMD, Section 3.3), made by a deterministic sampler.

A store is a folder: `manifest.json` says what it holds (`PairSpec`), each shard is one safetensors file with the images
`y f[n,*D]` of a fixed range of pairs. Noise and conditions are functions of a pair's number and are not stored, but for
the table of prompts, `prompts.jsonl`, which all pairs share: pair `i` has prompt `i`. Each shard carries the SHA-256 of
the noise that the teacher saw, which proves that what is regenerated is the same.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmatch import rng
from distmatch.checkpoint import write_atomic, write_json
from distmatch.conditions import Classes, Conditions
from distmatch.denoiser import Denoiser, guided
from distmatch.models.folder import schedule_config
from distmatch.solvers import NAMES, solver

FORMAT = "distmatch-pairs-1"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int], None]
T = TypeVar("T")
PROMPTS = "prompts.jsonl"
META = ("spec", "first", "noise_sha256", "y_sha256")
VERSIONS = ("distmatch", "torch")
AGAIN = "run the same build command again"
REBUILD = f"Delete it and {AGAIN}: it rebuilds just this shard"


@dataclass(frozen=True)
class PairSpec:
    """What a store holds. A store's pairs are a function of these fields; two of them do not bind: `teacher`, a name
    for people, and `count`, because a store can grow.

    Args:
        teacher: the teacher's name, as the user gave it.
        fingerprint: the teacher's `fingerprint`.
        sampler: one of `solvers.NAMES`.
        steps: the sampler's steps.
        guidance: scale of classifier-free guidance; 1 is without, `None` takes each pair's from its condition.
        seed: pair `i` starts from the noise `rng.noise(seed, [i], shape)`.
        count: number of pairs.
        shard_size: pairs per shard; the last shard may have fewer.
        shape: of one image, (C, H, W).
        classes: pair `i` has label `i % classes`; 0 for a teacher without.
        dtype: of the stored images, "float32" or "float16".
        precision: of the teacher's network, "fp32", or "bf16" or "fp16" for autocast around it.
        scheduler: the settings of the model's diffusers scheduler, which `pndm` follows.
        prompts: `prompts_digest` of the prompts; empty for a teacher without.
        guidances: the range (low, high) that the pairs' own guidance scales are from, where `guidance` is `None`.
    """

    teacher: str
    fingerprint: str
    sampler: str
    steps: int
    guidance: float | None
    seed: int
    count: int
    shard_size: int
    shape: tuple[int, ...]
    classes: int
    dtype: str
    precision: str = "fp32"
    scheduler: dict[str, Any] = field(default_factory=dict)
    prompts: str = ""
    guidances: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, known in (("sampler", NAMES), ("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"pairs: {name} {getattr(self, name)!r} is unknown; expected {' or '.join(known)}")
        for name in ("steps", "count", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"pairs: {name} is {getattr(self, name)}; expected at least 1")

    def binding(self) -> dict[str, Any]:
        """The fields that decide what pair `i` is and where it lies, as plain JSON data."""
        guidance = None if self.guidance is None else float(self.guidance)
        entries = {**asdict(self), "guidance": guidance, "shape": list(self.shape)}
        later = {"precision": "fp32", "scheduler": {}, "prompts": "", "guidances": None}  # unsaid in older stores
        entries |= {"guidances": self.guidances and list(self.guidances)}
        return {k: v for k, v in entries.items() if k not in ("teacher", "count") and later.get(k, ...) != v}

    def digest(self) -> str:
        return _json_digest(self.binding())

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """The pairs in shard number `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def noise(self, indices: Sequence[int]) -> Tensor:
        """f32[len(indices),*shape]"""
        return rng.noise(self.seed, indices, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its images."""
        return self.count * math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Pairs:
    """`z f32[B,*D]` standard normal, `y f32[B,*D]` the teacher's images of it, `index` the pairs' numbers, of which
    their conditions are a function (`conditions`).
    """

    z: Tensor
    y: Tensor
    index: Sequence[int]


def fingerprint(teacher: Denoiser) -> str:
    """SHA-256 over all that decides what `teacher` computes: weights (name, type, shape, bytes), schedule, prediction.

    The device and the memory layout of the weights do not enter.
    """
    weights = {k: [str(v.dtype), list(v.shape), _digest(v)] for k, v in teacher.state_dict().items()}
    config = {"schedule": schedule_config(teacher.schedule), "prediction": asdict(teacher.prediction)}
    return _json_digest({**config, "weights": weights})


def build(
    folder: Path,
    spec: PairSpec,
    teacher: Denoiser,
    conditions: Conditions | None = None,
    *,
    prompts: Sequence[str] = (),
    batch: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Make what is missing of the first `spec.count` pairs in `folder`; returns how many pairs this call sampled.

    Any number of processes may run the same build at once: each shard is made by the one that holds its lock, which
    the operating system frees when a process dies. Shards appear whole or not at all and finished ones are kept, so
    after any interruption the same call continues. A store grows by a build with a larger `count`; a last shard that
    was not full is then replaced by its full version.

    Args:
        teacher: on `device`; put into evaluation mode.
        conditions: of the pairs by number; the classes in turn unless told.
        prompts: of the teacher's pairs, for the table beside them.
        batch: images per evaluation, cut at fixed places in each shard. It changes nothing but rounding.
        progress: called with the number of pairs that became ready, first with those that were there.

    Raises:
        ValueError: `folder` holds pairs of another teacher or other settings, a shard is damaged, or the teacher made
            an image that is not finite. Nothing is ever deleted.
    """
    advance = progress or (lambda _: None)
    conditions = conditions or Classes(spec.classes)
    stored = _settle(folder, spec)
    if prompts:
        _write_prompts(folder, prompts)
    missing = [shard for shard in range(spec.shards) if _read(folder, stored, shard) is None]
    advance(spec.count - sum(len(spec.rows(shard)) for shard in missing))
    assert not missing or fingerprint(teacher) == spec.fingerprint, "the specification is of another teacher"
    sampled = 0
    while missing:
        busy = []
        for shard in missing:
            try:
                with _lock(_path(folder, shard).with_suffix(".lock"), timeout=0):
                    if _read(folder, stored, shard) is None:
                        _make(folder, stored, shard, teacher.eval(), conditions, batch, device, advance)
                        sampled += len(stored.rows(shard))
                    else:
                        advance(len(spec.rows(shard)))
            except Timeout:
                busy.append(shard)
        if busy:
            time.sleep(0.2)  # others are at work on these; should they die, their locks are free
        missing = busy
    return sampled


class PairStore:
    """The first `spec.count` pairs of a store; see `open`. Images are read from memory-mapped shards."""

    def __init__(self, folder: Path, spec: PairSpec, shards: list[np.ndarray]):
        self.folder, self.spec = folder, spec
        self._shards = shards

    @staticmethod
    def open(folder: Path, fingerprint: str | None = None, count: int | None = None) -> "PairStore":
        """The store in `folder`.

        Args:
            fingerprint: of the teacher that must have made it; any teacher unless told.
            count: how many of its pairs, from the first; all unless told. A run that says how many sees the same
                pairs in the same order after the store has grown.

        Raises:
            ValueError: there is no store, it is incomplete, another teacher's or smaller than `count`, a shard is
                damaged or foreign, or the noise of the first shard does not come out the same.
        """
        spec, versions = _read_manifest(folder)
        if fingerprint is not None and fingerprint != spec.fingerprint:
            raise ValueError(
                f"{folder} was made by another teacher: by {spec.teacher!r} with fingerprint {spec.fingerprint[:12]}; "
                f"the teacher here has {fingerprint[:12]}. Choose another folder for its pairs"
            )
        if count is not None and not 1 <= count <= spec.count:
            raise ValueError(f"{folder} holds {spec.count} pairs, not {count}. Build it with that count first")
        spec = replace(spec, count=count or spec.count)
        shards = [found for found in _each_shard(spec, lambda k: _read(folder, spec, k)) if found is not None]
        if len(shards) < spec.shards:
            raise ValueError(f"{folder} is incomplete: {len(shards)} of {spec.shards} shards are there; {AGAIN}")
        y, meta = shards[0]
        if meta["noise_sha256"] != _digest(spec.noise(range(len(y)))):
            raise ValueError(
                f"{_path(folder, 0)}: the noise regenerated for it is not what the teacher saw. The store was made "
                f"with torch {versions['torch']}, this is {version('torch')}. If they differ, use that version or "
                f"build the pairs anew in another folder; if not, the file is damaged. {REBUILD}"
            )
        return PairStore(folder, spec, [y.numpy() for y, _ in shards])

    def __len__(self) -> int:
        return self.spec.count

    def batch(self, indices: Sequence[int]) -> Pairs:
        """The pairs numbered `indices`; `IndexError` where one is not in 0..len - 1."""
        return Pairs(z=self.spec.noise(indices), y=self._images(indices), index=indices)

    def draw(self, seed: int, position: int, count: int) -> Pairs:
        """Pairs `position .. position + count` of an endless shuffle; every pass has each pair once."""
        return self.batch(rng.shuffled(seed, len(self), position, count).tolist())

    def images(self, start: int, stop: int) -> Tensor:
        """The teacher's images of pairs `start .. stop - 1`, f32[stop - start,*D]."""
        return self._images(range(start, stop))

    def verify(self, progress: Progress | None = None) -> None:
        """Check every byte against the digests, and the noise by making all of it again.

        `progress` is called with the number of pairs checked. Raises `ValueError` that names each bad shard and what
        is wrong with it.
        """

        def check(shard: int) -> None:
            _check(self.folder, self.spec, shard)
            if progress is not None:
                progress(len(self.spec.rows(shard)))

        _each_shard(self.spec, check)
        if self.spec.prompts and prompts_digest(self.prompts()) != self.spec.prompts:
            raise ValueError(f"{self.folder / PROMPTS} is damaged. Delete it and {AGAIN}: it is written anew")

    def prompts(self) -> list[str]:
        """The table of prompts; pair `i` has prompt `i`, or what is left of it after a whole number of turns."""
        with (self.folder / PROMPTS).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def _images(self, indices: Sequence[int]) -> Tensor:
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"{self.folder}: pairs are numbered 0..{len(self) - 1}")
        y = np.empty((len(indices), *self.spec.shape), np.float32)
        for k, i in enumerate(indices):
            y[k] = self._shards[i // self.spec.shard_size][i % self.spec.shard_size]
        return torch.from_numpy(y)


def _make(
    folder: Path,
    spec: PairSpec,
    shard: int,
    teacher: Denoiser,
    conditions: Conditions,
    batch: int,
    device: torch.device | str,
    advance: Progress,
) -> None:
    """Sample one shard and write it. The caller holds its lock."""
    path, rows = _path(folder, shard), spec.rows(shard)
    for remnant in folder.glob(f".{path.name}.*"):  # of a writer that was killed
        remnant.unlink(missing_ok=True)
    model, sample = guided(teacher, spec.guidance), solver(spec.sampler, spec.scheduler)
    low = PRECISIONS[spec.precision]
    y = torch.empty(len(rows), *spec.shape, dtype=DTYPES[spec.dtype])
    seen = []
    for start in range(0, len(rows), batch):
        cut = rows[start : start + batch]
        z, cond = spec.noise(cut), conditions.at(cut)
        cond = None if cond is None else cond.to(device)
        with torch.no_grad(), torch.autocast(torch.device(device).type, low, enabled=low != torch.float32):
            part = sample(model, teacher.schedule, z.to(device), cond, spec.steps).to(y)
        if not part.isfinite().all():
            raise ValueError(
                f"pairs {cut[0]}..{cut[-1]}: the teacher made an image that is not finite in {spec.dtype}. "
                "Check the teacher and its guidance, or choose float32"
            )
        y[start : start + batch] = part
        seen.append(z)
        advance(len(cut))
    meta = _meta(spec, shard, y, *seen)
    write_atomic(path, lambda p: save_file({"y": y}, p, metadata={"distmatch": json.dumps(meta)}))


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of a list of prompts, in order."""
    h = sha256()
    for prompt in prompts:
        h.update(json.dumps(prompt).encode() + b"\n")
    return h.hexdigest()


def _write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)

    with _lock(folder / "manifest.lock"):
        if not (folder / PROMPTS).exists():
            write_atomic(folder / PROMPTS, write)


def _meta(spec: PairSpec, shard: int, y: Tensor, *noise: Tensor) -> dict[str, Any]:
    """What a shard says of itself: which store it is of, its first pair, and the digests of the noise and of `y`."""
    return dict(zip(META, (spec.digest(), spec.rows(shard)[0], _digest(*noise), _digest(y)), strict=True))


def _read(folder: Path, spec: PairSpec, shard: int) -> tuple[Tensor, dict[str, Any]] | None:
    """A shard's memory-mapped `y` and its `_meta`; `None` where the file, or pairs at its end, are yet to be made.

    Raises `ValueError` where it is damaged in form or another store's.
    """
    path, rows = _path(folder, shard), spec.rows(shard)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # raises unless the file is as long as its header says
            header = json.loads((file.metadata() or {})["distmatch"])
            y, names = file.get_tensor("y"), list(file.keys())
        meta = {key: header[key] for key in META}
        if names != ["y"] or y.shape[1:] != spec.shape or y.dtype != DTYPES[spec.dtype]:
            raise ValueError(f"it holds {', '.join(names)} with y {y.dtype} {tuple(y.shape)}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). {REBUILD}") from error
    if (meta["spec"], meta["first"]) != (spec.digest(), rows[0]):
        raise ValueError(f"{path} is of another store, or of another place in this one. {REBUILD}")
    return (y, meta) if len(y) >= len(rows) else None


def _check(folder: Path, spec: PairSpec, shard: int) -> None:
    """Read all of a shard; raises `ValueError` that says what is wrong with it."""
    path, found = _path(folder, shard), _read(folder, spec, shard)
    if found is None:
        raise ValueError(f"{path} is missing or not complete; {AGAIN}")
    y, meta = found
    first = spec.rows(shard)[0]
    expected = _meta(spec, shard, y, spec.noise(range(first, first + len(y))))
    if meta["noise_sha256"] != expected["noise_sha256"]:
        raise ValueError(f"{path}: the noise regenerated for it is not what the teacher saw. {REBUILD}")
    if meta != expected:
        raise ValueError(f"{path} is damaged (its images are not those that were written). {REBUILD}")


def _each_shard(spec: PairSpec, f: Callable[[int], T]) -> list[T]:
    """`f` of every shard's number; what it raises for several shards becomes one `ValueError`."""
    results, problems = [], []
    for shard in range(spec.shards):
        try:
            results.append(f(shard))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return results


def _settle(folder: Path, spec: PairSpec) -> PairSpec:
    """What `folder` holds, at least `spec`: the manifest is written where it is missing or has a smaller count.

    Raises `ValueError` where the store there is a different one.
    """
    file = folder / "manifest.json"
    if file.exists() and (stored := _agree(folder, spec)).count >= spec.count:
        return stored  # without a write: the folder may be read-only
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "manifest.lock"):
        if not file.exists() or (stored := _agree(folder, spec)).count < spec.count:
            stored = spec
            content = {"format": FORMAT, "spec": asdict(spec), "versions": {name: version(name) for name in VERSIONS}}
            write_json(file, {**content, "sha256": _json_digest(content)})
    return stored


def _agree(folder: Path, spec: PairSpec) -> PairSpec:
    """What `folder` holds, which binds as `spec` does; else `ValueError` with every difference."""
    stored, _ = _read_manifest(folder)
    there, here = stored.binding(), spec.binding()
    names = dict.fromkeys([*there, *here])
    differing = [f"  {k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in names if there.get(k) != here.get(k)]
    if differing:
        raise ValueError(
            f"{folder} holds other pairs (teacher {stored.teacher!r} there, {spec.teacher!r} here):\n"
            + "\n".join(differing)
            + "\nChoose another folder, or delete this one if its pairs are no longer needed"
        )
    return stored


def _read_manifest(folder: Path) -> tuple[PairSpec, dict[str, str]]:
    """The specification in `manifest.json`, and the versions that wrote it."""
    file = folder / "manifest.json"
    if not file.exists():
        raise ValueError(f"{folder} is not a store of pairs: it has no manifest.json. Build it first")
    try:
        manifest = json.loads(file.read_text())
        digest, kind = manifest.pop("sha256"), manifest["format"]
        if digest != _json_digest(manifest):
            raise ValueError("its digest is not that of its content")
        if kind != FORMAT:
            raise ValueError(f"its format is {kind!r}; this version reads {FORMAT!r}")
        entries = manifest["spec"]
        tuples = {k: tuple(entries[k]) for k in ("shape", "guidances") if entries.get(k) is not None}
        spec = PairSpec(**{**entries, **tuples})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be used: {error}. Move it away and {AGAIN}: shards that fit are kept"
        ) from error
    return spec, manifest["versions"]


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' values in row-major order, one tensor after the other."""
    h = sha256()
    for tensor in tensors:
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _json_digest(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


@contextmanager
def _lock(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file; it goes when its work is done, or stays, harmlessly, where an open file cannot be removed."""
    with FileLock(path, timeout=timeout):
        yield
        with suppress(OSError):
            path.unlink()
