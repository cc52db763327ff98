"""CUDA graphs on a CPU: what is recorded is repeated, operation by operation, on the same tensors.

So whatever was no tensor when it was recorded stays as it was then, as on a GPU.
"""

from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATEN = torch.ops.aten

NUMBERS = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.bincount.default,
    ATEN.repeat_interleave.Tensor,
    ATEN.equal.default,
}
"""Operations that ask the device for a number, which a GPU refuses while it records."""

TO_THE_HOST = ("cpu", "numpy", "tolist")
"""Methods that copy to the host, as refused. On a CPU they are no operations."""


def refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


def asks(func: Any, args: Any) -> bool:
    """Whether `func` needs to know a number of its `args`: a mask as index says how many there are."""
    masks = func is ATEN.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1])
    return func in NUMBERS or masks


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations: list[Any] = []
        self.replays = 0
        self.sharing: list[Graph] = []
        self.outside: set[int] = set()
        """Memory that was there before."""

    def pool(self) -> Any:
        return self.sharing

    def replay(self) -> None:
        self.replays += 1
        for other in self.sharing:
            if other is not self:
                other.overwrite()
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                for made, result in zip(tree_leaves(function(*args, **kwargs)), results, strict=True):
                    if isinstance(result, torch.Tensor) and made.data_ptr() != result.data_ptr():
                        result.copy_(made)

    def overwrite(self) -> None:
        """What a graph of the same pool may do to this one's memory, at the worst: to all of it."""
        with torch.no_grad():
            for *_, results in self.operations:
                for result in results:
                    if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.outside:
                        result.fill_(torch.nan if result.is_floating_point() else 1)


class Recording(TorchDispatchMode):
    """Stands for `torch.cuda.graph`."""

    def __init__(self, graph: Graph, pool: Any = None):
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()
        graph.sharing = [] if pool is None else pool
        graph.sharing.append(graph)

    def __enter__(self):
        self.host = patch.multiple(torch.Tensor, create=True, **dict.fromkeys(TO_THE_HOST, refused))
        self.host.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.host.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if asks(func, args):
            refused()
        self.graph.outside |= memory((args, kwargs)) - self.made
        made = func(*args, **(kwargs or {}))
        self.made |= memory(made) - self.graph.outside
        # Aliases without autograd's history, of which a result that is changed in place later would become a part.
        kept = tree_map(lambda one: one.detach() if isinstance(one, torch.Tensor) else one, (args, kwargs or {}, made))
        self.graph.operations.append((func, kept[0], kept[1], tree_leaves(kept[2])))
        return made


def memory(tree: Any) -> set[int]:
    return {one.untyped_storage().data_ptr() for one in tree_leaves(tree) if isinstance(one, torch.Tensor)}


@contextmanager
def on_a_cpu():
    """Let `Replay` record and replay on a CPU."""
    side: Any = patch.multiple(
        torch.cuda,
        Stream=Mock,
        current_stream=Mock,
        stream=lambda stream: nullcontext(),
        CUDAGraph=Graph,
        graph=Recording,
    )
    with side, patch.object(torch.Tensor, "is_cuda", True, create=True):
        yield
