"""What the families in diffusers' format share: encoders and an autoencoder beside the network, and a pipeline."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.diffusers import hub
from distmatch.models.diffusers.autoencoder import Decoder, check_scaling
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.text import TextEncoder
from distmatch.models.family import Components, Family
from distmatch.models.info import Info
from distmatch.system.extras import need


class DiffusersFamily(Family):
    """A class of pipelines in diffusers. One of its own is a subclass in a file, and a line in `families`.

    `source` is a folder in diffusers' format, or the id of a model in the cache or on the hub.
    """

    networks: ClassVar[Mapping[str, type[nn.Module]]]
    """Our networks for it, by the names that they have in model folders."""

    kinds: ClassVar[Mapping[str, str]]
    """The classes in diffusers of its networks, by part; text encoders are of those that the model names."""

    untouched: ClassVar[Mapping[str, Any]] = {}
    """The arguments with which its pipeline leaves finished images as they are."""

    def settings(self, source: str) -> Settings:
        """What the model's files say of it.

        Raises `UserError` for what changes the mathematics and is not followed here; no weight is read.
        """
        raise NotImplementedError

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """The condition of `prompts` by the encoders of `pipe`; `negative`: as the `uncond` of guidance."""
        raise NotImplementedError

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        """The pipeline of `source` with the student in it, whose one step is the student's.

        Raises `UserError` for a student that is not of this family, or of another model than `source`.
        """
        raise NotImplementedError

    def student_lora(self, student: Denoiser, info: Info) -> tuple[dict[str, Any], Any]:
        """The student's adapters as the pipeline's `save_lora_weights` takes them, and its scheduler.

        Raises `UserError` for a student without adapters, or which is more than they can carry.
        """
        raise NotImplementedError

    def pipeline(self, source: str, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """diffusers' pipeline of the model; see `hub.pipeline`. What `settings` refuses is refused."""
        return hub.pipeline(source, self.settings(source).parts, self.kinds, dtype, **parts)

    def text_encoder(self, source: str, device: torch.device | str = "cpu") -> TextEncoder:
        """The model's own text encoders, in fp32 as the networks that conditions go into."""
        known = self.settings(source)
        absent: dict[str, Any] = dict.fromkeys(
            name for name in known.parts if not name.startswith(("text_encoder", "tokenizer", "scheduler"))
        )
        pipe = self.pipeline(source, **absent)
        return TextEncoder(pipe.to(torch.device(device)), partial(self.encode, known))

    def components(self, source: str, device: torch.device | str = "cpu") -> Components:
        return Components(self.text_encoder(source, device), self.decoder(source).to(device))

    def component_weights(self, source: str) -> int:
        need("diffusers", "transformers", by=source)
        import transformers

        parts = self.settings(source).parts
        encoders = {name: kind for name, (_, kind) in parts.items() if name.startswith("text_encoder")}
        with torch.device("meta"):
            networks = [hub.outline(source, name, getattr(transformers, kind)) for name, kind in encoders.items()]
            networks.append(self.decoder(source, weights=False))
        return sum(p.numel() for network in networks for p in network.parameters())

    def decoder(self, source: str, checkpointing: bool = False, weights: bool = True) -> Decoder:
        need("diffusers", by=source)
        import diffusers

        vae = (hub.network if weights else hub.outline)(source, "vae", getattr(diffusers, self.kinds["vae"]))
        check_scaling(vae.config, source, means=True)
        return Decoder(vae, checkpointing)
