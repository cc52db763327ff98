"""Sums the gradients of a batch's parts: part after part, or each in a worker of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from distmatch.system.workers import ALONE, Workers
from distmatch.training.clock import Clock
from distmatch.training.engine import summed

Part = TypeVar("Part")
Made = TypeVar("Made")


def add_gradients(
    parts: Sequence[Part],
    loss: Callable[[Part], tuple[Tensor, Mapping[str, Tensor], Made]],
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    clock: Clock,
    workers: Workers = ALONE,
) -> tuple[list[Made], dict[str, Tensor]]:
    """Add the gradients of all parts' losses to `parameters`, in the order of the parts.

    Args:
        loss: returns for a part the loss f[] to differentiate, the losses to log by name, and what it made.
        network: what the loss calls, possibly distributed over processes; its gradients are summed over these once.
        workers: more than one only without such processes.

    Returns what was made for each part, and the sums of the losses over the parts.
    """
    made: list[Made] = []
    logged: list[Mapping[str, Tensor]] = []
    if workers.count == 1:
        for number, part in enumerate(parts, 1):
            with summed(network, last=number == len(parts)):
                total, losses, result = loss(part)
                with clock.counted():
                    total.backward()
            made.append(result)
            logged.append(losses)
        return made, _sums(logged)

    def work(part: Part) -> tuple[tuple[Tensor | None, ...], Mapping[str, Tensor], Made]:
        total, losses, result = loss(part)
        with clock.counted():
            return torch.autograd.grad(total, parameters, allow_unused=True), losses, result

    for gradients, losses, result in workers.map(work, parts):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:  # a copy in the parameter's layout, as `backward` makes: parameters may share it
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad.add_(gradient)
        made.append(result)
        logged.append(losses)
    return made, _sums(logged)


def _sums(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name].detach() for part in parts]).sum(0) for name in parts[0]}
