"""One training step against the sum of its bare network passes, which is the limit.

    uv run python benchmarks/step.py [recipe] [key=value ...]

The bare passes are those of Algorithm 1 at the recipe's batch sizes: student forward and backward on both streams, real
and fake score forward, fake score forward and backward; nothing else. Both are timed in turn and the medians compared.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from distmatch import build
from distmatch.config import load_recipe
from distmatch.denoiser import Cond, Denoiser
from distmatch.evaluation import hardware

ROUNDS = 15


def main() -> None:
    name, *overrides = sys.argv[1:] or ["mnist"]
    small = ["pairs.count=256", "pairs.steps=2", "pairs.shard=256"]  # the pairs' content does not matter here
    recipe = load_recipe(name, [*overrides, *small])
    teacher, info = build.teacher(recipe)
    with tempfile.TemporaryDirectory() as folder:
        pairs = build.pair_store(recipe, teacher, info, Path(folder))
        distiller = build.distiller(recipe, teacher, info, pairs)
        rows = timed({"step": step(distiller), "bare": bare(distiller, teacher, info, recipe)}, distiller.device)
    seconds = {k: median(v) for k, v in rows.items()}
    print({**hardware(distiller.device), "recipe": recipe.name, "precision": recipe.precision})
    print(f"training step      {1000 * seconds['step']:8.1f} ms")
    print(f"bare passes        {1000 * seconds['bare']:8.1f} ms")
    print(f"ratio              {seconds['step'] / seconds['bare']:8.3f}")


def timed(work: dict[str, Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, taken in turn so that a slow moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(ROUNDS + 3):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def step(distiller) -> Callable[[], None]:
    index = iter(range(10**9))
    return lambda: distiller.step(next(index)) and None


def bare(distiller, teacher: Denoiser, info, recipe) -> Callable[[], None]:
    device = distiller.device
    match = recipe.match.batch if "match" in recipe.terms else 0
    both = sum(term.batch for term in distiller.terms)

    def inputs(n: int):
        cond = Cond(label=torch.arange(n, device=device) % len(info.classes)) if info.classes else None
        return torch.randn(n, *info.shape, device=device), torch.zeros(n, device=device), cond

    def backward(network: Denoiser, n: int) -> None:
        out = network.net(*inputs(n))
        out.backward(torch.ones_like(out))

    def run() -> None:
        with distiller.autocast():
            backward(distiller.student, both)
            if match:
                with torch.no_grad():
                    teacher.net(*inputs(match))
                    distiller.fake.net(*inputs(match))
                backward(distiller.fake, match)
        # Gradients pile up as in accumulation; clearing them is not a network pass.

    return run


if __name__ == "__main__":
    main()
