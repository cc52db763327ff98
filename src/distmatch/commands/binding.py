"""What a run's folder is bound to: a run goes on only with the recipe, teacher and prompts that it began with."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from distmatch.data.pairs import prompts_digest
from distmatch.recipe import build
from distmatch.recipe.entries import Recipe, parse_recipe
from distmatch.recipe.entry import flat
from distmatch.recipe.loading import dump, free_entries
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic, write_json
from distmatch.system.plain import read_json, read_yaml


def same_recipe(recipe: Recipe, out: Path) -> None:
    """Refuse to continue a run with another recipe."""
    file = out / "recipe.yaml"
    if _has_begun(file):
        before = flat(parse_recipe(read_yaml(file), str(file)).model_dump(mode="json"))
        now = flat(recipe.model_dump(mode="json"))
        free = free_entries()
        _same({k: v for k, v in now.items() if k not in free}, before, out)


def bind(recipe: Recipe, subject: build.Subject, out: Path) -> None:
    """Record what the run in `out` is of, before anything else is made. Refuse to continue one of another teacher, or
    of prompts that were edited.
    """
    file, now = out / "teacher.json", {"teacher": recipe.teacher, "fingerprint": subject.fingerprint}
    if subject.prompts:
        now["prompts"] = prompts_digest(subject.prompts)
    same_settings(now, file, new={"prompts"})
    write_atomic(out / "recipe.yaml", lambda p: p.write_text(dump(recipe)))


def same_settings(settings: dict[str, Any], file: Path, new: Collection[str] = ()) -> None:
    """Refuse to continue a run with other `settings` than those in `file`; a run that has saved nothing is replaced.

    Args:
        new: settings that runs of earlier versions have not written down.
    """
    remedy = "Delete it to go on, if you know that its settings were these"
    before = read_json(file, dict[str, Any], remedy) if file.exists() else {}
    if _has_begun(file):
        _same({k: v for k, v in settings.items() if k in before or k not in new}, before, file.parent)
    else:
        shutil.rmtree(file.parent / "previews", ignore_errors=True)
        (file.parent / "wandb-id").unlink(missing_ok=True)
    write_json(file, settings)


def _has_begun(file: Path) -> bool:
    """Whether the run that `file` describes has saved anything that another one would not make again.

    Raises `UserError` where something is saved that was not made by such a run.
    """
    out = file.parent
    found = next((name for name in ("model", "methods", "checkpoints/step-*") if any(out.glob(name))), None)
    if found and not file.exists():
        raise UserError(
            f"{out} holds {out / found} of something else: it has no {file.name}. Choose another folder with --out"
        )
    return bool(found)


def _same(now: dict[str, Any], before: dict[str, Any], out: Path) -> None:
    changed = [k for k in now if now[k] != before.get(k)]
    if changed:
        lines = "\n".join(f"  {k}: {before.get(k)} there, {now[k]} here" for k in changed)
        raise UserError(f"{out} is a run with other settings:\n{lines}\nChoose another folder with --out, or delete it")
