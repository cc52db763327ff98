"""Sums the gradients of a batch's parts: part after part, each in a worker of its own, or by replaying a CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distmatch.system.workers import ALONE, Workers
from distmatch.training.clock import Clock
from distmatch.training.engine import summed
from distmatch.training.optim import Optimizer
from distmatch.training.replay import Pool, Replay

Part = TypeVar("Part")
Made = TypeVar("Made")
Loss = Callable[[Part], tuple[Tensor, Mapping[str, Tensor], Made]]
"""What returns for a part the loss f[] to differentiate, the losses to log by name, and what it made."""


class Adder:
    """Adds gradients to weights, and counts the time.

    Args:
        workers: more than one only in a single process.
        recorded: the optimizers of all weights that a loss reaches, if each computation is to be recorded at its first
            call and then replayed, see `Replay`. Only for batches of one part, in a single process.
    """

    def __init__(self, clock: Clock, workers: Workers = ALONE, recorded: Sequence[Optimizer] = ()):
        self.clock, self.workers = clock, workers
        self.reached = [parameter for own in recorded for parameter in own.parameters]
        self._replays: dict[str, Replay] = {}
        self._pool = Pool()

    def add(
        self,
        name: str,
        parts: Sequence[Part],
        loss: Loss[Part, Made],
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
    ) -> tuple[list[Made], dict[str, Tensor]]:
        """Add the gradients of all parts' losses to `parameters`, in the order of the parts.

        Args:
            name: of this computation, by which it is found again if it was recorded.
            network: what the loss calls, possibly distributed over processes; gradients are summed over these once.

        Returns what was made for each part, and the sums of the losses over the parts.
        """
        if self.reached:
            (part,) = parts
            losses, made = self._replay(name, loss, part)
            return [made], losses
        if self.workers.count == 1:
            return self._one_by_one(parts, loss, network)
        return self._together(parts, loss, parameters)

    def make(self, name: str, make: Callable[[Part], Made], part: Part) -> Made:
        """Return `make(part)`, which needs no gradients; replayed like the others."""
        if not self.reached:
            return make(part)
        return self._replay(name, lambda part: (None, {}, make(part)), part)[1]

    def forget(self) -> None:
        """Forget what was recorded, since the losses are others from now on."""
        self._replays.clear()
        self._pool = Pool()  # a pool ends with its last graph

    def _replay(self, name: str, work: Any, part: Any) -> tuple[dict[str, Tensor], Any]:
        if name not in self._replays:
            self._replays[name] = Replay(work, self.reached, self._pool)
        with self.clock.counted():
            return self._replays[name](part)

    def _one_by_one(
        self, parts: Sequence[Part], loss: Loss[Part, Made], network: nn.Module
    ) -> tuple[list[Made], dict[str, Tensor]]:
        made: list[Made] = []
        logged: list[Mapping[str, Tensor]] = []
        for number, part in enumerate(parts, 1):
            with summed(network, last=number == len(parts)):
                total, losses, result = loss(part)
                with self.clock.counted():
                    total.backward()
            made.append(result)
            logged.append(losses)
        return made, _sums(logged)

    def _together(
        self, parts: Sequence[Part], loss: Loss[Part, Made], parameters: Sequence[nn.Parameter]
    ) -> tuple[list[Made], dict[str, Tensor]]:
        made: list[Made] = []
        logged: list[Mapping[str, Tensor]] = []

        def work(part: Part) -> tuple[tuple[Tensor | None, ...], Mapping[str, Tensor], Made]:
            total, losses, result = loss(part)
            with self.clock.counted():
                return torch.autograd.grad(total, parameters, allow_unused=True), losses, result

        for gradients, losses, result in self.workers.map(work, parts):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:  # a copy in the parameter's layout, as `backward`'s: parameters may share it
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                else:
                    parameter.grad.add_(gradient)
            made.append(result)
            logged.append(losses)
        return made, _sums(logged)


def _sums(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name].detach() for part in parts]).sum(0) for name in parts[0]}
