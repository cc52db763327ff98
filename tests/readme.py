"""The README's commands on a bare install: each does what it says, or names in one message what it lacks.

    python tests/readme.py        # by .ci/wheel, in an environment with the wheel and nothing else

Every line of the README's bash blocks must be known here. What would take minutes or a data set is cut by further
arguments, and still begins as the line does.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

README = Path(__file__).parent.parent / "README.md"
METRICS, DIFFUSERS, SERVE = (rf"pip install 'distmatch\[{extra}\]'" for extra in ("metrics", "diffusers", "serve"))
WORKS = None

LINES: dict[str, tuple[list[str], str | None]] = {
    "distmatch sample mnist -n 64": ([], WORKS),
    "distmatch demo toy2d": ([], WORKS),
    "distmatch demo emoji": ([], DIFFUSERS),
    "distmatch recipes": ([], WORKS),
    "distmatch train mnist --dry-run": ([], WORKS),
    "distmatch train mnist --check": ([], WORKS),
    "distmatch train mnist terms=match": (["steps=2", "evaluate.every=0", "match.batch=2", "log.preview=0"], WORKS),
    "distmatch eval mnist": ([], WORKS),
    "distmatch teach IMAGES": (["--steps", "2", "--batch", "2"], WORKS),
    "distmatch teach-text IMAGES": ([], "IMAGES has no captions"),
    "distmatch teach-text data/emoji": ([], "data/emoji"),
    "distmatch sample emoji --teacher": ([], DIFFUSERS),
    "distmatch sample runs/my-emoji": ([], "'runs/my-emoji' is neither a model folder nor a run"),
    "distmatch train emoji": ([], DIFFUSERS),
    "distmatch report runs/mnist runs/no-regress": ([], WORKS),
    "distmatch plan imagenet64-cond": ([], METRICS),
    "distmatch plan sdxl-lora-4step": ([], DIFFUSERS),
    "distmatch train sd35-medium-4step": ([], DIFFUSERS),
    "distmatch train cifar10-cond --scale cpu-smoke": ([], METRICS),
    "distmatch train sd15-laion-6.25": ([], DIFFUSERS),
    "distmatch export diffusers": ([], DIFFUSERS),
    "distmatch compare": ([], DIFFUSERS),
    "distmatch serve mnist": ([], SERVE),
    "distmatch import edm FILE.pkl": ([], r"FILE\.pkl"),
    "distmatch sample runs/sd15-laion-6.25": ([], r"'runs/sd15-laion-6.25' is neither a model folder nor a run"),
    "torchrun": ([], METRICS),
}
"""The beginning of a line, what is added to it, and what its one message must say where it does not work."""

CHANGED = {
    "--nproc-per-node 8 --max-restarts 3": "--nproc-per-node 2 --max-restarts 0",
    "-n 50000": "-n 1500",
    "report runs/mnist": "report runs/made",
}
"""What is cut in a line, or made here in place of it."""

ELSEWHERE = ("pip install --target .uv uv", "python examples/emoji/fetch.py")
"""What CI runs by itself, or what needs a checkout and other packages."""


def lines() -> list[str]:
    """The commands in the README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.S)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def wrong(line: str, folder: Path) -> str | None:
    """What is wrong with a line, if anything."""
    key = next((key for key in LINES if line.startswith(key)), None)
    if key is None:
        return "is not known to tests/readme.py"
    more, message = LINES[key]
    for theirs, ours in CHANGED.items():
        line = line.replace(theirs, ours)
    done = run([*shlex.split(line), *more], folder)
    said = re.findall(r"^distmatch: .*", done.stderr, flags=re.M)
    if message is None:
        return None if done.returncode == 0 else f"fails: {done.stderr[-2000:]}"
    if "Traceback" in done.stderr and not line.startswith("torchrun"):  # which adds its own
        return f"ends in a traceback: {done.stderr[-2000:]}"
    if done.returncode == 0 or len(said) != 1 or not re.search(message, said[0]):
        return f"should say once {message!r}, and says (exit {done.returncode}): {done.stderr[-2000:]}"
    return None


def main() -> None:
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(4):
            place = folder / "IMAGES" / f"class {number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 60 * number, np.uint8)).save(place / f"{number}.png")
        (folder / "FILE").write_text("a lighthouse at dusk\n")
        short = ["steps=2", "pairs.count=8", "pairs.steps=2", "match.batch=2", "regress.batch=2", "evaluate.every=0"]
        made = run(["distmatch", "train", "mnist", "-o", "runs/made", *short], folder)
        assert made.returncode == 0, made.stderr
        for line in lines():
            if line.startswith(ELSEWHERE):
                continue
            began = time.perf_counter()
            problem = wrong(line, folder)
            print(f"{'WRONG' if problem else 'as expected'}, {time.perf_counter() - began:.0f} s: {line}", flush=True)
            if problem:
                problems.append(f"{line}\n  {problem}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
