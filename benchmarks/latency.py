"""Latency of one-step text-to-image at Stable Diffusion 1.5 size, part by part.

    uv run python benchmarks/latency.py --small                                          seconds on a CPU: it works
    uv run python benchmarks/latency.py --dtype bf16 --decoder tiny --rounds 100         on a GPU
    uv run python benchmarks/latency.py --dtype fp16 --compile --rounds 100
    uv run python benchmarks/latency.py --source FOLDER --dtype fp16                     a model in diffusers' format

Networks have random weights unless `--source` names a model: the arithmetic is the same. Three things are timed in
turn, and the medians given:

- the whole: one call from token ids to 8-bit pixels on the host, noise included;
- its three networks back to back on the inputs that they have in the whole, with no wait between them;
- the rest alone: the whole with the networks' answers at hand.

Outside is what the whole takes beyond the networks; the target is under 3 % of the whole on a GPU. Where a network
takes seconds it is a small difference of two large figures, and the rest alone is the sharper one. The paper's figure
(Section 4.3, Table 3) is 90 ms per 512 x 512 image at batch 1, and 20 frames per second in fp16.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Annotated, Any, Literal

import cyclopts
import torch
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distmatch.data.imaging import to_uint8
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import VP
from distmatch.evaluation.measure import hardware
from distmatch.models.diffusers.hub import fetched
from distmatch.models.diffusers.stable import StableUNet
from distmatch.recipe import subjects
from distmatch.system import progress, rng

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULE = VP(0.00085, 0.012, 1000, "scaled_linear")
FACTOR = 8  # pixels per latent, along a side
TOKENS = 77

Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Network = Callable[..., Tensor]


def main(
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    decoder: Literal["full", "tiny"] = "full",
    compile: bool = False,
    size: Annotated[int | None, Parameter(validator=Number(gte=64, modulo=64))] = None,
    batch: Positive = 1,
    rounds: Positive = 20,
    small: bool = False,
    source: str | None = None,
    device: str = "auto",
) -> None:
    """Time one image, part by part.

    Parameters
    ----------
    decoder
        The autoencoder's own, or a tiny one, which has random weights in any case.
    compile
        torch.compile the three networks; the first round takes minutes.
    size
        Side of the images in pixels, a multiple of 64: 512 unless told, 128 with --small.
    rounds
        Timed calls of each, of which the median counts.
    small
        Networks of about a hundredth of the size.
    source
        A folder or model id in diffusers' format (Stable Diffusion 1.x or 2.x) instead of random weights.
    """
    where = subjects.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cudnn.benchmark = True  # the shapes never change
    torch.manual_seed(0)
    say("making the networks")
    with where:
        text, unet, vae = loaded(source, decoder) if source else made(small, decoder)
    for network in (text, unet, vae):
        network.to(where, DTYPES[dtype]).eval().requires_grad_(False)
    vae.to(memory_format=torch.channels_last)  # StableUNet sees to the U-Net's
    if compile:
        for network in (text, unet, vae.decoder):
            network.compile()
    side = size or (128 if small else 512)
    with torch.inference_mode():
        ms = measure(text, unet, vae, (unet.config.in_channels, side // FACTOR, side // FACTOR), batch, rounds)
    settings = {"dtype": dtype, "decoder": decoder, "compile": compile, "size": side, "batch": batch, "rounds": rounds}
    console = Console()
    console.print({**hardware(where), **settings, "networks": source or ("small" if small else "random weights")})
    console.print(table(ms, {"text encoder": text, "U-Net": unet, "decoder": vae.decoder}, batch))


def measure(text: Any, unet: Any, vae: Any, shape: tuple[int, ...], batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds, a median each: of the whole, of the networks in turn, of the rest."""
    device, dtype = unet.device, unet.dtype
    ids = torch.randint(text.config.vocab_size, (batch, TOKENS), device=device)
    networks: dict[str, Network] = {
        "text": lambda ids: text(ids)[0],
        "unet": StableUNet(unet, (TOKENS, unet.config.cross_attention_dim)).to(device, dtype),
        "decode": lambda z: vae.decode(z, return_dict=False)[0],
    }

    def pipeline(text: Network, unet: Network, decode: Network) -> Callable[[Mark], None]:
        net: Any = lambda x, t, cond: unet(x.to(dtype), t, cond)  # noqa: E731  latents and arithmetic stay fp32
        student = Denoiser(net, SCHEDULE, Prediction("eps"))

        def run(mark: Mark) -> None:
            mark()
            z = rng.noise(0, range(batch), shape).to(device)  # first, for the copy waits for the stream
            latents = Steps((SCHEDULE.t_max,)).sample(student, SCHEDULE, z, Cond(text=text(ids)))
            to_uint8(decode((latents / vae.config.scaling_factor).to(dtype))).cpu()
            mark()

        return run

    asked: dict[str, tuple] = {}
    answers: dict[str, Tensor] = {}

    def kept(name: str) -> Network:
        def run(*inputs) -> Tensor:
            asked[name], answers[name] = inputs, networks[name](*inputs)
            return answers[name]

        return run

    def bare(mark: Mark) -> None:
        mark()
        for name, network in networks.items():
            network(*asked[name])
            mark()

    pipeline(**{name: kept(name) for name in networks})(lambda: None)
    rest = pipeline(**{name: lambda *_, name=name: answers[name] for name in networks})
    return timed({"whole": pipeline(**networks), "networks": bare, "rest": rest}, device, rounds)


Mark = Callable[[], None]
"""Notes the time, without waiting for the GPU."""


def timed(work: dict[str, Callable[[Mark], None]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Median milliseconds between the marks of each piece of work, taken in turn so that a slow moment hits all."""
    warm = 3 if rounds > 5 else 1
    say(f"warming up: {warm} of {warm + rounds} rounds")  # lines and no bar: drawing one would take the host's time
    laps: dict[str, list[list[float]]] = {name: [] for name in work}
    began = time.perf_counter()
    for turn in range(warm + rounds):
        if turn == warm:
            say(f"timing {rounds} rounds, at most {rounds * (time.perf_counter() - began) / warm:.0f} s")
        for name, run in work.items():
            lap = between_marks(run, device)
            if turn >= warm:
                laps[name].append(lap)
    return {name: [median(lap) for lap in zip(*rows, strict=True)] for name, rows in laps.items()}


def between_marks(run: Callable[[Mark], None], device: torch.device) -> list[float]:
    """Milliseconds by CUDA's events, or by the host's clock."""
    if device.type != "cuda":
        times: list[float] = []
        run(lambda: times.append(time.perf_counter()))
        return [1000 * (b - a) for a, b in pairwise(times)]
    events: list[torch.cuda.Event] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    torch.cuda.synchronize()
    run(mark)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def made(small: bool, decoder: str) -> tuple[Any, Any, Any]:
    """Random networks of Stable Diffusion 1.5's settings: 123, 860, and 50 (full) or 1.2 (tiny) million parameters."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers, heads = (96, 3, 6) if small else (768, 12, 12)
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128) if small else (320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,  # heads, in spite of the name
        cross_attention_dim=width,
    )
    if decoder == "tiny":
        widths = (16,) * 4 if small else (64,) * 4
        vae = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    else:
        widths = (16, 32, 64, 64) if small else (128, 256, 512, 512)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            block_out_channels=widths,  # pyright: ignore[reportArgumentType]
            layers_per_block=2,
            norm_num_groups=16 if small else 32,
        )
    return CLIPTextModel(text), unet, vae


def loaded(source: str, decoder: str) -> tuple[Any, Any, Any]:
    """The networks of a model in diffusers' format. Raises `ValueError` for what is not Stable Diffusion 1.x or 2.x."""

    def load() -> Any:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        return StableDiffusionPipeline.from_pretrained(source, safety_checker=None, requires_safety_checker=False)

    pipe = fetched(source, load)
    if pipe.unet.config.addition_embed_type is not None:
        raise ValueError(f"{source} takes more than text; expected Stable Diffusion 1.x or 2.x")
    if decoder == "full":
        return pipe.text_encoder, pipe.unet, pipe.vae
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    return pipe.text_encoder, pipe.unet, AutoencoderTiny()


def table(ms: dict[str, list[float]], networks: dict[str, nn.Module], batch: int) -> Table:
    (whole,), (rest,) = ms["whole"], ms["rest"]
    outside = whole - sum(ms["networks"])
    out = Table("part", "parameters", "ms", "share", "to compare")
    for (name, network), value in zip(networks.items(), ms["networks"], strict=True):
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        out.add_row(name, f"{millions:.1f} M", f"{value:.2f}", f"{value / whole:.1%}")
    out.add_row("outside", "", f"{outside:.2f}", f"{outside / whole:.1%}", "target under 3 % on a GPU")
    out.add_row("whole", "", f"{whole:.2f}", "", "paper 90 ms at 512 x 512, batch 1, A100-class")
    out.add_row("the rest alone", "", f"{rest:.2f}", f"{rest / whole:.1%}", end_section=True)
    out.add_row("images per second", "", f"{1000 * batch / whole:.2f}", "", "paper 20 in fp16")
    return out


def say(text: str) -> None:
    progress.console.print(text, highlight=False)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
