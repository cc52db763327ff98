"""Computes with tensors that have a shape but no data, and keeps account of their memory and arithmetic.

PyTorch's fake tensors would do, but a step of Stable Diffusion takes them half a minute: they work out each operation's
result anew. Here they are asked once per operation and shapes, and their answer is used wherever these come again.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

LOSSES = "decoder and LPIPS"
"""Name for everything computed outside the three networks."""

CPU = torch.device("cpu")
"""The meta device would not do: attention has no fused kernel there, and there is no autocast."""


class Memory:
    """A block of memory, shared by a tensor and its views; its `ledger` is told when the last of them is gone."""

    __slots__ = ("ledger", "nbytes")

    def __init__(self, nbytes: int, ledger: "Ledger"):
        self.nbytes, self.ledger = nbytes, ledger

    def __del__(self) -> None:
        self.ledger.alive -= self.nbytes


class Hollow(Tensor):
    """A tensor on the CPU without data. Operations need a `Ledger`."""

    memory: Memory | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor without data is used outside of its ledger")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied


@dataclass(frozen=True)
class Made:
    """A tensor that an operation gives: argument `same`; or a view of argument `base` or of earlier output `twin`; or
    a new one, of `nbytes`.
    """

    layout: tuple[Any, ...]
    same: int | None = None
    base: int | None = None
    twin: int | None = None
    nbytes: int = 0


@dataclass(frozen=True)
class Answer:
    """What an operation does with arguments of certain shapes: its FLOPs, and its outputs; `series`: their list type."""

    flops: int
    outputs: list[Any]
    series: type | None


_answers: dict[Any, Answer] = {}
_fakes = FakeTensorMode()


class Ledger(TorchDispatchMode):
    """Follows the operations inside its with block: bytes of live tensors, and FLOPs by network.

    New tensors have no data. `peak` is the most bytes alive at once, `gradients_then` the gradients among them, and
    `peak_without_gradients` the most bytes alive at once not counting gradients.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.gradients = self.peak = self.gradients_then = self.peak_without_gradients = 0
        self.flops: Counter[str] = Counter()
        self.network = LOSSES
        self._have: set[nn.Parameter] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise each operation passes through torch.compile's machinery, which takes seconds to import

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        key = (func, _described(args, tensors), _described(tuple(kwargs.items()), tensors))
        answer = _answers.get(key)
        if answer is None:
            answer = _answers[key] = _ask(func, args, kwargs)
        if answer.flops:
            self.flops[self.network] += answer.flops
        outputs: list[Any] = []
        for made in answer.outputs:
            outputs.append(self._make(made, tensors, outputs) if isinstance(made, Made) else made)
        return outputs[0] if answer.series is None else answer.series(outputs)

    def _make(self, made: Made, tensors: list[Tensor], outputs: list[Any]) -> Tensor:
        if made.same is not None:
            return tensors[made.same]
        size, stride, offset, dtype = made.layout
        out: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            Hollow, size, strides=stride, storage_offset=offset, dtype=dtype, device=CPU
        )
        if made.base is not None:
            out.memory = getattr(tensors[made.base], "memory", None)
        elif made.twin is not None:
            out.memory = outputs[made.twin].memory
        else:
            out.memory = Memory(made.nbytes, self)
            self._grown(made.nbytes)
        return out

    def _grown(self, nbytes: int) -> None:
        self.alive += nbytes
        self.peak_without_gradients = max(self.peak_without_gradients, self.alive - self.gradients)
        if self.alive > self.peak:
            self.peak, self.gradients_then = self.alive, self.gradients

    def start(self, networks: dict[str, nn.Module]) -> int:
        """Start counting, attributing FLOPs to the `networks` by name. Returns the bytes alive."""
        for name, network in networks.items():
            self._name(name, network)
        self.peak = self.peak_without_gradients = self.alive
        return self.alive

    def updated(self) -> None:
        """Note that the optimizer has cleared the gradients."""
        self.gradients = 0
        self._have.clear()

    def _name(self, name: str, network: nn.Module) -> None:
        def computes(*_: Any) -> None:
            self.network = name

        def done(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.network = LOSSES
            if output.requires_grad:  # the backward pass enters the network here, after the losses
                output.register_hook(computes)

        def accumulated(parameter: nn.Parameter) -> None:
            if parameter not in self._have:
                self._have.add(parameter)
                self.gradients += parameter.numel() * parameter.element_size()

        network.register_forward_pre_hook(computes)
        network.register_forward_hook(done)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(accumulated)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Set `parameter.data`, with its memory, which PyTorch does not know of."""
    parameter.data = data
    parameter.memory = data.memory  # pyright: ignore[reportAttributeAccessIssue]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _described(value: Any, tensors: list[Tensor]) -> Any:
    """Return what an operation's result depends on, hashable; add the tensors in `value` to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _layout(value)
    if isinstance(value, tuple | list):
        return tuple([_described(each, tensors) for each in value])
    return type(value), value  # 1, 1.0 and True are equal


def _ask(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    """Ask PyTorch's fake tensors what `func` does."""
    fakes: list[FakeTensor] = []

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        size, stride, offset, dtype = _layout(value)
        length = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        flat = torch.empty(max(length, offset), dtype=dtype, device="meta")
        fakes.append(FakeTensor(_fakes, flat.as_strided(size, stride, offset), CPU))
        return fakes[-1]

    given, named = tree_map(fake, (args, dict(kwargs)))
    with _fakes:
        out = func(*given, **named)
    formula = flop_registry.get(func._overloadpacket)  # pyright: ignore[reportFunctionMemberAccess]
    flops = formula(*given, **named, out_val=out) if formula else 0
    series = type(out) if isinstance(out, tuple | list) else None
    found = out if series else [out]
    bases = [one.untyped_storage()._cdata for one in fakes]
    blocks: list[int] = []
    outputs: list[Any] = []
    for one in found:
        block = one.untyped_storage()._cdata if isinstance(one, Tensor) else -1
        if not isinstance(one, Tensor):
            outputs.append(one)
        elif any(one is each for each in fakes):
            outputs.append(Made((), same=next(i for i, each in enumerate(fakes) if one is each)))
        elif block in bases:
            outputs.append(Made(_layout(one), base=bases.index(block)))
        elif block in blocks:
            outputs.append(Made(_layout(one), twin=blocks.index(block)))
        else:
            outputs.append(Made(_layout(one), nbytes=one.untyped_storage().nbytes()))
        blocks.append(block)
    return Answer(int(flops), outputs, series)
