"""`--scale cpu-smoke`: cuts a recipe to a minute on a CPU, with random networks but every code path.

The results mean nothing; the point is that the run finishes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.hub import without_weights
from distmatch.models.diffusers.tiny import write_tiny_vae
from distmatch.models.edm.checkpoints import PUBLISHED
from distmatch.models.folder import Info, save_model
from distmatch.models.library import diffusers_source, find_model, image_shape
from distmatch.recipe.entries import Recipe
from distmatch.recipe.entry import marked
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic

SMALL = {"model_channels": 8, "num_blocks": 1}
"""Arguments that make a published network small; resolutions, attention, paths and conditioning stay."""

PROMPTS = ("a red bicycle", "two cats on a sofa", "the sea at night", "an old map", "a loaf of bread")


def cpu_smoke(recipe: Recipe, folder: Path) -> list[str]:
    """Return the overrides that cut `recipe`; `folder` is where `make_networks` puts what it would have to download."""
    overrides = [f"{name}={value}" for name, value in marked(Recipe, "small").items()]
    if recipe.teacher.startswith("edm:"):
        overrides.append(f"teacher={folder / 'teacher'}")
    if source := diffusers_source(recipe.teacher):
        overrides += [f"teacher=diffusers:{folder / 'teacher'}", f"regress.tiny={folder / 'tiny'}"]
        overrides += ["image_size=null", "teacher_lora.path=null"]
        if family_in(without_weights(source)).text:
            overrides += [f"prompts.path={folder / 'prompts.txt'}", "prompts.column=null"]
    if recipe.fake.steps > 2:
        overrides.append("fake.steps=2")  # further ones are like the second
    if recipe.regress.loss == "lpips":
        overrides.append(f"regress.weights={folder / 'weights'}")
    if recipe.needs_images and (recipe.real.images is None or any(o.startswith("teacher=") for o in overrides)):
        overrides.append(f"real.images={folder / 'images'}")
    if recipe.stages:
        stages = _short(recipe)
        overrides += [f"stages={json.dumps(stages)}", f"steps={len(stages)}"]
    return overrides


def _short(recipe: Recipe) -> list[dict[str, Any]]:
    """Cut the stages to one step each, with small batches and few pairs; these grow where the recipe's do.

    A stage stays if it is the first to change some entry: more of the same kind would only take longer.
    """
    small, seen, before = marked(Recipe, "small"), set(), {}
    counts = sorted({stage.pairs.count for stage in recipe.parts})
    short = []
    for stage, part in zip(recipe.stages, recipe.parts, strict=True):
        changed = {name for name, value in stage.change.items() if before.get(name) != value}
        if short and changed <= seen:
            continue
        if short:
            seen |= changed
        before = stage.change
        change = {name: small.get(name, value) for name, value in stage.change.items()}
        change["pairs.count"] = 4 + counts.index(part.pairs.count)
        short.append({"until": len(short) + 1, "change": change})
    return short


def make_networks(recipe: Recipe, folder: Path, teacher: bool = True) -> None:
    """Write what the overrides of `cpu_smoke` name to `folder`: a random teacher, real images, LPIPS's weights."""
    with rng.seeded(rng.key(recipe.seed, "smoke")):
        if teacher and recipe.teacher.startswith("edm:"):
            save_model(folder / "teacher", *random_edm(Path(recipe.teacher).stem))
        if teacher and (source := diffusers_source(recipe.teacher)):
            family_in(without_weights(source)).write_tiny(folder / "teacher")
            write_tiny_vae(folder / "tiny")
            write_atomic(folder / "prompts.txt", lambda p: p.write_text("".join(f"{prompt}\n" for prompt in PROMPTS)))
        if teacher and recipe.needs_images:
            made = {"edm": str(folder / "teacher"), "diffusers": f"diffusers:{folder / 'teacher'}"}
            _, info = find_model(made.get(recipe.teacher.partition(":")[0], recipe.teacher), "teacher")
            _write_images(folder / "images", info)
        if recipe.regress.loss == "lpips" and "regress" in recipe.terms:
            from distmatch.models.perceptual import write_random_weights

            write_random_weights(folder / "weights")


def _write_images(folder: Path, info: Info) -> None:
    """Write pictures of noise like the images of the teacher `info`: one of each class, or with captions."""
    channels, height, width = image_shape(info)
    captions = PROMPTS if info.text else ()
    generator = np.random.default_rng(0)
    for number, name in enumerate(info.classes or ("",) * len(PROMPTS)):
        file = folder / "train" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(file, compress_level=0)  # noise does not get smaller
        if captions:
            file.with_suffix(".txt").write_text(captions[number])


def random_edm(name: str, small: bool = True) -> tuple[Denoiser, Info]:
    """Return a random network like the published checkpoint `name`, `small` or at full size.

    Raises `UserError` if there is no checkpoint of this name.
    """
    if name not in PUBLISHED:
        raise UserError(f"{name!r} is no published EDM checkpoint; expected one of {', '.join(PUBLISHED)}")
    kind, arguments = PUBLISHED[name]
    net = kind(**{**arguments, **(SMALL if small else {})})
    for parameter in net.parameters():  # layers initialised to zero would hide the layers before them
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.xavier_uniform_(parameter)
    side, classes = net.config["img_resolution"], net.config["label_dim"]
    info = Info((3, side, side), tuple(str(i) for i in range(classes)), card={"random": name})
    return Denoiser(net, EDM(), Prediction("edm")).eval(), info
