"""The U-Net of Stable Diffusion 1.x, 2.x and XL as one of our networks, and its adapters."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.denoiser import Cond
from distmatch.extras import need
from distmatch.models.guidance import CHANNELS, GuidanceInput, embed_guidance

ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
"""The linear layers of the transformer blocks, which adapters are put beside."""


class StableUNet(nn.Module):
    """`(x f[B,4,h,w], t f[B], cond) -> f[B,4,h,w]`: diffusers' `UNet2DConditionModel`.

    `cond.text f[B,L,C]` are the text encoders' states; without text the network takes its own `null_text`, the states
    of the empty prompt, so that it can be guided. SDXL's further conditions are `cond.extra["pooled"] f[B,P]` and
    `cond.extra["size"] f[B,6]`.

    Args:
        unet: its configuration, or diffusers' own network.
        text: (L, C).
        pooled: P, for SDXL.
        guidance: it takes the scale `cond.extra["guidance"] f[B]` besides; see `models.guidance`.
        lora: rank of the adapters beside its linear layers; 0 is none. Only they are trained then.
    """

    def __init__(self, unet: Any, text: tuple[int, int], pooled: int = 0, guidance: bool = False, lora: int = 0):
        super().__init__()
        need("diffusers", by="Stable Diffusion")
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.unet: Any = unet if isinstance(unet, nn.Module) else UNet2DConditionModel.from_config(dict(unet))
        self.unet.to(memory_format=torch.channels_last)
        self.null_text: Tensor
        self.null_pooled: Tensor
        self.register_buffer("null_text", torch.zeros(1, *text))
        self.register_buffer("null_pooled", torch.zeros(1, pooled))
        self.lora, self.guidance = lora, guidance
        if guidance:
            embedding = self.unet.time_embedding
            embedding.cond_proj = GuidanceInput(embedding.linear_1.in_features)
            self.unet.register_to_config(time_cond_proj_dim=CHANNELS)
        if lora:
            add_adapters(self.unet, lora)

    @property
    def config(self) -> dict[str, Any]:
        unet = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        text, pooled = list(self.null_text.shape[1:]), self.null_pooled.shape[1]
        return {"unet": unet, "text": text, "pooled": pooled, "guidance": self.guidance, "lora": self.lora}

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        cond = cond or Cond()
        absent = cond.text is None
        text = self.null_text.expand(len(x), -1, -1) if cond.text is None else cond.text
        added = None
        if self.null_pooled.shape[1]:
            pooled = self.null_pooled.expand(len(x), -1) if absent else cond.extra["pooled"]
            added = {"text_embeds": pooled.to(x.dtype), "time_ids": cond.extra["size"].to(x.dtype)}
        scale = None
        if self.guidance:
            scale = embed_guidance(cond.extra["guidance"], CHANNELS).to(x.dtype)
        return self.unet(x, t, text.to(x.dtype), timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0]

    def with_adapters(self, rank: int) -> "StableUNet":
        """The same function with adapters of `rank`; all but they is frozen."""
        net = copy.deepcopy(self)
        net.lora = rank
        add_adapters(net.unet, rank)
        return net

    def merged(self) -> "StableUNet":
        """The same function without adapters: they are added to the weights."""
        net = copy.deepcopy(self)
        if net.lora:
            net.unet.fuse_lora()
            net.unet.unload_lora()
            net.lora = 0
        return net


def add_adapters(unet: Any, rank: int) -> None:
    """Adapters (LoRA, arXiv 2106.09685) beside the linear layers of the transformer blocks; the rest is frozen."""
    need("peft", by="student.lora_rank")
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ADAPTED))
    if unet.config.time_cond_proj_dim:  # a guidance scale that is an input has weights of its own
        unet.time_embedding.cond_proj.requires_grad_(True)


def adapters(net: StableUNet) -> dict[str, Tensor]:
    """The adapters' weights, named as diffusers' `save_lora_weights` takes them."""
    need("peft", by="a LoRA")
    from peft.utils.save_and_load import get_peft_model_state_dict

    return get_peft_model_state_dict(net.unet)


def write_adapters(net: StableUNet, folder: Path) -> None:
    """The adapters as a LoRA in diffusers' format: `pytorch_lora_weights.safetensors`."""
    need("diffusers", "transformers", by="a LoRA")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=dict(adapters(net)))
