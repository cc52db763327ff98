"""Families of teachers: what a model is conditioned on and makes, which family answers for it."""

import json
from dataclasses import replace

import pytest

from distmatch.models.folder import load_model, save_model
from distmatch.models.info import Info
from distmatch.models.library import find_model
from distmatch.models.tiny import write_tiny_sd


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_tiny_sd(tmp_path_factory.mktemp("families") / "sd")


def test_a_model_says_what_it_is_conditioned_on():
    shape = (3, 8, 8)
    found = [info.condition for info in (Info(shape), Info(shape, ("a", "b")), Info(shape, text=True))]
    assert found == ["none", "classes", "text"]
    assert not Info(shape, source="model").latent  # an unconditional model in diffusers' format, of pixels


def test_a_text_to_image_student_of_an_earlier_version_is_one_still(sd, tmp_path):
    denoiser, info = find_model(f"diffusers:{sd}", "teacher")
    save_model(tmp_path, denoiser, replace(info, times=(999.0,)))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert (config.pop("text"), config.pop("latent")) == (True, True)
    del config["sha256"]
    file.write_text(json.dumps(config))
    assert load_model(tmp_path)[1] == replace(info, times=(999.0,))
