"""How a network is spread over the processes of a `torchrun`, by PyTorch's own means.

`ddp` (DistributedDataParallel): every process has all of it. `fsdp` (FSDP2, `fully_shard`): every process has a slice
of each block's weights, gradients and moments, and gathers a block when it is its turn.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def spread(network: nn.Module, how: str, precision: str = "fp32") -> nn.Module:
    """What to call in place of `network`, whose gradients are then the mean over the processes.

    For `fsdp` that is the network itself, sharded in place. Where there is one process and no group, nothing is done.

    Args:
        how: "ddp" or "fsdp".
        precision: with "bf16", blocks are gathered in bf16 and their gradients reduced in fp32; what each process keeps
            is fp32.
    """
    if not dist.is_initialized():
        return network
    if how == "ddp":
        cuda = next(network.parameters()).device.type == "cuda"
        devices = [torch.cuda.current_device()] if cuda else None
        # EDM's networks carry weights for an augmentation that distillation leaves alone. Buffers never change.
        unused = any("map_augment" in name for name, _ in network.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the name that torch 2.10 does not have yet
            return DistributedDataParallel(
                network, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused
            )
    return shard(network, precision)


def shard(network: nn.Module, precision: str = "fp32") -> nn.Module:
    """`fully_shard` each block of `network`, then what is left of it. In place; frozen networks too."""
    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    low = torch.bfloat16 if precision == "bf16" else None
    # Autocast casts inputs where it should; times and preconditioning must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 shards no other
    for block in (*blocks(network), network):
        # The average changes between two uses: no gathered copy of it may be kept, not even the root's.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
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
def summed(network: nn.Module, last: bool) -> Iterator[None]:
    """Gradient accumulation: what is passed backward within it is summed over the processes only if `last`."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def unwrapped(network: nn.Module) -> Any:
    """The network itself, whatever it is called through."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, on every process; all of them must ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
