"""Students wholly in bf16: close to fp32, nothing converted in a call, nobody else's weights changed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distmatch import DistilledPipeline
from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.bf16 import allows_bf16
from distmatch.models.diffusers.ddpm import write_tiny_ddpm
from distmatch.models.diffusers.dit import write_tiny_dit
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.diffusers.tiny_flow import write_tiny_sana, write_tiny_sd3
from distmatch.models.diffusers.tiny_patched import write_tiny_flux2, write_tiny_qwen_image
from distmatch.models.family import Components
from distmatch.models.folder import save_model
from distmatch.models.guidance import with_guidance
from distmatch.models.library import components
from distmatch.models.unet import UNet
from distmatch.recipe.smoke import random_edm
from distmatch.system import rng

WRITE: dict[str, Any] = {
    "sd": write_tiny_sd,
    "sdxl": lambda folder: write_tiny_sd(folder, kind="sdxl"),
    "ddpm": lambda folder: write_tiny_ddpm(folder, classes=3),
    "dit": write_tiny_dit,
    "sd3": write_tiny_sd3,
    "sana": write_tiny_sana,
    "qwen": write_tiny_qwen_image,
    "flux2": write_tiny_flux2,
}

EDM = ("edm-cifar10-32x32-cond-vp", "edm-cifar10-32x32-uncond-ve", "edm-imagenet-64x64-cond-adm")

WHOLE = ("unet", "unet-guided", *EDM, "sd", "sd-guided", "sdxl", "ddpm", "dit")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random students by kind, with their parts; made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("bf16"), {}

    def of(kind):
        if kind not in made:
            made[kind] = student(kind, root)
        return made[kind]

    return of


def student(kind: str, root: Path):
    name = kind.removesuffix("-guided")
    torch.manual_seed(0)
    if name == "unet":
        denoiser, info = tiny.teacher(), tiny.INFO
    elif name in EDM:
        denoiser, info = random_edm(name)
    else:
        denoiser, info = tiny.stored(WRITE[name](root / kind))
    if name != kind:
        net = with_guidance(denoiser.net)
        for weights in net.parameters():  # the new input's are zero
            if not weights.any():
                torch.nn.init.normal_(weights, std=0.05)
        denoiser, info = (
            Denoiser(net, denoiser.schedule, denoiser.prediction).eval(),
            replace(info, guidance=(1.0, 5.0)),
        )
    times = (denoiser.schedule.t_max, 0.3 * denoiser.schedule.t_max)
    return denoiser, replace(info, times=times), components(info)


def asked(pipe):
    """Noise and condition of three images."""
    cond = pipe.condition(3, prompts="a red apple" if pipe.info.text else None)
    return rng.noise(1, range(3), pipe.info.shape), cond


class Conversions(TorchDispatchMode):
    """Lists the tensors of `weights` that are converted to another precision."""

    def __init__(self, weights):
        super().__init__()
        self.watched = {one.untyped_storage().data_ptr() for one in weights}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.watched:
            self.found.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def made_by(plain, low):
    """What both make of the same noise, and the weights that the second one converted on the way."""
    z, cond = asked(plain)
    later = plain.noise_of(0, range(3))
    x = plain.make(z, cond, later)
    with torch.no_grad(), Conversions(low.denoiser.parameters()) as conversions:
        ours = low.make(z, cond, later)
    return x, ours, conversions.found


@pytest.mark.parametrize("kind", WHOLE)
def test_networks_that_allow_it_are_wholly_in_bf16_and_their_x0_is_that_of_fp32(kind, models):
    denoiser, info, parts = models(kind)
    before = copy.deepcopy(denoiser.state_dict())
    plain, low = (DistilledPipeline(denoiser, info, parts, precision=p) for p in ("fp32", "bf16"))
    assert {weights.dtype for weights in low.denoiser.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in {buffer.dtype for buffer in low.denoiser.buffers()}  # frequencies, empty prompts
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert plain.denoiser is denoiser
    x, ours, found = made_by(plain, low)
    assert found == []
    assert ours.dtype == torch.float32
    # eps at t_max is multiplied by some ten: what bf16 rounds there shows in x0.
    assert 0 < (ours - x).norm() / x.norm() < 0.06


@pytest.mark.parametrize("kind", WHOLE)
def test_every_layer_with_weights_gets_and_gives_bf16(kind, models):
    denoiser, info, parts = models(kind)
    pipe = DistilledPipeline(denoiser, info, parts, precision="bf16")
    seen = []

    def look(layer, given, made):
        inputs = {one.dtype for one in tree_leaves(given) if isinstance(one, torch.Tensor) and one.is_floating_point()}
        seen.append((type(layer).__name__, inputs | {made.dtype}))

    for network in (pipe.denoiser.net, parts_of(pipe)):
        for layer in network.modules():
            if not list(layer.children()) and list(layer.parameters(recurse=False)):
                layer.register_forward_hook(look)
    pipe.sample(*asked(pipe))
    assert [one for one in seen if one[1] != {torch.bfloat16}] == []
    assert seen


def parts_of(pipe):
    return pipe.parts.decode if isinstance(pipe.parts.decode, torch.nn.Module) else torch.nn.Identity()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "dit", "sana", "qwen", "flux2"])
def test_decoders_are_copies_in_bf16_and_channels_last(kind, models):
    denoiser, info, parts = models(kind)
    before = copy.deepcopy(parts.decode.state_dict())
    low = DistilledPipeline(denoiser, info, parts, precision="bf16")
    assert all(torch.equal(value, before[name]) for name, value in parts.decode.state_dict().items())
    for weights in parts_of(low).parameters():
        assert weights.dtype == torch.bfloat16
        assert weights.ndim != 4 or weights.is_contiguous(memory_format=torch.channels_last)
    z = rng.noise(0, range(2), info.shape)
    with torch.no_grad(), Conversions(parts_of(low).parameters()) as conversions:
        ours = low.decoded(z)
    theirs = DistilledPipeline(denoiser, info, parts).decoded(z)
    assert conversions.found == []
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.04


@pytest.mark.parametrize("kind", ["sd3", "qwen"])
def test_networks_that_round_the_time_stay_under_autocast(kind, models):
    denoiser, info, parts = models(kind)
    assert not allows_bf16(denoiser.net)
    plain, low = (DistilledPipeline(denoiser, info, parts, precision=p) for p in ("fp32", "bf16"))
    assert low.denoiser is denoiser
    x, ours, found = made_by(plain, low)
    assert found  # by autocast
    assert 0 < (ours - x).norm() / x.norm() < 0.06


class Own(UNet):
    """A user's network, of which nothing is known."""

    bf16_throughout = False


def test_an_own_network_stays_under_autocast_with_its_matrices_in_bf16(tmp_path):
    denoiser = tiny.teacher()
    config: Any = denoiser.net.config
    net = Own(**config)
    net.load_state_dict(denoiser.net.state_dict())
    own = Denoiser(net, denoiser.schedule, denoiser.prediction)
    save_model(tmp_path, own, replace(tiny.INFO, times=(80.0,)))
    plain, low = (
        DistilledPipeline.from_pretrained(tmp_path, net=copy.deepcopy(net), precision=p) for p in ("fp32", "bf16")
    )
    kinds = {(p.ndim > 1, p.dtype) for p in low.denoiser.parameters()}
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    z, cond = asked(plain)
    ours, theirs = low.sample(z, cond), plain.sample(z, cond)
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02  # bf16 has eight bits


def test_a_loaded_network_is_rounded_in_place_and_not_copied(tmp_path):
    save_model(tmp_path, tiny.teacher(), replace(tiny.INFO, times=(80.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path, precision="bf16")
    again = DistilledPipeline(pipe.denoiser, pipe.info, precision="bf16")
    assert again.denoiser.net is pipe.denoiser.net


def test_a_decoder_that_is_no_module_stays_under_autocast():
    layer = torch.nn.Conv2d(1, 1, 1)
    parts = Components(decode=lambda x: layer(x))
    pipe = DistilledPipeline(tiny.teacher(), replace(tiny.INFO, times=(80.0,)), parts, precision="bf16")
    x = rng.noise(0, range(2), (1, 8, 8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x).float()
    assert torch.equal(pipe.decoded(x), expected)
