"""A small convolutional classifier of 8-bit images, used for class accuracy and as a feature space.

Frechet distances in its features rank models of the same data set. They are not FID, which uses the features of one
particular Inception network (Heusel et al. 2017, arXiv 1706.08500), and cannot be compared with it.

Features averaged over the whole image hardly show where a stroke is, only that it is there. A second classifier, whose
features keep a grid of positions, shows both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmatch.data import imaging
from distmatch.data.images import Images
from distmatch.models.layout import build, shapes_in
from distmatch.system import rng
from distmatch.system.digests import Damaged, load_file, save_file
from distmatch.system.errors import UserError
from distmatch.system.files import together, write_json
from distmatch.system.finite import check_weights
from distmatch.system.plain import read_json
from distmatch.training.optim import Optimizer

FORMAT = "distmatch-classifier-1"
NETWORK = ("channels", "size", "classes", "widths", "positions")
"""Entries of `config` that define the network; files older than `positions` lack that entry, which means 1."""

WIDTHS = (16, 32, 64)


class Classifier(nn.Module):
    """`(pixels u8[B,C,H,W]) -> logits f[B,K]`, from pixels as they are stored: 0..255, on any device.

    Args:
        channels: C.
        size: (H, W).
        classes: the K class names.
        widths: channels at half resolution (two layers) and at quarter resolution (three).
        positions: features are averaged over each of P x P parts of the image. With 1 (the whole image) they are the
            last layer's channels; with more, each part has an eighth as many, so that the total is about the same.

    `config` holds these arguments and, after training, `accuracy` (on the test images, 0..1) and `training`. This is a
    feature space (see `features.FeatureSpace`).
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        classes: Sequence[str],
        widths: Sequence[int] = WIDTHS,
        positions: int = 1,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            zip(NETWORK, (channels, list(size), list(classes), list(widths), positions), strict=True)
        )
        first, second, last = widths
        kept = last if positions == 1 else max(1, last // 8)
        self.body = nn.Sequential(
            *_layer(channels, first, kernel=5, stride=2),
            *_layer(first, second),
            *_layer(second, last, stride=2),
            *_layer(last, last),
            *_layer(last, last),
            *([] if positions == 1 else _layer(last, kept, kernel=1)),
            nn.AdaptiveAvgPool2d(positions),
            nn.Flatten(),
        )
        self.head = nn.Linear(kept * positions**2, len(classes))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def name(self) -> str:
        positions = self.config["positions"]
        return "pooled" if positions == 1 else f"{positions}x{positions} positions"

    @property
    def distance(self) -> str:
        return f"frechet/{self.name}"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def identity(self) -> dict[str, Any]:
        """The network's arguments. A `positions` of 1 is left out: earlier versions had no such argument."""
        return {name: self.config[name] for name in NETWORK if (name, self.config[name]) != ("positions", 1)}

    def forward(self, pixels: Tensor) -> Tensor:
        return self.both(pixels)[1]

    def features(self, pixels: Tensor) -> Tensor:
        """Return the penultimate activations f[B,F]: the last layer's channels, averaged over each image part."""
        if pixels.dtype != torch.uint8:
            raise UserError(f"pixels are {pixels.dtype}; expected uint8 in 0..255, see imaging.to_uint8")
        shape = (self.config["channels"], *self.config["size"])
        if tuple(pixels.shape[1:]) != shape:
            expected = f"(B, {', '.join(map(str, shape))})"
            raise UserError(f"pixels are {tuple(pixels.shape)}; this classifier takes {expected}")
        x = imaging.to_float(pixels.to(self.head.weight.device))
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(features f[B,F], logits f[B,K])` from one evaluation."""
        features = self.features(pixels)
        return features, self.head(features)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json` to `folder`."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        with together(folder, "config.json") as beside:
            written = save_file(weights, beside / "model.safetensors")
            write_json(beside / "config.json", {"format": FORMAT, **self.config, "weights": written})

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Load the classifier in `folder`, frozen and in evaluation mode. Nothing in the folder is executed.

        Raises `UserError` if the folder holds no classifier, is damaged, or needs another version.
        """
        file = folder / "config.json"
        if not file.exists():
            raise UserError(f"{folder} is not a classifier: it has no config.json; `distmatch classifier` makes one")
        try:
            config = read_json(file, dict[str, Any], "Train the classifier again")
            if config.pop("format", None) != FORMAT:
                raise UserError(f"{file} is not of format {FORMAT!r}: not a classifier, or one of another version")
            config.setdefault("positions", 1)
            arguments, shapes = {key: config[key] for key in NETWORK}, shapes_in(folder / "model.safetensors")
            net = build(f"{folder} is damaged: its network", cls, arguments, shapes)
            weights = load_file(folder / "model.safetensors", config.pop("weights", None))
            net.load_state_dict(weights)
        except (AttributeError, KeyError, TypeError, RuntimeError, OSError, Damaged) as e:
            raise UserError(f"{folder} is damaged: {type(e).__name__}: {e}; train the classifier again") from e
        check_weights(weights, folder / "model.safetensors")
        net.config = config
        return net.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train a classifier."""

    steps: int = 3000
    """The learning rate rises over the first tenth of the steps, then falls to zero by the last."""

    batch: int = 128
    """Images per step."""

    lr: float = 2e-3
    """Peak learning rate of AdamW."""

    widths: Sequence[int] = WIDTHS
    """See `Classifier`."""

    flip: bool = False
    """Mirror half of the images at random."""

    seed: int = 0
    """Seed of the initial weights, the image order and the random shifts."""


def train_classifier(
    images: Images,
    test: Images,
    training: Training,
    positions: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Classifier:
    """Train on `images` and measure the accuracy on `test`.

    AdamW, cross entropy, linear warm-up over a tenth of the steps and linear decay to zero. Images are shifted at
    random by up to 1/14 of their side, except for a classifier that keeps positions: shifts would teach it to ignore
    them. The result is frozen, in evaluation mode, and a function of the arguments (up to the machine's rounding).

    Args:
        positions: see `Classifier`.
        progress: called with 1 after every step.

    Raises `UserError` if labels are missing or `test` has other classes or another image shape.
    """
    for name, part in (("training", images), ("test", test)):
        if part.labels is None:
            raise UserError(f"the {name} images have no labels; expected one folder per class, split/class/name.png")
    if (images.classes, images.pixels.shape[1:]) != (test.classes, test.pixels.shape[1:]):
        raise UserError(
            f"training images are {tuple(images.pixels.shape[1:])} of {len(images.classes)} classes, test images "
            f"{tuple(test.pixels.shape[1:])} of {len(test.classes)}; expected the same shape and the same class names"
        )
    assert images.labels is not None
    t, (channels, *size) = training, images.pixels.shape[1:]
    with rng.seeded(rng.key(t.seed, "classifier")):
        net = Classifier(channels, size, images.classes, t.widths, positions)
    optimizer = Optimizer(net.parameters(), lr=t.lr, weight_decay=0.05, warmup=t.steps // 10, steps=t.steps, decay=0.9)
    for step in range(t.steps):
        rows = torch.from_numpy(rng.shuffled(t.seed, len(images), step * t.batch, t.batch))
        generator = rng.stream("cpu", t.seed, "shift", step)
        pixels = images.pixels[rows]
        if positions == 1:
            pixels = _shifted(pixels, min(size) // 14, generator)
        if t.flip:
            mirror = torch.rand(t.batch, 1, 1, 1, generator=generator) < 0.5
            pixels = torch.where(mirror, pixels.flip(-1), pixels)
        F.cross_entropy(net(pixels), images.labels[rows]).backward()
        optimizer.step(step)
        if progress is not None:
            progress(1)
    net.eval().requires_grad_(False)
    said = {"images": len(images), "steps": t.steps, "batch": t.batch, "lr": t.lr, "flip": t.flip, "seed": t.seed}
    net.config |= {"accuracy": accuracy(net, test), "training": said}
    return net


@torch.inference_mode()
def accuracy(classifier: Classifier, images: Images, batch: int = 500) -> float:
    """Return the share of labelled `images` whose class is recognised, 0..1."""
    assert images.labels is not None
    right = sum(
        int((classifier(pixels).argmax(1).cpu() == labels).sum())
        for pixels, labels in zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    )
    return right / len(images)


def _layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _shifted(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in each direction, repeating its edges."""
    b, c, h, w = pixels.shape
    down, right = torch.randint(-most, most + 1, (2, b, 1), generator=generator)
    rows = (torch.arange(h) + down).clamp(0, h - 1)
    columns = (torch.arange(w) + right).clamp(0, w - 1)
    index = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
    return pixels[*index, rows[:, None, :, None], columns[:, None, None, :]]
