"""Exported students in diffusers' own pipelines, with nothing of ours in the way."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from distmatch import DistilledPipeline
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.schedule import VP
from distmatch.models.diffusers.export import export_diffusers, export_lora
from distmatch.models.diffusers.lora import ADAPTED
from distmatch.models.diffusers.schedulers import student_scheduler
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import save_model
from distmatch.models.guidance import with_guidance
from distmatch.models.library import find_model
from distmatch.system import rng
from distmatch.training.adapters import Adapted, Adapter

TEXTS = ["a cat", "two dogs on a sofa"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    write_tiny_sd(root / "eps")
    write_tiny_sd(root / "v", prediction="v_prediction")
    write_tiny_sd(root / "xl", kind="sdxl")
    return root


def student(folders, kind, out, *, t=999.0, times=(), change=lambda net: net, **entries):
    """A student unlike its teacher: the teacher's network with other weights in its last layer."""
    denoiser, info = find_model(f"diffusers:{folders / kind}", "teacher")
    net = change(denoiser.net)
    with torch.no_grad():
        net.unet.conv_out.weight.mul_(-0.7)
    made = Denoiser(net, denoiser.schedule, denoiser.prediction)
    save_model(out, made, replace(info, times=times or (t,), **entries))
    return DistilledPipeline.from_pretrained(out)


def stock(folder, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, z, scale):
    return pipe(TEXTS, latents=z, num_inference_steps=1, guidance_scale=scale, output_type="pt").images


def ours(pipe, z, scale=None):
    return (pipe.sample(z, pipe.condition(2, prompts=TEXTS, guidance_scale=scale)) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("kind", "t"), [("eps", 999.0), ("eps", 399.0), ("v", 999.0), ("xl", 399.0), ("xl", 999.0)])
def test_the_stock_pipeline_makes_the_students_image(folders, tmp_path, kind, t):
    pipe = student(folders, kind, tmp_path / "student", t=t)
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    z = rng.noise(0, range(2), pipe.info.shape)
    x, y = ours(pipe, z), images(stock(tmp_path / "out"), z, 1.0)
    assert x.std() > 0.05
    assert (x - y).abs().max() < 2e-5
    teacher = stock(folders / kind)
    teacher.scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert (images(teacher, z, 1.0) - y).abs().max() > 0.05


@pytest.mark.parametrize(
    ("kind", "times"), [("eps", (999.0, 749.0, 499.0, 249.0)), ("v", (999.0, 499.0)), ("xl", (599.0, 399.0, 199.0))]
)
def test_the_stock_pipeline_takes_the_students_steps(folders, tmp_path, kind, times):
    pipe = student(folders, kind, tmp_path / "student", times=times)
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    theirs = stock(tmp_path / "out")
    theirs.scheduler.set_timesteps(len(times))
    assert theirs.scheduler.timesteps.tolist() == list(times)
    z = rng.noise(0, range(2), pipe.info.shape)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(z.shape, generator=generator) for _ in times[1:]]
    x = pipe.sample(z, pipe.condition(2, prompts=TEXTS), lambda step: noise[step - 1])
    y = theirs(
        TEXTS,
        latents=z,
        num_inference_steps=len(times),
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
    ).images
    assert ((x / 2 + 0.5).clamp(0, 1) - y).abs().max() < 1e-4
    assert y.std() > 0.05


def test_a_chosen_guidance_is_the_stock_pipelines_guidance_scale(folders, tmp_path):
    def change(net):
        net = with_guidance(net)
        torch.nn.init.normal_(net.unet.time_embedding.cond_proj.weight, std=0.5)
        return net

    pipe = student(folders, "eps", tmp_path / "student", change=change, guidance=(1.0, 8.0))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    z, theirs = rng.noise(0, range(2), pipe.info.shape), stock(tmp_path / "out")
    for scale in (1.0, 2.5, 8.0):
        assert (ours(pipe, z, scale) - images(theirs, z, scale)).abs().max() < 2e-5
    assert (ours(pipe, z, 1.0) - ours(pipe, z, 8.0)).abs().max() > 0.05
    with pytest.raises(ValueError, match="guidance_scale 9 is out of range; this student learnt 1 to 8"):
        pipe.condition(1, prompts="a", guidance_scale=9)


def test_adapters_are_a_lora_of_the_teacher_and_merge_into_a_pipeline(folders, tmp_path):
    """In diffusers' format and in kohya's, whatever alpha is."""
    denoiser, info = find_model(f"diffusers:{folders / 'eps'}", "teacher")
    adapter = Adapter(denoiser.net, 2, 3.0, ADAPTED)
    for name, parameter in adapter.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    save_model(tmp_path / "student", Adapted(denoiser, adapter), replace(info, times=(999.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    z = rng.noise(0, range(2), pipe.info.shape)

    export_lora(str(tmp_path / "student"), tmp_path / "lora")
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        theirs = stock(folders / "eps")
        theirs.scheduler = DDIMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
        plain = images(theirs, z, 1.0)
        theirs.load_lora_weights(tmp_path / "lora", weight_name=file)
        assert (ours(pipe, z) - images(theirs, z, 1.0)).abs().max() < 2e-5, file
        assert (ours(pipe, z) - plain).abs().max() > 0.05
    lora, whole = tmp_path / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "student" / "model.safetensors"
    assert lora.stat().st_size < whole.stat().st_size / 5

    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    assert (ours(pipe, z) - images(stock(tmp_path / "out"), z, 1.0)).abs().max() < 2e-5


@pytest.mark.parametrize("schedule", [VP(0.00085, 0.012, 1000, "scaled_linear"), VP(), VP(spacing="squaredcos_cap_v2")])
@pytest.mark.parametrize("t", [999, 399, 1])
def test_the_scheduler_ends_at_the_students_time(schedule, t):
    scheduler = student_scheduler(schedule, (t,), "epsilon")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [t]
    alpha = schedule.alpha(torch.arange(t + 1.0, dtype=torch.float64))
    assert torch.allclose(scheduler.alphas_cumprod.double(), alpha**2, rtol=1e-5)


def test_what_cannot_be_exported_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="mnist is not a student of a model in diffusers' format"):
        export_diffusers("mnist", tmp_path / "out")
    student(folders, "eps", tmp_path / "student", t=499.5)
    with pytest.raises(
        ValueError, match=r"student.times is 499.5; diffusers' schedulers know whole steps from 1 to 999"
    ):
        export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    student(folders, "eps", tmp_path / "uneven", times=(999.0, 800.0, 100.0))
    with pytest.raises(
        ValueError, match="the student's times are 999, 800, 100; diffusers' schedulers only take equal"
    ):
        export_diffusers(str(tmp_path / "uneven"), tmp_path / "out")
    student(folders, "eps", tmp_path / "plain")
    with pytest.raises(ValueError, match="has no adapters"):
        export_lora(str(tmp_path / "plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
