"""How far a teacher's estimates move when its weights are held in fewer bits, as `base_weights` does.

    uv run python benchmarks/base_weights.py                       the emoji teacher in the package, without guidance
    uv run python benchmarks/base_weights.py --guidance 4          with the guidance that its recipes use

The teacher draws images of prompts or classes in turn. Each gets noise of several levels, and the teacher estimates x0
from it with its weights in fp32 and then rounded, which includes autocast to bf16. The table shows, by noise level, the
rms of what the estimates move by, and for comparison that of fp32's error, as shares of the images' standard deviation.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import cyclopts
import torch
from torch import Tensor

from distmatch.diffusion.guidance import guided
from distmatch.pipeline import TeacherPipeline
from distmatch.system import rng
from distmatch.training.rounded import Weights, hold

PROMPTS = Path(__file__).parent.parent / "src" / "distmatch" / "assets" / "emoji" / "prompts.txt"


def main(teacher: str = "emoji", /, *, images: int = 64, guidance: float = 1.0, prompts: Path = PROMPTS) -> None:
    pipe = TeacherPipeline.from_pretrained(teacher, "cuda" if torch.cuda.is_available() else "cpu", steps=20)
    texts = prompts.read_text().splitlines() if pipe.info.text else []
    chosen = [texts[i * len(texts) // images] for i in range(images)] if texts else None
    for line in table(pipe, chosen, images, guidance):
        print(line, flush=True)


@torch.inference_mode()
def table(pipe: TeacherPipeline, prompts: Sequence[str] | None, images: int, guidance: float) -> list[str]:
    """Return the table's lines. Noise levels are sigma / alpha."""
    device, schedule = pipe.device, pipe.denoiser.schedule
    cond = pipe.condition(images, prompts=prompts)
    x0 = pipe.make(rng.noise(0, range(images), pipe.info.shape).to(device), cond, pipe.noise_of(0, range(images)))
    noise = rng.noise(1, range(images), pipe.info.shape).to(device)
    times = [torch.full((images,), t, device=device) for t in schedule.grid(9)[1::2].flip(0).tolist()]
    levels = [(schedule.sigma(t) / schedule.alpha(t))[0].item() for t in times]
    exact: list[Tensor] = []
    lines = ["weights       MB" + "".join(f"{level:>9.3g}" for level in levels)]
    for weights in get_args(Weights):
        denoiser = copy.deepcopy(pipe.denoiser).requires_grad_(False)
        hold(denoiser.net, weights, device.type)
        held = sum(t.numel() * t.element_size() for t in (*denoiser.parameters(), *denoiser.buffers())) / 1e6
        model = guided(denoiser, guidance)
        found = [model(schedule.add_noise(x0, noise, t), t, cond).float() for t in times]
        exact = exact or found
        moved = [rms(a - b) / x0.std().item() for a, b in zip(found, exact, strict=True)]
        if weights == "fp32":
            errors = [rms(a - x0) / x0.std().item() for a in exact]
            lines.append("x0 - image      " + "".join(f"{error:>9.1%}" for error in errors))
        lines.append(f"{weights:<10}{held:>6.1f}" + "".join(f"{one:>9.2%}" for one in moved))
    return lines


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


if __name__ == "__main__":
    cyclopts.run(main)
