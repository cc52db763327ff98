"""One or several runs as one HTML page that opens from disk: figures, pictures, curves, recipes side by side."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from distmatch import log
from distmatch.checkpoint import write_atomic
from distmatch.config import flat
from distmatch.evaluation import COLUMNS

STRIP = 8
"""So many sample grids stand side by side; all of them are behind the slider."""

CURVES: Sequence[tuple[str, tuple[str, ...], bool, str]] = (
    (
        "Matching loss",
        ("match",),
        True,
        "Half the mean square of the normalised gradient: a surrogate that need not fall.",
    ),
    ("Regression loss", ("regress",), True, "Distance to the teacher's image of the same noise; falls, then flattens."),
    (
        "Fake-score loss",
        ("fake",),
        True,
        "Should stay level. A steady rise means that the critic lags: more critic.steps.",
    ),
    (
        "Gradient norms",
        ("gradient_norm", "fake_gradient_norm"),
        True,
        "Before clipping. Spikes that grow precede divergence.",
    ),
    ("Frechet distance", ("frechet",), False, "Of the EMA student on few images: for the trend, not to be quoted."),
    (
        "Class accuracy",
        ("accuracy",),
        False,
        "Share of images that the classifier takes for the class that was asked for.",
    ),
    ("Images per second", ("images_per_second",), False, "All streams together."),
    (
        "Time outside network passes",
        ("outside",),
        False,
        "Share of the step. The rest is arithmetic that has to be done.",
    ),
)
"""Title, entries of the log, logarithmic axis, what to look for."""


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    figures: dict[str, Any]


def report(runs: list[Path], out: Path) -> Path:
    """Write the page on `runs` to `out`, which is returned. Raises `ValueError` for a folder that is no run."""
    loaded = [_load(folder) for folder in runs]
    sections = [_figures(loaded), *map(_pictures, loaded), _curves(loaded), _recipes(loaded)]
    title = f"distmatch: {', '.join(run.name for run in loaded)}"
    about = loaded[0].recipe.get("description", "") if len(loaded) == 1 else f"{len(loaded)} runs side by side."
    page = PAGE.format(title=_text(title), about=_text(about), body="\n".join(filter(None, sections)))
    write_atomic(out, lambda p: p.write_text(page))
    return out


def _load(folder: Path) -> Run:
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        raise ValueError(f"{folder} is not a run: it has no recipe.yaml. Name a folder that `distmatch train` wrote")
    figures = folder / "eval.json"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        recipe=yaml.safe_load(recipe.read_text()),
        lines=log.read(folder / "log.jsonl"),
        figures=json.loads(figures.read_text()) if figures.exists() else {},
    )


def _figures(runs: list[Run]) -> str:
    """The evaluation rows of all runs in one table."""
    rows = [(run.name, row) for run in runs for row in run.figures.get("rows", [])]
    if not rows:
        return "<p class=note>Not evaluated: the folder has no eval.json (distmatch eval RUN -o RUN/eval.json).</p>"
    shown = [key for key in COLUMNS if any(key in row for _, row in rows)]
    several = len(runs) > 1
    head = ["run"] * several + [COLUMNS[key][0] for key in shown]
    cells = [
        [name] * several + [COLUMNS[k][1].format(row[k]) if k in row else "-" for k in shown] for name, row in rows
    ]
    hardware = {f"{run.figures['hardware']}" for run in runs if "hardware" in run.figures}
    note = "".join(f"<p class=note>Measured on {_text(h)}</p>" for h in sorted(hardware))
    return f"<h2>Figures</h2>{_table(head, cells)}{note}"


def _pictures(run: Run) -> str:
    """Teacher against student, and the fixed grid over training time."""
    parts = [f"<h2>{_text(run.name)}</h2>"]
    pair = run.folder / "teacher-student.png"
    if pair.exists():
        caption = "Teacher (odd rows) and one-step student (even rows) from the same noise"
        parts.append(f"<figure>{_image(pair.read_bytes())}<figcaption>{caption}</figcaption></figure>")
    grids = sorted((run.folder / "previews").glob("step-*.png"))
    if grids:
        frames = [(int(file.stem.removeprefix("step-")), file.read_bytes()) for file in grids]
        spread = sorted({round(i * (len(frames) - 1) / (STRIP - 1)) for i in range(STRIP)})
        strip = "".join(
            f"<figure>{_image(frames[i][1])}<figcaption>step {frames[i][0]:,}</figcaption></figure>" for i in spread
        )
        slides = "".join(
            f"<figure{'' if i + 1 == len(frames) else ' hidden'}>{_image(content)}"
            f"<figcaption>step {step:,}</figcaption></figure>"
            for i, (step, content) in enumerate(frames)
        )
        last = len(frames) - 1
        parts.append(f"<h3>The same noise over training time</h3><div class=strip>{strip}</div>")
        parts.append(
            f"<div class=slider><input type=range min=0 max={last} value={last} aria-label=step>{slides}</div>"
        )
    return "".join(parts) if len(parts) > 1 else ""


def _curves(runs: list[Run]) -> str:
    if not any(run.lines for run in runs):
        return "<h2>Curves</h2><p class=note>Nothing is logged yet.</p>"
    charts = [_chart(runs, *curve) for curve in CURVES]
    return f"<h2>Curves</h2><div class=charts>{''.join(charts)}</div>"


def _chart(runs: list[Run], title: str, keys: tuple[str, ...], logarithmic: bool, caption: str) -> str:
    """One small plot of log entries `keys` of all runs; empty where none has them."""
    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        for key in keys:
            points = [(line["step"], line[key]) for line in run.lines if key in line]
            if points:
                label = " ".join([run.name] * (len(runs) > 1) + [key] * (len(keys) > 1))
                axes.plot(
                    *zip(*points, strict=True), label=label, linewidth=1.3, marker="." if len(points) < 30 else ""
                )
    if not axes.lines:
        return ""
    if logarithmic and all(value > 0 for line in axes.lines for value in line.get_ydata()):  # type: ignore[union-attr]
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1 or len(keys) > 1:
        axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    caption = f"<figcaption>{_text(caption)}</figcaption>"
    return f"<figure class=chart><h3>{title}</h3>{_image(buffer.getvalue())}{caption}</figure>"


def _recipes(runs: list[Run]) -> str:
    """What the runs differ in, and each recipe in full."""
    parts = ["<h2>Recipes</h2>"]
    flats = [flat(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flats for k in f) if len({str(f.get(key)) for f in flats}) > 1]
    if len(runs) > 1:
        rows = [[key, *(str(f.get(key, "-")) for f in flats)] for key in keys]
        parts.append(
            _table(["entry", *(run.name for run in runs)], rows) if rows else "<p>The recipes are the same.</p>"
        )
    for run in runs:
        content = _text(yaml.safe_dump(run.recipe, sort_keys=False))
        parts.append(f"<details><summary>{_text(run.name)}</summary><pre>{content}</pre></details>")
    return "".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class=wide><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def _image(content: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _text(value: Any) -> str:
    return html.escape(str(value))


PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.4rem; }}
h3 {{ font-size: 1rem; margin: .6rem 0; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 0; }} figcaption, .note {{ font-size: .85rem; opacity: .75; }}
img {{ max-width: 100%; image-rendering: pixelated; border-radius: 4px; }}
.chart {{ background: var(--soft); border-radius: 8px; padding: .4rem .9rem .8rem; }}
.chart img {{ image-rendering: auto; }}
.charts {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }}
.strip {{ display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }}
.slider {{ margin-top: 1rem; max-width: 34rem; }} .slider input {{ width: 100%; }} .slider img {{ width: 100%; }}
pre {{ background: var(--soft); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }}
summary {{ cursor: pointer; margin: .6rem 0; }}
</style>
<h1>{title}</h1><p>{about}</p>
{body}
<script>
for (const slider of document.querySelectorAll(".slider")) {{
  const frames = slider.querySelectorAll("figure");
  slider.querySelector("input").oninput = (e) => frames.forEach((f, i) => f.hidden = i != e.target.value);
}}
</script>
</html>
"""
