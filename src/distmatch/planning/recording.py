"""Records a step of one sample per stream as CUDA graphs: whether a recipe's steps can be recorded, before its run."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distmatch.diffusion.conditions import Share
from distmatch.diffusion.denoiser import Cond
from distmatch.methods.terms import Start
from distmatch.recipe import build, objectives
from distmatch.recipe.entries import Recipe
from distmatch.recipe.subjects import Subject
from distmatch.training.gradients import Adder


@dataclass(frozen=True)
class OneSample:
    """A stream of the same sample again and again; see `terms.Stream`."""

    name: str
    z: Tensor
    cond: Cond | None
    fresh: bool
    batch: int = 1

    def draw(self, seed: int, index: int, turn: int, share: Share) -> Start:
        generator = torch.Generator(self.z.device).manual_seed(turn)
        return Start(self.z, self.cond, 1, generator, None if self.fresh else torch.zeros_like(self.z))


def record(stages: Sequence[Recipe], subject: Subject, z: Tensor, cond: Cond | None) -> int:
    """Record and replay a step of every stage that computes something else than those before; return how many.

    The networks are copies, as a run makes them, and are gone afterwards.

    Args:
        z, cond: f[1,*D] and its condition, for each stream.

    Raises `UserError` if a step cannot be recorded.
    """
    different = {(*stage.terms, stage.regress.loss, stage.regress.decoder): _small(stage) for stage in stages}
    _steps(list(different.values()), subject, z, cond)
    gc.collect()
    torch.cuda.empty_cache()
    return len(different)


def _steps(stages: Sequence[Recipe], subject: Subject, z: Tensor, cond: Cond | None) -> None:
    pairs: Any = object()  # not read
    distiller = build.distiller(stages[0], subject, pairs, any(map(objectives.trains_fake, stages)))
    distiller.gradients = Adder(distiller.clock, recorded=[distiller.optimizer, *distiller.fake_optimizers])
    for stage in stages:
        build.enter(distiller, stage, subject, pairs)
        streams = {n: OneSample(n, z, cond, one.fresh) for n, one in distiller.objective.streams.items()}
        distiller.objective = replace(distiller.objective, streams=streams)
        distiller.step(0)


def _small(recipe: Recipe) -> Recipe:
    """Return `recipe` for batches of one, with as many updates of the fake score as differ from each other.

    The weights that are shared with the teacher stay as they are: it has yet to make the pairs, in full precision.
    """
    return recipe.model_copy(
        update={
            "workers": 1,
            "base_weights": "fp32",
            "match": recipe.match.model_copy(update={"batch": 1}),
            "regress": recipe.regress.model_copy(update={"batch": 1}),
            "fake": recipe.fake.model_copy(update={"steps": min(2, recipe.fake.steps)}),
        }
    )
