"""Frozen weights in fewer bits, for bases that adapters share: bf16, or 8-bit integers with a scale per output.

Integers are made bf16 weights in each pass, forward and backward, and let go: unlike torchao's layers, whose products
leave these weights to autograd until the backward pass, which undoes the saving.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Weights = Literal["fp32", "bf16", "int8"]

LARGEST = 127
"""Of the integers, which lie in -127 .. 127."""


def hold(network: nn.Module, weights: Weights, device: str) -> None:
    """Round the weights of linear layers and convolutions, in place; from now on the network runs under autocast.

    `bf16` changes nothing: autocast rounds these weights in every pass anyway, so the network computes the same, to the
    last bit. `int8` moves each weight by at most 1/254 of the largest of its output, in layers of PyTorch's own kinds.
    Biases are held in bf16, everything else in fp32.

    Args:
        device: the type of the device on which the network will run.
    """
    if weights == "fp32" or getattr(network, "is_rounded", False):
        return
    for layer in list(network.modules()):
        if weights == "int8" and type(layer) in _KINDS:
            _make_int8(layer)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for name, value in layer.named_parameters(recurse=False):
                if value.dtype == torch.float32:
                    setattr(layer, name, nn.Parameter(value.detach().bfloat16(), requires_grad=False))
    network.is_rounded = True  # pyright: ignore[reportArgumentType]
    network.forward = torch.autocast(device, torch.bfloat16, cache_enabled=device != "cpu")(network.forward)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `layer` is one of PyTorch's `kind`, rounded or not, and of no class that computes otherwise."""
    return type(layer) in (kind, _KINDS.get(kind))


class _Int8(nn.Module):
    """A layer whose weight is integers `rounded` times a `scale` per output. Its state has the product, in fp32."""

    rounded: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in bf16, made anew each time."""
        return (self.rounded * self.scale).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.bfloat16(), self)  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = (self.rounded * self.scale).cpu()


class Int8Linear(_Int8, nn.Linear):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def backwards(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ self.weight


class Int8Conv2d(_Int8, nn.Conv2d):
    def product(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def backwards(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        how: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, self.weight, gradient, *how)


_KINDS: dict[type[nn.Module], Any] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}


class _Product(torch.autograd.Function):
    """A layer's output; its weight is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear | Int8Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.backwards(gradient, ctx.shape), None


def _make_int8(layer: Any) -> None:
    """Make `layer` one of its kind's with integer weights; one that pads otherwise than with zeros stays as it is."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return
    weight = layer.weight.detach()
    largest = weight.abs().amax(list(range(1, weight.ndim)), keepdim=True)
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    del layer.weight
    layer.__class__ = _KINDS[type(layer)]
    layer.register_buffer("rounded", (weight / scale).round().to(torch.int8), persistent=False)
    layer.register_buffer("scale", scale, persistent=False)
