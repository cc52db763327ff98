"""What a table's YAML file holds, the commands that make it, and what they measured. A part of `table.py`."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError
from distmatch.system.plain import fitting, read_json, read_yaml


class Row(BaseModel, extra="forbid"):
    name: str = Field(pattern=r"^[\w.-]+$")  # its runs are the folders NAME-SEED
    title: str = ""  # default: the name
    overrides: str = ""  # may use `words`
    recipe: str | None = None  # default: the table's
    after: str | None = None  # a row above; its student of the same seed is where this one starts
    seeds: int = Field(1, ge=1)
    measure: str | None = None  # what to measure without training, as `distmatch eval` takes it: mnist --teacher


class Tiny(BaseModel, extra="forbid"):
    """What `--tiny` changes."""

    overrides: str = ""  # after those of each row
    evaluate: str | None = None
    prepare: list[str] | None = None


class Table(BaseModel, extra="forbid"):
    recipe: str
    common: str = ""  # overrides of all rows
    words: dict[str, str] = {}  # overrides that rows use by name, such as NOREG
    files: list[str] = []  # data sets, in the folder --data
    prepare: list[str] = []  # distmatch commands that come first, one after another; may use COMMON and `words`
    evaluate: str = ""  # options of `distmatch eval`
    rows: list[Row]
    tiny: Tiny = Tiny()
    last: str = ""  # overrides after those of each row, of `--tiny`

    def split(self, text: str) -> list[str]:
        """Return `text` as arguments, with words replaced by what they stand for.

        Raises `UserError` for quotes that are not closed.
        """
        words = {"COMMON": self.common, **self.words}
        try:
            return [part for word in shlex.split(text) for part in shlex.split(words.get(word, shlex.quote(word)))]
        except ValueError as error:
            raise UserError(f"{text!r}, with the words that it uses: {error}") from error

    def overrides(self, row: Row) -> list[str]:
        """Return the overrides of a row, but for those that depend on the seed."""
        return self.split(f"COMMON {row.overrides} {self.last}")

    def steps(self, row: Row) -> str:
        """Return the row's steps, after those of the rows that it continues: 400 + 400."""
        own = f"{load_recipe(row.recipe or self.recipe, self.overrides(row)).steps:,}"
        before = [self.steps(other) for other in self.rows if other.name == row.after]
        return " + ".join([*before, own])


@dataclass(frozen=True)
class Task:
    """One command of the table.

    Args:
        command: the arguments of `distmatch`.
        result: a file that is there once it has succeeded.
        after: the tasks before it, by name.
        alone: nothing else runs beside it, so that it may have all cores.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    after: tuple[str, ...] = ()
    alone: bool = False

    @property
    def said(self) -> str:
        return shlex.join(["distmatch", *self.command])


def load_table(file: Path, tiny: bool = False, seeds: int | None = None) -> Table:
    """Read a table, and check that its rows are recipes.

    Args:
        tiny: apply what the file says of `--tiny`, with one seed.
        seeds: of each row that is trained.

    Raises `UserError` for anything that the file should not hold, naming the row.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    table = fitting(read_yaml(file), str(file), Table)
    if tiny:
        cut = {"evaluate": table.tiny.evaluate, "prepare": table.tiny.prepare, "last": table.tiny.overrides}
        table = table.model_copy(update={name: value for name, value in cut.items() if value is not None})
    seen: dict[str, Row] = {}
    for row in table.rows:
        if row.measure is None:
            row.seeds = seeds or (1 if tiny else row.seeds)
        if row.name in seen:
            raise UserError(f"{file}: two rows are called {row.name}")
        if row.after is not None and (row.after not in seen or seen[row.after].seeds < row.seeds):
            raise UserError(f"{file}, row {row.name}: after {row.after} must be a row above, with as many seeds")
        try:
            table.steps(row)
        except UserError as error:
            raise UserError(f"{file}, row {row.name}: {error}") from error
        seen[row.name] = row
    return table


def plan(table: Table, out: Path, only: Sequence[str] = ()) -> list[Task]:
    """Return the commands of `table`, or of the rows `only` and those that they come after, in an order that works.

    Raises `UserError` for an unknown row.
    """
    tasks: list[Task] = []
    for number, text in enumerate(table.prepare, 1):
        name, before = f"prepare-{number}", tuple(task.name for task in tasks[-1:])
        done = out / "logs" / f"{name}.done"
        tasks.append(Task(name, tuple(table.split(text)), done, before, alone=True))
    ready = tuple(task.name for task in tasks[-1:])
    for row in chosen(table.rows, only):
        for seed in range(row.seeds):
            run = f"{row.name}-{seed}"
            figures, model, before = out / run / "figures.json", table.split(row.measure or run), ready
            if row.measure is None:
                init = [f"student.init={row.after}-{seed}"] if row.after else []
                start = [f"{row.after}-{seed}-train"] if row.after else []
                train = ("train", row.recipe or table.recipe, *table.overrides(row), *init, f"seed={seed}", "-o", run)
                tasks.append(Task(f"{run}-train", train, out / run / "trained", (*ready, *start)))
                before = (f"{run}-train",)
            measure = ("eval", *model, *table.split(table.evaluate), "--out", f"{run}/figures.json")
            tasks.append(Task(f"{run}-eval", measure, figures, before))
    return tasks


def chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Return the rows `only`, or all, with those that they come after, as they are ordered in `rows`."""
    by_name = {row.name: row for row in rows}
    if unknown := [name for name in only if name not in by_name]:
        raise UserError(f"--only {' '.join(unknown)} is unknown; expected some of {', '.join(by_name)}")
    wanted = {*only} or {*by_name}
    for row in reversed(rows):  # what a row comes after is above it
        if row.name in wanted and row.after is not None:
            wanted.add(row.after)
    return [row for row in rows if row.name in wanted]


def markdown(table: Table, out: Path, only: Sequence[str] = ()) -> str:
    """Return the table of what has been measured in `out`, and the commands: means over seeds; of distances also the
    lowest and the highest. Other rows than `only` that have not been measured are named below it.
    """
    measured = {row.name: figures(row, out) for row in table.rows}
    keys = list(dict.fromkeys(key for seeds in measured.values() for found in seeds for key in found))
    keys.sort(key=lambda key: key.endswith("/pixels"), reverse=True)  # this space comes first in docs/results.md
    distances = [key for key in keys if key == "fid" or key.startswith("frechet/")]
    spaces = [key.removeprefix("precision/") for key in keys if key.startswith("precision/")]
    headings = [key.replace("fid", "FID").replace("frechet/", "Frechet: ") for key in distances]
    headings += [f"precision, recall: {space}" for space in spaces]
    headings = ["run", "override", "steps", *headings, "class accuracy", "minutes", "seeds"]
    lines = [headings, ["---"] * len(headings)]
    asked = chosen(table.rows, only)
    shown = [row for row in table.rows if measured[row.name] or row in asked]
    for row in shown:
        seeds = measured[row.name]
        override = f"`{row.overrides}`" if row.overrides else ""
        cells = [row.title or row.name, f"after {row.after}: {override}" if row.after else override]
        cells += ["" if row.measure else table.steps(row)]
        cells += [spread(of(seeds, key)) for key in distances]
        cells += [share(of(seeds, f"precision/{space}"), of(seeds, f"recall/{space}")) for space in spaces]
        cells += [mean(of(seeds, "accuracy", 100.0), "{:.1f} %"), mean(of(seeds, "minutes"), "{:.1f}")]
        lines.append([*cells, "" if row.measure else str(len(seeds))])
    words = [f"`{word}`: `{stands_for}`" for word, stands_for in {"COMMON": table.common, **table.words}.items()]
    trained = " ".join(["COMMON OVERRIDE", *shlex.split(table.last), "seed=S"])
    commands = f"`distmatch train {table.recipe} {trained}`, `distmatch eval RUN {table.evaluate}`"
    below = ["", ". ".join([commands, *words])]
    if absent := [row.name for row in table.rows if row not in shown]:
        below += ["", f"Not run: {', '.join(absent)}"]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *below])


def figures(row: Row, out: Path) -> list[dict[str, Any]]:
    """Return what `distmatch eval` wrote of each measured seed, with the `minutes` of its training by the clock."""
    found = []
    for seed in range(row.seeds):
        run = out / f"{row.name}-{seed}"
        if not (run / "figures.json").exists():
            continue
        measured = read_json(run / "figures.json", dict[str, Any])["rows"][0]
        if (run / "log.jsonl").exists():
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            measured["minutes"] = max((line.get("seconds", 0.0) for line in lines), default=0.0) / 60
        found.append(measured)
    return found


def of(seeds: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> list[float]:
    return [scale * found[key] for found in seeds if key in found]


def spread(values: Sequence[float]) -> str:
    """Return the mean with the lowest and the highest, to two decimals, or three below one."""
    form = "{:.2f}" if sum(values) >= len(values) else "{:.3f}"
    between = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return mean(values, form) + between


def share(precisions: Sequence[float], recalls: Sequence[float]) -> str:
    """Return the means as docs/results.md has them: .811, .778."""
    return ", ".join(mean(values, "{:.3f}").removeprefix("0") for values in (precisions, recalls) if values)


def mean(values: Sequence[float], form: str) -> str:
    return form.format(sum(values) / len(values)) if values else ""
