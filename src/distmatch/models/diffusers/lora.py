"""Adds and merges adapters (LoRA, arXiv 2106.09685) in the transformer blocks of a network, using peft."""

from typing import Any

from torch import Tensor

from distmatch.system.extras import need

ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
"""The linear layers of the transformer blocks that get adapters."""


def add_adapters(network: Any, rank: int) -> None:
    """Add adapters to the linear layers of `network`, one of diffusers', and freeze everything else in it."""
    need("peft", by="student.lora_rank")
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ADAPTED))


def merge_adapters(network: Any) -> None:
    """Add the adapters of `network` to its weights, and remove them."""
    network.fuse_lora()
    network.unload_lora()


def adapters(network: Any) -> dict[str, Tensor]:
    """Return the adapters' weights, named as diffusers' `save_lora_weights` expects."""
    need("peft", by="a LoRA")
    from peft.utils.save_and_load import get_peft_model_state_dict

    return get_peft_model_state_dict(network)
