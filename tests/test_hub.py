"""Folders in diffusers' format as users have them: read as diffusers itself reads them, or refused by name."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import stock, text_encoder

from distmatch.diffusion.guidance import guided
from distmatch.diffusion.solvers import solver
from distmatch.evaluation.baselines import load_teacher
from distmatch.models.diffusers import cache
from distmatch.models.diffusers.autoencoder import tiny_decoder
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.hub import network
from distmatch.models.diffusers.tiny import write_tiny_sd, write_tiny_vae
from distmatch.models.folder import save_model
from distmatch.models.library import find_model, outline
from distmatch.recipe import subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.system.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_tiny_sd(root / "sd")
    write_tiny_sd(root / "sdxl", kind="sdxl")
    return root


@pytest.fixture
def sd(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "sd", tmp_path / "sd")


@pytest.fixture
def sdxl(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "sdxl", tmp_path / "sdxl")


def change(folder: Path, part: str, **entries) -> Path:
    file = folder / part / "scheduler_config.json" if part == "scheduler" else folder / part / "config.json"
    if part == "model_index":
        file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return folder


def pipeline(folder: Path):
    return family_in(str(folder)).pipeline(str(folder))


REFUSED = {
    "flow matching": ("scheduler", {"beta_schedule": None, "shift": 3.0}, "PNDMScheduler has no betas"),
    "flow sigmas": ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True is flow matching"),
    "zero SNR": ("scheduler", {"rescale_betas_zero_snr": True}, "noise ends at alpha = 0 .rescale_betas_zero_snr."),
    "thresholding": ("scheduler", {"thresholding": True}, "scheduler's thresholding True is not followed"),
    "Runge-Kutta": ("scheduler", {"skip_prk_steps": False}, "skip_prk_steps False is not followed; set it to True"),
    "prediction": ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is unknown"),
    "inpainting": ("unet", {"in_channels": 9}, "takes 9 channels and makes 4 of latents of 4; models of inpainting"),
    "Pix2Pix": ("unet", {"in_channels": 8}, "takes 8 channels and makes 4"),
    "guidance-distilled": (
        "unet",
        {"time_cond_proj_dim": 256},
        r"takes a guidance scale \(time_cond_proj_dim 256\): guidance was distilled",
    ),
    "upscaler": ("unet", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
    "no sample_size": ("unet", {"sample_size": None}, "unet/config.json has no sample_size; add it: 64"),
    "shift factor": ("vae", {"shift_factor": 0.1}, "shift_factor 0.1, which its pipeline leaves out"),
    "means": ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean .* expected none"),
    "scale null": ("vae", {"scaling_factor": None}, "scaling_factor None; expected a positive number"),
    "scale 0": ("vae", {"scaling_factor": 0}, "scaling_factor 0; expected a positive number"),
    "scale in text": ("vae", {"scaling_factor": "x"}, "scaling_factor 'x'; expected a positive number"),
    "no widths": ("vae", {"block_out_channels": None}, "vae/config.json: block_out_channels has the wrong form"),
    "one width": ("vae", {"block_out_channels": 5}, "vae/config.json: block_out_channels has the wrong form"),
    "three sides": ("unet", {"sample_size": [1, 2, 3]}, "in_channels and sample_size has the wrong form"),
    "side in text": ("unet", {"sample_size": "64"}, "sample_size has the wrong form: 1: expected a whole number"),
    "negative side": ("unet", {"sample_size": -5}, "sample_size has the wrong form: 1: expected 1 or more"),
    "large side": ("unet", {"sample_size": 10**9}, "sample_size has the wrong form: 1: expected 4096 or less"),
    "no steps": ("scheduler", {"num_train_timesteps": None}, "VP: steps is None; expected a number"),
    "many steps": ("scheduler", {"num_train_timesteps": 10**11}, "VP: steps is 100000000000; expected a whole number"),
    "start in a list": ("scheduler", {"beta_start": [1]}, r"VP: beta_start is \[1\]; expected a number"),
    "betas of betas": ("scheduler", {"trained_betas": [[0.1, 0.2]]}, "expected a list of numbers"),
    "autoencoder": (
        "vae",
        {"_class_name": "AutoencoderDC"},
        "its autoencoder is a AutoencoderDC; expected AutoencoderKL",
    ),
    "pipeline": ("model_index", {"_class_name": "StableCascadePipeline"}, "is a StableCascadePipeline; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_all_commands(sd, case):
    """Before any weight is read: there are none here."""
    part, entries, message = REFUSED[case]
    for file in change(sd, part, **entries).rglob("*.safetensors"):
        file.unlink()
    for command in (
        lambda: find_model(f"diffusers:{sd}", "teacher"),  # sample, train, pairs, serve
        lambda: load_teacher(str(sd), torch.device("cpu"), torch.float32),  # compare
        lambda: pipeline(sd),  # export
    ):
        with pytest.raises(ValueError, match=message):
            command()


@pytest.mark.parametrize(
    "entries",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace", "set_alpha_to_one": True},
        {"steps_offset": 0},  # which diffusers' pipeline sets to 1
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": torch.linspace(0.001, 0.01, 1000).tolist()},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_what_the_scheduler_says_is_followed(sd, entries):
    """The latents of diffusers' own pipeline from the same folder."""
    denoiser, info = find_model(f"diffusers:{change(sd, 'scheduler', **entries)}", "teacher")
    z = rng.noise(0, range(1), info.shape)
    with torch.no_grad():
        cond = text_encoder(str(sd))(["a cat"])
        x = solver("pndm", info.scheduler)(guided(denoiser, 3.0), denoiser.schedule, z, cond, 4)
    y = stock(sd)("a cat", latents=z, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
    assert (x - y).abs().max() < 5e-5 * y.abs().max()


def test_sdxls_means_are_followed(sdxl):
    change(sdxl, "vae", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0], scaling_factor=0.5)
    vae, latents = AutoencoderKL.from_pretrained(sdxl / "vae"), torch.randn(1, 4, 8, 8)
    mean, std = (torch.tensor(vae.config[name])[None, :, None, None] for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        assert torch.allclose(
            family_in(str(sdxl)).decoder(str(sdxl))(latents), vae.decode(latents * std / 0.5 + mean).sample, atol=1e-5
        )


def test_weights_in_half_precision_alone(sd, sdxl, tmp_path):
    """`variant="fp16"` files, of some parts or of all: the very numbers in them."""
    stock(sd).to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = tmp_path / "half"
    assert not list(half.glob("*/model.safetensors"))
    denoiser, _ = find_model(f"diffusers:{half}", "teacher")
    kept = load_file(half / "unet" / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    assert all(torch.equal(v, kept[k].float()) for k, v in denoiser.net.unet.state_dict().items())
    assert next(pipeline(half).vae.parameters()).dtype == torch.float32
    shutil.rmtree(half / "text_encoder")
    shutil.copytree(sd / "text_encoder", half / "text_encoder")
    assert torch.equal(text_encoder(str(half))(["a"]).text, text_encoder(str(sd))(["a"]).text)


def test_a_model_of_the_cache_in_shards_without_the_hub(sd, tmp_path, monkeypatch):
    """As large models are, and as `hf download` leaves it. Its students record the id."""
    cached = tmp_path / "hub" / "models--its--model"
    folder = cached / "snapshots" / ("0" * 40)
    stock(sd).save_pretrained(folder, max_shard_size="200KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    denoiser, info = find_model("diffusers:its/model", "teacher")
    whole, _ = find_model(f"diffusers:{sd}", "teacher")
    assert info.source == "its/model"
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in denoiser.state_dict().items())
    assert torch.equal(text_encoder("its/model")(["a"]).text, text_encoder(str(sd))(["a"]).text)
    with pytest.raises(UserError, match="diffusers model 'its/other' cannot be loaded: "):
        find_model("diffusers:its/other", "teacher")
    with pytest.raises(UserError, match=r"diffusers model '\./other' cannot be loaded: "):
        find_model("diffusers:./other", "teacher")
    shutil.rmtree(folder / "tokenizer")  # as where a download ended early
    with pytest.raises(UserError, match=r"^its/model, tokenizer lacks a tokenizer's vocabulary; expected "):
        text_encoder("its/model")
    shutil.rmtree(folder / "vae")
    for command in (
        lambda: find_model("diffusers:its/model", "teacher"),
        lambda: network("its/model", "vae", AutoencoderKL),
    ):
        with pytest.raises(UserError, match="diffusers model 'its/model' cannot be loaded: ") as raised:
            command()
        assert str(tmp_path) not in str(raised.value)


def test_a_hub_that_does_not_answer_is_asked_once(sd, tmp_path, monkeypatch, capsys):
    """Its own library would try six times for each file, for half a minute."""
    asked = []

    def refuse(*where, **_):
        asked.append(where)
        raise socket.gaierror("no such name")

    stock(sd).save_pretrained(tmp_path / "hub" / "models--its--model" / "snapshots" / ("0" * 40))
    (tmp_path / "hub" / "models--its--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--its--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    cache._say.cache_clear()
    cache._unreachable.cache_clear()
    denoiser, info = find_model("diffusers:its/model", "teacher")
    whole, _ = find_model(f"diffusers:{sd}", "teacher")
    assert info.source == "its/model"
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in denoiser.state_dict().items())
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Asking https://")
    assert said[0].endswith(" for its/model; with HF_HUB_OFFLINE=1 only the cache is looked at")
    assert len(said) == 2
    assert "no such name" in said[1]
    with pytest.raises(UserError, match=r"'its/other' cannot be loaded: the cache does not have it, and https://"):
        find_model("diffusers:its/other", "teacher")
    assert len(asked) == 1
    cache._say.cache_clear()
    cache._unreachable.cache_clear()


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_part_of_an_unknown_class_is_named(sd, part):
    change(sd, "model_index", **{part: ["transformers", "CLIPOfTomorrow"]})
    with pytest.raises(UserError, match=r"sd: model_index\.json names CLIPOfTomorrow, which transformers .* lacks"):
        text_encoder(str(sd))


def test_a_tokenizer_without_its_vocabulary_is_an_error(sdxl):
    """transformers goes on with one of two tokens. Older folders have it in two files."""
    own = text_encoder(str(sdxl))(["a cat"]).text
    parts = json.loads((sdxl / "tokenizer_2" / "tokenizer.json").read_text())["model"]
    (sdxl / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2 lacks a tokenizer's vocabulary; expected "):
        text_encoder(str(sdxl))
    (sdxl / "tokenizer_2" / "vocab.json").write_text(json.dumps(parts["vocab"]))
    with pytest.raises(UserError, match=r"expected tokenizer\.json, or merges\.txt and vocab\.json: fetch"):
        text_encoder(str(sdxl))
    merges = [" ".join(pair) for pair in parts["merges"]]
    (sdxl / "tokenizer_2" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert torch.equal(text_encoder(str(sdxl))(["a cat"]).text, own)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_a_network_that_lacks_weights_is_an_error(sd, part, fault):
    """diffusers and transformers go on with random ones."""
    (file,) = (sd / part).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    if fault == "missing":
        del weights[name]
    else:
        name = "further.weight"
        weights[name] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing, left over or of another shape: 1 weight of {part}, first .*"):
        pipeline(sd)
    if part == "unet":
        with pytest.raises(ValueError, match=rf"first {name}; diffusers would go on with random ones"):
            network(str(sd), "unet", UNet2DConditionModel)


def test_a_tokenizer_that_does_not_say_its_length(sd):
    expected = text_encoder(str(sd))(["a cat"]).text
    file = sd / "tokenizer" / "tokenizer_config.json"
    entries = json.loads(file.read_text())
    entries.pop("model_max_length")
    file.write_text(json.dumps(entries))
    assert torch.equal(text_encoder(str(sd))(["a cat"]).text, expected)


def test_latents_that_are_not_square(sd):
    known = family_in(str(sd)).settings(str(change(sd, "unet", sample_size=[8, 16])))
    assert known.shape == (4, 8, 16)
    assert known.size == (64, 128)
    denoiser, info = find_model(f"diffusers:{sd}", "teacher")
    assert info.shape == (4, 8, 16)
    z = rng.noise(0, range(1), info.shape)
    with torch.no_grad():
        x = solver("pndm", info.scheduler)(denoiser, denoiser.schedule, z, text_encoder(str(sd))(["a"]), 3)
    y = stock(sd)("a", latents=z, num_inference_steps=3, guidance_scale=1.0, output_type="latent").images
    assert (x - y).abs().max() < 5e-5 * y.abs().max()


def test_sdxl_is_told_height_and_width(sdxl):
    change(sdxl, "unet", sample_size=[8, 16])
    assert text_encoder(str(sdxl))(["a"]).extra["size"].tolist() == [[64, 128, 0, 0, 64, 128]]


def test_a_folder_without_its_safety_checker_is_exported(sd, tmp_path, capsys):
    change(
        sd,
        "model_index",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    denoiser, info = find_model(f"diffusers:{sd}", "teacher")
    save_model(tmp_path / "student", denoiser, info.__class__(**{**info.__dict__, "times": (999.0,)}))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    assert "comes without its safety checker" in capsys.readouterr().out
    assert stock(tmp_path / "out").safety_checker is None
    write_tiny_sd(tmp_path / "xl", kind="sdxl")
    with pytest.raises(
        ValueError, match=r"from texts 64 wide, the student .* from 32; expected the model that it was made"
    ):
        export_diffusers(str(tmp_path / "student"), tmp_path / "other", str(tmp_path / "xl"))


def test_solvers_take_the_models_schedule_and_their_own_defaults(sd):
    """Whatever solver the folder came with: PNDM of an Euler folder is Stable Diffusion's PNDM."""
    from distmatch.evaluation.baselines import methods

    change(sd, "scheduler", _class_name="EulerDiscreteScheduler", use_karras_sigmas=True, skip_prk_steps=True)
    seen = {}
    for method in methods(load_teacher(str(sd), torch.device("cpu"), torch.float32), None, None, 3.0):
        seen[method.name] = method.nfe
    assert seen == {"DPM-Solver++ 4": 8, "UniPC 4": 8, "PNDM 50": 102}
    assert PNDMScheduler.from_pretrained(sd, subfolder="scheduler").config.skip_prk_steps


def test_a_tiny_autoencoder_of_other_latents_is_refused(tmp_path):
    write_tiny_vae(tmp_path / "tiny")
    change(tmp_path / "tiny", "", shift_factor=0.5)
    with pytest.raises(ValueError, match="has shift_factor"):
        tiny_decoder(str(tmp_path / "tiny"))


def edit(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
DISTILLED = {
    "sdxl-turbo": (
        "scheduler/scheduler_config.json",
        TRAILING,
        "EulerAncestralDiscreteScheduler with trailing timesteps",
    ),
    "lcm": ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "LCMScheduler, of latent consistency"),
    "hyper": ("scheduler/scheduler_config.json", {"_class_name": "TCDScheduler"}, "TCDScheduler, of trajectory"),
    "name": ("model_index.json", {"_name_or_path": "stabilityai/sd-turbo"}, "it is called stabilityai/sd-turbo"),
    "unet": (
        "unet/config.json",
        {"_name_or_path": "ByteDance/SDXL-Lightning"},
        "it is called ByteDance/SDXL-Lightning",
    ),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_a_student_is_no_teacher_unless_one_insists(sd, name):
    file, entries, message = DISTILLED[name]
    (sd / "prompts.txt").write_text("a cat\n")
    overrides = [f"teacher=diffusers:{sd}", f"prompts.path={sd / 'prompts.txt'}"]
    assert subjects.subject(load_recipe("emoji", overrides)).info.latent
    edit(sd / file, **entries)
    with pytest.raises(
        UserError, match=f"was distilled itself: .*{message}.*; if this one is not .* distilled_teacher=true"
    ):
        subjects.subject(load_recipe("emoji", overrides))
    with pytest.raises(UserError, match="was distilled itself: "):
        subjects.as_used(load_recipe("emoji", overrides), *outline(f"diffusers:{sd}"))  # as plans do
    assert subjects.subject(load_recipe("emoji", [*overrides, "distilled_teacher=true"])).info.latent


def test_an_export_is_a_student_and_honest_models_are_not(sd, tmp_path):
    assert family_in(str(sd)).distilled(str(sd)) is None
    edit(sd / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", timestep_spacing="trailing")
    assert family_in(str(sd)).distilled(str(sd)) is None  # a usual choice of users, with more than a few steps
    for fine in ("stabilityai/stable-diffusion-xl-base-1.0", "user/film-grain", "user/lcmodel", "user/admd"):
        edit(sd / "model_index.json", _name_or_path=fine)
        assert family_in(str(sd)).distilled(str(sd)) is None, fine
    denoiser, info = find_model(f"diffusers:{sd}", "teacher")
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    assert "student exported by distmatch" in (family_in(str(tmp_path / "out")).distilled(str(tmp_path / "out")) or "")


def test_a_taught_teacher_remembers_its_text_dropout(sd):
    (sd / "distmatch.json").write_text('{"teach-text": {"text_dropout": 0.0}}')
    _, info = find_model(f"diffusers:{sd}", "teacher")
    with pytest.raises(UserError, match="guidance 4: this teacher was trained with text dropout 0"):
        info.check_guidance(4.0)
    assert family_in(str(sd)).distilled(str(sd)) is None
