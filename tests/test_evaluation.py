"""Figures of a model: computed anew from its images, the same for every batch size, written by the command."""

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch

from distmatch import run
from distmatch.evaluation import evaluate, score
from distmatch.features import load_reference, reference
from distmatch.images import load_images
from distmatch.models.classifier import Classifier
from distmatch.models.folder import Info, save_model
from distmatch.pipeline import DistilledPipeline


@pytest.fixture
def setting(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(1, (8, 8), ("a", "b", "c")).eval().requires_grad_(False)
    for weight in classifier.parameters():
        weight *= 4  # untrained features are tiny
    real = reference(load_images(tiny.image_folder(tmp_path / "images", per_class=50)), classifier, cache=None)
    pipe = DistilledPipeline(tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), t=80.0))
    return pipe, classifier, real


def test_figures_equal_those_of_the_pipelines_images(setting):
    pipe, classifier, real = setting
    figures = evaluate(pipe, classifier, real, n=70, seed=4, batch=32)
    pixels = pipe(70, seed=4).pixels
    features = classifier.features(pixels).double().numpy()
    mu, cov = features.mean(0), np.cov(features.T)
    roots = np.sqrt(np.linalg.eigvals(cov @ real.cov.numpy()).real.clip(0))  # their sum is tr (cov1 cov2)^(1/2)
    expected = ((mu - real.mu.numpy()) ** 2).sum() + np.trace(cov + real.cov.numpy()) - 2 * roots.sum()
    assert figures["frechet"] == pytest.approx(expected, rel=1e-3)
    right = classifier(pixels).argmax(1) == torch.arange(70) % 3
    assert figures["accuracy"] == pytest.approx(right.float().mean().item())


def test_figures_do_not_depend_on_the_batch(setting):
    pipe, classifier, real = setting
    a, b = (evaluate(pipe, classifier, real, n=60, seed=1, batch=batch) for batch in (7, 60))
    assert a == pytest.approx(b, rel=1e-5)
    assert a != pytest.approx(evaluate(pipe, classifier, real, n=60, seed=2), rel=1e-3)


def test_real_images_score_as_real(setting, tmp_path):
    _, classifier, real = setting
    pixels = load_images(tmp_path / "images").pixels
    figures = score(lambda a, b: pixels[a:b], None, len(pixels), classifier, real, batch=33)
    assert figures["frechet"] == pytest.approx(0, abs=1e-4 * real.cov.trace().item())
    assert figures["precision"] == figures["recall"] == 1
    assert "accuracy" not in figures


class Sums:
    """A feature space that knows no classes: sums of rows."""

    distance = "fid"
    identity: ClassVar = {"features": "sums"}

    def state_dict(self):
        return {}

    def to(self, device):
        return self

    def both(self, pixels):
        return pixels.sum((1, 3)).float(), None


@pytest.fixture
def student(tmp_path):
    save_model(tmp_path / "student", tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), t=80.0))
    return tmp_path / "student"


def figures_of(student, tmp_path, **changes):
    """What `distmatch eval` writes, less the timing."""
    settings = {"model": str(student), "n": 40, "seed": 1, "steps": None, "guidance": 1.0, "batch": 16}
    settings |= {"feature_name": "inception:weights.pth", "resize": "legacy", "real": None, "device": "cpu"}
    run.evaluate(**settings | changes, out=tmp_path / "figures.json")
    return json.loads((tmp_path / "figures.json").read_text())


def test_fid_is_the_same_from_a_folder_an_array_and_statistics(student, tmp_path, monkeypatch, capsys):
    """The folder's images as files, as ADM's array, and as EDM's mu and sigma; only the last has no features."""
    asked = []
    monkeypatch.setattr(run, "load_inception", lambda file, resize: asked.append((file, resize)) or Sums())
    monkeypatch.setattr(run, "speed", lambda *_: {})
    monkeypatch.setattr(run, "reference", partial(reference, cache=None))
    folder = tiny.image_folder(tmp_path / "images", per_class=30)
    pixels = load_images(folder).pixels
    np.savez(tmp_path / "adm.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    values = pixels.sum((1, 3)).double().numpy()
    np.savez(tmp_path / "edm.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    rows = {}
    for real in (folder, tmp_path / "adm.npz", tmp_path / "edm.npz"):
        written = figures_of(student, tmp_path, real=str(real), resize="clean")
        (rows[real.name],) = written["rows"]
        assert (written["reference"], written["resize"]) == (str(real), "clean")
    assert asked == [(Path("weights.pth"), "clean")] * 3
    assert rows["images"] == rows["adm.npz"]
    names = {"name", "nfe", "images", "seed", "fid"}
    assert rows["edm.npz"].keys() == names
    assert rows["images"].keys() == names | {"kernel_distance", "precision", "recall"}
    fake = DistilledPipeline.from_pretrained(student)(40, seed=1).pixels.sum((1, 3)).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(fake, rowvar=False) @ np.cov(values, rowvar=False)).real
    expected = ((fake.mean(0) - values.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(fake, rowvar=False) + np.cov(values, rowvar=False) - 2 * root)
    assert rows["edm.npz"]["fid"] == pytest.approx(expected, rel=1e-9)
    assert rows["images"]["fid"] == pytest.approx(expected, rel=1e-9)
    printed = capsys.readouterr().out
    assert "FID" in printed
    assert "Frechet" not in printed


def test_references_that_are_missing_or_do_not_fit_are_refused(student, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"'inception:weights.pth' come without a reference; name one with --reference"
    ):
        figures_of(student, tmp_path)
    with pytest.raises(ValueError, match=r"weights.pth does not exist"):
        figures_of(student, tmp_path, real=tmp_path)
    with pytest.raises(ValueError, match="resize 'clean' is for Inception; the features 'mnist' take images as they"):
        figures_of(student, tmp_path, feature_name="mnist", resize="clean")
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr(run, "load_inception", lambda *_: Sums())
    with pytest.raises(ValueError, match=r"edm.npz\) is of 2048 features, the network has 8"):
        figures_of(student, tmp_path, real=tmp_path / "edm.npz")


def test_commands_from_classifier_to_figures(tmp_path):
    images = tiny.image_folder(tmp_path / "images")
    made = tiny.command("classifier", images, "-o", tmp_path / "c", "--steps", 30, "--batch", 8)
    assert made.returncode == 0, made.stderr
    save_model(tmp_path / "student", tiny.teacher(), Info((1, 8, 8), ("dark", "light"), t=80.0))
    arguments = ("eval", tmp_path / "student", "-n", 20, "--features", tmp_path / "c", "-o", tmp_path / "figures.json")
    done = tiny.command(*arguments, "--seed", 3)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    classifier = Classifier.load(tmp_path / "c" / "classifier")
    real = load_reference(tmp_path / "c" / "reference.safetensors", classifier)
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    expected = evaluate(pipe, classifier, real, n=20, seed=3)
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert row["nfe"] == 1
    assert row["ms_per_image"] > 0
    missing = tiny.command("eval", tmp_path / "student", "--features", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "neither a folder made by `distmatch classifier` nor one of the package" in missing.stderr
