"""One training step against the sum of its bare network passes, which is the limit; and its memory against the sum of
what it must hold.

    uv run python benchmarks/step.py                                                  the embedded MNIST teacher
    uv run python benchmarks/step.py cifar10-cond match.batch=8 regress.batch=8 --rounds 3
    uv run python benchmarks/step.py imagenet64-cond match.batch=48 regress.batch=48 device=cuda

Where the recipe's teacher is a published checkpoint, a network of the same full size with random weights takes its
place; so does a random VGG for LPIPS. The bare passes are those of Algorithm 1 at the recipe's batch sizes: student
forward and backward on both streams, real (twice if guided) and fake score forward, fake score forward and backward,
LPIPS forward and backward where the recipe has it; nothing else. Both are timed in turn and the medians compared.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import cyclopts
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distmatch.diffusion.denoiser import Cond, Denoiser
from distmatch.evaluation.measure import hardware
from distmatch.methods.distill import Distiller
from distmatch.models.folder import Info, save_model
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.smoke import make_networks, random_edm
from distmatch.system.precision import autocast


def main(recipe: str = "mnist", /, *overrides: str, rounds: int = 15) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measure(ready(recipe, overrides, folder), folder, rounds)


def ready(name: str, overrides: Sequence[str], folder: Path, small: bool = False) -> Recipe:
    """The recipe with few pairs, and random networks in `folder` in place of those that it would fetch.

    Args:
        small: EDM's networks in their smoke-test size.
    """
    few = ["pairs.count=16", "pairs.steps=1", "pairs.shard=16", "pairs.batch=8"]  # their content does not matter here
    resolved = load_recipe(name, [*few, *overrides])
    if resolved.teacher.startswith("edm:"):
        save_model(folder / "teacher", *random_edm(Path(resolved.teacher).stem, small))
        overrides = (f"teacher={folder / 'teacher'}", *overrides)
    if resolved.regress.loss == "lpips":
        overrides = (f"regress.weights={folder / 'weights'}", *overrides)
    make_networks(resolved, folder, teacher=False)
    return load_recipe(name, [*few, *overrides])


def measure(recipe: Recipe, folder: Path, rounds: int) -> None:
    before = memory_peak(subjects.device(recipe.device))
    subject = subjects.subject(recipe)
    teacher, info = subject.denoiser, subject.info
    pairs = build.pair_store(recipe, subject, folder) if objectives.reads_pairs(recipe) else None
    distiller = build.distiller(recipe, subject, pairs)
    device = distiller.device
    limit = bare(distiller, teacher, info, recipe)
    with FlopCounterMode(display=False) as flops:
        limit()
    activations = saved_for_backward(distiller, info, recipe)
    rows = timed({"step": step(distiller), "bare": limit}, device, rounds)
    seconds = {k: median(v) for k, v in rows.items()}
    print({**hardware(device), "recipe": recipe.name, "precision": recipe.precision, "rounds": rounds})
    print(f"training step      {1000 * seconds['step']:10.1f} ms, {distiller.images_per_step} images")
    print(f"bare passes        {1000 * seconds['bare']:10.1f} ms")
    tera = flops.get_total_flops() / 1e12
    print(f"network FLOPs      {tera:10.3f} T per step, {tera / seconds['step']:.3f} TFLOP/s")
    trained = [n for n in (distiller.student, distiller.fake) if n is not None]
    weights = sum(bytes_of(n.parameters()) for n in [teacher, distiller.ema.network, *trained])
    gradients = sum(bytes_of(n.parameters()) for n in trained)
    must = {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients, "activations": activations}
    print("must hold          " + ", ".join(f"{k} {v / 1e9:.3f} GB" for k, v in must.items()))
    held, peak = sum(must.values()), memory_peak(device) - before
    print(f"memory peak        {peak / 1e9:10.3f} GB, {peak / held:.2f} of the sum {held / 1e9:.3f} GB")
    print(f"ratio              {seconds['step'] / seconds['bare']:10.3f}")


def memory_peak(device: torch.device) -> int:
    """Bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_for_backward(distiller: Distiller, info: Info, recipe: Recipe) -> int:
    """Bytes that autograd keeps of the student's update: its forward pass on both streams, and LPIPS's; no weights."""
    perceptual = lpips_terms(distiller, recipe)
    weights = [*distiller.student.parameters(), *(p for term in perceptual for p in term.loss.vgg.parameters())]
    own = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    n = distiller.images_per_step // recipe.accumulate
    x, t, cond = inputs(n, info, distiller.device)
    counted = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with counted, autocast(distiller.device, distiller.precision):
        alive = distiller.student(x, t + 1, cond)  # while it lives no storage is used twice
        images = [alive[: recipe.regress.batch // recipe.accumulate] for _ in perceptual]
        also = [term.loss(x, torch.rand_like(x)) for term, x in zip(perceptual, images, strict=True)]
    del alive, also
    return sum(kept.values())


def lpips_terms(distiller: Distiller, recipe: Recipe) -> list[Any]:
    return [t for t in distiller.terms if t.name == "regress" and recipe.regress.loss == "lpips"]


def inputs(n: int, info: Info, device: torch.device) -> tuple[Tensor, Tensor, Cond | None]:
    cond = Cond(label=torch.arange(n, device=device) % len(info.classes)) if info.classes else None
    return torch.randn(n, *info.shape, device=device), torch.zeros(n, device=device), cond


def timed(
    work: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each piece of work, taken in turn so that a slow moment of the machine hits all."""
    warm = 3 if rounds > 5 else 1
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + warm):
        for name, run in work.items():
            began = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm:
                seconds[name].append(clock() - began)
    return seconds


def step(distiller) -> Callable[[], None]:
    index = iter(range(10**9))
    return lambda: distiller.step(next(index)) and None


def bare(distiller: Distiller, teacher: Denoiser, info: Info, recipe: Recipe) -> Callable[[], None]:
    device = distiller.device
    fake: Any = distiller.fake
    both = distiller.images_per_step
    matched = both if recipe.match.pairs else recipe.match.batch
    real = 1 if recipe.match.guidance == 1 else 2
    perceptual = lpips_terms(distiller, recipe)

    def backward(network: Denoiser, n: int) -> None:
        out = network.net(*inputs(n, info, device))
        out.backward(torch.ones_like(out))

    def run() -> None:
        with autocast(distiller.device, distiller.precision):
            backward(distiller.student, both)
            for term in perceptual:
                x, y = (torch.rand(recipe.regress.batch, *info.shape, device=device) for _ in range(2))
                term.loss(x.requires_grad_(), y).backward()
            if fake is not None:
                with torch.no_grad():
                    for _ in range(real):
                        teacher.net(*inputs(matched, info, device))
                    fake.net(*inputs(matched, info, device))
                backward(fake, matched)
        # Gradients pile up as in accumulation; clearing them is not a network pass.

    return run


if __name__ == "__main__":
    cyclopts.run(main)
