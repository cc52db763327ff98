"""Stable Diffusion teachers against diffusers' own pipelines, and all that training on prompts needs."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny import stock, text_encoder
from tiny import stored as teacher

from distmatch.data.embeddings import embed
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, PairStore, fingerprint, prompts_digest
from distmatch.diffusion.conditions import Classes, Guided, Prompts
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import EDM, VP
from distmatch.diffusion.solvers import evaluations, solver
from distmatch.models.diffusers.autoencoder import Decoded, tiny_decoder
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.lora import ADAPTED
from distmatch.models.diffusers.tiny import write_tiny_sd, write_tiny_vae
from distmatch.models.folder import load_model, save_model
from distmatch.pipeline import DistilledPipeline, TeacherPipeline
from distmatch.system import rng
from distmatch.system.digests import save_file

TEXTS = ["a cat", "two dogs on a sofa", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stable")
    write_tiny_sd(root / "eps")
    write_tiny_sd(root / "v", prediction="v_prediction")
    write_tiny_sd(root / "xl", kind="sdxl")
    write_tiny_vae(root / "tiny")
    return root


@pytest.mark.parametrize("kind", ["eps", "v", "xl"])
@pytest.mark.parametrize("steps", [50, 3])
def test_guided_pndm_is_the_stock_pipelines(folders, kind, steps):
    """Text encoders, empty prompt, U-Net, conversion, guidance, solver: the latents of diffusers' own pipeline."""
    denoiser, info = teacher(folders / kind)
    z, texts = rng.noise(0, range(3), info.shape), TEXTS
    calls = []
    denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        cond = text_encoder(str(folders / kind))(texts)
        x = solver("pndm", info.scheduler)(guided(denoiser, 8.0), denoiser.schedule, z, cond, steps)
    y = stock(folders / kind)(
        texts, latents=z, num_inference_steps=steps, guidance_scale=8.0, output_type="latent"
    ).images
    assert x.std() > 0.5
    assert (x - y).abs().max() < 2e-5 * y.abs().max()
    assert len(calls) == 2 * evaluations("pndm", steps)


@pytest.mark.parametrize("kind", ["eps", "xl"])
def test_the_teachers_pipeline_makes_the_stock_pixels(folders, kind):
    pipe = TeacherPipeline.from_pretrained(f"diffusers:{folders / kind}", steps=5, guidance=3.0)
    z = rng.noise(4, range(2), pipe.info.shape)
    pixels = pipe(prompts=TEXTS[:2], seed=4).pixels.float() / 255
    images = stock(folders / kind)(
        TEXTS[:2], latents=z, num_inference_steps=5, guidance_scale=3.0, output_type="pt"
    ).images
    assert pixels.shape == images.shape == (2, 3, 64, 64)
    assert (pixels - images).abs().max() < 1.01 / 510


def test_schedule_and_prediction_come_from_the_models_own_settings(folders, tmp_path):
    eps, info = teacher(folders / "eps")
    assert (eps.schedule, eps.prediction.name) == (VP(0.00085, 0.012, 1000, "scaled_linear"), "eps")
    assert (info.shape, info.source) == ((4, 8, 8), str(folders / "eps"))
    assert teacher(folders / "v")[0].prediction.name == "v"
    scheduler = stock(folders / "eps").scheduler
    t = torch.arange(1000.0, dtype=torch.float64)
    assert torch.allclose(eps.schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-5)
    for change, message in {
        "laplace": "beta_schedule 'laplace' is not known here",
        "zero": "noise ends at alpha = 0 .rescale_betas_zero_snr., where prediction_type 'epsilon' does not",
        "other": "prediction_type 'flow_prediction' is unknown",
    }.items():
        folder = write_tiny_sd(tmp_path / change)
        file = folder / "scheduler" / "scheduler_config.json"
        entries = {
            "laplace": {"beta_schedule": change},
            "zero": {"rescale_betas_zero_snr": True},
            "other": {"prediction_type": "flow_prediction"},
        }
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries[change]}))
        with pytest.raises(ValueError, match=message):
            teacher(folder)
    with pytest.raises(ValueError, match=r"nowhere' is neither a folder here nor a model id"):
        teacher(tmp_path / "nowhere")


def test_x0_keeps_its_precision_where_alpha_is_small():
    """`x0 = (x_t - sigma eps) / alpha`, alpha = 0.068 at t = 999: bf16 arithmetic is off by some tenths, ours by its
    network's rounding alone. The network here is exact but for bf16's rounding of its output.
    """
    schedule, t = VP(0.00085, 0.012, 1000, "scaled_linear"), torch.full((64,), 999.0)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(64, 4, 8, 8, generator=generator) for _ in range(2))
    x_t = schedule.add_noise(x0, eps, t)
    exact = eps.bfloat16()  # what a network under autocast returns

    class Network(torch.nn.Module):
        def forward(self, x, noise, cond):
            return exact

    ours = Denoiser(Network(), schedule, Prediction("eps"))(x_t, t)
    assert ours.dtype == torch.float32
    alpha, sigma = (v[:, None, None, None] for v in (schedule.alpha(t), schedule.sigma(t)))
    reference = (x_t.double() - sigma.double() * exact.double()) / alpha.double()
    low = (x_t.bfloat16() - sigma.bfloat16() * exact) / alpha.bfloat16()
    assert (ours - reference).abs().max() < 1e-4
    assert (low.double() - reference).abs().max() > 0.1
    assert (low.double() - reference).std() > 0.05


def test_the_networks_own_null_text_is_the_empty_prompts(folders):
    denoiser, _ = teacher(folders / "eps")
    cond = text_encoder(str(folders / "eps"))([""])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, cond.null()), denoiser(x, t, cond))
        other = denoiser(x, t, text_encoder(str(folders / "eps"))(["a cat"]))
    assert not torch.allclose(denoiser(x, t, cond), other, atol=1e-3)
    xl, _ = teacher(folders / "xl")
    assert not xl.net.null_text.any()  # SDXL's own: force_zeros_for_empty_prompt
    assert not xl.net.null_pooled.any()


@pytest.mark.parametrize("kind", ["eps", "xl"])
def test_a_student_survives_its_folder_and_starts_at_its_time(folders, tmp_path, kind):
    denoiser, info = teacher(folders / kind)
    save_model(tmp_path, denoiser, replace(info, times=(399.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path)
    z = rng.noise(7, range(2), info.shape)
    cond = text_encoder(str(folders / kind))(TEXTS[:2])
    with torch.no_grad():
        latents = denoiser(z, torch.full((2,), 399.0), cond)
        decode = family_in(str(folders / kind)).decoder(str(folders / kind))
        assert torch.equal(pipe.sample(z, cond), decode(latents))
        assert torch.equal(latents, Steps((399.0,)).sample(denoiser, denoiser.schedule, z, cond))
    assert torch.equal(pipe(prompts=TEXTS[:2], seed=7).pixels, pipe.render(z, cond))
    several, one = pipe(3, prompts="a cat", seed=7).pixels[0].int(), pipe(prompts=["a cat"], seed=7).pixels[0].int()
    assert (several - one).abs().max() <= 1  # but for rounding in batches of other sizes
    for message, wrong in {
        'this model makes images of prompts; give prompts="red apple"': {},
        "this model has no classes": {"labels": 1},
        "2 prompts for 3 images": {"prompts": ["a", "b"]},
        "this model's guidance is fixed": {"prompts": "a", "guidance_scale": 3.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            pipe(3, **wrong)


# Conditions


def test_conditions_by_number_and_at_random():
    encode = lambda numbers: Cond(text=torch.tensor(numbers, dtype=torch.float32)[:, None, None])  # noqa: E731
    prompts = Prompts(5, encode)
    assert prompts.at(range(4, 9)).text.flatten().tolist() == [4, 0, 1, 2, 3]
    generator = torch.Generator().manual_seed(3)
    drawn = torch.cat([prompts.draw(50, torch.Generator().manual_seed(k)).text.flatten() for k in range(40)])
    assert drawn.long().bincount().min() > 300  # 400 expected
    assert torch.equal(prompts.draw(9, generator).text, prompts.draw(9, torch.Generator().manual_seed(3)).text)
    assert Classes(3).at(range(2, 5)).label.tolist() == [2, 0, 1]
    assert Classes(0).at(range(3)) is None
    guided = Guided(Classes(0), 2.0, 6.0)
    scales = guided.at(range(2000)).extra["guidance"]
    assert torch.equal(guided.at([7, 1999]).extra["guidance"], scales[[7, 1999]])
    assert scales.min() >= 2
    assert scales.max() <= 6
    assert scales.mean().item() == pytest.approx(4.0, abs=0.1)
    assert scales.std().item() == pytest.approx(4 / 12**0.5, abs=0.05)
    assert Guided(Classes(2), 1.0, 8.0).draw(4, generator).label.shape == (4,)


@pytest.mark.parametrize("kind", ["eps", "xl"])
def test_embeddings_are_computed_once_and_are_the_encoders(folders, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("distmatch.data.computed.SHARD", 4)
    monkeypatch.setattr("distmatch.data.embeddings.BATCH", 3)
    encoder = text_encoder(str(folders / kind))
    texts = [f"{i} things" for i in range(10)]
    seen = []

    def encode(part):
        seen.extend(part)
        return encoder(part)

    cond = embed(tmp_path, texts, encode)([9, 0, 5])
    assert seen == texts
    direct = encoder([texts[9], texts[0], texts[5]])
    assert torch.equal(cond.text, direct.text.half().float())
    assert cond.extra.keys() == direct.extra.keys()
    assert all(torch.equal(cond.extra[k], direct.extra[k].half().float()) for k in cond.extra)
    assert torch.equal(embed(tmp_path, texts, encode)([9, 0, 5]).text, cond.text)
    assert seen == texts
    other = text_encoder(str(write_tiny_sd(tmp_path / "other", seed=1)))
    assert encoder.fingerprint() == text_encoder(str(folders / kind)).fingerprint() != other.fingerprint()


def test_states_that_half_precision_cannot_hold_are_kept_in_full(tmp_path, monkeypatch):
    """The inner states of language models have single numbers beyond its 65,504."""
    monkeypatch.setattr("distmatch.data.computed.SHARD", 1)
    large = torch.tensor([[[1.0, 70_000.0]], [[1.0, 2.0]]])
    cond = embed(tmp_path, ["0", "1"], lambda texts: Cond(text=large[list(map(int, texts))]))([0, 1])
    assert torch.equal(cond.text, large)


# Pairs


def test_the_states_of_the_empty_text_bind_no_pairs_but_the_encoders_do(folders):
    """Another machine computes them with other rounding."""
    denoiser, info = teacher(folders / "eps")
    before = fingerprint(denoiser)
    denoiser.net.null_text += 1e-6
    assert fingerprint(denoiser) == before
    denoiser.net.unet.conv_in.bias.data[0] += 1e-6
    assert fingerprint(denoiser) != before
    spec = text_spec(denoiser, info, ["a"])
    assert replace(spec, encoders="one").digest() not in (spec.digest(), replace(spec, encoders="two").digest())


def text_spec(denoiser, info, texts, **changes):
    spec = PairSpec(
        teacher="tiny",
        fingerprint=fingerprint(denoiser),
        sampler="pndm",
        steps=4,
        guidance=3.0,
        seed=2,
        count=7,
        shard_size=3,
        shape=info.shape,
        classes=0,
        dtype="float16",
        scheduler=info.scheduler,
        prompts=prompts_digest(texts),
    )
    return replace(spec, **changes)


def test_pairs_with_prompts(folders, tmp_path):
    """Latents in fp16, the prompts by number in one table; the same whatever the batch; other prompts are refused."""
    denoiser, info = teacher(folders / "eps")
    encoder, texts = text_encoder(str(folders / "eps")), ["a cat", "a\nline", "ünï"]
    conditions = Prompts(3, lambda numbers: encoder([texts[i] for i in numbers]))
    spec = text_spec(denoiser, info, texts)
    build(tmp_path / "a", spec, denoiser, conditions, prompts=texts, batch=2)
    store = PairStore.open(tmp_path / "a", spec.fingerprint)
    assert store.prompts() == texts
    store.verify()
    images = stock(folders / "eps")(
        [texts[i % 3] for i in range(7)],
        latents=rng.noise(2, range(7), info.shape),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    pairs = store.batch(range(7))
    assert list(pairs.index) == list(range(7))
    assert (pairs.y - images).abs().max() < 2e-3 * images.abs().max()  # fp16
    assert store.images(0, 3).half().float().equal(store.images(0, 3))
    size = (tmp_path / "a" / "shard-00000.safetensors").stat().st_size
    assert 3 * 4 * 8 * 8 * 2 < size < 3 * 4 * 8 * 8 * 2 + 1500
    build(tmp_path / "b", spec, denoiser, conditions, prompts=texts, batch=7)
    assert (PairStore.open(tmp_path / "b").images(0, 7) - pairs.y).abs().max() < 2e-3 * images.abs().max()
    with pytest.raises(ValueError, match="prompts: "):
        build(tmp_path / "a", text_spec(denoiser, info, ["a dog"]), denoiser, conditions)
    (tmp_path / "a" / "prompts.jsonl").write_text('"a dog"\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl is damaged"):
        store.verify()


def test_pairs_of_their_own_guidance(folders, tmp_path):
    denoiser, info = teacher(folders / "eps")
    encoder = text_encoder(str(folders / "eps"))
    conditions = Guided(Prompts(1, lambda numbers: encoder(["a cat"] * len(numbers))), 1.0, 8.0)
    spec = text_spec(denoiser, info, ["a cat"], guidance=None, guidances=(1.0, 8.0), count=3, dtype="float32")
    build(tmp_path, spec, denoiser, conditions, prompts=["a cat"])
    scales = conditions.at(range(3)).extra["guidance"]
    assert scales.unique().numel() == 3
    for i, (y, w) in enumerate(zip(PairStore.open(tmp_path).images(0, 3), scales.tolist(), strict=True)):
        z = rng.noise(2, [i], info.shape)
        image = stock(folders / "eps")(
            "a cat", latents=z, num_inference_steps=4, guidance_scale=w, output_type="latent"
        ).images
        assert (y - image[0]).abs().max() < 1e-4 * image.abs().max()


def test_pndm_is_for_discrete_diffusions():
    with pytest.raises(ValueError, match="pndm is for the schedules of discrete diffusions"):
        solver("pndm")(lambda x, t, cond: x, EDM(), torch.zeros(1, 1), None, 3)
    with pytest.raises(ValueError, match="sampler 'plms' is unknown; expected one of euler, heun, ddim, dpm, pndm"):
        solver("plms")


# Decoders


def test_decoders_are_the_pipelines_and_pass_gradients(folders):
    latents = torch.randn(2, 4, 8, 8)
    vae, full = stock(folders / "eps").vae, family_in(str(folders / "eps")).decoder
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
        assert torch.allclose(full(str(folders / "eps"))(latents), expected, atol=1e-5)
    for decoder, folder in (
        (family_in(str(folders / "eps")).decoder, folders / "eps"),
        (tiny_decoder, folders / "tiny"),
    ):
        plain, frugal = (decoder(str(folder), checkpointing=c) for c in (False, True))
        gradients = []
        for made in (plain, frugal):
            x = latents.clone().requires_grad_()
            loss = Decoded(torch.nn.functional.mse_loss, made)(x, torch.zeros_like(x))
            gradients.append(torch.autograd.grad(loss, x)[0])
        assert gradients[0].abs().max() > 0
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
        assert not any(p.requires_grad for p in plain.parameters())


def test_the_gradient_of_the_decoded_distance_is_the_true_one(folders):
    decoder = tiny_decoder(str(folders / "tiny")).double()
    loss = Decoded(torch.nn.functional.mse_loss, decoder)
    x, y, d = (torch.randn(1, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y), x)
    h = 1e-6
    slope = (loss(x + h * d, y) - loss(x - h * d, y)) / (2 * h)
    assert slope.item() == pytest.approx((gradient * d).sum().item(), rel=1e-4)


def test_a_student_with_adapters_of_an_earlier_version_still_opens(folders, tmp_path):
    """It has peft's layers within its network; they are merged."""
    denoiser, info = teacher(folders / "eps")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 10.0])
    cond = text_encoder(str(folders / "eps"))(TEXTS[:2])
    with torch.no_grad():
        plain = denoiser(x, t, cond)
        save_model(tmp_path, denoiser, replace(info, times=(999.0,)))
        denoiser.net.unet.add_adapter(
            LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=list(ADAPTED))
        )
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        made = denoiser(x, t, cond)
        weights = {name: value.contiguous() for name, value in denoiser.net.state_dict().items()}
        config = json.loads((tmp_path / "config.json").read_text())
        del config["sha256"]
        config["network"]["lora"] = 2
        config["weights"] = save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded, _ = load_model(tmp_path)
        assert (made - plain).abs().max() > 1e-3
        torch.testing.assert_close(loaded(x, t, cond), made, rtol=1e-4, atol=1e-4)
