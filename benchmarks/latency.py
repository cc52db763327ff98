"""Latency of one-step text-to-image at Stable Diffusion 1.5 size, part by part.

    uv run python benchmarks/latency.py --small                                    seconds on a CPU: that it works
    uv run python benchmarks/latency.py --dtype bf16 --compile --decoder tiny      on a GPU
    uv run python benchmarks/latency.py --source runs/my-export --dtype fp16       a model in diffusers' format

Networks have random weights unless `--source` names a model: the arithmetic is the same. The text encoder, the U-Net
and the decoder are timed in turn with the whole, which is from token ids to 8-bit pixels on the host; medians. What the
whole takes beyond the three networks is the share outside, of which the target is under 3 % on a GPU. The paper's
figure (Section 4.3, Table 3) is 90 ms per 512 x 512 image at batch 1, 20 frames per second in fp16.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import cyclopts
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distmatch.data import to_uint8
from distmatch.denoiser import Cond, Denoiser, Prediction
from distmatch.evaluation import hardware
from distmatch.models.stable import StableUNet
from distmatch.sampler import one_step
from distmatch.schedule import VP

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    decoder: Literal["full", "tiny"] = "full",
    compile: bool = False,
    size: int = 512,
    batch: int = 1,
    rounds: int = 20,
    small: bool = False,
    source: str | None = None,
    device: str = "auto",
) -> None:
    """Time one image, part by part.

    Parameters
    ----------
    compile
        torch.compile the three networks.
    size
        Side of the images in pixels.
    small
        Networks of a hundredth of the size.
    source
        A model in diffusers' format instead of random weights.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    text, unet, vae = loaded(source, decoder) if source else made(small, decoder)
    for network in (text, unet, vae):
        network.to(where, DTYPES[dtype]).eval().requires_grad_(False)
    unet, vae = unet.to(memory_format=torch.channels_last), vae.to(memory_format=torch.channels_last)
    run = Parts(text, unet, vae, compile, size, batch, where, DTYPES[dtype])
    with torch.inference_mode():
        seconds = timed({"whole": run.whole, **run.parts()}, where, rounds)
    report(seconds, {**hardware(where), "dtype": dtype, "decoder": decoder, "compile": compile, "size": size}, batch)


class Parts:
    """The one-step pipeline and its three networks alone, on the same inputs."""

    def __init__(self, text: Any, unet: Any, vae: Any, compiled: bool, size: int, batch: int, device, dtype):
        self.factor = 2 ** (len(vae.config.get("block_out_channels", [0] * 4)) - 1)
        shape = (batch, unet.config.in_channels, size // self.factor, size // self.factor)
        self.ids = torch.randint(0, text.config.vocab_size, (batch, 77), device=device)
        self.z, self.t = torch.randn(shape, device=device), torch.full((batch,), 999.0, device=device)
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda f: f
        self.text, self.decode = wrap(lambda ids: text(ids)[0]), wrap(lambda z: vae.decode(z, return_dict=False)[0])
        self.scale, self.dtype = vae.config.scaling_factor, dtype
        net = StableUNet(unet, (77, unet.config.cross_attention_dim)).to(device, dtype)
        net.unet.forward = wrap(net.unet.forward)
        self.student = Denoiser(InDtype(net, dtype), VP(0.00085, 0.012, 1000, "scaled_linear"), Prediction("eps"))

    def whole(self) -> Tensor:
        """Token ids and noise to pixels on the host: what a caller waits for."""
        cond = Cond(text=self.text(self.ids))
        latents = one_step(self.student, self.student.schedule, self.z, cond)
        return to_uint8(self.decode((latents / self.scale).to(self.dtype)).float()).cpu()

    def parts(self) -> dict[str, Callable[[], Any]]:
        cond = Cond(text=self.text(self.ids))
        latents = self.z.to(self.dtype, memory_format=torch.channels_last)  # as the U-Net returns them
        return {
            "text encoder": lambda: self.text(self.ids),
            "U-Net": lambda: self.student.net.net(latents, self.t, cond),  # pyright: ignore[reportCallIssue]
            "decoder": lambda: self.decode(latents),
        }


class InDtype(nn.Module):
    """A network in low precision between fp32 latents: the preconditioning around it stays fp32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        return self.net(x.to(self.dtype), t, cond)


def made(small: bool, decoder: str) -> tuple[Any, Any, Any]:
    """Random networks of Stable Diffusion 1.5's settings: 123 M, 860 M and 50 M (full) or 1.2 M (tiny) parameters."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shrink = 10 if small else 1
    text = CLIPTextConfig(
        hidden_size=768 // 4 if small else 768,
        intermediate_size=3072 // shrink,
        num_hidden_layers=12 // (4 if small else 1),
        num_attention_heads=12,
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 128, 128) if small else (320, 640, 1280, 1280),
        cross_attention_dim=text.hidden_size,
        attention_head_dim=8,
    )
    widths = (16, 32, 64, 64) if small else (128, 256, 512, 512)
    full = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=2,
        norm_num_groups=16 if small else 32,
    )
    return CLIPTextModel(text), unet, full if decoder == "full" else AutoencoderTiny()


def loaded(source: str, decoder: str) -> tuple[Any, Any, Any]:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(source)
    return pipe.text_encoder, pipe.unet, pipe.vae if decoder == "full" else AutoencoderTiny()


def timed(work: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work, taken in turn, after three rounds that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 3):
        for name, run in work.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def report(seconds: dict[str, float], settings: dict[str, Any], batch: int) -> None:
    whole = seconds.pop("whole")
    rows = {**seconds, "outside": whole - sum(seconds.values())}
    table = Table("part", "ms", "share")
    for name, value in rows.items():
        table.add_row(name, f"{1000 * value:.2f}", f"{value / whole:.1%}")
    table.add_row("whole", f"{1000 * whole:.2f}", "")
    console = Console()
    console.print(settings)
    console.print(table)
    console.print(
        f"{batch / whole:.2f} images/s at batch {batch}; outside of the networks {rows['outside'] / whole:.1%}"
    )
    console.print(
        "target outside: under 3 % on a GPU; the paper: 90 ms per image on an A100-class card, 20 FPS in fp16"
    )


if __name__ == "__main__":
    cyclopts.run(main)
