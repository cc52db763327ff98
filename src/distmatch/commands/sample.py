"""`distmatch sample`: makes images with a student or teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from distmatch.commands.shared import find_pipeline, find_student
from distmatch.system.errors import UserError
from distmatch.system.options import Count, Images, Integer, Name, Out, Range, Scale
from distmatch.system.paths import shipped


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    n: Images = 64
    """Number of images."""

    seed: Integer = 0
    """Seed of the noise."""

    label: str | None = None
    """Class name or number for all images; default: the classes take turns."""

    prompt: Annotated[list[str] | None, Parameter(name=["--prompt", "-p"])] = None
    """For a text-to-image model: what to draw; several prompts take turns."""

    out: Out = None
    """Folder for the images, replacing those of an earlier call: 000000.png and so on by the number of their noise,
    grid.png with all of them, and sample.json, which says how they were made. Default: samples/MODEL, with --teacher
    samples/MODEL-teacher, where MODEL is the name of the model or of its folder. A folder called like a model of the
    package gets its parent's name in front, so that neither replaces the other's: runs/mnist has samples/runs-mnist."""

    teacher: bool = False
    """Sample the teacher called MODEL instead of the student."""

    steps: Count | None = None
    """With --teacher: number of sampler steps; default: 18 of Heun, 50 of PNDM for Stable Diffusion. A student only
    takes the number that it was trained for."""

    times: Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, validator=Range(0))] = None
    """Times at which a student is evaluated, falling, instead of those it was trained at. With fewer expect blur."""

    guidance: Scale | None = None
    """Classifier-free guidance, uncond + w (cond - uncond): of the teacher, or of a student trained on a range."""

    batch: Count | None = None
    """Images per batch; does not affect the images."""

    device: str = "auto"
    """auto, cpu or cuda."""


def sample(model: Name, /, options: Options = Options()) -> None:
    """Make images: a grid and single PNGs.

    Parameters
    ----------
    model
        A model or run folder, or a model of the package: mnist, emoji.
    """
    from distmatch.commands.binding import check_no_run
    from distmatch.evaluation import samples
    from distmatch.models.library import image_shape
    from distmatch.system.disk import check_room
    from distmatch.system.ownership import owned
    from distmatch.system.progress import progress
    from distmatch.system.screen import console, counted

    n, label, prompts = options.n, options.label, options.prompt
    source = _checked(model, options)
    out = options.out or Path("samples") / (_called(model, source) + "-teacher" * options.teacher)
    check_no_run(out)
    with owned(out):
        replaced = [file for file in samples.earlier(out) if file.name != samples.GRID]
        if options.times is None:
            pipe = find_pipeline(model, options.teacher, options.steps, options.guidance, options.device)
        elif options.teacher:
            raise UserError("--times is for students; a teacher takes --steps")
        else:
            how = {"steps": options.steps, "times": options.times}
            pipe = find_student(model, options.guidance, options.device, **how)
        taken = samples.nbytes(n, image_shape(pipe.info)) - sum(file.stat().st_size for file in replaced)
        check_room([(out, taken)], f"{counted(n, 'image')} may take", "choose another folder with --out, or lower -n")
        with progress("sample", n, unit="image") as advance:
            pixels = pipe(
                n,
                labels=label,
                prompts=[prompts[i % len(prompts)] for i in range(n)] if prompts else None,
                guidance_scale=options.guidance if pipe.info.guidance is not None else None,
                seed=options.seed,
                batch=options.batch,
                progress=advance,
            ).pixels
        columns, zoom = max(1, min(len(pipe.info.classes) or 8, n)), 1 if pipe.info.latent else 2
        made = {"model": model, "seed": options.seed, "label": label, "prompts": prompts}
        samples.write(
            out,
            pixels,
            columns,
            zoom,
            made | {name: getattr(options, name) for name in ("teacher", "steps", "times", "guidance")},
        )
    instead = f", in place of {len(replaced)} of an earlier call" if replaced else ""
    made_of = f"{counted(n, 'image')}, {counted(pipe.nfe, 'evaluation')} each"
    console.print(f"{made_of}, in {out}{instead}; see {out / samples.GRID}")


def _checked(model: str, options: Options) -> str:
    """Return where `model` is. Raises `UserError` for what it cannot draw, before its weights are read."""
    from distmatch.models.library import source_of, takes_prompts

    kind = "teacher" if options.teacher else "student"
    source = source_of(model, kind)
    if takes_prompts(model, kind):
        if not options.prompt:
            raise UserError('this model makes images of prompts; give one (-p of distmatch sample), as -p "red apple"')
        if options.label is not None:
            raise UserError(f"label {options.label!r}: this model has no classes; leave the label out")
    elif options.prompt:
        raise UserError("this model takes no prompts; give labels (--label of distmatch sample) if it has classes")
    return source


def _called(model: str, source: str) -> str:
    """Return the name for the images of `model`, which is at `source`: the model's own, or that of its folder.

    A folder that is called like a model of the package gets the name of what holds it before its own.
    """
    place = Path(model)
    if not place.is_dir() or not Path(source).is_relative_to(place):
        return place.name
    place = place.resolve()
    if place.name == "model":
        place = place.parent  # the run's
    return f"{place.parent.name}-{place.name}" if shipped(place.name) else place.name
