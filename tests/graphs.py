"""CUDA graphs on a CPU: what is recorded is repeated, operation by operation, on the same tensors.

So whatever was no tensor when it was recorded stays as it was then, as on a GPU.
"""

from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NUMBERS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Operations that ask the device for a number, which a GPU refuses while it records."""


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                for made, result in zip(tree_leaves(function(*args, **kwargs)), results, strict=True):
                    if isinstance(result, torch.Tensor) and made.data_ptr() != result.data_ptr():
                        result.copy_(made)


class Recording(TorchDispatchMode):
    """Stands for `torch.cuda.graph`."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in NUMBERS:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        # Aliases without autograd's history, of which a result that is changed in place later would become a part.
        kept = tree_map(lambda one: one.detach() if isinstance(one, torch.Tensor) else one, (args, kwargs or {}, made))
        self.graph.operations.append((func, kept[0], kept[1], tree_leaves(kept[2])))
        return made


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
