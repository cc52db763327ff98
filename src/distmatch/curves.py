"""Curves as inline SVG: sharp at any size, in the colours of the page that they stand in."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 388, 10, 190  # of the plot itself; beyond are the numbers
FEW = 30  # so many points or more are smoothed; fewer are marked one by one


@dataclass(frozen=True)
class Curve:
    """`values` at `steps`, both of at least one finite number, drawn in the `color` of the CSS class `style`."""

    style: str
    steps: Sequence[float]
    values: Sequence[float]


def chart(title: str, curves: Sequence[Curve], logarithmic: bool = False) -> str:
    """The curves on common axes: faint as they are and solid smoothed, or with a mark at each of a few points.

    Args:
        title: for those who cannot see it; not drawn.
        logarithmic: where the values are positive and span more than a factor of five. Smoothing is then of the
            logarithm, so that one spike does not hide the trend.
    """
    low, high = min(min(c.values) for c in curves), max(max(c.values) for c in curves)
    logarithmic = logarithmic and low > 0 and high > 5 * low
    scale = np.log10 if logarithmic else np.asarray
    if logarithmic:
        ticks = LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)).tick_values(low, high)
    else:
        ticks = MaxNLocator(4).tick_values(low, high)
    first, last = min(min(c.steps) for c in curves), max(max(c.steps) for c in curves)
    x = _axis(first, last, LEFT, RIGHT)
    y = _axis(float(scale(low)), float(scale(high)), BOTTOM - 6, TOP + 6)

    parts = []
    for tick in ticks:
        if low <= tick <= high or np.isclose(tick, (low, high)).any():
            at = y(float(scale(tick)))
            parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
            parts.append(f'<text class="y" x="{LEFT - 6}" y="{at + 3.5:.1f}">{tick:g}</text>')
    for tick in dict.fromkeys(np.asarray(MaxNLocator(4, integer=True).tick_values(first, last)).tolist()):
        if first <= tick <= last:
            parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 12}">{tick:,.0f}</text>')
    for curve in curves:
        across, up = x(np.asarray(curve.steps, float)), y(scale(np.asarray(curve.values, float)))
        drawn = _line("as-logged", across, up) + _line("trend", across, smooth(up))
        if len(up) < FEW:
            drawn = _line("trend", across, up)
            drawn += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in zip(across, up, strict=True))
        parts.append(f'<g class="{curve.style}">{drawn}</g>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {box} role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fifteenth of the series, narrower at its ends; short series stay as they are."""
    window = np.ones(len(values) // 15 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thin(values: np.ndarray, stretches: int = 200) -> list[int]:
    """Which of `values` to draw: the lowest and the highest of each of so many stretches, so that no spike is lost."""
    if len(values) <= 2 * stretches:
        return list(range(len(values)))
    parts = np.array_split(np.arange(len(values)), stretches)
    return sorted({int(part[k]) for part in parts for k in (values[part].argmin(), values[part].argmax())})


def _axis(low: float, high: float, start: float, stop: float):
    """The map of `low .. high` to `start .. stop`; of a single number to the middle."""
    if low == high:
        return lambda v: 0 * v + (start + stop) / 2
    return lambda v: start + (v - low) * ((stop - start) / (high - low))


def _line(style: str, across: np.ndarray, up: np.ndarray) -> str:
    points = " ".join(f"{across[i]:.1f},{up[i]:.1f}" for i in thin(up))
    return f'<polyline class="{style}" points="{points}"/>'
