"""Makes the report: one HTML page on one or several runs, with figures, pictures, curves and recipes."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from distmatch.evaluation.measure import CHANCE, EXPECTED, columns
from distmatch.recipe.earlier import renamed
from distmatch.recipe.entry import flat
from distmatch.system.errors import UserError
from distmatch.system.files import check_writable, write_atomic
from distmatch.system.plain import fitting, read_json, read_yaml
from distmatch.system.screen import counted
from distmatch.system.terminal import command
from distmatch.training import log

TEMPLATE = Path(__file__).with_name("report.html")
MOST_NAMED = 8  # runs in a message
STRIP = 8  # sample grids shown side by side; the slider reaches all of them
STEP = re.compile(r"step-(\d+)\.png")
# One per run, cycling; distinguishable with any colour vision (Okabe and Ito's, without yellow, plus two).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8a5cd0")

# Key in the log -> title, and what a healthy run looks like.
CURVES = {
    "loss": (
        "Denoising loss",
        "A teacher's, weighted so that all noise levels count equally. Falls fast, then slowly.",
    ),
    "match/student": ("Matching loss", "Half the mean squared gradient, not a distance: it need not fall."),
    "regress/student": (
        "Regression loss",
        "Distance to the teacher's image of the same noise. Falls fast, then slowly.",
    ),
    "match/fake": (
        "Fake-score loss",
        "Levels off. A lasting rise means that the fake score lags behind the student: raise fake.steps.",
    ),
    "gradient_norm": (
        "Student's gradient norm",
        "Before clipping. Restless is normal; growth by powers of ten is not.",
    ),
    "fake_gradient_norm": (
        "Fake score's gradient norm",
        "Before clipping. Restless is normal; growth by powers of ten is not.",
    ),
    "fid": ("FID", "Of the averaged student. It reads high, because the images are few. Falls, then levels off."),
    "frechet": (
        "Frechet distance",
        "Of the averaged student. It reads high, because the images are few. Falls, then levels off.",
    ),
    "accuracy": ("Class accuracy", "Share of images that the classifier assigns to the requested class. Should rise."),
    "images_per_second": (
        "Images per second",
        "In training, over all streams. Level, unless the machine does other work.",
    ),
    "outside": ("Share of time outside the networks", "Drawing, losses, optimizers. Small and level."),
}


@dataclass(frozen=True)
class Frame:
    """A sample grid of fixed noise, and whether it is visible without the slider."""

    step: int
    png: bytes
    shown: bool


@dataclass
class Run:
    name: str
    folder: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    figures: dict[str, Any]
    colour: str

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the finite values of one key of the log."""
        points = [(line["step"], line[key]) for line in self.lines if math.isfinite(line.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        return (self.series(key)[1] or [None])[-1]

    @property
    def steps(self) -> str:
        """Return "done of planned" steps."""
        done, planned = max((line["step"] for line in self.lines), default=0), self.recipe.get("steps")
        return str(done) if done == planned else f"{done} of {planned}"

    @property
    def minutes(self) -> str:
        """Return the minutes of training; empty if not logged."""
        seconds = self.last("seconds")
        return "" if seconds is None else f"{seconds / 60:.1f}"

    @property
    def about(self) -> str:
        teacher, recipe = self.recipe.get("teacher", ""), self.recipe.get("name", "")
        about = f"A one-step generator distilled from the teacher {teacher} by the recipe {recipe}: {self.steps} steps"
        if not teacher:
            about = f"A teacher trained on {self.recipe.get('images', 'images')}: {self.steps} steps"
        return f"{about} in {self.minutes} minutes." if self.minutes else f"{about}."

    @property
    def hardware(self) -> str:
        return _plain(self.figures["hardware"]) if self.figures.get("hardware") else ""

    @property
    def yaml(self) -> str:
        return yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)

    @cached_property
    def pair(self) -> bytes | None:
        """Return the picture of teacher and student from the same noise."""
        file = self.folder / "teacher-student.png"
        return file.read_bytes() if file.exists() else None

    @cached_property
    def frames(self) -> list[Frame]:
        """Return all sample grids; `STRIP` of them are visible and the slider shows the rest."""
        found = []
        for file in (self.folder / "previews").glob("*"):
            match = STEP.fullmatch(file.name)
            if match:
                found.append((int(match[1]), file))
        found.sort()
        seen = {round(i * (len(found) - 1) / (STRIP - 1)) for i in range(STRIP)}
        return [Frame(step, file.read_bytes(), i in seen) for i, (step, file) in enumerate(found)]


Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def report(runs: list[Path], out: Path) -> Path:
    """Write the report on `runs` to `out` and return `out`; runs are labelled with the names of their folders.

    Only `recipe.yaml` (or a teacher's `settings.json`) must be in a folder. If `log.jsonl`, `eval.json`,
    `teacher-student.png` or `previews/step-*.png` are missing, the page says so or omits the section. No model is
    loaded: the picture of teacher and student from the same noise is made at the end of a run.

    Raises `UserError` if there are no folders, if one is named twice or is not a run, or if a file cannot be read.
    """
    if not runs:
        raise UserError("no runs to report on; name at least one folder that `distmatch train` wrote")
    places = [folder.resolve() for folder in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"{twice} is named more than once; name each run once")
    check_writable(out)
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    loaded = [_load(*row) for row in zip(runs, names, cycle(COLOURS), strict=False)]
    several = len(loaded) > 1
    pages = Environment(autoescape=True, trim_blocks=True)
    pages.filters["base64"] = lambda content: base64.b64encode(content).decode()
    rows = [row for run in loaded for row in run.figures.get("rows", [])]
    page = pages.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" · ".join(names),
        runs=loaded,
        several=several,
        ablation=_ablation(loaded) if several else None,
        figures=_figures(loaded) if rows else None,
        frechet=any(key.startswith("frechet") for key in columns(rows)),
        expected=EXPECTED if any(row.get("name") == CHANCE for row in rows) else "",
        charts=_charts(loaded),
        differing=[[key, *values] for key, values in differing([run.recipe for run in loaded]).items()],
    )
    write_atomic(out, lambda p: p.write_text(page, encoding="utf-8"))
    return out


def _load(folder: Path, name: str, colour: str) -> Run:
    recipe = _recipe_of(folder)
    if recipe is None:
        inside = [run for run in sorted(folder.glob("*")) if _recipe_of(run) and not (run / "compare.json").exists()]
        if inside:
            shown = command("report", *inside[:MOST_NAMED]) + " ..." * (len(inside) > MOST_NAMED)
            raise UserError(f"{folder} is not a run, but the folder of {counted(len(inside), 'run')}: {shown}")
        raise UserError(
            f"{folder} is not a run: it has neither recipe.yaml nor settings.json. "
            "Name a folder that `distmatch train` or `distmatch teach` wrote"
        )
    tree = read_json(recipe, dict[str, Any]) if recipe.suffix == ".json" else renamed(read_yaml(recipe))
    return Run(name, folder, tree, log.read(folder / "log.jsonl"), _evaluated(folder / "eval.json"), colour)


def _recipe_of(folder: Path) -> Path | None:
    """Return the file that says how the run in `folder` was made; `None` if there is none."""
    # settings.json is written by `distmatch teach`; JSON is valid YAML
    return next((folder / name for name in ("recipe.yaml", "settings.json") if (folder / name).is_file()), None)


def _evaluated(file: Path) -> dict[str, Any]:
    """Return the figures of `distmatch eval`, or an empty dict."""
    if not file.exists():
        return {}
    remedy = "Write it again with `distmatch eval`"
    figures = read_json(file, dict[str, Any], remedy)
    for number, row in enumerate(fitting(figures.get("rows", []), f"{file}, rows", list[dict[str, Any]], remedy)):
        numbers = {key: row[key] for key in columns([row]) if key != "name"}
        fitting(numbers, f"{file}, row {number}", dict[str, int | float | None], remedy)
    return figures


def _figures(runs: list[Run]) -> Table:
    """Return the evaluation rows of all runs in one table."""
    rows = [(run, row) for run in runs for row in run.figures.get("rows", [])]
    shown = columns([row for _, row in rows])
    cells = [[_figure(row, key, shown) for key in shown] for _, row in rows]
    head = [heading for heading, _ in shown.values()]
    if len(runs) == 1:
        return head, cells
    return ["run", *head], [[run.name, *line] for (run, _), line in zip(rows, cells, strict=True)]


def _figure(row: Mapping[str, Any], key: str, shown: Mapping[str, tuple[str, str]]) -> str:
    return "–" if row.get(key) is None else shown[key][1].format(row[key])


def _charts(runs: list[Run]) -> Iterator[tuple[str, bytes, str]]:
    """Yield title, picture and caption for each key of the logs that has a value."""
    logged = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    logged = [key for key in logged if any(run.series(key)[1] for run in runs)]
    for figure, (title, caption) in CURVES.items():
        for key in logged:
            base, _, space = key.partition("/")
            if key == figure:
                yield title, _chart(runs, key), caption
            elif base == figure:  # a distance, measured in several feature spaces
                yield f"{title} ({space})", _chart(runs, key), caption
    for key in logged:
        if key not in CURVES and key.endswith(("/student", "/fake")):  # from your own term
            yield key, _chart(runs, key), "The loss of a term of your own."


def _chart(runs: list[Run], key: str) -> bytes:
    """Plot `key` of the logs over the steps, as PNG. No text from the runs is drawn."""
    series = [(run, *run.series(key)) for run in runs]
    everything = [value for _, _, values in series for value in values]
    figure = Figure(figsize=(4.2, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for run, steps, values in series:
        if values:
            axes.plot(steps, values, color=run.colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth(values), color=run.colour, linewidth=1.5, marker="." if len(values) < 30 else "")
    low, high = min(everything), max(everything)
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, transparent=True)
    return buffer.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window of 1/15 of the series, narrower at the ends; short series are unchanged."""
    window = np.ones(len(values) // 15 | 1)
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()


def differing(runs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the dotted keys in which recipes differ, with one value per recipe; a dash if a recipe lacks the key."""
    flats = [flat(recipe) for recipe in runs]
    keys = dict.fromkeys(key for entries in flats for key in entries)
    rows = {key: [_plain(entries[key]) if key in entries else "–" for entries in flats] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _ablation(runs: list[Run]) -> Table:
    """Return a table of what each run changes with respect to the first, and of its final figures."""
    changes = {
        k: v for k, v in differing([run.recipe for run in runs]).items() if k not in ("name", "description", "expected")
    }
    # eval.json may also hold the teacher, and real images, which take none: the student has the fewest evaluations.
    models = [[row for row in run.figures.get("rows", []) if row.get("nfe")] for run in runs]
    students = [min(rows, key=lambda row: row["nfe"], default={}) for rows in models]
    trained = [{key: run.last(key) for key in dict.fromkeys(k for line in run.lines for k in line)} for run in runs]
    logged, measured = _quality(trained), _quality(students)
    head = ["run", "changed", "steps", "minutes", *(f"{heading}, in training" for heading, _ in logged.values())]
    head += [heading for heading, _ in measured.values()]
    rows = []
    for i, run in enumerate(runs):
        changed = [f"{key}={values[i]}" for key, values in changes.items() if values[i] != values[0]]
        figures = [_figure(trained[i], key, logged) for key in logged]
        figures += [_figure(students[i], key, measured) for key in measured]
        rows.append(
            [run.name, "; ".join(changed) or ("nothing" if i else "–"), run.steps, run.minutes or "–", *figures]
        )
    used = [j for j in range(len(head)) if any(row[j] != "–" for row in rows)]
    return [head[j] for j in used], [[row[j] for j in used] for row in rows]


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the columns of `rows` that say how good a model is, not how it was measured or how fast it is."""
    kinds = ("fid", "frechet", "precision", "recall", "accuracy")
    return {key: column for key, column in columns(rows).items() if key.partition("/")[0] in kinds}


def _plain(value: Any) -> str:
    """Format a value of a recipe or an evaluation on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
