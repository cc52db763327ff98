"""Feature spaces: what each of them sees, whom they may judge, and from how many images."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from distmatch.commands import classifier, eval
from distmatch.data.images import Images, load_images
from distmatch.evaluation.features import Reference, image_fingerprint, reference
from distmatch.evaluation.measure import chance, columns, evaluate, score
from distmatch.evaluation.metrics import frechet, frechet_bias
from distmatch.evaluation.spaces import default_features, find_spaces, known_rows
from distmatch.models.classifier import Classifier
from distmatch.models.folder import Info, save_model
from distmatch.models.library import find_model
from distmatch.models.pixels import Pixels, principal_components
from distmatch.pipeline import DistilledPipeline
from distmatch.recipe import build, subjects
from distmatch.recipe.entries import Evaluation
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.subjects import recipe_spaces
from distmatch.system.paths import ASSETS


def noise(n: int = 120, side: int = 8) -> Images:
    """Grey levels around 128 whose covariance is far from a multiple of one."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(n, 6, generator=generator) * torch.tensor([20.0, 16, 12, 8, 4, 2])
    directions = torch.linalg.qr(torch.randn(side * side, 6, generator=generator)).Q.T
    pixels = (128 + waves @ directions * 2).round().clamp(0, 255).to(torch.uint8)
    return Images(pixels.unflatten(1, (1, side, side)), None, ())


def test_distances_in_the_pixels_are_the_closed_form_of_their_components():
    """Stretched about grey by 2, the covariance S becomes 4 S: |m - 2 m|^2 + tr(S + 4 S - 2 * 2 S), on 5 components."""
    real = noise()
    space = principal_components(real, components=5)
    stretched = (128 + 2 * (real.pixels.int() - 128)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(128 + 2 * (real.pixels.int() - 128), stretched.int())  # none was cut
    figures = score(lambda a, b: stretched[a:b], None, len(real), [(space, reference(real, space, cache=None))])

    x = (real.pixels.double() / 127.5 - 1).flatten(1).numpy()
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    grey = 128 / 127.5 - 1
    shift = (x.mean(0) - grey) @ vectors[:, -5:]
    expected = (shift**2).sum() + values[-5:].sum()
    assert figures["frechet/pixels"] == pytest.approx(expected, rel=1e-4)
    overlap = np.linalg.svd(vectors[:, -5:].T @ space.basis.double().numpy())[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-4)


def test_chance_is_what_samples_of_the_same_gaussian_score_on_average():
    values = torch.tensor([4.0, 2, 1, 0.5, 0.1], dtype=torch.float64)
    n, scores = 200, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64) * values.sqrt()
        scores.append(frechet(x.mean(0), torch.cov(x.T), torch.zeros(5), values.diag()))
    assert frechet_bias(values.diag(), n) == pytest.approx(np.mean(scores), rel=0.05)
    equal = torch.eye(8)
    assert frechet_bias(equal, 50) == pytest.approx(8 * 13 / (4 * 50))
    space = Pixels((1, 2, 4), torch.zeros(8), equal)
    real = Reference(torch.zeros(8), equal, torch.empty(0, 8), 400, "", "", "")
    assert chance([(space, real)], 50)["frechet/pixels"] == pytest.approx(8 * 13 / 4 * (1 / 50 + 1 / 400))


def test_strokes_in_the_wrong_place_show_in_the_spaces_that_keep_positions():
    """Digits, moved by 4 pixels into their empty margin: averaged over the image they are nearly the same."""
    digits = DistilledPipeline.from_pretrained("mnist")(300, seed=3).pixels
    moved = digits.roll(4, dims=3)
    spaces = find_spaces("mnist")
    apart = {}
    for space, real in spaces:
        parts = [space.both(pixels)[0] for pixels in (digits, moved)]
        (a, cov_a), (b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in parts)
        apart[space.name] = frechet(a, cov_a, b, cov_b) / float(real.cov.trace())
    assert apart["pooled"] < 0.05
    assert apart["3x3 positions"] > 4 * apart["pooled"]
    assert apart["pixels"] > 10 * apart["pooled"]


def test_classes_are_matched_by_name():
    torch.manual_seed(0)
    classifier = Classifier(1, (8, 8), ("a", "b", "c"), (4, 6, 8)).eval().requires_grad_(False)
    pixels = noise(60).pixels
    real = reference(Images(pixels, None, ()), classifier, cache=None)
    labels = torch.arange(60) % 3

    def accuracy(labels, classes):
        return score(lambda a, b: pixels[a:b], labels, 60, [(classifier, real)], classes=classes).get("accuracy")

    expected = float((classifier(pixels).argmax(1) == labels).float().mean())
    assert 0 < expected < 1
    assert accuracy(labels, ("a", "b", "c")) == pytest.approx(expected)
    names = ("c", "a", "b")
    renumbered = torch.tensor([names.index("abc"[label]) for label in labels])
    assert not torch.equal(renumbered, labels)
    assert accuracy(renumbered, names) == pytest.approx(expected)
    assert accuracy(labels, ("a", "b", "d")) is None
    assert accuracy(labels, ()) is None


def test_too_few_images_are_no_basis_for_a_distance(tmp_path):
    torch.manual_seed(0)
    space = Classifier(1, (8, 8), ("a", "b"), (4, 6, 16)).eval().requires_grad_(False)
    many, few = noise(32), noise(31)
    pipe = DistilledPipeline(tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    whole = [(space, reference(many, space, cache=None))]
    assert evaluate(pipe, whole, n=32)["frechet/pooled"] > 0
    with pytest.raises(ValueError, match=r"31 images are too few for distances in 16 features.*at least 32"):
        evaluate(pipe, whole, n=31)
    part = [(space, reference(few, space, cache=None, source="a few"))]
    with pytest.raises(ValueError, match=r"31 real images \(a few\) are too few for distances in 16 features"):
        evaluate(pipe, part, n=32)
    info = find_model("mnist", "teacher")[1]
    evaluation = Evaluation(every=1, images=143, features="mnist")
    with pytest.raises(ValueError, match=r"143 images \(evaluate.images\) are too few for distances in 72 features"):
        recipe_spaces(evaluation, "mnist", info, torch.device("cpu"))
    images = tiny.image_folder(tmp_path / "images")
    with pytest.raises(ValueError, match=r"16 real images \(images, train\) are too few for distances in 32 features"):
        classifier.classifier(str(images), classifier.Options(steps=10**9, out=tmp_path / "out"))


def test_only_a_model_of_its_images_is_compared_with_the_packages_reference(tmp_path):
    for kind in ("teacher", "student"):
        assert default_features("mnist", find_model("mnist", kind)[1]) == "mnist"
    # 28x28 and classes 0 to 9, as Fashion-MNIST has them.
    other = Info((1, 28, 28), tuple("0123456789"), times=(80.0,), card={"pixels": "0" * 64})
    folder = tmp_path / "fashion"
    save_model(folder, find_model("mnist", "student")[0], other)
    options = eval.Options(n=150, batch=50, out=tmp_path / "figures.json", device="cpu")
    for info in (other, replace(other, card={})):
        save_model(folder, find_model("mnist", "student")[0], info)
        with pytest.raises(ValueError, match=r"fashion has no card that says .* \(mnist\). Say what to compare with"):
            eval.evaluate(str(folder), options)
    evaluation = Evaluation(every=1, images=1000, features="mnist")
    with pytest.raises(ValueError, match="the teacher fashion is not known to be of the same images"):
        recipe_spaces(evaluation, "fashion", other, torch.device("cpu"))
    assert recipe_spaces(Evaluation(every=0, features="mnist"), "fashion", other, torch.device("cpu")) == []


def test_students_are_of_their_teachers_images(tmp_path):
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)))
    subject = subjects.subject(recipe, (tiny.teacher(), replace(tiny.INFO, card={"pixels": "abc"})))
    assert build.student_info(recipe, subject).card["pixels"] == "abc"


def test_a_folder_of_an_earlier_version_has_the_pooled_space_alone(tmp_path):
    shutil.copytree(ASSETS / "mnist" / "classifier", tmp_path / "classifier")
    shutil.copy(ASSETS / "mnist" / "reference.safetensors", tmp_path)
    assert "positions" not in json.loads((tmp_path / "classifier" / "config.json").read_text())
    ((space, real),) = find_spaces(str(tmp_path))
    assert (space.name, space.distance, len(real.mu)) == ("pooled", "frechet/pooled", 64)
    (row,) = known_rows(str(tmp_path), Info((1, 28, 28)), [(space, real)], 1000)
    assert row["name"] == "real images, expected"


def test_the_spaces_of_the_package():
    spaces = find_spaces("mnist")
    assert [(space.name, len(real.mu), real.count) for space, real in spaces] == [
        ("3x3 positions", 72, 60_000),
        ("pixels", 64, 60_000),
        ("pooled", 64, 60_000),
    ]
    assert len({real.images for _, real in spaces}) == 1
    for _, real in spaces:  # the kept features are a sample of all
        mean, cov = real.features.double().mean(0), torch.cov(real.features.double().T)
        assert frechet(mean, cov, real.mu, real.cov) < 3 * frechet_bias(real.cov, len(real.features))
    rows = known_rows("mnist", find_model("mnist", "student")[1], spaces, 10_000)
    assert [row["name"] for row in rows] == ["teacher, 18 Heun steps", "real test images", "real images, expected"]
    assert [row["name"] for row in known_rows("mnist", Info((1, 28, 28)), spaces, 9)] == [r["name"] for r in rows[1:]]
    for space, _ in spaces:
        chance, test, teacher = (rows[i][space.distance] for i in (2, 1, 0))
        assert chance < 1.5 * test  # exact for Gaussians, which features are not
        assert test < teacher
    assert sum(file.stat().st_size for file in (ASSETS / "mnist").glob("reference*")) < 3_000_000


def test_real_images_alone_give_the_pixels_and_statistics_none(tmp_path):
    folder = tiny.image_folder(tmp_path / "images", per_class=30)
    with pytest.raises(ValueError, match=r"features 'pixels' come without a reference; name one with --reference"):
        find_spaces("pixels")
    ((space, real),) = find_spaces("pixels", str(folder))
    assert (space.name, real.images) == ("pixels", image_fingerprint(load_images(folder).pixels))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="holds statistics, which don't say in which features"):
        find_spaces("mnist", str(tmp_path / "statistics.npz"))


def test_pixels_on_disk(tmp_path):
    space = principal_components(noise())
    space.save(tmp_path / "pixels")
    pixels = noise(5).pixels
    assert torch.equal(Pixels.load(tmp_path / "pixels").both(pixels)[0], space.both(pixels)[0])
    with pytest.raises(ValueError, match=r"pixels are torch.uint8 \(5, 1, 8, 7\); the real images are uint8 \(B, 1"):
        space.both(pixels[..., 1:])
    (tmp_path / "pixels" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged.*run `distmatch classifier` again"):
        Pixels.load(tmp_path / "pixels")


def test_columns_come_in_the_order_of_figures_then_of_spaces():
    rows = [{"name": "a", "frechet/x": 1.0, "fid": 2.0, "recall/x": 0.5, "other": 3}, {"name": "b", "frechet/y": 1.0}]
    assert columns(rows) == {
        "name": ("model", "{}"),
        "fid": ("FID", "{:.3f}"),
        "frechet/x": ("Frechet distance (x)", "{:.3f}"),
        "frechet/y": ("Frechet distance (y)", "{:.3f}"),
        "recall/x": ("recall (x)", "{:.3f}"),
    }
