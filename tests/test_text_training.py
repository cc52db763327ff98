"""Training on prompts by a recipe: adapters alone, recomputed activations, cached text, what is refused."""

import shutil
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from tiny import text_encoder

from distmatch.commands.distillation import distil
from distmatch.diffusion.conditions import WHOLE
from distmatch.models.diffusers.export import export_diffusers, export_lora
from distmatch.models.diffusers.text import TextEncoder
from distmatch.models.diffusers.tiny import write_tiny_sd, write_tiny_vae
from distmatch.models.folder import save_model
from distmatch.models.library import find_model
from distmatch.planning.preflight import Flight, checks
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.smoke import make_networks
from distmatch.system.files import write_json
from distmatch.system.plain import read_json
from distmatch.system.terminal import Notice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_tiny_sd(root / "sd")
    write_tiny_vae(root / "tiny")
    (root / "prompts.txt").write_text("a cat\na dog\na house\n")
    tree = {
        "teacher": f"diffusers:{root / 'sd'}",
        "prompts": {"path": str(root / "prompts.txt")},
        "steps": 2,
        "match": {"batch": 2, "guidance": 3.0, "pairs": True},
        "regress": {"batch": 2, "decoder": "tiny", "tiny": str(root / "tiny")},
        "pairs": {"count": 4, "sampler": "pndm", "steps": 3, "guidance": 3.0, "dtype": "float16"},
        "generator": {"lr": 1e-3},
        "critic": {"lr": 1e-3},
    }
    (root / "text.yaml").write_text(yaml.safe_dump(tree))
    return root


def distiller(folder, *overrides):
    recipe = load_recipe(str(folder / "text.yaml"), overrides)
    subject = subjects.subject(recipe)
    return build.distiller(recipe, subject, build.pair_store(recipe, subject, folder)), subject


def test_an_example_is_shaped_like_a_prompt_and_encodes_none(folder):
    recipe = load_recipe(str(folder / "text.yaml"), ["student.guidance=[1, 4]"])
    subject = subjects.subject(recipe)
    real: Any = subject.conditions.at([0])
    cond: Any
    x, t, cond = build.example(replace(subject, conditions=cast("Any", None)), guided=True)
    assert (x.shape, t.shape) == ((1, 4, 8, 8), (1,))
    assert cond.text.shape == real.text.shape
    assert {name: extra.shape for name, extra in cond.extra.items()} == {"guidance": (1,)}


@pytest.mark.parametrize(
    ("teacher", "kind"),
    [
        ("runwayml/stable-diffusion-v1-5", "StableDiffusionPipeline"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline"),
    ],
)
def test_a_smoke_run_has_a_teacher_of_the_recipes_family(tmp_path, teacher, kind):
    make_networks(load_recipe("sd15-laion-6.25", [f"teacher=diffusers:{teacher}", "terms=match"]), tmp_path)
    assert read_json(tmp_path / "teacher" / "model_index.json", dict[str, Any])["_class_name"] == kind


def test_adapters_alone_are_trained(folder):
    d, subject = distiller(folder, "student.adapter.rank=2")
    before = {name: p.clone() for name, p in d.student.named_parameters()}
    for index in range(2):
        d.step(index)
    changed = {name for name, p in d.student.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.endswith("up.weight")} <= changed
    # Merged, the rest is the teacher's to the bit; the fake score is trained whole.
    merged, teacher = dict(d.student.merged()), subject.denoiser.net.state_dict()
    assert merged.keys() == teacher.keys()
    assert torch.equal(merged["unet.conv_in.weight"], teacher["unet.conv_in.weight"])
    assert not torch.equal(d.fake.net.unet.conv_in.weight, teacher["unet.conv_in.weight"])


def test_adapters_are_a_function_of_the_seed_and_leave_the_guidance_input_to_be_trained(folder, tmp_path):
    changes = ("student.adapter.rank=2", "student.guidance=[1, 4]")
    first, again, other = (distiller(folder, *changes, f"seed={seed}")[0] for seed in (0, 0, 1))
    weights = [
        torch.cat([p.flatten() for name, p in d.student.named_parameters() if name.endswith("down.weight")])
        for d in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    scale = "unet.time_embedding.cond_proj.weight"
    assert not dict(first.student.merged())[scale].any()
    for index in range(2):
        first.step(index)
    assert dict(first.student.merged())[scale].any()
    first.export(tmp_path / "student")
    with pytest.raises(ValueError, match="takes a guidance scale, which a LoRA cannot carry"):
        export_lora(str(tmp_path / "student"), tmp_path / "out")


def test_half_precision_files_train_and_export_in_fp32(folder, tmp_path):
    """Encoders whose files are fp16 condition an fp32 U-Net, and what is exported is of one kind."""
    DiffusionPipeline.from_pretrained(folder / "sd").to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    denoiser, info = find_model(f"diffusers:{tmp_path / 'half'}", "teacher")
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert text_encoder(info.source)(["a cat"]).text.dtype == torch.float32
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    export_diffusers(str(tmp_path / "student"), tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe("a cat", num_inference_steps=1, guidance_scale=1, output_type="np").images.std() > 0.05


def test_recomputed_activations_change_no_gradient(folder):
    """And they are recomputed: the U-Net's blocks run once more in the backward pass."""
    weights, calls = [], []
    for frugal in (False, True):
        d, _ = distiller(folder, f"gradient_checkpointing={str(frugal).lower()}", "terms=regress")
        count = []
        convolution = d.student.net.unet.down_blocks[0].resnets[0].conv1
        convolution.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        d.step(0)
        calls.append(len(count))
        weights.append(torch.cat([p.detach().flatten() for p in d.student.parameters()]))
    assert calls == [1, 2]
    assert torch.allclose(*weights, atol=1e-6)


def test_cached_text_trains_as_encoded_text_does(folder, tmp_path):
    plain, _ = distiller(folder)
    cached, _ = distiller(folder, f"prompts.cache={tmp_path}")
    for index in range(2):
        a, b = plain.step(index), cached.step(index)
        for name in ("match/student", "regress/student", "match/fake"):
            assert b[name].item() == pytest.approx(a[name].item(), rel=0.02), name  # half precision on disk
    (file,) = tmp_path.glob("*/text-00000.safetensors")
    assert 0 <= file.stat().st_size - 3 * 77 * 32 * 2 < 1000  # as the preflight says


@pytest.mark.parametrize(
    "changes", [[], ["student.guidance=[1, 4]"], ["student.adapter.rank=2", "regress.decoder=full"]]
)
def test_the_preflight_encodes_one_prompt_and_leaves_nothing(folder, tmp_path, changes, monkeypatch):
    recipe = load_recipe(str(folder / "text.yaml"), [*changes, f"prompts.cache={tmp_path / 'cache'}"])
    encoded, encode = [], TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    found = dict(checks(Flight(recipe, tmp_path / "run", tmp_path / "runs")))
    assert encoded == ["a cat"]
    assert found["teacher"].endswith("samples [4, 8, 8], 3 prompts")
    assert found["losses"] == f"mse, decoder {recipe.regress.decoder}; the gradient reaches the student"
    assert found["prompts"] == f"3, whose states take 14.8 kB in {tmp_path / 'cache'}"  # 3 of 77 x 32 in fp16
    assert found["pictures"] == "64 x 64"
    assert list(tmp_path.iterdir()) == []


def test_a_run_matches_the_guided_teacher_of_its_prompts(folder):
    """The first step's matching loss is that of student and fake equal to the teacher: of guidance alone."""
    d, subject = distiller(folder)
    part = d.draw(0, WHOLE)
    s, r, b = part.starts["noise"], part.starts["pairs"], part.drawn["match"]
    store = d.objective.streams["pairs"].store
    assert torch.equal(r.cond.text, subject.conditions.at(store.draw(0, 0, 2).index).text)
    loss = d.step(0)["match/student"].item()
    teacher = subject.denoiser
    with torch.no_grad():
        z, text = torch.cat([s.z, r.z]), torch.cat([s.cond.text, r.cond.text])
        cond = type(s.cond)(text=text)
        x = teacher(z, torch.full((4,), 999.0), cond)
        x_t = teacher.schedule.add_noise(x, b.eps, b.t)
        plain, empty = teacher(x_t, b.t, cond), teacher(x_t, b.t, cond.null())
        real = empty + 3.0 * (plain - empty)
        w = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        expected = 0.5 * (((plain - real) / w) ** 2).mean().item()
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("count", "told"), [(2, True), (4, False)])
def test_pairs_that_leave_out_prompts_say_so(folder, tmp_path, capsys, count, told):
    recipe = load_recipe(str(folder / "text.yaml"), [f"pairs.count={count}"])
    subject = subjects.subject(recipe)
    store = build.pair_store(recipe, subject, tmp_path)
    assert store.prompts() == ["a cat", "a dog", "a house"]
    said = "They have the first of 3 prompts; if the file is sorted, shuffle it"
    assert (said in " ".join(capsys.readouterr().err.split())) == told


def test_a_run_whose_prompts_were_edited_is_refused(folder, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog\n")
    recipe = load_recipe(
        str(folder / "text.yaml"),
        [f"prompts.path={captions}", "terms=match", "match.pairs=false", "steps=1", "evaluate.every=0"],
    )
    distil(recipe, tmp_path / "run")
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    captions.write_text("a cat\na log\n")
    with pytest.raises(ValueError, match=r"run with other settings:\n  prompts: \w{64} there, \w{64} here\n"):
        distil(recipe, tmp_path / "run")
    captions.write_text("a cat\na dog\n")
    distil(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    told = read_json(tmp_path / "run" / "teacher.json", dict)
    del told["prompts"]  # a run of an earlier version goes on, and is bound from now on
    write_json(tmp_path / "run" / "teacher.json", told)
    distil(recipe, tmp_path / "run")
    assert "prompts" in read_json(tmp_path / "run" / "teacher.json", dict)


def test_a_finished_run_encodes_no_prompts_again(folder, tmp_path, capsys):
    cache = tmp_path / "cache"
    changes = [f"prompts.cache={cache}", "terms=match", "match.pairs=false", "steps=1", "evaluate.every=0"]
    recipe = load_recipe(str(folder / "text.yaml"), changes)
    distil(recipe, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    shutil.rmtree(cache)
    distil(recipe, tmp_path / "run")
    said = capsys.readouterr().out.replace("\n", "")
    assert f"The run in {tmp_path / 'run'} is finished" in said
    then = said.partition("is finished")[2]
    assert f"Next: distmatch sample {tmp_path / 'run'} -p PROMPT, distmatch report" in then
    assert not cache.exists()
    assert weights.stat().st_mtime_ns == before
    (tmp_path / "run" / "teacher-student.png").unlink()  # what a killed run has not made yet is made
    distil(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "teacher-student.png").exists()
    assert any(cache.rglob("*.safetensors"))


def test_what_does_not_fit_is_named(folder, tmp_path):
    for change, message in {
        "prompts.path=null": "makes images of prompts; name a file",
        f"prompts.path={tmp_path / 'none.txt'}": "does not exist",
        f"regress.tiny={tmp_path / 'none'}": "cannot be loaded",
    }.items():
        with pytest.raises(ValueError, match=message):
            distiller(folder, change)
    for change, message in {
        "regress.decoder=tiny": "regress.decoder 'tiny' is for latents",
    }.items():
        recipe = load_recipe("mnist", [change, "pairs.count=2", "pairs.steps=1", f"pairs.path={tmp_path / 'pairs'}"])
        subject = subjects.subject(recipe)
        with pytest.raises(ValueError, match=message):
            build.distiller(recipe, subject, build.pair_store(recipe, subject, tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [("prompts.path=null", "makes images of prompts"), ("prompts.path=none.txt", "none.txt does not exist")],
)
def test_missing_prompts_are_said_before_the_teacher_is_loaded(folder, tmp_path, change, said):
    shutil.copytree(folder / "sd", tmp_path / "sd")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=said):
        distiller(folder, f"teacher=diffusers:{tmp_path / 'sd'}", change)


def test_prompts_that_the_encoder_cuts_are_counted_once_and_written_down(folder):
    """A prompt is cut where more words change nothing: found here by encoding them, there by counting tokens."""
    encoder = text_encoder(str(folder / "sd"))
    limit = encoder.pipeline.tokenizer.model_max_length
    words = next(
        n
        for n in range(1, limit)
        if len(encoder.pipeline.tokenizer("a" + " cat" * (n + 1), truncation=False)["input_ids"]) > limit
    )
    longest, cut = "a" + " cat" * words, "a" + " cat" * (words + 1)
    states = [encoder([text]).text for text in (longest, cut, cut + " dog", longest.removesuffix(" cat"))]
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[3])
    assert encoder.cut([longest, "a cat", "ä" * 20]) == 0
    (folder / "long.txt").write_text(f"a cat\n{longest}\n{cut}\n{cut} dog\n")
    with pytest.warns(Notice, match=rf"^2 of 4 prompts are longer than the {limit} tokens .* number 3, 'a cat cat"):
        subject = subjects.subject(load_recipe(str(folder / "text.yaml"), [f"prompts.path={folder / 'long.txt'}"]))
    assert subject.cut == 2
    recipe = load_recipe(str(folder / "text.yaml"))
    assert build.student_info(recipe, subject).card["prompts"] == {"count": 4, "cut": 2}
