"""Writes tiny random flow models on patches of 2x2 latents; see `tiny_flow`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmatch.models.diffusers.hub import CARD
from distmatch.models.diffusers.small import clip_tokenizer, libraries
from distmatch.models.diffusers.tiny import MERGES
from distmatch.models.diffusers.tiny_flow import FLOW_KL, t5_tokenizer, tiny_clip, tiny_t5, tiny_vae
from distmatch.system import rng
from distmatch.system.files import write_json

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's chat, without system and tools."""

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def write_tiny_z_image(folder: Path) -> Path:
    """Write a Z-Image to `folder`; return `folder`. Latents 4x8x8, images 64x64."""
    diffusers, transformers = libraries()
    tokenizer = qwen_tokenizer()
    with rng.seeded(0):
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 16, 16],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):  # zero at first
            nn.init.normal_(token)
        text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**_language(tokenizer), head_dim=8))
        pipe = diffusers.ZImagePipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
    return _saved(pipe, folder, 64)


def write_tiny_qwen_image(folder: Path) -> Path:
    """Write a Qwen-Image to `folder`; return `folder`. Latents 4x8x8, images 32x32."""
    diffusers, transformers = libraries()
    tokenizer = qwen_tokenizer()
    with rng.seeded(0):
        transformer = diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(8, 4, 4),
        )
        _listening(transformer, 2)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=12,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.7, 0.1, 0.4, -0.1],
            latents_std=[2.8, 1.4, 2.3, 0.7],
        )
        rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
        text = {**_language(tokenizer), "num_attention_heads": 3, "num_key_value_heads": 3, "rope_scaling": rope}
        text_encoder = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        )
        pipe = diffusers.QwenImagePipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
    return _saved(pipe, folder, 32)


def write_tiny_flux(folder: Path) -> Path:
    """Write a FLUX.1 dev to `folder`; return `folder`. Latents 4x8x8, images 64x64."""
    diffusers, transformers = libraries()
    clip = clip_tokenizer(MERGES, 77)
    with rng.seeded(0):
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        pooling = tiny_clip(clip)
        pipe = diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=transformers.CLIPTextModel(pooling.config),
            tokenizer=clip,
            text_encoder_2=tiny_t5(width=24),
            tokenizer_2=t5_tokenizer(),
        )
    return _saved(pipe, folder, 64)


def write_tiny_flux2(folder: Path) -> Path:
    """Write a FLUX.2 klein to `folder`; return `folder`. Latents 16x4x4, images 64x64."""
    diffusers, transformers = libraries()
    tokenizer = qwen_tokenizer()
    with rng.seeded(0):
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 4, 4),
        )
        _listening(transformer, 4)
        vae = diffusers.AutoencoderKLFlux2(**FLOW_KL, latent_channels=4)
        nn.init.normal_(vae.bn.running_mean)
        nn.init.uniform_(vae.bn.running_var, 0.5, 2)
        # The pipeline reads the states of layer 27.
        layers = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28}
        layers |= {"head_dim": 4, "num_attention_heads": 1}
        text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**_language(tokenizer), **layers}))
        pipe = diffusers.Flux2KleinPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
    return _saved(pipe, folder, 64)


def qwen_tokenizer() -> Any:
    """Return Qwen's tokenizer with single bytes alone."""
    _, transformers = libraries()
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def _language(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }


@torch.no_grad()
def _listening(transformer: Any, factor: float) -> None:
    """Multiply the weights of the blocks, so that texts make a difference."""
    for parameter in transformer.transformer_blocks.parameters():
        parameter.mul_(factor)


def _saved(pipe: Any, folder: Path, size: int) -> Path:
    """Write `pipe`, and how large its images are, which its own settings do not say."""
    pipe.save_pretrained(folder)
    write_json(folder / CARD, {"size": size})
    return folder
