"""Making images with a finished model: a one-step student, or a teacher with its sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distmatch import data, rng
from distmatch.denoiser import Cond, Denoiser, guided
from distmatch.models.folder import Info
from distmatch.models.library import find_model
from distmatch.sampler import SAMPLERS, evaluations, one_step


@dataclass(frozen=True)
class Output:
    """`pixels u8[N,C,H,W]` and, as `images`, the same as Pillow images."""

    pixels: Tensor

    @property
    def images(self) -> list[Image.Image]:
        arrays = self.pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


class Pipeline:
    """`(n, labels, seed) -> images`: noise per sample, `make(z, cond)`, 8-bit rounding.

    Image `i` of a seed is the same whatever `n`, the batch size and the other labels.
    """

    def __init__(self, denoiser: Denoiser, info: Info, make: Callable[[Tensor, Cond | None], Tensor], nfe: int):
        self.denoiser, self.info, self.make, self.nfe = denoiser, info, make, nfe

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def __call__(
        self,
        n: int = 16,
        *,
        labels: int | str | Sequence[int] | Tensor | None = None,
        seed: int = 0,
        batch: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> Output:
        """Make `n` images.

        Args:
            labels: one class for all (number or name), one number per image, or `None` for the classes in turn.
            progress: called with the number of images after each batch.

        Raises `ValueError` for labels that the model does not know, and for a model of something other than images.
        """
        if len(self.info.shape) != 3:
            raise ValueError(
                f"this model makes samples of shape {self.info.shape}, not images; use `sample(z)` in Python"
            )
        if n < 0 or batch < 1:
            raise ValueError(f"{n} images in batches of {batch} cannot be made; expected n >= 0 and batch >= 1")
        label = self._labels(n, labels)
        chunks = []
        for start in range(0, n, batch):
            rows = range(start, min(start + batch, n))
            chunks.append(self.pixels(rows, None if label is None else label[rows.start : rows.stop], seed))
            if progress is not None:
                progress(len(rows))
        return Output(torch.cat(chunks) if chunks else torch.empty(0, *self.info.shape, dtype=torch.uint8))

    def pixels(self, rows: Sequence[int], label: Tensor | None, seed: int) -> Tensor:
        """Images number `rows` of `seed`, with `label i64[len(rows)]`: u8[len(rows),C,H,W] on the CPU."""
        z = rng.noise(seed, rows, self.info.shape).to(self.device)
        cond = None if label is None else Cond(label=label.to(self.device))
        return data.to_uint8(self.sample(z, cond)).cpu()

    @torch.inference_mode()
    def sample(self, z: Tensor, cond: Cond | None = None) -> Tensor:
        """Images f[B,*D] in about [-1, 1] for given noise `z f[B,*D]`."""
        return self.make(z, cond)

    def _labels(self, n: int, labels: int | str | Sequence[int] | Tensor | None) -> Tensor | None:
        names = self.info.classes
        if not names:
            if labels is not None:
                raise ValueError(f"label {labels!r}: this model is unconditional; leave the label out")
            return None
        if labels is None:
            return torch.arange(n) % len(names)
        if isinstance(labels, str):
            if labels not in names:
                raise ValueError(f"label {labels!r} is unknown; expected one of {', '.join(names)}")
            labels = names.index(labels)
        label = torch.as_tensor(labels).long().reshape(-1)
        label = label.expand(n) if len(label) == 1 else label
        if len(label) != n:
            raise ValueError(f"{len(label)} labels for {n} images; give one, or one per image")
        if n and (label.min() < 0 or label.max() >= len(names)):
            raise ValueError(f"label {labels!r} is out of range; the {len(names)} classes count from 0")
        return label


class DistilledPipeline(Pipeline):
    """A one-step generator: `G(z) = mu(prior_std z, t)`, one network evaluation per image."""

    def __init__(self, denoiser: Denoiser, info: Info):
        if info.t is None:
            raise ValueError("this model is a teacher, not a one-step student; use TeacherPipeline")
        super().__init__(denoiser, info, lambda z, cond: one_step(denoiser, denoiser.schedule, z, cond, info.t), nfe=1)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", *, net: nn.Module | None = None
    ) -> "DistilledPipeline":
        """Load a model folder, a run's folder, or a student that comes with the package ("mnist").

        `net` takes the weights where the network is one of your own.
        """
        denoiser, info = find_model(str(path), kind="student", net=net)
        return cls(denoiser.to(device), info)


class TeacherPipeline(Pipeline):
    """A teacher with its deterministic sampler, `2 steps - 1` evaluations per image for Heun."""

    def __init__(
        self, denoiser: Denoiser, info: Info, *, sampler: str = "heun", steps: int = 18, guidance: float = 1.0
    ):
        model = guided(denoiser, guidance)
        run = SAMPLERS[sampler]
        super().__init__(
            denoiser,
            info,
            lambda z, cond: run(model, denoiser.schedule, z, cond, steps),
            nfe=evaluations(sampler, steps) * (1 if guidance == 1 else 2),
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", *, steps: int = 18, guidance: float = 1.0
    ) -> "TeacherPipeline":
        """Load a model folder, or a teacher that comes with the package ("mnist")."""
        denoiser, info = find_model(str(path), kind="teacher")
        return cls(denoiser.to(device), info, steps=steps, guidance=guidance)


def side_by_side(teacher: Pipeline, student: Pipeline, columns: int = 10, seed: int = 2) -> np.ndarray:
    """Rows of the teacher's images, each above the student's from the same noise: u8[H,W,3]."""
    classes = len(teacher.info.classes)
    z = rng.noise(seed, range(4 * columns), teacher.info.shape).to(teacher.device)
    cond = Cond(label=torch.arange(4 * columns, device=teacher.device) % classes) if classes else None
    images = [data.to_uint8(p.sample(z, cond)).cpu().split(columns) for p in (teacher, student)]
    rows = [row for pair in zip(*images, strict=True) for row in pair]
    return data.grid(torch.cat(rows), columns=columns)
