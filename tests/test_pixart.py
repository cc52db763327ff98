"""PixArt-alpha and PixArt-Sigma against diffusers' own pipelines."""

from dataclasses import replace

import pytest
import torch
from tiny import stock
from tiny import stored as teacher

from distmatch import DistilledPipeline
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.solvers import evaluations, solver
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.diffusers.pixart import write_tiny_pixart
from distmatch.models.folder import save_model
from distmatch.models.library import components, family_of, outline
from distmatch.system import rng
from distmatch.system.errors import UserError

TEXTS = ["A Cat ", "two dogs on the sofa"]
PLAIN = {"clean_caption": False, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pixart")
    write_tiny_pixart(root / "alpha")
    write_tiny_pixart(root / "large", side=128)
    write_tiny_pixart(root / "sigma", sigma=True)
    return root


@pytest.mark.parametrize(("kind", "size"), [("alpha", (64, 64)), ("large", (64, 96)), ("sigma", (64, 64))])
def test_the_teacher_is_the_stock_pipelines(folders, kind, size):
    """Text, mask, empty prompt, guidance, DPM-Solver++, variance; the larger ones are told height, width and ratio."""
    denoiser, info = teacher(folders / kind)
    family = family_of(info)
    assert (family.sampler, denoiser.prediction.name) == ("dpm", "eps")
    if kind == "large":
        assert info.shape == (4, 128, 128)
        info = family.resized(denoiser, info, size)
    z, calls = rng.noise(0, range(2), info.shape), []
    denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        cond = components(info).encode(TEXTS)
        x = solver("dpm", info.scheduler)(guided(denoiser, 4.5), denoiser.schedule, z, cond, 6)
    y = stock(folders / kind)(
        TEXTS,
        latents=z,
        num_inference_steps=6,
        guidance_scale=4.5,
        height=size[0],
        width=size[1],
        output_type="latent",
        **PLAIN,
    ).images
    assert len(calls) == 2 * evaluations("dpm", 6)
    assert x.std() > 0.3
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    lengths = cond.extra["mask"].sum(1).tolist()
    assert lengths[0] < lengths[1] < cond.text.shape[1]
    with torch.no_grad():
        unmasked = replace(cond, extra={"mask": torch.ones_like(cond.extra["mask"])})
        t = torch.full((2,), 500.0)
        assert not torch.allclose(denoiser(z, t, cond), denoiser(z, t, unmasked), atol=1e-3)
    assert denoiser.net.transformer.use_additional_conditions == (kind == "large")


def test_an_outline_is_the_teacher_without_its_weights(folders):
    denoiser, info = teacher(folders / "alpha")
    thin, known = outline(f"diffusers:{folders / 'alpha'}")
    assert known == info
    assert {k: v.shape for k, v in thin.state_dict().items()} == {k: v.shape for k, v in denoiser.state_dict().items()}


@pytest.mark.parametrize(("kind", "times"), [("large", (999.0,)), ("alpha", (999.0, 749.0, 499.0, 249.0))])
def test_the_stock_pipeline_makes_the_students_image(folders, tmp_path, kind, times):
    denoiser, info = teacher(folders / kind)
    info = family_of(info).resized(denoiser, info, (64, 64))
    denoiser.net.transformer.proj_out.bias.data.add_(0.3)  # a student unlike its teacher
    save_model(tmp_path / "student", denoiser, replace(info, times=times))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    z, generator = rng.noise(0, range(2), info.shape), torch.Generator().manual_seed(7)
    noise = [torch.randn(z.shape, generator=generator) for _ in times[1:]]
    x = pipe.sample(z, pipe.condition(2, prompts=TEXTS), lambda step: noise[step - 1])
    how = {"num_inference_steps": len(times), "guidance_scale": 1.0, "output_type": "pt", "height": 64, "width": 64}
    y = stock(tmp_path / "out")(TEXTS, latents=z, generator=torch.Generator().manual_seed(7), **how, **PLAIN).images
    assert y.std() > 0.05
    assert ((x / 2 + 0.5).clamp(0, 1) - y).abs().max() < 1e-4


def test_sizes_are_whole_patches(folders):
    denoiser, info = teacher(folders / "alpha")
    with pytest.raises(UserError, match=r"image_size \[72, 64\]: expected multiples of 16 pixels"):
        family_of(info).resized(denoiser, info, (72, 64))
