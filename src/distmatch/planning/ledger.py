"""Computes with tensors that have a shape but no data, and keeps account of their memory and arithmetic.

PyTorch's fake tensors would do, but they work out the result of each operation anew, which takes half a minute for a
step of Stable Diffusion. Here each operation is worked out once for arguments of the same shapes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distmatch.system.data import data_needed

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
    layout_number: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor without data is used outside of its ledger")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = torch.empty_like(self, requires_grad=False)
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

    @cached_property
    def number(self) -> int:
        return _number(self.layout)


@dataclass(frozen=True)
class Answer:
    """What an operation does with arguments of certain shapes: FLOPs, outputs, in a list of type `series`, and whether
    it computes anything (1), as views do not (0).
    """

    flops: int
    outputs: list[Any]
    series: type | None
    kernels: int


_aten = torch.ops.aten
CONVOLUTIONS = {_aten.convolution.default: 0, _aten.convolution_backward.default: 1}
"""Operations that choose another layout on the meta device, and where their input stands among their arguments."""

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations that give new memory, and compute nothing."""

_answers: dict[Any, Answer] = {}
_numbers: dict[Any, int] = {}
"""Numbers of layouts, by which they are compared: hundreds of thousands of times in a plan."""


class Ledger(TorchDispatchMode):
    """Follows the operations inside its with block: bytes of live tensors, and FLOPs by network.

    New tensors have no data. `peak` is the most bytes alive at once, `gradients_then` the gradients among them, and
    `peak_without_gradients` the most bytes alive at once not counting gradients. `later_peak` and `later_gradients` are
    `peak` and `gradients_then` for another part of the batch, which meets all gradients of the part before it.
    `kernels` counts the operations that compute something: on a GPU each is at least one kernel.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.gradients = self.peak = self.gradients_then = self.peak_without_gradients = 0
        self.later_peak = self.later_gradients = self._update_peak = 0  # the last without gradients, in this update
        self.flops: Counter[str] = Counter()
        self.kernels = 0
        self.network = LOSSES
        self._have: set[nn.Parameter] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise each operation passes through torch.compile's machinery, which takes seconds to import

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if data_needed():
            return func(*args, **(kwargs or {}))
        tensors: list[Tensor] = []
        # By `id`, because operations are there for good and take long to hash.
        key = (id(func), _described(args, tensors), _described(kwargs.items(), tensors) if kwargs else ())
        answer = _answers.get(key)
        if answer is None:
            if func.namespace == "profiler":
                return func(*args, **(kwargs or {}))
            answer = _answers[key] = _ask(func, args, kwargs or {})
        self.kernels += answer.kernels
        if answer.flops:
            self.flops[self.network] += answer.flops
        if answer.series is None and len(answer.outputs) == 1:  # nearly all
            made = answer.outputs[0]
            return self._make(made, tensors, ()) if type(made) is Made else made
        outputs: list[Any] = []
        for made in answer.outputs:
            outputs.append(self._make(made, tensors, outputs) if isinstance(made, Made) else made)
        return outputs[0] if answer.series is None else answer.series(outputs)

    def _make(self, made: Made, tensors: Sequence[Tensor], outputs: Sequence[Any]) -> Tensor:
        if made.same is not None:
            return tensors[made.same]
        size, stride, offset, dtype = made.layout
        out: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            Hollow, size, strides=stride, storage_offset=offset, dtype=dtype, device=CPU
        )
        out.layout_number = made.number
        if made.base is not None:
            out.memory = getattr(tensors[made.base], "memory", None)
        elif made.twin is not None:
            out.memory = outputs[made.twin].memory
        else:
            out.memory = Memory(made.nbytes, self)
            self._grown(made.nbytes)
        return out

    def _grown(self, nbytes: int) -> None:
        self.alive = alive = self.alive + nbytes
        if alive - self.gradients > self._update_peak:
            self._update_peak = alive - self.gradients
        if alive > self.peak:
            self.peak, self.gradients_then = alive, self.gradients

    def start(self, networks: dict[str, nn.Module]) -> int:
        """Start counting, attributing FLOPs to the `networks` by name. Returns the bytes alive."""
        for name, network in networks.items():
            self._name(name, network)
        self.peak = self.later_peak = self._update_peak = self.alive
        return self.alive

    def updated(self) -> None:
        """Note that the optimizer has cleared the gradients."""
        self.peak_without_gradients = max(self.peak_without_gradients, self._update_peak)
        if self._update_peak + self.gradients > self.later_peak:
            self.later_peak, self.later_gradients = self._update_peak + self.gradients, self.gradients
        self._update_peak = self.alive
        self.gradients = 0
        self._have.clear()

    def most(self, work: Callable[[], Any]) -> int:
        """Return the most bytes alive at once during `work`, which has no gradients; it counts in `peak` as well."""
        self._update_peak = self.alive
        work()
        return self._update_peak

    def enter(self, name: str, block: nn.Module) -> None:
        """Let a backward pass enter the network `name` through what its `block` returns, as from a head on features."""

        def computes(*_: Any) -> None:
            self.network = name

        def done(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad and self.network == name:  # other networks may share the block
                first.register_hook(computes)

        block.register_forward_hook(done)

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
    for name in ("memory", "layout_number"):
        setattr(parameter, name, getattr(data, name))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _number(layout: tuple[Any, ...]) -> int:
    return _numbers.setdefault(layout, len(_numbers))


def _described(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """Return what an operation's result depends on, hashable; add the tensors in `values` to `tensors`."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is Hollow:
            tensors.append(value)
            found.append((value.layout_number,))
        elif kind is int:
            found.append(value)
        elif kind is list or kind is tuple or kind is torch.Size:
            found.append(_described(value, tensors))
        elif isinstance(value, Tensor):
            tensors.append(value)
            found.append((_number(_layout(value)),))
        else:
            found.append((kind, value))  # 1, 1.0 and True are equal
    return tuple(found)


def _ask(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    """Ask PyTorch what `func` does: its meta device, which is quick, or its fake tensors."""
    # Convolutions along one axis are made ones along two by an operation of their own, which must not meet our tensors.
    one_axis = func in CONVOLUTIONS and args[CONVOLUTIONS[func]].ndim < 4
    return (_by_fakes if one_axis or func is _aten.lift_fresh.default else _by_meta)(func, args, kwargs)


def _by_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    tensors: list[Tensor] = []
    given, named = _replaced((args, dict(kwargs)), _empty, tensors)
    if named.get("device") is not None:
        named["device"] = torch.device("meta")
    out = func(*given, **named)
    if func is _aten.convolution.default:
        out = out.to(memory_format=_convolved(*args))
    elif func is _aten.convolution_backward.default:
        _, x, weight, sizes, *how, _ = args
        layout = _convolved(x, weight, None, *how, sizes)
        out = (*(None if one is None else one.to(memory_format=layout) for one in out[:2]), out[2])
    return _answer(func, given, named, tensors, out)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> torch.memory_format:
    """Return the layout in which the CPU's convolution of these arguments returns its results."""
    backend = torch._C._select_conv_backend(x, weight, bias, *how)
    return torch._C._conv_determine_backend_memory_format(x, weight, backend)


def _by_fakes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    tensors: list[Tensor] = []
    fakes = _fakes()
    given, named = _replaced((args, dict(kwargs)), lambda t: FakeTensor(fakes, _empty(t), CPU), tensors)
    with fakes:
        return _answer(func, given, named, tensors, func(*given, **named))


@cache
def _fakes() -> FakeTensorMode:
    return FakeTensorMode()  # imports torch.compile's machinery, which takes seconds


def _replaced(value: Any, twin: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> Any:
    """Return `value` with a twin of each tensor in it, which is added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(twin(value))
        return tensors[-1]
    if isinstance(value, dict):
        return {name: _replaced(one, twin, tensors) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(one, twin, tensors) for one in value)
    return value


def _empty(tensor: Tensor) -> Tensor:
    """Return a tensor of the same layout on the meta device."""
    size, stride, offset, dtype = _layout(tensor)
    if not offset:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return torch.empty(offset + max(last, 0) + 1, dtype=dtype, device="meta").as_strided(size, stride, offset)


def _answer(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> Answer:
    """Describe the result `out` of `func`, and how it shares memory with the arguments `tensors`."""
    formula = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    series = type(out) if isinstance(out, tuple | list) else None
    bases = [tensor.untyped_storage()._cdata for tensor in tensors]
    blocks: list[int] = []
    outputs: list[Any] = []
    for one in out if series else [out]:
        same = [i for i, tensor in enumerate(tensors) if tensor is one]
        block = one.untyped_storage()._cdata if isinstance(one, Tensor) else 0
        if not isinstance(one, Tensor):
            outputs.append(one)
        elif same:
            outputs.append(Made((), same=same[0]))
        elif block in bases:
            outputs.append(Made(_layout(one), base=bases.index(block)))
        elif block in blocks:
            outputs.append(Made(_layout(one), twin=blocks.index(block)))
        else:
            outputs.append(Made(_layout(one), nbytes=one.untyped_storage().nbytes()))
        blocks.append(block)
    fresh = any(isinstance(made, Made) and made.nbytes for made in outputs)
    computes = func._schema.is_mutable or (fresh and func._overloadpacket.__name__ not in ALLOCATIONS)
    return Answer(int(flops), outputs, series, int(computes))
