"""`distmatch teach`: learns, and is interrupted without loss."""

import json
import signal
from dataclasses import replace

import graphs
import pytest
import tiny
import torch
from forked import command, start
from safetensors.torch import load_file

from distmatch.commands.teach import Options, train_teacher
from distmatch.data.images import load_images
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.losses import denoising_loss
from distmatch.diffusion.schedule import EDM
from distmatch.evaluation.features import image_fingerprint
from distmatch.methods.teach import Settings, Teaching
from distmatch.models.folder import Info, load_model
from distmatch.models.unet import UNet
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.training import log
from distmatch.training.gradients import Adder
from distmatch.training.optim import Optimizer

SMALL = ("--widths", 8, 16, "--batch", 8, "--precision", "fp32", "--steps", 24, "--save-every", 4, "--preview-every", 0)


def test_the_step_is_edms_objective(tmp_path):
    """One step against the loss written out anew, from the same draws."""
    images = load_images(tiny.image_folder(tmp_path))
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(1, 2, widths=(8, 16)), EDM(), Prediction("edm")).train()
    optimizer = Optimizer(denoiser.parameters(), lr=1e-3)
    task = Teaching(denoiser, images, optimizer, Info((1, 8, 8)), Settings(batch=4))
    generator = rng.stream("cpu", 0, "teach", 0)
    rows = torch.from_numpy(rng.shuffled(0, len(images), 0, 4))
    x = images.pixels[rows].double() / 127.5 - 1
    torch.rand(4, generator=generator)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(4, generator=generator)).double()[:, None, None, None]
    x_t = x + sigma * torch.randn(x.shape, generator=generator).double()
    from distmatch.diffusion.denoiser import Cond

    network = denoiser.net(
        (x_t / (sigma**2 + 0.25).sqrt()).float(), sigma.flatten().float().log() / 4, Cond(label=images.labels[rows])
    ).double()
    x0 = 0.25 / (sigma**2 + 0.25) * x_t + 0.5 * sigma / (sigma**2 + 0.25).sqrt() * network
    expected = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (x0 - x) ** 2).mean()
    assert task.step(0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_recorded_steps_are_the_steps_own(tmp_path):
    images, found = load_images(tiny.image_folder(tmp_path)), []
    for records in (False, True):
        denoiser = tiny.teacher().train()
        optimizer = Optimizer(denoiser.parameters(), lr=1e-3, clip=1.0)
        settings = Settings(batch=4, flip=True, label_dropout=0.3)
        task = Teaching(denoiser, images, optimizer, Info((1, 8, 8)), settings)
        if records:  # as on a GPU
            task.gradients = Adder(task.clock, recorded=[optimizer])
        with graphs.on_a_cpu():
            found.append([task.step(index) for index in range(3)])
    assert found[0] == found[1]


def test_denoising_loss_weights_each_sample():
    x0, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    assert denoising_loss(x0, x, torch.tensor([1.0, 10.0])).item() == pytest.approx((1 + 4 + 90 + 160) / 4)


def test_killed_and_continued_equals_undisturbed(tmp_path):
    """SIGKILL in the middle, the same command again: the same weights, bit for bit, and one line per logged step."""
    images = tiny.image_folder(tmp_path / "images")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command("teach", images, "-o", straight, *SMALL).returncode == 0
    started = start("teach", images, "-o", broken, *SMALL)
    started.wait(lambda: list((broken / "checkpoints").glob("step-*")))
    started.kill()
    started.end()
    assert not (broken / "model").exists()
    assert command("teach", images, "-o", broken, *SMALL).returncode == 0
    for part in ("model/model.safetensors", "checkpoints/step-00000024/shard-00001-model-00001-of-00001.safetensors"):
        a, b = load_file(straight / part), load_file(broken / part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), part
    steps = [[line["step"] for line in log.read(run / "log.jsonl")] for run in (straight, broken)]
    assert sorted(set(steps[1])) == steps[1]
    assert steps[0][-1] == steps[1][-1] == 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    images = tiny.image_folder(tmp_path / "images")
    out = tmp_path / "run"
    started = start("teach", images, "-o", out, *SMALL[:5], "--steps", 100_000, "--save-every", 100)
    started.wait(lambda: list((out / "checkpoints").glob("step-*")))
    started.kill(number)
    assert started.end() == 130
    errors = started.stderr
    assert f"stopped by {number.name} after step" in errors
    assert "to go on: " in errors
    assert "Traceback" not in errors
    saved = max((out / "checkpoints").glob("step-*"))
    assert f"after step {int(saved.stem.removeprefix('step-'))} of 100000" in errors


def test_mistakes_are_told_without_a_traceback(tmp_path):
    missing = command("teach", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "nowhere does not exist; expected a folder or an archive of images" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_model_folder_says_how_it_was_made(tmp_path):
    images = tiny.image_folder(tmp_path / "images")
    options = Options(widths=(8, 16), steps=2, batch=4, precision="fp32")
    train_teacher(images, tmp_path / "run", options)
    denoiser, info = load_model(tmp_path / "run" / "model")
    assert info.classes == ("dark", "light")
    assert info.times == ()
    assert info.card["teach"]["steps"] == 2
    assert info.card["pixels"] == image_fingerprint(load_images(images).pixels)  # which `eval` knows it by
    with pytest.raises(UserError, match="run is a run with other settings:\n  steps: 2 there, 3 here"):
        train_teacher(images, tmp_path / "run", replace(options, steps=3))
    assert denoiser(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)
    json.loads((tmp_path / "run" / "model" / "config.json").read_text())
