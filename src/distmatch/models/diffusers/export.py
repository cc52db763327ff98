"""Exports students in diffusers' format: a complete pipeline, or a LoRA for the teacher's.

Both come with a scheduler that takes the student's steps: for one, DDIM (arXiv 2010.02502), truncated at the student's
time `t` so that its one step starts there and returns `x0` unchanged; for several, that of latent consistency models,
which noises each `x0` to the next time. For flows it is Euler's, whose stochastic sampling does so too.
An export is written next to its place and then moved. Its `distmatch.json` marks it as one, so that it may be replaced,
names the model and the LoRA that the student was made from, and has the SHA-256 of each of its files.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.hub import CARD, index, place
from distmatch.models.diffusers.lora import peft_layers, write_kohya
from distmatch.models.folder import load_adapter, load_model
from distmatch.models.info import Info
from distmatch.models.library import model_folder
from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import remove, together, write_json
from distmatch.system.ownership import owns_out
from distmatch.system.plain import read_json
from distmatch.system.screen import console

FORMAT = "distmatch-export-1"
KOHYA = "kohya.safetensors"


@owns_out
def export_diffusers(run: str, out: Path, source: str | None = None, half: bool = False) -> None:
    """Write the student `run` as a folder that `DiffusionPipeline.from_pretrained` opens (`distmatch export
    diffusers`).

    `pipe(prompt=prompt, num_inference_steps=K, guidance_scale=1)`, with the student's number of steps for K (and with
    `class_labels`, or nothing, in place of the prompt), makes the student's image from its noise, adapters merged.
    Raises `UserError` if the student does not come from a model in diffusers' format, or if `out` holds anything but an
    older export of this kind, which is replaced.
    """
    _parts(out, "diffusers")
    need("diffusers", "transformers", by="export")
    student, info = _student(run)
    source = source or info.source
    family = family_in(source)
    if not isinstance(student.net, tuple(family.networks.values())):
        raise UserError(
            f"{source} is a {index(source)[0]}, the student a {type(student.net).__name__}; expected the model that it "
            f"was made from, {info.source}"
        )
    pipe = family.student_pipeline(student, info, source, torch.float16 if half else torch.float32)
    _write(out, "diffusers", "model_index.json", pipe.save_pretrained, _made_of(source, info))
    if "safety_checker" in index(source)[1] and pipe.safety_checker is None:
        console.print(f"{source} comes without its safety checker, and so does {out}")
    call = _arguments(info, family, source)
    console.print(f"In {out}. Next: DiffusionPipeline.from_pretrained({str(out)!r})({call})")


@owns_out
def export_lora(run: str, out: Path) -> None:
    """Write the adapters of the student `run` and its scheduler, for the teacher's pipeline (`distmatch export lora`).

    Raises `UserError` if the student has no adapters, or if `out` holds anything but an older export of this kind,
    which is replaced.
    """
    _parts(out, "lora")
    need("diffusers", "transformers", "peft", by="export")
    import diffusers

    student, info = _student(run)
    updates = load_adapter(model_folder(run, "student"))
    family = family_in(info.source)
    scheduler = family.student_scheduler(student, info)
    layers, pipeline = peft_layers(updates, family.network), getattr(diffusers, index(info.source)[0])
    if not hasattr(pipeline, "save_lora_weights"):
        raise UserError(f"diffusers' {pipeline.__name__} takes no LoRA; use `distmatch export diffusers`")
    renamed = family.network == "unet"  # ComfyUI reads transformers' adapters under diffusers' names

    def write(folder: Path) -> None:
        named = {f"{family.network}_lora_layers": layers}
        pipeline.save_lora_weights(folder, **named)
        if renamed:
            write_kohya(layers, family.network, folder / KOHYA)
        scheduler.save_pretrained(folder / "scheduler")

    _write(out, "lora", "pytorch_lora_weights.safetensors", write, _made_of(info.source, info))
    console.print(
        f"In {out}, for ComfyUI {f'as {KOHYA}' if renamed else 'too'}. Next: pipe = "
        f"DiffusionPipeline.from_pretrained({place(info.source)!r}); {_loading(out, info)}pipe.scheduler = "
        f"{type(scheduler).__name__}.from_pretrained({str(out)!r}, subfolder='scheduler'); "
        f"pipe({_arguments(info, family, info.source)})"
    )


def _loading(out: Path, info: Info) -> str:
    """Return the lines that load the LoRA in `out` of the student `info`, beside the one of its teacher, if any."""
    if info.lora is None:
        return f"pipe.load_lora_weights({str(out)!r}); "
    return (
        f"pipe.load_lora_weights({info.lora.file!r}, adapter_name='teacher'); "
        f"pipe.load_lora_weights({str(out)!r}, adapter_name='student'); "
        f"pipe.set_adapters(['teacher', 'student'], [{info.lora.scale:g}, 1]); "
    )


def _arguments(info: Info, family: DiffusersFamily, source: str) -> str:
    """Return the arguments with which the pipeline of `source` makes the images of the student `info`."""
    first = {"none": [], "classes": ["class_labels=[0]"], "text": ["prompt=prompt"]}[info.condition]
    if info.text:  # what a pipeline makes by default may be of another size
        height, width = family.settings(source).of_shape(info.shape).size
        first += [f"height={height}", f"width={width}"]
    scale = family.plain if info.guidance is None else f"guidance_scale={info.guidance[1]:g}"
    guidance = [] if info.condition == "none" else [scale]
    return ", ".join([*first, f"num_inference_steps={len(info.times)}", *guidance])


def _parts(out: Path, kind: str) -> set[str]:
    """Return the parts of an export of this kind in `out`, if any. Raises `UserError` for anything else there."""
    there = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")) if out.is_dir() else []
    mark = read_json(out / CARD, dict[str, Any]) if CARD in there else {}
    if there and (mark.get("format"), mark.get("kind")) != (FORMAT, kind):
        raise UserError(
            f"{out} holds {', '.join(there)[:200]}; only an older export {kind} of distmatch is replaced. Choose "
            "another folder, or delete this one"
        )
    return {name.partition("/")[0] for name in mark.get("files", ())} & {*there}


def _made_of(source: str, info: Info) -> dict[str, Any]:
    """Return what the mark says about the model and the LoRA that the student `info` was made from."""
    return {"base": source, "lora": None if info.lora is None else asdict(info.lora)}


def _write(out: Path, kind: str, last: str, write: Callable[[Path], Any], made_of: dict[str, Any]) -> None:
    """Place the export made by `write(folder)` in `out`. Without the file `last`, diffusers does not accept it."""
    before = _parts(out, kind)
    with together(out, last) as beside:
        write(beside)
        files = {file.relative_to(beside).as_posix(): file for file in sorted(beside.rglob("*")) if file.is_file()}
        digests = {name: file_sha256(file) for name, file in files.items()}
        write_json(beside / CARD, {"format": FORMAT, "kind": kind, **made_of, "files": digests})
    for name in before - _parts(out, kind):
        remove(out / name)


def _student(run: str) -> tuple[Denoiser, Info]:
    denoiser, info = load_model(model_folder(run, "student"))
    if not info.source:
        raise UserError(
            f"{run} is not a student of a model in diffusers' format; only such students can be exported to it"
        )
    return denoiser, info
