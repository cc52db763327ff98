"""Marks what must be computed with data even in a plan, where tensors have shapes and nothing else."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

_needed: ContextVar[bool] = ContextVar("data needed", default=False)


def with_data(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return `function`, whose tensors have data wherever it is called. It must not be given tensors without."""

    @wraps(function)
    def run(*arguments: Given.args, **named: Given.kwargs) -> Result:
        before = _needed.set(True)
        try:
            return function(*arguments, **named)
        finally:
            _needed.reset(before)

    return run


def data_needed() -> bool:
    """Return whether a function marked `with_data` is running in this thread."""
    return _needed.get()
