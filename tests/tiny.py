"""Small things to test with: a teacher of a few thousand weights on 8x8 images, a recipe of a few steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from distmatch import DistilledPipeline
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.methods.distill import Distiller
from distmatch.models.diffusers.export import export_lora
from distmatch.models.diffusers.families import family_in
from distmatch.models.folder import Info, save_model
from distmatch.models.library import find_model
from distmatch.models.unet import UNet
from distmatch.system import rng
from distmatch.system.errors import Stopped
from distmatch.training.adapters import Adapted, Adapter


def text_encoder(source: str):
    """The text encoders of a model in diffusers' format."""
    return family_in(source).text_encoder(source)


def stored(folder: Path) -> tuple[Denoiser, Info]:
    """The teacher in diffusers' format in `folder`."""
    return find_model(f"diffusers:{folder}", "teacher")


def stock(folder: Path, kind: Any = None) -> Any:
    """Diffusers' own pipeline, of the class `kind` or of the one that `folder` names, without progress bars."""
    import diffusers

    pipe = (kind or diffusers.DiffusionPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


INFO = Info(shape=(1, 8, 8), classes=("a", "b", "c"))


def teacher(seed: int = 0, classes: int = 3) -> Denoiser:
    """A random network whose outputs depend on everything: no layer is left at its zero start."""
    torch.manual_seed(seed)
    net = UNet(channels=1, classes=classes, widths=(8, 16), blocks=1, patch=2)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(net, EDM(), Prediction("edm")).eval()


def teacher_folder(folder: Path, seed: int = 0) -> Path:
    save_model(folder, teacher(seed), INFO)
    return folder


def recipe_file(folder: Path, **changes) -> Path:
    """`tiny.yaml` in `folder`, with its teacher; `changes` replace top-level entries."""
    tree = {
        "teacher": str(teacher_folder(folder / "teacher")),
        "steps": 12,
        "match": {"batch": 4},
        "regress": {"batch": 4, "weight": 1.0},
        "pairs": {"count": 24, "steps": 3, "shard": 10, "batch": 5},
        "generator": {"lr": 1e-3, "warmup": 3, "decay": 0.5},
        "critic": {"lr": 1e-3, "warmup": 3, "decay": 0.5},
        "log": {"every": 2},
        "checkpoint": {"every": 4},
        **changes,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def exported_lora(denoiser: Denoiser, info: Info, times: tuple[float, ...], folder: Path, capsys) -> tuple:
    """Save a student with a random adapter to `folder / "student"`, export the adapter to `folder / "lora"`.

    Returns its image in [0, 1] by our pipeline; diffusers' pipeline, made by the very lines that the export shows; and
    what draws the same image by it.
    """
    import diffusers

    adapter = Adapter(denoiser.net, 2, 3.0, denoiser.net.adapted)
    for parameter in (value for name, value in adapter.named_parameters() if name.endswith("up.weight")):
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(folder / "student", Adapted(denoiser, adapter), replace(info, times=times))
    export_lora(str(folder / "student"), folder / "lora")
    *lines, call = capsys.readouterr().out.replace("\n", "").partition("Next: ")[2].split("; ")
    names = ("DiffusionPipeline", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
    made = {name: getattr(diffusers, name) for name in names}
    exec("\n".join(lines), made)
    asked = eval(f"dict({call.removeprefix('pipe(')}", {"prompt": "a cat"})
    z, pipe = rng.noise(0, range(1), info.shape), DistilledPipeline.from_pretrained(folder / "student")
    x = (pipe.sample(z, pipe.condition(1, prompts="a cat")) / 2 + 0.5).clamp(0, 1)
    return x, made["pipe"], lambda: made["pipe"](latents=z, output_type="pt", **asked).images


@contextmanager
def stopped_before(index: int) -> Iterator[None]:
    """A run within, which must reach step `index`, is stopped there as by Ctrl-C."""
    step = Distiller.step

    def stops(self, now):
        if now == index:
            raise Stopped("by the test")
        return step(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "step", stops)
        with pytest.raises(Stopped):
            yield


def image_folder(folder: Path, per_class: int = 8) -> Path:
    """`train/` and `test/` with two classes that differ in brightness."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("dark", "light")):
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(120 * number)
                Image.fromarray(pixels).save(target / f"{i}.png")
    return folder
