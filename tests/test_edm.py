"""The EDM networks: layout of the published checkpoints, values of an independent implementation, preconditionings."""

import json
import math
from hashlib import sha256

import pytest
import torch

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.edm.checkpoints import PUBLISHED
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.folder import Info, load_model, save_model

# Of each published checkpoint: the number of parameters, and a digest over names and shapes of the state dict.
LAYOUT = {
    "edm-cifar10-32x32-cond-vp": (55_735_299, "fc3287239f38771d"),
    "edm-cifar10-32x32-uncond-vp": (55_733_891, "d08b4c79602cab9a"),
    "edm-cifar10-32x32-cond-ve": (56_400_643, "bdbf764e0c8f9459"),
    "edm-cifar10-32x32-uncond-ve": (56_397_827, "dbb8138ddb47364b"),
    "edm-ffhq-64x64-uncond-vp": (61_805_571, "eebb5cc8b1e09678"),
    "edm-ffhq-64x64-uncond-ve": (62_761_091, "3fb539c432bd33a4"),
    "edm-afhqv2-64x64-uncond-vp": (61_805_571, "eebb5cc8b1e09678"),
    "edm-imagenet-64x64-cond-adm": (295_899_267, "7b7e611842aedfc6"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout(name):
    """Every name and shape, of parameters and buffers, as in the checkpoint of that name."""
    kind, arguments = PUBLISHED[name]
    parameters, digest = LAYOUT[name]
    with torch.device("meta"):
        net = kind(**arguments)
    layout = sorted((k, list(v.shape)) for k, v in net.state_dict().items())
    assert sha256(json.dumps(layout).encode()).hexdigest()[:16] == digest
    assert sum(p.numel() for p in net.parameters()) == parameters


def waves(net: torch.nn.Module) -> None:
    """Fill `net` with numbers that every implementation can make."""
    for name, value in net.state_dict().items():
        if not name.endswith("resample_filter"):
            wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 12.9898 + len(name)).reshape(
                value.shape
            )
            if value.ndim > 1:
                wave = wave / math.sqrt(value[0].numel())
            elif name.endswith("weight"):
                wave = 1 + wave / 4
            value.copy_(wave)


SMALL = {
    "ddpm++": (
        SongUNet,
        {"label_dim": 10, "augment_dim": 9, "model_channels": 16, "channel_mult": [2, 2]},
        [-0.92054, -1.56193, -0.49443, -0.25668, -0.4783, -0.34908, -1.57545],
    ),
    "ncsn++": (
        SongUNet,
        {**PUBLISHED["edm-cifar10-32x32-uncond-ve"][1], "model_channels": 16, "channel_mult": [1, 2]},
        [-0.77607, -1.11675, -0.98471, -0.90391, -1.06805, -0.87654, -0.95871],
    ),
    "adm": (
        DhariwalUNet,
        {"label_dim": 1000, "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1},
        [0.61401, 1.28672, 0.69222, 1.07114, 0.68974, 1.09046, 1.28401],
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_values_of_an_independent_implementation(name):
    """The numbers come from nvidia-physicsnemo 2.2.2 (Apache-2.0) with the same weights, in double precision.

    It ran in training mode without dropout, since its GroupNorm divides by n - 1 in evaluation mode. There all 2,304
    values agreed to 4e-15 in double precision; the third image has no label.
    """
    kind, arguments, expected = SMALL[name]
    net = kind(**{"img_resolution": 16, "num_blocks": 2, "attn_resolutions": [8], **arguments}).double().eval()
    with torch.no_grad():
        waves(net)
    net.map_noise.freqs = net.map_noise.freqs.float()  # which both make in single precision
    x = torch.sin(torch.arange(3 * 768, dtype=torch.float64) * 0.37).reshape(3, 3, 16, 16)
    classes = arguments.get("label_dim", 0)
    label = torch.tensor([1, 3, classes]) if classes else None
    extra = {"augment": torch.sin(torch.arange(27.0, dtype=torch.float64)).reshape(3, 9)}
    noise = torch.tensor([-1.5, 0.1, 1.05], dtype=torch.float64)
    y = net(x, noise, Cond(label=label, extra=extra))
    assert torch.allclose(y.flatten()[::331], torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_no_condition_and_the_label_after_the_last_both_mean_no_label():
    net = SongUNet(16, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]).eval()
    with torch.no_grad():
        waves(net)
    x, noise = torch.randn(2, 3, 16, 16), torch.zeros(2)
    none = net(x, noise, None)
    assert torch.equal(net(x, noise, Cond(label=torch.tensor([3, 3]))), none)
    assert not torch.allclose(net(x, noise, Cond(label=torch.tensor([0, 1]))), none, atol=1e-3)


def test_dropout_acts_in_training_mode_only():
    net = DhariwalUNet(16, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], dropout=0.5)
    with torch.no_grad():
        waves(net)
    x, noise = torch.randn(2, 3, 16, 16), torch.zeros(2)
    assert not torch.equal(net.train()(x, noise), net(x, noise))
    assert torch.equal(net.eval()(x, noise), net(x, noise))


def test_a_new_network_starts_near_zero():
    """Branches end in (nearly) zero weights: every block starts as its skip connection, the output at zero."""
    for kind in (SongUNet, DhariwalUNet):
        net = kind(16, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
        assert net(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max() < 1e-3


def test_saved_and_loaded_is_the_same_network(tmp_path):
    for i, (kind, arguments, _) in enumerate(SMALL.values()):
        net = kind(**{"img_resolution": 16, "num_blocks": 1, "attn_resolutions": [8], **arguments})
        with torch.no_grad():
            waves(net)
        denoiser = Denoiser(net, EDM(), Prediction("edm")).eval()
        save_model(tmp_path / str(i), denoiser, Info(shape=(3, 16, 16)))
        x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 10.0])
        assert torch.equal(load_model(tmp_path / str(i))[0](x, t), denoiser(x, t))


def test_blocks_of_fewer_than_64_channels_have_no_attention():
    """As published: the number of heads is channels // 64, and none of them means no attention layers."""
    net = DhariwalUNet(16, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16, 8])
    attending = {name for name, _ in net.named_parameters() if name.endswith("qkv.weight")}
    assert attending == {
        f"{b}.qkv.weight" for b in ("enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block0", "dec.8x8_block1")
    }
    assert net.enc["8x8_block0"].heads == 1


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="encoder_type 'skip' is unknown; expected one of standard, residual"):
        SongUNet(encoder_type="skip")


def test_vp_tells_the_network_the_time_of_its_linear_beta():
    """sigma(t)^2 = exp(19.9 t^2 / 2 + 0.1 t) - 1 (Karras et al. 2022, Table 1), and the network hears 999 t."""
    time = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    sigma = torch.expm1(19.9 * time**2 / 2 + 0.1 * time).sqrt()
    x = torch.randn(4, 3, dtype=torch.float64)
    scaled, noise = Prediction("vp").inputs(x, sigma, sigma)
    assert torch.allclose(noise, 999 * time)
    assert torch.allclose(scaled, x / (1 + sigma**2).sqrt()[:, None])


def test_ve_hears_half_the_logarithm_and_predicts_the_noise_with_the_other_sign():
    sigma, x, eps = torch.tensor([0.02, 1.0, 100.0]), torch.randn(3, 2), torch.randn(3, 2)
    scaled, noise = Prediction("ve").inputs(x, sigma, sigma)
    assert torch.equal(scaled, x)
    assert torch.allclose(noise, torch.log(0.5 * sigma))
    x0 = Prediction("ve").x0(-eps, x + sigma[:, None] * eps, torch.ones(3), sigma)
    assert torch.allclose(x0, x, atol=1e-4)


def test_iddpm_hears_the_step_of_its_cosine_schedule():
    """The levels are those of Nichol and Dhariwal 2021 (arXiv 2102.09672), Eq. 17, with beta at most 0.999."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    sigma = (1 / torch.cumprod(1 - betas, 0) - 1).sqrt()
    steps = torch.tensor([0, 1, 500, 998, 999])
    x = torch.randn(5, 3, dtype=torch.float64)
    scaled, noise = Prediction("iddpm").inputs(x, sigma[steps], sigma[steps])
    assert torch.equal(noise, steps.double())
    assert torch.allclose(scaled, x / (1 + sigma[steps] ** 2).sqrt()[:, None])


def test_iddpm_leaves_predicted_variances_out():
    class Both(torch.nn.Module):
        def forward(self, x, noise, cond):
            return torch.cat([x, x + 1], dim=1)

    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 5.0])
    x0 = Denoiser(Both(), EDM(), Prediction("iddpm"))(x, t)
    expected = x - t[:, None, None, None] * x / (1 + t**2).sqrt()[:, None, None, None]
    assert torch.allclose(x0, expected, atol=1e-6)
