"""The frozen networks of a recipe's losses without their weights, for planning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.diffusion.losses import REGRESSIONS
from distmatch.models.diffusers.autoencoder import Decoded, tiny_decoder
from distmatch.models.diffusers.hub import without_weights
from distmatch.models.info import Info
from distmatch.models.library import family_of
from distmatch.models.perceptual import CHANNELS, LAYERS, Lpips
from distmatch.recipe.entries import Recipe
from distmatch.recipe.objectives import check_latents
from distmatch.system.extras import need


def regression(recipe: Recipe, info: Info) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Module]]:
    """Return the distance of Eq. 9, computed by networks without weights, and these networks; see `objectives`."""
    r = recipe.regress
    loss: Any = _Lpips(r.size) if r.loss == "lpips" else REGRESSIONS[r.loss]
    networks: list[nn.Module] = [loss.vgg] if r.loss == "lpips" else []
    if r.decoder == "none":
        return loss, networks
    check_latents(recipe, info)
    if r.decoder == "tiny":
        decoder: Any = tiny_decoder(without_weights(r.tiny), recipe.gradient_checkpointing, weights=False)
    else:
        decoder = family_of(info).decoder(info.source, recipe.gradient_checkpointing, weights=False)
    check_latents(recipe, info, decoder.channels)
    return Decoded(loss, decoder), [*networks, decoder]


class _Lpips(Lpips):
    """LPIPS without weights."""

    def __init__(self, size: int):
        need("piq", "torchvision", by="LPIPS")
        from piq.perceptual import VGG16_LAYERS, ContentLoss
        from torchvision.models import vgg16

        self.size = size
        linear: list[Any] = [torch.empty(1, channels, 1, 1) for channels in CHANNELS]
        layers = [VGG16_LAYERS[name] for name in LAYERS]
        self.vgg = ContentLoss(vgg16().features.eval(), layers, linear, replace_pooling=True)
