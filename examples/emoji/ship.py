"""Write the student of a run as the package ships it: in half precision, by its teacher's name, without places.

    python examples/emoji/ship.py runs/emoji src/distmatch/assets/emoji/student

The run's teacher must be the one that the package ships as `emoji`, whatever place it was read from.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distmatch.data.pairs import fingerprint
from distmatch.models.folder import load_model, save_model
from distmatch.models.library import components, find_model
from distmatch.pipeline import DistilledPipeline
from distmatch.system.errors import UserError
from distmatch.system.paths import located

TEACHER = "emoji"
LIMIT = 32_000_000
"""Bytes of teacher and student at most."""
PLACES = {"prompts.path": TEACHER, "prompts.cache": None, "regress.weights": None, "pairs.path": None}
"""Entries of the recipe that name places on the machine of the run, and what is written instead."""


def ship(run: str, out: Path) -> None:
    """Write the student called `run` to `out`. Raises `UserError` for another teacher's, or one that is too large."""
    student, info = find_model(run, "student")
    teacher, _ = find_model(TEACHER, "teacher")
    theirs, ours = (components(replace(info, source=source)) for source in (info.source, located(TEACHER)))
    if theirs.encode is None or ours.encode is None or theirs.encode.fingerprint() != ours.encode.fingerprint():
        raise UserError(f"{run} was made from {info.source}, whose text encoder is not that of {TEACHER}")
    if vars(student.prediction) != vars(teacher.prediction) or student.schedule != teacher.schedule:
        raise UserError(f"{run} has another schedule or prediction than {TEACHER}")
    card = {**info.card, "recipe": without_places(info.card["recipe"])}
    save_model(out, student, replace(info, source=located(TEACHER), card=card), torch.float16)

    size = sum(file.stat().st_size for folder in (out, Path(located(TEACHER))) for file in folder.rglob("*.*"))
    if size > LIMIT:
        raise UserError(f"teacher and student are {size:,} bytes, more than {LIMIT:,}")
    shipped, now = load_model(out)
    rounded = copy.deepcopy(student).half().float()
    assert now.source == located(TEACHER)
    assert fingerprint(shipped) == fingerprint(rounded)
    picture, kept = (
        DistilledPipeline(denoiser, now, ours)(prompts="red apple, flat style").pixels.float()
        for denoiser in (shipped, student)
    )
    print(f"{out}: {size / 1e6:.1f} MB with its teacher; largest change of a pixel {(picture - kept).abs().max():.0f}")


def without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as JSON that names nothing on this machine."""
    recipe = {name: dict(part) if isinstance(part, dict) else part for name, part in recipe.items()}
    recipe["teacher"] = TEACHER
    for entry, value in PLACES.items():
        group, name = entry.split(".")
        if name in recipe.get(group, {}):
            recipe[group][name] = value
    if recipe.get("student", {}).get("init"):
        recipe["student"]["init"] = None
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("out", type=Path, help="the folder to write")
    given = parser.parse_args()
    try:
        ship(given.run, given.out)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
