"""Sums the gradients of a batch's parts: part after part, or each in a worker of its own."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from distmatch.system.workers import ALONE, Workers
from distmatch.training.clock import Clock
from distmatch.training.engine import summed

Part = TypeVar("Part")
Result = TypeVar("Result")


def add_gradients(
    parts: Sequence[Part],
    loss: Callable[[Part], tuple[Tensor, Result]],
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    clock: Clock,
    workers: Workers = ALONE,
) -> list[Result]:
    """Add the gradients of all parts' losses to `parameters`, in the order of the parts; return the parts' results.

    Args:
        loss: returns a part's loss f[] and a result, e.g. its images.
        network: what the loss calls, possibly distributed over processes; its gradients are summed over these once.
        workers: more than one only without such processes.
    """
    if workers.count == 1:
        results = []
        for number, part in enumerate(parts, 1):
            with summed(network, last=number == len(parts)):
                total, result = loss(part)
                with clock.counted():
                    total.backward()
            results.append(result)
        return results

    def work(part: Part) -> tuple[tuple[Tensor | None, ...], Result]:
        total, result = loss(part)
        with clock.counted():
            return torch.autograd.grad(total, parameters, allow_unused=True), result

    results = []
    for gradients, result in workers.map(work, parts):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:  # a copy in the parameter's layout, as `backward` makes: parameters may share it
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad.add_(gradient)
        results.append(result)
    return results
