"""Low-rank adapters (LoRA, arXiv 2106.09685): several networks that share one frozen set of weights.

An adapter belongs to a base network, whose layers ask in each forward pass which adapter is in use: nothing is copied
and no weight is switched on or off. The adapter in use belongs to a thread, so workers may run different ones at once.
PEFT keeps it in the layers themselves, where threads, and activations that are recomputed in the backward pass, would
find that of another network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.system.errors import UserError
from distmatch.training.rounded import is_plain


class LowRank(nn.Module):
    """`x -> scale * up(down(x))`, the update of a linear layer or of a convolution; zero at first."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            names = ("stride", "padding", "padding_mode", "dilation")
            shape: Any = {"bias": False, **{name: getattr(layer, name) for name in names}}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **shape)  # pyright: ignore[reportArgumentType]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x))

    def update(self) -> Tensor:
        """Return what it adds to its layer's weight."""
        down, up = (layer.weight.detach().float() for layer in (self.down, self.up))
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.unflatten(1, down.shape[1:])


class Adapter(nn.Module):
    """Updates of some layers of `network`, and trained copies of others, by the layers' names.

    Args:
        network: the base. It gets a hook on each of these layers, but is not a part of the adapter.
        rank: of each update; at most that of the layer's weight.
        alpha: updates are multiplied by `alpha / rank`.
        targets: names of the layers, or their ends: `to_q` is every layer whose name ends in `.to_q`. Empty: all linear
            layers and plain convolutions.
        whole: names of layers that are trained as they are.
    """

    def __init__(
        self, network: nn.Module, rank: int, alpha: float, targets: Sequence[str] = (), whole: Sequence[str] = ()
    ):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        layers = dict(network.named_modules())
        chosen = [name for name, layer in layers.items() if _adaptable(layer) and _named(name, targets)]
        unmatched = [one for one in targets if not any(_named(name, [one]) for name in chosen)]
        if unmatched or not chosen:
            raise UserError(
                f"adapter.targets {unmatched} name no linear layer or convolution of a {type(network).__name__}; "
                f"its layers are called {', '.join(sorted({n.rpartition('.')[2] for n in layers if n}))[:500]}"
            )
        self.layers = nn.ModuleDict()
        for name in chosen:
            layer: Any = layers[name]
            if name not in whole:
                self.layers[_key(name)] = LowRank(layer, min(rank, *_sides(layer)), alpha / rank)
        for name in whole:
            self.layers[_key(name)] = _copied(layers[name]).float().requires_grad_(True)
        for name in (*chosen, *whole):
            _take_adapters(layers[name], _key(name))

    def updates(self) -> dict[str, Tensor]:
        """Return `NAME.down` and `NAME.up` of each layer, f32 on the CPU, whose product is added to its weight."""
        found = {}
        for key, own in self.layers.items():
            if isinstance(own, LowRank):
                down, up = (layer.weight.detach().cpu().float() for layer in (own.down, own.up))
                found |= {f"{_name(key)}.down": down.contiguous(), f"{_name(key)}.up": own.scale * up.contiguous()}
        return found

    def update(self, name: str) -> Tensor | None:
        """Return what it adds to the weight of the layer `name`, if anything."""
        own = dict(self.layers).get(_key(name))
        return own.update() if isinstance(own, LowRank) else None

    def whole(self) -> dict[str, Tensor]:
        """Return the weights of the layers that are trained as they are, by name."""
        found = {_name(key): own for key, own in self.layers.items() if not isinstance(own, LowRank)}
        return {f"{name}.{k}": v.detach() for name, own in found.items() for k, v in own.state_dict().items()}


class Adapted(Denoiser):
    """A denoiser made of the weights of `base`, which it shares with others and does not train, and an adapter.

    Its parameters and its state are the adapter's alone. Copies share the base.
    """

    def __init__(self, base: Denoiser, adapter: Adapter):
        super().__init__(adapter, base.schedule, base.prediction)
        self._shared = [base]  # in a list, where PyTorch does not take it for a part of this module

    @property
    def base(self) -> Denoiser:
        return self._shared[0]

    @property
    def adapter(self) -> Adapter:
        adapter: Any = self.net
        return adapter

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        with with_adapter(self.adapter):
            return Denoiser.forward(self.base, x, t, cond)  # the function alone: this is no call of the base

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapted":
        return Adapted(self.base, _copied(self.adapter))

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of each weight of the network that this denoiser amounts to, on the CPU."""
        from distmatch.training.engine import whole

        own = self.adapter.whole()
        for name, value in self.base.net.state_dict().items():
            weight = whole(own[name] if name in own else value.detach()).cpu()
            update = self.adapter.update(name.removesuffix(".weight")) if name.endswith(".weight") else None
            yield name, weight if update is None else weight.float() + update.cpu()


def network_of(denoiser: Denoiser) -> nn.Module:
    """Return the network of `denoiser`, or of its base."""
    return (denoiser.base if isinstance(denoiser, Adapted) else denoiser).net


_in_use: ContextVar[Adapter | None] = ContextVar("adapter", default=None)


@contextmanager
def with_adapter(adapter: Adapter | None) -> Iterator[None]:
    """Let this thread's passes through base networks use `adapter`; with `None`, none."""
    before = _in_use.set(adapter)
    try:
        yield
    finally:
        _in_use.reset(before)


def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` so that it uses, whenever and wherever it is called, the adapter that is in use now."""
    adapter = _in_use.get()

    def run(*arguments: Any, **named: Any) -> Any:
        with with_adapter(adapter):
            return function(*arguments, **named)

    return run


def _take_adapters(layer: nn.Module, key: str) -> None:
    """Make `layer` add the update of the adapter in use, whichever it is."""
    if getattr(layer, "takes_adapters", False):
        return

    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        adapter = _in_use.get()
        if adapter is None or key not in adapter.layers:
            return None
        own = adapter.layers[key](*inputs)
        return output + own.to(output.dtype) if isinstance(adapter.layers[key], LowRank) else own

    layer.register_forward_hook(hook)
    layer.takes_adapters = True  # pyright: ignore[reportArgumentType]


def _adaptable(layer: nn.Module) -> bool:
    """A kind of its own may compute otherwise, as EDM's resampling convolutions, or use its weights without a call."""
    return is_plain(layer, nn.Linear) or (is_plain(layer, nn.Conv2d) and getattr(layer, "groups") == 1)  # noqa: B009


def _sides(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Return outputs and inputs of the layer's weight as a matrix."""
    return layer.weight.shape[0], layer.weight[0].numel()


def _named(name: str, targets: Sequence[str]) -> bool:
    return not targets or any(f".{name}".endswith(f".{target}") for target in targets)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict's keys have no dots


def _name(key: str) -> str:
    return key.replace("/", ".")


@torch.no_grad()
def _copied(module: Any) -> Any:
    """Return a deep copy without hooks."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part._forward_hooks.clear()
    return copied
