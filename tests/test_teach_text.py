"""Teaching a small Stable Diffusion: its parts in closed form, its captions, resumption, and the folder it leaves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.commands import teach_text
from distmatch.commands.teach_text import train_text_teacher
from distmatch.data.images import Images
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.schedule import VP
from distmatch.methods import autoencode
from distmatch.methods import teach_text as method
from distmatch.models.diffusers import small
from distmatch.models.diffusers.small import SCHEDULER, Sizes, TextDenoiser, make_autoencoder, make_tokenizer
from distmatch.models.folder import save_model
from distmatch.models.library import find_model
from distmatch.system.digests import load_file
from distmatch.system.errors import UserError
from distmatch.training.optim import Optimizer

SIZES = Sizes(autoencoder=(16, 16), unet=(16, 32), text=32, layers=1, tokens=8, vocabulary=520)
CAPTIONS = (("red thing", "thing"), ("green thing",), ("blue thing", "a blue one", "azure"))
TINY = teach_text.Options(
    steps=4,
    batch=3,
    autoencoder_steps=2,
    autoencoder_batch=2,
    perceptual=0.0,
    autoencoder_widths=(16, 16),
    widths=(16, 32),
    text_width=32,
    tokens=8,
    vocabulary=520,
    precision="fp32",
    save_every=2,
    preview_every=0,
    device="cpu",
)


def pictures(captions=CAPTIONS, side=8):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(captions), 3, side, side), dtype=np.uint8))
    return Images.of(pixels, captions=captions)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return make_autoencoder(SIZES, 8).eval()


@pytest.fixture
def task(autoencoder):
    torch.manual_seed(0)
    tokenizer = make_tokenizer((text for texts in CAPTIONS for text in texts), SIZES)
    network = TextDenoiser(SIZES, 4, tokenizer)
    latents = torch.randn(3, 4, 4, 4), torch.zeros(3, 4, 4, 4)
    optimizer = Optimizer(network.parameters(), lr=1e-3, steps=4)
    how = method.Settings(batch=300, text_dropout=0.25)
    return method.TextTeaching(network, autoencoder, tokenizer, latents, CAPTIONS, ["a"], optimizer, how)


def test_standardised_latents_have_mean_0_and_deviation_1_and_decode_to_the_same(autoencoder):
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        means, stds = autoencode.encoded(autoencoder, ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8))
        before = autoencode.reconstruct(autoencoder, x)
        mean, std = means.mean((0, 2, 3)), torch.tensor([0.5, 1.5, 2.0, 0.1])
        small.standardise(autoencoder, mean, std)
        torch.testing.assert_close(autoencode.reconstruct(autoencoder, x), before, rtol=1e-4, atol=1e-4)
        after, deviations = autoencode.encoded(autoencoder, ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8))
    torch.testing.assert_close(after * std[:, None, None] + mean[:, None, None], means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviations * std[:, None, None], stds, rtol=1e-4, atol=1e-4)


def test_the_divergence_is_that_of_two_normal_distributions():
    mean, std = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3) + 0.1
    one = torch.distributions.Normal(mean, std)
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(autoencode.divergence(mean, std), expected)


def test_the_tokenizer_learns_words_and_can_write_any_other(tmp_path):
    tokenizer = make_tokenizer(["apple"] * 9 + ["pear"] * 9, replace(SIZES, vocabulary=600))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Apple")["input_ids"])
    assert pieces == ["<|startoftext|>", "apple</w>", "<|endoftext|>"]
    for text in ("zebra", "ü", "😀", "pearapple"):
        ids = tokenizer(text, truncation=False)["input_ids"][1:-1]
        assert tokenizer.eos_token_id not in ids  # which also stands for what is unknown
        assert tokenizer.decode(ids).strip() == text
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("zebra pear")["input_ids"] == tokenizer("zebra pear")["input_ids"]


def test_the_loss_is_min_snr_weighted_eps_and_captions_are_the_images_own(task, monkeypatch):
    """Each latent of the three images is constant in its noise-free part, so that the image behind a row is known."""
    seen = {}
    compute = task.gradients

    def spy(inputs):
        seen.update(zip(("noisy", "t", "ids", "eps", "weight"), inputs, strict=True))
        return compute(inputs)

    monkeypatch.setattr(task, "gradients", spy)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.zero_()  # predicts 0: the loss is the weighted mean square of the noise
    loss = task.step(0)["loss"]
    schedule = VP.from_scheduler(SCHEDULER)
    t = seen["t"].float()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    snr = (alpha / sigma) ** 2
    expected = (torch.minimum(snr, torch.tensor(5.0)) / snr)[:, None, None, None] * seen["eps"] ** 2
    torch.testing.assert_close(loss, expected.mean())
    x0 = (seen["noisy"] - sigma[:, None, None, None] * seen["eps"]) / alpha[:, None, None, None]
    rows = ((x0[:, None] - task.mean[None]) ** 2).flatten(2).sum(2).argmin(1)
    empty = method.tokenized(task.tokenizer, [""])[0]
    counts = {"": 0}
    for row, ids in zip(rows.tolist(), seen["ids"], strict=True):
        if torch.equal(ids, empty):
            counts[""] += 1
            continue
        (text,) = [c for c in CAPTIONS[row] if torch.equal(ids, method.tokenized(task.tokenizer, [c])[0])]
        counts[text] = counts.get(text, 0) + 1
    assert 50 <= counts[""] <= 100  # of 300, at a quarter
    assert 50 <= counts["green thing"] <= 100
    for text in ("red thing", "thing"):
        assert 20 <= counts[text] <= 60
    for text in CAPTIONS[2]:
        assert 10 <= counts[text] <= 45


def test_a_stopped_run_continues_bit_for_bit_and_leaves_a_pipeline(tmp_path, monkeypatch):
    images = pictures()
    train_text_teacher(images, tmp_path / "whole", TINY)

    step = method.TextTeaching.step

    def stopping(self, index):
        if index == 3:
            raise RuntimeError("stop")
        return step(self, index)

    monkeypatch.setattr(method.TextTeaching, "step", stopping)
    with pytest.raises(RuntimeError, match="stop"):
        train_text_teacher(images, tmp_path / "two", TINY)
    monkeypatch.setattr(method.TextTeaching, "step", step)
    train_text_teacher(images, tmp_path / "two", TINY)
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "model").rglob("*.safetensors")]
    assert len(names) == 3
    for name in names:
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "two" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)

    denoiser, info = find_model(str(tmp_path / "two"), "teacher")
    assert info.shape == (4, 4, 4)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "two" / "model")
    states = pipe.encode_prompt("red thing", "cpu", 1, False)[0]
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    with torch.no_grad():
        expected = pipe.unet(x, t, states, return_dict=False)[0]
        ours = denoiser.net(x, t, Cond(text=states))
    torch.testing.assert_close(ours, expected)
    with pytest.raises(UserError, match="other settings"):
        train_text_teacher(pictures((("other",), *CAPTIONS[1:])), tmp_path / "two", TINY)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (Images.of(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), {}, "has no captions"),
        (pictures(side=6), {}, "multiple of 4"),
        (pictures(), {"widths": (16, 20)}, "--unet 20: expected multiples of 16"),
        (pictures(), {"text_width": 40}, "expected a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_trained(tmp_path, images, options, message):
    with pytest.raises(UserError, match=message):
        train_text_teacher(images, tmp_path / "run", replace(TINY, **options))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_an_autoencoder_of_another_run_is_used_as_it_is(tmp_path):
    images = pictures()
    train_text_teacher(images, tmp_path / "first", TINY)
    taken = tmp_path / "first" / "autoencoder" / "model"
    train_text_teacher(images, tmp_path / "second", replace(TINY, autoencoder=taken, seed=1))
    first, second = (
        load_file(tmp_path / name / "model" / "vae" / "diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "second" / "autoencoder").exists()
    assert json.loads((tmp_path / "second" / "settings.json").read_text())["autoencoder"] == str(taken)


@pytest.mark.slow
def test_the_packages_teacher_follows_its_prompts():
    from distmatch.diffusion.guidance import guided
    from distmatch.diffusion.sampler import heun
    from distmatch.models.library import components
    from distmatch.system import rng

    denoiser, info = find_model("emoji", "teacher")
    parts = components(info)
    colours = ("red", "green", "blue")
    with torch.no_grad():
        cond = parts.encode([f"{colour} circle, flat style" for colour in colours])
        z = rng.noise(0, range(3), info.shape)
        images = parts.decode(heun(guided(denoiser, 4.0), denoiser.schedule, z, cond, 6))
    middle = images[:, :, 24:40, 24:40].mean((2, 3))
    assert middle.argmax(1).tolist() == [0, 1, 2]
    assert images[:, :, :3, :3].mean() > 0.8  # on white


def test_the_packages_prompts_are_found_by_name():
    prompts = read_prompts(Path("emoji"))
    assert len(prompts) == len(set(prompts)) > 8000
    assert {"red apple, flat style", "red apple"} <= set(prompts)


def test_what_is_made_from_the_packages_teacher_names_it_instead_of_a_place(tmp_path):
    denoiser, info = find_model("emoji", "teacher")
    save_model(tmp_path, denoiser, replace(info, times=(999.0,)))
    assert json.loads((tmp_path / "config.json").read_text())["source"] == "emoji"
    assert find_model(str(tmp_path), "student")[1].source == info.source
    assert (Path(info.source) / "model_index.json").exists()
