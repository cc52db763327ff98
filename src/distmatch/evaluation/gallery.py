"""Looks generated pictures up among captioned real ones: does each show what its prompt names, and is it a copy?"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.data.images import Images
from distmatch.data.imaging import to_float

SIDE = 64
"""Pictures are compared pixel by pixel at this size, or at their own if it is smaller."""

FEW = 0.05
"""Share of real pictures outside the gallery that count as copies, by definition of how near a copy is."""


class Gallery:
    """Real pictures with names: a picture's name is its shortest caption.

    Agreement with the prompt is measured by retrieval. Each name has a prototype, the mean feature vector of its
    pictures, and a generated picture agrees if the prototype of its own name is the nearest of all. Nearness is the
    cosine once features are whitened by their scatter within names, as in linear discriminant analysis: what differs
    between pictures of the same thing, such as their style, counts for less. Copies are measured in the pixels, as the
    distance to the nearest picture of the gallery, in root mean square over pixels in [-1, 1].

    Args:
        real: pictures with captions.
        features: f[N,F], their features.
    """

    def __init__(self, real: Images, features: Tensor):
        captions = real.captions or ()
        named = [name_of(texts) for texts in captions]
        self.names = {name: number for number, name in enumerate(dict.fromkeys(named))}
        self.number = {text: self.names[name] for texts, name in zip(captions, named, strict=True) for text in texts}
        self.number |= self.names  # where the same text is also a caption of something else
        self.small = _small(real.pixels)
        self.mean, self.std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        self.white = torch.eye(features.shape[1])
        if named:
            numbers = torch.tensor([self.names[name] for name in named])
            x = (features - self.mean) / self.std
            means = torch.zeros(len(self.names), x.shape[1]).index_add(0, numbers, x)
            means = means / torch.bincount(numbers)[:, None]
            self.white = _whitening(x - means[numbers])
            self.prototypes = F.normalize(means @ self.white, dim=1)

    def find(self, prompts: Sequence[str], captions: Sequence[Sequence[str]] | None) -> Tensor:
        """Return the number of the name in each prompt i64[P], or -1 where it is not in the gallery.

        Args:
            captions: of the pictures that the prompts belong to, if they do: a held-out picture's prompt is not a
                caption of the gallery, but its name is.
        """
        if captions is not None:
            return torch.tensor([self.names.get(name_of(texts), -1) for texts in captions])
        return torch.tensor([self.number.get(prompt, -1) for prompt in prompts])

    def ranks(self, features: Tensor, own: Tensor) -> Tensor:
        """Return how many prototypes are nearer to `features f[B,F]` than that of name `own i64[B]`; -1 for own -1."""
        cosines = F.normalize((features - self.mean) / self.std @ self.white, dim=1) @ self.prototypes.T
        ours = cosines.gather(1, own.clamp(min=0)[:, None])
        return (cosines > ours).sum(1).where(own >= 0, -1)

    def nearest(self, pixels: Tensor, chunk: int = 1000) -> Tensor:
        """Return the distance f[B] of each of `pixels u8[B,C,H,W]` to the nearest picture, in 0..2."""
        x = to_float(_small(pixels)).flatten(1)
        best, where = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long)
        for start in range(0, len(self.small), chunk):
            y = to_float(self.small[start : start + chunk]).flatten(1)
            found = (y.square().sum(1) - 2 * x @ y.T).min(1)
            where = torch.where(found.values < best, start + found.indices, where)
            best = torch.minimum(best, found.values)
        # once more without the products, which cancel where pictures are nearly equal
        return (x - to_float(self.small[where]).flatten(1)).square().mean(1).sqrt()

    def copy(self, held_out: Tensor) -> float:
        """Return how near a copy is: nearer than all but `FEW` of the real pictures `held_out u8[N,C,H,W]` are."""
        return float(self.nearest(held_out).quantile(FEW))


def name_of(captions: Sequence[str]) -> str:
    """Return the shortest of a picture's captions, the first of several: "red apple", not "red apple, flat style"."""
    return min(captions, key=len)


def figures(ranks: Tensor | None, nearest: Tensor, copy: float | None) -> dict[str, float]:
    """Return the figures of many pictures, given their `ranks i64[N]` and distances `nearest f[N]`."""
    found: dict[str, float] = {}
    if ranks is not None and (known := ranks[ranks >= 0]).numel():
        found = {"top1": float((known == 0).double().mean()), "top5": float((known < 5).double().mean())}
    found["nearest"] = float(nearest.median())
    if copy is not None:
        found["copies"] = float((nearest < copy).double().mean())
    return found


def _whitening(within: Tensor) -> Tensor:
    """Return W f[F,F] that turns the covariance of `within f[N,F]`, with a tenth of its mean variance added to each
    variance, into the identity. If nothing varies, W is the identity."""
    cov = (within.double().T @ within.double()) / len(within)
    variance = cov.diagonal().mean()
    if variance == 0:
        return torch.eye(len(cov))
    values, vectors = torch.linalg.eigh(cov / variance + 0.1 * torch.eye(len(cov), dtype=cov.dtype))
    return (vectors / values.sqrt()).float()


def _small(pixels: Tensor) -> Tensor:
    if max(pixels.shape[2:]) <= SIDE:
        return pixels
    small = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)
