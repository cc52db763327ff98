"""Types of command options: numbers with ranges, checked before a command starts, and paths with `~`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import CoercionError, Parameter, Token, convert

from distmatch.system.errors import UserError
from distmatch.system.paths import expand


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, excluding the ends that are `open`: "(", ")", "()" or none. NaN is out of range."""

    low: float
    high: float = math.inf
    open: str = ""

    def __call__(self, _: Any, value: Any) -> None:
        numbers = value if isinstance(value, tuple | list) else (value,)
        for number in (number for number in numbers if number not in (None, "auto")):
            above = number > self.low if "(" in self.open else number >= self.low
            below = number < self.high if ")" in self.open else number <= self.high
            if not (above and below and math.isfinite(number)):
                raise UserError(f"It must be {self}.")

    def __str__(self) -> str:
        least = f"{'above' if '(' in self.open else 'at least'} {self.low:g}"
        return (
            least
            if self.high == math.inf
            else f"{least} and {'below' if ')' in self.open else 'at most'} {self.high:g}"
        )


def whole(kind: Any, tokens: Sequence[Token]) -> Any:
    """Read whole numbers, and refuse fractions, which cyclopts would round. Every `int` of a command passes here."""
    for token in tokens:
        if _is_fraction(token.value):
            raise CoercionError(msg=f"Expected a whole number, not {token.value}.", token=token)
    return convert(kind, tokens)


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no number, or a hexadecimal one
        return False


WHOLE = Parameter(converter=whole)
Integer = Annotated[int, WHOLE]
Count = Annotated[int, WHOLE, Parameter(validator=Range(1))]
Whole = Annotated[int, WHOLE, Parameter(validator=Range(0))]
Rate = Annotated[float, Parameter(validator=Range(0, open="("))]
Share = Annotated[float, Parameter(validator=Range(0, 1, open=")"))]
Scale = Annotated[float, Parameter(validator=Range(0))]
WorkerCount = Annotated[int | Literal["auto"], WHOLE, Parameter(validator=Range(1))]
"""Threads that share the work on a CPU; `auto`: see `shared.find_workers`."""

Images = Annotated[int, WHOLE, Parameter(name=["-n", "--n"], validator=Range(1))]
"""A number of images, `-n`."""


def place(kind: Any, tokens: Sequence[Token]) -> Any:
    """Replace `~` by the home folder; refuse nothing at all. Every path given to a command passes through here."""
    (token,) = tokens
    if not token.value.strip():  # as of a variable of the shell that is not set; Path would make it the folder here
        raise UserError(f"Expected a name or a path, not {token.value!r}, which is empty; . is the folder here.")
    return Path(expand(token.value)) if Path in (kind, *get_args(kind)) else expand(token.value)


PLACE = Parameter(converter=place)
Name = Annotated[str, PLACE]
"""A model, by name, path or URL, or data by path or URL."""

File = Annotated[Path, PLACE]
Out = Annotated[Path | None, Parameter(name=["--out", "-o"], converter=place)]
Runs = Annotated[File, Parameter(name="--runs")]
