"""Reference statistics: what they are, when they are computed anew, what is said about damage."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.data.images import Images
from distmatch.evaluation.features import Reference, fingerprint, load_real, load_reference, load_statistics, reference
from distmatch.evaluation.metrics import frechet, kernel_distance, precision_recall
from distmatch.models.classifier import Classifier
from distmatch.models.library import ASSETS
from distmatch.system.digests import read_file, save_file


def images(n: int = 120, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (n, 1, 8, 8), generator=generator).to(torch.uint8), None, ())


class Counting(Classifier):
    """How many images were looked at."""

    seen = 0

    def features(self, pixels):
        self.seen += len(pixels)
        return super().features(pixels)


def classifier(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    return Counting(1, (8, 8), ("a", "b"), (4, 6, 8)).eval()


def assert_equal(a: Reference, b: Reference) -> None:
    for field in dataclasses.fields(Reference):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_a_reference_holds_the_moments_of_all_and_features_of_some():
    data, net = images(), classifier()
    made = reference(data, net, cache=None, keep=50, batch=32)
    with torch.no_grad():
        features = net.features(data.pixels)
    np.testing.assert_allclose(made.mu, features.double().numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(made.cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-3, atol=1e-8)
    nearest = torch.cdist(made.features, features.half().float()).min(1)
    assert nearest.values.max() < 1e-2 * features.std()
    rows = nearest.indices
    assert len(rows.unique()) == len(rows) == 50
    assert not torch.equal(rows, rows.sort().values)  # drawn at random: class folders come sorted
    assert made.count == 120


def test_data_are_at_no_distance_from_their_own_reference():
    data, net = images(), classifier()
    made = reference(data, net, cache=None)
    again = reference(data, net, cache=None, batch=17)
    spread = float(made.cov.trace())
    assert frechet(made.mu, made.cov, again.mu, again.cov) < 1e-6 * spread
    dark = reference(Images(data.pixels // 2, None, ()), net, cache=None)
    assert frechet(made.mu, made.cov, dark.mu, dark.cov) > 0.1 * spread


def test_the_cache_answers_for_the_same_pixels_and_weights_only(tmp_path):
    data, net = images(), classifier()
    first = reference(data, net, tmp_path)
    assert net.seen == 120
    assert_equal(reference(images(), net, tmp_path), first)
    assert net.seen == 120
    assert reference(data, net, tmp_path, source="noise").source == "noise"
    assert net.seen == 120

    other = images()
    other.pixels[100, 0, 3, 3] ^= 1
    assert reference(other, net, tmp_path).images != first.images
    assert net.seen == 240
    reference(data, net, tmp_path, keep=10)
    assert net.seen == 360
    for name in ("head.bias", "body.1.running_mean"):
        before = fingerprint(net)
        net.state_dict()[name][0] += 1e-3
        assert reference(data, net, tmp_path).classifier == fingerprint(net) != before
    assert net.seen == 600
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_is_kept_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = classifier()
    assert_equal(reference(images(), net, cache=None), reference(images(), net, cache=None))
    assert net.seen == 240
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_cache_is_made_again(tmp_path, damage, capsys):
    first = reference(images(), classifier(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert_equal(reference(images(), classifier(), tmp_path), first)
    assert_equal(load_reference(file), first)
    assert capsys.readouterr().err.count("is made again") == 1


def test_a_file_that_is_no_reference_of_this_classifier_is_refused(tmp_path):
    file = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match=r"reference.safetensors does not exist"):
        load_reference(file)
    made = reference(images(), classifier(), cache=None, source="noise")
    made.save(file)
    assert_equal(load_reference(file, classifier()), made)
    with pytest.raises(ValueError, match="made with another classifier"):
        load_reference(file, classifier(seed=1))
    content = file.read_bytes()
    tensors, metadata = read_file(file)
    save_file(tensors, file, {"distmatch": metadata["distmatch"].replace("reference-1", "reference-9")})
    with pytest.raises(ValueError, match="is not of format 'distmatch-reference-1'"):
        load_reference(file)
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"is damaged.*make it again"):
        load_reference(file)
    classifier().save(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        load_reference(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "arrays"), [("adm.npz", ("arr_0", "labels")), ("one.npz", ("pixels",)), ("a.npy", ())]
)
def test_images_in_arrays_are_those_in_files(tmp_path, name, arrays):
    pixels = torch.randint(0, 256, (5, 3, 7, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    array = pixels.permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(array):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    if arrays:
        np.savez(tmp_path / name, **dict(zip(arrays, (array, np.arange(5)), strict=False)))
    else:
        np.save(tmp_path / name, array)
    loaded, files = load_real(tmp_path / name), load_real(tmp_path)
    assert torch.equal(loaded.pixels, pixels)
    assert torch.equal(files.pixels, pixels)
    assert loaded.labels is None


def test_statistics_in_a_file_are_taken_as_they_are(tmp_path):
    made = reference(images(), classifier(), cache=None)
    file = tmp_path / "statistics.npz"
    np.savez(file, mu=made.mu.numpy(), sigma=made.cov.numpy(), arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    loaded = load_statistics(file)
    assert loaded is not None
    assert torch.equal(loaded.mu, made.mu)
    assert torch.equal(loaded.cov, made.cov)
    assert loaded.features.shape == (0, 8)
    np.savez(file, mu=made.mu.float().numpy(), sigma=made.cov.float().numpy())
    assert (narrow := load_statistics(file)) is not None
    assert narrow.mu.dtype == narrow.cov.dtype == torch.float64
    np.savez(file, arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    assert load_statistics(file) is None
    assert load_statistics(tmp_path) is None


def test_arrays_that_are_no_reference_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"a.npz does not exist"):
        load_statistics(file)
    with pytest.raises(ValueError, match=r"b.npy does not exist"):
        load_real(tmp_path / "b.npy")
    for mu, sigma in ((np.ones(3), np.ones((3, 2))), (np.ones((3, 1)), np.ones((3, 3))), (np.ones(3, int), np.eye(3))):
        np.savez(file, mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match=r"mu is .* and sigma .*; expected floats \(F,\) and \(F, F\)"):
            load_statistics(file)
    np.savez(file, mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="mu or sigma is not finite"):
        load_statistics(file)
    for array in (np.ones((2, 8, 8, 3)), np.ones((2, 3, 8, 8), np.uint8), np.ones((8, 8, 3), np.uint8)):
        np.savez(file, arr_0=array)
        with pytest.raises(ValueError, match=r"arr_0 is .*; expected images as uint8 \(N, H, W, C\) with C of 1 or 3"):
            load_real(file)
    np.savez(file, mean=np.ones(3), cov=np.eye(3))
    with pytest.raises(ValueError, match="has no arr_0, nor mu and sigma; it has mean, cov"):
        load_real(file)
    for content in (b"", b"PK\x03\x04 no archive", file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or holds something other than arrays"):
            load_statistics(file)
    np.save(tmp_path / "b.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(ValueError, match="holds something other than arrays of numbers"):
        load_real(tmp_path / "b.npy")


def test_the_default_cache_is_the_users(tmp_path, monkeypatch):
    import importlib

    from distmatch.evaluation import features
    from distmatch.system import paths

    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        importlib.reload(paths)
        module = importlib.reload(features)
        module.reference(images(), classifier())
        assert [p.suffix for p in (tmp_path / "distmatch").iterdir()] == [".safetensors"]
        patch.delenv("XDG_CACHE_HOME")
        assert Path.home() / ".cache" / "distmatch" == importlib.reload(paths).CACHE
    importlib.reload(paths)
    importlib.reload(features)


def test_the_reference_of_the_package_belongs_to_its_classifier():
    folder = ASSETS / "mnist"
    net = Classifier.load(folder / "classifier")
    shipped = load_reference(folder / "reference.safetensors", net)
    assert shipped.count == 60_000
    # 5,000 of the 60,000 features against all of them: the sample's own error, far below any model's distance.
    mean, cov = shipped.features.double().mean(0), torch.cov(shipped.features.double().T)
    assert frechet(mean, cov, shipped.mu, shipped.cov) < 1e-3 * float(shipped.cov.trace())
    assert net.head(shipped.features).argmax(1).bincount(minlength=10).min() > 400  # all ten digits
    half = shipped.features[:1000], shipped.features[1000:2000]
    assert abs(kernel_distance(*half, subsets=1)[0]) < 1e-2
    assert min(precision_recall(*half)) > 0.8
