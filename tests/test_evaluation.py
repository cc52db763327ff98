"""Figures of a model: computed anew from its images, the same for every batch size, written by the command."""

import io
import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from forked import command

from distmatch.commands import eval
from distmatch.data.images import load_images
from distmatch.evaluation import measure, spaces
from distmatch.evaluation.features import reference
from distmatch.evaluation.measure import evaluate, score
from distmatch.models.classifier import Classifier
from distmatch.models.folder import Info, save_model
from distmatch.pipeline import DistilledPipeline
from distmatch.system.screen import Screen


@pytest.fixture
def setting(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(1, (8, 8), ("a", "b", "c"), (8, 12, 16)).eval().requires_grad_(False)
    for weight in classifier.parameters():
        weight *= 4  # untrained features are tiny
    real = reference(load_images(tiny.image_folder(tmp_path / "images", per_class=50)), classifier, cache=None)
    pipe = DistilledPipeline(tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    return pipe, classifier, real


def test_figures_equal_those_of_the_pipelines_images(setting):
    pipe, classifier, real = setting
    figures = evaluate(pipe, [(classifier, real)], n=70, seed=4, batch=32)
    pixels = pipe(70, seed=4).pixels
    features = classifier.features(pixels).double().numpy()
    mu, cov = features.mean(0), np.cov(features.T)
    roots = np.sqrt(np.linalg.eigvals(cov @ real.cov.numpy()).real.clip(0))  # their sum is tr (cov1 cov2)^(1/2)
    expected = ((mu - real.mu.numpy()) ** 2).sum() + np.trace(cov + real.cov.numpy()) - 2 * roots.sum()
    assert figures["frechet/pooled"] == pytest.approx(expected, rel=1e-3)
    right = classifier(pixels).argmax(1) == torch.arange(70) % 3
    assert figures["accuracy"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (200, 1)])
def test_figures_of_many_models_are_readable_at_any_width(width, tables, monkeypatch):
    """No name is cut, no figure's name wraps, and a table that would be too wide becomes several."""
    file = io.StringIO()
    monkeypatch.setattr(measure, "console", Screen(file=file, width=width))
    names = ["teacher, 50 PNDM steps", "student, 1 step", "DPM-Solver++, 8 evaluations", "UniPC, 8 evaluations"]
    others = {f"{figure}/3x3 positions": 0.5 for figure in ("kernel_distance", "precision", "recall")}
    measure.show_rows([{"name": name, "images": 10_000, "frechet/3x3 positions": 0.1234, **others} for name in names])
    lines = file.getvalue().splitlines()
    assert sum(line.split()[0] == "images" for line in lines) == tables
    assert sum("Frechet distance (3x3 positions)" in line for line in lines) == tables
    assert file.getvalue().count("0.123") == len(names)
    assert all(word in file.getvalue() for name in names for word in name.split())
    assert max(map(len, lines)) <= width
    file.truncate(file.seek(0))
    measure.show_rows([{"name": f"runs/{'x' * 60}, 1 evaluation", "images": 1}, {"name": "real images", "images": 2}])
    assert file.getvalue().count("x") == 60
    assert file.getvalue().count(" images ") == 2  # the figure, once, and the second model


def test_few_figures_of_many_models_have_a_line_for_each_where_columns_are_too_many(monkeypatch):
    """As those of `distmatch demo emoji` at 80 characters."""
    file = io.StringIO()
    monkeypatch.setattr(measure, "console", Screen(file=file, width=80))
    names = ["student 1", "DPM-Solver++ 4", "UniPC 4", "LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "PNDM 50"]
    figures = {"nfe": 102, "images": 30_000, "ms_per_image": 1325.3, "fid": 11.493, "speedup": 42.0}
    measure.show_rows([*({"name": name, **figures} for name in names), {"name": "real", "images": 6}])
    first, second, *lines = file.getvalue().splitlines()
    assert " ".join(first.split()) == "network ms per times as fast"
    assert " ".join(second.split()) == "evaluations images image FID as the teacher"
    told = [line.split() for line in lines]
    assert told == [[*name.split(), "102", "30,000", "1325.3", "11.493", "42.0"] for name in names] + [
        ["real", "-", "6", "-", "-", "-"]
    ]


def test_no_figure_is_broken_and_no_name_is_cut(monkeypatch):
    """Figures may be wider than the words of names, and characters of names than one column of a terminal."""
    file = io.StringIO()
    figures = {"nfe": 102, "images": 30_000, "ms_per_image": 1325.3, "fid": 11.493, "speedup": 42.0}
    for width in range(40, 100):
        file.truncate(file.seek(0))
        monkeypatch.setattr(measure, "console", Screen(file=file, width=width))
        measure.show_rows([{"name": name, **figures} for name in ("a 1", "b 2", "c 3", "日本語のモデル")])
        assert [file.getvalue().count(said) for said in ("30,000", "1325.3", "11.493")] == [4, 4, 4]
        assert "…" not in file.getvalue()
    measure.show_rows([{"name": name} for name in "abc"])  # none that any has


def test_a_very_narrow_terminal_shows_every_figure(monkeypatch):
    """There the figures' names wrap: the columns of the models keep their room."""
    file = io.StringIO()
    monkeypatch.setattr(measure, "console", Screen(file=file, width=30))
    measure.show_rows([{"name": name, "images": 10_000, "frechet/3x3 positions": 12.345} for name in ("one", "two")])
    words = file.getvalue().split()
    assert [words.count(said) for said in ("one", "two", "10,000", "12.345", "Frechet")] == [1, 1, 2, 2, 2]


def test_the_row_of_chance_is_explained_below_the_table_and_only_there(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(measure, "console", Screen(file=file, width=500))
    rows = [{"name": "mnist, 1 evaluation", "images": 9, "fid": 2.0}, {"name": measure.CHANCE, "images": 9, "fid": 1.0}]
    measure.show_rows(rows)
    *_, last = file.getvalue().splitlines()
    assert last.startswith("real images, expected: the distances that as many images drawn from the reference's own ")
    file.truncate(file.seek(0))
    measure.show_rows(rows[:1])
    assert "expected" not in file.getvalue()


def test_figures_do_not_depend_on_the_batch(setting):
    pipe, classifier, real = setting
    spaces = [(classifier, real)]
    a, b = (evaluate(pipe, spaces, n=60, seed=1, batch=batch) for batch in (7, 60))
    assert a == pytest.approx(b, rel=1e-5)
    assert a != pytest.approx(evaluate(pipe, spaces, n=60, seed=2), rel=1e-3)


def test_real_images_score_as_real(setting, tmp_path):
    _, classifier, real = setting
    pixels = load_images(tmp_path / "images").pixels
    figures = score(lambda a, b: pixels[a:b], None, len(pixels), [(classifier, real)], batch=33)
    assert figures["frechet/pooled"] == pytest.approx(0, abs=1e-4 * real.cov.trace().item())
    assert figures["precision/pooled"] == figures["recall/pooled"] == 1
    assert "accuracy" not in figures


class Sums:
    """A feature space that knows no classes: sums of rows."""

    name = "inception"
    distance = "fid"
    classes = ()
    identity: ClassVar = {"features": "sums"}

    def state_dict(self):
        return {}

    def to(self, device):
        return self

    def both(self, pixels):
        return pixels.sum((1, 3)).float(), None


@pytest.fixture
def student(tmp_path):
    save_model(tmp_path / "student", tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    return tmp_path / "student"


def figures_of(student, tmp_path, **changes):
    """What `distmatch eval` writes, less the timing."""
    settings = {"n": 40, "guidance": 1.0, "batch": 16, "features": "inception:weights.pth", "device": "cpu"}
    eval.evaluate(str(student), eval.Options(**settings | changes, out=tmp_path / "figures.json"))
    return json.loads((tmp_path / "figures.json").read_text())


def test_fid_is_the_same_from_a_folder_an_array_and_statistics(student, tmp_path, monkeypatch, capsys):
    """The folder's images as files, as ADM's array, and as EDM's mu and sigma; only the last has no features."""
    asked = []
    monkeypatch.setattr(spaces, "load_inception", lambda file, resize: asked.append((file, resize)) or Sums())
    monkeypatch.setattr(measure, "speed", lambda *_: {})
    monkeypatch.setattr(spaces, "reference", partial(reference, cache=None))
    folder = tiny.image_folder(tmp_path / "images", per_class=30)
    pixels = load_images(folder).pixels
    np.savez(tmp_path / "adm.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    values = pixels.sum((1, 3)).double().numpy()
    np.savez(tmp_path / "edm.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    rows = {}
    for real in (folder, tmp_path / "adm.npz", tmp_path / "edm.npz"):
        written = figures_of(student, tmp_path, reference=str(real), resize="clean", n=60)
        rows[real.name], chance = written["rows"]
        assert chance["name"] == "real images, expected"
        assert (written["reference"], written["resize"]) == (str(real), "clean")
    assert asked == [(Path("weights.pth"), "clean")] * 3
    assert rows["images"] == rows["adm.npz"]
    names = {"name", "nfe", "images", "seed", "fid"}
    assert rows["edm.npz"].keys() == names
    kinds = ("kernel_distance", "precision", "recall")
    both = {f"{kind}/{space}" for kind in kinds for space in ("inception", "pixels")}
    assert rows["images"].keys() == names | {"frechet/pixels"} | both
    fake = DistilledPipeline.from_pretrained(student)(60, seed=1).pixels.sum((1, 3)).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(fake, rowvar=False) @ np.cov(values, rowvar=False)).real
    expected = ((fake.mean(0) - values.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(fake, rowvar=False) + np.cov(values, rowvar=False) - 2 * root)
    assert rows["edm.npz"]["fid"] == pytest.approx(expected, rel=1e-9)
    assert rows["images"]["fid"] == pytest.approx(expected, rel=1e-9)
    printed = capsys.readouterr().out
    assert "FID" in printed
    assert "inception: 8 features of inception:weights.pth, against 60 images" in printed


def test_references_that_are_missing_or_do_not_fit_are_refused(student, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"'inception:weights.pth' come without a reference; name one with --reference"
    ):
        figures_of(student, tmp_path)
    with pytest.raises(ValueError, match=r"weights.pth does not exist"):
        figures_of(student, tmp_path, reference=tmp_path)
    with pytest.raises(ValueError, match="resize 'clean' is for Inception; the features 'mnist' take images as they"):
        figures_of(student, tmp_path, features="mnist", resize="clean")
    np.savez(tmp_path / "edm.npz", mu=np.zeros(20), sigma=np.eye(20))
    monkeypatch.setattr(spaces, "load_inception", lambda *_: Sums())
    with pytest.raises(ValueError, match=r"edm.npz\) is of 20 features, the network has 8"):
        figures_of(student, tmp_path, reference=tmp_path / "edm.npz")


def test_commands_from_classifier_to_figures(tmp_path):
    images = tiny.image_folder(tmp_path / "images", per_class=20)
    widths = ("--widths", 4, 6, 16)
    made = command("classifier", images, "-o", tmp_path / "c", "--steps", 30, "--batch", 8, *widths)
    assert made.returncode == 0, made.stderr
    save_model(tmp_path / "student", tiny.teacher(classes=2), Info((1, 8, 8), ("dark", "light"), times=(80.0,)))
    arguments = ("eval", tmp_path / "student", "-n", 40, "--features", tmp_path / "c", "-o", tmp_path / "figures.json")
    done = command(*arguments, "--seed", 3)
    assert done.returncode == 0, done.stderr
    row, test, chance = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert (test["name"], test["images"], chance["images"]) == ("real test images", 40, 40)
    found = spaces.find_spaces(str(tmp_path / "c"))
    assert [space.name for space, _ in found] == ["2x2 positions", "pixels", "pooled"]
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    expected = evaluate(pipe, found, n=40, seed=3)
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert row["nfe"] == 1
    assert row["ms_per_image"] > 0
    missing = command("eval", tmp_path / "student", "--features", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "neither a folder made by `distmatch classifier` nor one of the package" in missing.stderr
