"""`distmatch compare`: compares a text-to-image student with its teacher, fast solvers and LCM-LoRA."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.options import Count, File, Images, Name, Out, Range

if TYPE_CHECKING:
    from distmatch.pipeline import Pipeline


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how."""

    prompts: Name = "coco"
    """A file (.txt, .jsonl, .parquet, or MS-COCO captions as .json), or coco: random captions from --coco."""

    coco: File | None = None
    """captions_val2014.json, from annotations_trainval2014.zip."""

    column: str | None = None
    """Key or column of the prompts; default: prompt, caption or text."""

    n: Images | None = None
    """Number of images to measure; default: 30,000 for coco, one per prompt of a file. Without --features and --clip,
    only the images of the picture are made."""

    seed: int = 1
    """Seed of the noise and of the choice of coco's captions."""

    guidance: Annotated[float, Parameter(validator=Range(1))] = 8.0
    """Guidance scale of the teacher and its solvers, and of a student that takes one. The paper uses 3 and 8."""

    lora: Name | None = None
    """An LCM-LoRA for 1, 2 and 4 steps: a file, a folder, or latent-consistency/lcm-lora-sdv1-5."""

    features: Name | None = None
    """inception:FILE for FID, see `distmatch eval`; images are resized as in clean-fid."""

    reference: File | None = None
    """Real images for FID: their folder (val2014), or statistics made with --resize clean."""

    clip: File | None = None
    """OpenCLIP weights for the CLIP score: a file, or its folder."""

    clip_model: str = "ViT-g-14"
    """OpenCLIP's name of that network."""

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
        A folder in diffusers' format, or the name of a model on Hugging Face.
    student
        A model or run folder; default: no student.
    """
    from distmatch.commands.shared import find_student
    from distmatch.data.prompts import coco_prompts, read_prompts
    from distmatch.models.library import diffusers_source
    from distmatch.system import parallel

    need("diffusers", "transformers", by="a comparison")
    name, teacher = Path(teacher).name, diffusers_source(teacher) or teacher  # if not, a model id
    with parallel.process_group():
        if options.prompts != "coco":
            prompts = read_prompts(Path(options.prompts), options.column)
            n = options.n or len(prompts)
        elif options.coco is not None:
            n = options.n or 30_000
            prompts = coco_prompts(options.coco, n, options.seed)
        else:
            raise UserError("--prompts coco needs the captions: --coco captions_val2014.json")
        ours = None if student is None else find_student(student, None, options.device)
        out = options.out or Path("runs") / f"compare-{name}"
        compare_on(prompts, teacher, ours, replace(options, n=n, picture=min(options.picture, n), out=out))


def compare_on(prompts: list[str], teacher: str, student: "Pipeline | None", options: Options) -> list[dict[str, Any]]:
    """Return a row of figures per method; write them to `compare.json`, and the first pictures to `compare.png`.

    Several processes (see `parallel`) share the images; the first one gets the rows, the others an empty list. A
    finished method is kept in `OUT/methods` and not repeated.

    Args:
        teacher: a folder in diffusers' format, or the name of a model on Hugging Face.
        options: with `n` and `out` set. `guidance` applies to the teacher, its solvers and a student that takes one;
            for any other student and for LCM-LoRA, guidance is part of the weights.

    Raises `UserError` if something is missing or does not fit, or if `out` has figures of other settings.
    """
    from distmatch.system.ownership import owned

    n, picture, batch = options.n, options.picture, options.batch
    assert options.out is not None
    assert n is not None
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
        return _compare(prompts, teacher, student, options, n, options.out)


def _compare(
    prompts: list[str], teacher: str, student: "Pipeline | None", options: Options, n: int, out: Path
) -> list[dict[str, Any]]:
    import json
    from functools import partial
    from hashlib import sha256

    import torch

    from distmatch.commands.binding import same_settings
    from distmatch.commands.comparison import Comparison, fid_space, finished, method_folder
    from distmatch.commands.sheet import sheet
    from distmatch.data import imaging
    from distmatch.data.pairs import fingerprint
    from distmatch.evaluation.baselines import digest, load_lora, load_teacher, methods
    from distmatch.evaluation.clip import ClipScore
    from distmatch.evaluation.measure import enough, hardware, show_rows, show_spaces
    from distmatch.models.diffusers.families import family_in
    from distmatch.models.diffusers.text import notice_cut
    from distmatch.recipe import subjects
    from distmatch.system import parallel
    from distmatch.system.files import write_atomic, write_json
    from distmatch.system.screen import console

    precisions = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    device = subjects.device(options.device)
    dtype = precisions[options.precision]
    picture = options.picture
    pipe = load_teacher(teacher, device, dtype)
    notice_cut(pipe, prompts[:n])
    merged = None if options.lora is None else load_lora(teacher, options.lora, device, dtype)
    shape = family_in(teacher).settings(teacher).shape
    if student is not None and tuple(student.info.shape) != shape:
        raise UserError(
            f"the student makes samples of shape {tuple(student.info.shape)} and the teacher {teacher} of {shape}; "
            "compare a student with the teacher that it was made from"
        )
    settings = {
        "teacher": teacher,
        "teacher_weights": digest(pipe.unet),
        "student_weights": None if student is None else fingerprint(student.denoiser),
        "prompts": sha256(json.dumps(prompts).encode()).hexdigest(),
        "guidance": options.guidance,
        "n": n,
        "seed": options.seed,
        "lora": options.lora,
        "features": options.features,
        "reference": None if options.reference is None else str(options.reference),
        "clip_weights": None if options.clip is None else str(options.clip),
        "clip_model": options.clip_model,
        "dtype": str(dtype).removeprefix("torch."),
        "picture": picture,
    }
    space = None if options.features is None else fid_space(options.features, options.reference, device)
    clip = None if options.clip is None else ClipScore(options.clip, options.clip_model, device)
    count = n if space or clip else picture
    if space is not None:
        enough(len(space[1].mu), count, "images (-n)")
        enough(len(space[1].mu), space[1].count or count, f"real images ({space[1].source})")
    parallel.on_first(lambda: same_settings(settings, out / "settings.json"))
    comparison = Comparison(prompts, shape, options.seed, space, clip)
    columns = methods(pipe, merged, student, options.guidance, dtype)
    if count > picture:  # try all methods first: an error in the last should not show up after hours of the others
        for method in (one for one in columns if not (method_folder(out, one.name) / "figures.json").exists()):
            comparison.look(method, range(1))
    rows: list[dict[str, Any]] = []
    for method in columns:
        folder = method_folder(out, method.name)
        done = parallel.on_first(partial(finished, folder, method.name, picture))
        if done is None:
            figures, pictures = comparison.measure(method, count, options.batch, picture)
            latency = parallel.on_first(partial(comparison.latency, method))
            done = {"name": method.name, "nfe": method.nfe, "images": count, "ms_per_image": latency, **figures}
            if parallel.rank() == 0:
                for i, image in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
                    write_atomic(folder / f"{i:06d}.png", lambda p, image=image: p.write_bytes(imaging.png(image)))
                write_json(folder / "figures.json", done)  # last, because this file marks the method as finished
        rows.append(done)
    if parallel.rank() > 0:
        return []
    write_json(out / "compare.json", {"hardware": hardware(device), **settings, "rows": rows})
    shown = sheet(out, rows, [prompts[i % len(prompts)] for i in range(picture)])
    write_atomic(out / "compare.png", lambda p: p.write_bytes(imaging.png(shown)))
    show_rows(rows)
    if space is not None:
        show_spaces(options.features or "", [space])
    console.print(f"Pictures and figures are in {out}; see {out / 'compare.png'}")
    return rows
