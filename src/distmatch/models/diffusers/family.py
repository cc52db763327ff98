"""The base of all families in diffusers' format: text encoders, an autoencoder and a pipeline, where it has them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.models.diffusers import distilled, hub
from distmatch.models.diffusers.autoencoder import Decoder, ImageEncoder, check_scaling
from distmatch.models.diffusers.hub import Settings
from distmatch.models.diffusers.teacher_lora import merge_lora, read_lora, takes_lora
from distmatch.models.diffusers.text import TextEncoder
from distmatch.models.family import Components, Family
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.extras import need


class DiffusersFamily(Family):
    """A class of pipelines in diffusers. To add your own, write a subclass in a file and a line in `families`.

    `source` is a folder in diffusers' format, or the id of a model in the cache or on the hub.
    """

    networks: ClassVar[Mapping[str, type[nn.Module]]]
    """Our networks for this family, by their names in model folders."""

    kinds: ClassVar[Mapping[str, str]]
    """The diffusers classes of its networks, by part; the model itself names those of its text encoders."""

    network: ClassVar[str] = "unet"
    """The part that is the denoising network."""

    text, latent = True, True
    """Whether it makes images from prompts; whether of latents. See `Info`."""

    scaling: ClassVar[tuple[str, ...]] = ("latents_mean", "latents_std")
    """Settings of its autoencoder, beside `scaling_factor`, by which its pipeline scales latents."""

    plain: ClassVar[str] = "guidance_scale=1"
    """The argument with which its pipeline does not guide, as students must be sampled."""

    limits: ClassVar[Mapping[str, int]] = {}
    """Longest texts in tokens, by tokenizer; default: what each tokenizer says itself."""

    untouched: ClassVar[Mapping[str, Any]] = {}
    """Pipeline arguments that leave finished images unchanged."""

    def build(self, source: str, known: Settings, network: Any) -> Any:
        """Return our network around `network`: its configuration, or diffusers' own network.

        Networks of families of `text` have a method `set_null`, see `PromptedTransformer`.
        """
        raise NotImplementedError

    def info(self, source: str, known: Settings) -> Info:
        """Return what is stored about the model."""
        return Info(
            known.shape,
            self.classes(source, known),
            source=source,
            scheduler=known.scheduler,
            card={"diffusers": source},
            text=self.text,
            latent=self.latent,
        )

    def classes(self, source: str, known: Settings) -> tuple[str, ...]:
        """Return the names of its classes."""
        return ()

    def settings(self, source: str) -> Settings:
        """Return the settings in the model's files, without reading weights.

        Raises `UserError` for settings that change the mathematics in ways that are not supported here.
        """
        raise NotImplementedError

    def write_tiny(self, folder: Path) -> Path:
        """Write a tiny random model of this family to `folder`, for `--scale cpu-smoke`; return `folder`."""
        raise NotImplementedError

    def encode(self, known: Settings, pipe: Any, prompts: list[str], negative: bool) -> Cond:
        """Return the condition of `prompts` by the encoders of `pipe`; `negative`: as the `uncond` of guidance.

        Only for families of `text`.
        """
        raise NotImplementedError

    def way_of_encoding(self, known: Settings) -> str:
        """Return what determines conditions besides encoders and tokenizers, for the fingerprint of cached ones."""
        return type(self).__name__

    def load(self, source: str) -> tuple[Denoiser, Info]:
        need("diffusers", *(["transformers"] if self.text else []), by=source)
        import diffusers

        source = hub.recorded(source)
        known, kind = self.settings(source), getattr(diffusers, self.kinds[self.network])
        net = self.build(source, known, hub.network(source, self.network, kind))
        if self.text:
            net.set_null(self.text_encoder(source).null())
        return Denoiser(net, known.schedule, Prediction(known.prediction)).eval(), self.info(source, known)

    def outline(self, source: str) -> tuple[Denoiser, Info]:
        known = self.settings(source)
        with torch.device("meta"):
            net = self.build(source, known, known.network)
        return Denoiser(net, known.schedule, Prediction(known.prediction)), self.info(source, known)

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        """Return the pipeline of `source` with the student in it, whose scheduler takes the student's steps.

        Raises `UserError` for a student of another family, or of another model than `source`.
        """
        raise NotImplementedError

    def student_scheduler(self, student: Denoiser, info: Info) -> Any:
        """Return a scheduler whose single step is the student's, for the teacher's pipeline with its adapters.

        Raises `UserError` for a student that adapters alone do not make, and if the pipeline takes none.
        """
        raise UserError(f"diffusers' pipeline of {info.source} takes no adapters; use `distmatch export diffusers`")

    def pipeline(self, source: str, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """Return diffusers' pipeline of the model; see `hub.pipeline`. Refuses what `settings` refuses."""
        return hub.pipeline(source, self.settings(source).parts, self.kinds, dtype, **parts)

    def text_encoder(
        self,
        source: str,
        device: torch.device | str = "cpu",
        info: Info | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> TextEncoder:
        """Return the model's own text encoders.

        Args:
            info: if it is used at another size than its own, or with a LoRA.
            precision: of weights and arithmetic; the conditions are in fp32, like the networks that use them.
        """
        known = self.settings(source)
        absent: dict[str, Any] = dict.fromkeys(
            name for name in known.parts if not name.startswith(("text_encoder", "tokenizer", "scheduler"))
        )
        pipe = self.pipeline(source, **absent)
        if info is not None:
            known = known.of_shape(info.shape)
            self.merge_text(pipe, known, info)
        way = self.way_of_encoding(known)
        if precision == "bf16":  # before it takes room on the device
            way, pipe = f"{way} in bf16", pipe.to(torch.bfloat16)
        return TextEncoder(pipe.to(torch.device(device)), partial(self.encode, known), self.limits, way)

    def components(
        self, info: Info, device: torch.device | str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
    ) -> Components:
        parts: dict[str, Any] = {}
        if self.text:
            parts["encode"] = self.text_encoder(info.source, device, info, precision)
        if self.latent:
            parts["decode"] = self.decoder(info.source).to(device)
        return Components(**parts)

    def resized(self, denoiser: Denoiser, info: Info, size: tuple[int, int]) -> Info:
        known = self.settings(info.source)
        pixels, step = known.pixels, known.pixels * self.patch(known.network, info.source)
        if any(side % step for side in size):
            raise UserError(f"image_size {list(size)}: expected multiples of {step} pixels")
        # The network's own `sample_size` stays: positions in transformers are relative to it.
        return replace(info, shape=(info.shape[0], size[0] // pixels, size[1] // pixels))

    def patch(self, network: Mapping[str, Any], source: str) -> int:
        """Return the side of what the network, with these settings, takes as one: in latents."""
        return 1

    def merged(self, denoiser: Denoiser, info: Info, file: str, scale: float) -> Info:
        kind, known = hub.index(info.source)[0], self.settings(info.source)
        if not takes_lora(kind):
            return super().merged(denoiser, info, file, scale)
        net: Any = denoiser.net
        network = getattr(net, self.network)
        lora = read_lora(file, scale, kind, known.network)
        info = replace(info, lora=lora)
        if not next(network.parameters()).is_meta:
            absent: dict[str, Any] = {name: None for name in known.parts if name not in (self.network, "scheduler")}
            pipe = self.pipeline(info.source, **(absent | {self.network: network}))
            merge_lora(pipe, lora, known.network, text=False)
            if lora.text:
                net.set_null(self.text_encoder(info.source, info=info).null())
        return info

    def merge_text(self, pipe: Any, known: Settings, info: Info) -> None:
        """Merge the LoRA of the model `info`, if it has one, into the text encoders of `pipe`, in place."""
        if info.lora is not None and info.lora.text:
            merge_lora(pipe, info.lora, known.network, text=True)

    def distilled(self, source: str, lora: str = "") -> str | None:
        return distilled.evidence(source, self.network, lora)

    def encoders(self, source: str) -> list[nn.Module]:
        need("diffusers", "transformers", by=source)
        import transformers

        parts = self.settings(source).parts
        kinds = {name: kind for name, (_, kind) in parts.items() if name.startswith("text_encoder")}
        with torch.device("meta"):
            return [hub.outline(source, name, getattr(transformers, kind)) for name, kind in kinds.items()]

    def component_weights(self, source: str) -> int:
        networks = self.encoders(source)
        if self.latent:
            with torch.device("meta"):
                networks.append(self.decoder(source, weights=False))
        return sum(p.numel() for network in networks for p in network.parameters())

    def decoder(self, source: str, checkpointing: bool = False, weights: bool = True) -> nn.Module:
        return Decoder(self._autoencoder(source, weights), checkpointing) if self.latent else super().decoder(source)

    def image_encoder(self, source: str) -> Callable[..., Tensor]:
        return ImageEncoder(self._autoencoder(source)) if self.latent else super().image_encoder(source)

    def check_autoencoder(self, vae: Mapping[str, Any], source: str) -> None:
        """Raise `UserError` unless the settings `vae` are of this family's autoencoder, and scale as its pipeline."""
        kind = self.kinds["vae"]
        if vae.get("_class_name") != kind:
            raise UserError(f"{source}: its autoencoder is a {vae.get('_class_name')}; expected {kind}")
        check_scaling(vae, source, self.scaling)

    def _autoencoder(self, source: str, weights: bool = True) -> Any:
        need("diffusers", by=source)
        import diffusers

        vae = (hub.network if weights else hub.outline)(source, "vae", getattr(diffusers, self.kinds["vae"]))
        check_scaling(vae.config, source, self.scaling)
        return vae
