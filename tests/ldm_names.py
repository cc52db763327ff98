"""The names that weights of a tiny Stable Diffusion have in a single file: those of the original implementation."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipe, layers: int = 1) -> dict[str, torch.Tensor]:
    """Return all weights of a StableDiffusionPipeline with `layers` per block, by these names."""
    unet = {f"model.diffusion_model.{_unet(k, layers)}": v for k, v in pipe.unet.state_dict().items()}
    levels = len(pipe.vae.config.block_out_channels)
    vae = {f"first_stage_model.{_vae(k, levels)}": v for k, v in pipe.vae.state_dict().items()}
    vae = {k: v[:, :, None, None] if ".mid.attn_1." in k and v.ndim == 2 else v for k, v in vae.items()}
    text = {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
        for k, v in pipe.text_encoder.state_dict().items()
    }
    return {name: value.contiguous() for name, value in (unet | vae | text).items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    return next((name.replace(f".{k}.", f".{v}.") for k, v in table.items() if f".{k}." in name), name)


def _unet(name: str, layers: int) -> str:
    plain = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    plain |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for theirs, original in plain.items():
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, original, 1)
    if ".resnets." in name:
        name = _renamed(name, RESNET)
    name = re.sub(
        r"mid_block\.(resnets|attentions)\.(\d)",
        lambda m: f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}",
        name,
    )
    member = {"resnets": 0, "attentions": 1}
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        side, level, kind, number, rest = found.groups()
        block = (layers + 1) * int(level) + int(number)
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(level) + 1)}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * int(level) + layers}.1.{rest}"  # the tiny one has no attention there
        if side == "down":
            return f"input_blocks.{block + 1}.{member[kind]}.{rest}"
        return f"output_blocks.{block}.{member[kind]}.{rest}"
    return name


def _vae(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = _renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return name
