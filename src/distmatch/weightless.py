"""Networks without weights, for planning: known by name or by their settings, never read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.denoiser import Denoiser, Prediction
from distmatch.errors import UserError
from distmatch.extras import need
from distmatch.losses import REGRESSIONS
from distmatch.models.codec import Decoded, Decoder
from distmatch.models.folder import Info
from distmatch.models.hub import fetched, settings
from distmatch.models.library import find_model
from distmatch.models.published import PUBLISHED
from distmatch.models.stable import StableUNet
from distmatch.perceptual import CHANNELS, LAYERS, Lpips
from distmatch.recipe_entries import Recipe
from distmatch.schedule import EDM


def teacher_of(recipe: Recipe) -> tuple[Denoiser, Info]:
    """The recipe's teacher on the meta device.

    Published checkpoints are known by name and models in diffusers' format by their settings; their weights are not
    read. Raises `UserError` where a model is not known.
    """
    scheme, _, rest = recipe.teacher.partition(":")
    if scheme not in ("edm", "diffusers"):
        denoiser, info = find_model(recipe.teacher, "teacher")
        return denoiser.to("meta"), info
    with torch.device("meta"):
        return _stable(rest) if scheme == "diffusers" else _published(recipe.teacher, Path(rest).stem)


def _published(teacher: str, name: str) -> tuple[Denoiser, Info]:
    if name not in PUBLISHED:
        raise UserError(f"teacher {teacher!r} is no published checkpoint; import it and name its folder")
    kind, arguments = PUBLISHED[name]
    net: Any = kind(**arguments)
    info = Info((3, *[net.config["img_resolution"]] * 2), tuple(map(str, range(net.config["label_dim"]))))
    return Denoiser(net, EDM(), Prediction("edm")), info


def _stable(source: str) -> tuple[Denoiser, Info]:
    known = settings(source)
    unet = known.unet
    time = unet.get("addition_time_embed_dim")
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * time if time else 0
    net = StableUNet(unet, (77, unet["cross_attention_dim"]), pooled)
    return Denoiser(net, known.schedule, Prediction(known.prediction)), Info(
        known.shape, source=source, text=True, latent=True
    )


def regression(recipe: Recipe, info: Info) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Module]]:
    """The distance of Eq. 9 by networks without weights, and these; see `build`."""
    r = recipe.regress
    loss: Any = _Lpips(r.size) if r.loss == "lpips" else REGRESSIONS[r.loss]
    networks: list[nn.Module] = [loss.vgg] if r.loss == "lpips" else []
    if r.decoder != "none":
        decoder = _Decoder(vae_of(info.source, r.tiny if r.decoder == "tiny" else None), recipe.gradient_checkpointing)
        return Decoded(loss, decoder), [*networks, decoder]
    return loss, networks


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


class _Decoder(Decoder):
    """An autoencoder's decoder without weights."""

    def __init__(self, vae: Any, checkpointing: bool):
        nn.Module.__init__(self)
        self.vae, self.checkpointing = vae, checkpointing


def vae_of(source: str, tiny: str | None = None) -> Any:
    """The decoder of the autoencoder that the model `source` comes with, or of the one called `tiny`, frozen."""
    need("diffusers", by=tiny or source)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    if tiny is not None:
        config: Any = fetched(tiny, lambda: AutoencoderTiny.load_config(tiny))
        vae: Any = AutoencoderTiny.from_config(config)
    else:
        config = fetched(source, lambda: AutoencoderKL.load_config(source, subfolder="vae"))
        vae = AutoencoderKL.from_config(config)
    del vae.encoder
    return vae.eval().requires_grad_(False)


def weights_around(info: Info) -> int:
    """How many weights `models.around` keeps beside the network: text encoders, and a decoder for previews."""
    if not (info.text or info.latent):
        return 0
    need("diffusers", "transformers", by=info.source)
    import transformers

    parts = settings(info.source).parts
    with torch.device("meta"):
        total = sum(p.numel() for p in vae_of(info.source).parameters())
        for name in (name for name in parts if name.startswith("text_encoder")):
            kind = getattr(transformers, parts[name][1])
            config = fetched(
                info.source, lambda name=name, kind=kind: kind.config_class.from_pretrained(info.source, subfolder=name)
            )
            total += sum(p.numel() for p in kind(config).parameters())
    return total
