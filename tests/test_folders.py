"""Every kind of Stable Diffusion that a user has: pickles, shards, single files, other schedulers, sizes and LoRAs."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler
from ldm_names import single_file
from safetensors.torch import load_file, save_file
from tiny import exported_lora, stock
from transformers import CLIPTokenizer

from distmatch import DistilledPipeline
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.schedule import EDM
from distmatch.diffusion.solvers import solver
from distmatch.models.diffusers import single_file as single_files
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import load_model, save_model
from distmatch.models.library import components, find_model
from distmatch.recipe import subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.plain import read_json

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


@pytest.fixture
def said():
    """What diffusers writes to the screen beside our own messages."""
    records, logger = [], logging.getLogger("diffusers")
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


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
    (folder,) = (tmp_path / "cache" / "single-files").iterdir()
    shutil.rmtree(folder)  # it is only a cache
    denoiser, info = find_model(f"diffusers:{file}", "teacher")
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    assert load_model(tmp_path / "student")[1].source == str(file)


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


def kohya(pipe, rank=2, alpha=3.0, parts=("unet", "text_encoder")):
    """A random LoRA in kohya's form, and by layer what it adds to the weight."""
    generator, weights, added = torch.Generator().manual_seed(0), {}, {}
    chosen = {"unet": ("lora_unet", ".to_q"), "text_encoder": ("lora_te", (".q_proj", ".out_proj"))}
    for part in parts:
        prefix, end = chosen[part]
        for name, layer in getattr(pipe, part).named_modules():
            if name.endswith(end):
                down = torch.randn(rank, layer.in_features, generator=generator) / 4
                up = torch.randn(layer.out_features, rank, generator=generator) / 4
                long = name if part == "unet" or name.startswith("text_model") else f"text_model.{name}"
                key = f"{prefix}_{long.replace('.', '_')}"
                weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                weights[f"{key}.alpha"] = torch.tensor(alpha)
                added[f"{part}.{name}.weight"] = alpha / rank * up @ down
    return weights, added


def merged(source, file, scale):
    denoiser, info = find_model(f"diffusers:{source}", "teacher")
    return denoiser, family_in(str(source)).merged(denoiser, info, str(file), scale)


def test_a_lora_is_merged_into_network_and_text_encoder(originals, tmp_path):
    """By its formula, as diffusers does; the student made of it and its export find it again."""
    base = str(originals / "sd")
    weights, added = kohya(stock(base))
    save_file(weights, tmp_path / "style.safetensors")
    denoiser, info = merged(base, tmp_path / "style.safetensors", 0.7)
    plain, _ = find_model(f"diffusers:{base}", "teacher")
    assert any(name.startswith("text_encoder.") for name in added)
    for name, value in plain.net.unet.state_dict().items():
        expected = value + 0.7 * added.get(f"unet.{name}", torch.zeros(()))
        assert torch.allclose(denoiser.net.unet.state_dict()[name], expected, atol=1e-6), name
    theirs = stock(base)
    theirs.load_lora_weights(weights)
    theirs.fuse_lora(lora_scale=0.7)
    z, scale = rng.noise(0, range(1), info.shape), 3.0
    y = theirs("a cat", latents=z, num_inference_steps=4, guidance_scale=scale, output_type="latent").images
    with torch.no_grad():
        cond = components(info).encode(["a cat"])
        x = solver("pndm", info.scheduler)(guided(denoiser, scale), denoiser.schedule, z, cond, 4)
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    assert torch.equal(pipe.condition(1, prompts="a cat").text, cond.text)
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    image = stock(tmp_path / "out")(
        "a cat", latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="pt"
    ).images
    ours = (pipe.sample(z, cond) / 2 + 0.5).clamp(0, 1)
    assert (ours - image).abs().max() < 2e-5
    mark = read_json(tmp_path / "out" / "distmatch.json", dict)
    assert (mark["base"], mark["lora"]["file"], mark["lora"]["scale"]) == (
        base,
        str(tmp_path / "style.safetensors"),
        0.7,
    )
    save_file({k: v * 2 for k, v in weights.items()}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="is not the LoRA that this model was made with; put that file back"):
        family_in(base).components(info)


def test_a_lora_of_the_network_alone_is_not_needed_again(originals, tmp_path):
    weights, _ = kohya(stock(originals / "sd"), parts=("unet",))
    save_file(weights, tmp_path / "style.safetensors")
    denoiser, info = merged(originals / "sd", tmp_path / "style.safetensors", 1.0)
    (tmp_path / "style.safetensors").unlink()
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    _, back = load_model(tmp_path / "student")
    assert back.lora == info.lora
    plain = family_in(info.source).text_encoder(info.source)
    assert torch.equal(components(back).encode(["a cat"]).text, plain(["a cat"]).text)


def test_a_students_lora_is_used_beside_its_teachers(originals, tmp_path, capsys):
    """By the very lines that the export shows, of a teacher in a single file. A student itself, it makes no teacher."""
    weights, _ = kohya(stock(originals / "sd"))
    save_file(weights, tmp_path / "style.safetensors")
    save_file(single_file(stock(originals / "sd")), tmp_path / "one.safetensors")
    settings_alone(originals / "sd", tmp_path / "one")
    denoiser, info = merged(tmp_path / "one.safetensors", tmp_path / "style.safetensors", 0.7)
    x, pipe, draw = exported_lora(denoiser, info, (999.0,), tmp_path, capsys)
    assert (x - draw()).abs().max() < 2e-5
    pipe.set_adapters("student")
    assert (x - draw()).abs().max() > 0.05
    out = tmp_path / "lora"
    source, family = str(originals / "sd"), family_in(str(originals / "sd"))
    assert family.distilled(source, str(tmp_path / "style.safetensors")) is None
    for lora in (out, out / "kohya.safetensors"):
        assert f"{lora} is of a student exported by distmatch" in (family.distilled(source, str(lora)) or "")
    shutil.copy(tmp_path / "style.safetensors", out)
    assert family.distilled(source, str(out / "style.safetensors")) is None


def test_what_is_no_lora_of_the_model_is_refused(originals, tmp_path, said):
    file = tmp_path / "x.safetensors"
    weights, _ = kohya(stock(originals / "sd"), parts=("unet",))
    for content, message in (
        (
            {"transformer.blocks.0.lora_A.weight": torch.zeros(2, 2)},
            "is no LoRA of a StableDiffusionPipeline: it holds",
        ),
        (
            {k: v[:, :5].clone() if "lora_down" in k else v for k, v in weights.items()},
            "does not fit the unet of this model: .*size mismatch for",
        ),
        ({f"{k}x": v for k, v in weights.items()}, "cannot be read as a LoRA|is no LoRA of"),
        (
            {k.replace("down_blocks_0", "down_blocks_7"): v for k, v in weights.items()},
            r"has \d+ layers for the unet; only \d+ of them fit it",
        ),
    ):
        save_file(content, file)
        with pytest.raises(UserError, match=message):
            merged(originals / "sd", file, 1.0)
    with pytest.raises(UserError, match=r"is no .safetensors file; expected one, or its folder"):
        merged(originals / "sd", tmp_path / "none.bin", 1.0)
    with pytest.raises(UserError, match=r"teacher_lora.path x: this teacher takes no LoRA"):
        load_subject("toy2d", ["teacher_lora.path=x"])
    assert said == []


def load_subject(name, overrides):
    return subjects.subject(load_recipe(name, overrides))


def test_another_size_than_the_models_own(originals, tmp_path):
    """The text of an SDXL is told the size; the student and its export have it."""
    base = str(originals / "sdxl")
    denoiser, info = find_model(f"diffusers:{base}", "teacher")
    info = family_in(base).resized(denoiser, info, (64, 128))
    assert info.shape == (4, 8, 16)
    cond, z = components(info).encode(["a cat"]), rng.noise(0, range(1), info.shape)
    assert cond.extra["size"].tolist() == [[64, 128, 0, 0, 64, 128]]
    with torch.no_grad():
        x = solver("pndm", info.scheduler)(guided(denoiser, 3.0), denoiser.schedule, z, cond, 3)
    how = {"height": 64, "width": 128, "latents": z}
    y = stock(base)("a cat", num_inference_steps=3, guidance_scale=3.0, output_type="latent", **how).images
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    image = stock(tmp_path / "out")("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="pt", **how).images
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    ours = (pipe.sample(z, pipe.condition(1, prompts="a cat")) / 2 + 0.5).clamp(0, 1)
    assert ours.shape == (1, 3, 64, 128)
    assert (ours - image).abs().max() < 2e-5
    with pytest.raises(UserError, match=r"image_size \[60, 128\]: expected multiples of 8 pixels"):
        family_in(base).resized(denoiser, info, (60, 128))


def test_a_recipes_image_size_and_lora(originals, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    save_file(kohya(stock(originals / "sd"), parts=("unet",))[0], tmp_path / "lcm-lora.safetensors")
    overrides = [
        f"teacher=diffusers:{originals / 'sd'}",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        f"teacher_lora.path={tmp_path / 'lcm-lora.safetensors'}",
        "teacher_lora.scale=0.5",
        "image_size=[32, 64]",
    ]
    with pytest.raises(UserError, match=r"was distilled itself: it is called .*lcm-lora"):
        load_subject("emoji", overrides)
    info = load_subject("emoji", [*overrides, "distilled_teacher=true"]).info
    assert (info.lora.scale, info.shape) == (0.5, (4, 4, 8))
    with pytest.raises(UserError, match=r"image_size \[8, 8\]: this teacher makes images of one size"):
        load_subject("mnist", ["image_size=[8, 8]"])


def test_edm_sigmas_are_followed(originals, tmp_path):
    """As Playground v2.5 has them: EDM's preconditioning around a Stable Diffusion XL."""
    folder = shutil.copytree(originals / "sdxl", tmp_path / "edm")
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder, "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    denoiser, info = find_model(f"diffusers:{folder}", "teacher")
    assert denoiser.schedule == EDM(0.002, 80.0, 7.0)
    z = rng.noise(0, range(2), info.shape)
    with torch.no_grad():
        cond = components(info).encode(["a cat", "a dog"])
        x = solver("euler")(guided(denoiser, 3.0), denoiser.schedule, z, cond, 5)
    exact = z * 80 / (80**2 + 1) ** 0.5  # diffusers starts at sqrt(sigma_max^2 + 1)
    y = stock(folder)(
        ["a cat", "a dog"], latents=exact, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
    ).images
    assert x.std() > 0.1
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    for entries, message in (
        ({"sigma_data": 1.0}, "EDMEulerScheduler has sigma_data 1.0; expected 0.5"),
        ({"prediction_type": "v_prediction"}, "has prediction_type 'v_prediction'; expected 'epsilon'"),
        ({"sigma_max": 0.001}, "sigma_min is 0.002 and sigma_max 0.001"),
    ):
        edit(folder, "scheduler/scheduler_config.json", **{"sigma_data": 0.5, "prediction_type": "epsilon", **entries})
        with pytest.raises(UserError, match=message):
            find_model(f"diffusers:{folder}", "teacher")


def test_any_schedulers_betas_are_followed(originals, tmp_path):
    """DPM-Solver++ by the model's own scheduler, and PNDM and DDIM by the same betas."""
    folder = shutil.copytree(originals / "v", tmp_path / "dpm")
    shutil.rmtree(folder / "scheduler")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DPMSolverMultistepScheduler(**betas, prediction_type="v_prediction", use_karras_sigmas=True)
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder, "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    (denoiser, info), (plain, _) = (find_model(f"diffusers:{name}", "teacher") for name in (folder, originals / "v"))
    assert denoiser.schedule == plain.schedule
    z = rng.noise(0, range(1), info.shape)
    with torch.no_grad():
        cond = components(info).encode(["a cat"])
        x = solver("dpm", info.scheduler)(guided(denoiser, 3.0), denoiser.schedule, z, cond, 6)
    y = stock(folder)("a cat", latents=z, num_inference_steps=6, guidance_scale=3.0, output_type="latent").images
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
