"""`distmatch compare`: a text-to-image student beside its teacher, fast solvers and LCM-LoRA (DMD, Tables 3 and 4).

Every method makes the same prompts from the same noise, rounded to 8 bits once. Images are measured as by Appendix D of
the paper (arXiv 2311.18828) and GigaGAN's evaluation code, which it uses: brought to 256 x 256 by Pillow's Lanczos
filter; FID as clean-fid has it; CLIP score by OpenCLIP. Latency is from a prompt to its pixels on the host, at batch 1.
The pictures are laid out as in Figures 6 and 8.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distmatch import build, data, parallel, rng
from distmatch.baselines import Method, digest, load_lora, load_teacher, methods
from distmatch.clip import MODEL, ClipScore
from distmatch.decode import SUFFIXES
from distmatch.errors import UserError
from distmatch.evaluation import Space, enough, hardware
from distmatch.features import Reference, reference
from distmatch.files import write_atomic, write_json
from distmatch.images import Images, load_images
from distmatch.metrics import Moments, frechet
from distmatch.models.diffusers.families import family_in
from distmatch.models.inception import load_inception
from distmatch.models.text import notice_cut
from distmatch.ownership import owns_out
from distmatch.pairs import fingerprint
from distmatch.pipeline import DistilledPipeline, Pipeline
from distmatch.plain import read_json
from distmatch.progress import progress
from distmatch.prompts import coco_prompts, read_prompts
from distmatch.run import print_rows, same_settings, say_spaces
from distmatch.screen import console
from distmatch.spaces import find_spaces

SIDE = 256
"""Of the images that are measured, in pixels."""

SECONDS = 3.0
"""How long a latency is measured for, at least."""

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@parallel.joined()
def command(
    teacher: str,
    student: str | None,
    out: Path,
    *,
    prompts: str,
    coco: Path | None,
    column: str | None,
    guidance: float,
    n: int | None,
    seed: int,
    lora: str | None,
    features: str | None,
    reference: Path | None,
    clip: Path | None,
    clip_model: str,
    batch: int,
    picture: int,
    precision: str,
    device: str,
) -> None:
    """`distmatch compare`: in each of the processes of `torchrun`, if it was started by it."""
    if prompts != "coco":
        said = read_prompts(Path(prompts), column)
        n = n or len(said)
    elif coco is not None:
        n = n or 30_000
        said = coco_prompts(coco, n, seed)
    else:
        raise UserError("--prompts coco needs the captions: --coco captions_val2014.json")
    where = build.device(device)
    ours = None if student is None else DistilledPipeline.from_pretrained(student, where)
    compare(
        teacher,
        ours,
        said,
        out,
        guidance=guidance,
        n=n,
        seed=seed,
        lora=lora,
        features=features,
        reference=reference,
        clip_weights=clip,
        clip_model=clip_model,
        device=where,
        dtype=PRECISIONS[precision],
        batch=batch,
        picture=min(picture, n),
    )


@owns_out
def compare(
    teacher: str,
    student: Pipeline | None,
    prompts: list[str],
    out: Path,
    *,
    guidance: float = 8.0,
    n: int = 30_000,
    seed: int = 0,
    lora: str | None = None,
    features: str | None = None,
    reference: Path | None = None,
    clip_weights: Path | None = None,
    clip_model: str = MODEL,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 16,
    picture: int = 7,
) -> list[dict[str, Any]]:
    """A row of figures per method, in `out/compare.json` too, and `out/compare.png` with the first `picture` prompts.

    Image `i` has prompt `i`, beginning again after the last, and noise `i` of `seed`. Several processes (see
    `parallel`) share the images; the first gets the rows, the others none. A method that is finished is kept in
    `out/methods` and not made again.

    Args:
        teacher: a folder in diffusers' format, or the name of one on Hugging Face.
        guidance: of the teacher and its solvers, at least 1, and of a student that takes one; that of any other student
            and of LCM-LoRA is in their weights.
        n: images that are measured. Without `features` and `clip_weights` only those of the picture are made.
        lora: an LCM-LoRA, a file or a folder, or the name of one on Hugging Face.
        features: `inception:FILE` for FID (see `models.inception`).
        reference: its real images: statistics made with resize `clean`, an archive or array of images, or a folder of
            images of any sizes, of which the squares in the middle are taken, as GigaGAN's evaluation code does.
        clip_weights: OpenCLIP's file for the CLIP score.

    Raises `UserError` for what is missing or does not fit, and where `out` has figures of other settings.
    """
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    if guidance < 1:
        raise UserError(f"guidance {guidance} is below 1, where diffusers' pipelines leave it out; expected 1 or more")
    if n < 1 or batch < 1 or not 1 <= picture <= n:
        raise UserError(
            f"{n} images in batches of {batch}, {picture} of them in the picture: expected n >= 1, batch >= 1 and "
            "1 <= picture <= n"
        )
    device = torch.device(device)
    pipe = load_teacher(teacher, device, dtype)
    notice_cut(pipe, prompts[:n])
    merged = None if lora is None else load_lora(teacher, lora, device, dtype)
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
        "guidance": guidance,
        "n": n,
        "seed": seed,
        "lora": lora,
        "features": features,
        "reference": None if reference is None else str(reference),
        "clip_weights": None if clip_weights is None else str(clip_weights),
        "clip_model": clip_model,
        "dtype": str(dtype).removeprefix("torch."),
        "picture": picture,
    }
    space = None if features is None else _space(features, reference, device)
    clip = None if clip_weights is None else ClipScore(clip_weights, clip_model, device)
    count = n if space or clip else picture
    if space is not None:
        enough(len(space[1].mu), count, "images (-n)")
        enough(len(space[1].mu), space[1].count or count, f"real images ({space[1].source})")
    parallel.first(lambda: same_settings(settings, out / "settings.json"))
    columns = methods(pipe, merged, student, guidance, dtype)
    if count > picture:  # hours of the first are no time to learn that the last cannot be made
        for method in (one for one in columns if not (_folder(out, one.name) / "figures.json").exists()):
            _look(method, prompts, shape, space, clip, seed, range(1))
    rows: list[dict[str, Any]] = []
    for method in columns:
        folder = _folder(out, method.name)
        done = parallel.first(partial(_finished, folder, method.name, picture))
        if done is None:
            made, pictures = measure(
                method, prompts, shape, space, clip, n=count, seed=seed, batch=batch, picture=picture
            )
            latency = parallel.first(lambda method=method: _latency(method, prompts[0], shape, seed))
            done = {"name": method.name, "nfe": method.nfe, "images": count, "ms_per_image": latency, **made}
            if parallel.rank() == 0:
                for i, image in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
                    write_atomic(folder / f"{i:06d}.png", lambda p, image=image: p.write_bytes(data.png(image)))
                write_json(folder / "figures.json", done)  # last: from now on the method is finished
        rows.append(done)
    if parallel.rank() > 0:
        return []
    write_json(out / "compare.json", {"hardware": hardware(device), **settings, "rows": rows})
    sheet = _sheet(out, rows, [prompts[i % len(prompts)] for i in range(picture)])
    write_atomic(out / "compare.png", lambda p: p.write_bytes(data.png(sheet)))
    print_rows(rows)
    if space is not None:
        say_spaces(features or "", [space])
    console.print(f"Pictures and figures are in {out}; see {out / 'compare.png'}")
    return rows


@torch.inference_mode()
def measure(
    method: Method,
    prompts: list[str],
    shape: tuple[int, ...],
    space: Space | None,
    clip: ClipScore | None,
    *,
    n: int,
    seed: int,
    batch: int,
    picture: int,
) -> tuple[dict[str, float], Tensor]:
    """`fid` and `clip_score` of `n` images, and the first `picture` of them u8[picture,3,H,W]; see `compare`.

    Several processes share the batches; the first gets the figures of one process to the last bit, the others none.
    """

    def look(rows: range) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
        pixels, seen, score = _look(method, prompts, shape, space, clip, seed, rows)
        return len(rows), pixels[: max(0, picture - rows.start)], seen, score

    moments, pictures, scores = Moments(), [], []
    jobs = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
    with progress(method.name, n, unit="image") if parallel.rank() == 0 else nullcontext() as advance:
        for size, shown, seen, score in parallel.shared(look, jobs):
            pictures.append(shown)
            if seen is not None:
                moments.update(seen)
            if score is not None:
                scores.append(score)
            if advance is not None:
                advance(size)
    if parallel.rank() > 0:
        return {}, torch.empty(0)
    figures: dict[str, float] = {}
    if space is not None:
        figures["fid"] = frechet(moments.mean, moments.cov, space[1].mu, space[1].cov)
    if scores:
        figures["clip_score"] = float(torch.cat(scores).double().mean())
    return figures, torch.cat(pictures)


@torch.inference_mode()
def _look(
    method: Method,
    prompts: list[str],
    shape: tuple[int, ...],
    space: Space | None,
    clip: ClipScore | None,
    seed: int,
    rows: range,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The method's images number `rows` u8[B,3,H,W], their features f[B,F], and their CLIP scores f[B]."""
    said = [prompts[i % len(prompts)] for i in rows]
    pixels = method.make(said, rng.noise(seed, rows, shape), lambda step: rng.noise(seed, rows, shape, step))
    small = lanczos(pixels) if space or clip else pixels
    seen = space[0].both(small)[0].float().cpu() if space else None
    return pixels, seen, clip(small, said) if clip else None


def lanczos(pixels: Tensor, side: int = SIDE) -> Tensor:
    """`pixels u8[B,3,H,W]` as u8[B,3,side,side] by Pillow's Lanczos filter."""
    images = (Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy())
    small = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def squares(folder: Path, side: int = SIDE, advance: Callable[[int], None] | None = None) -> Images:
    """The images in `folder`, of any sizes: the squares in their middle, by Pillow's Lanczos filter.

    Raises `UserError` as `load_images` does.
    """

    def square(image: Image.Image) -> Image.Image:
        if image.mode not in ("L", "RGB"):
            raise UserError("it has 16 bits per pixel; expected photographs of 8")
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        if advance is not None:
            advance(1)
        # cut first: with a box, `resize` would see what is around it
        middle = image.convert("RGB").crop((left, top, left + edge, top + edge))
        return middle.resize((side, side), Image.Resampling.LANCZOS)

    return load_images(folder, "all", fit=square)


def _space(name: str, real: Path | None, device: torch.device) -> Space:
    """The features of FID as clean-fid has it, with their reference."""
    if not name.startswith("inception:"):
        raise UserError(f"features {name!r}: FID is compared in those of Inception; give inception:FILE")
    if real is None or not real.is_dir():
        return find_spaces(name, None if real is None else str(real), "clean", device, ())[0]
    space = load_inception(Path(name.removeprefix("inception:")), "clean").to(device)

    def make() -> Reference:
        total = sum(file.suffix.lower() in SUFFIXES for file in real.rglob("*"))
        with progress("real images", total, unit="image") as advance:
            images = squares(real, advance=advance)
        with progress("reference", total, unit="image") as advance:
            return reference(images, space, keep=0, source=str(real), progress=advance)

    return space, parallel.first(make)


@torch.inference_mode()
def _latency(method: Method, prompt: str, shape: tuple[int, ...], seed: int) -> float:
    """Milliseconds from one prompt to its pixels: the median of at least 3, and of `SECONDS`, after one more."""
    z, times = rng.noise(seed, range(1), shape), []

    def later(step: int) -> Tensor:
        return rng.noise(seed, range(1), shape, step)

    began = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        method.make([prompt], z, later)  # ends on the host: the pixels are there
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times[1:])[(len(times) - 1) // 2]


def _folder(out: Path, method: str) -> Path:
    return out / "methods" / method.lower().replace(" ", "-")


def _finished(folder: Path, method: str, picture: int) -> dict[str, Any] | None:
    """The figures of `method`, if they and its pictures are there; damaged ones are made again."""
    try:
        done = read_json(folder / "figures.json", dict[str, Any])
        if done["name"] != method:
            raise UserError(f"{folder} holds the figures of {done['name']}")
        for i in range(picture):
            with Image.open(folder / f"{i:06d}.png") as image:
                image.verify()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, OSError, SyntaxError) as error:
        console.print(f"{error}\n{method} is measured again")
        return None
    return done


def _sheet(out: Path, rows: list[dict[str, Any]], prompts: list[str]) -> np.ndarray:
    """The methods' pictures side by side, names and latencies above them, each prompt below its own: u8[H,W,3]."""
    tiles = [
        [Image.open(_folder(out, row["name"]) / f"{i:06d}.png").convert("RGB") for row in rows]
        for i in range(len(prompts))
    ]
    width, height = tiles[0][0].size
    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", max(11, width // 20))
    line, gap = round(1.4 * font.size), max(2, width // 64)
    heads = [f"{row['name']}\n{row['ms_per_image']:,.0f} ms" for row in rows]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cell = max(width, *(ceil(probe.textbbox((0, 0), head, font)[2]) for head in heads)) + gap
    texts = [_wrapped(f"“{prompt}”", font, cell * len(rows) - 2 * gap) for prompt in prompts]
    total = 2 * line + 2 * gap + sum(height + line * len(text) + 2 * gap for text in texts)
    sheet = Image.new("RGB", (cell * len(rows) + gap, total), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.multiline_text((column * cell + cell // 2, gap), head, "black", font, "ma", align="center")
    top = 2 * line + 2 * gap
    for row, text in zip(tiles, texts, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * cell + (cell - width) // 2 + gap // 2, top))
        top += height + gap
        for words in text:
            pen.text((sheet.width // 2, top), words, "black", font, "ma")
            top += line
        top += gap
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` as lines that are no wider than `width` pixels, but for words that are."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
