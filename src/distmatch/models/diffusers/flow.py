"""What the families of flow-matching transformers share: network, schedule, loading and export.

Their paths are straight, `x_t = (1 - t) x0 + t eps`, and their networks predict the velocity `eps - x0`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.flow_solver import PASSED
from distmatch.diffusion.schedule import Flow
from distmatch.models.diffusers.autoencoder import factor
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.flow_schedulers import dynamic, flow_student_scheduler, own_schedule
from distmatch.models.diffusers.hub import CARD, Count, Settings, config, index, network, recorded
from distmatch.models.info import Info
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting, read_json

SIDE = 1024
"""Side of the images that pipelines make by default whose settings name none."""


class FlowTransformer(nn.Module):
    """`(x f[B,C,h,w], t f[B], cond) -> velocity f[B,C,h,w]`, by one of diffusers' transformers.

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
        need("diffusers", by="a flow-matching transformer")
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
        return self.velocity(x, t, **{name: given[name].to(x.dtype) for name in self.null})

    def velocity(self, x: Tensor, t: Tensor, text: Tensor, **extra: Tensor) -> Tensor:
        """Return the velocity; a family says how its transformer is called."""
        raise NotImplementedError


class FlowFamily(DiffusersFamily):
    """A family of flow-matching transformers with text encoders and an autoencoder."""

    network = "transformer"
    sampler = "flow"
    scaling = ("shift_factor",)
    net: ClassVar[type[FlowTransformer]]
    """Our network."""

    passes_sigmas: ClassVar[bool] = False
    """Whether its pipeline passes levels in equal steps to the scheduler, see `flow_solver.PASSED`."""

    empirical: ClassVar[int | None] = None
    """Steps for which the shift is taken, if it depends on their number, see `flow_solver.PASSED`."""

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
        if not channels == made == vae.get("latent_channels"):
            raise UserError(
                f"{source}: its transformer takes {channels} channels and makes {made} of latents of "
                f"{vae.get('latent_channels')}; models that take more than noise and text are not known here"
            )
        return channels, side, side, factor(vae, source)

    def patch(self, transformer: Mapping[str, Any]) -> int:
        """Return the side of a token, in latents."""
        return int(transformer.get("patch_size", 1))

    def tokens(self, transformer: Mapping[str, Any], shape: Sequence[int]) -> int:
        """Return the image's tokens, on which a dynamic shift depends."""
        return shape[1] * shape[2] // self.patch(transformer) ** 2

    def null_shapes(self, source: str, transformer: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a condition's tensors without their batch, as `encode` makes them."""
        raise NotImplementedError

    def settings(self, source: str) -> Settings:
        _, parts = index(source)
        transformer, vae = (config(source, "config.json", name) for name in ("transformer", "vae"))
        self.check(transformer, vae, source)
        channels, height, width, factor = self.latents(transformer, vae, source)
        shape = (channels, height, width)
        scheduler = config(source, "scheduler_config.json", "scheduler")
        schedule, scheduler = self.levels(scheduler, self.tokens(transformer, shape), source)
        return Settings(parts, scheduler, schedule, "velocity", transformer, shape, (height * factor, width * factor))

    def levels(self, scheduler: Mapping[str, Any], tokens: int, source: str) -> tuple[Flow, dict[str, Any]]:
        """Return the schedule for an image of `tokens`, and the scheduler's settings with what the pipeline passes."""
        passed: dict[str, Any] = {"sigmas": True} if self.passes_sigmas else {}
        if scheduler.get("use_dynamic_shifting"):
            passed |= dynamic(scheduler, tokens, self.empirical, source)
        return own_schedule(scheduler, passed, self.empirical, source), {**scheduler, PASSED: passed}

    def load(self, source: str) -> tuple[Denoiser, Info]:
        need("diffusers", "transformers", by=source)
        import diffusers

        source = recorded(source)
        known = self.settings(source)
        transformer = network(source, self.network, getattr(diffusers, self.net.kind))
        net = self.net(transformer, self.null_shapes(source, known.network))
        net.set_null(self.text_encoder(source).null())
        return Denoiser(net, known.schedule, Prediction(known.prediction)).eval(), _info(source, known)

    def outline(self, source: str) -> tuple[Denoiser, Info]:
        known = self.settings(source)
        with torch.device("meta"):
            net = self.net(known.network, self.null_shapes(source, known.network))
        return Denoiser(net, known.schedule, Prediction(known.prediction)), _info(source, known)

    def resized(self, denoiser: Denoiser, info: Info, size: tuple[int, int]) -> Info:
        found, transformer = super().resized(denoiser, info, size), self._own(denoiser.net).transformer.config
        if any(side % self.patch(transformer) for side in found.shape[1:]):
            raise UserError(f"image_size {list(size)}: its latents {found.shape} don't divide into patches")
        schedule, scheduler = self.levels(info.scheduler, self.tokens(transformer, found.shape), info.source)
        denoiser.schedule = schedule
        return replace(found, scheduler=scheduler)

    def example_cond(self, net: nn.Module, info: Info, n: int) -> Cond:
        made = {name: torch.empty(n, *shape) for name, shape in self._own(net).null.items()}
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
        pipe.register_modules(scheduler=scheduler)
        return pipe.to(dtype=dtype)

    def student_scheduler(self, student: Denoiser, info: Info) -> Any:
        self._own(student.net)
        if type(student.schedule) is not Flow or not info.times:
            raise UserError("the student has another schedule than a flow model has; it cannot be exported")
        return flow_student_scheduler(info.times, self.passes_sigmas)

    def _own(self, net: nn.Module) -> FlowTransformer:
        if not isinstance(net, self.net):
            raise UserError(f"the network {type(net).__name__} is not the {self.net.__name__} of this family")
        return net


class PatchedFamily(FlowFamily):
    """A family of transformers on patches of 2x2 latents, whose settings do not say how large its images are.

    They are as large as its pipeline makes them by default, `SIDE`. In a tiny model's folder, `distmatch.json` says how
    large its images are.
    """

    passes_sigmas = True

    def channels(self, transformer: Mapping[str, Any]) -> Any:
        """Return the channels of the latents."""
        raise NotImplementedError

    def latents(self, transformer: Mapping[str, Any], vae: Mapping[str, Any], source: str) -> tuple[int, int, int, int]:
        card, pixels = Path(source) / CARD, factor(vae, source)
        asked = read_json(card, dict[str, Any]).get("size", SIDE) if card.exists() else SIDE
        where = f"{source}: size in distmatch.json, and the transformer's channels"
        side, channels = fitting((asked, self.channels(transformer)), where, tuple[Count, Count])
        held = vae.get("latent_channels", vae.get("z_dim"))
        if channels != held:
            raise UserError(
                f"{source}: its transformer makes latents of {channels} channels; its autoencoder's are {held}"
            )
        if side % (2 * pixels):
            raise UserError(f"{card}: size is {side}; expected a multiple of {2 * pixels}")
        return channels, side // pixels, side // pixels, pixels

    def patch(self, transformer: Mapping[str, Any]) -> int:
        return 2


def packed(x: Tensor) -> Tensor:
    """Return latents f[B,C,h,w] as tokens f[B,N,4C], one for each patch of 2x2."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens f[B,N,4C] as latents f[B,C,h,w]: the inverse of `packed`."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def positions(rows: int, columns: int, axes: int, like: Tensor) -> Tensor:
    """Return each token's coordinates f[N,axes]: row and column in the second and third, zero in the others."""
    found = like.new_zeros(rows, columns, axes)
    found[..., 1] = torch.arange(rows, device=like.device)[:, None]
    found[..., 2] = torch.arange(columns, device=like.device)
    return found.flatten(0, 1)


def padded(states: Sequence[Tensor], length: int) -> Cond:
    """Return `text f[B,length,C]` from states f[L,C] of each text, and `extra["mask"] f[B,length]`, 1 at tokens."""
    text = torch.stack([F.pad(one, (0, 0, 0, length - len(one))) for one in states])
    mask = [F.pad(one.new_ones(len(one)), (0, length - len(one))) for one in states]
    return Cond(text=text, extra={"mask": torch.stack(mask).float()})


def lengths(mask: Tensor) -> list[int]:
    """Return the tokens of each text from `mask f[B,L]`. Plans, whose tensors have no data, replace this function."""
    return mask.sum(1).long().tolist()


def _info(source: str, known: Settings) -> Info:
    card = {"diffusers": source}
    return Info(known.shape, source=source, scheduler=known.scheduler, card=card, text=True, latent=True)
