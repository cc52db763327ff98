"""Models of pixels without text: diffusers' `UNet2DModel` under DDPM and DDIM (google/ddpm-cifar10-32 and the like)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.hub import Count, Settings, config, index
from distmatch.models.diffusers.schedulers import mathematics, scheduler_of
from distmatch.models.diffusers.small import libraries
from distmatch.models.info import Info
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting

PLAIN: dict[str, tuple[Any, ...]] = {"time_embedding_type": (None, "positional"), "class_embed_type": (None,)}
"""Settings of a U-Net that change its inputs, and the values that are known here."""


class PixelUNet(nn.Module):
    """`(x f[B,C,H,W], t f[B], cond) -> f[B,C,H,W]`: diffusers' `UNet2DModel`, with `cond.label` if it has classes.

    Args:
        unet: its configuration, or diffusers' own network.
    """

    bf16_throughout: ClassVar[bool] = True

    def __init__(self, unet: Any):
        super().__init__()
        need("diffusers", by="a UNet2DModel")
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.unet: Any = unet if isinstance(unet, nn.Module) else UNet2DModel.from_config(dict(unet))
        self.unet.to(memory_format=torch.channels_last)

    @property
    def config(self) -> dict[str, Any]:
        return {"unet": {k: v for k, v in self.unet.config.items() if not k.startswith("_")}}

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        label = None if cond is None or self.unet.class_embedding is None else cond.label
        if label is None and self.unet.class_embedding is not None:
            raise UserError("this network takes classes, and has no input for images without one; use guidance 1")
        return self.unet(x, t, class_labels=label, return_dict=False)[0]


class PixelDiffusion(DiffusersFamily):
    """`DDPMPipeline` and `DDIMPipeline`. If the U-Net has classes, they are its conditions; it cannot be guided.

    Its own solver is DDIM, which clips x0 as the scheduler's settings say. The variance that some of these networks
    also predict is left out: only random samplers need it.
    """

    sampler, steps = "ddim", 50
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"pixel": PixelUNet}
    kinds: ClassVar[Mapping[str, str]] = {"unet": "UNet2DModel"}
    text, latent = False, False

    def settings(self, source: str) -> Settings:
        _, parts = index(source)
        scheduler = config(source, "scheduler_config.json", "scheduler")
        schedule, prediction = mathematics(scheduler, source)
        unet = config(source, "config.json", "unet")
        for name, known in PLAIN.items():
            if unet.get(name) not in known:
                raise UserError(f"{source}: its U-Net has {name} {unet[name]!r}; expected {known[-1]!r}")
        shape = _shape(unet, source)
        unet["out_channels"] = shape[0]
        return Settings(parts, scheduler, schedule, prediction, unet, shape, shape[1:])

    def build(self, source: str, known: Settings, network: Any) -> PixelUNet:
        whole = isinstance(network, nn.Module)
        return PixelUNet(_without_variance(network, known.shape[0]) if whole else network)

    def classes(self, source: str, known: Settings) -> tuple[str, ...]:
        return tuple(str(i) for i in range(known.network.get("num_class_embeds") or 0))

    def patch(self, network: Mapping[str, Any], source: str) -> int:
        """Return by what its levels divide a side: diffusers' network cannot restore one that they round."""
        channels = network.get("block_out_channels", (224, 448, 672, 896))  # by level; else diffusers' own
        return 2 ** (len(channels) - 1)

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_ddpm(folder)

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        need("diffusers", by="export")
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

        if info.classes:
            raise UserError(
                f"diffusers has no pipeline for a {type(student.net).__name__} with classes, so this student cannot be "
                "exported; use distmatch.DistilledPipeline"
            )
        if (theirs := self.settings(source).shape[0]) != info.shape[0]:
            raise UserError(
                f"{source} makes images of {theirs} channels, the student of {info.shape[0]}; expected the model that "
                f"it was made from, {info.source}"
            )
        # DDIMPipeline would replace the scheduler of a student of several steps.
        net: Any = student.net
        net.unet.register_to_config(sample_size=list(info.shape[1:]))  # what the pipeline makes
        return DDPMPipeline(unet=net.unet, scheduler=scheduler_of(student, info)).to(dtype=dtype)


def write_tiny_ddpm(
    folder: Path,
    *,
    classes: int | None = None,
    prediction: str = "epsilon",
    learned: bool = False,
) -> Path:
    """Write a tiny random DDPM of images 3x16x16 to `folder`; return `folder`.

    Args:
        prediction: `epsilon`, `v_prediction` or `sample`.
        learned: the network also predicts its variance, in three further channels.
    """
    diffusers, _ = libraries()
    with rng.seeded(0):
        unet = diffusers.UNet2DModel(
            sample_size=16,
            out_channels=6 if learned else 3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=classes,
        )
    variance = "learned_range" if learned else "fixed_small"
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type=variance)
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def _shape(unet: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    """Return (C, H, W) of the images."""
    side = unet.get("sample_size")
    if side is None:
        raise UserError(f"{source}: its U-Net's config.json has no sample_size; add the side of its images")
    both = side if isinstance(side, list | tuple) else (side, side)
    where = f"{source}: unet/config.json: in_channels and sample_size"
    shape = fitting((unet.get("in_channels", 3), *both), where, tuple[Count, Count, Count])
    if unet.get("out_channels", 3) not in (shape[0], 2 * shape[0]):
        raise UserError(
            f"{source}: its U-Net makes {unet.get('out_channels', 3)} channels of {shape[0]}; expected as many, or "
            "twice as many if it also predicts a variance"
        )
    return shape


def _without_variance(unet: Any, channels: int) -> Any:
    """Return the network with its first `channels` outputs alone; the others are its learned variance."""
    last = unet.conv_out
    if last.out_channels != channels:
        unet.conv_out = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        unet.conv_out.load_state_dict({name: value[:channels] for name, value in last.state_dict().items()})
        unet.register_to_config(out_channels=channels)
    return unet
