"""`distmatch checkpoints`: lists, verifies and deletes a run's checkpoints."""

from distmatch.system.errors import UserError
from distmatch.system.options import File, Integer


def checkpoints(run: File, /, *, verify: bool = False, keep: Integer | None = None) -> None:
    """List the checkpoints of a run, verify them, or delete old ones.

    Parameters
    ----------
    run
        The run's folder.
    verify
        Read every byte and check that all numbers are finite.
    keep
        Delete all but the latest KEEP and the best one.
    """
    from datetime import datetime

    from rich.table import Table

    from distmatch.system.screen import console, size
    from distmatch.training.checkpoint import Checkpoints

    if keep is not None and keep < 1:
        raise UserError(f"--keep {keep}: at least the latest stays; give 1 or more")
    found = Checkpoints(run / "checkpoints", {}, keep or 1)
    if not found.steps():
        raise UserError(f"{run} has no checkpoints; expected a run's folder, e.g. runs/mnist")
    if keep:
        for step in found.prune():
            console.print(f"deleted step {step}")
    best, problems = found.best(), 0
    rows = []
    for step in found.steps():
        files = list(found.path(step).glob("*.safetensors"))
        saved = datetime.fromtimestamp((found.path(step) / "state.json").stat().st_mtime).isoformat(" ", "seconds")
        remark = f"best, {best['score']:.3f}" if best and best["step"] == step else ""
        if verify:
            try:
                found.verify(step)
                remark += " complete and finite"
            except UserError as error:
                remark, problems = str(error), problems + 1
        rows.append((str(step), size(sum(f.stat().st_size for f in files)), str(len(files)), saved, remark.strip()))
    shown = 5 if any(row[-1] for row in rows) else 4
    table = Table(*("step", "size", "shards", "saved", "")[:shown])
    for row in rows:
        table.add_row(*row[:shown])
    console.print(table)
    if problems:
        raise UserError(f"{problems} of {len(found.steps())} checkpoints cannot be used; delete them to go on without")
