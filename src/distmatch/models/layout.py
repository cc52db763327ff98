"""Builds networks described by files, checking them against their weights before memory is allocated.

The settings in a file may say anything: widths that fit in no memory, or a billion blocks.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module

from distmatch.system.digests import Damaged
from distmatch.system.errors import UserError

Net = TypeVar("Net", bound=nn.Module)

MISFITS = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError)
"""Errors that constructors raise for malformed settings."""


def build(
    where: str, make: Callable[..., Net], settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Net:
    """Return `make(**settings)` if the network's weights have these `shapes`, else raise `UserError` starting with
    `where`.

    Anything too large is refused before it uses memory: a setting larger than the number of values in the weights, a
    list of numbers longer than the number of weights, or a weight whose shape is not among theirs. The last is refused
    when a module registers it, before anything is written to it.
    """
    left = Counter([tuple(shape) for shape in shapes.values()] * 2)  # twice: a constructor may replace a weight it made
    numbers = sum(map(math.prod, shapes.values()))

    def check(weight: Tensor) -> None:
        left[tuple(weight.shape)] -= 1
        if left[tuple(weight.shape)] < 0:
            raise UserError(f"it has more weights of shape {tuple(weight.shape)} than there are")

    try:
        for name, value in settings.items():
            _plausible(name, value, numbers, len(shapes))
        with registering(check):
            return make(**settings)
    except MISFITS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} cannot be built: {reason:.300}") from error


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return the shapes in a safetensors file's header. Raises `OSError` and `digests.Damaged`."""
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(f"{file} is damaged: {error}") from error


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Refuse, with `UserError`, networks of more than `tensors` weights that are built inside the with block."""
    left = tensors

    def count(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"it has more than {tensors:,} weights")

    with registering(count):
        yield


@contextmanager
def registering(check: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `check` with every weight that a module gets inside the with block, before it is initialised."""

    def hook(_module: nn.Module, _name: str, weight: Tensor | None) -> None:
        if weight is not None:
            check(weight)

    registered = module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        registered.remove()


def _plausible(name: str, value: Any, numbers: int, weights: int) -> None:
    if isinstance(value, int) and abs(value) > numbers:
        raise UserError(f"{name:.80} is {value}, and all its weights are {numbers:,} numbers")
    if isinstance(value, list | tuple) and not all(isinstance(entry, str) for entry in value):
        if len(value) > weights:
            raise UserError(f"{name:.80} has {len(value):,} entries, and there are {weights:,} weights")
        for entry in value:
            _plausible(name, entry, numbers, weights)
