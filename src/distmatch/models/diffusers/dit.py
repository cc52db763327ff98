"""DiT (Peebles and Xie 2023, arXiv 2212.09748): a transformer on latents, conditioned on classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.models.diffusers.autoencoder import factor
from distmatch.models.diffusers.family import DiffusersFamily
from distmatch.models.diffusers.hub import Count, Settings, config, index
from distmatch.models.diffusers.schedulers import mathematics, scheduler_of
from distmatch.models.diffusers.small import libraries
from distmatch.models.info import Info
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.plain import fitting

ClassCount = Annotated[int, Field(strict=True, ge=1, le=100_000)]


class DiT(nn.Module):
    """`(x f[B,4,h,w], t f[B], cond) -> f[B,4 or 8,h,w]`: diffusers' `DiTTransformer2DModel`.

    It is conditioned on `cond.label`; without a label it uses the further class that stands for none. If it makes twice
    the channels, the second half is a variance, which `Prediction.x0` leaves out.

    Args:
        transformer: its configuration, or diffusers' own network.
    """

    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    bf16_throughout: ClassVar[bool] = True

    def __init__(self, transformer: Any):
        super().__init__()
        need("diffusers", by="DiT")
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        built = isinstance(transformer, nn.Module)
        self.transformer: Any = transformer if built else DiTTransformer2DModel.from_config(dict(transformer))

    @property
    def config(self) -> dict[str, Any]:
        return {"transformer": {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}}

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        label = None if cond is None else cond.label
        if label is None:
            label = torch.full((len(x),), self.transformer.config.num_embeds_ada_norm, device=x.device)
        return self.transformer(x, timestep=t, class_labels=label, return_dict=False)[0]


class ClassTransformer(DiffusersFamily):
    """`DiTPipeline`."""

    sampler, steps = "ddim", 50
    networks: ClassVar[Mapping[str, type[nn.Module]]] = {"dit": DiT}
    kinds: ClassVar[Mapping[str, str]] = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    network = "transformer"
    scaling = ()
    text = False

    def settings(self, source: str) -> Settings:
        _, parts = index(source)
        scheduler = config(source, "scheduler_config.json", "scheduler")
        schedule, prediction = mathematics(scheduler, source)
        net, vae = config(source, "config.json", "transformer"), config(source, "config.json", "vae")
        self.check_autoencoder(vae, source)
        where = f"{source}: transformer/config.json: in_channels and sample_size"
        channels, side = fitting((net.get("in_channels", 4), net.get("sample_size", 32)), where, tuple[Count, Count])
        made = net.get("out_channels") or channels
        if made not in (channels, 2 * channels) or channels != vae.get("latent_channels", 4):
            raise UserError(
                f"{source}: its transformer takes {channels} channels and makes {made} of latents of "
                f"{vae.get('latent_channels', 4)}; expected as many, or twice as many if it also predicts a variance"
            )
        size = side * factor(vae, source)
        return Settings(parts, scheduler, schedule, prediction, net, (channels, side, side), (size, size))

    def build(self, source: str, known: Settings, network: Any) -> DiT:
        return DiT(network)

    def classes(self, source: str, known: Settings) -> tuple[str, ...]:
        """Return their names as `model_index.json` says them, or else their numbers."""
        where = f"{source}: transformer/config.json: num_embeds_ada_norm"
        (count,) = fitting((known.network.get("num_embeds_ada_norm", 1000),), where, tuple[ClassCount])
        names = config(source, "model_index.json").get("id2label") or {}
        return tuple(str(names.get(str(number), number)) for number in range(count))

    def resized(self, denoiser: Denoiser, info: Info, size: tuple[int, int]) -> Info:
        raise UserError(f"image_size {list(size)}: diffusers' DiT makes images of one size; leave it out")

    def write_tiny(self, folder: Path) -> Path:
        return write_tiny_dit(folder)

    def student_pipeline(self, student: Denoiser, info: Info, source: str, dtype: torch.dtype) -> Any:
        theirs, net = self.settings(source), student.net
        names = self.classes(source, theirs)
        if not isinstance(net, DiT) or (theirs.shape, len(names)) != (info.shape, len(info.classes)):
            raise UserError(
                f"{source} makes latents {theirs.shape} of {len(names)} classes, the student {info.shape} of "
                f"{len(info.classes)}; expected the model that it was made from, {info.source}"
            )
        pipe = self.pipeline(source, dtype, transformer=net.transformer)
        pipe.register_modules(scheduler=scheduler_of(student, info))
        pipe.register_to_config(id2label={str(number): name for number, name in enumerate(names)})
        return pipe.to(dtype=dtype)


def write_tiny_dit(folder: Path) -> Path:
    """Write a tiny random DiT of 1000 classes to `folder`: latents 4x8x8, images 32x32."""
    diffusers, _ = libraries()
    with rng.seeded(0):
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            out_channels=8,  # four of them predict the variance
            num_layers=2,
            sample_size=8,
        )
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
            scaling_factor=0.18215,
        )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(folder)
    return folder
