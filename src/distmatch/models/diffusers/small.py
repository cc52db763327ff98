"""Makes a Stable Diffusion in small, to be trained from the start: diffusers' own classes, with its own tokenizer."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from logging import CRITICAL
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.system.errors import UserError
from distmatch.system.extras import need

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Stable Diffusion's own scheduler settings, of diffusers' PNDM."""

HEAD = 16
"""Channels of an attention head."""

GROUPS = 16
"""Groups of each normalisation; every width must be a multiple."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the networks are. The defaults have 9 million weights in all."""

    latents: int = 4
    """Channels of the latents."""

    autoencoder: tuple[int, ...] = (32, 64, 64)
    """Channels per level; each level after the first halves the side."""

    unet: tuple[int, ...] = (64, 128, 144)
    """Channels per level; all levels but the last look at the text."""

    text: int = 192
    """Width of the text encoder."""

    layers: int = 2
    """Layers of the text encoder."""

    tokens: int = 32
    """Length of a text, in tokens; longer ones are cut."""

    vocabulary: int = 2048
    """Pieces of words that the tokenizer knows."""

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.autoencoder) - 1)

    @property
    def multiple(self) -> int:
        """What the side of an image must be a multiple of."""
        return self.factor * 2 ** (len(self.unet) - 1)


class TextDenoiser(nn.Module):
    """`(x f[B,C,h,w], t i64[B], ids i64[B,L]) -> eps f[B,C,h,w]`: a U-Net and the text encoder that is trained with it.

    Args:
        side: of the latents.
    """

    def __init__(self, sizes: Sizes, side: int, tokenizer: Any):
        super().__init__()
        diffusers, transformers = libraries()
        levels = len(sizes.unet)
        down, up = ["CrossAttnDownBlock2D"] * levels, ["CrossAttnUpBlock2D"] * levels
        down[-1], up[0] = "DownBlock2D", "UpBlock2D"
        self.unet: Any = diffusers.UNet2DConditionModel(
            sample_size=side,
            in_channels=sizes.latents,
            out_channels=sizes.latents,
            block_out_channels=sizes.unet,
            layers_per_block=1,
            cross_attention_dim=sizes.text,
            attention_head_dim=[width // HEAD for width in sizes.unet],  # in this class, the number of heads
            norm_num_groups=GROUPS,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
        )
        self.text_encoder: Any = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=sizes.text,
                intermediate_size=4 * sizes.text,
                projection_dim=sizes.text,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.text // (2 * HEAD),
                max_position_embeddings=sizes.tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(ids)[0].to(x.dtype), return_dict=False)[0]


def check_sizes(sizes: Sizes, side: tuple[int, int]) -> None:
    """Raise `UserError` if images of `side` don't fit, or if the widths cannot be divided into groups and heads."""
    height, width = side
    if height != width or height % sizes.multiple:
        raise UserError(
            f"images of {height}x{width} don't fit: expected squares whose side is a multiple of {sizes.multiple}"
        )
    for name in ("autoencoder", "unet"):
        if odd := [w for w in getattr(sizes, name) if w % GROUPS]:
            raise UserError(f"--{name} {odd[0]}: expected multiples of {GROUPS}, the groups of the normalisation")
    if sizes.text % (2 * HEAD):
        raise UserError(f"--text {sizes.text}: expected a multiple of {2 * HEAD}, the width of an attention head")


def make_autoencoder(sizes: Sizes, side: int) -> Any:
    """Return diffusers' `AutoencoderKL` with `scaling_factor` 1; see `standardise`."""
    diffusers, _ = libraries()
    levels = len(sizes.autoencoder)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.autoencoder,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        latent_channels=sizes.latents,
        sample_size=side,
        scaling_factor=1.0,
    )


@torch.no_grad()
def standardise(autoencoder: Any, mean: Tensor, std: Tensor) -> None:
    """Change an `AutoencoderKL` so that its latents, so far of `mean f[C]` and `std f[C]`, have mean 0 and deviation 1.

    The channels of a small autoencoder have unlike scales, which one `scaling_factor` cannot mend. The change is made
    in its two 1x1 convolutions around the latents: what it reconstructs stays the same.
    """
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()  # the second half is the log of the variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]


def make_tokenizer(captions: Iterable[str], sizes: Sizes) -> Any:
    """Return CLIP's tokenizer with pieces of words learned from `captions`: byte pairs, Sennrich et al. 2016.

    It knows every single byte, so that any text can be written.
    """
    plain = clip_tokenizer([], sizes.tokens)
    learned = plain.train_new_from_iterator(captions, vocab_size=sizes.vocabulary, show_progress=False)
    merges = json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]
    return clip_tokenizer(merges[: sizes.vocabulary - len(plain)], sizes.tokens)


def clip_tokenizer(merges: Sequence[Sequence[str]], tokens: int) -> Any:
    """Return CLIP's tokenizer for texts of `tokens` tokens. It knows all bytes and, in this order, `merges` of two."""
    _, transformers = libraries()
    pairs = [(first, second) for first, second in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(_pieces(pairs)))}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=tokens)
    assert len(tokenizer) == len(vocabulary), f"the tokenizer has {len(tokenizer)} of {len(vocabulary)} entries"
    return tokenizer


def _pieces(merges: Sequence[tuple[str, str]]) -> Iterable[str]:
    """Yield each byte as a character, each again as the end of a word, what is merged, start and end of a text.

    Printable bytes stand for themselves; the others are mapped to the characters from 256 on, as in GPT-2.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in (*printing, *(256 + i for i in range(256 - len(printing))))]
    ends, marks = (f"{letter}</w>" for letter in letters), ("<|startoftext|>", "<|endoftext|>")
    return chain(letters, ends, (first + second for first, second in merges), marks)


def make_pipeline(network: TextDenoiser, autoencoder: Any, tokenizer: Any) -> Any:
    """Return diffusers' `StableDiffusionPipeline` of these parts, without a progress bar."""
    diffusers, _ = libraries()
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=diffusers.PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def libraries(by: str = "a model in diffusers' format") -> tuple[Any, Any]:
    """Import diffusers and transformers, without their progress bars and warnings; `by` is what needs them."""
    need("diffusers", "transformers", by=by)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # otherwise every caption of more than 77 tokens is printed
    diffusers.utils.logging.set_verbosity(CRITICAL)  # what it logs as an error, it also raises
    return diffusers, transformers
