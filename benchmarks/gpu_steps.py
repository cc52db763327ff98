"""The rate of the card, and of training steps at full size with random weights. Parts of `gpu.py`."""

import gc
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import latency
import torch
from gpu_job import NEEDS_GPU, Figures, Job, Target
from step import bare, ready, timed
from step import step as stepping

from distmatch.methods.distill import Distiller
from distmatch.models.diffusers.tiny import clip_config, write_tiny_sd, write_tiny_vae
from distmatch.models.library import outline
from distmatch.planning.cost import cost
from distmatch.recipe import build, subjects
from distmatch.recipe.entries import Recipe
from distmatch.training.engine import compile_blocks
from distmatch.training.gradients import Adder

PRODUCTS = 10
"""Matrix products between two looks at the clock."""

HALVINGS = 3
"""How often the batch may be halved to fit the card."""

COMPILED_AT_LEAST = 120.0
"""Seconds that must be left to begin compiling."""

TARGETS: dict[str, Target] = {
    "step / bare passes": ("at most", 1.05),
    "peak / plan": ("within 10 % of", 1.0),
}


def matrix(job: Job) -> None:
    """What the card really reaches: a large product, in each of the precisions that a step may use."""
    kinds = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
    for name, (dtype, tf32) in kinds.items():
        job.measure(name, lambda d=dtype, t=tf32: product(job, d, t), gpu=tf32)


def product(job: Job, dtype: torch.dtype, tf32: bool) -> Figures:
    side = 64 if job.tiny else 8192
    a, b = (torch.randn(side, side, device=job.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    seconds = median(timed({"product": run}, job.device, 6)["product"])
    torch.set_float32_matmul_precision("highest")
    return {"TFLOP/s": tera(PRODUCTS * 2 * side**3, seconds)}


def tera(flops: float, seconds: float) -> float:
    return flops / seconds / 1e12


def step_sd15(job: Job) -> None:
    """The paper's 32 + 16 images per GPU, with LPIPS through a tiny decoder and recomputed activations."""
    folder = stable(job)
    overrides = [f"teacher=diffusers:{folder}", f"prompts.path={folder / 'prompts.txt'}", "prompts.column=null"]
    overrides += [f"regress.tiny={folder / 'taesd'}", "pairs.precision=bf16"]
    if job.tiny:
        overrides += ["regress.loss=mse", "regress.decoder=none", "pairs.precision=fp32", "precision=fp32"]
    batches = (2, 2) if job.tiny else (32, 16)
    steps(job, "sd15-laion-6.25", overrides, batches, {**TARGETS, "share of the matrix rate": ("at least", 0.4)})


def step_imagenet64(job: Job) -> None:
    small = ["regress.loss=mse", "precision=fp32"] if job.tiny else []
    steps(job, "imagenet64-cond", small, (2, 2) if job.tiny else (24, 24), TARGETS)


def step_cifar10(job: Job) -> None:
    small = ["regress.loss=mse"] if job.tiny else []
    steps(job, "cifar10-cond", small, (2, 2) if job.tiny else (56, 56), TARGETS)


def step_sdxl_lora(job: Job) -> None:
    """SDXL at 1024 x 1024 by adapters: 8 images in one part, as in each of the recipe's two.

    The U-Net has its full size, the text encoders, which wait in the host's memory, two layers.
    """
    job.measure("8 images, rank 64", lambda: lora(job), {"peak / plan": ("within 10 % of", 1.0)})


def lora(job: Job) -> Figures:
    folder = job.work / "sdxl"
    if not (folder / "prompts.txt").exists():
        write_tiny_sd(folder, kind="sdxl")
        if not job.tiny:
            write_sdxl_unet(folder, job.device)
        (folder / "prompts.txt").write_text("".join(f"a picture of {i} things\n" for i in range(64)))
    overrides = [f"teacher=diffusers:{folder}", f"prompts.path={folder / 'prompts.txt'}", "accumulate=1"]
    overrides += ["precision=fp32", "base_weights=fp32", "offload=false"] if job.tiny else []
    made = Steps(job, "sdxl-lora-4step", overrides, (2, 2) if job.tiny else (8, 8))
    planned = cost(made.recipe, *outline(made.recipe.teacher))
    peaks, seconds = [], []
    for _ in range(2 if job.tiny else 4):
        began = time.perf_counter()
        peaks.append(peak_bytes(made.step, job))
        seconds.append(time.perf_counter() - began)
    peak = None if peaks[0] is None else max(peak for peak in peaks if peak is not None)
    return {
        "images": made.recipe.match.batch,
        "s per step, mean": sum(seconds) / len(seconds),
        "s per step, longest": max(seconds),
        "TFLOP/s": tera(planned.step_flops, sum(seconds) / len(seconds)),
        "peak GB": NEEDS_GPU if peak is None else peak / 1e9,
        "peak / plan": NEEDS_GPU if peak is None else peak / planned.peak,
    }


def write_sdxl_unet(folder: Path, device: torch.device) -> None:
    """Replace the tiny pipeline's U-Net by one of SDXL's size, 2.6 billion random weights, and widen its encoders."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            unet = UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
                attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]  # heads, in spite of the name
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=6 * 256 + 1280,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    unet.save_pretrained(folder / "unet")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    CLIPTextModel(clip_config(tokenizer, 768)).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(clip_config(tokenizer, 1280)).save_pretrained(folder / "text_encoder_2")


def stable(job: Job) -> Path:
    """A model in diffusers' format with the sizes of Stable Diffusion 1.5, random weights, and its tiny decoder."""
    folder = job.work / "stable"
    if (folder / "prompts.txt").exists():
        return folder
    write_tiny_sd(folder)  # for its tokenizer and scheduler
    if job.tiny:
        write_tiny_vae(folder / "taesd")
    else:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        with job.device:
            text, unet, vae = latency.made(small=False, decoder="full")
            taesd = AutoencoderTiny()
        unet.register_to_config(sample_size=64)
        for name, network in {"text_encoder": text, "unet": unet, "vae": vae}.items():
            network.save_pretrained(folder / name)
        taesd.save_pretrained(folder / "taesd")
    (folder / "prompts.txt").write_text("".join(f"a picture of {i} things\n" for i in range(64)))
    return folder


def steps(job: Job, name: str, overrides: list[str], batches: tuple[int, int], targets: dict[str, Target]) -> None:
    """Steps of a recipe as it is, then by CUDA graphs, then with compiled blocks.

    Compiling takes more than two minutes at Stable Diffusion's size, so it comes last.
    """
    made = cache(lambda: Steps(job, name, overrides, batches))
    job.measure("eager", lambda: made().figures(), targets)
    job.measure("cuda_graphs=true", lambda: made().recorded(), gpu=True)
    job.measure("compiled", lambda: made().compiled(), targets, gpu=True)


class Steps:
    """A recipe's distillation with the largest of a few batches that fits."""

    def __init__(self, job: Job, name: str, overrides: list[str], batches: tuple[int, int]):
        self.job, self.peak = job, 0
        for halved in range(HALVINGS + 1):
            match, regress = (batch >> halved for batch in batches)
            sizes = [f"match.batch={match}", f"regress.batch={regress}", f"device={job.device}"]
            try:
                self.make(ready(name, [*overrides, *sizes], job.work / job.name, small=job.tiny))
                return
            except torch.OutOfMemoryError:
                if halved == HALVINGS:
                    raise
            gc.collect()  # outside of `except`, whose traceback keeps the tensors
            torch.cuda.empty_cache()

    def make(self, recipe: Recipe) -> None:
        """Build the distillation, and take the two steps after which AdamW's moments exist."""
        self.recipe, self.subject = recipe, subjects.subject(recipe)
        pairs = build.pair_store(recipe, self.subject, self.job.work / self.job.name)
        self.distiller: Distiller = build.distiller(recipe, self.subject, pairs)
        self.step = stepping(self.distiller)
        for _ in range(2):
            self.step()

    def figures(self) -> Figures:
        planned = cost(self.recipe, *outline(self.recipe.teacher))
        peak = peak_bytes(self.step, self.job)
        passes = bare(self.distiller, self.subject.denoiser, self.subject.info, self.recipe)
        rounds = 2 if self.job.tiny else 6
        seconds = {k: median(v) for k, v in timed({"step": self.step, "bare": passes}, self.job.device, rounds).items()}
        self.distiller.optimizer.clear()  # the bare passes' gradients
        if self.distiller.fake_optimizer is not None:
            self.distiller.fake_optimizer.clear()
        rate = tera(planned.step_flops, seconds["step"])
        fastest = "bf16" if self.recipe.precision == "bf16" else "tf32" if self.job.gpu else "fp32"
        best = self.job.figure("matrix", fastest, "TFLOP/s")
        return {
            "images": f"{self.recipe.match.batch} + {self.recipe.regress.batch}, {self.recipe.precision}",
            "ms per step": 1000 * seconds["step"],
            "images per second": self.distiller.images_per_step / seconds["step"],
            "counted TFLOP": planned.step_flops / 1e12,
            "TFLOP/s": rate,
            "share of the matrix rate": "matrix was not measured" if best is None else rate / best,
            "peak GB": NEEDS_GPU if peak is None else peak / 1e9,
            "peak / plan": NEEDS_GPU if peak is None else peak / planned.peak,
            "step / bare passes": seconds["step"] / seconds["bare"],
        }

    def compiled(self) -> Figures:
        if self.job.left < COMPILED_AT_LEAST:
            raise TimeoutError(f"{self.job.left:.0f} s are left, too few to compile; run again")
        for network in filter(None, (self.distiller.student, self.distiller.fake, self.subject.denoiser)):
            compile_blocks(network)
        for _ in range(2):
            self.step()
        return self.figures()

    def recorded(self) -> Figures:
        """The same by CUDA graphs. What these hold is reserved, not allocated: all that is reserved is compared."""
        distiller, eager = self.distiller, self.distiller.gradients
        distiller.gradients = Adder(distiller.clock, recorded=[distiller.optimizer, *distiller.fake_optimizers])
        try:
            for _ in range(2):
                self.step()
            seconds = median(timed({"step": self.step}, self.job.device, 6)["step"])
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved(self.job.device)
        finally:  # graphs may not fit into the memory, and what is measured next should not use them
            distiller.gradients = eager
        planned = cost(self.recipe.model_copy(update={"cuda_graphs": True}), *outline(self.recipe.teacher))
        return {
            "ms per step": 1000 * seconds,
            "images per second": distiller.images_per_step / seconds,
            "reserved GB": reserved / 1e9,
            "reserved / plan": reserved / planned.peak,
        }


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """`work` as one CUDA graph. It has to be warm before, and on a side stream, says PyTorch's documentation."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay(kept: Any = kept) -> None:  # the graph writes to what `work` returned
        graph.replay()

    return replay


def peak_bytes(work: Callable[[], None], job: Job) -> int | None:
    """The most that tensors held during `work`, everything before it included; `None` away from a GPU."""
    if not job.gpu:
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(job.device)
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(job.device)
