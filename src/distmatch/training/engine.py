"""How a network runs: compiled, with gradient checkpointing, spread over the processes of a `torchrun`.

`ddp` (DistributedDataParallel): every process holds the whole network. `fsdp` (FSDP2, `fully_shard`): every process
holds a slice of each block's weights, gradients and moments, and gathers a block when it is needed.

Everything but `ddp` works in place, and the names of the weights stay the same. Call in this order:
`checkpoint_gradients`, `spread`, `compile_blocks`, which compiles what is called from then on.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distmatch.diffusion.denoiser import Denoiser
from distmatch.training.adapters import Adapted, keeping, network_of

RECOMPILATIONS = 256
"""How often `torch.compile` may recompile one function: all blocks share one, in every width, batch and grad mode."""


def checkpoint_gradients(network: nn.Module) -> None:
    """Keep only the inputs of each part of each block, and recompute the rest in the backward pass.

    In place; copies made later recompute too. Only for networks without dropout, as in distillation. Of an adapted
    network, the base's blocks: what is recomputed uses the adapter that it used first.
    """
    recomputed = _recomputed_as_before if isinstance(network, Adapted) else _recomputed
    for block in blocks(network):
        for part in _parts(block):
            part.forward = MethodType(recomputed, part)  # bound as a method, so that deep copies get their own


def _parts(block: nn.Module) -> list[nn.Module]:
    """Return the smallest blocks within `block`, or `block` itself if it lists bare layers or nothing."""
    within = blocks(block)
    if not within or any(next(member.children(), None) is None for member in within):
        return [block]
    return [part for member in within for part in _parts(member)]


def _recomputed(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward = type(module).forward
    return checkpoint(forward, module, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _recomputed_as_before(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward = keeping(type(module).forward)
    return checkpoint(forward, module, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Call `torch.compile` on each block of `network`, in place; deep copies are not compiled.

    Shapes are static; training has few of them. Compiling block by block compiles blocks of one kind only once, and
    leaves room between blocks for what `fsdp` does.
    """
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    for block in blocks(network):
        block.compile(backend=backend, dynamic=False)


def try_compiler(device: torch.device) -> None:
    """Compile one small function and its gradient; without a compiler, PyTorch raises one of many kinds of error."""
    x = torch.ones(2, device=device, requires_grad=True)
    torch.compile(lambda x: (2 * x + 1).sin(), dynamic=False)(x).sum().backward()


def spread(network: nn.Module, how: str, precision: str, inputs: tuple[Any, ...]) -> nn.Module:
    """Return what to call in place of `network`; its gradients are then the mean over the processes.

    For `fsdp` this is the network itself, sharded in place; of an adapted one the base is sharded with the teacher, and
    the adapter held as for `ddp`. Without a process group, nothing is done.

    Args:
        how: "ddp" or "fsdp".
        precision: with "bf16", blocks are gathered in bf16 and their gradients reduced in fp32; what each process keeps
            is fp32.
        inputs: example arguments, a batch of one; for `ddp`, which must know whether some weights are unused.
    """
    if not dist.is_initialized():
        return network
    if how == "fsdp" and not isinstance(network, Adapted):
        return shard(network, precision)
    cuda = next(network.parameters()).device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about a name that torch 2.10 does not have yet
        return DistributedDataParallel(
            network,
            device_ids=[torch.cuda.current_device()] if cuda else None,
            broadcast_buffers=False,  # they never change
            find_unused_parameters=bool(idle(network, *inputs)),
            gradient_as_bucket_view=True,
        )


def idle(network: nn.Module, *inputs: Any) -> list[str]:
    """Return the trained weights that `network(*inputs)` does not use, such as EDM's augmentation layers, by trying."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(network(*inputs).sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def shard(network: nn.Module, precision: str = "fp32") -> nn.Module:
    """Apply `fully_shard` to each block of `network`, then to the rest. In place; frozen networks too.

    With "bf16", the network always runs under autocast from then on: its weights arrive in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes seconds to import

    first = next(network.parameters(), None)
    if first is None:  # an exact teacher
        return network
    mesh = init_device_mesh(first.device.type, (dist.get_world_size(),))
    low = torch.bfloat16 if precision == "bf16" else None
    # Autocast casts inputs where it should; times and preconditioning must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 shards no other
    for block in (*blocks(network), network):
        # The EMA changes between two uses, so no gathered copy may be kept, not even of the root's weights.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if low is not None:
        network.forward = torch.autocast(mesh.device_type, low)(network.forward)
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the units of sharding: the members, with weights, of the outermost ModuleLists and ModuleDicts.

    The blocks of an adapted network are its base's.
    """
    if isinstance(network, Adapted):
        return blocks(network.base)
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += [member for member in child.children() if next(member.parameters(), None) is not None]
        else:
            found += blocks(child)
    return found


@contextmanager
def features(network: nn.Module, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yield what the blocks `numbers` of `network` (see `blocks`) last returned, by number: for a GAN's head.

    Works for any network and needs no argument in its `forward`. Tensors keep their graph. From then on
    these blocks are not compiled: each new hook would compile them again.
    """
    found: dict[int, Tensor] = {}
    image = getattr(bare(network), "image_output", 0)  # transformers of texts and images return the text first
    thread = get_ident()  # several workers may run the network at once, each with its own part of the batch

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if get_ident() == thread:
                found[number] = output[image] if isinstance(output, tuple) else output

        return hook

    def tie(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Let a backward pass from features enter by the output, where FSDP2 gathers what is outside the blocks."""
        if get_ident() == thread:
            found.update({number: one + 0 * output.sum() for number, one in found.items()})

    members = blocks(unwrapped(network))
    for number in numbers:
        members[number]._compiled_call_impl = None
    handles = [members[number].register_forward_hook(keep(number)) for number in numbers]
    for root in filter(_is_sharded, (unwrapped(network), bare(network))):  # of an adapted one, the base's network
        handles.append(root.register_forward_hook(tie))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def bare(network: nn.Module) -> nn.Module:
    """Return the network within a denoiser, adapted or distributed as it may be."""
    inner = unwrapped(network)
    return network_of(inner) if isinstance(inner, Denoiser) else inner


def replicate(network: nn.Module) -> None:
    """Broadcast the first process's weights of `network`, which all processes hold in full."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def average_gradients(network: nn.Module) -> None:
    """Average the gradients of `network` over the processes, unless `spread` already makes it do so."""
    if dist.is_initialized() and not isinstance(network, DistributedDataParallel) and not _is_sharded(network):
        for parameter in network.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


@contextmanager
def summed(network: Any, last: bool) -> Iterator[None]:
    """Accumulate gradients: backward passes in the with block are summed over the processes only if `last`."""
    if _is_sharded(network):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def _is_sharded(network: nn.Module) -> bool:
    return hasattr(network, "set_requires_gradient_sync")  # FSDPModule takes seconds to import


def unwrapped(network: nn.Module) -> Any:
    """Return the network itself, without the wrapper it is called through."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, in the same memory. Other tensors are returned unchanged.

    Call under `no_grad`. What works on parts needs no plan for whole tensors from PyTorch, whose making in the first
    step takes a time that grows with the square of their number.
    """
    sharded: Any = tensor  # a DTensor, which takes seconds to import
    return sharded.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's full value; all processes must call this. Other tensors are returned unchanged."""
    sharded: Any = tensor
    return sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
