"""`distil`: runs a recipe through to a finished student in its own folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from distmatch.commands import binding
from distmatch.commands.memory import chooses_for_memory
from distmatch.data import imaging
from distmatch.data.pairs import PairStore
from distmatch.diffusion.denoiser import Denoiser
from distmatch.evaluation.measure import Space
from distmatch.evaluation.measure import evaluate as measure
from distmatch.methods.distill import Distiller
from distmatch.models.folder import how_to_sample
from distmatch.models.info import Info
from distmatch.pipeline import DistilledPipeline, TeacherPipeline, side_by_side
from distmatch.planning.preflight import Flight, checks, cleared
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.settle import settled
from distmatch.system import parallel
from distmatch.system.files import write_atomic
from distmatch.system.ownership import owns_out
from distmatch.system.screen import console
from distmatch.system.terminal import command, notice
from distmatch.system.workers import using
from distmatch.training.checkpoint import Checkpoints
from distmatch.training.clip_share import Clipping, distillation
from distmatch.training.train import Plan, train

ALIKE = 0.05
"""How much a student's images must differ, as a share of the teacher's, not to be called alike. Of the students
of "CIFAR-10 on a CPU" in docs/results.md the one that collapsed has 0.02, three others 0.70 to 0.97 (20 images)."""


@parallel.process_group()
@owns_out
@chooses_for_memory
def distil(recipe: Recipe, out: Path, runs: Path = Path("runs"), teacher: tuple[Denoiser, Info] | None = None) -> None:
    """Run `distmatch train`: build pairs if the recipe needs them, then distil into `out`.

    Args:
        runs: the folder where pair stores are shared.
        teacher: your own denoiser, with its image shape and classes; `recipe.teacher` then only names it.
    """
    recipe = _settled(recipe, out)
    workers = build.workers(recipe)
    with using(workers):
        _distil(recipe, out, runs, teacher)


def _distil(recipe: Recipe, out: Path, runs: Path, teacher: tuple[Denoiser, Info] | None) -> None:
    flight = Flight(recipe, out, runs, teacher)
    stages, (subject, spaces) = flight.stages, cleared(flight)
    del flight  # and with it the networks that were tried
    binding.bind(recipe, subject, out)
    if _finished(recipe, out):
        _say_next(out, f"The run in {out} is finished; the")
        return
    subjects.encode_prompts(recipe, subject)
    ends = [stage.until for stage in recipe.stages] or [recipe.steps]

    def pairs_of(stage: Recipe) -> PairStore | None:
        return build.pair_store(stage, subject, runs) if objectives.reads_pairs(stage) else None

    # Build pairs now if the teacher will be sharded, or rounded, below.
    if recipe.parallel == "fsdp" or recipe.base_weights != "fp32":
        for stage in stages:
            pairs_of(stage)
    watch = Clipping()
    distiller, done = None, max(Checkpoints(out / "checkpoints", {}).steps(), default=0)
    for number, (stage, end) in enumerate(zip(stages, ends, strict=True), 1):
        if end <= done and end < recipe.steps:
            continue  # a resumed run continues in the stage where it stopped
        pairs = pairs_of(stage)
        if distiller is None:
            distiller = build.distiller(stage, subject, pairs, any(map(objectives.trains_fake, stages)))
            watch = distillation(
                distiller.student, distiller.steps.times[0], recipe.student.optimizer.clip, recipe.fake.optimizer.clip
            )
        else:
            build.enter(distiller, stage, subject, pairs)
        if recipe.stages:
            build.schedule(distiller, recipe, number - 1)
        title = recipe.name if len(ends) == 1 else f"{recipe.name}, stage {number} of {len(ends)}"
        _train(recipe, subject, distiller, spaces, out, end, title, watch)
    assert distiller is not None
    if len(subject.info.shape) == 3:
        _teacher_student(recipe, subject, distiller, out)
    _say_next(out, "The")


@parallel.process_group()
@chooses_for_memory
def check(recipe: Recipe, out: Path, runs: Path = Path("runs"), teacher: tuple[Denoiser, Info] | None = None) -> None:
    """Run `distmatch train --check`: only the checks that `distil` makes first, one line per result."""
    recipe = _settled(recipe, out)
    for name, found in checks(Flight(recipe, out, runs, teacher)):
        _say(f"✓ {name:<10} {found}")
    _say("Nothing stands in the way of this run")


@parallel.on_first
def _finished(recipe: Recipe, out: Path) -> bool:
    """Return whether the run in `out` has made all that it makes: its picture, the last, is of the finished student.

    Of points there is none, and `model` may be what an earlier stage left: it is written again.
    """
    last = max(Checkpoints(out / "checkpoints", {}).steps(), default=0)
    made = all((out / name).exists() for name in ("model/config.json", "teacher-student.png"))
    return last >= recipe.steps and made


def _settled(recipe: Recipe, out: Path) -> Recipe:
    """Return `recipe` without `auto`. Raise `UserError` if the run in `out` began with a different one."""
    began = binding.begun(out)
    found = settled(recipe, began)
    binding.same_recipe(found.recipe, began, out)
    if found.said:
        _say(f"On this machine: {found.said}")
    return found.recipe


def _train(
    recipe: Recipe,
    subject: subjects.Subject,
    distiller: Distiller,
    spaces: Sequence[Space],
    out: Path,
    steps: int,
    title: str,
    watch: Clipping,
) -> None:
    """Train the run in `out` up to step `steps`, measuring in `spaces` if there are any."""
    figures: Callable[[], dict[str, float]] | None = None
    if spaces:

        def frechet() -> dict[str, float]:
            student = DistilledPipeline(
                distiller.ema.network, distiller.info, subjects.components_of(recipe, subject.info, distiller.device)
            )
            n, seed = recipe.evaluate.images, recipe.seed + 1
            batch = 4 if subject.info.latent else 256
            return measure(student, spaces, n=n, seed=seed, conditions=subject.conditions, batch=batch, full=False)

        figures = frechet

    plan = Plan(
        steps,
        recipe.steps,
        log_every=recipe.log.every,
        save_every=recipe.checkpoint.every,
        preview_every=recipe.log.preview,
        evaluate_every=recipe.evaluate.every,
        keep=recipe.checkpoint.keep,
    )
    config = recipe.model_dump(mode="json")
    train(distiller, out, plan, evaluate=figures, watch=watch, trackers=recipe.log.track, config=config, title=title)


def _teacher_student(recipe: Recipe, subject: subjects.Subject, distiller: Distiller, out: Path) -> None:
    """Write `teacher-student.png`: the images of both from the same noise."""
    p, info = recipe.pairs, subject.info
    guidance = recipe.scale(p.guidance)
    parts = subjects.components_of(recipe, info, distiller.device)
    slow = TeacherPipeline(subject.denoiser, info, parts, sampler=p.sampler, steps=p.steps, guidance=guidance)
    fast = DistilledPipeline(distiller.ema.network, distiller.info, parts)
    columns, rows, zoom = (4, 2, 1) if info.latent else (10, 4, 2)
    picture, varied = side_by_side(slow, fast, subject.conditions, columns, rows)
    file = out / "teacher-student.png"
    if parallel.rank() == 0:
        write_atomic(file, lambda path: path.write_bytes(imaging.png(picture, zoom=zoom)))
    if varied < ALIKE:
        notice(
            f"the student's images are nearly alike: they differ from one another by {varied:.0%} of what the "
            f"teacher's do; see {file}. Add the term regress, or let the fake score keep up: fake.steps=5, or a "
            "student.optimizer.lr below fake.optimizer.lr"
        )


def _say_next(out: Path, said: str) -> None:
    """Say, after what was `said`, where the student of the run in `out` is, and what can be done with it."""
    if parallel.rank() == 0:  # which alone has written the student
        console.print(f"{said} student is in {out / 'model'}. Next: {how_to_sample(out)}, {command('report', out)}")


def _say(text: str) -> None:
    """Print `text` once, however many processes there are."""
    if parallel.rank() == 0:
        console.print(text)
