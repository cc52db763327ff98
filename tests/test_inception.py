"""FID's network: the same features as torch-fidelity's from every kind of file, the two ways to enlarge, refusals."""

import os
import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from distmatch.evaluation.features import fingerprint
from distmatch.models.inception import clean_resize, load_inception

PIXELS = torch.randint(0, 256, (1, 3, 20, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def random_state(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that carry a signal to the end: activations keep their size, and no normalisation is plain."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in shapes.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + noise.abs() / 4
        else:
            state[name] = noise / 10
    return state | {name: torch.tensor(7) for name in shapes if name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def direct(tmp_path_factory) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network, loaded its own way."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    file = tmp_path_factory.mktemp("direct") / "weights.pth"
    torch.save({}, file)
    torch.save(random_state(Unloaded("shapes", ["2048"], str(file)).state_dict()), file)
    return FeatureExtractorInceptionV3("direct", ["2048"], str(file))


@pytest.fixture(scope="module")
def expected(direct) -> Tensor:
    features = direct(PIXELS)[0]
    assert features.std() > 0.01
    return features


def without_counters(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """As in pytorch-fid's file, which an older torch wrote."""
    return OrderedDict((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def as_a_graph(state: dict[str, Tensor], gain: str = "gamma") -> dict[str, Tensor]:
    """Names of another implementation, with convolution and normalisation in one module and no logits."""
    roles = {".conv.weight": "weight", ".bn.bias": "beta", ".bn.weight": gain, "_mean": "mean", "_var": "var"}
    prefixes = list(dict.fromkeys(name.partition(".conv.")[0] for name in state if ".conv." in name))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    renamed = {}
    for name, value in without_counters(state).items():
        prefix = name.partition(".conv.")[0].partition(".bn.")[0]
        if prefix in number:
            renamed[f"layers.conv_{number[prefix]}.{next(v for k, v in roles.items() if name.endswith(k))}"] = value
    return renamed


def pickled(state: dict[str, Tensor], file: Path) -> None:
    """A pickle of a network with other names, a module per layer."""
    layers = nn.Sequential()
    for i, name in enumerate(n for n, v in state.items() if v.ndim == 4):
        out, ins, *kernel = state[name].shape
        conv = nn.Conv2d(ins, out, tuple(kernel), bias=False)
        norm = nn.BatchNorm2d(out)
        conv.load_state_dict({"weight": state[name]})
        norm.load_state_dict({k: state[name.replace("conv.weight", f"bn.{k}")] for k in norm.state_dict()})
        layers.append(nn.Sequential(OrderedDict(convolution=conv, normalisation=norm)))
        layers[i].train(False)
    file.write_bytes(pickle.dumps(nn.ModuleDict({"layers": layers})))


WRITERS = {
    "torch-fidelity.pth": torch.save,
    "pytorch-fid.pth": lambda state, file: torch.save(without_counters(state), file),
    "weights.safetensors": save_file,
    "graph.pth": lambda state, file: torch.save(as_a_graph(state), file),
    "network.pkl": pickled,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_features_are_torch_fidelitys_to_the_last_bit(direct, expected, tmp_path, name):
    file = tmp_path / name
    WRITERS[name](direct.state_dict(), file)
    network = load_inception(file)
    features, logits = network.both(PIXELS)
    assert torch.equal(features, expected)
    assert features.dtype == torch.float32
    assert logits is None


def test_a_normalisation_without_gain_has_gain_one(direct, tmp_path):
    file = tmp_path / "graph.pth"
    torch.save({k: v for k, v in as_a_graph(direct.state_dict()).items() if not k.endswith("gamma")}, file)
    loaded = load_inception(file).state_dict()
    assert all(loaded[k].eq(1).all() for k in loaded if k.endswith("bn.weight"))
    assert all(torch.equal(loaded[k], v) for k, v in direct.state_dict().items() if k.endswith(("bn.bias", "_var")))


def test_the_two_resizes_agree_where_there_is_nothing_to_enlarge_and_nowhere_else(direct, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(direct.state_dict(), file)
    legacy, clean = load_inception(file), load_inception(file, "clean")
    large = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    assert torch.equal(clean.both(large)[0], legacy.both(large)[0])
    a, b = clean.both(PIXELS)[0], legacy.both(PIXELS)[0]
    assert (a - b).abs().max() > 0.05 * b.std()
    assert fingerprint(legacy) != fingerprint(clean)


def cubic(n: int) -> np.ndarray:
    """Rows of the filter from `n` samples to 299: Keys's cubic with a = -1/2, widened where it reduces."""
    scale = n / 299
    wide = max(scale, 1.0)
    centre = (np.arange(299)[:, None] + 0.5) * scale
    x = np.abs(np.arange(n)[None] + 0.5 - centre) / wide
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(20, 13), (32, 32), (450, 350)])
def test_clean_resize_is_the_bicubic_filter_per_channel(size):
    pixels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    exact = cubic(size[0]) @ pixels.double().numpy() @ cubic(size[1]).T
    resized = clean_resize(pixels)
    assert resized.dtype == torch.float32
    np.testing.assert_allclose(resized, exact.clip(0, 255), atol=2e-3)
    assert exact.max() > 255 or size[0] > 299  # it overshoots, and what is clipped is clipped
    assert (resized - resized.round()).abs().max() > 0.4  # not rounded to 8 bits


class Archive(nn.Module):
    """A stand-in for inception-2015-12-05.pt, with its interface."""

    def __init__(self, features: int = 2048):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, features, 5, 60), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output = nn.Linear(features, 9)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(img.float(), (299, 299), mode="nearest")
        x = self.layers((x - 128) / 128)
        return x if return_features else self.output(x)


def script(module: nn.Module, file: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), file)
    return file


def test_an_archive_is_called_for_features_and_its_layers_for_clean_ones(tmp_path):
    torch.manual_seed(0)
    module = Archive().eval()
    file = script(module, tmp_path / "inception-2015-12-05.pt")
    legacy, clean = load_inception(file), load_inception(file, "clean")
    with torch.no_grad():
        torch.testing.assert_close(legacy.both(PIXELS)[0], module(PIXELS, return_features=True))
        torch.testing.assert_close(clean.both(PIXELS)[0], module.layers((clean_resize(PIXELS) - 128) / 128))
    first = legacy.both(PIXELS)[0]
    assert all(torch.equal(legacy.both(PIXELS)[0], first) for _ in range(4))
    assert legacy.both(PIXELS)[1] is None
    assert fingerprint(load_inception(file)) == fingerprint(legacy) != fingerprint(clean)
    with torch.no_grad():
        module.output.bias[0] += 1
    assert fingerprint(load_inception(script(module, tmp_path / "other.pt"))) != fingerprint(legacy)


def test_grey_images_are_grey_in_three_channels(tmp_path):
    file = script(Archive(), tmp_path / "archive.pt")
    for resize in ("legacy", "clean"):
        network = load_inception(file, resize)
        grey = network.both(PIXELS[:, :1])[0]
        assert torch.equal(grey, network.both(PIXELS[:, :1].repeat(1, 3, 1, 1))[0])
        assert not torch.equal(grey, network.both(PIXELS)[0])


def test_other_archives_are_refused(tmp_path):
    file = script(nn.Sequential(nn.Linear(2, 2)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"archive of another network: expected forward\(pixels, return_features\)"):
        load_inception(file)
    narrow = load_inception(script(Archive(features=64), tmp_path / "narrow.pt"))
    with pytest.raises(ValueError, match="this network has 64 features; FID's Inception-v3 has 2048"):
        narrow.both(PIXELS)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no state dict, or is damaged"):
        load_inception(file)


def in_front(state: dict[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """`state` with the entries of `prefix` moved before those of `other`."""
    names = [name for name in state if not name.startswith(prefix)]
    place = next(i for i, name in enumerate(names) if name.startswith(other))
    names[place:place] = [name for name in state if name.startswith(prefix)]
    return {name: state[name] for name in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"Mixed_5b.branch1x1.conv.weight": torch.ones(64, 192, 3, 3)}, r"Mixed_5b.branch1x1.conv.weigh"
         r"t is \(64, 192, 3, 3\) instead of \(64, 192, 1, 1\)"),
        (lambda s: {k: v for k, v in s.items() if k != "Mixed_7c.branch1x1.bn.running_var"},
         "Mixed_7c.branch1x1.bn.running_var is missing"),
        # torchvision's network of the same name classifies ImageNet, and is not FID's.
        (lambda s: s | {"fc.weight": torch.ones(1000, 2048), "AuxLogits.fc.bias": torch.ones(1000)},
         r"AuxLogits.fc.bias is unknown; fc.weight is \(1000, 2048\) instead of \(1008, 2048\)"),
        (lambda s: dict(list(as_a_graph(s).items())[:-10]), "has 92 convolutions; FID's Inception-v3 has 94"),
        (lambda s: in_front(as_a_graph(s), "layers.conv_6.", "layers.conv_5."),
         r"layers.conv_6.weight is \(48, 192, 1, 1\) where Mixed_5b.branch1x1.conv.weight is \(64, 192, 1, 1\)"),
        (lambda s: {k.replace("conv_7.var", "conv_7.spread"): v for k, v in as_a_graph(s).items()},
         "for the running_var of the normalisation that follows layers.conv_7.weight there are 0 of"),
        (lambda s: {"weight": torch.ones(3)}, "has 0 convolutions"),
        (lambda s: {"epoch": 3, "model": s}, "holds something other than tensors by name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(direct, tmp_path, change, message):
    file = tmp_path / "weights.pth"
    torch.save(change(dict(direct.state_dict())), file)
    with pytest.raises(ValueError, match=message):
        load_inception(file)


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_file_is_executed(tmp_path):
    for name, write in (("a.pth", torch.save), ("b.pkl", lambda value, file: file.write_bytes(pickle.dumps(value)))):
        write({"weight": Bomb(tmp_path / "executed")}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_files_that_cannot_be_read_are_named(direct, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"absent.pth does not exist; expected the weights of FID's Inception-v3"):
        load_inception(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="resize 'nearest' is unknown; expected one of legacy, clean"):
        load_inception(tmp_path / "absent.pth", "nearest")
    for name in ("a.pth", "a.safetensors", "a.pkl"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(ValueError, match=rf"{name} .*damaged"):
            load_inception(tmp_path / name)
    torch.save(direct.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"needs torch_fidelity .*: pip install 'distmatch\[metrics\]'"):
        load_inception(tmp_path / "weights.pth")


def test_other_pixels_are_refused(tmp_path):
    network = load_inception(script(Archive(), tmp_path / "archive.pt"))
    for pixels in (PIXELS.float(), PIXELS[:, :2], PIXELS[0]):
        with pytest.raises(ValueError, match=r"Inception takes uint8 \(B, 1 or 3, H, W\)"):
            network.both(pixels)
