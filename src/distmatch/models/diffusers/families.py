"""The families of teachers in diffusers' format, by the class in their `model_index.json`: one line each."""

import re
from pathlib import Path

from torch import nn

from distmatch.models.diffusers.ddpm import PixelDiffusion
from distmatch.models.diffusers.dit import ClassTransformer
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.flux import Flux
from distmatch.models.diffusers.flux2 import Flux2Klein
from distmatch.models.diffusers.hub import MODEL_ID, index, place
from distmatch.models.diffusers.pixart import PixArt, PixArtSigma
from distmatch.models.diffusers.qwen_image import QwenImage
from distmatch.models.diffusers.sana import Sana
from distmatch.models.diffusers.sd3 import StableDiffusion3
from distmatch.models.diffusers.stable import StableDiffusion, StableDiffusionXL
from distmatch.models.diffusers.z_image import ZImage
from distmatch.system.errors import UserError

FAMILIES: dict[str, DiffusersFamily] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "DDPMPipeline": PixelDiffusion(),
    "DDIMPipeline": PixelDiffusion(),
    "DiTPipeline": ClassTransformer(),
    "PixArtAlphaPipeline": PixArt(),
    "PixArtSigmaPipeline": PixArtSigma(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "SanaPipeline": Sana(),
    "ZImagePipeline": ZImage(),
    "QwenImagePipeline": QwenImage(),
    "FluxPipeline": Flux(),
    "Flux2KleinPipeline": Flux2Klein(),
}

NETWORKS: dict[str, type[nn.Module]] = {
    name: network for family in FAMILIES.values() for name, network in family.networks.items()
}
"""Their networks, by their names in model folders."""


def family_in(source: str) -> DiffusersFamily:
    """Return the family of the model `source`: a folder in diffusers' format, a single file or a model id.

    Raises `UserError` if there is no such model, or if its class is not in `FAMILIES`.
    """
    if not Path(place(source)).is_dir() and not re.fullmatch(MODEL_ID, source):  # or a hub would be asked for it
        raise UserError(
            f"diffusers model {source!r} cannot be loaded: {source!r} is neither a folder here nor a model id, "
            "OWNER/NAME. Give a folder in diffusers' format, a .safetensors file, or the name of a model on "
            "Hugging Face"
        )
    kind = index(source)[0]
    if kind not in FAMILIES:
        raise UserError(f"{source} is a {kind}; expected {' or '.join(FAMILIES)}")
    return FAMILIES[kind]
