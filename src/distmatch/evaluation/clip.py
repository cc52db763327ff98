"""CLIP score: how well images match their prompts (Hessel et al. 2021, arXiv 2104.08718).

The score is the cosine of the angle between image and text embeddings, without that paper's factor of 2.5 and clipping.
It follows DMD (arXiv 2311.18828, Table 4), which uses GigaGAN's evaluation code (Appendix D): OpenCLIP's ViT-g-14,
images of 256 x 256, and `A photo depicts` before each prompt.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distmatch.system.errors import UserError
from distmatch.system.extras import need

MODEL = "ViT-g-14"
PUBLISHED = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
"""The weights that GigaGAN's evaluation code calls ViT-G/14."""

PREFIX = "A photo depicts "
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in the folder of a published model."""


class ClipScore:
    """`(pixels u8[B,3,H,W], prompts) -> f32[B]` on the CPU, each cosine in [-1, 1]; the score is their mean.

    Images are resized and normalised by OpenCLIP's own preprocessing; the network computes in float32.

    Args:
        weights: the model's file (.safetensors, or a state dict of tensors), or the folder that contains it.
        model: OpenCLIP's name of the network.

    Raises `UserError` if the extra `metrics` is not installed, the model is unknown, or the file is missing, damaged or
    of another model.
    """

    def __init__(self, weights: str | Path, model: str = MODEL, device: torch.device | str = "cpu"):
        need("open_clip", by="CLIP score")
        open_clip: Any = import_module("open_clip")
        if model not in open_clip.list_models():
            raise UserError(f"CLIP model {model!r} is unknown to OpenCLIP; the paper's is {MODEL}")
        file = _file(Path(weights), model)
        try:
            # OpenCLIP's own reader also knows the names that other publishers use, and reads only tensors.
            made = open_clip.create_model_from_pretrained(model, str(file.resolve()), weights_only=True)
        except Exception as error:  # a damaged file can raise anything here
            raise UserError(f"{file} holds no weights of {model}: {type(error).__name__}: {error!s:.300}") from error
        self.network, self.preprocess = made
        self.network = self.network.to(device).eval()
        self.tokenize = open_clip.get_tokenizer(model)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompts):
            raise UserError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)} for {len(prompts)} prompts; CLIP score takes uint8 "
                "(B, 3, H, W) in 0..255 and a prompt for each"
            )
        pictures = [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        images = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
        seen = self.network.encode_image(images, normalize=True)
        tokens = self.tokenize([PREFIX + prompt for prompt in prompts]).to(self.device)
        said = self.network.encode_text(tokens, normalize=True)
        return (seen * said).sum(1).float().cpu()


def _file(weights: Path, model: str) -> Path:
    """Return the file `weights`, or the first of `FILES` in the folder `weights`."""
    candidates = [weights / name for name in FILES] if weights.is_dir() else [weights]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(
        f"{' and '.join(map(str, candidates))} not found; expected the weights of OpenCLIP's {model}"
        + (f": fetch {' or '.join(FILES)} of {PUBLISHED} on Hugging Face (5 GB)" if model == MODEL else "")
    )
