"""Every method of a comparison, one after another: measured, kept, and shown side by side."""

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distmatch.commands.binding import same_settings
from distmatch.commands.comparison import REAL, Comparison, finished, method_folder, with_ratios
from distmatch.commands.references import fid_space, lookup, published_spaces
from distmatch.commands.sheet import sheet
from distmatch.data import imaging
from distmatch.data.images import Images as Pictures
from distmatch.data.pairs import fingerprint
from distmatch.evaluation.baselines import digest, load_lora, load_teacher, methods
from distmatch.evaluation.clip import ClipScore
from distmatch.evaluation.measure import enough, fewest, hardware, show_rows, show_spaces
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.text import notice_cut
from distmatch.pipeline import Pipeline
from distmatch.recipe import subjects
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic, write_json
from distmatch.system.screen import console

if TYPE_CHECKING:
    from distmatch.commands.compare import Options

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(
    prompts: list[str],
    teacher: str,
    student: Pipeline | None,
    options: "Options",
    pictures: Pictures | None,
    n: int,
    out: Path,
) -> list[dict[str, Any]]:
    """Return a row of figures per method; see `compare.compare_on`, which has checked the arguments."""
    device = subjects.device(options.device)
    dtype = PRECISIONS[options.precision]
    picture = options.picture
    pipe = load_teacher(teacher, device, dtype)
    notice_cut(pipe, prompts[:n])
    merged = None if options.lora is None or options.only_student else load_lora(teacher, options.lora, device, dtype)
    made = family_in(teacher).settings(teacher)
    shape = made.shape
    if student is not None and tuple(student.info.shape) != shape:
        raise UserError(
            f"the student makes samples of shape {tuple(student.info.shape)} and the teacher {teacher} of {shape}; "
            "compare a student with the teacher that it was made from"
        )
    clip = None if options.clip is None else ClipScore(options.clip, options.clip_model, device)
    measures = options.features is not None or clip is not None
    count = n if measures else picture
    spaces, looked_up = _spaces(options, max(made.size), count, device)
    settings = _settings(prompts, teacher, pipe, student, options, n)
    parallel.on_first(same_settings)(settings, out / "settings.json")
    found = lookup(looked_up, prompts, pictures)
    comparison = Comparison(
        prompts, shape, options.seed, spaces, clip, found, None if pictures is None else pictures.pixels
    )
    assert options.guidance is not None
    columns: list[Any] = methods(pipe, merged, student, options.guidance, dtype)
    if options.only_student:
        columns = columns[:1]
    elif pictures is not None:
        columns.append(None)
    names = [REAL if method is None else method.name for method in columns]
    if count > picture:  # try all methods first: an error in the last should not show up after hours of the others
        for name, method in zip(names, columns, strict=True):
            if not (method_folder(out, name) / "figures.json").exists():
                comparison.look(method, range(1))
    rows: list[dict[str, Any]] = []
    for name, method in zip(names, columns, strict=True):
        done = finished(method_folder(out, name), name, picture)
        if done is None:
            size = min(count, len(prompts)) if method is None else count
            done = _measure(comparison, method, name, size, options, method_folder(out, name))
        rows.append(done)
    if parallel.rank() > 0:
        return []
    _show(prompts, rows, settings, spaces, looked_up, options, out)
    return rows


def _spaces(options: "Options", side: int, count: int, device: torch.device) -> tuple[list[Any], Any]:
    """Return the feature spaces with their references, and the real pictures that names are looked up among, if any.

    Refuses, or says, what `count` images are too few for; `side` is theirs, in pixels.
    """
    if options.features is None:
        return [], None
    if options.features == "efficientnet":
        spaces, looked_up = published_spaces(options.reference, side, device)
    else:
        spaces, looked_up = [fid_space(options.features, options.reference, device)], None
    for space, known in spaces:
        if looked_up is None:
            enough(len(known.mu), count, "images (-n)")
            enough(len(known.mu), known.count or count, f"real images ({known.source})")
        elif count < fewest(len(known.mu)):
            console.print(f"Fewer than {fewest(len(known.mu)):,} images: no distances in {space.name}")
    return spaces, looked_up


def _settings(
    prompts: list[str], teacher: str, pipe: Any, student: Pipeline | None, options: "Options", n: int
) -> dict[str, Any]:
    """Return all that decides the figures: a comparison continues only with the same."""
    return {
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
        "dtype": str(PRECISIONS[options.precision]).removeprefix("torch."),
        "picture": options.picture,
        **({"only_student": True} if options.only_student else {}),  # or compare.json would lose the other methods
    }


def _measure(
    comparison: Comparison, method: Any, name: str, size: int, options: "Options", folder: Path
) -> dict[str, Any]:
    """Return the figures of `size` images of `method`, or of the real pictures for `None`; write them to `folder`."""
    measured = comparison.measure(method, size, options.batch, min(options.picture, size))
    done = {"name": name, "images": size, **measured.figures}
    if method is not None:
        latency = parallel.on_first(comparison.latency)(method)
        done = {"name": name, "nfe": method.nfe, "images": size, "ms_per_image": latency, **measured.figures}
    if parallel.rank() == 0:
        for i, image in enumerate(measured.pictures.permute(0, 2, 3, 1).numpy()):
            write_atomic(folder / f"{i:06d}.png", lambda p, image=image: p.write_bytes(imaging.png(image)))
        if measured.each:
            said = [comparison.prompts[i % len(comparison.prompts)] for i in range(size)]
            write_json(folder / "images.json", {"prompt": said, **measured.each})
        write_json(folder / "figures.json", done)  # last, because this file marks the method as finished
    return done


def _show(
    prompts: list[str],
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    spaces: list[Any],
    looked_up: Any,
    options: "Options",
    out: Path,
) -> None:
    """Write `compare.json` and `compare.png`; print the figures."""
    write_json(out / "compare.json", {"hardware": hardware(subjects.device(options.device)), **settings, "rows": rows})
    shown = sheet(out, rows, [prompts[i % len(prompts)] for i in range(options.picture)])
    write_atomic(out / "compare.png", lambda p: p.write_bytes(imaging.png(shown)))
    show_rows(with_ratios(rows))
    show_spaces(options.features or "", spaces)
    if looked_up is not None:
        gallery, copy = looked_up
        nearer = "" if copy is None else f"; a copy is nearer than {copy:.3f} to a training picture"
        console.print(f"Names are looked for among {len(gallery.names):,}{nearer}")
    console.print(f"Pictures and figures are in {out}; see {out / 'compare.png'}")
