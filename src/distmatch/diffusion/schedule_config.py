"""Converts schedules to plain JSON data and back."""

from dataclasses import asdict
from typing import Any

from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.schedule import EDM, VP, Flow, Schedule
from distmatch.system.errors import UserError

SCHEDULES: dict[str, type[Schedule]] = {"edm": EDM, "iddpm": IDDPM, "vp": VP, "flow": Flow}

UNSHIFTED = ("shift", 1.0)
"""An entry that is left out, since earlier models and pairs, whose digests count it, have none."""


def schedule_config(schedule: Schedule) -> dict[str, Any]:
    """Return the schedule as plain JSON data: its arguments or, for a custom one, a table of its values."""
    for kind, known in SCHEDULES.items():
        if type(schedule) is known:
            entries: Any = schedule
            return {"type": kind, **{k: v for k, v in asdict(entries).items() if v is not None and (k, v) != UNSHIFTED}}
    grid = schedule.grid(33)
    columns = {"t": grid, "alpha": schedule.alpha(grid), "sigma": schedule.sigma(grid)}
    values = {name: [float(f"{v:.6g}") for v in column.tolist()] for name, column in columns.items()}
    return {"type": None, "class": type(schedule).__name__, "prior_std": schedule.prior_std, **values}


def schedule_of(config: dict[str, Any], own: Schedule | None = None) -> Schedule:
    """Invert `schedule_config`; `own` is the schedule to use if its type is not one of `SCHEDULES`.

    Raises `UserError` for an unknown type, and if `own` is missing or has other values.
    """
    entries = dict(config)
    kind = entries.pop("type", None)
    if kind is None and "class" in entries:
        name = entries["class"]
        if own is None:
            raise UserError(
                f"the model was saved with a schedule of its owner's, {name}; pass one: "
                f"DistilledPipeline.from_pretrained(path, schedule={name}(...))"
            )
        if schedule_config(own) != config:
            raise UserError(f"the model was saved with a schedule {name} of other values than {own}; pass that one")
        return own
    if kind not in SCHEDULES:
        raise UserError(f"schedule type {kind!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    if own is not None:
        raise UserError(f"the model has its own schedule, {kind}; leave `schedule` out")
    return SCHEDULES[kind](**entries)
