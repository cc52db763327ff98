"""`distmatch plan`: what a recipe costs before anything starts: parameters, arithmetic, memory, disk, time.

Networks are put together on the meta device, where tensors have shapes and no numbers: arithmetic and activations are
counted by running a step's passes there, not guessed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distmatch.config import Recipe
from distmatch.denoiser import Cond, Denoiser, Prediction
from distmatch.models.folder import Info
from distmatch.models.hub import fetched, schedule_of, scheduler_config
from distmatch.models.library import find_model
from distmatch.models.published import PUBLISHED
from distmatch.models.stable import StableUNet
from distmatch.schedule import EDM
from distmatch.solvers import evaluations

console = Console(markup=False, highlight=False, soft_wrap=True)

GPUS = {
    "a100": (80e9, 312e12, 156e12),
    "h100": (80e9, 989e12, 494e12),
    "h200": (141e9, 989e12, 494e12),
    "l40s": (48e9, 362e12, 183e12),
    "rtx4090": (24e9, 165e12, 83e12),
}
"""Memory in bytes, dense FLOP/s in bf16 and in TF32, as the makers publish them."""

FP32 = 4


@dataclass(frozen=True)
class Plan:
    """What one step takes: FLOPs of all processes, by network; bytes of one process, by part."""

    parameters: int
    flops: dict[str, float]
    memory: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_flops(self) -> float:
        return sum(self.flops.values())


def plan(recipe: Recipe, denoiser: Denoiser, info: Info, processes: int, losses: list[nn.Module]) -> Plan:
    """The cost of a step of `recipe` in `processes`.

    Args:
        denoiser: the teacher, on the meta device.
        losses: frozen networks that the regression passes images through, in order: decoder, LPIPS's VGG; on meta.
    """
    parts = processes * recipe.accumulate
    regress = recipe.regress.batch // parts if "regress" in recipe.terms else 0
    match = recipe.match.batch // parts if "match" in recipe.terms else 0
    seen = match + (regress if recipe.match.pairs else 0)
    guided = recipe.student.guidance is not None or recipe.match.guidance != 1

    def batch(n: int) -> tuple[Tensor, Tensor, Cond]:
        return example(denoiser, info, n)

    trained = Passes(denoiser, recipe.gradient_checkpointing)
    forward = trained.forward(batch(1))
    student, student_kept = trained.both(batch(match + regress))
    flops = {"student": student + match * forward * (recipe.critic.steps - 1)}
    critic_kept = 0
    if match:
        critic, critic_kept = trained.both(batch(seen))
        flops["fake score"] = seen * forward + recipe.critic.steps * critic
        flops["teacher"] = seen * forward * (2 if guided else 1)
    loss_kept = 0
    if regress and losses:
        shape = info.shape
        flops["decoder and LPIPS"] = 0.0
        for network in losses:
            frozen = Passes(network, recipe.gradient_checkpointing and network is losses[0] and len(losses) > 1)
            x = torch.empty(regress, *shape, device="meta")
            shape = tuple(network(x[:1]).shape[1:])
            cost, kept = frozen.both((x.requires_grad_(),))
            flops["decoder and LPIPS"] += cost + regress * frozen.forward(
                (torch.empty(1, *x.shape[1:], device="meta"),)
            )
            loss_kept += kept
    size = sum(p.numel() for p in denoiser.parameters())
    networks, moving = (4, 2) if match else (3, 1)
    slices = processes if recipe.parallel == "fsdp" else 1
    frozen_bytes = sum(FP32 * p.numel() for network in losses for p in network.parameters())
    half = 0.5 if recipe.precision == "bf16" else 1.0
    memory = {
        "weights": networks * FP32 * size / slices + frozen_bytes,
        "gradients": moving * FP32 * size / slices,
        "optimizer": 2 * moving * FP32 * size / slices,
        "activations": half * max(student_kept + loss_kept, critic_kept),
    }
    return Plan(size, {k: v * parts for k, v in flops.items()}, memory)


class Passes:
    """FLOPs of a network's passes, and the bytes that autograd keeps between them."""

    def __init__(self, network: nn.Module, checkpointing: bool):
        self.network, self.checkpointing = network, checkpointing

    def forward(self, inputs: tuple[Any, ...]) -> float:
        with torch.no_grad():
            return _count(lambda: self.network(*inputs))

    def both(self, inputs: tuple[Any, ...]) -> tuple[float, int]:
        """Forward and backward. With gradient checkpointing, the forward pass counts twice."""
        kept: dict[int, int] = {}
        own = {p.untyped_storage()._cdata for p in self.network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        alive = []

        def run() -> None:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                alive.append(self.network(*inputs))
            alive[0].backward(torch.empty_like(alive[0]))

        total = _count(run)
        for parameter in self.network.parameters():
            parameter.grad = None
        again = self.forward(inputs) if self.checkpointing else 0.0
        return total + again, sum(kept.values())


def example(denoiser: Denoiser, info: Info, n: int) -> tuple[Tensor, Tensor, Cond]:
    """What the denoiser takes, `n` samples of it, on the meta device."""
    meta = torch.device("meta")
    label = torch.zeros(n, dtype=torch.long, device=meta) if info.classes else None
    text, extra = None, {}
    net: Any = denoiser.net
    if info.source:
        text = torch.empty(n, *net.null_text.shape[1:], device=meta)
        if net.null_pooled.shape[1]:
            extra = {
                "pooled": torch.empty(n, net.null_pooled.shape[1], device=meta),
                "size": torch.empty(n, 6, device=meta),
            }
    t = torch.full((n,), 1.0, device=meta)
    return torch.empty(n, *info.shape, device=meta), t, Cond(label, text, extra)


def _count(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class Vgg(nn.Module):
    """What LPIPS computes: VGG-16's convolutions on images of at least `size` x `size`."""

    def __init__(self, size: int):
        super().__init__()
        from torchvision.models import vgg16

        features: Any = vgg16().features
        self.size, self.features = size, features[:30]

    def forward(self, x: Tensor) -> Tensor:
        sides = [max(side, self.size) for side in x.shape[2:]]
        return self.features(F.interpolate(x.expand(-1, 3, -1, -1), sides, mode="bilinear"))


def abstract(recipe: Recipe) -> tuple[Denoiser, Info, list[nn.Module]]:
    """The teacher and the networks of the regression's loss on the meta device; see `plan`.

    Published checkpoints are known by name and models in diffusers' format by their settings; their weights are not
    read. Raises `ValueError` where a model is not known.
    """
    scheme, _, rest = recipe.teacher.partition(":")
    with torch.device("meta"):
        if scheme == "edm":
            if Path(rest).stem not in PUBLISHED:
                raise ValueError(
                    f"teacher {recipe.teacher!r} is no published checkpoint; import it and name its folder"
                )
            kind, arguments = PUBLISHED[Path(rest).stem]
            net: Any = kind(**arguments)
            info = Info((3, *[net.config["img_resolution"]] * 2), tuple(map(str, range(net.config["label_dim"]))))
            denoiser = Denoiser(net, EDM(), Prediction("edm"))
        elif scheme == "diffusers":
            denoiser, info = _stable(rest)
        else:
            denoiser, info = find_model(recipe.teacher, "teacher")
            denoiser = denoiser.to("meta")
        return denoiser, info, _losses(recipe, info)


def _stable(source: str) -> tuple[Denoiser, Info]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: Any = fetched(source, lambda: UNet2DConditionModel.load_config(source, subfolder="unet"))
    time = unet.get("addition_time_embed_dim")
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * time if time else 0
    net = StableUNet(unet, (77, unet["cross_attention_dim"]), pooled)
    schedule = schedule_of(scheduler_config(source), source)
    return Denoiser(net, schedule, Prediction("eps")), Info(
        (unet["in_channels"], *[unet["sample_size"]] * 2), source=source
    )


def _losses(recipe: Recipe, info: Info) -> list[nn.Module]:
    r = recipe.regress
    networks: list[nn.Module] = []
    if "regress" not in recipe.terms:
        return []
    if r.decoder != "none":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        if r.decoder == "tiny":
            settings: Any = fetched(r.tiny, lambda: AutoencoderTiny.load_config(r.tiny))
            vae: Any = AutoencoderTiny.from_config(settings)
        else:
            settings = fetched(info.source, lambda: AutoencoderKL.load_config(info.source, subfolder="vae"))
            vae = AutoencoderKL.from_config(settings)
        networks.append(_Decode(vae))
    networks += [Vgg(r.size)] if r.loss == "lpips" else []
    return [network.requires_grad_(False) for network in networks]


class _Decode(nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        del vae.encoder

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


def show(recipe: Recipe, gpus: int, gpu: str, utilisation: float) -> None:
    """`distmatch plan`: the tables, and whether it fits."""
    capacity, bf16, tf32 = GPUS[gpu]
    denoiser, info, losses = abstract(recipe)
    wanted = [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
    heaviest = max(wanted, key=lambda stage: stage.match.batch + stage.regress.batch)
    made = plan(heaviest, denoiser, info, gpus, losses)
    rate = utilisation * (bf16 if recipe.precision == "bf16" else tf32) * gpus

    work = Table("network", "TFLOP per step", box=None)
    for name, value in made.flops.items():
        work.add_row(name, f"{value / 1e12:,.2f}")
    work.add_row("together", f"{made.step_flops / 1e12:,.2f}")
    memory = Table(f"one {gpu}, {capacity / 1e9:.0f} GB", "GB", box=None)
    for name, value in made.memory.items():
        memory.add_row(name, f"{value / 1e9:,.2f}")
    memory.add_row("together", f"{made.peak / 1e9:,.2f}")
    console.print(f"{recipe.name}: {made.parameters / 1e6:,.1f} M parameters, {gpus} x {gpu}")
    console.print(work)
    console.print(memory)
    ends = [0, *(stage.until for stage in recipe.stages)] if recipe.stages else [0, recipe.steps]
    flops = [plan(s, denoiser, info, gpus, losses).step_flops if recipe.stages else made.step_flops for s in wanted]
    training = sum(f * (b - a) for f, a, b in zip(flops, ends[:-1], ends[1:], strict=True)) / rate
    console.print(
        f"training: {training / 3600:,.1f} hours at {utilisation:.0%} of {rate / utilisation / 1e12:,.0f} TFLOP/s"
    )
    if "regress" in recipe.terms:
        p = recipe.pairs
        with torch.no_grad():
            one = Passes(denoiser, False).forward(example(denoiser, info, 1))
        guided = 1 if p.guidance == 1 and recipe.student.guidance is None else 2
        count = max(stage.pairs.count for stage in wanted)
        size = count * math.prod(info.shape) * (4 if p.dtype == "float32" else 2)
        hours = count * evaluations(p.sampler, p.steps) * guided * one / rate / 3600
        console.print(f"pairs: {size / 1e9:,.1f} GB, {hours:,.1f} hours")
    console.print(verdict(heaviest, made, gpus, capacity))


def verdict(recipe: Recipe, made: Plan, gpus: int, capacity: float) -> str:
    """Whether a step fits, with a tenth of the memory to spare, or the nearest setting that does."""
    batches = [b for b, t in ((recipe.match.batch, "match"), (recipe.regress.batch, "regress")) if t in recipe.terms]
    for how in [recipe.parallel] if recipe.parallel == "fsdp" or gpus == 1 else ["ddp", "fsdp"]:
        slices = gpus if how != recipe.parallel else 1
        held = sum(size for part, size in made.memory.items() if part != "activations") / slices
        for accumulate in range(recipe.accumulate, min(batches) + 1):
            if any(batch % (accumulate * gpus) for batch in batches):
                continue
            peak = held + made.memory["activations"] * recipe.accumulate / accumulate
            if peak < 0.9 * capacity:
                if (accumulate, how) == (recipe.accumulate, recipe.parallel):
                    return "it fits"
                return f"it does not fit; accumulate={accumulate} parallel={how} does, with {peak / 1e9:,.1f} GB"
    return "it does not fit, whatever accumulate is; take more or larger GPUs, or gradient_checkpointing=true"
