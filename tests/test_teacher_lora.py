"""LoRAs merged into transformers, against diffusers' own loaders, on tiny random models in each family's format."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import exported_lora, stock, stored

from distmatch import DistilledPipeline
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.solvers import solver
from distmatch.models.diffusers import teacher_lora
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.pixart import write_tiny_pixart
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.diffusers.tiny_flow import write_tiny_sana, write_tiny_sd3
from distmatch.models.diffusers.tiny_patched import write_tiny_flux
from distmatch.models.folder import save_model
from distmatch.models.library import components, family_of, outline
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.plain import read_json

WRITERS = {
    "sd3": write_tiny_sd3,
    "flux": write_tiny_flux,
    "sana": write_tiny_sana,
    "pixart": write_tiny_pixart,
    "sd": write_tiny_sd,
}
SCALED = {"r": 3, "lora_alpha": 5.0, "alpha_pattern": {"to_q": 7.0}}
"""Settings of peft's: a layer's update is multiplied by its alpha / r."""

PROMPT = "a cat"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return {name: write(root / name) for name, write in WRITERS.items()}


def random_lora(network, ends, rank=3):
    """Matrices for the layers of `network` whose names end so, by peft's names."""
    made, generator = {}, torch.Generator().manual_seed(len(ends))
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and f".{name}".endswith(ends):
            made[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) / 4
            made[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) / 4
    return made


def write_lora(pipe, folder, adapter=None, **further):
    """Save a LoRA of all linear layers by the pipeline; `adapter`: its settings."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = random_lora(getattr(pipe, part), ("",))
    if adapter is not None:
        known = {"target_modules": sorted({name.partition(".lora_")[0] for name in layers}), **adapter}
        further[f"{part}_lora_adapter_metadata"] = known
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": layers}, **further)
    return folder / "pytorch_lora_weights.safetensors"


def merged(source, file, scale=0.8):
    denoiser, info = stored(source)
    return denoiser, family_of(info).merged(denoiser, info, str(file), scale)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("sd3", None), ("flux", SCALED), ("sana", SCALED), ("sd", {**SCALED, "use_rslora": True})],
)
def test_the_network_is_that_of_diffusers_with_the_lora_fused(folders, tmp_path, name, adapter):
    theirs, part = stock(folders[name]), family_in(str(folders[name])).network
    file = write_lora(theirs, tmp_path, adapter)
    denoiser, info = merged(folders[name], tmp_path)
    assert (info.lora.file, info.lora.scale, info.lora.text) == (str(file), 0.8, False)
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(components=[part], lora_scale=0.8)
    plain, _ = stored(folders[name])
    torch.manual_seed(0)
    cond = family_of(info).example_cond(plain.net, info, 2)
    cond = replace(cond, text=torch.randn_like(cond.text))
    given = torch.randn(2, *info.shape), torch.tensor([0.7, 0.2]) * plain.schedule.t_max, cond
    with torch.no_grad():
        x, before = denoiser(*given), plain(*given)
        setattr(plain.net, part, getattr(theirs, part))
        y = plain(*given)
    assert (x - y).abs().max() < 1e-5 * y.abs().max()
    assert (x - before).abs().max() > 0.01 * y.abs().max()
    assert info.lora == family_of(info).merged(*outline(f"diffusers:{folders[name]}"), str(file), 0.8).lora


@pytest.fixture(scope="module")
def styled(folders, tmp_path_factory):
    """The folder of a LoRA for a Stable Diffusion 3 that also changes its two CLIP encoders."""
    folder, pipe = tmp_path_factory.mktemp("style"), stock(folders["sd3"])
    texts = {
        f"{part}_lora_layers": random_lora(getattr(pipe, part), (".q_proj", ".v_proj"))
        for part in ("text_encoder", "text_encoder_2")
    }
    write_lora(pipe, folder, **texts)
    return folder


def test_the_file_is_read_once_for_network_and_text_encoders(folders, styled, tmp_path, monkeypatch):
    read = []
    for name in ("load_file", "file_sha256"):
        real = getattr(teacher_lora, name)
        monkeypatch.setattr(teacher_lora, name, lambda file, real=real, name=name: (read.append(name), real(file))[1])
    file = shutil.copy(styled / "pytorch_lora_weights.safetensors", tmp_path / "style.safetensors")
    _, info = merged(folders["sd3"], file)
    for _ in range(2):
        assert components(info).encode([PROMPT]).text.isfinite().all()
        family_of(info).components(info)
    assert read == ["load_file", "file_sha256"]


def test_network_and_text_encoders_are_merged_and_the_student_finds_them_again(folders, styled, tmp_path):
    file = shutil.copy(styled / "pytorch_lora_weights.safetensors", tmp_path / "style.safetensors")
    denoiser, info = merged(folders["sd3"], file)
    theirs = stock(folders["sd3"])
    theirs.load_lora_weights(styled)
    theirs.fuse_lora(components=["transformer", "text_encoder", "text_encoder_2"], lora_scale=0.8)
    z, scale = rng.noise(0, range(1), info.shape), 4.0
    call = {"latents": z, "num_inference_steps": 3, "guidance_scale": scale, "output_type": "latent"}
    y = theirs(PROMPT, **call).images
    with torch.no_grad():
        cond = components(info).encode([PROMPT])
        x = solver("flow", info.scheduler)(guided(denoiser, scale), denoiser.schedule, z, cond, 3)
    assert (x - y).abs().max() < 1e-4 * y.abs().max()
    plain = family_of(info).text_encoder(info.source)([PROMPT])
    assert (plain.text - cond.text).abs().max() > 0.01
    save_model(tmp_path / "student", denoiser, replace(info, times=(1.0,)))
    pipe = DistilledPipeline.from_pretrained(tmp_path / "student")
    assert torch.equal(pipe.condition(1, prompts=PROMPT).text, cond.text)
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    image = stock(tmp_path / "out")(PROMPT, **{**call, "num_inference_steps": 1, "guidance_scale": 1}).images
    assert (pipe.denoiser(z, torch.ones(1), cond) - image).abs().max() < 1e-4
    mark = read_json(tmp_path / "out" / "distmatch.json", dict)
    assert (mark["lora"]["file"], mark["lora"]["scale"]) == (str(file), 0.8)
    save_file({k: v * 2 for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="is not the LoRA that this model was made with; put that file back"):
        family_of(info).components(info)


def test_a_students_lora_is_used_beside_its_teachers(folders, styled, tmp_path, capsys):
    """By the very lines that the export shows. It is a student's, and makes no teacher."""
    denoiser, info = merged(folders["sd3"], styled)
    x, pipe, draw = exported_lora(denoiser, info, (1.0,), tmp_path, capsys)
    assert (x - draw()).abs().max() < 1e-4
    pipe.set_adapters("student")
    assert (x - draw()).abs().max() > 0.05
    out = tmp_path / "lora"
    source, family = info.source, family_of(info)
    assert family.distilled(source, str(styled)) is None
    assert f"{out} is of a student exported by distmatch" in (family.distilled(source, str(out)) or "")


def kohya(name, layer, alpha=6.0, rank=3):
    """A layer in kohya's form, and what it adds to the weight."""
    down, up = torch.randn(rank, layer[1]) / 4, torch.randn(layer[0], rank) / 4
    named = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return named, alpha / rank * up @ down


def test_a_layer_that_diffusers_splits_has_its_places(folders, tmp_path):
    """FLUX.1 in kohya's form: queries, keys and values are one layer. What is left out is refused."""
    plain, _ = stored(folders["flux"])
    before = plain.net.transformer.state_dict()
    attention = "transformer_blocks.0.attn.{}.weight"
    places = [attention.format(part) for part in ("to_q", "to_k", "to_v")]
    width = before[places[0]].shape[0]
    weights, added = kohya("lora_unet_double_blocks_0_img_attn_qkv", (3 * width, width))
    save_file(weights, tmp_path / "style.safetensors")
    after = merged(folders["flux"], tmp_path / "style.safetensors")[0].net.transformer.state_dict()
    for name, share in zip(places, added.chunk(3), strict=True):
        assert torch.allclose(after[name], before[name] + 0.8 * share, atol=1e-5)
    assert [name for name, value in after.items() if not torch.equal(value, before[name])] == places
    t5, _ = kohya("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k", (8, 8))
    refused(folders["flux"], {**weights, **t5}, tmp_path, f"layers have {3 * width + 8} outputs, .* reads {3 * width}")
    bias = {"lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.ones(3 * width)}
    refused(folders["flux"], {**weights, **bias}, tmp_path, "it holds .*qkv.diff_b")


def refused(source, content, folder, message, metadata=None):
    """As `plan` does: without the model's weights."""
    save_file(content, folder / "x.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        family_in(str(source)).merged(*outline(f"diffusers:{source}"), str(folder / "x.safetensors"), 1.0)


def test_what_is_no_lora_of_the_model_is_refused(folders, tmp_path):
    pair = {f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    first, _ = pair
    layer = first.partition(".lora_")[0]
    sd3, sana = folders["sd3"], folders["sana"]
    for source, part in (
        (sd3, "unet"),
        (sd3, "text_encoder_3"),
        (sana, "text_encoder"),
        (folders["sd"], "transformer"),
    ):
        other = {name.replace("transformer.", f"{part}.", 1): value.clone() for name, value in pair.items()}
        refused(source, {**pair, **other}, tmp_path, f"is no LoRA of a [A-Z].*Pipeline: it holds {part}")
    refused(sd3, {first: pair[first]}, tmp_path, "it holds one matrix of")
    refused(sd3, {**pair, f"{layer}.lora_magnitude_vector": torch.ones(2)}, tmp_path, "it holds .*magnitude_vector")
    refused(sd3, {**pair, f"{layer}.alpha": torch.ones(())}, tmp_path, r"it holds .*to_q\.alpha")
    refused(folders["pixart"], pair, tmp_path, "teacher_lora.path .*x.safetensors: this teacher takes no LoRA")
    for entries, message in (
        ({"r": 10**9}, "its adapter for transformer has the wrong form: r: .*not 1000000000"),
        ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ):
        told = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in entries.items()})}
        refused(sd3, pair, tmp_path, message, told)
    refused(sd3, pair, tmp_path, "cannot be read as a LoRA", {"lora_adapter_metadata": "{"})


def test_the_lora_of_another_family_is_refused(folders, tmp_path):
    write_lora(stock(folders["flux"]), tmp_path)
    with pytest.raises(UserError, match=r"does not fit the transformer of this model: .*size mismatch|of them fit it"):
        merged(folders["sd3"], tmp_path)
