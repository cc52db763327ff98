"""Measures one text-to-image method under the conditions shared by all of them (DMD, Tables 3 and 4).

Every method makes the same prompts from the same noise, rounded to 8 bits once. Images are measured as in Appendix D of
the paper (arXiv 2311.18828) and in the evaluation code of GigaGAN, which the paper uses: resized to 256 x 256 by
Pillow's Lanczos filter, FID as in clean-fid, CLIP score by OpenCLIP. Latency is from a prompt to its pixels on the
host, at batch size 1. In other features than Inception's, images are measured as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.evaluation.baselines import Method
from distmatch.evaluation.clip import ClipScore
from distmatch.evaluation.gallery import Gallery
from distmatch.evaluation.gallery import figures as gallery_figures
from distmatch.evaluation.measure import Space, Tally, fewest, median_seconds
from distmatch.evaluation.metrics import frechet
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError
from distmatch.system.plain import read_json
from distmatch.system.progress import progress
from distmatch.system.screen import console

SIDE = 256
"""Side of the images that are measured, in pixels."""


REAL = "real"
"""Name of the column that holds the pictures that the prompts belong to."""


@dataclass(frozen=True)
class Lookup:
    """Where generated pictures are looked up.

    Args:
        gallery: of real pictures, in the features of all spaces together.
        own: number of the name in each prompt, see `Gallery.find`.
        copy: how near a copy is, see `Gallery.copy`; `None` if not known.
    """

    gallery: Gallery
    own: Tensor
    copy: float | None


@dataclass(frozen=True)
class Comparison:
    """What all methods share: image `i` has prompt `i` (cycling through the list) and noise `i`."""

    prompts: list[str]

    shape: tuple[int, ...]
    """Shape of the noise of one image."""

    seed: int
    """Seed of the noise."""

    spaces: Sequence[Space] = ()
    """Feature spaces, with their reference statistics."""

    clip: ClipScore | None = None

    lookup: Lookup | None = None

    real: Tensor | None = None
    """u8[N,3,H,W], the pictures that the prompts belong to, if they do."""

    def noise(self, rows: range, step: int = 0) -> Tensor:
        """Return the noise f[B,*D] of the images numbered `rows` at the student's step number `step`."""
        return rng.noise(self.seed, rows, self.shape, step)

    @torch.inference_mode()
    def look(self, method: Method | None, rows: range) -> "Seen":
        """Return what is seen of the method's images numbered `rows`; without a method, of the real ones."""
        numbers = [i % len(self.prompts) for i in rows]
        said = [self.prompts[i] for i in numbers]
        if method is None:
            assert self.real is not None
            pixels = self.real[numbers]
        else:
            pixels = method.make(said, self.noise(rows), partial(self.noise, rows))
        fid = any(space.distance == "fid" for space, _ in self.spaces)
        small = lanczos(pixels) if fid or self.clip else pixels
        features = [
            space.both(small if space.distance == "fid" else pixels)[0].float().cpu() for space, _ in self.spaces
        ]
        ranks = nearest = None
        if self.lookup is not None:
            ranks = self.lookup.gallery.ranks(torch.cat(features, 1), self.lookup.own[numbers])
            nearest = self.lookup.gallery.nearest(pixels)
        return Seen(pixels, features, self.clip(small, said) if self.clip else None, ranks, nearest)

    def measure(self, method: Method | None, n: int, batch: int, picture: int) -> "Measured":
        """Return the figures of `n` images, and the first `picture` of them u8[picture,3,H,W].

        Several processes share the batches. The first one gets figures identical to the last bit to those of a single
        process; the others get none.
        """

        def look(rows: range) -> tuple[int, Seen]:
            seen = self.look(method, rows)
            return len(rows), replace(seen, pixels=seen.pixels[: max(0, picture - rows.start)])

        tallies, pictures, scores = [Tally(real.features) for _, real in self.spaces], [], []
        ranks, nearest = [], []
        jobs = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
        with progress(REAL if method is None else method.name, n, unit="image") as advance:
            for size, seen in parallel.shared(look, jobs):
                pictures.append(seen.pixels)
                for tally, features in zip(tallies, seen.features, strict=True):
                    tally.update(features)
                if seen.score is not None:
                    scores.append(seen.score)
                if seen.ranks is not None and seen.nearest is not None:
                    ranks.append(seen.ranks)
                    nearest.append(seen.nearest)
                advance(size)
        if parallel.rank() > 0:
            return Measured({}, torch.empty(0))
        found: dict[str, float] = {}
        for (space, real), tally in zip(self.spaces, tallies, strict=True):
            if n >= fewest(len(real.mu)):
                found[space.distance] = frechet(tally.moments.mean, tally.moments.cov, real.mu, real.cov)
                found |= {f"{figure}/{space.name}": value for figure, value in tally.figures().items()}
        if scores:
            found["clip_score"] = float(torch.cat(scores).double().mean())
        if self.lookup is None:
            return Measured(found, torch.cat(pictures))
        each = {"rank": torch.cat(ranks).tolist(), "nearest": torch.cat(nearest).tolist()}
        found |= gallery_figures(torch.cat(ranks), torch.cat(nearest), self.lookup.copy)
        return Measured(found, torch.cat(pictures), each)

    @torch.inference_mode()
    def latency(self, method: Method) -> float:
        """Return the milliseconds from the first prompt to its pixels."""
        first = range(1)
        z, later = self.noise(first), partial(self.noise, first)
        return 1000 * median_seconds(lambda: method.make(self.prompts[:1], z, later))


@dataclass(frozen=True)
class Seen:
    """A batch: its `pixels u8[B,3,H,W]`, features f[B,F] in each space, CLIP scores f[B], and what the gallery says."""

    pixels: Tensor
    features: list[Tensor]
    score: Tensor | None
    ranks: Tensor | None
    nearest: Tensor | None


@dataclass(frozen=True)
class Measured:
    """The figures of a method, its first pictures u8[N,3,H,W], and by name what is known of each of its images."""

    figures: dict[str, float]
    pictures: Tensor
    each: dict[str, list[Any]] = field(default_factory=dict)


def lanczos(pixels: Tensor) -> Tensor:
    """Return `pixels u8[B,3,H,W]` resized to u8[B,3,SIDE,SIDE] by Pillow's Lanczos filter."""
    images = (Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy())
    small = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def method_folder(out: Path, method: str) -> Path:
    return out / "methods" / method.lower().replace(" ", "-")


@parallel.on_first
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


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `rows` with what each is to the teacher's, if that is the last: distances in proportion, times as fast."""
    teacher = next((row for row in reversed(rows) if row["name"] != REAL and not row["name"].startswith("student")), {})
    found = []
    for row in rows:
        distances = [key for key in row if key.startswith("frechet/") and teacher.get(key)]
        ratios = {key.replace("frechet/", "ratio/"): row[key] / teacher[key] for key in distances}
        both = "ms_per_image" in row and "ms_per_image" in teacher
        faster = {"speedup": teacher["ms_per_image"] / row["ms_per_image"]} if both else {}
        found.append({**row, **ratios, **faster})
    return found
