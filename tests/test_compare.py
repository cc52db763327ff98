"""`distmatch compare`: columns are diffusers' own pipelines, their cost is counted, figures are those of Appendix D."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from test_parallel import together
from torch import Tensor

from distmatch.commands import compare, comparison_run, references
from distmatch.commands.comparison import Comparison, lanczos
from distmatch.commands.references import squares
from distmatch.diffusion.denoiser import Cond
from distmatch.evaluation import baselines, measure, spaces
from distmatch.evaluation.baselines import generators, load_lora, load_teacher, methods
from distmatch.evaluation.metrics import Moments, frechet
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import Info, save_model
from distmatch.models.library import find_model
from distmatch.pipeline import DistilledPipeline
from distmatch.system import parallel, rng
from distmatch.system.errors import UserError

PROMPTS = ["the inn of an ant", "a tin hat", "an island in the north"]
SHAPE = (4, 8, 8)
GUIDANCE = 3.0
SCHEDULERS: dict[str, Any] = {
    "DPM-Solver++ 4": (DPMSolverMultistepScheduler, 4, 8),
    "UniPC 4": (UniPCMultistepScheduler, 4, 8),
    "PNDM 50": (None, 50, 102),  # the first of 50 steps takes two calls, guidance two evaluations each
}


class Student:
    """A one-step model with the interface of text-to-image pipelines: prompts give the brightness."""

    denoiser, info, nfe, device = tiny.teacher(), Info(SHAPE, times=(1.0,)), 1, torch.device("cpu")

    def condition(self, n: int, *, prompts: list[str], guidance_scale: float | None = None) -> Cond:
        assert len(prompts) == n
        assert guidance_scale is None
        return Cond(text=torch.tensor([[[len(prompt) / 64]] for prompt in prompts]))

    def make(self, z: Tensor, cond: Cond, noise_of: object = None) -> Tensor:
        assert cond.text is not None
        return z[:, :3] + cond.text[..., None]

    def noise_of(self, seed: int, rows: range) -> None:
        """A student of one step needs none."""

    def decoded(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(8, 2).repeat_interleave(8, 3)


STUDENT: Any = Student()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(write_tiny_sd(tmp_path_factory.mktemp("models") / "sd"))


@pytest.fixture(scope="module")
def lora(teacher, tmp_path_factory) -> str:
    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel.from_pretrained(f"{teacher}/unet")
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "conv1", "proj_in"]))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = str(tmp_path_factory.mktemp("lora"))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.fixture(scope="module")
def columns(teacher, lora):
    pipe = load_teacher(teacher, torch.device("cpu"), torch.float32)
    merged = load_lora(teacher, lora, torch.device("cpu"), torch.float32)
    return pipe, merged, {method.name: method for method in methods(pipe, merged, STUDENT, GUIDANCE)}


def stock(teacher: str, scheduler=None) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_the_order_is_figure_6s(columns):
    assert list(columns[2]) == [
        "student 1", "DPM-Solver++ 4", "UniPC 4", "LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "PNDM 50"
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_column_is_the_stock_pipeline_called_directly(teacher, columns, name):
    scheduler, steps, nfe = SCHEDULERS[name]
    z = rng.noise(5, range(2), SHAPE)
    direct = stock(teacher, scheduler)(
        PROMPTS[:2], num_inference_steps=steps, guidance_scale=GUIDANCE, latents=z.clone()
    ).images
    made = columns[2][name].make(PROMPTS[:2], z)
    assert made.dtype == torch.uint8
    np.testing.assert_array_equal(made.permute(0, 2, 3, 1), array(direct))
    assert made.float().std() > 10
    assert columns[2][name].nfe == nfe


def test_the_columns_differ_and_so_do_the_prompts(columns):
    z = rng.noise(5, range(1), SHAPE)
    made = {name: method.make(PROMPTS[:1], z).float() for name, method in columns[2].items()}
    names = list(made)
    assert all((made[a] - made[b]).abs().mean() > 0.2 for i, a in enumerate(names) for b in names[:i])
    for name, method in columns[2].items():
        assert not torch.equal(method.make(PROMPTS[1:2], z).float(), made[name])


def test_evaluations_are_the_rows_that_go_through_the_unet(columns):
    pipe, merged, named = columns
    rows = []
    hooks = [p.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))) for p in (pipe, merged)]
    for name, method in named.items():
        if name != "student 1":
            rows.clear()
            method.make(PROMPTS, rng.noise(0, range(3), SHAPE))
            assert sum(rows) == 3 * method.nfe, name
    for hook in hooks:
        hook.remove()
    assert [named[f"LCM-LoRA {steps}"].nfe for steps in (1, 2, 4)] == [1, 2, 4]
    assert methods(pipe, None, None, 1.0)[-1].nfe == 51


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_lora_is_diffusers_own_unmerged_and_unguided(teacher, lora, columns, steps):
    pipe = stock(teacher, LCMScheduler)
    pipe.load_lora_weights(lora)
    z = rng.noise(7, range(2), SHAPE)
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "latents": z, "output_type": "pt"}
    direct = pipe(PROMPTS[:2], generator=generators(z), **settings).images
    plain = stock(teacher, LCMScheduler)(PROMPTS[:2], generator=generators(z), **settings).images
    made = columns[2][f"LCM-LoRA {steps}"].make(PROMPTS[:2], z).float() / 255
    torch.testing.assert_close(made, direct, rtol=0, atol=0.51 / 255 + 1e-4)
    assert (made - plain).abs().mean() > 0.01


def test_an_image_does_not_depend_on_its_batch(columns):
    z = rng.noise(0, range(3), SHAPE)
    for method in columns[2].values():
        alone = torch.cat([method.make([prompt], row[None]) for prompt, row in zip(PROMPTS, z, strict=True)])
        assert (method.make(PROMPTS, z).int() - alone.int()).abs().max() <= 1, method.name


def test_sdxl_too(tmp_path):
    folder = str(write_tiny_sd(tmp_path / "sdxl", kind="sdxl"))
    z = rng.noise(0, range(2), SHAPE)
    direct = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    direct.set_progress_bar_config(disable=True)
    expected = direct(PROMPTS[:2], num_inference_steps=50, guidance_scale=GUIDANCE, latents=z.clone()).images
    method = methods(load_teacher(folder, torch.device("cpu"), torch.float32), None, None, GUIDANCE)[-1]
    np.testing.assert_array_equal(method.make(PROMPTS[:2], z).permute(0, 2, 3, 1), array(expected))


def test_lanczos_is_pillows():
    pixels = torch.randint(0, 256, (2, 3, 512, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    direct = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((256, 256), Image.Resampling.LANCZOS) for p in pixels]
    np.testing.assert_array_equal(lanczos(pixels).permute(0, 2, 3, 1), array(direct))


def test_real_images_of_any_size_are_cut_to_the_square_in_their_middle(tmp_path):
    wide = np.zeros((300, 700, 3), np.uint8)
    wide[:, 200:500] = 100
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(np.full((600, 256), 7, np.uint8)).save(tmp_path / "a.jpg", quality=100)
    pixels = squares(tmp_path).pixels
    assert pixels.shape == (2, 3, 256, 256)
    assert pixels[0].eq(7).all()
    assert pixels[1].eq(100).all()
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: c.png"):
        squares(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images; it has no files, expected .*jpeg"):
        squares(tmp_path / "empty")


class Means:
    """A feature space of 2 features, which see the place of a pixel."""

    name = "inception"
    distance = "fid"
    classes = ()
    identity = {"means": 1}  # noqa: RUF012

    def state_dict(self):
        return {}

    def to(self, _):
        return self

    def both(self, pixels: Tensor):
        assert pixels.shape[1:] == (3, 256, 256)
        halves = pixels.float().unflatten(3, (2, 128)).mean((2, 4))
        return torch.cat([halves[:, :1, 0] / 100, halves[:, :1, 1] / 100], 1), None


class Words:
    """Stands for a CLIP score: the mean of the picture's first row, and the prompt's length."""

    def __init__(self, *_):
        pass

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        assert pixels.shape[1:] == (3, 256, 256)
        return pixels[:, :, 0].float().mean((1, 2)) / 255 + torch.tensor([len(prompt) / 100 for prompt in prompts])


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No time for latencies, small feature spaces, and a reference in `real`."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(references, "load_inception", lambda *_: Means())
    monkeypatch.setattr(spaces, "load_inception", lambda *_: Means())
    monkeypatch.setattr(comparison_run, "ClipScore", Words)
    monkeypatch.setattr(references, "reference", partial(references.reference, cache=None))
    monkeypatch.setattr(baselines, "PNDM_STEPS", 5)
    monkeypatch.setattr(baselines, "SOLVERS", {"UniPC 4": baselines.SOLVERS["UniPC 4"]})
    (tmp_path / "real").mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((300, 400)).save(tmp_path / "real" / f"{i}.png")
    return {"features": "inception:w.pth", "reference": tmp_path / "real", "clip": tmp_path / "clip"}


def compared(teacher: str, student: Any, prompts: list[str], out, **settings) -> list[dict[str, Any]]:
    options = {"n": 30_000, "seed": 0, "device": "cpu", **settings}
    return compare.compare_on(prompts, teacher, student, compare.Options(out=out, **{"guidance": 8.0} | options))


def test_figures_are_those_of_the_reduced_images_and_stay_when_it_runs_again(
    teacher, tmp_path, quick, monkeypatch, capsys
):
    out = tmp_path / "out"
    settings = {"guidance": GUIDANCE, "n": 5, "seed": 4, "batch": 2, "picture": 3, **quick}
    rows = compared(teacher, STUDENT, PROMPTS, out, **settings)
    assert [row["name"] for row in rows] == ["student 1", "UniPC 4", "PNDM 5"]
    assert [row["nfe"] for row in rows] == [1, 8, 12]
    assert 0 < rows[0]["ms_per_image"] < rows[1]["ms_per_image"]
    table = capsys.readouterr().out
    assert "FID" in table
    assert "PNDM 5" in table

    said = [PROMPTS[i % 3] for i in range(5)]
    z = rng.noise(4, range(5), SHAPE)
    unipc = stock(teacher, UniPCMultistepScheduler)
    images = unipc(said, num_inference_steps=4, guidance_scale=GUIDANCE, latents=z).images
    small = array([image.resize((256, 256), Image.Resampling.LANCZOS) for image in images])
    ours, real = Moments(), Moments()
    ours.update(Means().both(torch.from_numpy(small).permute(0, 3, 1, 2))[0])
    real.update(Means().both(squares(quick["reference"]).pixels)[0])
    assert rows[1]["fid"] == pytest.approx(frechet(ours.mean, ours.cov, real.mean, real.cov), rel=1e-3)
    scores = Words()(torch.from_numpy(small).permute(0, 3, 1, 2), said)
    assert rows[1]["clip_score"] == pytest.approx(float(scores.mean()), rel=1e-4)
    for i in range(3):
        kept = np.asarray(Image.open(out / "methods" / "unipc-4" / f"{i:06d}.png"))
        assert np.abs(kept.astype(int) - np.asarray(images[i])).max() <= 1
    assert len(list((out / "methods" / "unipc-4").glob("*.png"))) == 3

    written = json.loads((out / "compare.json").read_text())
    assert written["rows"] == rows
    assert written["guidance"] == GUIDANCE
    sheet = np.asarray(Image.open(out / "compare.png"))
    tile = np.asarray(Image.open(out / "methods" / "pndm-5" / "000001.png"))
    assert any(np.array_equal(sheet[y : y + 64, x : x + 64], tile) for y, x in corners(sheet, tile))

    # Interrupted after two methods: they are not made again, and the third is the same as before.
    (out / "methods" / "pndm-5" / "figures.json").unlink()
    made = []
    measured = Comparison.measure
    monkeypatch.setattr(
        Comparison, "measure", lambda self, method, *a: made.append(method.name) or measured(self, method, *a)
    )
    again = compared(teacher, STUDENT, PROMPTS, out, **settings)
    assert made == ["PNDM 5"]
    assert again[:2] == rows[:2]
    assert {**again[2], "ms_per_image": 0} == {**rows[2], "ms_per_image": 0}
    for change in ({"seed": 5}, {"guidance": 4.0}, {"n": 6}):
        with pytest.raises(ValueError, match=rf"other settings:\n  {next(iter(change))}: .* there, .* here"):
            compared(teacher, STUDENT, PROMPTS, out, **(settings | change))
    with pytest.raises(ValueError, match=r"prompts: "):
        compared(teacher, STUDENT, PROMPTS[::-1], out, **settings)
    assert made == ["PNDM 5"]


def corners(sheet: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """Where the first pixel of `tile` could lie in `sheet`."""
    return np.argwhere((sheet[:-63, :-63] == tile[0, 0]).all(2))


def test_a_lora_leaves_the_teachers_columns_as_they_are(teacher, lora, columns):
    z = rng.noise(0, range(1), SHAPE)
    alone = methods(load_teacher(teacher, torch.device("cpu"), torch.float32), None, None, GUIDANCE)
    for method in alone:
        columns[2]["LCM-LoRA 2"].make(PROMPTS[:1], z)
        assert torch.equal(columns[2][method.name].make(PROMPTS[:1], z), method.make(PROMPTS[:1], z))


def test_without_features_only_the_picture_is_made(teacher, tmp_path, quick):
    rows = compared(teacher, None, PROMPTS, tmp_path / "out", n=1000, picture=2)
    assert [set(row) for row in rows] == [{"name", "nfe", "images", "ms_per_image"}] * 2
    assert [row["images"] for row in rows] == [2, 2]


def test_the_last_column_is_tried_before_the_first_is_measured(teacher, tmp_path, quick, monkeypatch):
    def none(*_):
        raise ValueError("no such scheduler")

    found = baselines.methods
    found = comparison_run.methods
    monkeypatch.setattr(comparison_run, "methods", lambda *a: [*found(*a)[:1], baselines.Method("last", 1, none)])
    with pytest.raises(ValueError, match="no such scheduler"):
        compared(teacher, None, PROMPTS, tmp_path / "out", n=8, picture=2, **quick)
    assert not (tmp_path / "out" / "methods").exists()


def _compare_with_others(teacher: str, out, settings: dict[str, Any]) -> None:
    with parallel.process_group():
        rows = compared(teacher, STUDENT, PROMPTS, out, **settings)
        assert bool(rows) == (parallel.rank() == 0)


def test_two_processes_give_the_figures_and_pictures_of_one(teacher, tmp_path, quick):
    settings = {"guidance": GUIDANCE, "n": 5, "batch": 1, "picture": 3, **quick}
    rows = compared(teacher, STUDENT, PROMPTS, tmp_path / "1", **settings)
    together(2, _compare_with_others, teacher, tmp_path / "2", settings)
    shared = json.loads((tmp_path / "2" / "compare.json").read_text())["rows"]
    assert [{**row, "ms_per_image": 0} for row in shared] == [{**row, "ms_per_image": 0} for row in rows]
    names = sorted(file.relative_to(tmp_path / "1") for file in (tmp_path / "1" / "methods").rglob("*.png"))
    assert len(names) == 9
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


def test_refusals(teacher, tmp_path, quick):
    def refused(message: str, teacher: str = teacher, student: Any = None, prompts=PROMPTS, **settings):
        with pytest.raises(ValueError, match=message):
            compared(teacher, student, prompts, tmp_path / "out", **({"picture": 1} | settings))

    refused("there are no prompts", prompts=[])
    refused("guidance 0.5 is below 1", guidance=0.5)
    refused("1 <= picture <= n", n=3, picture=4)
    refused(r"model '.*nowhere' cannot be loaded: .*Give a folder in diffusers' format", str(tmp_path / "nowhere"))
    other = Student()
    other.info = Info((1, 8, 8), times=(1.0,))
    refused(r"student makes samples of shape \(1, 8, 8\) and the teacher .* of \(4, 8, 8\)", student=other)
    refused("LoRA '.*nowhere' cannot be loaded .*latent-consistency/lcm-lora-sdv1-5", lora=str(tmp_path / "nowhere"))
    refused("features 'mnist': give inception:FILE for FID, or efficientnet", features="mnist")
    refused("come without a reference; name one with --reference", features="inception:w.pth")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refused("odd is a FluxPipeline; compare runs the solvers of Stable Diffusion", str(tmp_path / "odd"))


def test_a_students_column_is_its_pipeline(teacher, tmp_path, quick):
    denoiser, info = find_model(f"diffusers:{teacher}", "teacher")
    save_model(tmp_path / "student", denoiser, replace(info, times=(denoiser.schedule.t_max,)))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    command(teacher, str(tmp_path / "student"), tmp_path / "out", prompts=str(tmp_path / "p.txt"), seed=6, batch=2)
    direct = DistilledPipeline.from_pretrained(tmp_path / "student")(prompts=PROMPTS, seed=6, batch=2).images
    folder = tmp_path / "out" / "methods" / "student-1"
    np.testing.assert_array_equal(array([Image.open(folder / f"{i:06d}.png") for i in range(3)]), array(direct))
    assert array(direct).std() > 10
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [(row["name"], row["nfe"]) for row in rows] == [("student 1", 1), ("UniPC 4", 8), ("PNDM 5", 12)]
    alone = {"prompts": str(tmp_path / "p.txt"), "seed": 6, "batch": 2, "only_student": True}
    command(teacher, str(tmp_path / "student"), tmp_path / "alone", **alone)
    (row,) = json.loads((tmp_path / "alone" / "compare.json").read_text())["rows"]
    same = tmp_path / "alone" / "methods" / "student-1" / "000001.png"
    assert (row["name"], same.read_bytes()) == ("student 1", (folder / "000001.png").read_bytes())
    with pytest.raises(ValueError, match="only_student"):  # the folder keeps its other methods
        command(teacher, str(tmp_path / "student"), tmp_path / "out", **alone)
    with pytest.raises(ValueError, match="--only-student: give a student"):
        command(teacher, None, tmp_path / "none", **alone)


def command(teacher: str, student: str | None, out, **changes) -> None:
    settings = {"guidance": 8.0, "seed": 0, "batch": 2, "device": "cpu", **changes}
    compare.compare(teacher, student, options=compare.Options(out=out, **settings))


def test_an_option_without_effect_is_refused(tmp_path):
    coco, file = tmp_path / "captions.json", tmp_path / "p.txt"
    for said, given in {
        "-n 12: without --features or --clip .* only the 7 images .*; .* or give --picture 12 ": {"n": 12},
        "--reference .*real is what --features are compared with": {"reference": tmp_path / "real"},
        "--prompts .*p.txt and --coco .* both name the prompts": {"coco": coco},
        "--column said is of a file of prompts": {"column": "said", "prompts": str(tmp_path)},  # a folder of pictures
        "--column said is of a file of prompts; name that": {"column": "said", "prompts": "coco", "coco": coco},
        "--split train is of a folder of captioned pictures": {"split": "train"},
        "--clip-model ViT-B-32 is a name for the weights of --clip": {"clip_model": "ViT-B-32"},
        "--only-student leaves out --lora lcm, too": {"lora": "lcm", "only_student": True},
    }.items():
        with pytest.raises(UserError, match=said):
            command("sd", None, tmp_path, **{"prompts": str(file), **given})


def test_the_command_reads_prompts_and_draws_cocos_captions(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(compare, "compare_on", lambda prompts, *_: calls.append((prompts, _[2])))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    command("sd", None, tmp_path, prompts=str(tmp_path / "p.txt"), precision="bf16")
    assert calls[0][0] == PROMPTS
    assert (calls[0][1].n, calls[0][1].picture, calls[0][1].precision) == (3, 3, "bf16")
    captions = [{"caption": f"caption {i}"} for i in range(40)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    command("sd", None, tmp_path, coco=tmp_path / "captions.json", n=12, clip=tmp_path / "clip.pt")
    assert len(set(calls[1][0])) == calls[1][1].n == 12
    with pytest.raises(ValueError, match=r"no prompts: .* --prompts FILE_OR_FOLDER, .*--coco captions_val2014.json"):
        command("sd", None, tmp_path)
