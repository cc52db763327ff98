"""LoRAs merged into teachers before distillation, by diffusers' own loaders; `teacher_lora` in a recipe.

They skip what they do not know, with a warning at most. Here every layer of a file has a place, or it is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distmatch.models.diffusers.small import libraries
from distmatch.models.info import Lora
from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.finite import check_weights
from distmatch.system.plain import fitting

LAYER = re.compile(r"[._]lora[._]")
"""What follows the name of a layer, in each of diffusers' forms."""

MATRIX = re.compile(r"lora\w*[._](?:(?:down|A)|(up|B))\b.*\.weight$")
"""The name of one of the two matrices of a layer, in any program's form; its group is there in that of the second."""

FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""What diffusers and peft raise for a file that is not as they expect."""

Rank = Annotated[int, Field(ge=1, le=65536)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[str, Field(pattern=r"^[\w.^-]+$")]
"""Peft matches these as regular expressions, but a file's may hold none that could take for ever."""


class Scaling(BaseModel):
    """Settings of peft's that some files come with: by them a layer's update is scaled. The others change nothing."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[Names, Rank] = {}
    alpha_pattern: dict[Names, Alpha] = {}
    use_rslora: bool = False
    lora_bias: bool = False
    target_modules: list[Names] | Names | None = None
    use_dora: Literal[False] = False
    init_lora_weights: Literal[True, False, "gaussian"] | None = True  # others start from changed weights of the model


@dataclass(frozen=True)
class Layers:
    """The content of a LoRA.

    Args:
        state: the matrices by diffusers' names.
        scales: their alphas, or the settings of their adapter, as diffusers' loaders take them.
        sha256: of the file.
    """

    state: dict[str, Tensor]
    scales: dict[str, Any]
    sha256: str

    def of(self, part: str) -> set[str]:
        """Return the names of the layers in the network called `part`."""
        return {LAYER.split(name)[0] for name in self.state if name.startswith(f"{part}.")}


def takes_lora(pipeline: str) -> bool:
    """Return whether diffusers' class `pipeline` loads LoRAs."""
    diffusers, _ = libraries(by="a LoRA")
    return hasattr(getattr(diffusers, pipeline), "lora_state_dict")


def read_lora(place: str, scale: float, pipeline: str, network: Mapping[str, Any]) -> Lora:
    """Return a description of the LoRA in `place`, a .safetensors file or the folder of a `pytorch_lora_weights` one.

    Args:
        pipeline: diffusers' class of the model that it is for.
        network: the settings of that model's denoising network.

    Raises `UserError` if there is no such file, or if it is something else.
    """
    file = Path(place) / "pytorch_lora_weights.safetensors" if Path(place).is_dir() else Path(place)
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"LoRA {place} is no .safetensors file; expected one, or its folder")
    layers = _layers(file, pipeline, network)
    text = any(name.startswith("text_encoder") for name in layers.state)
    return Lora(str(file.resolve()), scale, layers.sha256, text)


def merge_lora(pipe: Any, lora: Lora, network: Mapping[str, Any], *, text: bool) -> None:
    """Merge a LoRA into the text encoders of diffusers' `pipe`, or else into its denoising network, in place.

    `network`: see `read_lora`. Raises `UserError` if the file is not the one that `lora` describes, or if one of its
    layers has no place.
    """
    need("peft", by=f"LoRA {lora.file}")
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = _layers(Path(lora.file), type(pipe).__name__, network) if Path(lora.file).is_file() else None
    if found is None or found.sha256 != lora.sha256:
        raise UserError(f"{lora.file} is not the LoRA that this model was made with; put that file back")
    parts = [part for part in pipe._lora_loadable_modules if part.startswith("text_encoder") == text and found.of(part)]
    for part in parts:
        held, state, scales = getattr(pipe, part), dict(found.state), deepcopy(found.scales)  # loaders may change them
        try:
            if text:
                how = {"network_alphas": None, **scales}
                pipe.load_lora_into_text_encoder(state, text_encoder=held, prefix=part, **how)
            else:
                getattr(pipe, f"load_lora_into_{part}")(state, **{part: held}, **scales)
        except FAULTS as error:
            raise UserError(f"LoRA {lora.file} does not fit the {part} of this model: {_first(error)}") from error
        layers, placed = len(found.of(part)), sum(isinstance(layer, BaseTunerLayer) for layer in held.modules())
        if placed != layers:
            raise UserError(f"LoRA {lora.file} has {layers} layers for the {part}; only {placed} of them fit it")
    if parts:
        pipe.fuse_lora(components=parts, lora_scale=lora.scale)
        pipe.unload_lora_weights()


def _layers(file: Path, pipeline: str, network: Mapping[str, Any]) -> Layers:
    """Return the content of a LoRA, whichever program wrote it."""
    stamp = file.stat()
    return _read(str(file.resolve()), (stamp.st_size, stamp.st_mtime_ns), pipeline, json.dumps(network, default=str))


@lru_cache(maxsize=1)  # a run begins by merging it into the network, and more than once into the text encoders
def _read(file: str, stamp: tuple[int, int], pipeline: str, network: str) -> Layers:
    """See `_layers`; `network` is JSON, and `stamp` tells one content of the file from another."""
    diffusers, _ = libraries(by=f"LoRA {file}")
    kind = getattr(diffusers, pipeline)
    try:
        weights = load_file(file)
        check_weights(weights, file)
        state, *alphas, adapters = kind.lora_state_dict(
            file, return_lora_metadata=True, unet_config=SimpleNamespace(**json.loads(network)), return_alphas=True
        )  # each family takes, and gives, what it knows of these
    except (SafetensorError, *FAULTS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as a LoRA of a {pipeline}: {_first(error)}") from error
    parts = kind._lora_loadable_modules
    if odd := _odd(weights, state, parts):
        raise UserError(f"{file} is no LoRA of a {pipeline}: {odd}; expected pairs of low-rank matrices for {parts}")
    scales: dict[str, Any] = {"network_alphas": alphas[0]} if alphas else {}
    scales |= {"metadata": _adapters(adapters, file)} if adapters else {}
    return Layers(state, scales, file_sha256(Path(file)))


def _odd(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], parts: list[str]) -> str | None:
    """Return what says that `weights` are no LoRA for `parts`, or not entirely; `state`: as diffusers reads them."""
    for name, value in weights.items():
        if not MATRIX.search(name) and not name.endswith("alpha") and value.any():
            return f"it holds {name}"
    for name in state:
        if not LAYER.search(name) or name.partition(".")[0] not in parts:
            return f"it holds {name}"
    matrices = Counter(LAYER.split(name)[0] for name in state if MATRIX.search(name))
    for name, count in matrices.items():
        if count != 2:
            return f"it holds one matrix of {name}"
    # A layer may become several, as queries, keys and values do, but they have its outputs between them.
    given, taken = _outputs(weights), _outputs(state)
    if given != taken:
        return f"its layers have {given} outputs, of which diffusers reads {taken}"
    return None if state else "it is empty"


def _outputs(weights: Mapping[str, Tensor]) -> int:
    """Return the number of outputs of all layers, but those without effect."""
    second = [value for name, value in weights.items() if (found := MATRIX.search(name)) and found[1]]
    return sum(len(value) for value in second if value.any())


def _adapters(adapters: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return the checked settings of a file's adapters, by names that begin with their network's."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in adapters.items():
        part, _, entry = name.partition(".")
        nested.setdefault(part, {})[entry] = value
    checked = {part: fitting(given, f"{file}: its adapter for {part}", Scaling) for part, given in nested.items()}
    return {f"{part}.{name}": value for part, known in checked.items() for name, value in known}


def _first(error: Exception) -> str:
    """Return the first line of a message; PyTorch's about weights says what is wrong in its second."""
    first, *others = map(str.strip, str(error).strip().splitlines() or [type(error).__name__])
    return (f"{first} {others[0]}" if first.endswith(":") and others else first)[:300]
