"""What several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING

from distmatch.errors import UserError

if TYPE_CHECKING:
    from distmatch.images import Images
    from distmatch.pipeline import Pipeline


def find_pipeline(model: str, steps: int | None, guidance: float | None, device: str) -> "Pipeline":
    """Return the student called `model`, or its teacher when `steps` of its sampler are given."""
    from distmatch import build
    from distmatch.pipeline import DistilledPipeline, TeacherPipeline

    if steps is not None:
        return TeacherPipeline.from_pretrained(
            model, build.device(device), steps=steps, guidance=1.0 if guidance is None else guidance
        )
    student = DistilledPipeline.from_pretrained(model, build.device(device))
    if guidance not in (None, 1.0) and student.info.guidance is None:
        raise UserError(
            f"guidance {guidance} is for a teacher: give --steps too. This student's guidance is fixed by training"
        )
    return student


def read_images(place: str | Path, split: str, out: Path) -> "Images":
    """Return the images of a split. Raises `UserError` where results are to be written among them."""
    from distmatch.images import load_images
    from distmatch.screen import console
    from distmatch.storage import is_url

    if not is_url(place) and Path(place).resolve() == out.resolve():
        raise UserError(f"{out} holds the images; choose another folder for the results with --out")
    with console.status(f"reading {place}"):
        return load_images(place, split, without=out)
