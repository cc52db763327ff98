"""Makes images with a finished model: a one-step or few-step student, or a teacher with its sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distmatch.data import imaging
from distmatch.diffusion.conditions import Conditions, with_guidance
from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.diffusion.fixed import Fixed, fixed
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import Schedule
from distmatch.diffusion.solvers import evaluations, solver
from distmatch.models.bf16 import allows_bf16, in_bf16, round_weights, rounding_inputs
from distmatch.models.family import Components
from distmatch.models.info import Info
from distmatch.models.library import components, family_of, find_model
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.finite import check_rows, finite_rows
from distmatch.system.plain import check_text
from distmatch.system.precision import autocast
from distmatch.system.screen import counted
from distmatch.training.engine import try_compiler
from distmatch.training.replay import Replay

NoiseOf = Callable[[int], Tensor]
"""Noise f[B,*D] for a batch's rows at a step after the first; steps count from 1."""

Precision = Literal["fp32", "bf16"]

Labels = int | str | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Output:
    """`pixels u8[N,C,H,W]` and, as `images`, the same in Pillow's format."""

    pixels: Tensor

    @property
    def images(self) -> list[Image.Image]:
        arrays = self.pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


class Pipeline:
    """`(n, labels or prompts, seed) -> images`: noise per sample, `make(z, cond)`, pixels, 8-bit rounding.

    Image `i` of a seed is always the same, whatever `n`, the batch size and the other labels or prompts.

    Args:
        make: `(z f[B,*D], cond, noise_of) -> x f[B,*D]`.
        nfe: network evaluations per image.
        parts: encodes the model's prompts and decodes its latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        info: Info,
        make: Callable[[Tensor, Cond | None, NoiseOf], Tensor],
        nfe: int,
        parts: Components | None = None,
    ):
        self.denoiser, self.info, self.make, self.nfe, self.parts = denoiser, info, make, nfe, parts or Components()

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def __call__(
        self,
        n: int | None = None,
        *,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        batch: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Output:
        """Make `n` images; default: 16, or one per prompt.

        Args:
            labels, prompts, guidance_scale: see `condition`.
            batch: images per network evaluation; default: 256, or 4 for a text-to-image model.
            progress: called with the number of images after each batch.

        Raises `UserError` for a condition that the model does not take, and for a model that does not make images.
        """
        if len(self.info.shape) != 3:
            raise UserError(
                f"this model makes samples of shape {self.info.shape}, not images; use `sample(z)` in Python"
            )
        texts = [prompts] if isinstance(prompts, str) else prompts
        n = n if n is not None else 16 if texts is None else len(texts)
        batch = batch if batch is not None else 4 if self.info.latent else 256
        if n < 0 or batch < 1:
            raise UserError(f"{n} images in batches of {batch} cannot be made; expected n >= 0 and batch >= 1")
        numbers = self._labels(n, labels)
        texts = self._prompts(n, texts)
        if texts and self.parts.encode is not None:
            self.parts.encode.cut(list(dict.fromkeys(texts)))
        chunks = []
        for start in range(0, n, batch):
            rows = slice(start, min(start + batch, n))
            cond = self.condition(
                rows.stop - rows.start,
                labels=None if numbers is None else numbers[rows],
                prompts=None if texts is None else texts[rows],
                guidance_scale=guidance_scale,
            )
            chunks.append(self.pixels(range(rows.start, rows.stop), cond, seed))
            if progress is not None:
                progress(rows.stop - rows.start)
        return Output(torch.cat(chunks) if chunks else torch.empty(0, *self.info.shape, dtype=torch.uint8))

    def condition(
        self,
        n: int,
        *,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
    ) -> Cond | None:
        """Return the condition of `n` images, on the model's device.

        Args:
            labels: for a model with classes: one for all (number or name), one number per image, or `None` for the
                classes in turn. A string of digits is a name if the classes are named by numbers.
            prompts: for a text-to-image model: one for all, or one per image.
            guidance_scale: for a student that takes one (`info.guidance`); default: the middle of its range.

        Raises `UserError` for anything that the model does not take.
        """
        numbers = self._labels(n, labels)
        texts = self._prompts(n, [prompts] if isinstance(prompts, str) else prompts)
        cond = None if numbers is None else Cond(label=numbers)
        if texts is not None and self.parts.encode is not None:
            cond = self.parts.encode(texts)
        scale = self._guidance(guidance_scale)
        if scale is not None:
            cond = with_guidance(cond, torch.full((n,), scale))
        return None if cond is None else cond.to(self.device)

    def pixels(self, rows: Sequence[int], cond: Cond | None, seed: int) -> Tensor:
        """Return the images numbered `rows` of `seed`: u8[len(rows),C,H,W] on the CPU."""
        return self.render(rng.noise(seed, rows, self.info.shape), cond, self.noise_of(seed, rows))

    def noise_of(self, seed: int, rows: Sequence[int]) -> NoiseOf:
        """Return the noise of images number `rows` of `seed` for a student's later steps: the same in every batch."""
        return lambda step: rng.noise(seed, rows, self.info.shape, step)

    def render(self, z: Tensor, cond: Cond | None = None, noise_of: NoiseOf | None = None) -> Tensor:
        """Return the images of given noise `z f[B,*D]`: u8[B,C,H,W] on the CPU. Raises `UserError` if one is not
        finite.

        `noise_of`: for a student of several steps; default: that of the first images of seed 0.
        """
        pixels, finite = self.draw(z.to(self.device), None if cond is None else cond.to(self.device), noise_of)
        pixels = pixels.cpu()
        check_rows(finite.cpu())
        return pixels

    @torch.inference_mode()
    def draw(self, z: Tensor, cond: Cond | None, noise_of: NoiseOf | None) -> tuple[Tensor, Tensor]:
        """Return images u8[B,C,H,W] for noise `z f[B,*D]`, and which of them are finite, bool[B]; all on the device."""
        return _in_8_bits(self.sample(z, cond, noise_of))

    @torch.inference_mode()
    def sample(self, z: Tensor, cond: Cond | None = None, noise_of: NoiseOf | None = None) -> Tensor:
        """Return images f[B,C,H,W] in about [-1, 1], or points, for noise `z f[B,*D]` on the model's device."""
        return self.decoded(self.make(z, cond, noise_of or self.noise_of(0, range(len(z)))))

    def decoded(self, x: Tensor) -> Tensor:
        """Return the output of `make` as images."""
        return self.parts.decode(x)

    def _labels(self, n: int, labels: Labels) -> Tensor | None:
        names = self.info.classes
        if not names:
            if labels is not None:
                raise UserError(f"label {labels!r}: this model has no classes; leave the label out")
            return None
        if labels is None:
            return torch.arange(n) % len(names)
        if isinstance(labels, str):
            numbered = labels.removeprefix("-").isdecimal() and not any(name.isdecimal() for name in names)
            if labels not in names and not numbered:
                known = f"one of {', '.join(names[:20])}" + (f", ... {names[-1]}" if len(names) > 20 else "")
                raise UserError(f"label {labels!r} is unknown; expected {known}")
            labels = int(labels) if numbered else names.index(labels)
        label = torch.as_tensor(labels).long().reshape(-1)
        label = label.expand(n) if len(label) == 1 else label
        if len(label) != n:
            raise UserError(f"{counted(len(label), 'label')} for {counted(n, 'image')}; give one, or one per image")
        if n and (label.min() < 0 or label.max() >= len(names)):
            raise UserError(f"label {labels!r} is out of range; the {len(names)} classes count from 0")
        return label

    def _prompts(self, n: int, prompts: Sequence[str] | None) -> list[str] | None:
        if not self.info.text:
            if prompts is not None:
                instead = "; give labels (--label of distmatch sample)" if self.info.classes else ""
                raise UserError(f"this model takes no prompts{instead}")
            return None
        if prompts is None:
            raise UserError('this model makes images of prompts; give prompts="red apple", or a list of one per image')
        for prompt in prompts:
            check_text(prompt, "the prompt")
        if len(prompts) not in (1, n):
            raise UserError(f"{counted(len(prompts), 'prompt')} for {counted(n, 'image')}; give one, or one per image")
        return list(prompts) * (n if len(prompts) == 1 else 1)

    def _guidance(self, scale: float | None) -> float | None:
        if self.info.guidance is None:
            if scale is not None:
                raise UserError(f"guidance_scale {scale}: this model's guidance is fixed; leave it out")
            return None
        low, high = self.info.guidance
        if scale is None:
            return (low + high) / 2
        if not low <= scale <= high:
            raise UserError(f"guidance_scale {scale} is out of range; this student learnt {low:g} to {high:g}")
        return scale


def _in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return images u8[B,*D], and which of `x f[B,*D]` are finite, bool[B]."""
    return imaging.to_uint8(x), finite_rows(x)


class DistilledPipeline(Pipeline):
    """A one-step or few-step generator: one network evaluation per image for each of its times.

    Args:
        steps: how many; only the number that it was trained for is accepted, as a check.
        times: other times than those it was trained at, falling, up to its schedule's last. It has never been evaluated
            there: expect blur with fewer, and nothing better with more.
        compile: compile network and decoder with torch.compile; on a GPU they then replay CUDA graphs. The first batch
            of each size waits for the compiler, for up to minutes.
        cuda_graphs: on a GPU, record network, decoder and rounding to 8 bits as one CUDA graph when a batch of some
            size first comes, and replay it from then on: the GPU no longer waits for Python, and nothing has to be
            compiled. The memory that the largest batch needs stays taken, and only one thread at a time may make
            images. Weights may then change in place, as by `load_state_dict`, but not be replaced: a network that is
            moved to another device and back needs a new pipeline. Elsewhere nothing changes.
        precision: bf16 lets network and decoder compute in bf16: with copies whose weights are all in bf16, as they
            are now, or under autocast where `models.bf16` does not know that they allow it.

    Raises `UserError` for a teacher, for another number of `steps`, and for `compile` if no compiler works here.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        info: Info,
        parts: Components | None = None,
        *,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        precision: Precision = "fp32",
    ):
        if not info.times:
            raise UserError("this model is a teacher, not a student; use TeacherPipeline")
        info = replace(info, times=_times(info, denoiser.schedule, steps, times))
        plan, parts, forward = Steps(info.times), parts or Components(), denoiser
        around_network = self._around_decoder = precision
        if precision == "bf16" and type(denoiser) is Denoiser and allows_bf16(denoiser.net):
            denoiser = Denoiser(in_bf16(denoiser.net), denoiser.schedule, denoiser.prediction)
            forward, around_network = rounding_inputs(denoiser), "fp32"
        if precision == "bf16" and isinstance(parts.decode, nn.Module) and allows_bf16(parts.decode):
            parts, self._around_decoder = replace(parts, decode=in_bf16(parts.decode)), "fp32"
        if compile:
            forward, parts = _compiled(forward, parts, cuda_graphs)

        @cache
        def at_times(device: torch.device) -> list[Fixed]:
            return [fixed(forward, t, device) for t in plan.times]

        def evaluated(z: Tensor, cond: Cond | None, noise: Sequence[Tensor]) -> Tensor:
            with autocast(z.device, around_network):
                return plan.sample(at_times(z.device), denoiser.schedule, z, cond, noise)

        def make(z: Tensor, cond: Cond | None, noise_of: NoiseOf) -> Tensor:
            return evaluated(z, cond, self.later_noise(z, noise_of))

        super().__init__(denoiser, info, make, nfe=len(plan), parts=parts)

        def whole(given: Any) -> tuple[None, dict[str, Tensor], tuple[Tensor, ...]]:
            x = self.decoded(evaluated(*given))
            return None, {}, (x, *_in_8_bits(x))

        self._recorded = Replay(whole, ()) if cuda_graphs else None

    @torch.inference_mode()
    def sample(self, z: Tensor, cond: Cond | None = None, noise_of: NoiseOf | None = None) -> Tensor:
        if self._recorded is None:
            return super().sample(z, cond, noise_of)
        return self._replayed(self._recorded, z, cond, noise_of)[0]

    @torch.inference_mode()
    def draw(self, z: Tensor, cond: Cond | None, noise_of: NoiseOf | None) -> tuple[Tensor, Tensor]:
        if self._recorded is None:
            return super().draw(z, cond, noise_of)
        _, pixels, finite = self._replayed(self._recorded, z, cond, noise_of)
        return pixels, finite

    def _replayed(
        self, recorded: Replay, z: Tensor, cond: Cond | None, noise_of: NoiseOf | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        noise = self.later_noise(z, noise_of or self.noise_of(0, range(len(z))))
        return recorded((z, cond, noise))[1]

    def later_noise(self, z: Tensor, noise_of: NoiseOf) -> list[Tensor]:
        """Return the noise f[B,*D] of each step after the first, where `z f[B,*D]` is."""
        return [noise_of(step).to(z) for step in range(1, self.nfe)]

    def decoded(self, x: Tensor) -> Tensor:
        with autocast(x.device, self._around_decoder):
            return self.parts.decode(x).to(x.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        net: nn.Module | None = None,
        schedule: Schedule | None = None,
        steps: int | None = None,
        times: Sequence[float] | None = None,
        precision: Precision = "fp32",
        **how: bool,
    ) -> "DistilledPipeline":
        """Load a model folder, a run's folder, or a student of the package ("mnist").

        A custom network, into which the weights are loaded, and a custom schedule are passed as `net` and `schedule`.
        `steps`, `times`, `precision` and, as `how`, `compile` and `cuda_graphs`: see the class; with bf16, `net` is
        rounded too.
        """
        denoiser, info = find_model(str(path), "student", net, schedule)
        denoiser.to(device)
        if precision == "bf16":  # nobody else uses it: rounded in place, it need not be copied
            round_weights(denoiser.net)
        return cls(denoiser, info, components(info, device), steps=steps, times=times, precision=precision, **how)


def _times(info: Info, schedule: Schedule, steps: int | None, times: Sequence[float] | None) -> tuple[float, ...]:
    """Return the times to evaluate a student at: its own, unless others are asked for."""
    said = ", ".join(f"{t:g}" for t in info.times)
    if times is None:
        if steps not in (None, len(info.times)):
            raise UserError(
                f"{steps} steps: this student was trained for {len(info.times)}, at t = {said}, and nowhere else; with "
                "fewer expect blur, with more nothing better. To try it all the same, give the times themselves; a "
                "teacher takes any number of steps (--teacher)"
            )
        return info.times
    if steps not in (None, len(times)):
        raise UserError(
            f"{counted(steps, 'step')} at {counted(len(times), 'time')}; expected one time per step, or the times alone"
        )
    Steps(tuple(times))
    if not all(schedule.t_min < t <= schedule.t_max for t in times):
        raise UserError(
            f"times {list(times)}: expected times above {schedule.t_min:g}, up to {schedule.t_max:g}; the student was "
            f"trained at {said}"
        )
    return tuple(float(t) for t in times)


class _Compiled(nn.Module):
    """`network`, compiled when it is first called. With `graphs`, calls replay a CUDA graph for each shape of input."""

    def __init__(self, network: nn.Module, graphs: bool):
        super().__init__()
        mode = "reduce-overhead" if graphs else None
        self.run = torch.compile(network, mode=mode, dynamic=False)

    def forward(self, *inputs: Tensor | Cond | None) -> Tensor:
        return self.run(*inputs).clone()  # a graph returns the same memory each time, and the next call overwrites it


def _compiled(denoiser: Denoiser, parts: Components, recorded: bool) -> tuple[Denoiser, Components]:
    """Return the same functions, compiled. Raises `UserError` if nothing can be compiled here.

    `recorded`: they will become part of one CUDA graph, so that they need none of their own.
    """
    device = next(denoiser.parameters()).device
    graphs = device.type == "cuda" and not recorded
    try:
        try_compiler(device)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            "compile needs a C++ compiler, and on a GPU also Triton. A first function cannot be compiled: "
            f"{type(error).__name__}: {reason}. Install a compiler such as g++, or leave compile out"
        ) from error
    network = Denoiser(_Compiled(denoiser.net, graphs), denoiser.schedule, denoiser.prediction)
    if not isinstance(parts.decode, nn.Module):
        return network, parts
    decode = _Compiled(parts.decode, graphs)  # for one image: a decoder takes them one by one anyway
    return network, replace(parts, decode=lambda x: torch.cat([decode(one) for one in x.split(1)]))


class TeacherPipeline(Pipeline):
    """A teacher with its deterministic sampler: `2 steps - 1` evaluations per image for Heun, twice as many if guided.

    With `guidance: None`, each image's scale comes from its condition.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        info: Info,
        parts: Components | None = None,
        *,
        sampler: str = "heun",
        steps: int = 18,
        guidance: float | None = 1.0,
    ):
        info.check_guidance(guidance)
        model, run = guided(denoiser, guidance), solver(sampler, info.scheduler)
        super().__init__(
            denoiser,
            info,
            lambda z, cond, _: run(model, denoiser.schedule, z, cond, steps),
            nfe=evaluations(sampler, steps, guidance),
            parts=parts,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        net: nn.Module | None = None,
        schedule: Schedule | None = None,
    ) -> "TeacherPipeline":
        """Load a model folder, a teacher of the package ("mnist"), or `diffusers:FOLDER_OR_ID`.

        Default: 18 steps of Heun; in diffusers' format the family's own solver, 50 steps of PNDM for Stable Diffusion.
        `net`, `schedule`: as for a student.
        """
        denoiser, info = find_model(str(path), "teacher", net, schedule)
        family, parts = family_of(info), components(info, device)
        sampler, steps = sampler or family.sampler, steps or family.steps
        return cls(denoiser.to(device), info, parts, sampler=sampler, steps=steps, guidance=guidance)


def side_by_side(
    teacher: Pipeline, student: Pipeline, conditions: Conditions, columns: int = 10, rows: int = 4, seed: int = 2
) -> tuple[np.ndarray, float]:
    """Return `rows` rows of the teacher's images, each above the student's from the same noise, u8[H,W,3]; and how much
    the student's differ from one another, as a share of how much the teacher's do.
    """
    z = rng.noise(seed, range(rows * columns), teacher.info.shape)
    cond = conditions.at(range(rows * columns))
    images = [_in_parts(pipe, z, cond, columns, seed) for pipe in (teacher, student)]
    picture = imaging.grid(torch.cat([row for pair in zip(*images, strict=True) for row in pair]), columns=columns)
    taught, learnt = (torch.cat(made).float().std(0).square().mean().sqrt().item() for made in images)
    return picture, learnt / taught if taught else 1.0


def _in_parts(pipe: Pipeline, z: Tensor, cond: Cond | None, size: int, seed: int) -> list[Tensor]:
    made = []
    for i in range(0, len(z), size):
        part = slice(i, i + size)
        noise_of = pipe.noise_of(seed, range(len(z))[part])
        made.append(pipe.render(z[part], None if cond is None else cond[part], noise_of))
    return made
