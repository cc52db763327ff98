"""Images per second of the one-step pipeline against its bare network at the same batch, which is the limit.

    uv run python benchmarks/sample.py [model] [batch ...]

The pipeline draws noise per sample, runs the network once and rounds to 8 bits on the host.
"""

import argparse
import time
from statistics import median

import torch

from distmatch.diffusion.denoiser import Cond
from distmatch.evaluation.measure import hardware
from distmatch.pipeline import DistilledPipeline

SECONDS = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mnist")
    parser.add_argument("batch", nargs="*", type=int, default=[64, 256])
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DistilledPipeline.from_pretrained(given.model, device)
    print({**hardware(device), "model": given.model})
    print("batch   pipeline images/s   bare images/s   ratio")
    ratio = 0.0
    for batch in given.batch:
        z = torch.randn(batch, *pipe.info.shape, device=device)
        classes = len(pipe.info.classes)
        cond = Cond(label=torch.arange(batch, device=device) % classes) if classes else None
        noise = torch.zeros(batch, device=device)

        @torch.inference_mode()
        def bare(z=z, noise=noise, cond=cond) -> None:
            pipe.denoiser.net(z, noise, cond)

        ours, limit = timed(lambda batch=batch: pipe(batch, batch=batch), bare, device=device)
        ratio = limit / ours
        print(f"{batch:5d} {batch / ours:19,.0f} {batch / limit:15,.0f} {ratio:7.3f}")
    print(f"ratio {ratio:.3f}")


def timed(*work, device: torch.device) -> list[float]:
    """Median seconds of each, taken in turn."""
    seconds: list[list[float]] = [[] for _ in work]
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for run, kept in zip(work, seconds, strict=True):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return [median(kept[1:]) for kept in seconds]


if __name__ == "__main__":
    main()
