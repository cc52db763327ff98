"""Stores of noise-image pairs, the regression loss's `D = {z, y}` (DMD, Section 3.3), made by a teacher.

A deterministic sampler makes them. A store is a folder: `manifest.json` says what it holds (`PairSpec`), and each shard
is one safetensors file with the images `y f[n,*D]` of a fixed range of pairs. Noise and conditions are functions of a
pair's number and are not stored, except the table of prompts, `prompts.jsonl`, which all pairs share: pair `i` has
prompt `i`. Each shard records the SHA-256 of the noise that the teacher saw, to prove that it is regenerated exactly.
"""

import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.sampler import SAMPLERS
from distmatch.diffusion.schedule_config import schedule_config
from distmatch.diffusion.solvers import NAMES
from distmatch.system import rng
from distmatch.system.digests import digest
from distmatch.system.errors import UserError
from distmatch.system.plain import json_digest
from distmatch.system.precision import PRECISIONS
from distmatch.system.storage import Folder, limit

FORMAT = "distmatch-pairs-1"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
Progress = Callable[[int], None]
T = TypeVar("T")
PROMPTS = "prompts.jsonl"
MANIFEST = "manifest.json"
META = ("spec", "first", "noise_sha256", "y_sha256")
VERSIONS = ("distmatch", "torch")
WINDOW = 64
"""Shards whose pairs are shuffled together."""

AGAIN = "run the same build command again"
REBUILD = f"Delete it and {AGAIN}: it rebuilds just this shard"


@dataclass(frozen=True)
class PairSpec:
    """What a store holds. Its pairs are a function of these fields, except two that do not bind: `teacher`, a name for
    people, and `count`, because a store can grow.

    Args:
        teacher: the teacher's name, as given by the user.
        fingerprint: the teacher's `fingerprint`.
        sampler: one of `solvers.NAMES`.
        steps: the sampler's steps.
        guidance: scale of classifier-free guidance; 1 is without, `None` takes each pair's from its condition.
        seed: pair `i` starts from the noise `rng.noise(seed, [i], shape)`.
        count: number of pairs.
        shard_size: pairs per shard; the last shard may have fewer.
        shape: of one image, (C, H, W).
        classes: pair `i` has label `i % classes`; 0 for a teacher without classes.
        dtype: of the stored images, "float32" or "float16".
        precision: of the teacher's network, "fp32", or "bf16" or "fp16" for autocast around it.
        scheduler: the settings of the model's diffusers scheduler, which diffusers' samplers follow.
        prompts: `prompts_digest` of the prompts; empty for a teacher without.
        guidances: the range (low, high) of the pairs' own guidance scales, if `guidance` is `None`.
        encoders: the fingerprint of the text encoders; empty for a teacher without.
        taken: of the sampler's steps, if only the first are taken; see `partial.first_steps`.
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
    encoders: str = ""
    taken: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("sampler", NAMES), ("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"pairs: {name} {getattr(self, name)!r} is unknown; expected {' or '.join(known)}")
        for name in ("steps", "count", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"pairs: {name} is {getattr(self, name)}; expected at least 1")
        if self.taken is not None and (self.sampler not in SAMPLERS or not 1 <= self.taken <= self.steps):
            raise UserError(
                f"pairs: taken is {self.taken}, of {self.steps} steps of {self.sampler}; expected at least 1, at most "
                "steps, of euler or heun"
            )

    def binding(self) -> dict[str, Any]:
        """Return the fields that decide what pair `i` is and where it is stored, as plain JSON data."""
        guidance = None if self.guidance is None else float(self.guidance)
        entries = {**asdict(self), "guidance": guidance, "shape": list(self.shape)}
        later = {
            "precision": "fp32",
            "scheduler": {},
            "prompts": "",
            "guidances": None,
            "encoders": "",
            "taken": None,
        }  # not in older ones
        entries |= {"guidances": self.guidances and list(self.guidances)}
        return {k: v for k, v in entries.items() if k not in ("teacher", "count") and later.get(k, ...) != v}

    def digest(self) -> str:
        return json_digest(self.binding())

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)  # rounded up

    def rows(self, shard: int) -> range:
        """Return the numbers of the pairs in shard `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Return the noise of pairs `indices`, f32[len(indices),*shape]."""
        return rng.noise(self.seed, indices, self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its images."""
        return self.count * math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Pairs:
    """`z f32[B,*D]` standard normal, `y f32[B,*D]` the teacher's images of it, `index` the pairs' numbers, which
    determine their conditions (`conditions`).
    """

    z: Tensor
    y: Tensor
    index: Sequence[int]


def fingerprint(teacher: Denoiser) -> str:
    """Return the SHA-256 of all that decides what `teacher` computes: weights, schedule, prediction.

    Weights count by name, type, shape and bytes, but not by their device or memory layout. What the network's
    `computed` names does not count: another machine computes it with other rounding.
    """
    computed = {f"net.{name}" for name in getattr(teacher.net, "computed", ())}
    weights = {
        k: [str(v.dtype), list(v.shape), digest(v)] for k, v in teacher.state_dict().items() if k not in computed
    }
    config = {"schedule": schedule_config(teacher.schedule), "prediction": asdict(teacher.prediction)}
    return json_digest({**config, "weights": weights})


class PairStore:
    """The first `spec.count` pairs of a store; see `open`. Images are read from memory-mapped shards."""

    def __init__(self, folder: Folder, spec: PairSpec):
        self.folder, self.spec = folder, spec
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._compared: set[int] = set()
        self._fetched: set[int] = set()

    @staticmethod
    def open(folder: str | Path | Folder, fingerprint: str | None = None, count: int | None = None) -> "PairStore":
        """Open the store in `folder`, a path or a URL.

        Args:
            fingerprint: of the teacher that must have made it (default: any).
            count: how many of its pairs to use, from the first (default: all). With a fixed count, a run sees the same
                pairs in the same order after the store has grown.

        Raises:
            UserError: there is no store, it is incomplete, made by another teacher or smaller than `count`, a shard is
                damaged or foreign, or the noise of the first shard cannot be reproduced. Shards at a URL are checked
                when they are needed.
        """
        folder = Folder(folder)
        spec, versions = read_manifest(folder)
        if fingerprint is not None and fingerprint != spec.fingerprint:
            raise UserError(
                f"{folder} was made by another teacher: by {spec.teacher!r} with fingerprint {spec.fingerprint[:12]}; "
                f"the teacher here has {fingerprint[:12]}. Choose another folder for its pairs"
            )
        if count is not None and not 1 <= count <= spec.count:
            raise UserError(f"{folder} holds {spec.count} pairs, not {count}. Build it with that count first")
        spec = replace(spec, count=count or spec.count)
        sizes = folder.sizes()
        there = sum(_each_shard(spec, lambda shard: is_there(folder, spec, shard, sizes)))
        if there < spec.shards:
            raise UserError(f"{folder} is incomplete: {there} of {spec.shards} shards are there; {AGAIN}")
        window = replace(spec, count=min(spec.count, 2 * WINDOW * spec.shard_size)).nbytes
        if folder.path is None and window > limit():
            raise UserError(
                f"{folder}: the shards in use have {window / 1e9:.3g} GB, more than the {limit() / 1e9:.3g} GB "
                "that copies of remote files may take; set DISTMATCH_CACHE_GB, or copy the folder to a disk"
            )
        y, meta = read_shard(folder, spec, 0)
        if meta["noise_sha256"] != digest(spec.noise(range(len(y)))):
            raise UserError(
                f"{folder.at(shard_name(0))}: the noise regenerated for it is not what the teacher saw. The store was "
                f"made with torch {versions['torch']}, this is {version('torch')}. If they differ, use that version or "
                f"build the pairs anew in another folder; if not, the file is damaged. {REBUILD}"
            )
        return PairStore(folder, spec)

    def __len__(self) -> int:
        return self.spec.count

    def batch(self, indices: Sequence[int]) -> Pairs:
        """Return the pairs numbered `indices`; `IndexError` if one is not in 0..len - 1."""
        return Pairs(z=self.spec.noise(indices), y=self._images(indices), index=indices)

    def draw(self, seed: int, position: int, count: int) -> Pairs:
        """Return pairs `position .. position + count` of an endless shuffle; every pass has each pair once.

        A function of position alone, whatever the number of processes. About `WINDOW` shards are in use at a time; at
        a URL, the next ones are fetched in the background.
        """
        if self.folder.path is None:
            self._fetch(self._order(seed, position, WINDOW * self.spec.shard_size))
        return self.batch(self._order(seed, position, count).tolist())

    def images(self, start: int, stop: int) -> Tensor:
        """Return the teacher's images of pairs `start .. stop - 1`, f32[stop - start,*D]."""
        return self._images(range(start, stop))

    def verify(self, progress: Progress | None = None) -> None:
        """Check every byte against the digests, and the noise by generating all of it again.

        `progress` is called with the number of pairs checked. Raises `UserError` that names each bad shard and what
        is wrong with it.
        """

        def check(shard: int) -> None:
            _check(self.folder, self.spec, shard)
            if progress is not None:
                progress(len(self.spec.rows(shard)))

        _each_shard(self.spec, check)
        if self.spec.prompts:
            self.prompts()

    def prompts(self) -> list[str]:
        """Return the table of prompts; pair `i` has prompt `i`, starting over at the end of the table.

        Raises `UserError` if it is missing or has changed since it was written.
        """
        try:
            prompts = [json.loads(line) for line in self.folder.read(PROMPTS).decode().splitlines()]
            if prompts_digest(prompts) != self.spec.prompts:
                raise UserError("its digest is not that of its content")
        except (FileNotFoundError, ValueError, RecursionError) as error:
            where = self.folder.at(PROMPTS)
            raise UserError(f"{where} is damaged ({error}). Delete it and {AGAIN}: it is written anew") from error
        return prompts

    def _order(self, seed: int, position: int, count: int) -> np.ndarray:
        return rng.shuffled(seed, len(self), position, count, WINDOW, self.spec.shard_size)

    def _fetch(self, order: np.ndarray) -> None:
        """Start to fetch the shards of pairs `order` to the local disk, in threads that do not delay an exit."""
        needed = set(np.unique(order // self.spec.shard_size).tolist())
        names = deque(shard_name(shard) for shard in sorted(needed - self._fetched))
        for _ in range(min(4, len(names))):
            Thread(target=_fetch_all, args=(self.folder, names), daemon=True).start()
        self._fetched = needed

    def _shard(self, number: int) -> np.ndarray:
        """Return a shard's images, verified once; the most recently used shards stay mapped."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        y, meta = read_shard(self.folder, self.spec, number)
        if number not in self._compared:
            _same_images(self.folder.at(shard_name(number)), y, meta)
            self._compared.add(number)
        self._open[number] = y.numpy()
        if len(self._open) > 2 * WINDOW:
            self._open.popitem(last=False)
        return self._open[number]

    def _images(self, indices: Sequence[int]) -> Tensor:
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"{self.folder}: pairs are numbered 0..{len(self) - 1}")
        y = np.empty((len(indices), *self.spec.shape), np.float32)
        for k, i in enumerate(indices):
            y[k] = self._shard(i // self.spec.shard_size)[i % self.spec.shard_size]
        return torch.from_numpy(y)


def _fetch_all(folder: Folder, names: deque[str]) -> None:
    """Fetch the files `names` to the local disk, shared with other threads that take from the same queue."""
    with suppress(IndexError):  # the queue is empty
        while True:
            with suppress(UserError, OSError):  # whoever needs the file will see the error
                folder.opened(names.popleft(), Path.stat)


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of a list of prompts, in order."""
    h = sha256()
    for prompt in prompts:
        h.update(json.dumps(prompt).encode() + b"\n")
    return h.hexdigest()


def shard_meta(spec: PairSpec, shard: int, y: Tensor, *noise: Tensor) -> dict[str, Any]:
    """Return a shard's metadata: its store, its first pair, and the digests of the noise and of `y`."""
    return dict(zip(META, (spec.digest(), spec.rows(shard)[0], digest(*noise), digest(y)), strict=True))


def is_there(folder: Folder, spec: PairSpec, shard: int, sizes: Mapping[str, int]) -> bool:
    """Return whether a shard exists with all its pairs. `sizes`: of the files in `folder`.

    Raises `UserError` if a file on a disk is malformed or from another store. At a URL, only its size is checked.
    """
    if shard_name(shard) not in sizes:
        return False
    rows = len(spec.rows(shard))
    if folder.path is None:
        return sizes[shard_name(shard)] > rows * spec.nbytes // spec.count
    return len(read_shard(folder, spec, shard)[0]) >= rows


def read_shard(folder: Folder, spec: PairSpec, shard: int) -> tuple[Tensor, dict[str, Any]]:
    """Return a shard's memory-mapped `y`, which may have fewer pairs than it will have, and its `shard_meta`.

    Raises `UserError` if it is missing, malformed or from another store.
    """
    where = folder.at(shard_name(shard))
    try:
        y, header, names = folder.opened(shard_name(shard), _content)
        meta = {key: header[key] for key in META}
        if names != ["y"] or y.shape[1:] != spec.shape or y.dtype != DTYPES[spec.dtype]:
            raise UserError(f"it holds {', '.join(names)} with y {y.dtype} {tuple(y.shape)}")
    except FileNotFoundError as error:
        raise UserError(f"{where} is missing; {AGAIN}") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged ({error}). {REBUILD}") from error
    if (meta["spec"], meta["first"]) != (spec.digest(), spec.rows(shard)[0]):
        raise UserError(f"{where} is of another store, or of another place in this one. {REBUILD}")
    return y, meta


def _content(file: Path) -> tuple[Tensor, dict[str, Any], list[str]]:
    with safe_open(file, framework="pt") as opened:  # raises if the file is shorter or longer than its header says
        header = json.loads((opened.metadata() or {})["distmatch"])
        return opened.get_tensor("y"), header, list(opened.keys())


def _check(folder: Folder, spec: PairSpec, shard: int) -> None:
    """Read all of a shard; raise `UserError` that says what is wrong with it."""
    where, (y, meta) = folder.at(shard_name(shard)), read_shard(folder, spec, shard)
    if len(y) < len(spec.rows(shard)):
        raise UserError(f"{where} is not complete; {AGAIN}")
    first = spec.rows(shard)[0]
    if meta["noise_sha256"] != digest(spec.noise(range(first, first + len(y)))):
        raise UserError(f"{where}: the noise regenerated for it is not what the teacher saw. {REBUILD}")
    _same_images(where, y, meta)


def _same_images(where: str, y: Tensor, meta: Mapping[str, Any]) -> None:
    if meta["y_sha256"] != digest(y):
        raise UserError(f"{where} is damaged (its images are not those that were written). {REBUILD}")


def _each_shard(spec: PairSpec, f: Callable[[int], T]) -> list[T]:
    """Call `f` with every shard's number; what it raises for several shards becomes one `UserError`."""
    results, problems = [], []
    for shard in range(spec.shards):
        try:
            results.append(f(shard))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return results


def read_manifest(folder: Folder) -> tuple[PairSpec, dict[str, str]]:
    """Return the specification in `manifest.json`, and the versions that wrote it. Raises `UserError` if invalid."""
    try:
        content = folder.read(MANIFEST)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a store of pairs: it has no {MANIFEST}. Build it first") from error
    try:
        manifest = json.loads(content)
        known, kind = manifest.pop("sha256"), manifest["format"]
        if known != json_digest(manifest):
            raise UserError("its digest is not that of its content")
        if kind != FORMAT:
            raise UserError(f"its format is {kind!r}; this version reads {FORMAT!r}")
        entries = manifest["spec"]
        tuples = {k: tuple(entries[k]) for k in ("shape", "guidances") if entries.get(k) is not None}
        spec = PairSpec(**{**entries, **tuples})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder.at(MANIFEST)} cannot be used: {error}. Move it away and {AGAIN}: shards that fit are kept"
        ) from error
    return spec, manifest["versions"]


def agree(folder: Folder, spec: PairSpec) -> PairSpec | None:
    """Return what `folder` holds, if anything; raise `UserError` listing every binding difference from `spec`."""
    if not folder.exists(MANIFEST):
        return None
    stored, _ = read_manifest(folder)
    there, here = stored.binding(), spec.binding()
    names = dict.fromkeys([*there, *here])
    differing = [f"  {k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in names if there.get(k) != here.get(k)]
    if differing:
        raise UserError(
            f"{folder} holds other pairs (teacher {stored.teacher!r} there, {spec.teacher!r} here):\n"
            + "\n".join(differing)
            + "\nChoose another folder, or delete this one if its pairs are no longer needed"
        )
    return stored


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"
