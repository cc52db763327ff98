"""Builds a store of noise-image pairs, with any number of processes and machines that come and go."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from distmatch.data.pairs import (
    DTYPES,
    FORMAT,
    MANIFEST,
    PROMPTS,
    VERSIONS,
    PairSpec,
    Progress,
    agree,
    fingerprint,
    is_there,
    shard_meta,
    shard_name,
)
from distmatch.diffusion.conditions import Classes, Conditions
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.solvers import solver
from distmatch.system.claims import EXPIRY, Claims, make_together
from distmatch.system.errors import UserError
from distmatch.system.plain import json_digest
from distmatch.system.precision import autocast
from distmatch.system.storage import Folder
from distmatch.system.workers import current


def build(
    folder: str | Path,
    spec: PairSpec,
    teacher: Denoiser,
    conditions: Conditions | None = None,
    *,
    prompts: Sequence[str] = (),
    batch: int = 256,
    progress: Progress | None = None,
    expiry: float = EXPIRY,
) -> int:
    """Make the missing ones of the first `spec.count` pairs in `folder`; return how many pairs this call sampled.

    Any number of processes, on any machines that can reach `folder` (a path or a URL), may run the same build at once
    and come and go: each shard is made by the process that claims it (see `claims`). Shards appear complete or not at
    all and finished ones are kept, so the same call continues after any interruption. To grow a store, build it with a
    larger `count`; if its last shard was not full, a full version replaces it.

    Args:
        teacher: put into evaluation mode; pairs are sampled on its device.
        conditions: of the pairs, by number (default: the classes in turn).
        prompts: of the teacher's pairs, for the table beside them.
        batch: images per evaluation; each shard is split at fixed places. Changes nothing but rounding.
        progress: called with the number of pairs that became ready, first with those already there.
        expiry: seconds after which a shard's unchanged claim is taken over, because its process has died.

    Raises:
        UserError: `folder` holds pairs of another teacher or other settings, a shard is damaged, or the teacher made
            an image that is not finite. Nothing is ever deleted.
    """
    advance = progress or (lambda _: None)
    conditions = conditions or Classes(spec.classes)
    store = Folder(folder)
    stored = _settle(store, spec, expiry)
    if prompts and not store.exists(PROMPTS):
        store.write(PROMPTS, lambda path: _write_prompts(path, prompts))
    shards = {shard_name(shard): shard for shard in range(spec.shards)}
    sampled = 0

    def present(name: str, sizes: Mapping[str, int]) -> bool:
        return is_there(store, stored, shards[name], sizes)

    def found(names: Collection[str]) -> None:
        advance(sum(len(spec.rows(shards[name])) for name in names))

    def make(name: str) -> None:
        nonlocal sampled
        if sampled == 0 and fingerprint(teacher) != spec.fingerprint:  # reads every weight, so only once
            raise ValueError("the specification is of another teacher")
        _make(store, stored, shards[name], teacher.eval(), conditions, batch, advance)
        sampled += len(stored.rows(shards[name]))

    make_together(store, list(shards), present, make, found, expiry)
    return sampled


def _make(
    folder: Folder,
    spec: PairSpec,
    shard: int,
    teacher: Denoiser,
    conditions: Conditions,
    batch: int,
    advance: Progress,
) -> None:
    """Sample one shard and write it. The caller holds its claim."""
    rows = spec.rows(shard)
    model, sample = guided(teacher, spec.guidance), solver(spec.sampler, spec.scheduler, spec.taken)
    device = next(chain(teacher.parameters(), teacher.buffers()), torch.empty(0)).device
    cuts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    noise: list[Tensor] = []

    def inputs() -> Iterator[tuple[Tensor, Cond | None]]:
        for cut in cuts:
            noise.append(spec.noise(cut))
            yield noise[-1], conditions.at(cut)

    def images(given: tuple[Tensor, Cond | None]) -> Tensor:
        z, cond = given
        cond = None if cond is None else cond.to(device)
        with torch.no_grad(), autocast(device, spec.precision):
            return sample(model, teacher.schedule, z.to(device), cond, spec.steps).to("cpu", DTYPES[spec.dtype])

    made = []
    for cut, part in zip(cuts, current().map(images, inputs()), strict=True):
        if not part.isfinite().all():
            raise UserError(
                f"pairs {cut[0]}..{cut[-1]}: the teacher made an image that is not finite in {spec.dtype}. "
                "Check the teacher and its guidance, or choose float32"
            )
        made.append(part)
        advance(len(cut))
    y = torch.cat(made)
    meta = shard_meta(spec, shard, y, *noise)
    folder.write(shard_name(shard), lambda p: save_file({"y": y}, p, metadata={"distmatch": json.dumps(meta)}))


def _write_prompts(path: Path, prompts: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)


def _settle(folder: Folder, spec: PairSpec, expiry: float) -> PairSpec:
    """Return what `folder` holds, at least `spec`: writes the manifest if it is missing or has a smaller count.

    Raises `UserError` if it holds a different store.
    """
    stored = agree(folder, spec)
    if stored is None or stored.count < spec.count:  # otherwise write nothing: the folder may be read-only
        with Claims(folder, expiry).waited(MANIFEST):
            stored = agree(folder, spec)
            if stored is None or stored.count < spec.count:
                stored = spec
                versions = {name: version(name) for name in VERSIONS}
                content = {"format": FORMAT, "spec": asdict(spec), "versions": versions}
                text = json.dumps({**content, "sha256": json_digest(content)}, indent=2) + "\n"
                folder.write(MANIFEST, lambda path: path.write_text(text))
    return stored
