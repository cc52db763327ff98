"""What ties a run's folder to its run: it continues only with the recipe, teacher and prompts it began with."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from distmatch.data.pairs import prompts_digest
from distmatch.recipe import subjects
from distmatch.recipe.entries import Recipe, parse_recipe
from distmatch.recipe.entry import flat
from distmatch.recipe.loading import dump, free_entries
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic, write_json
from distmatch.system.plain import read_json, read_yaml
from distmatch.system.terminal import command

NAMES = {"fingerprint": "digest of the teacher's settings and weights"}

SAVED = ("model", "methods", "checkpoints/step-*")
"""What a run has that is worth keeping."""
FIGURES = ("teacher-student.png", "compare.png", "compare.json", "eval.json", "report.html")
"""What a run or a comparison is looked at by."""
WRITTEN = (*SAVED, *FIGURES, "previews", "log.jsonl")
"""What a run would write over, or take for its own."""

MARKS = ("recipe.yaml", "settings.json", *SAVED, "config.json", "model_index.json")
"""What tells the folder of a run, a comparison or a model."""

REMEDY = "Delete it to go on, if you know that its settings were these"


def check_no_run(out: Path) -> None:
    """Raise `UserError` if `out`, a folder for pictures, is that of a run, a comparison or a model."""
    if found := next((file for mark in MARKS for file in sorted(out.glob(mark))), None):
        raise UserError(
            f"{out} is the folder of a run or a model: it holds {found}. Choose another folder for the pictures with "
            "--out"
        )


@parallel.on_first
def begun(out: Path) -> Recipe | None:
    """Return the recipe with which the run in `out` began, if it has saved anything."""
    file = out / "recipe.yaml"
    return parse_recipe(read_yaml(file), str(file)) if _has_begun(file) else None


def begun_settings(file: Path) -> dict[str, Any]:
    """Return the settings in `file` with which the run there began; empty if it has saved nothing."""
    return read_json(file, dict[str, Any], REMEDY) if _has_begun(file) else {}


@parallel.on_first
def same_recipe(recipe: Recipe, began: Recipe | None, out: Path) -> None:
    """Raise `UserError` if the run in `out` `began` with a different recipe."""
    if began is not None:
        before, now = flat(began.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
        free = free_entries()
        go_on = f"To continue it as it began: {command('train', out / 'recipe.yaml', '--out', out)}"
        _same({k: v for k, v in now.items() if k not in free}, before, out, go_on)


@parallel.on_first
def bind(recipe: Recipe, subject: subjects.Subject, out: Path) -> None:
    """Record the recipe, teacher and prompts of the run in `out`, before anything else is made there.

    Raises `UserError` if that run has another teacher, or if its prompts were edited.
    """
    now = {"teacher": recipe.teacher, "fingerprint": subject.fingerprint}
    if subject.prompts:
        now |= {"prompts": prompts_digest(subject.prompts), "encoders": subject.encoders}
    if subject.real is not None:
        now |= {"images": subject.real.fingerprint}
    same_settings(now, out / "teacher.json", new={"prompts", "encoders"})
    write_atomic(out / "recipe.yaml", lambda p: p.write_text(dump(recipe)))


def same_settings(settings: dict[str, Any], file: Path, new: Collection[str] = ()) -> None:
    """Record `settings` in `file`. Refuse if the run there began with others; replace a run that has saved nothing.

    Args:
        new: settings that earlier versions did not record.
    """
    before = read_json(file, dict[str, Any], REMEDY) if file.exists() else {}
    if _has_begun(file):
        _same({k: v for k, v in settings.items() if k in before or k not in new}, before, file.parent)
    else:
        shutil.rmtree(file.parent / "previews", ignore_errors=True)
        (file.parent / "wandb-id").unlink(missing_ok=True)
    write_json(file, settings)


def _has_begun(file: Path) -> bool:
    """Return whether the run that `file` describes has saved anything worth keeping.

    Raises `UserError` if the folder holds something of such a name that no run made.
    """
    out = file.parent
    if not file.exists():
        if found := next((name for name in WRITTEN if any(out.glob(name))), None):
            raise UserError(
                f"{out} holds {out / found} of something else: it has no {file.name}. Choose another folder with --out"
            )
        return False
    return any(any(out.glob(name)) for name in SAVED)


def _same(now: dict[str, Any], before: dict[str, Any], out: Path, go_on: str = "") -> None:
    changed = [k for k in now if now[k] != before.get(k)]
    if changed:
        lines = "\n".join(f"  {NAMES.get(k, k)}: {before.get(k)} there, {now[k]} here" for k in changed)
        choice = "Choose another folder with --out, or delete it"
        raise UserError(f"{out} is a run with other settings:\n{lines}\n{choice}" + (go_on and f". {go_on}"))
