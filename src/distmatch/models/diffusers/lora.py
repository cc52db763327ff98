"""Students' adapters: which layers of Stable Diffusion get them, and their names in other programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distmatch.system.extras import need

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""The linear layers of the transformer blocks in Stable Diffusion's U-Net."""


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
