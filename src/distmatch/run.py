"""What the commands do: objects put together, progress shown, results written, the next step named."""

import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from distmatch import build, data, parallel, samples
from distmatch.checkpoint import Checkpoints
from distmatch.clipping import Clipping, distillation
from distmatch.config import dump, free_entries
from distmatch.denoiser import Denoiser
from distmatch.distill import Distiller
from distmatch.entry import flat
from distmatch.errors import UserError
from distmatch.evaluation import Space, columns, hardware, judge, speed
from distmatch.evaluation import evaluate as measure
from distmatch.files import check_writable, write_atomic, write_json
from distmatch.models import published
from distmatch.models.folder import how_to_sample
from distmatch.models.info import Info
from distmatch.models.library import components
from distmatch.ownership import owns_out
from distmatch.pairs import MANIFEST, PairStore, prompts_digest
from distmatch.pipeline import DistilledPipeline, Pipeline, TeacherPipeline, side_by_side
from distmatch.plain import read_json, read_yaml
from distmatch.preflight import Flight, checks, cleared
from distmatch.progress import progress
from distmatch.recipe_entries import Recipe, parse_recipe
from distmatch.screen import console
from distmatch.solvers import evaluations
from distmatch.spaces import default_features, find_spaces, known_rows
from distmatch.storage import Folder
from distmatch.terminal import command
from distmatch.train import Plan, train


@parallel.joined()
@owns_out
def distil(recipe: Recipe, out: Path, runs: Path = Path("runs"), teacher: tuple[Denoiser, Info] | None = None) -> None:
    """`distmatch train`: pairs if the recipe needs them, then the distillation, into `out`.

    Args:
        runs: the folder where pair stores are shared.
        teacher: a denoiser of one's own with the shape and classes of its images; `recipe.teacher` is then its name.
    """
    parallel.first(lambda: _same_recipe(recipe, out))
    flight = Flight(recipe, out, runs, teacher)
    stages, (subject, spaces) = flight.stages, cleared(flight)
    del flight  # and the networks that were tried
    parallel.first(lambda: _bind(recipe, subject, out))
    ends = [stage.until for stage in recipe.stages] or [recipe.steps]
    if recipe.parallel == "fsdp":  # the teacher makes them while it is whole; it is sharded afterwards
        for stage in (stage for stage in stages if build.reads_pairs(stage)):
            _pairs(stage, subject, runs)
    watch = Clipping()
    distiller, done = None, max(Checkpoints(out / "checkpoints", {}).steps(), default=0)
    for number, (stage, end) in enumerate(zip(stages, ends, strict=True), 1):
        if end <= done and end < recipe.steps:
            continue  # a continued run lands in the stage where it was
        pairs = _pairs(stage, subject, runs) if build.reads_pairs(stage) else None
        if distiller is None:
            distiller = build.distiller(stage, subject, pairs)
            watch = distillation(
                distiller.student, distiller.steps.times[0], recipe.student.optimizer.clip, recipe.fake.optimizer.clip
            )
        else:
            distiller.objective = build.objective(stage, subject, distiller.fake, pairs, distiller.objective)
        title = recipe.name if len(ends) == 1 else f"{recipe.name}, stage {number} of {len(ends)}"
        _train(recipe, subject, distiller, spaces, out, end, title, watch)
    assert distiller is not None
    if len(subject.info.shape) == 3:
        _teacher_student(recipe, subject, distiller, out)
    look = how_to_sample(out, distiller.student.net, distiller.info)
    _say(f"The student is in {out / 'model'}. Next: {look}, {command('report', out)}")


@parallel.joined()
def check(recipe: Recipe, out: Path, runs: Path = Path("runs"), teacher: tuple[Denoiser, Info] | None = None) -> None:
    """`distmatch train --check`: what `distil` would do first, told line by line, and nothing else."""
    parallel.first(lambda: _same_recipe(recipe, out))
    for name, found in checks(Flight(recipe, out, runs, teacher)):
        _say(f"✓ {name:<10} {found}")
    _say("Nothing stands in the way of this run")


def _train(
    recipe: Recipe,
    subject: build.Subject,
    distiller: Distiller,
    spaces: Sequence[Space],
    out: Path,
    steps: int,
    title: str,
    watch: Clipping,
) -> None:
    """The run in `out` as far as `steps`, measured in `spaces` where there are any."""
    figures: Callable[[], dict[str, float]] | None = None
    if spaces:

        def frechet() -> dict[str, float]:
            student = DistilledPipeline(
                distiller.ema.network, distiller.info, components(subject.info, distiller.device)
            )
            n, seed, batch = recipe.evaluate.images, recipe.seed + 1, 4 if subject.info.latent else 256
            return measure(student, spaces, n=n, seed=seed, conditions=subject.conditions, batch=batch, full=False)

        figures = frechet

    plan = Plan(
        steps,
        log_every=recipe.log.every,
        save_every=recipe.checkpoint.every,
        preview_every=recipe.log.preview,
        evaluate_every=recipe.evaluate.every,
        keep=recipe.checkpoint.keep,
    )
    config = recipe.model_dump(mode="json")
    train(distiller, out, plan, evaluate=figures, watch=watch, trackers=recipe.log.track, config=config, title=title)


def _teacher_student(recipe: Recipe, subject: build.Subject, distiller: Distiller, out: Path) -> None:
    """`teacher-student.png`: what both make of the same noise."""
    p, info = recipe.pairs, subject.info
    guidance = p.guidance if recipe.student.guidance is None else None
    parts = components(info, distiller.device)
    slow = TeacherPipeline(subject.denoiser, info, parts, sampler=p.sampler, steps=p.steps, guidance=guidance)
    fast = DistilledPipeline(distiller.ema.network, distiller.info, parts)
    columns, rows, zoom = (4, 2, 1) if info.latent else (10, 4, 2)
    picture = side_by_side(slow, fast, subject.conditions, columns, rows)
    if parallel.rank() == 0:
        write_atomic(out / "teacher-student.png", lambda path: path.write_bytes(data.png(picture, zoom=zoom)))


def _say(text: str) -> None:
    """Tell it once, however many processes there are."""
    if parallel.rank() == 0:
        console.print(text)


def _pairs(recipe: Recipe, subject: build.Subject, runs: Path) -> PairStore:
    """The recipe's pairs. What they will take is said before they are built."""
    spec = build.pair_spec(recipe, subject)
    folder = build.pairs_folder(recipe, spec, runs)
    if not Folder(folder).exists(MANIFEST):
        nfe = evaluations(spec.sampler, spec.steps) * (1 if spec.guidance == 1 else 2)
        _say(f"{spec.count:,} pairs of {nfe} evaluations each, {_size(spec.nbytes)}, in {folder}")
    return build.pair_store(recipe, subject, runs)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _same_recipe(recipe: Recipe, out: Path) -> None:
    """Refuse to continue a run with another recipe."""
    file = out / "recipe.yaml"
    if _has_begun(file):
        before = flat(parse_recipe(read_yaml(file), str(file)).model_dump(mode="json"))
        now = flat(recipe.model_dump(mode="json"))
        free = free_entries()
        _same({k: v for k, v in now.items() if k not in free}, before, out)


def _bind(recipe: Recipe, subject: build.Subject, out: Path) -> None:
    """Write down what the run in `out` is of, before anything else is made. Refuse to continue one of another teacher,
    or of prompts that were edited."""
    file, now = out / "teacher.json", {"teacher": recipe.teacher, "fingerprint": subject.fingerprint}
    if subject.prompts:
        now["prompts"] = prompts_digest(subject.prompts)
    same_settings(now, file, new={"prompts"})
    write_atomic(out / "recipe.yaml", lambda p: p.write_text(dump(recipe)))


def same_settings(settings: dict[str, Any], file: Path, new: Collection[str] = ()) -> None:
    """Refuse to continue a run with other `settings` than those in `file`; a run that has saved nothing is replaced.

    Args:
        new: settings that runs of earlier versions have not written down.
    """
    remedy = "Delete it to go on, if you know that its settings were these"
    before = read_json(file, dict[str, Any], remedy) if file.exists() else {}
    if _has_begun(file):
        _same({k: v for k, v in settings.items() if k in before or k not in new}, before, file.parent)
    else:
        shutil.rmtree(file.parent / "previews", ignore_errors=True)
        (file.parent / "wandb-id").unlink(missing_ok=True)
    write_json(file, settings)


def _has_begun(file: Path) -> bool:
    """Whether the run that `file` describes has saved anything that another one would not make again.

    Raises `UserError` where something is saved that was not made by such a run.
    """
    out = file.parent
    found = next((name for name in ("model", "methods", "checkpoints/step-*") if any(out.glob(name))), None)
    if found and not file.exists():
        raise UserError(
            f"{out} holds {out / found} of something else: it has no {file.name}. Choose another folder with --out"
        )
    return bool(found)


def _same(now: dict[str, Any], before: dict[str, Any], out: Path) -> None:
    changed = [k for k in now if now[k] != before.get(k)]
    if changed:
        lines = "\n".join(f"  {k}: {before.get(k)} there, {now[k]} here" for k in changed)
        raise UserError(f"{out} is a run with other settings:\n{lines}\nChoose another folder with --out, or delete it")


@owns_out
def import_edm(source: str, out: Path) -> None:
    """`distmatch import edm`."""
    denoiser, info = published.import_edm(source, out)
    parameters = sum(p.numel() for p in denoiser.parameters())
    console.print(
        f"{parameters:,} parameters, images {info.shape}, {len(info.classes) or 'no'} classes, "
        f"prediction {denoiser.prediction.name}; in {out}. Next: "
        f"{command('sample', out, '--steps', 18, '-n', 16)}"
    )


@parallel.joined()
def pairs(recipe: Recipe, runs: Path) -> None:
    """`distmatch pairs build`."""
    _pairs(recipe, build.subject(recipe), runs)


def checkpoints(run: Path, verify: bool, keep: int | None) -> None:
    """`distmatch checkpoints`."""
    if keep is not None and keep < 1:
        raise UserError(f"--keep {keep}: at least the latest stays; give 1 or more")
    found = Checkpoints(run / "checkpoints", {}, keep or 1)
    if not found.steps():
        raise UserError(f"{run} has no checkpoints; expected a run's folder, e.g. runs/mnist")
    for step in found.prune() if keep else ():
        console.print(f"deleted step {step}")
    best, problems = found.best(), 0
    table = Table("step", "size", "shards", "saved", "")
    for step in found.steps():
        files = list(found.path(step).glob("*.safetensors"))
        saved = datetime.fromtimestamp((found.path(step) / "state.json").stat().st_mtime).isoformat(" ", "seconds")
        remark = f"best, {best['score']:.3f}" if best and best["step"] == step else ""
        if verify:
            try:
                found.verify(step)
                remark += " complete and finite"
            except UserError as error:
                remark, problems = str(error), problems + 1
        table.add_row(str(step), _size(sum(f.stat().st_size for f in files)), str(len(files)), saved, remark.strip())
    console.print(table)
    if problems:
        raise UserError(f"{problems} of {len(found.steps())} checkpoints cannot be used; delete them to go on without")


def verify(folder: str) -> None:
    """`distmatch pairs verify`."""
    store = PairStore.open(folder)
    with progress("verify", len(store), unit="pair") as advance:
        store.verify(advance)
    console.print(f"{folder}: {len(store):,} pairs, every byte as it was written, noise regenerated and equal")


def pipeline(model: str, steps: int | None, guidance: float | None, device: str) -> Pipeline:
    """The student called `model`, or its teacher when `steps` of its sampler are given."""
    if steps is not None:
        return TeacherPipeline.from_pretrained(
            model, build.device(device), steps=steps, guidance=1.0 if guidance is None else guidance
        )
    student = DistilledPipeline.from_pretrained(model, build.device(device))
    if guidance not in (None, 1.0) and student.info.guidance is None:
        raise UserError(
            f"guidance {guidance} is for a teacher: give --steps too. This student's guidance is fixed by training"
        )
    return student


@owns_out
def sample(
    model: str,
    out: Path,
    n: int,
    seed: int,
    label: str | None,
    prompts: list[str] | None,
    steps: int | None,
    guidance: float | None,
    batch: int | None,
    device: str,
) -> None:
    """`distmatch sample`: `grid.png` and `000000.png` ... in `out`, the prompts in turn.

    An earlier call's pictures go. Raises `UserError` where `out` has others of such names.
    """
    replaced = samples.earlier(out)
    pipe = pipeline(model, steps, guidance, device)
    with progress("sample", n, unit="image") as advance:
        texts = [prompts[i % len(prompts)] for i in range(n)] if prompts else None
        scale = guidance if pipe.info.guidance is not None else None
        pixels = pipe(
            n, labels=label, prompts=texts, guidance_scale=scale, seed=seed, batch=batch, progress=advance
        ).pixels
    columns, zoom = max(1, min(len(pipe.info.classes) or 8, n)), 1 if pipe.info.latent else 2
    made = {"model": model, "seed": seed, "label": label, "prompts": prompts, "steps": steps, "guidance": guidance}
    samples.write(out, pixels, columns, zoom, made)
    instead = f", in place of {len(replaced)} of an earlier call" if replaced else ""
    console.print(
        f"{n} images, {pipe.nfe} evaluation{'s' * (pipe.nfe > 1)} each, in {out}{instead}; see {out / samples.GRID}"
    )


@parallel.joined()
def evaluate(
    model: str,
    n: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    feature_name: str | None,
    resize: str,
    real: str | None,
    batch: int,
    out: Path | None,
    device: str,
) -> None:
    """`distmatch eval`: in each of the processes of `torchrun`, if it was started by it; the first tells the result."""
    if out is not None and parallel.rank() == 0:
        check_writable(out)
    pipe = pipeline(model, steps, guidance, device)
    if pipe.info.text:
        raise UserError(f"{model} makes images of prompts; `distmatch compare` measures such models")
    name = feature_name or ("pixels" if real else default_features(model, pipe.info))
    spaces = find_spaces(name, real, resize, pipe.device, pipe.info.shape)
    known = known_rows(name, pipe.info, spaces, n)
    with progress(f"eval {model}", n, unit="image") if parallel.rank() == 0 else nullcontext() as advance:
        figures = measure(pipe, spaces, n=n, seed=seed, batch=batch, progress=advance)
    if parallel.rank() > 0:
        return
    row = {
        "name": row_name(model, pipe.nfe),
        "nfe": pipe.nfe,
        "images": n,
        "seed": seed,
        **figures,
        **speed(pipe, batch),
    }
    rows = [row, *known]
    print_rows(rows)
    say_spaces(name, spaces)
    if pipe.info.classes and judge(spaces, pipe.info.classes) is None:
        console.print(
            f"No class accuracy: no classifier here knows the classes {', '.join(pipe.info.classes[:6])}"
            f"{', ...' if len(pipe.info.classes) > 6 else ''} by these names"
        )
    if out is not None:
        used = {"features": name, "resize": resize, "reference": spaces[0][1].source}
        write_json(out, {"hardware": hardware(pipe.device), **used, "rows": rows})


def say_spaces(name: str, spaces: Sequence[Space]) -> None:
    """Say what was compared with what."""
    for space, real in spaces:
        count = f"{real.count:,} images, {real.source}" if real.count else real.source
        console.print(f"{space.name}: {len(real.mu)} features of {name}, against {count}")


def row_name(model: str, nfe: int) -> str:
    return f"{model}, {nfe} evaluation{'s' if nfe > 1 else ''}"


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Evaluation rows as a table, a model per column, which fits any terminal; figures that none has are left out."""
    table = Table("", *(row["name"] for row in rows))
    for key, (heading, form) in columns(rows).items():
        if key != "name":
            table.add_row(heading, *("-" if row.get(key) is None else form.format(row[key]) for row in rows))
    console.print(table)
