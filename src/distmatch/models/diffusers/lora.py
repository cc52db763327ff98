"""LoRAs of Stable Diffusion: merged into teachers, which layers get adapters, and students' adapters for others."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distmatch.models.diffusers.small import libraries
from distmatch.models.info import Lora
from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.finite import check_weights

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""The linear layers of the transformer blocks."""


LAYER = re.compile(r"[._]lora[._]")
"""What follows the name of a layer, in each of diffusers' forms."""

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The networks that a LoRA of Stable Diffusion can change."""

FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""What diffusers and peft raise for a file that is not as they expect."""


def read_lora(place: str, scale: float, pipeline: str, unet: Mapping[str, Any]) -> Lora:
    """Return a description of the LoRA in `place`, a .safetensors file or the folder of a `pytorch_lora_weights` one.

    Args:
        pipeline: diffusers' class of the model that it is for.
        unet: the settings of that model's U-Net.

    Raises `UserError` if there is no such file, or if it is something else.
    """
    file = Path(place) / "pytorch_lora_weights.safetensors" if Path(place).is_dir() else Path(place)
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"LoRA {place} is no .safetensors file; expected one, or its folder")
    state, _ = _layers(str(file), pipeline, unet)
    text = any(name.startswith("text_encoder") for name in state)
    return Lora(str(file.resolve()), scale, file_sha256(file), text)


def merge_lora(pipe: Any, lora: Lora, unet: Mapping[str, Any], names: Sequence[str]) -> None:
    """Merge a LoRA into those networks of diffusers' `pipe` that are called `names`, in place.

    `unet`: see `read_lora`. Raises `UserError` if the file is not the one that `lora` describes, or if one of its
    layers has no place in the network.
    """
    need("peft", by=f"LoRA {lora.file}")
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not Path(lora.file).is_file() or file_sha256(Path(lora.file)) != lora.sha256:
        raise UserError(f"{lora.file} is not the LoRA that this model was made with; put that file back")
    state, alphas = _layers(lora.file, type(pipe).__name__, unet)
    changed = []
    for name in names:
        layers = {LAYER.split(key)[0] for key in state if key.startswith(f"{name}.")}
        network = getattr(pipe, name, None)
        if network is None or not layers:
            continue
        try:
            if name == "unet":
                pipe.load_lora_into_unet(state, network_alphas=alphas, unet=network)
            else:
                pipe.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=network, prefix=name)
        except FAULTS as error:
            raise UserError(f"LoRA {lora.file} does not fit the {name} of this model: {_first(error)}") from error
        placed = sum(isinstance(layer, BaseTunerLayer) for layer in network.modules())
        if placed != len(layers):
            raise UserError(f"LoRA {lora.file} has {len(layers)} layers for the {name}; only {placed} of them fit it")
        changed.append(name)
    pipe.fuse_lora(components=changed, lora_scale=lora.scale)
    pipe.unload_lora_weights()


def _layers(file: str, pipeline: str, unet: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """Return the layers of a LoRA by diffusers' names, and their alphas, whichever program wrote it."""
    diffusers, _ = libraries(by=f"LoRA {file}")
    try:
        weights = load_file(file)
        check_weights(weights, file)
        state, alphas = getattr(diffusers, pipeline).lora_state_dict(dict(weights), unet_config=SimpleNamespace(**unet))
    except (SafetensorError, *FAULTS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read as a LoRA of a {pipeline}: {_first(error)}") from error
    odd = [name for name in state if not LAYER.search(name) or name.partition(".")[0] not in PARTS]
    odd += [name for name in weights if "dora_scale" in name]
    if odd or not state:
        said = f"it holds {odd[0]}" if odd else "it is empty"
        raise UserError(f"{file} is no LoRA of a {pipeline}: {said}; expected pairs of low-rank matrices for {PARTS}")
    return state, alphas


def _first(error: Exception) -> str:
    """Return the first line of a message; PyTorch's about weights says what is wrong in its second."""
    first, *others = map(str.strip, str(error).strip().splitlines() or [type(error).__name__])
    return (f"{first} {others[0]}" if first.endswith(":") and others else first)[:300]


def peft_layers(updates: Mapping[str, tuple[Tensor, Tensor]], network: str) -> dict[str, Tensor]:
    """Return adapters, by layer as `(down, up)`, under the names that diffusers' `save_lora_weights` takes.

    `network`: name of diffusers' network within ours, which is left out.
    """
    found = {}
    for name, (down, up) in updates.items():
        layer = name.removeprefix(f"{network}.")
        found |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return found


def write_kohya(layers: Mapping[str, Tensor], network: str, file: Path) -> None:
    """Write `layers` (see `peft_layers`) with kohya's names, which ComfyUI and others read."""
    need("diffusers", by="export lora")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    named: dict[str, Any] = convert_state_dict_to_kohya({f"{network}.{name}": value for name, value in layers.items()})
    save_file({name: value.contiguous() for name, value in named.items()}, file)


def without_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters in the weights of a student that an earlier version saved; their alpha was their rank."""
    found = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if ".lora_A." in name:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            layer = f"{name.partition('.lora_A.')[0]}.weight"
            found[layer] = found[layer] + (up.flatten(1) @ down.flatten(1)).view_as(found[layer])
    return found
