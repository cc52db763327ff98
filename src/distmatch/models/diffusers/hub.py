"""The only reader of models in diffusers' format, from a folder, a single file, the cache or the hub.

Settings are checked before anything is computed: those that change the mathematics are either followed or refused by
name. Weights are read from safetensors, in full or half precision, or from a folder's pickles as data; all of them must
be there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, TypeVar
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from pydantic import Field

from distmatch.diffusion.schedule import Schedule
from distmatch.models.diffusers.cache import folder_with, place_of
from distmatch.models.diffusers.single_file import unpacked
from distmatch.models.diffusers.small import libraries
from distmatch.models.layout import at_most
from distmatch.system import limits
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.finite import check_weights
from distmatch.system.plain import read_json
from distmatch.system.screen import counted

T = TypeVar("T")

MODEL_ID = r"[\w.-]+/[\w.-]+"
"""The form of a model's name on the hub, OWNER/NAME."""

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "madebyollin/taesd": "taesd",
    # Put together from other sources than the models' own files, see docs/teachers.md:
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1600m",
    "Tongyi-MAI/Z-Image": "z-image",
    "Qwen/Qwen-Image": "qwen-image",
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
}
"""Models whose settings are in the package, without weights, for plans: their folders in `published/`, by id."""

CARD = "distmatch.json"
"""Beside `model_index.json`, in the models that distmatch makes: how it was made."""

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a pipeline can do without."""


Count = Annotated[int, Field(strict=True, ge=1, le=4096)]
"""A number of channels, or the side of an image."""


@dataclass(frozen=True)
class Settings:
    """The settings in a model's own files.

    Args:
        parts: library and class of each of its parts, by name.
        scheduler: its scheduler's settings, as the pipeline uses them.
        schedule, prediction: the same as distmatch's schedule and prediction.
        network: its denoising network's settings.
        shape: (C, h, w) of the network's output.
        size: (H, W) of images.
    """

    parts: dict[str, tuple[str, str]]
    scheduler: dict[str, Any]
    schedule: Schedule
    prediction: str
    network: dict[str, Any]
    shape: tuple[int, int, int]
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Pixels per latent, along each side."""
        return self.size[0] // self.shape[1]

    def of_shape(self, shape: tuple[int, ...]) -> "Settings":
        """Return the settings for outputs of another `shape`."""
        channels, height, width = shape
        return replace(self, shape=(channels, height, width), size=(height * self.pixels, width * self.pixels))


def place(source: str) -> str:
    """Return where the files of the model `source` are: the folder that a single file is unpacked to, the cache's of a
    model id where the hub is not to be asked or does not answer, or `source`. See `cache.place_of`.
    """
    file = Path(source)
    if file.suffix == ".safetensors" and file.is_file():
        return str(unpacked(file))
    return source if file.exists() or not re.fullmatch(MODEL_ID, source) else place_of(source)


def recorded(source: str) -> str:
    """Return `source` as students record it, who are used from anywhere: a path in full, a model id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def index(source: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return the class of the model's pipeline, and library and class of each of its parts, by name."""
    found = config(source, "model_index.json")
    parts = {name: tuple(part) for name, part in found.items() if isinstance(part, list | tuple) and part[0]}
    return str(found.get("_class_name")), parts


def config(source: str, file: str, folder: str | None = None) -> dict[str, Any]:
    """Return a file of settings as plain data."""
    need("diffusers", by=source)
    where = place(source)
    from diffusers.configuration_utils import ConfigMixin

    class File(ConfigMixin):
        config_name = file

    def read() -> Any:
        return _in_part(where, folder, lambda part: File.load_config(where, **part))

    found: Any = fetched(source, read, where=where)
    if not isinstance(found, dict):
        raise UserError(f"{source}: {folder or ''}/{file} holds no settings; expected a JSON object")
    return dict(found)


def without_weights(source: str) -> str:
    """Return where the settings of a model can be read for a plan: a folder of the package if the model is neither a
    folder nor in the cache, and its settings are `PUBLISHED`; otherwise `source` itself.
    """
    if source not in PUBLISHED or Path(source).is_dir():
        return source
    folder = Path(__file__).parent / "published" / PUBLISHED[source]
    files = [str(file.relative_to(folder).as_posix()) for file in folder.rglob("*.json")]
    return str(folder) if folder_with(source, files) is None else source


def network(source: str, name: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Load the model's network `name`, of class `kind`; `name` is empty if the source is that network itself.

    Raises `UserError` if it is unavailable, or if weights are missing, left over or not finite.
    """
    where = place(source)
    options: dict[str, Any] = {"output_loading_info": True, "dtype": dtype}
    options["use_safetensors"] = not _only_pickles(where, name)

    def load(half: dict[str, Any]) -> Any:
        return _in_part(where, name, lambda part: kind.from_pretrained(where, **options, **half, **part))

    found, info = _in_any_precision(source, where, load, name)
    wrong = [str(key) for faults in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in info[faults]]
    wrong = sorted(key for key in wrong if not key.endswith("position_ids"))  # present in older files, without effect
    if wrong:
        raise UserError(
            f"{source}: missing, left over or of another shape: {counted(len(wrong), 'weight')} of "
            f"{name or kind.__name__}, first {wrong[0]}; diffusers would go on with random ones. The file is "
            "incomplete, or its config.json is another model's: fetch both again"
        )
    check_weights(found.state_dict(), f"{source}, {name or kind.__name__}")
    return found


def outline(source: str, name: str, kind: Any) -> Any:
    """Build the model's network `name` from its settings, without reading weights. See `network`."""
    where = place(source)
    part = {"subfolder": name} if name else {}
    if hasattr(kind, "load_config"):  # diffusers' classes; the others are transformers'
        return kind.from_config(fetched(source, lambda: kind.load_config(where, **part), where=where))
    return kind(fetched(source, lambda: kind.config_class.from_pretrained(where, **part), where=where))


def pipeline(
    source: str,
    listed: Mapping[str, tuple[str, str]],
    kinds: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    **parts: Any,
) -> Any:
    """Return diffusers' pipeline of the model, without progress bars; `parts` replace its own parts and arguments.

    Optional parts that the folder lists but lacks are omitted. Raises `UserError` if the model is unavailable.

    Args:
        listed: library and class of each part, see `index`.
        kinds: the required diffusers classes of its networks.
    """
    need("diffusers", "transformers", by=source)
    import diffusers
    import transformers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    where = place(source)
    folder = Path(where)

    def known(kind: str) -> Any:
        if not hasattr(transformers, kind):
            raise UserError(
                f"{source}: model_index.json names {kind}, which transformers {transformers.__version__} lacks"
            )
        return getattr(transformers, kind)

    for name, (_, kind) in listed.items():
        if name in parts:
            continue
        if name.startswith("text_encoder"):
            parts[name] = network(source, name, known(kind), dtype)
        elif name in kinds:
            parts[name] = network(source, name, getattr(diffusers, kinds[name]), dtype)
        elif name in OPTIONAL and folder.is_dir() and not (folder / name).is_dir():
            parts[name] = None
        elif name == "safety_checker" and _only_pickles(where, name):
            from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

            parts[name] = network(source, name, StableDiffusionSafetyChecker, dtype)
        elif name.startswith("tokenizer") and folder.is_dir():
            _check_vocabulary(source, folder / name, known(kind).vocab_files_names)
    if "safety_checker" in parts and parts["safety_checker"] is None:
        parts["requires_safety_checker"] = False
    options = {**parts, "use_safetensors": True, "dtype": dtype}

    def load(half: dict[str, Any]) -> Any:
        return DiffusionPipeline.from_pretrained(where, **options, **half)

    pipe: Any = _in_any_precision(source, where, load)
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None and part.model_max_length > 1_000_000:  # not set
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
            texts = encoder.config.get_text_config()
            part.model_max_length = getattr(texts, "max_position_embeddings", part.model_max_length)
    return pipe


def fetched(source: str, load: Callable[[], T], part: str = "", where: str | None = None) -> T:
    """Return `load()`; an error because `source`, or a `part` of it, is unavailable becomes a `UserError` that says
    what to do. `where`: its `place`, unless that is `source`; the error names `source` all the same.
    """
    libraries(by=source)
    where = where or source
    for file in [*Path(where).glob("*.json"), *Path(where).glob("*/*config.json")]:
        read_json(file, dict[str, Any])  # diffusers does not check them
    try:
        with at_most(limits.limit(limits.TENSORS)):
            return load()
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.replace(where, source)
        raise UserError(
            f"diffusers model {source!r} cannot be loaded: {part and f'{part}: '}{reason.rstrip('.'):.300}. Give a "
            "folder in diffusers' format (with model_index.json and the weights of each part), or a model id that the "
            "cache has or the hub can give (`hf download ID`)"
        ) from error


def _in_part(source: str, name: str | None, load: Callable[[dict[str, Any]], T]) -> T:
    """Call `load` for the part `name` or, if it has no folder, for the files beside `model_index.json`.

    There lies the only network of the oldest pipelines, such as google/ddpm-cifar10-32.
    """
    folder = Path(source)
    if not name or (folder.is_dir() and not (folder / name).is_dir()):
        return load({})
    try:
        return load({"subfolder": name})
    except OSError as error:
        if folder.is_dir():
            raise
        try:
            return load({})
        except OSError:
            raise error from None


def _in_any_precision(source: str, where: str, load: Callable[[dict[str, Any]], T], part: str = "") -> T:
    """Call `load` for the weights in full precision or, if there are no such files, in half precision."""

    def either() -> T:
        try:
            return load({})
        except (OSError, ValueError) as error:
            try:
                return load({"variant": "fp16"})
            except (OSError, ValueError):
                raise error from None

    return fetched(source, either, part, where)


def _check_vocabulary(source: str, folder: Path, files: Mapping[str, str]) -> None:
    """Raise `UserError` if the tokenizer of `source` in `folder` has no vocabulary there: transformers would go on with
    an empty one.

    It is in `tokenizer.json`, in a file of SentencePiece, or in all others of the class's `files`.
    """
    there = {file.name for file in folder.glob("*") if file.is_file()}
    others = {name for kind, name in files.items() if kind != "tokenizer_file"}
    whole = any(name == "tokenizer.json" or name.endswith(".model") for name in there)
    if not whole and (not others or others - there):
        wanted = "tokenizer.json" + (f", or {' and '.join(sorted(others))}" if others else "")
        raise UserError(
            f"{source}, {folder.name} lacks a tokenizer's vocabulary; expected {wanted}: fetch the model's files again"
        )


def _only_pickles(source: str, name: str) -> bool:
    """Return whether a folder has the weights of the part `name` only as pickles.

    They are read with PyTorch's `weights_only`, which builds tensors and runs nothing. Raises `UserError` for files of
    other kinds, and for compressed ones, whose size would say nothing about that of the tensors.
    """
    folder = Path(source) / name if (Path(source) / name).is_dir() else Path(source)
    files = [file for file in folder.glob("*") if file.is_file()] if folder.is_dir() else []
    pickles = [file for file in files if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if not pickles or any(file.suffix == ".safetensors" for file in files):
        return False
    for file in pickles:
        if file.suffix != ".bin" or not is_zipfile(file):
            raise UserError(
                f"{file} is no file of weights that is read; expected .safetensors, or .bin by PyTorch 1.6+"
            )
        with ZipFile(file) as content:
            for entry in content.infolist():
                if entry.compress_type != ZIP_STORED:
                    raise UserError(f"{file} is compressed; PyTorch writes its weights uncompressed. Get a new copy")
                if entry.filename.endswith(".pkl"):
                    limits.check(entry.file_size, limits.SETTINGS, f"{file}: {entry.filename}")
    return True
