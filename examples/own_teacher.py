"""Distil a denoiser of your own, without a recipe: `python examples/own_teacher.py`.

The network here is random and tiny, so that the script runs in seconds; put yours in its place. It takes
`(input f[B,C,H,W], noise f[B], cond)` and predicts eps, v, x0, a flow velocity or EDM's F; say which.
"""

import copy
from pathlib import Path

import torch

from distmatch import EDM, Denoiser, Prediction
from distmatch.distill import Distiller, Match, Regress
from distmatch.losses import REGRESSIONS, WEIGHTINGS
from distmatch.models.folder import Info
from distmatch.models.unet import UNet
from distmatch.optim import Optimizer
from distmatch.pairs import PairSpec, PairStore, build, fingerprint
from distmatch.train import Plan, train

out, shape = Path("runs/own_teacher"), (1, 16, 16)
torch.manual_seed(0)
teacher = Denoiser(UNet(widths=(8, 16)), EDM(), Prediction("edm")).eval().requires_grad_(False)
spec = PairSpec("own", fingerprint(teacher), "heun", 4, 1.0, 0, 64, 64, shape, 0, "float32")
build(out / "pairs", spec, teacher)
student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
terms = [
    Match(teacher, fake, shape=shape, classes=0, weighting=WEIGHTINGS["algorithm2"], batch=8),
    Regress(PairStore.open(out / "pairs"), loss=REGRESSIONS["mse"], weight=4.0, batch=8),
]
optimizers = [Optimizer(network.parameters(), lr=1e-3, clip=10.0) for network in (student, fake)]
distiller = Distiller(student, fake, terms, *optimizers, info=Info(shape, t=80.0))
train(distiller, out, Plan(steps=20, log_every=5))
print(f"the student is in {out / 'model'}; DistilledPipeline.from_pretrained({str(out)!r}) makes images")
