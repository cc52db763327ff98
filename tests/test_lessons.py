"""`distmatch teach` and `distmatch classifier` on data as it comes: the same from a folder and from Python."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from layouts import encoded, write
from safetensors.torch import load_file

from distmatch.commands import classifier as classifying
from distmatch.commands import teach as teaching
from distmatch.commands.cli import app
from distmatch.commands.teach import Options, train_teacher
from distmatch.data.images import Images, load_images
from distmatch.models.folder import load_model

SMALL = Options(widths=(8, 16), steps=2, batch=4, preview_every=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_teacher_of_images_in_python_is_that_of_their_files(tmp_path):
    folder = tiny.image_folder(tmp_path / "images")
    there = load_images(folder)
    given = Images.of(there.pixels.float() / 255, [there.classes[i] for i in there.labels], value_range=(0, 1))
    train_teacher(str(folder), tmp_path / "files", SMALL)
    train_teacher(given, tmp_path / "python", SMALL)
    files, python = weights(tmp_path / "files"), weights(tmp_path / "python")
    assert files.keys() == python.keys()
    assert all(torch.equal(files[name], python[name]) for name in files)
    config = json.loads((tmp_path / "python" / "model" / "config.json").read_text())
    assert config["classes"] == ["dark", "light"]


def test_in_python_and_on_the_command_line_the_defaults_are_the_same(monkeypatch):
    called = []
    monkeypatch.setattr(teaching, "train_teacher", lambda images, out, options: called.append(options))
    app(["teach", "anything"], exit_on_error=False, result_action="return_value")
    app(["teach", "anything", "--widths", "8", "16", "--flip"], exit_on_error=False, result_action="return_value")
    assert called == [Options(), Options(widths=(8, 16), flip=True)]
    assert (Options().widths, Options().blocks, Options().patch) == ((32, 64), 1, 2)


def test_teaching_among_the_images_never_reads_its_own_pictures(tmp_path, monkeypatch, capsys):
    """`cd data; distmatch teach .`, twice, with results in the default folder: the same two classes, and it goes on."""
    folder = tiny.image_folder(tmp_path / "set") / "train"
    monkeypatch.chdir(folder)
    out = Path("runs") / "teach-train"
    train_teacher(".", out, replace(SMALL, preview_every=2))
    assert list((out / "previews").glob("*.png"))
    before = weights(out)
    train_teacher(".", out, replace(SMALL, preview_every=2))
    assert all(torch.equal(before[name], value) for name, value in weights(out).items())
    for line in (line for line in capsys.readouterr().out.splitlines() if "images 8x8" in line):
        assert "16 images 8x8, grey: 2 classes from the first folder: dark, light" in line
    assert load_images(".").classes == ("dark", "light")
    with pytest.raises(ValueError, match="holds the images; choose another folder"):
        train_teacher(".", folder, SMALL)


def test_the_default_folder_has_the_name_of_the_folder_one_stands_in(tmp_path, monkeypatch):
    folder, called = tiny.image_folder(tmp_path / "set"), {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(teaching, "train_teacher", lambda images, out, options: called.update(out=out))
    teaching.teach(".")
    assert called["out"] == Path("runs") / "teach-set"


def test_a_run_does_not_go_on_with_other_labels(tmp_path):
    pixels = load_images(tiny.image_folder(tmp_path / "images")).pixels
    train_teacher(Images.of(pixels, [0, 1] * 8), tmp_path / "run", SMALL)
    with pytest.raises(ValueError, match="labels: "):
        train_teacher(Images.of(pixels, [1, 0] * 8), tmp_path / "run", SMALL)
    with pytest.raises(ValueError, match=r"classes: \['0', '1'\] there, \['a', 'b'\] here"):
        train_teacher(Images.of(pixels, [0, 1] * 8, classes=("a", "b")), tmp_path / "run", SMALL)


def test_a_classifier_is_not_tested_on_another_scale(tmp_path):
    """Training images of 12 bits in 16, test images of 10: the upper eight of each would be another brightness."""
    files = {
        f"{split}/{name}/0.png": encoded(np.full((8, 8), most, np.uint16))
        for split, most in (("train", 4095), ("test", 1023))
        for name in ("a", "b")
    }
    options = classifying.Options(out=tmp_path / "out", positions=1, steps=1)
    with pytest.raises(ValueError, match="training images use 12 bits per pixel and test images 10"):
        classifying.classifier(str(write(tmp_path / "set", files)), options)


def test_the_lines_in_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code.replace("steps=20", "steps=1, preview_every=0"), {})
    assert load_model(Path("runs/cats-and-dogs/model"))[1].classes == ("cat", "dog")
