"""Measures one text-to-image method under the conditions shared by all of them (DMD, Tables 3 and 4).

Every method makes the same prompts from the same noise, rounded to 8 bits once. Images are measured as in Appendix D of
the paper (arXiv 2311.18828) and in the evaluation code of GigaGAN, which the paper uses: resized to 256 x 256 by
Pillow's Lanczos filter, FID as in clean-fid, CLIP score by OpenCLIP. Latency is from a prompt to its pixels on the
host, at batch size 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.data.decode import SUFFIXES
from distmatch.data.images import Images, load_images
from distmatch.evaluation.baselines import Method
from distmatch.evaluation.clip import ClipScore
from distmatch.evaluation.features import Reference, reference
from distmatch.evaluation.measure import Space, median_seconds
from distmatch.evaluation.metrics import Moments, frechet
from distmatch.evaluation.spaces import find_spaces
from distmatch.models.inception import load_inception
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.plain import read_json
from distmatch.system.progress import progress
from distmatch.system.screen import console

SIDE = 256
"""Side of the images that are measured, in pixels."""


@dataclass(frozen=True)
class Comparison:
    """What all methods share: image `i` has prompt `i` (cycling through the list) and noise `i`."""

    prompts: list[str]

    shape: tuple[int, ...]
    """Shape of the noise of one image."""

    seed: int
    """Seed of the noise."""

    space: Space | None = None
    """The features for FID, with their reference statistics."""

    clip: ClipScore | None = None

    def noise(self, rows: range, step: int = 0) -> Tensor:
        """Return the noise f[B,*D] of the images numbered `rows` at the student's step number `step`."""
        return rng.noise(self.seed, rows, self.shape, step)

    @torch.inference_mode()
    def look(self, method: Method, rows: range) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the method's images numbered `rows` u8[B,3,H,W], their features f[B,F] and their CLIP scores f[B]."""
        said = [self.prompts[i % len(self.prompts)] for i in rows]
        pixels = method.make(said, self.noise(rows), partial(self.noise, rows))
        small = lanczos(pixels) if self.space or self.clip else pixels
        seen = self.space[0].both(small)[0].float().cpu() if self.space else None
        return pixels, seen, self.clip(small, said) if self.clip else None

    def measure(self, method: Method, n: int, batch: int, picture: int) -> tuple[dict[str, float], Tensor]:
        """Return `fid` and `clip_score` of `n` images, and the first `picture` of them u8[picture,3,H,W].

        Several processes share the batches. The first one gets figures identical to the last bit to those of a single
        process; the others get none.
        """

        def look(rows: range) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
            pixels, seen, score = self.look(method, rows)
            return len(rows), pixels[: max(0, picture - rows.start)], seen, score

        moments, pictures, scores = Moments(), [], []
        jobs = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
        with progress(method.name, n, unit="image") as advance:
            for size, shown, seen, score in parallel.shared(look, jobs):
                pictures.append(shown)
                if seen is not None:
                    moments.update(seen)
                if score is not None:
                    scores.append(score)
                advance(size)
        if parallel.rank() > 0:
            return {}, torch.empty(0)
        figures: dict[str, float] = {}
        if self.space is not None:
            figures["fid"] = frechet(moments.mean, moments.cov, self.space[1].mu, self.space[1].cov)
        if scores:
            figures["clip_score"] = float(torch.cat(scores).double().mean())
        return figures, torch.cat(pictures)

    @torch.inference_mode()
    def latency(self, method: Method) -> float:
        """Return the milliseconds from the first prompt to its pixels."""
        first = range(1)
        z, later = self.noise(first), partial(self.noise, first)
        return 1000 * median_seconds(lambda: method.make(self.prompts[:1], z, later))


def lanczos(pixels: Tensor, side: int = SIDE) -> Tensor:
    """Return `pixels u8[B,3,H,W]` resized to u8[B,3,side,side] by Pillow's Lanczos filter."""
    images = (Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy())
    small = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def squares(folder: Path, side: int = SIDE, advance: Callable[[int], None] | None = None) -> Images:
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

    return load_images(folder, "all", fit=square)


def fid_space(name: str, real: Path | None, device: torch.device) -> Space:
    """Return the features for FID as in clean-fid, with their reference statistics."""
    if not name.startswith("inception:"):
        raise UserError(f"features {name!r}: FID is compared in those of Inception; give inception:FILE")
    if real is None or not real.is_dir():
        return find_spaces(name, None if real is None else str(real), "clean", device, ())[0]
    space = load_inception(Path(name.removeprefix("inception:")), "clean").to(device)

    def make() -> Reference:
        total = sum(file.suffix.lower() in SUFFIXES for file in real.rglob("*"))
        with progress("real images", total, unit="image") as advance:
            images = squares(real, advance=advance)
        with progress("reference", total, unit="image") as advance:
            return reference(images, space, keep=0, source=str(real), progress=advance)

    return space, parallel.on_first(make)


def method_folder(out: Path, method: str) -> Path:
    return out / "methods" / method.lower().replace(" ", "-")


def finished(folder: Path, method: str, picture: int) -> dict[str, Any] | None:
    """Return the figures of `method` if they and its pictures are there and readable, else None."""
    try:
        done = read_json(folder / "figures.json", dict[str, Any])
        if done["name"] != method:
            raise UserError(f"{folder} holds the figures of {done['name']}")
        for i in range(picture):
            with Image.open(folder / f"{i:06d}.png") as image:
                image.verify()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, OSError, SyntaxError) as error:
        console.print(f"{error}\n{method} is measured again")
        return None
    return done
