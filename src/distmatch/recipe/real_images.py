"""The real images of a recipe: read, checked against the teacher, encoded to latents, matched to conditions."""

import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.data import imaging
from distmatch.data.computed import STORED, compute
from distmatch.data.images import Images
from distmatch.data.reals import Describe, Reals
from distmatch.data.shared_images import shared_images
from distmatch.diffusion.denoiser import Cond
from distmatch.models.info import Info
from distmatch.models.library import family_of
from distmatch.models.offload import visiting
from distmatch.recipe.entries import Recipe
from distmatch.system import rng
from distmatch.system.digests import digest
from distmatch.system.errors import UserError
from distmatch.system.progress import progress
from distmatch.system.screen import printable
from distmatch.system.storage import is_url, local
from distmatch.system.terminal import notice


def real_images(
    recipe: Recipe, info: Info, encode: Callable[[Sequence[str]], Cond] | None, device: torch.device
) -> Reals:
    """Return the images in `real.images`, as samples like those of the teacher `info`.

    Args:
        encode: turns captions into conditions, for a text-to-image teacher.
        device: where an autoencoder computes.

    Raises `UserError` if there are none, or if size, channels, classes or captions do not fit the teacher.
    """
    place = check_named(recipe)
    if len(info.shape) != 3:
        raise UserError(f"{_reader(recipe)[0]} is for images; the teacher {recipe.teacher} makes points")
    images = shared_images(place, recipe.real.split)
    numbered = torch.arange(len(images))
    classes: list[Tensor] = [numbered]
    describe: Describe = lambda _numbers, _u: None  # noqa: E731
    if info.text:
        if recipe.real.classes == "number":
            notice(f"real.classes is not used: the teacher {recipe.teacher} has prompts, and no classes")
        describe = _captions(images, place, encode)
    elif info.classes:
        labels = _labels(images, info, recipe)
        classes = [numbered[labels == number] for number in range(len(info.classes))]
        describe = lambda numbers, _u: Cond(label=labels[numbers])  # noqa: E731
    content = [digest(images.pixels), images.labels is not None and digest(images.labels), images.classes]
    print_of = sha256(str([*content, images.captions]).encode()).hexdigest()
    cache = None
    if info.latent:
        read, cache = _latents(recipe, info, images, device)
    else:
        check_shape(images, info.shape, place, recipe.teacher)
        if recipe.real.cache is not None:
            notice(f"real.cache {recipe.real.cache} is not used: the teacher {recipe.teacher} makes no latents")
        read = lambda numbers: imaging.to_float(images.pixels[numbers])  # noqa: E731
    return Reals(classes, read, describe, print_of, cache)


def check_named(recipe: Recipe) -> str:
    """Return `real.images`. Raises `UserError` if it is not set, or names what does not exist here."""
    place = recipe.real.images
    if place is None:
        said, instead = _reader(recipe)
        raise UserError(
            f"{said} needs real images, of what the teacher {recipe.teacher} was trained on: name a folder, an archive "
            f"or a URL, e.g. real.images=photos.zip. Without any, {instead}"
        )
    if not is_url(place) and not local(place).exists():
        raise UserError(f"real.images {place} does not exist; expected a folder or an archive of images")
    return place


def _reader(recipe: Recipe) -> tuple[str, str]:
    """Return what in the recipe reads real images, and how to do without."""
    if "gan" in recipe.terms:
        return "the term gan", "leave gan out of terms"
    return "student.inputs=data", "use student.inputs=rollout"


def latents_bytes(info: Info, count: int) -> int:
    """Return the bytes that the latents of `count` images take in `real.cache`."""
    return STORED * count * math.prod(info.shape)


def check_shape(images: Images, shape: Sequence[int], place: str, teacher: str) -> None:
    """Raise `UserError` unless the images have the channels and the size of the teacher's, (C, H, W)."""
    found = tuple(images.pixels.shape[1:])
    if found != tuple(shape):
        said = [f"{h}x{w}, {'grey' if c == 1 else 'RGB'}" for c, h, w in (found, shape)]
        raise UserError(
            f"real.images {place} holds images of {said[0]}; the teacher {teacher} makes {said[1]}. Give images of "
            "that size and kind, cut and scaled as for its training"
        )


def _captions(images: Images, place: str, encode: Callable[[Sequence[str]], Cond] | None) -> Describe:
    """Return what encodes one of each image's captions, the one that `u` falls on."""
    captions = images.captions
    if captions is None:
        raise UserError(
            f"real.images {place} has no captions, which the teacher needs as prompts: give a column `text` in "
            "metadata.jsonl, or NAME.txt beside each NAME.png"
        )
    assert encode is not None

    def describe(numbers: Tensor, u: Tensor) -> Cond:
        texts = [captions[i] for i in numbers.tolist()]
        return encode([own[int(share * len(own))] for own, share in zip(texts, u.tolist(), strict=True)])

    return describe


def _labels(images: Images, info: Info, recipe: Recipe) -> Tensor:
    """Return the teacher's class of each image, i64[N]. Raises `UserError` if their classes are not the teacher's."""
    place, names = recipe.real.images, images.classes
    if images.labels is None:
        raise UserError(
            f"real.images {place} has no classes, and the teacher {recipe.teacher} has {len(info.classes)}: give a "
            "folder per class, or labels in dataset.json"
        )
    if recipe.real.classes == "number":
        if len(names) != len(info.classes):
            raise UserError(f"real.images {place} has {len(names)} classes, the teacher {len(info.classes)}")
        return images.labels
    if set(names) != set(info.classes) or not bool((images.labels.bincount(minlength=len(names)) > 0).all()):
        here, there = _few(set(names) - set(info.classes)), _few(set(info.classes) - set(names))
        differ = "; ".join(
            filter(None, (here and f"only the images have {here}", there and f"only the teacher {there}"))
        )
        raise UserError(
            f"real.images {place} has other classes than the teacher {recipe.teacher}: {differ or 'one has no image'}. "
            "Classes are matched by name; if class k of the images is class k of the teacher, use real.classes=number"
        )
    return torch.tensor([info.classes.index(name) for name in names])[images.labels]


def _few(names: set[str]) -> str:
    return ", ".join(printable(name, 30) for name in sorted(names)[:4]) + (", ..." if len(names) > 4 else "")


def _latents(
    recipe: Recipe, info: Info, images: Images, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Path | None]:
    """Return what reads latents: each image is encoded when it is drawn, or all once, to a folder of `real.cache`; and
    this folder.
    """
    assert recipe.real.images is not None
    encoder: Any = family_of(info).image_encoder(info.source)
    _, height, width = info.shape
    check_shape(images, (3, height * encoder.stride, width * encoder.stride), recipe.real.images, recipe.teacher)

    def encoded(numbers: Sequence[int]) -> Tensor:
        x = imaging.to_float(images.pixels[torch.as_tensor(numbers)])
        return encoder(x, rng.noise(0, numbers, info.shape))

    if recipe.real.cache is None:
        encoder.vae.to(device)
        return lambda numbers: encoded(numbers.tolist()), None
    name = sha256(f"{digest(images.pixels)}{encoder.fingerprint()}".encode()).hexdigest()
    folder, made = Path(recipe.real.cache) / name[:32], []

    def read(numbers: Tensor) -> Tensor:
        if not made:  # on first use: a run is checked before anything long begins
            with visiting([encoder.vae], device), progress("latents", len(images), unit="image") as advance:
                made.append(compute(folder, "latents", len(images), lambda part: {"x": encoded(part)}, advance))
        return made[0](numbers.tolist())["x"]

    return read, folder
