"""How a network runs: compiled, frugal with memory, spread over the processes of a `torchrun`; by PyTorch's own means.

`ddp` (DistributedDataParallel): every process has all of it. `fsdp` (FSDP2, `fully_shard`): every process has a slice
of each block's weights, gradients and moments, and gathers a block when it is its turn.

All of it happens in place, but for `ddp`, and leaves the names of the weights as they are. The order is
`checkpoint_gradients`, `spread`, `compile_blocks`, which compiles what is called from then on.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

RECOMPILATIONS = 256
"""What `torch.compile` may make of one function: all blocks are one to it, in every width, batch and grad mode."""


def checkpoint_gradients(network: nn.Module) -> None:
    """Keep only what goes into each part of each block, and compute the rest again in the backward pass.

    In place, and in copies made afterwards too. Without dropout, as distillation is.
    """
    for block in blocks(network):
        for part in _parts(block):
            part.forward = MethodType(_recomputed, part)  # a method: deep copies have it as their own


def _parts(block: nn.Module) -> list[nn.Module]:
    """The smallest blocks within `block`, which is one itself if it lists bare layers, or nothing."""
    within = blocks(block)
    if not within or any(next(member.children(), None) is None for member in within):
        return [block]
    return [part for member in within for part in _parts(member)]


def _recomputed(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward = type(module).forward
    return checkpoint(forward, module, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` each block of `network`, in place; deep copies are not compiled.

    Shapes are taken as they are, which in training are few. Block by block, since a block is compiled once for all of
    its kind, and since what `fsdp` does happens between them.
    """
    from torch._dynamo import config  # takes a second

    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    for block in blocks(network):
        block.compile(backend=backend, dynamic=False)


def try_compiler(device: torch.device) -> None:
    """Compile one small function and its gradient, for whose lack of a compiler PyTorch raises one of many kinds."""
    x = torch.ones(2, device=device, requires_grad=True)
    torch.compile(lambda x: (2 * x + 1).sin(), dynamic=False)(x).sum().backward()


def spread(network: nn.Module, how: str, precision: str, inputs: tuple[Any, ...]) -> nn.Module:
    """What to call in place of `network`, whose gradients are then the mean over the processes.

    For `fsdp` that is the network itself, sharded in place. Where there is one process and no group, nothing is done.

    Args:
        how: "ddp" or "fsdp".
        precision: with "bf16", blocks are gathered in bf16 and their gradients reduced in fp32; what each process keeps
            is fp32.
        inputs: an example of what it is called with, a batch of one; for `ddp`, which must know of idle weights.
    """
    if not dist.is_initialized():
        return network
    if how == "fsdp":
        return shard(network, precision)
    cuda = next(network.parameters()).device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the name that torch 2.10 does not have yet
        return DistributedDataParallel(
            network,
            device_ids=[torch.cuda.current_device()] if cuda else None,
            broadcast_buffers=False,  # they never change
            find_unused_parameters=bool(idle(network, *inputs)),
            gradient_as_bucket_view=True,
        )


def idle(network: nn.Module, *inputs: Any) -> list[str]:
    """The trained weights that have no part in `network(*inputs)`, such as EDM's for augmentations: found by trying."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(network(*inputs).sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def shard(network: nn.Module, precision: str = "fp32") -> nn.Module:
    """`fully_shard` each block of `network`, then what is left of it. In place; frozen networks too.

    With "bf16" it runs under autocast from then on, whoever calls it: its weights arrive in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes seconds

    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    low = torch.bfloat16 if precision == "bf16" else None
    # Autocast casts inputs where it should; times and preconditioning must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 shards no other
    for block in (*blocks(network), network):
        # The average changes between two uses: no gathered copy of it may be kept, not even the root's.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if low is not None:
        network.forward = torch.autocast(mesh.device_type, low)(network.forward)
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """The units of sharding: the members of the outermost lists and dictionaries of modules that have weights."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += [member for member in child.children() if next(member.parameters(), None) is not None]
        else:
            found += blocks(child)
    return found


@contextmanager
def features(network: nn.Module, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within it, what the blocks `numbers` of `network` (see `blocks`) returned last, by number: for a GAN's head.

    Works for any network, however it is spread, without an argument in its `forward`. Tensors carry their graph.
    """
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.__setitem__(number, output)

    members = blocks(unwrapped(network))
    handles = [members[number].register_forward_hook(keep(number)) for number in numbers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def replicate(network: nn.Module) -> None:
    """Give `network`, which every process has all of, the first process's weights in all of them."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def average_gradients(network: nn.Module) -> None:
    """Make the gradients of `network` the mean over the processes, unless `spread` has it do so by itself."""
    if dist.is_initialized() and not isinstance(network, DistributedDataParallel) and not _is_sharded(network):
        for parameter in network.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks compute in `precision`, "fp32" or "bf16", whatever their weights have."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def summed(network: Any, last: bool) -> Iterator[None]:
    """Gradient accumulation: what is passed backward within it is summed over the processes only if `last`."""
    if _is_sharded(network):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def _is_sharded(network: nn.Module) -> bool:
    return hasattr(network, "set_requires_gradient_sync")  # FSDPModule, whose import takes seconds


def unwrapped(network: nn.Module) -> Any:
    """The network itself, whatever it is called through."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, on every process; all of them must ask. Others as they are."""
    sharded: Any = tensor  # a DTensor, whose import takes seconds
    return sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
