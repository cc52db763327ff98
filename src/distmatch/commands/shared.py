"""What several commands share: finding a student or teacher, reading images, options of training a teacher."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distmatch.recipe.consistency import GUIDANCE
from distmatch.system.errors import UserError
from distmatch.system.options import Count, Integer, Rate, Share, Whole
from distmatch.system.screen import Screen

if TYPE_CHECKING:
    import torch

    from distmatch.data.images import Images
    from distmatch.pipeline import Pipeline
    from distmatch.system.machine import Choice
    from distmatch.system.workers import Workers


@dataclass(frozen=True, kw_only=True)
class TeachingOptions:
    """What `distmatch teach` and `distmatch teach-text` have in common."""

    steps: Count = 10_000
    """Number of training steps; the learning rate falls to zero over the last 30 %."""

    batch: Count = 128
    """Images per step."""

    lr: Rate = 1e-3
    """Peak learning rate of Adam."""

    split: str = "train"
    """Which split to read, if there are splits: train (including folders called training, train2017, ...), test, val,
    the name of a folder, or all, which treats no folder as a split."""

    ema: Share = 0.999
    """Decay of the moving average of the weights; the average is the model that is saved."""

    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """bf16: autocast around the networks; auto: bf16 where it is faster than fp32, tried when the run begins."""

    seed: Integer = 0
    """Seed of the initial weights, the image order and all noise."""

    save_every: Count = 500
    """Steps between checkpoints."""

    preview_every: Whole = 500
    """Steps between sample pictures; 0: none."""

    device: str = "auto"
    """auto, cpu or cuda."""


def starting(work: str) -> None:
    """Say what begins, before PyTorch is imported, which alone takes half a minute on a loaded machine."""
    if os.environ.get("RANK", "0") == "0":
        Screen(stderr=True).print(f"{work} ...", soft_wrap=True)


def find_pipeline(model: str, teacher: bool, steps: int | None, guidance: float | None, device: str) -> "Pipeline":
    """Return the student called `model`, or with `teacher` the teacher of that name, sampling in `steps` steps."""
    if teacher:
        return find_teacher(model, steps, guidance, device)
    return find_student(model, guidance, device, steps=steps)


def find_teacher(model: str, steps: int | None, guidance: float | None, device: str) -> "Pipeline":
    from distmatch.pipeline import TeacherPipeline
    from distmatch.recipe import subjects

    scale = 1.0 if guidance is None else guidance
    return TeacherPipeline.from_pretrained(model, subjects.device(device), steps=steps, guidance=scale)


def find_student(model: str, guidance: float | None, device: str, **how: Any) -> "Pipeline":
    """Return the student called `model`; `how`: arguments of `DistilledPipeline`.

    Raises `UserError` for a `guidance` if the student's is fixed.
    """
    from distmatch.pipeline import DistilledPipeline
    from distmatch.recipe import subjects

    student = DistilledPipeline.from_pretrained(model, subjects.device(device), **how)
    if guidance not in (None, 1.0) and student.info.guidance is None:
        raise UserError(
            f"guidance {guidance} is for a teacher: add --teacher. This student's guidance is fixed by training"
        )
    return student


def guidance_of(student: "Pipeline") -> float | None:
    """Return the guidance scale that a student was trained for, or the middle of its range; `None` if it is unknown."""
    if student.info.guidance is not None:
        return sum(student.info.guidance) / 2
    recipe = student.info.card.get("recipe", {})
    used = [group for term, group in GUIDANCE.items() if term in recipe.get("terms", ())]
    return recipe.get(used[0], {}).get("guidance") if used else None  # earlier recipes may lack it


def find_precision(asked: str, before: str | None, device: "torch.device") -> str:
    """Return the precision `asked` for; `auto`: that of the run `before`, or the one that is faster on `device`."""
    from distmatch.system import machine

    if asked != "auto":
        return asked
    return before or str(_told(machine.faster_precision(device)))


def find_workers(asked: "int | str", device: "torch.device") -> "Workers":
    """Return the workers `asked` for; `auto`: as many as are fastest here, tried in a second and said in one line."""
    import torch

    from distmatch.system import machine, parallel
    from distmatch.system.workers import Workers

    possible = device.type == "cpu" and parallel.world() == 1
    if asked != "auto":
        if int(asked) > 1 and not possible:
            raise UserError(f"--workers {asked}: they share the cores of a CPU within one process; use 1 or auto here")
        return Workers(int(asked))
    return Workers(_told(machine.faster_workers(torch.get_num_threads())) if possible else 1)


def _told(choice: "Choice") -> Any:
    """Say why the machine's choice was made; return it."""
    from distmatch.system.screen import console

    if choice.said:
        console.print(f"On this machine: {choice.said}")
    return choice.value


def read_images(place: str | Path, split: str, out: Path) -> "Images":
    """Return the images of a split. Raises `UserError` if the results would be written to the folder of the images."""
    from distmatch.data.images import load_images
    from distmatch.system.screen import console
    from distmatch.system.storage import is_url

    if not is_url(place) and Path(place).resolve() == out.resolve():
        raise UserError(f"{out} holds the images; choose another folder for the results with --out")
    with console.status(f"reading {place}"):
        return load_images(place, split, without=out)
