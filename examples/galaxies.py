"""Distil a published network that predicts a score: galaxies in one evaluation instead of 35.

    python examples/galaxies.py runs/galaxies

The teacher was trained by others on galaxies of the survey HSC (arXiv 2401.07313): hsc64 in the Python package
galaxygrad 0.2.1, which pip downloads (56 MB) when the example first runs. The package is opened as a zip and never
imported. It states no licence: measure with it, but publish neither its weights nor a student's.

Pairs, training and figures take about ten minutes on two cores. Stop it at any time; the same command goes on. With
`pip install 'distmatch[metrics]'`, it also measures in the features of EfficientNet-Lite0.
"""

import argparse
import hashlib
import io
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distmatch import EDM, Denoiser, DistilledPipeline, Images, Info, Prediction, Recipe, distil
from distmatch.data import imaging
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairStore
from distmatch.evaluation.metrics import Moments, frechet
from distmatch.models.efficientnet import PARTS, EfficientNet
from distmatch.models.pixels import principal_components
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.paths import CACHE
from distmatch.system.progress import progress

WHEEL = "galaxygrad-0.2.1-py3-none-any.whl"
SHA256 = "56fd8f02de3b025e87f690a494014371391894f2288356288068f9f5e90d8a97"
WEIGHTS = "galaxygrad/eqx_hsc_ScoreNet64.eqx"
SIGMA = 1.0
"""At which the student is evaluated: it computes `x - SIGMA eps`. At 80, the teacher's last, so would its errors be."""


class Mixer(nn.Module):
    """Mix patches, then channels: f[B,width,patches] to the same."""

    def __init__(self, patches: int, width: int, hidden: int):
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(patches, hidden), nn.ReLU(), nn.Linear(hidden, patches))
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = nn.LayerNorm([width, patches]), nn.LayerNorm([patches, width])

    def forward(self, h: Tensor) -> Tensor:
        h = (h + self.patches(self.norm1(h))).mT
        return (h + self.channels(self.norm2(h))).mT


class ScoreNet(nn.Module):
    """galaxygrad's MLP-mixer as a network for `Prediction("vp")`. Its parameters are in the order of the file.

    Natively `(x_t, t) -> score(x_t, t)` with `alpha = exp(-t / 2)` and `sigma^2 = 1 - exp(-t)`.
    """

    def __init__(self, side: int = 64, width: int = 64, hidden: int = 512, blocks: int = 4):
        super().__init__()
        patches = (side // 4) ** 2
        self.into, self.out = nn.Conv2d(2, width, 4, stride=4), nn.ConvTranspose2d(width, 1, 4, stride=4)
        self.blocks = nn.ModuleList(Mixer(patches, width, hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm([width, patches])

    def forward(self, x: Tensor, noise: Tensor, cond: None = None) -> Tensor:  # -> eps = -sigma score
        tau = noise.reshape(-1, 1, 1, 1) / 999  # Prediction("vp") encodes t in the schedule beta(tau) = 0.1 + 19.9 tau
        t = 9.95 * tau**2 + 0.1 * tau
        h = self.into(torch.cat([x, (t / 10).expand_as(x)], 1))
        patches = h.flatten(2)
        for block in self.blocks:
            patches = block(patches)
        return -(-torch.expm1(-t)).sqrt() * self.out(self.norm(patches).view_as(h))

    @torch.no_grad()
    def load(self, weights: bytes) -> None:
        """Copy the arrays of an .eqx file, NumPy's .npy files one after another."""
        file = io.BytesIO(weights)
        for parameter in self.parameters():
            array = torch.from_numpy(np.load(file, allow_pickle=False))
            if parameter is self.out.weight:  # JAX's transposed convolution does not swap and flip its kernel
                array = array.transpose(0, 1).flip(2, 3)
            parameter.copy_(array.reshape(parameter.shape))


def published(folder: Path) -> bytes:
    """Return the teacher's weights, downloaded to `folder` by pip unless they are there. Raises `UserError`."""
    wheel = folder / WHEEL
    if not wheel.exists():
        pip = shutil.which("pip")
        if pip is None:
            raise UserError(f"pip, which downloads the teacher, is missing; install it, or put {WHEEL} into {folder}")
        done = subprocess.run(
            [pip, "download", "--no-deps", "--dest", folder, "galaxygrad==0.2.1"], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"pip could not download galaxygrad 0.2.1: {done.stderr.strip()[-300:]}")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise UserError(f"{wheel} is damaged or another file: its SHA-256 is not {SHA256}; delete it and try again")
    return zipfile.ZipFile(wheel).read(WEIGHTS)


def recipe(folder: Path, pairs: int, steps: int, tiny: bool) -> Recipe:
    """Return the experiment: regression alone, then also distribution matching with a slower student."""
    first, batch, sampling = max(1, steps * 2 // 3), 2 if tiny else 8, 3 if tiny else 18
    return Recipe.model_validate(
        {
            "name": "galaxies",
            "teacher": "hsc64",
            "steps": steps,
            "pairs": {"path": str(folder / "pairs"), "count": pairs, "steps": sampling, "shard": 100, "batch": 16},
            "match": {"batch": batch},
            "regress": {"batch": 2 * batch, "weight": 4.0},
            "student": {"times": [SIGMA], "ema": 0.98, "optimizer": {"lr": 1e-4, "warmup": 20, "decay": 0.2}},
            "fake": {"optimizer": {"lr": 1e-4, "warmup": 20}},
            "stages": [
                {"until": first, "change": {"terms": ["regress"]}},
                {"until": steps, "change": {"student.optimizer.lr": 1e-4 / 3, "regress.batch": batch}},
            ],
            "checkpoint": {"every": 100},
        }
    )


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Return what a survey measures, f64[N] each, of galaxies `x f[N,1,H,W]` in the network's units, 10 log(1 + flux).

    Flux: of all pixels. Size: root mean square radius along one axis, in pixels, and ellipticities, of the pixels with
    a flux above 0.03 (the brightest of a galaxy has about 1.2). A pixel is a square with its own second moments, so a
    point has size 0.29 and ellipticity 0.
    """
    flux = torch.expm1(x[:, 0].double() / 10)
    light = flux.where(flux > 0.03, 0)
    light = light / light.sum((1, 2), keepdim=True).clamp(min=1e-9)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in x.shape[2:])
    over_x, over_y = light.sum(1), light.sum(2)
    dx, dy = columns - (over_x @ columns)[:, None], rows - (over_y @ rows)[:, None]
    xx, yy = (over_x * dx**2).sum(1) + 1 / 12, (over_y * dy**2).sum(1) + 1 / 12
    xy = torch.einsum("nyx,ny,nx->n", light, dy, dx)
    return {
        "total flux": flux.sum((1, 2)),
        "size": ((xx + yy) / 2).sqrt(),
        "e1": (xx - yy) / (xx + yy),
        "e2": 2 * xy / (xx + yy),
    }


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of the cumulative distributions of two samples, in 0..1."""
    a, b = a.sort().values, b.sort().values
    at = torch.cat([a, b])
    shares = [torch.searchsorted(sample, at, right=True).double() / len(sample) for sample in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


def pixels(x: Tensor) -> Tensor:
    """Return galaxies as u8[N,1,H,W]; the units are logarithmic already."""
    return imaging.to_uint8(x / 4.5 - 1)


Features = Callable[[Tensor], Tensor]


def spaces(reference: Tensor) -> dict[str, Features]:
    """Return functions from `u8[N,1,H,W]` to features f[N,F]."""
    components = principal_components(Images(reference, None, ()))
    found: dict[str, Features] = {f"pixels, {components.basis.shape[1]} components": lambda u: components.both(u)[0]}
    try:
        networks = [EfficientNet(part) for part in PARTS]
    except UserError as missing:
        print(f"The Frechet distance is measured in the pixels alone: {missing}")
        networks = []
    return found | {f"EfficientNet-Lite0, {net.name}": lambda u, net=net: net.both(u)[0] for net in networks}


def figures(reference: Tensor, second: Tensor, student: Tensor) -> str:
    """Return a table of how far the teacher's `second` sample and the `student` are from the `reference`."""
    lines = [f"| {len(reference)} images each | teacher's second sample | student |", "|---|---|---|"]
    for name, features in spaces(pixels(reference)).items():
        fits = []
        for sample in (reference, second, student):
            moments = Moments()
            moments.update(features(pixels(sample)))
            fits.append((moments.mean, moments.cov))
        lines.append(f"| Frechet, {name} | {frechet(*fits[0], *fits[1]):.3f} | {frechet(*fits[0], *fits[2]):.3f} |")
    measured = [statistics(sample) for sample in (reference, second, student)]
    for name, wanted in measured[0].items():
        found = [kolmogorov_smirnov(wanted, other[name]) for other in measured[1:]]
        lines.append(f"| Kolmogorov-Smirnov, {name} | {found[0]:.3f} | {found[1]:.3f} |")
    lines += ["", "| quartiles | teacher, reference | teacher's second sample | student |", "|---|---|---|---|"]
    cuts = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for name in measured[0]:
        values = [", ".join(f"{q:.3g}" for q in sample[name].quantile(cuts)) for sample in measured]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def run(folder: Path, pairs: int, images: int, steps: int, tiny: bool) -> None:
    """Distil into `folder / "student"`, print figures, and draw `folder / "galaxies.png"`."""
    torch.manual_seed(0)
    shape = (16, 8, 16, 1) if tiny else (64, 64, 512, 4)
    net = ScoreNet(*shape)
    if not tiny:
        net.load(published(CACHE / "galaxies"))
    teacher = Denoiser(net, EDM(0.03, 80), Prediction("vp"))
    size = (1, shape[0], shape[0])
    distil(recipe(folder, pairs, steps, tiny), folder / "student", folder, teacher=(teacher, Info(shape=size)))
    pipe = DistilledPipeline.from_pretrained(folder / "student", net=ScoreNet(*shape))

    # The student learnt from the pairs, so that the reference is of other noise; and so are the student's images.
    store = PairStore.open(folder / "pairs", count=pairs)
    with progress("reference", images, unit="image") as advance:
        build(folder / "reference", replace(store.spec, seed=1, count=images), teacher, batch=16, progress=advance)
    reference = PairStore.open(folder / "reference", count=images).batch(range(images))
    z = rng.noise(2, range(images), size)
    print(figures(reference.y, store.images(0, images), pipe.sample(z)))

    shown = min(images, 36)  # teacher's rows above the student's, from the same noise
    both = reference.y[:shown].split(12), pipe.sample(reference.z[:shown]).split(12)
    sheet = imaging.grid(pixels(torch.cat([row for rows in zip(*both, strict=True) for row in rows])), columns=12)
    (folder / "galaxies.png").write_bytes(imaging.png(sheet))
    nfe = 2 * store.spec.steps - 1
    print(f"{folder / 'galaxies.png'}: odd rows teacher, {nfe} evaluations; even rows student, 1 evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--pairs", type=int, default=1000, help="noise-image pairs to learn from (default: 1000)")
    parser.add_argument("--images", type=int, default=500, help="images to measure, at most --pairs (default: 500)")
    parser.add_argument("--steps", type=int, default=750, help="steps of training (default: 750)")
    parser.add_argument("--tiny", action="store_true", help="a small random network instead: a trial in seconds")
    given = parser.parse_args()
    if not 2 <= given.images <= given.pairs or given.steps < 2:
        parser.error("expected 2 or more --images, at most as many as --pairs, and 2 or more --steps")
    try:
        run(given.folder, *((24, 12, 5) if given.tiny else (given.pairs, given.images, given.steps)), given.tiny)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
