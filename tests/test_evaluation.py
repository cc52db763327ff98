"""Figures of a model: computed anew from its images, the same for every batch size, written by the command."""

import json

import numpy as np
import pytest
import tiny
import torch

from distmatch.data import load_images
from distmatch.evaluation import evaluate, score
from distmatch.features import load_reference, reference
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
