"""One or several runs as one HTML page that opens from disk: figures, pictures, curves, recipes side by side."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from distmatch import log
from distmatch.entry import flat
from distmatch.errors import UserError
from distmatch.evaluation import columns
from distmatch.files import check_writable, write_atomic
from distmatch.plain import fitting, read_json, read_yaml
from distmatch.recipe_entries import renamed

STRIP = 8  # so many sample grids stand side by side; all of them are behind the slider
STEP = re.compile(r"step-(\d+)\.png")
# One per run, in turn, told apart with any kind of colour vision (Okabe and Ito's, less the yellow, and two more).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8a5cd0")

# Entry of the log: title, and what a healthy run looks like.
CURVES = {
    "loss": (
        "Denoising loss",
        "A teacher's, weighted so that all noise levels count equally. Falls fast, then slowly.",
    ),
    "match/student": ("Matching loss", "A surrogate: half the mean squared weighted gradient. It need not fall."),
    "regress/student": (
        "Regression loss",
        "Distance to the teacher's image of the same noise. Falls fast, then slowly.",
    ),
    "match/fake": ("Fake-score loss", "Levels off. A lasting rise hints that it lags the student: more fake.steps."),
    "gradient_norm": ("Student's gradient norm", "Before clipping. Unrest is usual, growth by decades is not."),
    "fake_gradient_norm": ("Fake score's gradient norm", "Before clipping. Unrest is usual, growth by decades is not."),
    "fid": ("FID", "Of the averaged student; few images, so it reads high. Falls, then levels off."),
    "frechet": ("Frechet distance", "Of the averaged student; few images, so it reads high. Falls, then levels off."),
    "accuracy": ("Class accuracy", "Share of images that the classifier takes for the class asked for. Should rise."),
    "images_per_second": ("Images per second", "Of all terms, in training. Level, unless the machine has other work."),
    "outside": ("Share of time outside the networks", "Drawing, losses, optimizers. Small and level."),
}


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    figures: dict[str, Any]
    colour: str

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of one entry of the log."""
        points = [(line["step"], line[key]) for line in self.lines if math.isfinite(line.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        return (self.series(key)[1] or [None])[-1]


def report(runs: list[Path], out: Path) -> Path:
    """Write the page on `runs` to `out`, which is returned; each run's folder is named once.

    Of a folder's files only `recipe.yaml`, or a teacher's `settings.json`, must be there. The page says so, or leaves a
    section out, where `log.jsonl`, `eval.json`, `teacher-student.png` or `previews/step-*.png` are missing. It loads no
    model: the pictures of teacher and student from the same noise are made at the end of a run.

    Raises `UserError` for no folders, for a folder that is no run, and for a file in it that cannot be read.
    """
    if not runs:
        raise UserError("no runs to report on; name at least one folder that `distmatch train` wrote")
    check_writable(out)
    names = [folder.resolve().name for folder in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    loaded = [_load(*row) for row in zip(runs, names, cycle(COLOURS), strict=False)]
    sections = [_figures(loaded), _pairs(loaded), _samples(loaded), _curves(loaded), _recipes(loaded)]
    if len(loaded) > 1:
        sections = [_ablation(loaded), *sections, _differences(loaded)]
    page = PAGE.substitute(title=_text(" · ".join(names)), about=_about(loaded), body="\n".join(filter(None, sections)))
    write_atomic(out, lambda p: p.write_text(page, encoding="utf-8"))
    return out


def _load(folder: Path, name: str, colour: str) -> Run:
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        recipe = folder / "settings.json"  # of `distmatch teach`; JSON is YAML
    if not recipe.is_file():
        raise UserError(
            f"{folder} is not a run: it has neither recipe.yaml nor settings.json. "
            "Name a folder that `distmatch train` or `distmatch teach` wrote"
        )
    tree = read_json(recipe, dict[str, Any]) if recipe.suffix == ".json" else renamed(read_yaml(recipe))
    return Run(name, folder, tree, log.read(folder / "log.jsonl"), _evaluated(folder / "eval.json"), colour)


def _evaluated(file: Path) -> dict[str, Any]:
    """The figures of `distmatch eval`, if there are any."""
    if not file.exists():
        return {}
    remedy = "Write it again with `distmatch eval`"
    figures = read_json(file, dict[str, Any], remedy)
    for number, row in enumerate(fitting(figures.get("rows", []), f"{file}, rows", list[dict[str, Any]], remedy)):
        numbers = {key: row[key] for key in columns([row]) if key != "name"}
        fitting(numbers, f"{file}, row {number}", dict[str, int | float | None], remedy)
    return figures


def _about(runs: list[Run]) -> str:
    """One sentence on what the page is; a single run's own description follows."""
    if len(runs) > 1:
        return f"<p class=lead>{len(runs)} distillations into one-step generators, side by side.</p>"
    (run,) = runs
    teacher, recipe, description = (run.recipe.get(key, "") for key in ("teacher", "name", "description"))
    steps, minutes = _progress(run)
    about = f"A one-step generator distilled from the teacher {teacher} by the recipe {recipe}: {steps} steps"
    if not teacher:
        about = f"A teacher trained on {run.recipe.get('images', 'images')}: {steps} steps"
    about += f" in {minutes} minutes." if minutes else "."
    return f"<p class=lead>{_text(about)}</p><p>{_text(description)}</p>"


def _progress(run: Run) -> tuple[str, str]:
    """Steps done of steps planned, and minutes of training; the latter empty where not logged."""
    done, planned = max((line["step"] for line in run.lines), default=0), run.recipe.get("steps")
    seconds = run.last("seconds")
    return str(done) if done == planned else f"{done} of {planned}", "" if seconds is None else f"{seconds / 60:.1f}"


def _figures(runs: list[Run]) -> str:
    """The evaluation rows of all runs in one table."""
    rows = [(run, row) for run in runs for row in run.figures.get("rows", [])]
    if not rows:
        note = "Not evaluated: there is no eval.json. To make one: distmatch eval RUN -o RUN/eval.json"
        return _section("Figures", f"<p class=note>{note}</p>")
    shown = columns([row for _, row in rows])
    several = len(runs) > 1
    head = ["run"] * several + [heading for heading, _ in shown.values()]
    cells = [[run.name] * several + [_figure(row, key, shown) for key in shown] for run, row in rows]
    measured = [run for run in runs if run.figures.get("hardware")]
    notes = [f"{_label(run, runs)}Measured on: {_text(_plain(run.figures['hardware']))}." for run in measured]
    notes.append("Distances: lower is better; the others, speed too: higher.")
    if any(key.startswith("frechet") for key in shown):
        notes.append(
            "Frechet distances other than FID compare only with their like, in the same features. Each space is blind "
            "to something: look at all of them."
        )
    table = _table(head, cells, "two" if several else "one")
    return _section("Figures", table + "".join(f"<p class=note>{note}</p>" for note in notes))


def _figure(row: Mapping[str, Any], key: str, shown: Mapping[str, tuple[str, str]]) -> str:
    return "–" if row.get(key) is None else shown[key][1].format(row[key])


def _pairs(runs: list[Run]) -> str:
    """Teacher against student from the same noise."""
    caption = "In each pair of rows, above the teacher, below the one-step student, both from the same noise."
    parts = [
        f"<figure class=pair>{_image(file.read_bytes(), 'teacher and student')}"
        f"<figcaption>{_label(run, runs)}{caption}</figcaption></figure>"
        for run in runs
        if (file := run.folder / "teacher-student.png").exists()
    ]
    return _section("Teacher and student", "".join(parts)) if parts else ""


def _samples(runs: list[Run]) -> str:
    """The grids of fixed noise over training time: all of them, `STRIP` of them in sight, the rest behind a slider."""
    parts = []
    for run in runs:
        files = (run.folder / "previews").glob("*")
        frames = sorted((int(m[1]), file) for file in files if (m := STEP.fullmatch(file.name)))
        if not frames:
            continue
        seen = {round(i * (len(frames) - 1) / (STRIP - 1)) for i in range(STRIP)}
        contents = [_image(f.read_bytes(), "samples") + f"<figcaption>step {step:,}</figcaption>" for step, f in frames]
        strip = "".join(f"<figure{' hidden' * (i not in seen)}>{c}</figure>" for i, c in enumerate(contents))
        last = len(frames) - 1
        slider = f'<input type=range min=0 max={last} value={last} aria-label="training step">'
        stage = f"<div class=stage><figure>{contents[-1]}</figure>{slider}</div>" if last else ""
        parts.append(f"<h3>{_label(run, runs)}</h3><div class=time><div class=strip>{strip}</div>{stage}</div>")
    note = "<p class=note>The averaged student's samples of the same noise, as training goes on.</p>"
    return _section("Samples over training", note + "".join(parts)) if parts else ""


def _curves(runs: list[Run]) -> str:
    if not any(run.lines for run in runs):
        return _section("Curves", "<p class=note>Nothing is logged yet.</p>")
    logged = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    charts = ""
    for figure, (title, caption) in CURVES.items():
        for key in logged:
            base, _, space = key.partition("/")
            if key == figure:
                charts += _chart(runs, key, title, caption)
            elif base == figure:  # a distance, in one of several spaces
                charts += _chart(runs, key, f"{title} ({_text(space)})", caption)
    for key in logged:
        if key not in CURVES and key.endswith(("/student", "/fake")):  # of a term of the user's
            charts += _chart(runs, key, _text(key), "The loss of a term of your own.")
    legend = "".join(_label(run, runs) for run in runs)
    note = "Faint: as logged; solid: smoothed, where there are points enough. "
    note += "Axes are logarithmic where values span more than a factor of five."
    note += "".join(f" Nothing is logged yet by {_text(run.name)}." for run in runs if not run.lines)
    return _section("Curves", f"<p>{legend}</p><p class=note>{note}</p><div class=charts>{charts}</div>")


def _chart(runs: list[Run], key: str, title: str, caption: str) -> str:
    """One small plot of entry `key` over the steps; empty where no run logged it. No foreign text is drawn."""
    series = [(run, *run.series(key)) for run in runs]
    everything = [value for _, _, values in series for value in values]
    if not everything:
        return ""
    figure = Figure(figsize=(4.2, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for run, steps, values in series:
        if values:
            axes.plot(steps, values, color=run.colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth(values), color=run.colour, linewidth=1.5, marker="." * (len(values) < 30))
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
    picture = _image(buffer.getvalue(), title)
    return f"<figure class=chart><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>"


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a fifteenth of the series, narrower at its ends; short series stay as they are."""
    window = np.ones(len(values) // 15 | 1)
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()


def _recipes(runs: list[Run]) -> str:
    parts = (
        f"<details><summary>{_label(run, runs) or _text(run.recipe.get('name', run.name))}</summary>"
        f"<pre>{_text(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True))}</pre></details>"
        for run in runs
    )
    return _section("Recipe" if len(runs) == 1 else "Recipes", "".join(parts))


def differing(runs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys in which recipes differ, with the value of each; a dash where a recipe lacks the key."""
    flats = [flat(recipe) for recipe in runs]
    keys = dict.fromkeys(key for entries in flats for key in entries)
    rows = {key: [_plain(entries[key]) if key in entries else "–" for entries in flats] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _differences(runs: list[Run]) -> str:
    rows = [[key, *values] for key, values in differing([run.recipe for run in runs]).items()]
    table = _table(["entry", *(run.name for run in runs)], rows, "all")
    return _section("Where the recipes differ", table if rows else "<p>Nowhere: the recipes are the same.</p>")


def _ablation(runs: list[Run]) -> str:
    """Per run: what is changed from the first one, and where it ended."""
    changes = {k: v for k, v in differing([run.recipe for run in runs]).items() if k not in ("name", "description")}
    # eval.json may hold the teacher as well: the student is the row with one network evaluation.
    students = [next((row for row in run.figures.get("rows", []) if row.get("nfe") == 1), {}) for run in runs]
    trained = [{key: run.last(key) for key in dict.fromkeys(k for line in run.lines for k in line)} for run in runs]
    logged, measured = _quality(trained), _quality(students)
    head = ["run", "changed", "steps", "minutes", *(f"{heading}, in training" for heading, _ in logged.values())]
    head += [heading for heading, _ in measured.values()]
    rows = []
    for i, run in enumerate(runs):
        changed = [f"{key}={values[i]}" for key, values in changes.items() if values[i] != values[0]]
        figures = [_figure(trained[i], key, logged) for key in logged]
        figures += [_figure(students[i], key, measured) for key in measured]
        steps, minutes = _progress(run)
        rows.append([run.name, "; ".join(changed) or ("nothing" if i else "–"), steps, minutes or "–", *figures])
    used = [j for j in range(len(head)) if any(row[j] != "–" for row in rows)]
    note = (
        f"Changes are against {_text(runs[0].name)}. “In training” is the log's last evaluation; the figures after it "
        "are the student's of eval.json. One run per setting has no error bars: small differences mean little."
    )
    table = _table([head[j] for j in used], [[row[j] for j in used] for row in rows], "two")
    return _section("Ablation", f"{table}<p class=note>{note}</p>")


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """The columns of `rows` that say how good a model is, not how it was measured or how fast it is."""
    kinds = ("fid", "frechet", "precision", "recall", "accuracy")
    return {key: column for key, column in columns(rows).items() if key.partition("/")[0] in kinds}


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _label(run: Run, runs: list[Run]) -> str:
    """A run's name beside its colour, where there are several."""
    return f'<span class=run><i style="background:{run.colour}"></i>{_text(run.name)}</span>' if len(runs) > 1 else ""


def _table(head: list[str], rows: list[list[str]], kind: str) -> str:
    """`kind` is the CSS class: how many columns, from the left, hold text; the rest are figures."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class=wide><table class={kind}>{line(head, 'th')}{''.join(line(r, 'td') for r in rows)}</table></div>"


def _image(content: bytes, alternative: str) -> str:
    return f'<img alt="{_text(alternative)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _plain(value: Any) -> str:
    """A value of a recipe or an evaluation on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))


PAGE = Template("""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>distmatch: $title</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --ink: #1d2127; --quiet: #5d6672; --line: #e1e5ea; --soft: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #e4e7eb; --quiet: #9aa4b0; --line: #2e343c; --soft: #1c2026; }
  .chart img, .run i { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; } body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.01em; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; } h3 { font-size: .95rem; margin: .2rem 0 .5rem; }
h3:empty { display: none; } section { margin-top: 2.2rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; } .lead { font-size: 1.08rem; }
figure { margin: 0; } figcaption { margin-top: .35rem; } .pair + .pair { margin-top: 1.6rem; }
figcaption, .note { font-size: .85rem; line-height: 1.45; color: var(--quiet); }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--quiet); font-weight: 500; vertical-align: bottom; } td { white-space: nowrap; }
tr > :first-child, .two tr > :nth-child(2), .all td, .all th { text-align: left; }
tr > :first-child { padding-left: 0; }
.two td:nth-child(2), .all td { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; }
.time { display: flex; flex-wrap: wrap; gap: 1.4rem; margin: .8rem 0 1.8rem; }
.strip { flex: 1 1 34rem; display: grid; gap: .8rem; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(min(8.5rem, 45%), 1fr)); }
.strip img { cursor: pointer; image-rendering: auto; }
.stage { flex: 0 1 24rem; } .stage img, .stage input { width: 100%; } .stage input { accent-color: #0072b2; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.chart { background: var(--soft); border-radius: 8px; padding: .7rem .9rem .9rem; }
.chart img { image-rendering: auto; width: 100%; }
.run { margin-right: 1.1rem; white-space: nowrap; } summary { cursor: pointer; margin: .4rem 0; }
.run i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
pre { background: var(--soft); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }
</style>
<header><h1>$title</h1>$about</header>
$body
<script>
for (const time of document.querySelectorAll(".time:has(input)")) {
  const frames = time.querySelectorAll(".strip figure"), slider = time.querySelector("input");
  const show = () => { time.querySelector(".stage figure").innerHTML = frames[slider.value].innerHTML; };
  slider.oninput = show;
  frames.forEach((frame, i) => { frame.onclick = () => { slider.value = i; show(); }; });
}
</script></html>
""")
