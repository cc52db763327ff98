"""Distil a denoiser of your own, without YAML: `python examples/own_teacher.py`. A random network stands for yours."""

from pathlib import Path

import torch
from torch import nn

from distmatch import VP, Denoiser, DistilledPipeline, Info, Prediction, Recipe, distil


class MyNetwork(nn.Conv2d):  # (input f[B,C,H,W], noise f[B], cond) -> eps, v, x0, a flow velocity or EDM's F
    def forward(self, x, noise, cond):
        return super().forward(x)


torch.manual_seed(0)  # this teacher is random; yours is trained
teacher = Denoiser(MyNetwork(3, 3, 3, padding=1), VP(), Prediction("eps"))  # say which, and on what schedule
recipe = {"name": "own", "teacher": "mine", "steps": 20, "match": {"batch": 8}, "regress": {"batch": 8}}
recipe["pairs"] = {"count": 64}  # every entry of `distmatch train mnist --dry-run` may stand here
distil(Recipe.model_validate(recipe), Path("runs/own"), teacher=(teacher, Info(shape=(3, 16, 16))))

pipe = DistilledPipeline.from_pretrained("runs/own", net=MyNetwork(3, 3, 3, padding=1))
pipe(n=8, seed=0).images[0].save("runs/own/first.png")
