"""Pairs per second of a build against the bare network evaluations it needs: what the store costs.

The bare side calls the network as often, on batches of the same size, without sampler, preconditioning, noise, digests
or files. Both sides take turns and the fastest round of each counts, which keeps other load on the machine out of it.

    python benchmarks/pairs.py [--pairs 512] [--batch 128] [--steps 10] [--rounds 3] [--device cpu]
"""

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, fingerprint
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.diffusion.solvers import evaluations
from distmatch.models.unet import UNet

SHAPE, CLASSES = (1, 28, 28), 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10, help="Heun steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pairs, batch, device = options.pairs // options.batch * options.batch, options.batch, torch.device(options.device)
    nfe = evaluations("heun", options.steps)

    torch.manual_seed(0)
    teacher = Denoiser(UNet(classes=CLASSES), EDM(), Prediction("edm")).to(device).eval()
    spec = PairSpec(
        teacher="benchmark",
        fingerprint=fingerprint(teacher),
        sampler="heun",
        steps=options.steps,
        guidance=1.0,
        seed=0,
        count=pairs,
        shard_size=min(pairs, 1024),
        shape=SHAPE,
        classes=CLASSES,
        dtype="float32",
    )
    x, noise = torch.randn(batch, *SHAPE, device=device), torch.zeros(batch, device=device)
    cond = Cond(label=torch.arange(batch, device=device) % CLASSES)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(pairs // batch * nfe):
            teacher.net(x, noise, cond)

    def store() -> None:
        folder = Path(tempfile.mkdtemp())
        build(folder, spec, teacher, batch=batch)
        shutil.rmtree(folder)

    for _ in range(3):
        teacher.net(x, noise, cond)
    rounds = [(seconds(bare, device), seconds(store, device)) for _ in range(options.rounds)]
    best_bare, best_store = (min(side) for side in zip(*rounds, strict=True))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{platform.system()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{pairs} pairs of {SHAPE}, batch {batch}, {options.steps} Heun steps = {nfe} evaluations")
    print(f"{'':24}{'seconds':>10}{'pairs/s':>10}")
    for title, value in (("bare evaluations", best_bare), ("build", best_store)):
        print(f"{title:24}{value:10.2f}{pairs / value:10.1f}")
    print(f"ratio {best_bare / best_store:.3f} (target: at least 0.95)")


def seconds(f: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
