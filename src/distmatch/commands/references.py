"""Reads the real images that text-to-image methods are compared with, and what is known about them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from distmatch.commands.comparison import SIDE, Lookup
from distmatch.data.decode import SUFFIXES
from distmatch.data.images import Images, load_images
from distmatch.evaluation.features import Reference, all_features, reference
from distmatch.evaluation.gallery import Gallery
from distmatch.evaluation.measure import Space
from distmatch.evaluation.spaces import find_spaces
from distmatch.models.efficientnet import PARTS, EfficientNet
from distmatch.models.inception import load_inception
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.progress import progress
from distmatch.system.screen import console


def squares(folder: Path, side: int = SIDE, advance: Callable[[int], None] | None = None, split: str = "all") -> Images:
    """Return the images in `folder`, of any size, as central squares resized by Pillow's Lanczos filter.

    Raises `UserError` as `load_images` does.
    """

    def square(image: Image.Image) -> Image.Image:
        if image.mode not in ("L", "RGB"):
            raise UserError("it has 16 bits per pixel; expected photographs of 8")
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        if advance is not None:
            advance(1)
        # crop first: with its `box` argument, `resize` would also see the pixels around the box
        middle = image.convert("RGB").crop((left, top, left + edge, top + edge))
        return middle.resize((side, side), Image.Resampling.LANCZOS)

    return load_images(folder, split, fit=square)


def captioned(folder: Path, split: str, side: int, seed: int) -> Images:
    """Return the pictures of a split, in an order drawn at random. Raises `UserError` if they have no captions."""
    with console.status(f"reading {folder}"):
        read = squares(folder, side, split=split)
    if read.captions is None:
        raise UserError(
            f"{folder}: its pictures have no captions, which would be the prompts; expected metadata.jsonl with a "
            "column text, or NAME.txt beside NAME.png"
        )
    order = rng.shuffled(seed, len(read), 0, len(read))
    captions = tuple(read.captions[i] for i in order)
    return replace(read, pixels=read.pixels[torch.from_numpy(order)], labels=None, captions=captions)


def fid_space(name: str, real: Path | None, device: torch.device) -> Space:
    """Return the features for FID as in clean-fid, with their reference statistics."""
    if not name.startswith("inception:"):
        raise UserError(
            f"features {name!r}: give inception:FILE for FID, or efficientnet; other spaces do not know such images"
        )
    if real is None or not real.is_dir():
        return find_spaces(name, None if real is None else str(real), "clean", device, ())[0]
    space = load_inception(Path(name.removeprefix("inception:")), "clean").to(device)

    @parallel.on_first
    def make() -> Reference:
        total = sum(file.suffix.lower() in SUFFIXES for file in real.rglob("*"))
        with progress("real images", total, unit="image") as advance:
            images = squares(real, advance=advance)
        with progress("reference", total, unit="image") as advance:
            return reference(images, space, keep=0, source=str(real), progress=advance)

    return space, make()


def published_spaces(
    folder: Path | None, side: int, device: torch.device
) -> tuple[list[Space], tuple[Gallery, float | None] | None]:
    """Return EfficientNet's spaces against the training images in `folder`, resized to `side`.

    If they have captions, also return their gallery, and how near a copy is if there is a folder `test` beside them.
    """
    if folder is None:
        raise UserError("features 'efficientnet' come without a reference; name the training images with --reference")
    networks = [EfficientNet(part).to(device) for part in PARTS]

    @parallel.on_first
    def make() -> tuple[list[Reference], tuple[Gallery, float | None] | None]:
        with console.status(f"reading {folder}"):
            images = squares(folder, side, split="train")
            held_out = squares(folder, side, split="test").pixels if (folder / "test").is_dir() else None
        with progress("reference", len(images) * len(networks), unit="image") as advance:
            known = [
                reference(images, space, keep=len(images), source=str(folder), progress=advance) for space in networks
            ]
        if images.captions is None:
            return known, None
        gallery = Gallery(images, torch.cat([all_features(one) for one in known], 1))
        return known, (gallery, None if held_out is None else gallery.copy(held_out))

    references, gallery = make()
    return list(zip(networks, references, strict=True)), gallery


def lookup(found: tuple[Gallery, float | None] | None, prompts: list[str], pictures: Images | None) -> Lookup | None:
    """Return where images of `prompts` are looked up; `pictures`: those that the prompts belong to, if they do."""
    if found is None:
        return None
    gallery, copy = found
    return Lookup(gallery, gallery.find(prompts, None if pictures is None else pictures.captions), copy)
