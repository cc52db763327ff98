"""Safe terminal output: nothing that comes from a file or a command line can control the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text


def escaped(text: object, kept: str = "\n\t") -> str:
    """Escape all characters in `text` that move the cursor, set colours or reverse text, except those in `kept`."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in str(text))


def printable(name: object, most: int = 120) -> str:
    """Return a name from anywhere as one line, cut to `most` characters."""
    text = escaped(str(name)[: most + 1], kept="")
    return text if len(text) <= most else text[:most] + "..."


BYTES = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
FLOPS = {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12}
SECONDS = {"µs": 1e-6, "ms": 1e-3, "s": 1, "minutes": 60, "hours": 3600}
LONG = {"days": 86400, "years": 365.25 * 86400}


def unit(amount: float, units: Mapping[str, float]) -> tuple[str, float]:
    """Return name and value of the largest of the rising `units` that is not more than `amount`, or of the first."""
    fitting = [name for name, value in units.items() if value <= amount]
    name = fitting[-1] if fitting else next(iter(units))
    return name, units[name]


def counted(n: int, one: str) -> str:
    """Return `n` of what is called `one` if it is one: "1 image", "2,000 images"."""
    return f"{n:,} {named(n, one)}"


def named(n: float, one: str) -> str:
    """Return the name of `n` of what is called `one` if it is one."""
    return one if n == 1 or one.isupper() else f"{one}s"  # MB


def size(nbytes: float) -> str:
    """Return a number of bytes for people, e.g. "1.2 GB"."""
    name, value = unit(nbytes, BYTES)
    return f"{nbytes:,.0f} bytes" if name == "bytes" else f"{nbytes / value:,.1f} {name}"


def duration(shortest: float, longest: float | None = None, of: str = "") -> str:
    """Return seconds, or a range of them, for people, with three digits: "42.0 ms", "19.0 to 19.3 hours".

    Days and years begin with two of them: "36.0 hours" says more than "1.50 days".

    Args:
        of: what is counted by the hour, and paid, e.g. "GPU-" for "1,368 GPU-hours", which never become days.
    """
    longer = {} if of else {name: value for name, value in LONG.items() if shortest >= 2 * value}
    name, value = unit(shortest, SECONDS | longer)
    shown = [_digits(seconds / value) for seconds in (shortest, longest) if seconds is not None]
    return f"{' to '.join(dict.fromkeys(shown))} {of}{name}"


def _digits(amount: float) -> str:
    """Return a number with three digits, or all of its whole ones."""
    decimals = next((n for n, most in ((2, 9.995), (1, 99.95)) if amount < most), 0)
    return f"{amount:,.{decimals}f}"


class Screen(Console):
    """Rich's console for untrusted text: markup and control characters have no effect."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)

    def status(self, status: Any, **options: Any) -> Status:
        return super().status(Text(escaped(status)), **options)

    def on_broken_pipe(self) -> None:
        raise  # otherwise rich would end the program with status 1


console = Screen(soft_wrap=True)
