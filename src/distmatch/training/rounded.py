"""Frozen weights in fewer bits, for bases that adapters share: bf16, or integers of 8 or 4 bits with scales.

Integers are made bf16 weights in each pass, forward and backward, and let go: unlike torchao's 8-bit layers, whose
products leave these weights to autograd until the backward pass, which undoes the saving.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Weights = Literal["fp32", "bf16", "int8", "int4"]

LARGEST = 127
"""Of 8-bit integers, which lie in -127 .. 127. Those of 4 bits lie in -8 .. 7."""

GROUP = 64
"""Number of 4-bit weights that share a scale."""


def hold(network: nn.Module, weights: Weights, device: str) -> None:
    """Round the weights of linear layers and convolutions, in place; from now on the network runs under autocast.

    `bf16` changes nothing: autocast rounds these weights in every pass anyway, so the network computes the same, to the
    last bit. Integers are for layers of PyTorch's own kinds: `int8` moves each weight by at most 1/254 of the largest
    of its output. `int4` does the same, except in the linear layers of the network's blocks: there it moves most
    weights by at most 1/16 of the largest of 64, and those near the opposite of the largest by up to 1/8. Biases are
    held in bf16, everything else in fp32.

    Args:
        device: the type of the device on which the network will run.
    """
    from distmatch.training.engine import blocks

    if weights == "fp32" or getattr(network, "is_rounded", False):
        return
    in_blocks = {layer for block in blocks(network) for layer in block.modules()}
    for layer in list(network.modules()):
        if weights in ("int8", "int4") and type(layer) in _KINDS:
            # Outside of the blocks are few weights, but the first and the last layer, whose errors count most.
            _make_integers(layer, in_4_bits=weights == "int4" and type(layer) is nn.Linear and layer in in_blocks)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for name, value in layer.named_parameters(recurse=False):
                if value.dtype == torch.float32:
                    setattr(layer, name, nn.Parameter(value.detach().bfloat16(), requires_grad=False))
    network.is_rounded = True  # pyright: ignore[reportArgumentType]
    network.forward = torch.autocast(device, torch.bfloat16, cache_enabled=device != "cpu")(network.forward)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `layer` is one of PyTorch's `kind`, rounded or not, and of no class that computes otherwise."""
    return type(layer) in (kind, _KINDS.get(kind))


class _Rounded(nn.Module):
    """A layer whose weight is integers `rounded` times their `scale`. Its state has the product, in fp32.

    In 8 bits, `rounded` has the weight's shape, and each output a scale in fp32. In 4 bits, the weight is cut into
    groups of 64, mostly inputs of one output, the last one filled up with zeros: i8[groups,32] and bf16[groups,1].
    """

    rounded: Tensor
    scale: Tensor
    packed: torch.Size | None
    """In 4 bits, the weight's shape."""

    def exact(self) -> Tensor:
        """Return what the integers stand for, in fp32."""
        if self.packed is None:
            return self.rounded * self.scale
        return (_unpack(self.rounded) * self.scale.float()).flatten()[: self.packed.numel()].view(self.packed)

    @property
    def weight(self) -> Tensor:
        """The weight in bf16, made anew each time."""
        return self.exact().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.bfloat16(), self)  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.exact().cpu()


class RoundedLinear(_Rounded, nn.Linear):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def backwards(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ self.weight


class RoundedConv2d(_Rounded, nn.Conv2d):
    def product(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def backwards(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        how: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, self.weight, gradient, *how)


_KINDS: dict[type[nn.Module], Any] = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv2d}


class _Product(torch.autograd.Function):
    """A layer's output; its weight is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: RoundedLinear | RoundedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.backwards(gradient, ctx.shape), None


def _make_integers(layer: Any, in_4_bits: bool) -> None:
    """Make `layer` one of its kind's with integer weights; one that pads otherwise than with zeros stays as it is."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return
    weight = layer.weight.detach()
    rounded, scale = _to_4_bits(weight) if in_4_bits else _to_8_bits(weight)
    del layer.weight
    layer.__class__ = _KINDS[type(layer)]
    layer.packed = weight.shape if in_4_bits else None  # pyright: ignore[reportArgumentType]
    layer.register_buffer("rounded", rounded, persistent=False)
    layer.register_buffer("scale", scale, persistent=False)


def _to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers and scales; the largest weight of an output becomes 127 or -127."""
    largest = weight.abs().amax(list(range(1, weight.ndim)), keepdim=True)
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round().to(torch.int8), scale


def _to_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed integers and scales; the largest weight of a group becomes -8, by a scale of the other sign.

    So all 16 integers are used, as in GGUF's Q4_0: the rms of the error is an eighth less than with -7 .. 7. What is
    near the opposite of the largest would be 8, and becomes 7.
    """
    groups = F.pad(weight.flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (largest / -8).bfloat16()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    integers = (groups / scale.float()).round().clamp(-8, 7).to(torch.int8)
    return _pack(integers), scale


def _pack(integers: Tensor) -> Tensor:
    """Put integers i8[n,64] in -8 .. 7 two to a byte, i8[n,32]: the first half of each row into the higher bits."""
    high, low = integers.chunk(2, 1)
    return high << 4 | low & 15


def _unpack(pairs: Tensor) -> Tensor:
    """Return the integers i8[n,64] of `pairs`. A shift to the right keeps the sign."""
    return torch.cat([pairs >> 4, pairs << 4 >> 4], 1)
