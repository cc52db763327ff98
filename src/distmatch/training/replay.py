"""Computes the gradients of a step; on a GPU, by replaying a CUDA graph, since small networks wait for the host."""

import gc
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.system.errors import UserError
from distmatch.system.garbage import no_collection

Work = Callable[[Any], tuple[Tensor | None, Mapping[str, Tensor], Any]]
"""`inputs -> (the loss f[] to differentiate, or `None`; the losses f[] to log, by name; what else it made)`."""


@dataclass
class Pool:
    """The memory of one or more graphs that are replayed one after another, in any order.

    A graph keeps its memory from one replay to the next. Graphs of one pool write to the same places, except that none
    writes to what is alive when it is recorded. That is safe only if no graph's results are needed once another one is
    replayed, see "Graph memory management" in PyTorch's notes on CUDA. `Replay` sees to it: inputs are outside the
    pool, all that is returned is copied at once, and the gradients of one replay are used and cleared before the next.
    """

    handle: Any = None


class Replay:
    """`inputs -> (losses, made)`: does `work` and puts the gradients of its loss into the parameters' `grad`.

    On a GPU the first call records `work` and its backward pass as a CUDA graph, which later calls replay: on an H100
    a step of a U-Net of 7 million weights takes 70 ms at any batch up to 256 if each kernel is launched by Python.
    There is one graph for each shape of the inputs.

    What a replay computes is what was recorded: `work` must be a function of the tensors in its inputs and of weights
    alone, and may not ask the GPU for a number.

    Args:
        work: takes tensors, or tuples, mappings and dataclasses of them; other things are the first call's.
        parameters: those that are trained; their `grad` must be `None` before each call.
        pool: of other replays of the same parameters; default: one for the graphs of this one.

    Raises `UserError` if `work` cannot be recorded.
    """

    def __init__(self, work: Work, parameters: Iterable[nn.Parameter], pool: Pool | None = None):
        self.work, self.parameters, self.pool = work, list(parameters), pool or Pool()
        self._graphs: dict[tuple, _Recorded] = {}

    def __call__(self, inputs: Any) -> tuple[dict[str, Tensor], Any]:
        given = tensors(inputs)
        if not given[0].is_cuda:
            return self._compute(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._record(inputs)
        recorded = self._graphs[shapes]
        # The replay may overwrite gradients of others in its pool: none may be left.
        assert all(parameter.grad is None for parameter in self.parameters)
        for kept, tensor in zip(recorded.inputs, given, strict=True):
            kept.copy_(tensor)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient  # `Optimizer.step` has cleared it; the graph writes where it has written before
        # Copies, since the next replay overwrites what this one made.
        return mapped(recorded.losses, Tensor.clone), mapped(recorded.made, Tensor.clone)

    def _compute(self, inputs: Any) -> tuple[dict[str, Tensor], Any]:
        total, losses, made = self.work(inputs)
        if total is not None:
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}, made

    def _record(self, inputs: Any) -> "_Recorded":
        inputs = mapped(inputs, Tensor.clone)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose and allocate what they need before anything is recorded
            for _ in range(3):
                self._compute(inputs)
                self._clear()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # freeing another graph while this one is recorded would break it
        try:
            with no_collection(), torch.cuda.graph(graph, pool=self.pool.handle):
                losses, made = self._compute(inputs)  # no gradients yet: each backward pass begins from none
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch has none of its own for this
            first = _first(error)
            raise UserError(
                "a step cannot be recorded as a CUDA graph: a network or a loss asks the GPU for a number, as Z-Image "
                f"does for the lengths of its texts, or the GPU failed ({_said(first)}); use cuda_graphs=false"
            ) from first
        self.pool.handle = graph.pool()
        gradients = [parameter.grad for parameter in self.parameters]
        self._clear()
        return _Recorded(graph, tensors(inputs), losses, made, gradients)

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _first(error: BaseException) -> BaseException:
    """Return the error with which it began: the end of a recording that failed raises another one, about its end."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _said(error: BaseException) -> str:
    """Return the first line of `error`, and the last line of code outside PyTorch that it comes from."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(Path(torch.__file__).parent)
    ]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}, at {own[-1].filename}:{own[-1].lineno}" if own else lines[0]


@dataclass(frozen=True)
class _Recorded:
    """A graph, and the tensors that it reads and writes at each replay."""

    graph: Any
    inputs: list[Tensor]
    losses: dict[str, Tensor]
    made: Any
    gradients: list[Tensor | None]


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `tree`, of tuples, lists, mappings and dataclasses, with `change` applied to each tensor in it."""
    if isinstance(tree, Tensor):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{one.name: mapped(getattr(tree, one.name), change) for one in fields(tree)})
    if isinstance(tree, Mapping):
        return {name: mapped(one, change) for name, one in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(one, change) for one in tree)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Return all tensors in `tree`, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(tree, keep)
    return found
