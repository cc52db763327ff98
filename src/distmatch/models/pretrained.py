"""Stable Diffusion 1.x, 2.x and XL in diffusers' format as teachers.

Everything is read from the model's own configurations; nothing is decided by its name. Prompts are the business of
`models.text`, latents and pixels that of `models.codec`.
"""

from pathlib import Path
from typing import Any

from distmatch.denoiser import Denoiser, Prediction
from distmatch.extras import need
from distmatch.finite import check_weights
from distmatch.models.folder import Info
from distmatch.models.hub import network, settings
from distmatch.models.stable import StableUNet
from distmatch.models.text import TextEncoder


def load_stable(source: str) -> tuple[Denoiser, Info]:
    """The teacher in a folder in diffusers' format, or of a model id in the cache or on the hub.

    Raises `UserError` where it cannot be had, or is of a kind that this does not know.
    """
    need("diffusers", by=source)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if Path(source).is_dir():
        source = str(Path(source).resolve())  # students name it, wherever they are used
    known = settings(source)
    unet: Any = network(source, "unet", UNet2DConditionModel)
    check_weights(unet.state_dict(), f"{source}, unet")
    encoder = TextEncoder(source)
    null = encoder.null()
    assert null.text is not None
    pooled = null.extra.get("pooled")
    net = StableUNet(unet, (null.text.shape[1], null.text.shape[2]), 0 if pooled is None else pooled.shape[1])
    net.null_text.copy_(null.text)
    if pooled is not None:
        net.null_pooled.copy_(pooled)
    denoiser = Denoiser(net, known.schedule, Prediction(known.prediction))
    info = Info(
        known.shape,
        source=source,
        scheduler=known.scheduler,
        card={"diffusers": source},
        text=True,
        latent=True,
    )
    return denoiser.eval(), info
