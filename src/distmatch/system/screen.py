"""Safe terminal output: nothing that comes from a file or a command line can control the terminal."""

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


def size(nbytes: float) -> str:
    """Return a number of bytes for people, e.g. "1.2 GB"."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


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
