"""Types of the commands' numbers: each says its range, and a number beyond it is refused before the command starts."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from distmatch.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, but for the ends that are `open`: "(", ")", "()" or none. NaN is in no range."""

    low: float
    high: float = math.inf
    open: str = ""

    def __call__(self, _: Any, value: Any) -> None:
        numbers = value if isinstance(value, tuple | list) else (value,)
        for number in (number for number in numbers if number is not None):
            above = number > self.low if "(" in self.open else number >= self.low
            below = number < self.high if ")" in self.open else number <= self.high
            if not (above and below and math.isfinite(number)):
                raise UserError(f"Expected {self}.")

    def __str__(self) -> str:
        left = f"{self.low:g} {'<' if '(' in self.open else '<='} number"
        return left if self.high == math.inf else f"{left} {'<' if ')' in self.open else '<='} {self.high:g}"


Count = Annotated[int, Parameter(validator=Range(1))]
Whole = Annotated[int, Parameter(validator=Range(0))]
Rate = Annotated[float, Parameter(validator=Range(0, open="("))]
Share = Annotated[float, Parameter(validator=Range(0, 1, open=")"))]
Scale = Annotated[float, Parameter(validator=Range(0))]
