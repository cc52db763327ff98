"""`distmatch demo`: small distillations from start to finish, with their results."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distmatch.commands.shared import starting
from distmatch.system.options import Out, Runs

if TYPE_CHECKING:
    from distmatch.evaluation.measure import Space


def demo(which: Literal["mnist", "toy2d", "emoji"] = "mnist", /, *, out: Out = None, runs: Runs = Path("runs")) -> None:
    """Distil something small and look at the result.

    Parameters
    ----------
    which
        mnist: the teacher in the package, pairs, distillation, evaluation, report; three to six minutes on two cores.
        toy2d: Figure 3 of the paper, three objectives on a two-mode toy; under a minute.
        emoji: pictures of a few prompts by the text-to-image student in the package, beside its teacher; a minute.
    out
        Folder for the results; default: runs/demo-WHICH.
    runs
        The folder that holds runs and pair stores.
    """
    out = out or runs / f"demo-{which}"
    starting("Loading PyTorch, then checking what the demo needs")
    if which == "mnist":
        mnist(out, runs)
    elif which == "emoji":
        emoji(out)
    else:
        from distmatch.commands import toy2d

        toy2d.demo(out, runs)


def mnist(out: Path, runs: Path) -> None:
    """Distil the package's teacher by the recipe `mnist-demo`, measure teacher and student, write `out/report.html`."""
    import time

    from distmatch.commands.distillation import distil
    from distmatch.commands.report_page import report
    from distmatch.evaluation.measure import show_rows, show_spaces
    from distmatch.recipe.loading import load_recipe
    from distmatch.system.screen import console
    from distmatch.system.terminal import command

    began, continued = time.perf_counter(), (out / "recipe.yaml").exists()
    console.print(
        "Distilling the MNIST teacher in the package into a one-step generator: three to six minutes on two cores. "
        "Ctrl-C keeps what is done; the same command goes on."
    )
    distil(load_recipe("mnist-demo"), out, runs)
    rows, spaces = _measure(out, runs)
    page = report([out], out / "report.html")

    show_rows(rows)
    show_spaces("mnist", spaces)
    minutes = (time.perf_counter() - began) / 60
    console.print(f"{minutes:.1f} minutes{' since it was continued' if continued else ''}. Look at {page.resolve()}")
    ablation = command("train", "mnist", "terms=match", "-o", runs / "match")
    console.print(
        "\nNext (in a clone, after `. .venv/bin/activate`):\n"
        "  distmatch sample mnist      images from the student that ships, distilled for longer\n"
        "  distmatch demo toy2d        Figure 3 of the paper, in under a minute\n"
        f"  {ablation}      an ablation; compare with distmatch report"
    )


def _measure(out: Path, runs: Path) -> "tuple[list[dict[str, Any]], list[Space]]":
    """Return the rows of teacher and student of the run `out`, which also go to `eval.json`, and their spaces."""
    import torch

    from distmatch.commands import binding
    from distmatch.data import imaging
    from distmatch.evaluation.measure import evaluate, hardware, score, speed
    from distmatch.evaluation.spaces import find_spaces, known_rows
    from distmatch.models.folder import Info
    from distmatch.pipeline import DistilledPipeline, TeacherPipeline
    from distmatch.recipe import build, subjects
    from distmatch.system.files import write_json
    from distmatch.system.progress import progress
    from distmatch.system.workers import using

    recipe = binding.begun(out)
    assert recipe is not None
    subject = subjects.subject(recipe)
    teacher, info = subject.denoiser, subject.info
    pairs = build.pair_store(recipe, subject, runs)
    slow = TeacherPipeline(teacher, info, sampler=recipe.pairs.sampler, steps=recipe.pairs.steps)
    fast = DistilledPipeline.from_pretrained(out, slow.device)
    spaces = find_spaces("mnist", device=fast.device)
    n = len(pairs)
    labels = torch.arange(n) % len(info.classes)
    with using(build.workers(recipe)), progress("evaluation", 2 * n, unit="image") as advance:
        # The pairs are the teacher's images, so there is no need to sample it again.
        taught = score(
            lambda a, b: imaging.to_uint8(pairs.images(a, b)),
            labels,
            n,
            spaces,
            classes=info.classes,
            progress=advance,
        )
        learnt = evaluate(fast, spaces, n=n, seed=1, progress=advance)
    ratios = {f"ratio/{space.name}": learnt[space.distance] / taught[space.distance] for space, _ in spaces}
    rows = [
        {
            "name": f"teacher, {recipe.pairs.steps} Heun steps",
            "nfe": slow.nfe,
            "images": n,
            **taught,
            **speed(slow, batch=64),
        },
        {"name": "student, 1 step", "nfe": fast.nfe, "images": n, **learnt, **ratios, **speed(fast, batch=64)},
        *known_rows("mnist", Info(info.shape), spaces, n),
    ]
    write_json(out / "eval.json", {"hardware": hardware(fast.device), "rows": rows})
    return rows, spaces


PROMPTS = [
    "red apple, flat style",
    "smiling face with sunglasses, noto style",
    "pizza, glossy style",
    "octopus, blob style",
    "rocket, flat style",
    "tulip, firefox style",
]


def emoji(out: Path) -> None:
    """Draw `PROMPTS` by the package's student and by its teacher with several solvers, into `out/compare.png`."""
    from distmatch.commands.compare import Options, compare_on
    from distmatch.commands.shared import find_student
    from distmatch.system.extras import need
    from distmatch.system.paths import ASSETS
    from distmatch.system.screen import console

    need("diffusers", "transformers", by="text to image")
    package = ASSETS / "emoji"  # whatever a folder here is called
    student = find_student(str(package / "student"), None, "auto")
    options = Options(n=len(PROMPTS), picture=len(PROMPTS), guidance=3.0, out=out)
    compare_on(PROMPTS, str(package / "teacher"), student, options)
    console.print("\nNext: distmatch serve emoji --teacher emoji      a page that draws while you type")
