"""What the families of transformers on latents that are conditioned on prompts share: network, loading and export."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.schedule import Schedule
from distmatch.models.diffusers.autoencoder import factor
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.hub import Count, Settings, config, index
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting


class PromptedTransformer(nn.Module):
    """`(x f[B,C,h,w], t f[B], cond) -> f[B,C,h,w]`: one of diffusers' transformers, conditioned on prompts.

    `cond.text f[B,L,C]` are the text encoders' states, and `cond.extra` has the family's other conditions. Without text
    the network uses its own null condition, that of the empty prompt, so that it can be guided.

    Args:
        transformer: its configuration, or diffusers' own network.
        null: shapes of the null condition's tensors without their batch: `text`, and the names in `cond.extra`.
    """

    kind: ClassVar[str]
    """The transformer's class in diffusers."""

    adapted: ClassVar[tuple[str, ...]]
    """The linear layers that get adapters."""

    main: ClassVar[str] = "transformer_blocks"
    """Its list of blocks that a GAN judges by, see `heads.feature_shapes`."""

    image_output: ClassVar[int] = 0
    """Which of the outputs of these blocks is the image's, see `engine.features`."""

    def __init__(self, transformer: Any, null: Mapping[str, Sequence[int]]):
        super().__init__()
        need("diffusers", by="a transformer in diffusers' format")
        import diffusers

        kind = getattr(diffusers, self.kind)
        self.transformer: Any = transformer if isinstance(transformer, nn.Module) else kind.from_config(transformer)
        self.null = {name: tuple(shape) for name, shape in null.items()}
        for name, shape in self.null.items():
            self.register_buffer(f"null_{name}", torch.zeros(1, *shape))

    @property
    def config(self) -> dict[str, Any]:
        known = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        return {"transformer": known, "null": {name: list(shape) for name, shape in self.null.items()}}

    @property
    def computed(self) -> tuple[str, ...]:
        """What is no weight of its own: these come from the text encoders, whose `fingerprint` counts instead."""
        return tuple(f"null_{name}" for name in self.null)

    def set_null(self, cond: Cond) -> None:
        """Take over the condition of the empty prompt: one row."""
        for name, value in {"text": cond.text, **cond.extra}.items():
            getattr(self, f"null_{name}").copy_(value)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        if cond is None or cond.text is None:
            given = {name: getattr(self, f"null_{name}").expand(len(x), *shape) for name, shape in self.null.items()}
        else:
            given = {"text": cond.text, **cond.extra}
        return self.predict(x, t, **{name: given[name].to(x.dtype) for name in self.null})

    def predict(self, x: Tensor, t: Tensor, text: Tensor, **extra: Tensor) -> Tensor:
        """Return what the network predicts; a family says how its transformer is called."""
        raise NotImplementedError


Width = Annotated[int, Field(strict=True, ge=1, le=65536)]
"""A number in a transformer's settings."""


def numbers(transformer: Mapping[str, Any], source: str, *names: str) -> tuple[int, ...]:
    """Return settings of a transformer. Raises `UserError` if one is missing or not a positive whole number."""
    found = tuple(transformer.get(name) for name in names)
    return fitting(found, f"{source}: transformer/config.json: {', '.join(names)}", tuple[Width, ...])


class PromptedFamily(DiffusersFamily):
    """A family of such transformers, with text encoders and an autoencoder."""

    network = "transformer"
    net: ClassVar[type[PromptedTransformer]]
    """Our network."""

    outputs: ClassVar[tuple[int, ...]] = (1,)
    """How many times the latents' channels the transformer may make."""

    def check(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> None:
        """Raise `UserError` for settings of transformer and autoencoder that are not followed here."""
        self.check_autoencoder(vae, source)

    def latents(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int, int]:
        """Return (C, h, w) of the latents, and the pixels per latent along a side.

        Raises `UserError` if the transformer's latents are not the autoencoder's.
        """
        where = f"{source}: transformer/config.json: in_channels and sample_size"
        given = transformer.get("in_channels"), transformer.get("sample_size")
        channels, side = fitting(given, where, tuple[Count, Count])
        made = transformer.get("out_channels") or channels
        if made not in [channels * times for times in self.outputs] or channels != vae.get("latent_channels", 4):
            raise UserError(
                f"{source}: its transformer takes {channels} channels and makes {made} of latents of "
                f"{vae.get('latent_channels', 4)}; models that take more than noise and text are not known here"
            )
        return channels, side, side, factor(vae, source)

    def patch(self, network: Mapping[str, Any], source: str) -> int:
        return numbers(network, source, "patch_size")[0]

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a condition's tensors without their batch, as `encode` makes them."""
        raise NotImplementedError

    def settings(self, source: str) -> Settings:
        _, parts = index(source)
        transformer, vae = (config(source, "config.json", name) for name in ("transformer", "vae"))
        self.check(transformer, vae, source)
        channels, height, width, factor = self.latents(transformer, vae, source)
        shape, size = (channels, height, width), (height * factor, width * factor)
        given = config(source, "scheduler_config.json", "scheduler")
        schedule, prediction, scheduler = self.diffusion(given, transformer, shape, source)
        return Settings(parts, scheduler, schedule, prediction, transformer, shape, size)

    def diffusion(
        self, scheduler: Mapping[str, Any], transformer: Mapping[str, Any], shape: Sequence[int], source: str
    ) -> tuple[Schedule, str, dict[str, Any]]:
        """Return the schedule for latents of `shape`, what the network predicts, and the scheduler's settings."""
        raise NotImplementedError

    def build(self, source: str, known: Settings, network: Any) -> PromptedTransformer:
        return self.net(network, self.null_shapes(source, known.network))

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond:
        made = {name: torch.ones(n, *shape) for name, shape in self._own(net).null.items()}  # a mask of all tokens
        return Cond(text=made.pop("text"), extra=made)

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        net, scheduler = self._own(student.net), self.student_scheduler(student, info)
        theirs = self.settings(source)
        texts = self.null_shapes(source, theirs.network)
        if (theirs.shape[0], texts) != (info.shape[0], net.null):
            raise UserError(
                f"{source} makes latents {theirs.shape} of conditions {texts}, the student {info.shape} of {net.null}; "
                f"expected the model that it was made from, {info.source}"
            )
        pipe = self.pipeline(source, dtype, transformer=net.transformer)
        self.merge_text(pipe, theirs, info)
        pipe.register_modules(scheduler=scheduler)
        return pipe.to(dtype=dtype)

    def _own(self, net: nn.Module) -> PromptedTransformer:
        if not isinstance(net, self.net):
            raise UserError(f"the network {type(net).__name__} is not the {self.net.__name__} of this family")
        return net
