"""Every kind of Stable Diffusion that a user has: pickles, shards, single files, other schedulers, sizes and LoRAs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from ldm_names import single_file
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from distmatch.models.diffusers import single_file as single_files
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.library import components, find_model
from distmatch.system.errors import UserError

UNET = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_tiny_sd(root / "sd")
    write_tiny_sd(root / "v", prediction="v_prediction")
    write_tiny_sd(root / "sdxl", kind="sdxl")
    return root


@pytest.fixture
def sd(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "sd", tmp_path / "sd")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(single_files, "CACHE", tmp_path / "cache")


def stock(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(folder, file, **entries):
    place = folder / file
    place.write_text(json.dumps(json.loads(place.read_text()) | entries))
    return folder


def weights(source):
    """All weights of the teacher `source`, and the states of a prompt."""
    denoiser, info = find_model(f"diffusers:{source}", "teacher")
    parts = components(info)
    found = {**denoiser.state_dict(), **{f"vae.{k}": v for k, v in parts.decode.state_dict().items()}}
    return {**found, "states": parts.encode(["a cat"]).text}


def assert_equal(source, plain):
    here, there = weights(source), weights(plain)
    assert here.keys() == there.keys()
    for name, value in there.items():
        assert torch.equal(here[name], value), name


def test_pickles_are_read_as_data(originals, sd):
    for file in [*sd.glob("*/*.safetensors")]:
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{UNET}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    assert_equal(sd, originals / "sd")
    assert family_in(str(sd)).pipeline(str(sd)).unet is not None


class Program:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_is_a_program_is_refused_and_not_run(sd, capsys):
    torch.save({"conv_in.weight": torch.zeros(1), "program": Program()}, sd / "unet" / f"{UNET}.bin")
    (sd / "unet" / f"{UNET}.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded: "):
        find_model(f"diffusers:{sd}", "teacher")
    assert "executed" not in capsys.readouterr().out
    for content, message in ((b"\x80\x02}.", "is no file of weights that is read"), (None, "is compressed")):
        if content is None:
            place = sd / "zipped"
            (sd / "in" / "archive").mkdir(parents=True)
            (sd / "in" / "archive" / "data.pkl").write_bytes(b"\x80\x02}.")
            content = Path(shutil.make_archive(str(place), "zip", sd / "in")).read_bytes()
        (sd / "unet" / f"{UNET}.bin").write_bytes(content)
        with pytest.raises(UserError, match=message):
            find_model(f"diffusers:{sd}", "teacher")


def test_shards_are_one_network(originals, sd):
    pipe = stock(sd)
    for name, saved in {"unet": pipe.unet, "text_encoder": pipe.text_encoder}.items():
        shutil.rmtree(sd / name)
        saved.save_pretrained(sd / name, max_shard_size="100KB")
        assert len([*(sd / name).glob("*-of-*.safetensors")]) > 1
    assert_equal(sd, originals / "sd")


def settings_alone(folder, place):
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_single_file_is_the_folder(originals, tmp_path):
    file = tmp_path / "fine-tune.safetensors"
    save_file(single_file(stock(originals / "sd")), file)
    settings_alone(originals / "sd", tmp_path / "fine-tune")
    assert_equal(file, originals / "sd")
    _, info = find_model(f"diffusers:{file}", "teacher")
    assert info.source == str(file)
    (folder,) = (tmp_path / "cache" / "single-files").iterdir()
    shutil.rmtree(folder)  # it is only a cache
    assert_equal(file, originals / "sd")


def test_a_single_file_says_that_it_predicts_v(originals, tmp_path):
    file = tmp_path / "v.safetensors"
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({k: v.half() for k, v in single_file(stock(originals / "sd")).items()} | marks, file)
    settings_alone(originals / "sd", tmp_path / "v")
    denoiser, info = find_model(f"diffusers:{file}", "teacher")
    assert denoiser.prediction.name == "v"
    assert denoiser.schedule.alpha(torch.tensor([999.0])) == 0
    assert info.scheduler["timestep_spacing"] == "trailing"


def test_a_single_file_needs_settings_and_all_weights(originals, tmp_path, monkeypatch):
    file, content = tmp_path / "one.safetensors", single_file(stock(originals / "sd"))
    monkeypatch.setattr(single_files, "_merges", lambda: None)
    save_file(content, file)
    with pytest.raises(
        UserError, match=r"Its tokenizer is that of stable-diffusion-v1-5/.*, which is not in the cache"
    ):
        find_model(f"diffusers:{file}", "teacher")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match="holds weights alone, of a kind whose settings cannot be told from them"):
        find_model(f"diffusers:{file}", "teacher")
    settings_alone(originals / "sd", tmp_path / "one")
    save_file({k: v for k, v in content.items() if "output_blocks.0." not in k}, file)
    with pytest.raises(UserError, match=r"one.safetensors lacks weights that a StableDiffusionPipeline needs"):
        find_model(f"diffusers:{file}", "teacher")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="Get a new copy"):
        find_model(f"diffusers:{file}", "teacher")


def test_the_packages_settings_with_openclips_tokenizer(tmp_path):
    """Without the cache. The ids are what `open_clip.tokenize` returns."""
    shutil.copytree(single_files.PUBLISHED / "sdxl", tmp_path / "sdxl")
    single_files.write_tokenizers(tmp_path / "sdxl", single_files._merges())
    texts = ["A red bicycle, 4k; it's the café's", "a photo of a cat", ""]
    known = [
        [49406, 320, 736, 11652, 267, 275, 330, 282, 585, 568, 518, 15304, 568, 49407],
        [49406, 320, 1125, 539, 320, 2368, 49407],
        [49406, 49407],
    ]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "sdxl" / "tokenizer_2")
    assert tokenizer(texts, padding="max_length", max_length=77).input_ids == [
        line + [0] * (77 - len(line)) for line in known
    ]
    first = json.loads((tmp_path / "sdxl" / "tokenizer" / "tokenizer_config.json").read_text())
    assert (first["pad_token"], first["model_max_length"]) == ("<|endoftext|>", 77)
