"""Writes tiny random flow-matching transformers in diffusers' format, for tests and for `--scale cpu-smoke`.

The parts have the classes and names of the real ones.
"""

import inspect
from pathlib import Path
from typing import Any

from distmatch.models.diffusers.small import clip_tokenizer, libraries
from distmatch.models.diffusers.tiny import KL, MERGES, clip_config
from distmatch.system import rng

WORDS = ("▁a", "▁cat", "▁two", "▁dogs", "▁on", "▁the", "▁sofa", "▁sea", "▁at", "▁night", "▁red", "▁bicycle", "▁old")
"""What the tiny tokenizers of sentence pieces know, beside single letters."""

FLOW_KL: dict[str, Any] = {**KL, "block_out_channels": (8, 8, 16, 16)}
"""Settings of the tiny autoencoders."""


def write_tiny_sd3(folder: Path, dynamic: bool = False) -> Path:
    """Write a Stable Diffusion 3.5 to `folder`; return `folder`. Latents 4x8x8, images 64x64.

    `dynamic`: the scheduler's shift depends on the image's size.
    """
    diffusers, _ = libraries()
    clip = clip_tokenizer(MERGES, 77)
    with rng.seeded(0):
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=40,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
            vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=tiny_clip(clip),
            tokenizer=clip,
            text_encoder_2=tiny_clip(clip),
            tokenizer_2=clip,
            text_encoder_3=tiny_t5(width=40),
            tokenizer_3=t5_tokenizer(),
        )
    pipe.save_pretrained(folder)
    return folder


def write_tiny_sana(folder: Path) -> Path:
    """Write a Sana to `folder`; return `folder`. Latents 4x4x4, images 32x32."""
    diffusers, _ = libraries()
    with rng.seeded(0):
        widths = {"block_types": ("ResBlock",) * 4, "block_out_channels": (8,) * 4, "layers_per_block": (1,) * 4}
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in widths.items()}
        multiscales = {f"{side}_qkv_multiscales": ((),) * 4 for side in ("encoder", "decoder")}
        pipe = diffusers.SanaPipeline(
            transformer=diffusers.SanaTransformer2DModel(
                sample_size=4,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=4,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=24,
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            vae=diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **sides, **multiscales),
            text_encoder=tiny_gemma(width=24),
            tokenizer=gemma_tokenizer(),
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_vae(**scaling: float) -> Any:
    """Return a random `AutoencoderKL` as the flow models have it: without convolutions around the latents."""
    diffusers, _ = libraries()
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(**FLOW_KL, **plain, latent_channels=4, sample_size=64, **scaling)


def tiny_clip(tokenizer: Any) -> Any:
    """Return a random CLIP text encoder, 16 wide."""
    _, transformers = libraries()
    return transformers.CLIPTextModelWithProjection(clip_config(tokenizer, 16))


def tiny_t5(width: int) -> Any:
    """Return a random T5 encoder."""
    _, transformers = libraries()
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def t5_tokenizer() -> Any:
    """Return T5's tokenizer with few pieces."""
    _, transformers = libraries()
    letters = ["▁", *map(chr, range(33, 127))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -2.0) for p in WORDS), *((p, -5.0) for p in letters)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_gemma(width: int) -> Any:
    """Return a random Gemma 2."""
    _, transformers = libraries()
    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


def gemma_tokenizer() -> Any:
    """Return Gemma's tokenizer with letters, and with pieces of the instruction that Sana puts before every prompt.

    By letters alone, it would have a thousand tokens, whose attention takes most of a test's time.
    """
    diffusers, transformers = libraries()
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n", *map(chr, range(33, 127))]
    letters = transformers.GemmaTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return letters.train_new_from_iterator(instruction, 500)
