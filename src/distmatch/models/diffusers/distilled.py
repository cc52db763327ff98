"""Evidence, in a model's own files, that it is a student already: its scores are no longer those of the data."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distmatch.models.diffusers.hub import CARD, config, place
from distmatch.system.plain import read_json

NAMES = re.compile(r"turbo|lightning|schnell|hyper-?sd|(?<![a-z])(dmd2?|lcm|tcd|pcm)(?![a-z])", re.IGNORECASE)
"""Parts of the names of published students: SD-Turbo, SDXL-Lightning, LCM_Dreamshaper, Hyper-SD, DMD2."""

STUDENTS = {"LCMScheduler": "latent consistency models", "TCDScheduler": "trajectory consistency distillation"}
"""Schedulers that only students have."""


def evidence(source: str, network: str = "unet", lora: str = "") -> str | None:
    """Return what says that the model `source` was distilled, in words; `None` if nothing does. Reads settings only.

    Args:
        network: name of its denoising network's part.
        lora: file that was merged into it.
    """
    return next(_found(source, network, lora), None)


def _found(source: str, network: str, lora: str) -> Iterator[str]:
    mark = Path(place(source)) / CARD
    if mark.exists() and "kind" in read_json(mark, dict[str, Any]):
        yield f"{mark} says that it is a student exported by distmatch"
    mark = (Path(lora) if Path(lora).is_dir() else Path(lora).parent) / CARD
    files = read_json(mark, dict[str, Any]).get("files", ()) if lora and mark.exists() else ()
    if files and (Path(lora).is_dir() or Path(lora).name in files):
        yield f"{mark} says that {lora} is of a student exported by distmatch"
    scheduler = config(source, "scheduler_config.json", "scheduler")
    kind = str(scheduler.get("_class_name"))
    if kind in STUDENTS:
        yield f"its scheduler is {kind}, of {STUDENTS[kind]}"
    if kind.startswith("Euler") and _trailing(scheduler):
        yield f"its scheduler is {kind} with trailing timesteps, as SD-Turbo's and SDXL-Turbo's"
    files = {"model_index.json": None, "config.json": network}
    known = [str(config(source, file, folder).get("_name_or_path", "")) for file, folder in files.items()]
    for name in (*known, source.removesuffix(".safetensors"), lora.removesuffix(".safetensors")):
        own = name if re.fullmatch(r"[^/]+/[^/]+", name) else Path(name).name  # of a place, not the folders above it
        if NAMES.search(own):
            yield f"it is called {name}"


def _trailing(scheduler: Mapping[str, Any]) -> bool:
    """Whether its timesteps end at the last one, though its noise does not (of zero terminal SNR, they have to)."""
    return scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
