"""Flow-matching transformers against diffusers' own pipelines, on tiny random models in each family's format."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from safetensors import safe_open

from distmatch.diffusion.guidance import guided
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import VP, Flow
from distmatch.diffusion.solvers import evaluations, solver
from distmatch.methods.heads import chosen_blocks, feature_shapes
from distmatch.models.diffusers.export import export_diffusers, export_lora
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.flow_schedulers import flow_student_scheduler
from distmatch.models.diffusers.tiny_flow import write_tiny_sana, write_tiny_sd3
from distmatch.models.diffusers.tiny_patched import (
    write_tiny_flux,
    write_tiny_flux2,
    write_tiny_qwen_image,
    write_tiny_z_image,
)
from distmatch.models.folder import save_model
from distmatch.models.library import components, family_of, find_model, outline
from distmatch.pipeline import DistilledPipeline, TeacherPipeline
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.training.adapters import Adapted, Adapter

TEXTS = ["a cat", "two dogs on a sofa"]


@dataclass(frozen=True)
class Known:
    """What a family's own pipeline is called with, and how it holds latents."""

    write: Callable[..., Path]
    steps: int = 5
    guided: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    call: dict[str, Any] = field(default_factory=dict)
    pack: Callable[[Any, torch.Tensor], torch.Tensor] = lambda pipe, z: z.clone()
    unpack: Callable[[Any, torch.Tensor], torch.Tensor] = lambda pipe, z: z
    noise: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    encode: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]] = lambda vae: (
        lambda x: (vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    )


def qwen_latents(vae):
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return lambda x: ((vae.encode(x[:, :, None]).latent_dist.mean - mean) / std)[:, :, 0]


def normalised(vae, latents):
    mean, variance = (one.view(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
    return (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()


def true_guidance(scale):
    return {"true_cfg_scale": scale, "negative_prompt": [" ", " "]}


FAMILIES = {
    "sd3": Known(write_tiny_sd3),
    "sd3-dynamic": Known(lambda folder: write_tiny_sd3(folder, dynamic=True)),
    "sana": Known(
        write_tiny_sana,
        call={"height": 32, "width": 32, "use_resolution_binning": False},
        encode=lambda vae: lambda x: vae.encode(x).latent * vae.config.scaling_factor,
    ),
    "z-image": Known(
        write_tiny_z_image,
        guided=lambda scale: {"guidance_scale": scale - 1},
        plain={"guidance_scale": 0.0},
        call={"height": 64, "width": 64},
    ),
    "qwen-image": Known(
        write_tiny_qwen_image,
        guided=true_guidance,
        plain={"true_cfg_scale": 1.0},
        call={"height": 32, "width": 32},
        pack=lambda pipe, z: pipe._pack_latents(z, len(z), 4, 8, 8),
        unpack=lambda pipe, z: pipe._unpack_latents(z, 32, 32, 4)[:, :, 0],
        encode=qwen_latents,
    ),
    "flux": Known(
        write_tiny_flux,
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""], "guidance_scale": 3.5},
        plain={"guidance_scale": 3.5},
        call={"height": 64, "width": 64},
        pack=lambda pipe, z: pipe._pack_latents(z, len(z), 4, 8, 8),
        unpack=lambda pipe, z: pipe._unpack_latents(z, 64, 64, 8),
    ),
    "flux2": Known(
        write_tiny_flux2,
        call={"height": 64, "width": 64},
        unpack=lambda pipe, z: normalised(pipe.vae, pipe._patchify_latents(z)),
        noise=lambda pipe, z: torch.randn(len(z), 4 * 4, 16).mT.unflatten(2, (4, 4)),
        encode=lambda vae: (
            lambda x: normalised(vae, Flux2KleinPipeline._patchify_latents(vae.encode(x).latent_dist.mean))
        ),
    ),
}
STUDENTS = ("sd3", "sana", "z-image", "qwen-image", "flux", "flux2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    return {name: known.write(root / name) for name, known in FAMILIES.items()}


stock = cache(tiny.stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_with_its_own_solver_is_the_stock_pipeline(folders, name):
    """Text encoders, empty prompt, transformer, time, sign, guidance, shift and solver; then the decoder."""
    known, theirs = FAMILIES[name], stock(folders[name])
    pipe = TeacherPipeline.from_pretrained(f"diffusers:{folders[name]}", steps=known.steps, guidance=4.0)
    z = rng.noise(0, range(2), pipe.info.shape)
    calls = []
    pipe.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    cond = pipe.condition(2, prompts=TEXTS)
    own, schedule = solver("flow", pipe.info.scheduler), pipe.denoiser.schedule
    with torch.no_grad():
        x = own(guided(pipe.denoiser, 4.0), schedule, z, cond, known.steps)
        plain = own(pipe.denoiser, schedule, z, cond, known.steps)
    assert len(calls) == evaluations("flow", known.steps, 4.0) + known.steps
    call = {"num_inference_steps": known.steps, **known.guided(4.0), **known.call}
    y = known.unpack(
        theirs, theirs(prompt=list(TEXTS), latents=known.pack(theirs, z), output_type="latent", **call).images
    )
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    assert (x - plain).abs().max() > 0.05 * y.abs().max()  # guidance does something here
    assert (x[0] - x[1]).abs().max() > 0.05
    images = theirs(prompt=list(TEXTS), latents=known.pack(theirs, z), output_type="pt", **call).images
    assert (pipe.sample(z, cond) / 2 + 0.5).clamp(0, 1).sub(images).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_an_outline_is_the_teacher_without_its_weights(folders, name):
    source = f"diffusers:{folders[name]}"
    (thin, known), (teacher, info) = outline(source), find_model(source, "teacher")
    assert known == info
    assert all(p.is_meta for p in thin.parameters())
    assert shapes(thin) == shapes(teacher)
    assert thin.schedule == teacher.schedule
    family, parts = family_of(info), components(info)
    networks = [p for part, p in parts.encode.pipeline.components.items() if part.startswith("text_encoder")]
    held = sum(p.numel() for network in (*networks, parts.decode) for p in network.parameters())
    assert family.component_weights(info.source) == held
    real, example = parts.encode(TEXTS), family.example_cond(teacher.net, info, 2)
    assert example.text.shape == real.text.shape
    assert {k: v.shape for k, v in example.extra.items()} == {k: v.shape for k, v in real.extra.items()}


def test_a_single_frame_is_decoded_as_among_several_which_keep_what_the_next_one_needs(folders):
    decode = components(find_model(f"diffusers:{folders['qwen-image']}", "teacher")[1]).decode
    z = torch.randn(2, decode.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(decode.decode(z), decode.vae.decode(z.unsqueeze(2)).sample.squeeze(2))


def shapes(network):
    return {name: value.shape for name, value in network.state_dict().items()}


def student(folder, out, nfe, **entries):
    """A student unlike its teacher: the teacher's network with other weights in its last layer."""
    denoiser, info = find_model(f"diffusers:{folder}", "teacher")
    with torch.no_grad():
        last = [layer for layer in denoiser.net.transformer.modules() if isinstance(layer, torch.nn.Linear)][-1]
        last.weight.mul_(-0.7)
    save_model(out, denoiser, replace(info, times=Steps.spaced(denoiser.schedule, nfe).times, **entries))
    return DistilledPipeline.from_pretrained(out)


@pytest.mark.parametrize(("name", "nfe"), [("sd3", 1), ("sd3", 2), *((name, 4) for name in STUDENTS)])
def test_the_stock_pipeline_takes_the_students_steps(folders, tmp_path, capsys, name, nfe):
    known = FAMILIES[name]
    pipe = student(folders[name], tmp_path / "student", nfe)
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    theirs, z = stock(tmp_path / "out"), rng.noise(0, range(2), pipe.info.shape)
    torch.manual_seed(7)
    draw = known.noise or (lambda pipe, z: known.unpack(pipe, torch.randn(known.pack(pipe, z).shape)))
    noise = [draw(theirs, z) for _ in range(nfe - 1)]
    x = pipe.sample(z, pipe.condition(2, prompts=TEXTS), lambda step: noise[step - 1])
    torch.manual_seed(7)
    told = capsys.readouterr().out.replace("\n", "").rpartition(")(")[2].rpartition(")")[0]
    call = eval(f"dict({told})", {"prompt": list(TEXTS)})
    y = theirs(latents=known.pack(theirs, z), output_type="pt", **call).images
    assert call["num_inference_steps"] == nfe
    assert theirs.scheduler.sigmas.tolist()[:-1] == pytest.approx(pipe.info.times, abs=1e-5)
    assert ((x / 2 + 0.5).clamp(0, 1) - y).abs().max() < 1e-4
    assert y.std() > 0.05


@pytest.mark.parametrize("name", STUDENTS)
def test_adapters_are_a_lora_of_the_teacher(folders, tmp_path, name):
    known = FAMILIES[name]
    denoiser, info = find_model(f"diffusers:{folders[name]}", "teacher")
    adapter = Adapter(denoiser.net, 2, 3.0, denoiser.net.adapted)
    for parameter in (p for n, p in adapter.named_parameters() if n.endswith("up.weight")):
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(tmp_path / "student", Adapted(denoiser, adapter), replace(info, times=(1.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    export_lora(str(tmp_path / "student"), tmp_path / "lora")
    theirs, z = stock.__wrapped__(folders[name]), rng.noise(0, range(2), pipe.info.shape)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    call = {"num_inference_steps": 1, "output_type": "pt", **known.plain, **known.call}
    plain = theirs(prompt=list(TEXTS), latents=known.pack(theirs, z), **call).images
    theirs.load_lora_weights(tmp_path / "lora")
    x = (pipe.sample(z, pipe.condition(2, prompts=TEXTS)) / 2 + 0.5).clamp(0, 1)
    y = theirs(prompt=list(TEXTS), latents=known.pack(theirs, z), **call).images
    assert (x - y).abs().max() < 1e-4
    assert (x - plain).abs().max() > 0.05
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:  # as ComfyUI knows them
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", STUDENTS)
def test_a_gan_judges_by_the_images_tokens(folders, name):
    """Blocks of texts and images return both."""
    denoiser, info = find_model(f"diffusers:{folders[name]}", "teacher")
    cond = family_of(info).example_cond(denoiser.net, info, 1)
    found = feature_shapes(denoiser, (torch.zeros(1, *info.shape), torch.ones(1), cond))
    tokens = family_in(info.source).tokens(denoiser.net.transformer.config, info.shape, "")
    (chosen,) = chosen_blocks(found, None, "the teacher")
    if name == "z-image":  # its blocks hold image and text, each filled up to a multiple of 32
        tokens = 32 + 512
    assert found[chosen][0] == tokens


def test_long_prompts_are_counted_by_the_encoder_that_reads_most(folders):
    encoder = family_in(str(folders["sd3"])).text_encoder(str(folders["sd3"]))
    assert encoder.cut(["a " * 100, "a " * 300]) == 1  # CLIP's 77 tokens do not count: T5 reads 256


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("scheduler/scheduler_config.json", {"stochastic_sampling": True}, "stochastic_sampling True is not followed"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "its scheduler is a DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"shift": -3.0}, r"Flow: .*expected"),
        ("scheduler/scheduler_config.json", {"shift": "much"}, "scheduler_config.json: shift"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "its autoencoder is a AutoencoderTiny"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("transformer/config.json", {"in_channels": 8}, "takes 8 channels and makes 4"),
        ("transformer/config.json", {"sample_size": None}, "in_channels and sample_size"),
        ("transformer/config.json", {"joint_attention_dim": "wide"}, "config.json: joint_attention_dim"),
        ("transformer/config.json", {"patch_size": 0}, "config.json: patch_size"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
    ],
)
def test_settings_that_are_not_followed_are_refused(folders, tmp_path, file, entries, message):
    folder = shutil.copytree(folders["sd3"], tmp_path / "changed")
    changed = folder / file
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **entries}))
    with pytest.raises(UserError, match=message):
        outline(f"diffusers:{folder}")


def test_times_that_no_scheduler_takes_are_refused():
    for sigmas in (False, True):
        for times, message in (((0.9,), "start at 1"), ((1.0, 0.9, 0.2, 0.1), "equal steps before a shift")):
            with pytest.raises(UserError, match=message):
                flow_student_scheduler(times, sigmas)
        for schedule, shift, nfe in ((Flow(shift=3.0), 1.0, 8), (Flow(shift=1.2), 2.5, 3)):
            times = Steps.spaced(schedule, nfe, shift).times
            scheduler = flow_student_scheduler(times, sigmas)
            scheduler.set_timesteps(nfe, sigmas=[1 - i / nfe for i in range(nfe)] if sigmas else None)
            assert scheduler.sigmas.tolist() == pytest.approx([*times, 0.0], abs=1e-5)


def test_the_flow_solver_is_for_flow_models():
    with pytest.raises(UserError, match="this one has none"):
        solver("flow", {})
    with pytest.raises(UserError, match="flow is for flow models; this model's schedule is VP"):
        solver("flow", {"_class_name": "FlowMatchEulerDiscreteScheduler"})(None, VP(), torch.zeros(1, 1), None, 2)


@pytest.mark.parametrize("name", STUDENTS)
def test_images_become_the_latents_of_the_stock_autoencoder(folders, name):
    """And back: shift and scale are undone."""
    family, source = family_in(str(folders[name])), str(folders[name])
    known, theirs = family.settings(source), FAMILIES[name].encode(stock(folders[name]).vae)
    images, zero = torch.rand(2, 3, *known.size) * 2 - 1, torch.zeros(2, *known.shape)
    encode = family.image_encoder(source)
    with torch.no_grad():
        latents, y = encode(images, zero), theirs(images)
        assert latents.shape == zero.shape
        assert (latents - y).abs().max() < 1e-5 * y.abs().max()
    assert encode.stride * known.shape[1] == known.size[0]


@pytest.mark.parametrize("name", ["sd3-dynamic", "flux2"])
def test_another_size_has_its_own_shift(folders, name):
    """The latents of the stock pipeline at that size."""
    known, theirs = FAMILIES[name], stock(folders[name])
    denoiser, info = find_model(f"diffusers:{folders[name]}", "teacher")
    before, family = denoiser.schedule.shift, family_of(info)
    info = family.resized(denoiser, info, (96, 32))
    assert denoiser.schedule.shift != before
    z, cond = rng.noise(0, range(2), info.shape), family.components(info).encode(TEXTS)
    with torch.no_grad():
        x = solver("flow", info.scheduler)(denoiser, denoiser.schedule, z, cond, 3)
    call = {**known.call, "height": 96, "width": 32, "num_inference_steps": 3, **known.plain}
    y = known.unpack(theirs, theirs(prompt=list(TEXTS), latents=z.clone(), output_type="latent", **call).images)
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    with pytest.raises(UserError, match=r"image_size \[40, 32\]: expected multiples of 16 pixels"):
        family.resized(denoiser, info, (40, 32))


def test_settings_put_together_have_the_weights_that_their_makers_name():
    """In millions: 2.5 billion less 226 of position embeddings; 1.6, 6, 20, 12 and 4 billion."""
    named = {
        "stabilityai/stable-diffusion-3.5-medium": 2243,
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1604,
        "Tongyi-MAI/Z-Image": 6154,
        "Qwen/Qwen-Image": 20430,
        "black-forest-labs/FLUX.1-dev": 11901,
        "black-forest-labs/FLUX.2-klein-base-4B": 3875,
    }
    made = {source: outline(f"diffusers:{source}")[0] for source in named}
    assert {name: sum(p.numel() for p in one.parameters()) // 10**6 for name, one in made.items()} == named


@pytest.mark.parametrize(
    ("name", "file", "entries", "message"),
    [
        (
            "flux",
            "transformer/config.json",
            {"guidance_embeds": False},
            r"takes no guidance scale .* as FLUX.1 schnell",
        ),
        ("flux2", "model_index.json", {"is_distilled": True}, "says is_distilled"),
        (
            "z-image",
            "transformer/config.json",
            {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"},
            "is called .*Z-Image-Turbo",
        ),
    ],
)
def test_students_are_told_from_teachers(folders, tmp_path, name, file, entries, message):
    assert family_in(str(folders[name])).distilled(str(folders[name])) is None
    folder = shutil.copytree(folders[name], tmp_path / "changed")
    changed = folder / file
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **entries}))
    assert re.search(message, family_in(str(folder)).distilled(str(folder)))
