"""Families of teachers: what a model is conditioned on and makes, which family answers for it."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

from distmatch.evaluation.baselines import digest
from distmatch.models.diffusers.families import FAMILIES, family_in
from distmatch.models.diffusers.pixart import write_tiny_pixart
from distmatch.models.diffusers.stable import StableDiffusion
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import load_model, save_model
from distmatch.models.info import Info
from distmatch.models.library import components, family_of, find_model, outline
from distmatch.pipeline import TeacherPipeline


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


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_outline_is_the_teacher_without_its_weights(tmp_path, kind):
    name = f"diffusers:{write_tiny_sd(tmp_path, kind=kind)}"
    (thin, known), (teacher, info) = outline(name), find_model(name, "teacher")
    assert known == info
    assert all(p.is_meta for p in thin.parameters())
    assert shapes(thin) == shapes(teacher)
    family, parts = family_of(info), components(info)
    networks = [p for name, p in parts.encode.pipeline.components.items() if name.startswith("text_encoder")]
    held = sum(p.numel() for network in (*networks, parts.decode) for p in network.parameters())
    assert family.component_weights(info.source) == held
    real, example = parts.encode(["a", "b"]), family.example_cond(teacher.net, info, 2)
    assert example.text.shape == real.text.shape
    assert {k: v.shape for k, v in example.extra.items()} == {k: v.shape for k, v in real.extra.items()}


def shapes(network):
    return {name: value.shape for name, value in network.state_dict().items()}


def test_a_further_family_is_found_by_its_class(sd, tmp_path, monkeypatch):
    """One class in one file, and one line in the table: here, images half as bright."""

    class Dim(StableDiffusion):
        def components(self, source, device="cpu", precision="fp32"):
            parts = super().components(source, device, precision)
            return replace(parts, decode=lambda x: parts.decode(x) / 2)

    source = shutil.copytree(sd, tmp_path / "dim")
    file = source / "model_index.json"
    file.write_text(file.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))
    with pytest.raises(ValueError, match="is a StableDiffusionImg2ImgPipeline; expected StableDiffusionPipeline or"):
        find_model(f"diffusers:{source}", "teacher")
    monkeypatch.setitem(FAMILIES, "StableDiffusionImg2ImgPipeline", Dim())
    bright, dim = (TeacherPipeline.from_pretrained(f"diffusers:{folder}", steps=2) for folder in (sd, source))
    z = torch.randn(1, 4, 8, 8)
    cond = dim.condition(1, prompts="a cat")
    assert torch.equal(dim.sample(z, cond), bright.sample(z, cond) / 2)


def test_conditions_are_told_apart_if_only_the_way_to_make_them_differs(tmp_path):
    """Cached states are found by this fingerprint: XL is told the image's size, and families share text encoders."""
    xl = f"diffusers:{write_tiny_sd(tmp_path / 'xl', kind='sdxl')}"
    info = find_model(xl, "teacher")[1]
    wide = replace(info, shape=(4, 8, 16))
    own, same, other = (components(one).encode.fingerprint() for one in (info, replace(info), wide))
    assert own == same != other
    alpha, sigma = (write_tiny_pixart(tmp_path / str(one), sigma=one) for one in (False, True))
    made = {family_in(str(one)).text_encoder(str(one)).fingerprint() for one in (alpha, sigma)}
    assert len(made) == 2  # Sigma's texts are longer


def test_the_encoders_fingerprint_is_that_of_earlier_versions(sd):
    """Folders of cached prompts are named by it."""
    encoder = family_in(str(sd)).text_encoder(str(sd))
    h = sha256(str({"tokenizer": len(encoder.pipeline.tokenizer)}).encode())
    for name, value in encoder.pipeline.text_encoder.state_dict().items():
        h.update(f"text_encoder.{name}".encode() + value.float().numpy().tobytes())
    assert encoder.fingerprint() == h.hexdigest()
    h = sha256()
    for name, value in sorted(encoder.pipeline.text_encoder.state_dict().items()):
        h.update(name.encode() + value.numpy().tobytes())
    assert digest(encoder.pipeline.text_encoder) == h.hexdigest()  # which comparisons are bound to
