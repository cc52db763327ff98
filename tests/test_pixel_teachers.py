"""Diffusion models without text in diffusers' format (DDPM, DDIM, DiT) against diffusers' own pipelines."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file
from tiny import stock
from tiny import stored as teacher

from distmatch import DistilledPipeline
from distmatch.commands.distillation import distil
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.schedule import VP
from distmatch.diffusion.solvers import solver
from distmatch.evaluation.baselines import load_teacher
from distmatch.models.diffusers.ddpm import write_tiny_ddpm
from distmatch.models.diffusers.dit import write_tiny_dit
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.folder import save_model
from distmatch.models.library import components, family_of, outline
from distmatch.pipeline import TeacherPipeline
from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError

KINDS = {
    "eps": {},
    "v": {"prediction": "v_prediction"},
    "sample": {"prediction": "sample"},
    "classes": {"classes": 3},
    "learned": {"learned": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pixels")
    for kind, how in KINDS.items():
        write_tiny_ddpm(root / kind, **how)
    write_tiny_dit(root / "dit")
    return root


def noise(seed, n, shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def edit(folder, file, **entries):
    place = folder / file
    place.write_text(json.dumps(json.loads(place.read_text()) | entries))
    return folder


def pixels(x):
    return (x / 2 + 0.5).clamp(0, 1)


SCHEDULERS = {
    "clipped": {},
    "not clipped": {"clip_sample": False, "timestep_spacing": "trailing"},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("eps", "clipped"), ("eps", "not clipped"), ("eps", "thresholding"), ("v", "zero snr"), ("sample", "cosine")],
)
def test_ddim_is_the_stock_pipelines(folders, tmp_path, kind, settings):
    folder = shutil.copytree(folders / kind, tmp_path / "model")
    edit(folder, "scheduler/scheduler_config.json", **SCHEDULERS[settings])
    denoiser, info = teacher(folder)
    z = noise(5, 2, info.shape)
    with torch.no_grad():
        x = solver("ddim", info.scheduler)(denoiser, denoiser.schedule, z, None, 6)
    y = stock(folder, DDIMPipeline)(2, torch.Generator().manual_seed(5), num_inference_steps=6, output_type="pt")
    assert x.std() > 0.3
    assert (
        pixels(x) - y.images
    ).abs().max() < 2e-4  # diffusers' alpha has rounding errors of 1e-5, and eps is divided by it
    pipe = TeacherPipeline.from_pretrained(f"diffusers:{folder}", steps=6)
    assert torch.equal(pipe.sample(z), x)


def test_classes_are_the_networks_labels_and_cannot_be_guided(folders):
    denoiser, info = teacher(folders / "classes")
    assert (info.classes, info.condition, info.latent) == (("0", "1", "2"), "classes", False)
    unet, scheduler = stock(folders / "classes").unet, DDIMScheduler.from_pretrained(folders / "classes" / "scheduler")
    x = z = noise(1, 3, info.shape)
    scheduler.set_timesteps(5)
    pipe = TeacherPipeline.from_pretrained(f"diffusers:{folders / 'classes'}", steps=5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=torch.tensor([2, 0, 1])).sample, t, x).prev_sample
    assert (pipe.sample(z, pipe.condition(3, labels=[2, 0, 1])) - x).abs().max() < 1e-4
    with pytest.raises(UserError, match="has no input for images without one; use guidance 1"):
        guided(denoiser, 2.0)(z, torch.full((3,), 9.0), pipe.condition(3, labels=[2, 0, 1]))


def test_a_learned_variance_is_left_out(folders):
    denoiser, info = teacher(folders / "learned")
    x, t = noise(2, 1, info.shape), torch.tensor([300.0])
    with torch.no_grad():
        mean, _ = stock(folders / "learned").unet(x, t).sample.chunk(2, dim=1)
        assert torch.allclose(denoiser.net(x, t, None), mean, atol=1e-6)
    assert mean.std() > 0.1
    thin, known = outline(f"diffusers:{folders / 'learned'}")
    assert known == info
    assert {k: v.shape for k, v in thin.state_dict().items()} == {k: v.shape for k, v in denoiser.state_dict().items()}


def test_a_folder_of_the_oldest_kind(folders, tmp_path):
    """google/ddpm-cifar10-32: the files of network and scheduler beside `model_index.json`."""
    for part in ("unet", "scheduler"):
        shutil.copytree(folders / "eps" / part, tmp_path, dirs_exist_ok=True)
    shutil.copy(folders / "eps" / "model_index.json", tmp_path)
    (flat, info), (plain, _) = teacher(tmp_path), teacher(folders / "eps")
    assert info.scheduler["clip_sample"]
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in flat.state_dict().items())
    assert family_of(info).distilled(info.source) is None


def test_dit_is_the_stock_pipelines(folders):
    denoiser, info = teacher(folders / "dit")
    assert (info.shape, len(info.classes), info.condition, info.latent) == ((4, 8, 8), 1000, "classes", True)
    for guidance in (1.0, 4.0):
        pipe = TeacherPipeline.from_pretrained(f"diffusers:{folders / 'dit'}", steps=6, guidance=guidance)
        x = pipe.sample(noise(3, 2, info.shape), pipe.condition(2, labels=[7, 999]))
        generator = torch.Generator().manual_seed(3)
        y = stock(folders / "dit")(
            [7, 999], guidance_scale=guidance, generator=generator, num_inference_steps=6, output_type="pt"
        )
        assert y.images.std() > 0.05
        assert (pixels(x) - y.images).abs().max() < 1e-4
    thin, known = outline(f"diffusers:{folders / 'dit'}")
    assert known == info
    assert {k: v.shape for k, v in thin.state_dict().items()} == {k: v.shape for k, v in denoiser.state_dict().items()}
    held = sum(p.numel() for p in components(info).decode.parameters())
    assert family_of(info).component_weights(info.source) == held


def test_the_classes_have_the_folders_names(folders, tmp_path):
    folder = shutil.copytree(folders / "dit", tmp_path / "dit")
    edit(folder, "model_index.json", id2label={"0": "tench, Tinca tinca", "7": "cock"})
    denoiser, info = teacher(folder)
    assert (info.classes[0], info.classes[7], info.classes[8]) == ("tench, Tinca tinca", "cock", "8")
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    assert stock(tmp_path / "out").get_label_ids(["cock", "Tinca tinca"]) == [7, 0]


@pytest.mark.parametrize(
    ("kind", "times"),
    [("eps", (999.0, 499.0)), ("v", (999.0,)), ("learned", (999.0,)), ("dit", (399.0,)), ("dit", (999.0, 499.0))],
)
def test_the_stock_pipeline_makes_the_students_image(folders, tmp_path, kind, times):
    denoiser, info = teacher(folders / kind)
    if kind == "learned":
        info = family_of(info).resized(denoiser, info, (16, 32))
    for parameter in list(denoiser.net.parameters())[-1:]:  # a student unlike its teacher
        parameter.data.add_(0.3)
    save_model(tmp_path / "student", denoiser, replace(info, times=times))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    theirs = stock(tmp_path / "out")
    how = {"num_inference_steps": len(times), "output_type": "pt", "generator": torch.Generator().manual_seed(4)}
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(2, *info.shape, generator=generator)
    if kind == "dit":
        generator = torch.Generator().manual_seed(11)  # the pipeline gives its scheduler no generator
        torch.manual_seed(11)
        y = theirs([3, 5], guidance_scale=1.0, **how).images
    else:
        y = theirs(2, **how).images
    later = torch.randn(z.shape, generator=generator)
    x = pipe.sample(z, pipe.condition(2, labels=[3, 5] if info.classes else None), lambda step: later)
    assert y.std() > 0.05
    assert (pixels(x) - y).abs().max() < 1e-4


def test_what_cannot_be_exported_is_named(folders, tmp_path):
    denoiser, info = teacher(folders / "classes")
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    with pytest.raises(UserError, match="diffusers has no pipeline for a PixelUNet with classes"):
        export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    denoiser, info = teacher(folders / "dit")
    save_model(tmp_path / "dit", denoiser, replace(info, times=(999.0,), classes=info.classes[:10]))
    with pytest.raises(UserError, match=r"makes latents \(4, 8, 8\) of 1000 classes, the student .* of 10"):
        export_diffusers(str(tmp_path / "dit"), tmp_path / "out")
    with pytest.raises(UserError, match=r"classes is a DDPMPipeline, the student a DiT; expected .*, .*dit$"):
        export_diffusers(str(tmp_path / "dit"), tmp_path / "out", source=str(folders / "classes"))
    assert not (tmp_path / "out").exists()


def test_a_dit_makes_images_of_one_size(folders):
    denoiser, info = teacher(folders / "dit")
    with pytest.raises(UserError, match=r"image_size \[64, 64\]: diffusers' DiT makes images of one size"):
        family_of(info).resized(denoiser, info, (64, 64))


def test_a_models_levels_divide_a_size(folders):
    """There are two: an odd side would be rounded, and come back even."""
    denoiser, info = teacher(folders / "eps")
    found = family_of(info).resized(denoiser, info, (18, 24))
    assert denoiser(noise(0, 1, found.shape), torch.ones(1), None).shape == (1, 3, 18, 24)
    with pytest.raises(UserError, match=r"image_size \[17, 24\]: expected multiples of 2 pixels"):
        family_of(info).resized(denoiser, info, (17, 24))


RECIPE = {"steps": 2, "match.batch": 2, "regress.batch": 2, "pairs.count": 3, "pairs.sampler": "ddim", "pairs.steps": 3}


@pytest.mark.parametrize(("kind", "more"), [("eps", {}), ("dit", {"match.guidance": 2.0, "pairs.guidance": 2.0})])
def test_a_recipe_distils_one(folders, tmp_path, kind, more):
    """Pairs, both losses, the student's folder: its image is that of the trained network at its one time."""
    entries = {"teacher": f"diffusers:{folders / kind}", **RECIPE, **more, "device": "cpu", "workers": 1}
    recipe = load_recipe("toy2d", [f"{k}={v}" for k, v in entries.items()] + ["student.network=null"])
    distil(recipe, tmp_path / "run", tmp_path)
    pipe, (before, info) = DistilledPipeline.from_pretrained(tmp_path / "run"), teacher(folders / kind)
    z, cond = noise(6, 2, info.shape), pipe.condition(2)
    images = next((tmp_path / "pairs").glob("*/shard-00000.safetensors"))
    assert next(iter(load_file(images).values())).shape == (3, *info.shape)
    with torch.no_grad():
        latents = pipe.denoiser(z, torch.full((2,), 999.0), cond)
        assert torch.equal(pipe.sample(z, cond), pipe.parts.decode(latents))
        assert not torch.allclose(latents, before(z, torch.full((2,), 999.0), cond), atol=1e-6)


REFUSED = {
    "fourier": ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'; expected 'pos"),
    "identity": ("unet/config.json", {"class_embed_type": "identity"}, "class_embed_type 'identity'; expected None"),
    "no size": ("unet/config.json", {"sample_size": None}, "has no sample_size; add the side of its images"),
    "inputs": ("unet/config.json", {"in_channels": 4}, "makes 3 channels of 4; expected as many, or twice as many"),
    "zero snr": ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "noise ends at alpha = 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_before_weights_are_read(folders, tmp_path, case):
    file, entries, message = REFUSED[case]
    folder = shutil.copytree(folders / "eps", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=message):
        teacher(edit(folder, file, **entries))


def test_pndm_cannot_start_where_alpha_is_0():
    schedule = VP(betas=[0.1, 0.5, 1.0])
    assert schedule.alpha(torch.tensor([2.0])) == 0
    with pytest.raises(UserError, match="pndm divides by alpha, which is 0 at this model's step 2; use ddim"):
        solver("pndm", {"timestep_spacing": "trailing"})(lambda x, t, c: x, schedule, torch.ones(1, 1), None, 3)
    with pytest.raises(UserError, match="4 steps of ddim: this model has only 3"):
        solver("ddim")(lambda x, t, c: x, schedule, torch.ones(1, 1), None, 4)


def test_a_comparison_is_for_prompts(folders):
    with pytest.raises(UserError, match="compare runs the solvers of Stable Diffusion"):
        load_teacher(str(folders / "dit"), torch.device("cpu"), torch.float32)
