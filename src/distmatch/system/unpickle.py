"""Reads untrusted pickles as data: tensors, numbers, text and containers. Nothing in the file is executed.

Made for the networks that NVIDIA publishes (`edm-*.pkl`), whose modules are stored as class name, source text (which
stays text) and attributes, and for CIFAR's batches.

A pickle is a program that may import and call anything. Here, `pickletools` splits it into instructions, and the
machine below executes only those that build data. A name in the file is never imported: it is looked up in a table of
functions in this module, which validate their arguments and limit what they allocate to a multiple of the file's size.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from distmatch.system.errors import UserError

ROOM = 4  # times the file's size, for storages, tensors and copies together; honest files need at most 3
INSTRUCTIONS = 4_000_000  # per program, because one byte can make an object of 200 bytes; 1,500 modules need 300,000
DIMENSIONS = 32
KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NUMBERS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {name: getattr(torch, name) for name in NUMBERS}
STORAGES = {f"{kind}Storage": DTYPES[name] for kind, name in zip(KINDS, NUMBERS, strict=True)}
MAGIC = (0x1950A86A20F9469CFC6C, 1001)
"""How files in the older format of `torch.save` begin, in which a storage is nested inside a pickle."""
SCALARS = (str, int, float, bool, type(None))
BYTES = {f"{size}BIN{kind}" for size in ("", "SHORT_") for kind in ("UNICODE", "BYTES", "STRING")}
PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BYTEARRAY8", "BINUNICODE8", "BINBYTES8", *BYTES}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
COUNTS = {"POP": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
"""How many objects these instructions pop; their variants not listed here pop everything since the last mark."""


@dataclass(eq=False, repr=False)
class Stub:
    """An object whose class was not imported.

    Args:
        class_name: the class, without its module.
        state: its attributes.
        meta: what the file says about a class stored with its source: `module_src`, `version`; empty for torch's own.
    """

    class_name: str
    state: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """One module of a network: its class, its constructor arguments, and its attributes that are numbers or text."""

    class_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network without its code.

    Args:
        modules: by dotted name, in order; "" is the network itself.
        state: parameters and buffers by dotted name as in `nn.Module.state_dict`, on the CPU, in the file's precision.
    """

    modules: dict[str, Module]
    state: dict[str, Tensor]


def load(source: Path | bytes) -> Any:
    """Return the object in a pickle of protocol 2 to 5; modules and other objects of known kinds become `Stub`.

    Parameters become tensors, ordered dictionaries `dict`, NumPy scalars Python numbers. Raises `UserError` if the file
    is missing or damaged, or asks for anything that is not data.
    """
    name = "the pickle" if isinstance(source, bytes) else str(source)
    try:
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    with file:
        try:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            budget = _Budget(size)
            return _Machine(_Bounded(file, size), _Names(budget), budget).run()
        except _Refused as refused:
            raise UserError(
                f"{name} asks for {refused}: this is refused, and nothing in the file was executed. "
                f"Only tensors, numbers, text and containers are read from a pickle"
            ) from None
        except Exception as error:  # whatever a malformed program causes: stack, type or encoding errors
            raise UserError(
                f"{name} is damaged at byte {file.tell()}, or no pickle of protocol 2 to 5 "
                f"({type(error).__name__}: {_cut(str(error))}); get it again from where it was published"
            ) from error


def network(path: Path, key: str | None = "ema") -> Network:
    """Return the network under `key` of the dictionary in `path`; with key `None`, the object itself.

    Raises `UserError` like `load`, and if there is no such network.
    """
    found = load(path)
    if key is not None:
        if not isinstance(found, dict) or key not in found:
            raise UserError(f"{path} has no entry {key!r}: it is {_describe(found)}")
        found = found[key]
    return _network(path, found)


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of the only network in `path`: the object itself, or an entry of a dictionary.

    Raises `UserError` like `load`, and if there is no network or more than one.
    """
    found = load(path)
    entries = found if isinstance(found, dict) else {None: found}
    keys = [key for key, value in entries.items() if _is_module(value)]
    if len(keys) != 1:
        raise UserError(f"{path} holds {len(keys)} networks where one was expected: it is {_describe(found)}")
    return _network(path, entries[keys[0]]).state


def _network(path: Path, found: Any) -> Network:
    if not _is_module(found):
        raise UserError(f"{path} holds no network there, but something {_describe(found)}")
    try:
        return _walk(found, _Budget(path.stat().st_size))
    except _Refused as refused:
        raise UserError(f"{path} holds {refused}: it is damaged, or was made to do harm") from None


def _is_module(value: Any) -> bool:
    return isinstance(value, Stub) and "_parameters" in value.state


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"of type dict with {', '.join(_cut(key) for key in list(value)[:20]) or 'nothing'}"
    return f"of class {_cut(value.class_name)}" if isinstance(value, Stub) else f"of type {type(value).__name__}"


def _cut(text: str | int) -> str:
    """Shorten text from the file for use in a message."""
    return ascii(str(text)[:120])[1:-1]


def _walk(top: Stub, budget: "_Budget") -> Network:
    """Return the modules of `top` in the order of `state_dict`. The budget also ends cycles and endless repetition."""
    modules: dict[str, Module] = {}
    state: dict[str, Tensor] = {}
    todo: list[tuple[str, Any]] = [("", top)]
    while todo:
        name, stub = todo.pop()
        if not isinstance(stub, Stub):
            raise _Refused(f"a module {_cut(name)} {_describe(stub)}")
        budget.spend(1 + len(stub.state))
        args = stub.state.get("_init_args", ())
        modules[name] = Module(
            stub.class_name,
            args=tuple(_plain(args, budget)) if isinstance(args, list | tuple) else (),
            kwargs=_plain(_entries(stub, "_init_kwargs"), budget),
            attributes={k: v for k, v in stub.state.items() if type(v) in SCALARS and not str(k).startswith("_")},
        )
        prefix = f"{name}." if name else ""
        own, buffers, children = (_entries(stub, kind) for kind in ("_parameters", "_buffers", "_modules"))
        hidden = stub.state.get("_non_persistent_buffers_set", ())
        if isinstance(hidden, set):
            buffers = {key: value for key, value in buffers.items() if key not in hidden}
        budget.spend(sum(len(prefix) + len(key) for key in (*own, *buffers, *children)))
        for key, tensor in (*own.items(), *buffers.items()):
            if isinstance(tensor, Tensor):
                budget.spend(tensor.numel() * tensor.element_size())
                state[prefix + key] = tensor
            elif tensor is not None:
                raise _Refused(f"a parameter {_cut(prefix + key)} {_describe(tensor)}")
        todo += [(prefix + key, child) for key, child in reversed(children.items()) if child is not None]
    return Network(modules, state)


def _entries(stub: Stub, name: str) -> dict[str, Any]:
    """Return one of the name-to-value dictionaries that make up a module."""
    entries = stub.state.get(name, {})
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise _Refused(f"{name} of {_cut(stub.class_name)} {_describe(entries)}")
    return entries


def _plain(value: Any, budget: "_Budget", depth: int = 16) -> Any:
    """Copy nested containers so that nothing is shared, which makes their size known."""
    budget.spend(1)
    if depth == 0:
        raise _Refused("settings nested without end")
    if isinstance(value, dict):
        return {key: _plain(item, budget, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_plain(item, budget, depth - 1) for item in value])
    return value


class _Refused(Exception):
    """The file is readable but asks for something that is not data; the message names it."""


class _Budget:
    """How much may be allocated and done for a file of `size` bytes: a few bytes of a pickle can ask for any amount."""

    def __init__(self, size: int):
        self.left = ROOM * size
        self.instructions = INSTRUCTIONS

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _Refused(f"more than {ROOM} times its own size")

    def step(self) -> None:
        self.instructions -= 1
        if self.instructions < 0:
            raise _Refused(f"more than {INSTRUCTIONS:,} instructions")


class _Bounded:
    """A file for `pickletools` that never allocates more than it has, whatever length an instruction claims."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.tell, self.readline = file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size - self.file.tell()))


@dataclass(frozen=True)
class _Name:
    """What a name in the file becomes: not an imported object, but the function in this module that stands for it."""

    make: Callable[..., Any]


class _Machine:
    """The stack machine of pickle protocols 2 to 5, without anything that reaches beyond its own stack.

    Args:
        file: what `_Bounded` provides.
        names: everything that the file may refer to.
    """

    def __init__(self, file: Any, names: "_Names", budget: _Budget):
        self.file, self.names, self.budget = file, names, budget

    def run(self) -> Any:
        """Read one pickle and leave the file positioned after it."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def take(count: int | None = None) -> list[Any]:
            """Pop the last `count` objects, or those since the last mark."""
            start = marks.pop() if count is None else len(stack) - count
            if not 0 <= start <= len(stack):
                raise IndexError("the stack is empty")
            items = stack[start:]
            del stack[start:]
            return items

        for instruction, argument, _ in pickletools.genops(self.file):
            self.budget.step()
            arg: Any = argument
            match instruction.name:
                case "PROTO" | "FRAME":
                    pass
                case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    memo[len(memo) if arg is None else arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case kind if kind in PLAIN:  # Python 2's strings, text or bytes, come as Latin-1
                    stack.append(arg)
                case kind if kind in VALUES:
                    stack.append(VALUES[kind])
                case kind if kind in EMPTY:
                    stack.append(EMPTY[kind]())
                case "MARK":
                    marks.append(len(stack))
                case "POP" | "POP_MARK" as kind:
                    take(COUNTS.get(kind))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE" as kind:
                    stack.append(tuple(take(COUNTS.get(kind))))
                case "APPEND" | "APPENDS" as kind:
                    items = take(COUNTS.get(kind))
                    _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS" as kind:
                    items = take(COUNTS.get(kind))
                    pairs = {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}
                    _expect(stack[-1], dict).update(pairs)
                case "ADDITEMS":
                    items = {_key(item) for item in take()}
                    _expect(stack[-1], set).update(items)
                case "GLOBAL":
                    stack.append(self.names.lookup(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    module, name = take(2)
                    stack.append(self.names.lookup(_expect(module, str), _expect(name, str)))
                case "REDUCE" | "NEWOBJ":
                    function, args = take(2)
                    stack.append(_expect(function, _Name).make(*_expect(args, tuple)))
                case "BUILD":
                    (state,) = take(1)
                    self.names.set_state(stack[-1], state)
                case "BINPERSID":
                    stack.append(self.names.reference(*take(1)))
                case "STOP":
                    return stack.pop()
                case other:
                    raise _Refused(f"the instruction {other}")
        raise EOFError


@dataclass(frozen=True)
class _Storage:
    numbers: Tensor


class _Dtype:
    """A plain NumPy dtype, whose byte order is set after construction. Object dtypes, nested pickles, are refused."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", _expect(code, str)):
            raise _Refused(f"numpy.dtype {_cut(code)}")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        order, *parts = _expect(state, tuple)[1:5]
        if order not in ("<", ">", "|", "=") or parts != [None, None, None]:
            raise _Refused("a numpy.dtype of other than plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Names:
    """Everything that a pickle may name. The arguments of these functions come from the file and are never trusted."""

    def __init__(self, budget: _Budget):
        self.budget = budget
        self.makers: dict[str, Callable[..., Any]] = {
            "builtins.bytes": lambda: b"",
            "builtins.set": self.set,
            "_codecs.encode": self.encode,
            "collections.OrderedDict": lambda: {},
            "dnnlib.util.EasyDict": lambda: {},
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
            "torch.storage._load_from_bytes": self.storage,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: _expect(data, Tensor),
            "torch.Size": lambda size: torch.Size(_sizes(size)),
            "torch.device": lambda kind, *index: torch.device(_expect(kind, str), *(_expect(i, int) for i in index)),
            "numpy.dtype": _Dtype,
            "numpy.ndarray": lambda: np.empty(0, np.uint8),
            "numpy.core.multiarray._reconstruct": lambda kind, size, code: _expect(kind, _Name).make(),
            "numpy.core.multiarray.scalar": lambda dtype, data: self.array(data, dtype, ()).item(),
            "numpy.core.numeric._frombuffer": self.array,
        }

    def lookup(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        full = f"{module}.{name}"
        if module.startswith("torch.nn.modules."):
            return _Name(lambda: Stub(name, {}))
        known = re.sub(r"^numpy\._core\.", "numpy.core.", re.sub(r"^__builtin__\.", "builtins.", full))
        if known not in self.makers:
            raise _Refused(_cut(full))
        return _Name(self.makers[known])

    def reference(self, name: Any) -> Any:
        """Resolve a reference to something outside of the file."""
        raise _Refused("something that is not in the file")

    def set_state(self, target: Any, state: Any) -> None:
        """`BUILD`: fill an object that was just made."""
        match target:
            case Stub() if not target.state:
                target.state = _expect(state, dict)
            case _Dtype():
                target.set_state(state)
            case np.ndarray():
                _, shape, dtype, by_columns, data = _expect(state, tuple)
                array: Any = self.array(data, dtype, shape, "F" if by_columns else "C")
                target.__setstate__(array.__reduce__()[2])
            case dict():
                pass  # ignores attributes of an OrderedDict
            case _:
                raise _Refused(f"attributes for a {type(target).__name__.lstrip('_')}")

    def set(self, items: Any) -> set:
        self.budget.spend(8 * len(_expect(items, list)))
        return {_key(item) for item in items}

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Return bytes, which protocol 2 stores as encoded text."""
        self.budget.spend(len(_expect(text, str)))
        if encoding != "latin1":
            raise _Refused("_codecs.encode to other than latin1")
        return text.encode("latin1")

    def storage(self, data: Any) -> _Storage:
        """Read a storage as the older `torch.save` writes it: five pickles, the count and the numbers.

        The count is not trusted: it must match the numbers that are there, or the file is damaged.
        """
        self.budget.spend(len(_expect(data, bytes)))
        file = io.BytesIO(data)
        machine = _Machine(_Bounded(file, len(data)), _StorageNames(self.budget), self.budget)
        magic, version, _, token, _ = (machine.run() for _ in range(5))
        _, dtype, _, _, count, view = _expect(token, tuple)
        start = file.tell() + 8
        numbers = memoryview(data)[start:]
        known = (magic, version, view) == (*MAGIC, None)
        announced = _expect(count, int).to_bytes(8, "little") == data[start - 8 : start]
        if not known or not announced or len(numbers) != count * _expect(dtype, torch.dtype).itemsize:
            raise UserError(f"a storage of {count} numbers was announced and is not there")
        if dtype == torch.bool:
            _check_bools(data[start:])
        return _Storage(torch.frombuffer(bytearray(numbers), dtype=dtype) if count else torch.empty(0, dtype=dtype))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *flags: Any) -> Tensor:
        numbers = _expect(storage, _Storage).numbers
        (offset,), size, stride = _sizes((offset,)), _sizes(size), _sizes(stride)
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if any(flags) or count > len(numbers) or (count and last >= len(numbers)):
            raise _Refused(f"a tensor of {count} numbers up to the {last + 1}th of a storage of {len(numbers)}")
        self.budget.spend(count * numbers.element_size())
        return numbers.as_strided(size, stride, offset) if count else numbers.new_empty(size)

    def array(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
        kind, shape = _expect(dtype, _Dtype).dtype, _sizes(shape)
        data = self.encode(data, "latin1") if type(data) is str else data  # from Python 2
        if type(data) not in (bytes, bytearray) or math.prod(shape) * kind.itemsize != len(data):
            raise _Refused("a NumPy array of other numbers than are there")
        self.budget.spend(len(data))
        if kind == np.bool_:
            _check_bools(bytes(data))
        return np.ndarray(shape, kind, bytearray(data), order="F" if order == "F" else "C")


class _StorageNames(_Names):
    """What the pickles inside a storage may name: its type and, by reference, the numbers that follow."""

    def lookup(self, module: str, name: str) -> Any:
        if module != "torch" or name not in STORAGES:
            raise _Refused(_cut(f"{module}.{name}"))
        return STORAGES[name]

    def reference(self, name: Any) -> Any:
        return name


def _persistent(meta: Any) -> Stub:
    """Return a class that NVIDIA's code stores with its source text, which stays text."""
    return Stub(_expect(_expect(meta, dict).get("class_name"), str), _expect(meta.get("state") or {}, dict), meta)


def _check_bools(data: bytes) -> None:
    """Refuse bytes other than 0 and 1: PyTorch and NumPy count by adding bytes, then go out of bounds."""
    if data.translate(None, b"\0\1"):
        raise _Refused("truth values that are neither 0 nor 1")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__.lstrip('_')}, got {type(value).__name__.lstrip('_')}")
    return value


def _key(key: Any) -> Any:
    """Accept a key that is text or a small number: others could collide on purpose, or nest until hashing overflows."""
    if type(key) in (str, bytes) or (type(key) is int and abs(key) < 2**31):
        return key
    raise _Refused(f"a key of type {type(key).__name__}")


def _sizes(values: Any) -> tuple[int, ...]:
    """Validate a size, a stride or an offset."""
    known = type(values) in (tuple, torch.Size) and len(values) <= DIMENSIONS
    if not known or not all(type(n) is int and 0 <= n < 2**40 for n in values):
        raise _Refused("a size that no tensor has")
    return tuple(values)
