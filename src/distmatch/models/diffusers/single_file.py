"""Models that are shared as one `.safetensors` file: unpacked once, to a folder in diffusers' format in the cache.

Such a file holds weights alone, under the names of the original implementation. Their settings and tokenizers come from
elsewhere: a folder beside the file, the base model in Hugging Face's cache, or this package.
"""

import gzip
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

from distmatch.models.diffusers.cache import folder_with
from distmatch.models.diffusers.small import clip_tokenizer, libraries
from distmatch.models.layout import shapes_in
from distmatch.system.digests import Damaged
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import together
from distmatch.system.paths import CACHE
from distmatch.system.plain import read_json
from distmatch.system.progress import console

BASES = {
    "v1": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
    "xl_base": ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
}
"""Models whose settings belong to a file, by diffusers' name for its kind: id, and folder of the package."""

PUBLISHED = Path(__file__).parent / "published"
NEEDED = ("model_index.json", "tokenizer/vocab.json", "unet/config.json", "vae/config.json")
"""What must be there of a base model in the cache: the first lies in its folder itself."""

MERGES = 48_894
"""Merges of CLIP's tokenizer."""


def unpacked(file: Path) -> Path:
    """Return the folder in diffusers' format with the weights in `file`; it is made on first use.

    Raises `UserError` if the file is damaged, or if its settings are not to be found.
    """
    beside = file.with_suffix("")
    known = [file, *sorted(beside.rglob("*.json"))]
    key = sha256(str([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in known]).encode())
    folder = CACHE / "single-files" / f"{file.stem}-{key.hexdigest()[:16]}"
    if not (folder / "model_index.json").exists():
        with _settings(file, beside) as settings:
            _unpack(file, settings, folder)
    return folder


def _unpack(file: Path, settings: Path, folder: Path) -> None:
    diffusers, _ = libraries()
    kind = str(read_json(settings / "model_index.json", dict[str, Any]).get("_class_name"))
    if not hasattr(getattr(diffusers, kind, None), "from_single_file"):
        raise UserError(f"{file}: {settings} is of a {kind}, which diffusers does not read from a single file")
    with safe_open(file, framework="pt") as content:
        names = list(content.keys())
        kept = content.get_tensor(names[0]).dtype
    console.print(f"Unpacking {file} to {folder}, once", soft_wrap=True)
    try:
        pipe = getattr(diffusers, kind).from_single_file(
            str(file),
            config=str(settings),
            local_files_only=True,
            torch_dtype=kept if kept in (torch.float16, torch.bfloat16) else torch.float32,
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "meta tensor" in reason:
            raise UserError(f"{file} lacks weights that a {kind} needs; it is no whole model") from error
        raise UserError(f"{file} cannot be read as a {kind} with the settings in {settings}: {reason:.300}") from error
    for name, part in pipe.components.items():
        weights = part.named_parameters() if isinstance(part, torch.nn.Module) else ()
        if absent := [weight for weight, value in weights if value.is_meta]:
            raise UserError(f"{file} lacks weights that a {kind} needs, in {name} {absent[0]}; it is no whole model")
    # How fine-tunes say in the file itself that they predict v, and that their noise ends at alpha = 0.
    changes = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    if "ztsnr" in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with together(folder, "model_index.json") as place:
        pipe.save_pretrained(place)
        scheduler = place / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(read_json(scheduler, dict[str, Any]) | changes, indent=2))


@contextmanager
def _settings(file: Path, beside: Path) -> Iterator[Path]:
    """Yield a folder in diffusers' format with the settings and tokenizers of the model in `file`."""
    try:
        shapes = shapes_in(file)
    except (Damaged, OSError) as error:
        raise UserError(f"{error}. Get a new copy") from error
    if (beside / "model_index.json").exists():
        yield beside
        return
    source, name = BASES.get(_kind(file, shapes), ("", ""))
    own = f"put a folder in diffusers' format with the settings and tokenizers of its base model beside it, {beside}"
    if not source:
        raise UserError(
            f"{file} holds weights alone, of a kind whose settings cannot be told from them: expected Stable Diffusion "
            f"1.x or XL, whole, as one file. If it is another, {own}"
        )
    if (cached := folder_with(source, NEEDED)) is not None:
        yield cached
        return
    merges = _merges()
    if merges is None:
        raise UserError(
            f"{file} holds weights alone. Its tokenizer is that of {source}, which is not in the cache: run `hf "
            f"download {source} --include '*.json' '*.txt'`, or install open_clip_torch, which has it; or {own}"
        )
    with TemporaryDirectory() as place:
        shutil.copytree(PUBLISHED / name, place, dirs_exist_ok=True)
        write_tokenizers(Path(place), merges)
        yield Path(place)


def write_tokenizers(folder: Path, merges: list[list[str]]) -> None:
    """Write the tokenizers that `model_index.json` lists to `folder`, and take from that list what a file lacks."""
    index = folder / "model_index.json"
    parts = read_json(index, dict[str, Any])
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        parts.pop(name, None)
    tokenizer = clip_tokenizer(merges, 77)
    for name in (name for name in parts if name.startswith("tokenizer")):
        tokenizer.pad_token = "!" if name == "tokenizer_2" else "<|endoftext|>"  # OpenCLIP's pads with token 0
        tokenizer.save_pretrained(folder / name)
    index.write_text(json.dumps(parts | {"requires_safety_checker": False}))


def _kind(file: Path, shapes: dict[str, list[int]]) -> str:
    """Return diffusers' name for the kind of model with weights of these `shapes`."""
    if "model.diffusion_model.input_blocks.0.0.weight" not in shapes or not any("first_stage" in k for k in shapes):
        return ""
    need("diffusers", by=str(file))
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    return infer_diffusers_model_type({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def _merges() -> list[list[str]] | None:
    """Return the merges of CLIP's tokenizer from OpenCLIP, if it is installed; it is not imported."""
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if file is None or not file.exists():
        return None
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    return [line.split() for line in lines[1 : MERGES + 1]]
