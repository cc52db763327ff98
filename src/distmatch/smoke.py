"""`--scale cpu-smoke`: a recipe cut to what a CPU runs in under a minute, every code path of it, with random networks.

What comes out means nothing; that it comes out is the point.
"""

from pathlib import Path

import torch

from distmatch import rng
from distmatch.config import Recipe
from distmatch.denoiser import Denoiser, Prediction
from distmatch.models.folder import Info, save_model
from distmatch.models.published import PUBLISHED
from distmatch.schedule import EDM

SMALL = {"model_channels": 16, "num_blocks": 1}
"""What makes a published network small; resolutions, attention, paths and conditioning stay."""


def cpu_smoke(recipe: Recipe, folder: Path) -> list[str]:
    """The overrides that cut `recipe`; `folder` is where `make_networks` puts what it would have to fetch."""
    overrides = [
        "steps=3",
        "match.batch=2",
        "regress.batch=2",
        "regress.size=32",
        "pairs.count=6",
        "pairs.steps=3",
        "pairs.shard=4",
        "pairs.batch=2",
        "accumulate=1",
        "device=cpu",
        "log.every=1",
        "log.preview=3",
        "checkpoint.every=2",
        "evaluate.every=0",
    ]
    if recipe.teacher.startswith("edm:"):
        overrides.append(f"teacher={folder / 'teacher'}")
    if recipe.regress.loss == "lpips":
        overrides.append(f"regress.weights={folder / 'weights'}")
    return overrides


def make_networks(recipe: Recipe, folder: Path, teacher: bool = True) -> None:
    """Write the random networks that the overrides of `cpu_smoke` name to `folder`: a teacher, LPIPS's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(recipe.seed, "smoke"))
        if teacher and recipe.teacher.startswith("edm:"):
            save_model(folder / "teacher", *random_edm(Path(recipe.teacher).stem))
        if recipe.regress.loss == "lpips" and "regress" in recipe.terms:
            from distmatch.perceptual import write_random_weights

            write_random_weights(folder / "weights")


def random_edm(name: str, small: bool = True) -> tuple[Denoiser, Info]:
    """A network of the kind of the published checkpoint `name`, with random weights; `small` or of its full size.

    Raises `ValueError` where no checkpoint has this name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is no published EDM checkpoint; expected one of {', '.join(PUBLISHED)}")
    kind, arguments = PUBLISHED[name]
    net = kind(**{**arguments, **(SMALL if small else {})})
    for parameter in net.parameters():  # layers that start at zero would hide what lies before them
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.xavier_uniform_(parameter)
    side, classes = net.config["img_resolution"], net.config["label_dim"]
    info = Info((3, side, side), tuple(str(i) for i in range(classes)), card={"random": name})
    return Denoiser(net, EDM(), Prediction("edm")).eval(), info
