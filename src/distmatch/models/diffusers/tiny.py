"""Writes a tiny random Stable Diffusion in diffusers' format, for tests and for `--scale cpu-smoke`.

The parts have the classes and names of the real ones, with a million parameters in all: latents 4x8x8, images 64x64.
"""

from pathlib import Path
from typing import Any, Literal

from distmatch.models.diffusers.small import SCHEDULER, clip_tokenizer, libraries
from distmatch.system import rng

MERGES = [("a", "n"), ("t", "h"), ("th", "e</w>"), ("i", "n"), ("o", "f</w>")]
"""The merges that the tokenizer knows in addition to single bytes."""

VAE_WIDTHS = (8, 16, 16, 16)

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
"""Blocks of the tiny `AutoencoderKL`s, of four levels."""


def write_tiny_sd(
    folder: Path, *, kind: Literal["sd", "sdxl"] = "sd", prediction: str = "epsilon", seed: int = 0
) -> Path:
    """Write a pipeline with weights from `seed` to `folder`; return `folder`.

    Args:
        kind: the parts of Stable Diffusion 1.5 or of SDXL.
        prediction: `epsilon` or `v_prediction`.
    """
    diffusers, transformers = libraries()
    tokenizer = clip_tokenizer(MERGES, 77)
    text = clip_config(tokenizer, 32)
    scheduler = diffusers.PNDMScheduler(**SCHEDULER, prediction_type=prediction)
    size = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with rng.seeded(seed):
        vae = diffusers.AutoencoderKL(
            **KL,
            block_out_channels=VAE_WIDTHS,
            latent_channels=4,
            sample_size=64,
            scaling_factor=0.18215 if kind == "sd" else 0.13025,
        )
        if kind == "sd":
            unet = diffusers.UNet2DConditionModel(**size, **blocks, cross_attention_dim=32, attention_head_dim=4)
            pipe = diffusers.StableDiffusionPipeline(
                vae=vae,
                text_encoder=transformers.CLIPTextModel(text),
                tokenizer=tokenizer,
                unet=unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        else:
            unet = diffusers.UNet2DConditionModel(
                **size,
                **blocks,
                cross_attention_dim=64,  # both text encoders together
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,  # six sizes and positions, one pooled text
            )
            pipe = diffusers.StableDiffusionXLPipeline(
                vae=vae,
                text_encoder=transformers.CLIPTextModel(text),
                text_encoder_2=transformers.CLIPTextModelWithProjection(text),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                unet=unet,
                scheduler=scheduler,
                add_watermarker=False,
            )
    pipe.save_pretrained(folder)
    return folder


def clip_config(tokenizer: Any, width: int) -> Any:
    """Return the settings of a CLIP text encoder for the texts of `tokenizer`."""
    _, transformers = libraries()
    end = tokenizer.eos_token_id
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )


def write_tiny_vae(folder: Path) -> Path:
    """Write a tiny autoencoder (diffusers' `AutoencoderTiny`) for the same latents to `folder`; return `folder`."""
    diffusers, _ = libraries()
    with rng.seeded(0):
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=4,
        )
    vae.save_pretrained(folder)
    return folder
