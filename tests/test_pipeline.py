"""Making images: seeds, labels, the package's own models, the folder format."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import graphs
import numpy as np
import pytest
import tiny
import torch
from forked import command
from PIL import Image

import distmatch.pipeline
from distmatch import EDM, Denoiser, DistilledPipeline, Prediction, TeacherPipeline
from distmatch.commands import sample as sampling
from distmatch.data.imaging import grid, to_uint8
from distmatch.diffusion.conditions import Classes
from distmatch.diffusion.denoiser import Cond
from distmatch.models.family import Components
from distmatch.models.folder import Info, load_model, save_model
from distmatch.models.library import find_model
from distmatch.pipeline import side_by_side
from distmatch.system import rng
from distmatch.system.errors import UserError
from distmatch.system.files import write_json
from distmatch.system.plain import read_json


@pytest.fixture
def student(tmp_path):
    save_model(tmp_path / "student", tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    return tmp_path / "student"


def test_one_evaluation_at_the_students_time(student):
    pipe = DistilledPipeline.from_pretrained(student)
    z = rng.noise(5, range(4), (1, 8, 8))
    expected = tiny.teacher()(80.0 * z, torch.full((4,), 80.0), Cond(label=torch.tensor([0, 1, 2, 0])))
    assert torch.equal(pipe(4, seed=5).pixels, to_uint8(expected))
    assert pipe.nfe == 1


def test_image_i_of_a_seed_is_the_same_whatever_the_batch(student):
    pipe = DistilledPipeline.from_pretrained(student)
    whole = pipe(10, seed=3, labels=1).pixels
    assert torch.equal(whole, pipe(10, seed=3, labels=1, batch=3).pixels)
    assert torch.equal(whole[:4], pipe(4, seed=3, labels=[1] * 4).pixels)
    assert torch.equal(whole, pipe(10, seed=3, labels="b").pixels)
    assert not torch.equal(whole, pipe(10, seed=4, labels=1).pixels)


def test_images_are_pillow_images_of_the_pixels(student):
    output = DistilledPipeline.from_pretrained(student)(2)
    assert np.array_equal(np.asarray(output.images[1]), output.pixels[1, 0].numpy())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (3, "out of range; the 3 classes count from 0"),
        ("d", "label 'd' is unknown; expected one of a, b, c"),
        ([0, 1], "2 labels for 4 images"),
        ("-1", "out of range; the 3 classes count from 0"),
        ("3", "out of range; the 3 classes count from 0"),
    ],
)
def test_bad_labels_are_named(student, labels, message):
    with pytest.raises(ValueError, match=message):
        DistilledPipeline.from_pretrained(student)(4, labels=labels)


def test_a_number_in_text_is_a_name_where_classes_are_called_by_numbers(student):
    pipe = DistilledPipeline.from_pretrained(student)
    assert pipe.condition(2, labels="1").label.tolist() == [1, 1]
    pipe.info = replace(pipe.info, classes=("0", "10", "2"))
    assert pipe.condition(2, labels="2").label.tolist() == [2, 2]
    with pytest.raises(UserError, match="label '1' is unknown; expected one of 0, 10, 2"):
        pipe.condition(2, labels="1")


def test_models_survive_the_folder(tmp_path):
    teacher = tiny.teacher()
    save_model(tmp_path, teacher, tiny.INFO)
    loaded, info = load_model(tmp_path)
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 5.0]), Cond(label=torch.tensor([0, 2]))
    assert torch.equal(loaded(x, t, cond), teacher(x, t, cond))
    assert info == tiny.INFO


def test_foreign_and_damaged_folders_are_named(tmp_path, student):
    with pytest.raises(ValueError, match="is a student; a teacher is needed here"):
        TeacherPipeline.from_pretrained(student)
    with pytest.raises(ValueError, match="neither a model folder nor a run; the package ships emoji, mnist"):
        DistilledPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mixture 'x' is unknown"):
        find_model("mixture:x", "teacher")
    config = read_json(student / "config.json", dict)
    write_json(student / "config.json", {**config, "format": "other"})
    with pytest.raises(ValueError, match="has format 'other'"):
        load_model(student)
    write_json(student / "config.json", config)
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        load_model(student)


def test_the_shipped_models_make_digits_of_the_asked_class():
    """The student from one evaluation, the teacher from 35, judged by the shipped classifier."""
    from distmatch.models.classifier import Classifier
    from distmatch.system.paths import ASSETS

    classifier = Classifier.load(ASSETS / "mnist" / "classifier")
    labels = torch.arange(200) % 10
    for pipe, n in ((DistilledPipeline.from_pretrained("mnist"), 200), (TeacherPipeline.from_pretrained("mnist"), 30)):
        pixels = pipe(n, seed=11).pixels
        assert (classifier(pixels).argmax(1) == labels[:n]).float().mean() >= 0.9


def test_sample_command_writes_the_pipelines_images(tmp_path, student):
    done = command("sample", student, "-n", 5, "--seed", 2, "--label", "c", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pixels = DistilledPipeline.from_pretrained(student)(5, labels="c", seed=2).pixels
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{i:06d}.png")), pixels[i, 0].numpy())
    assert (tmp_path / "out" / "grid.png").exists()
    wrong = command("sample", "mnits")
    assert wrong.returncode == 2
    assert "did you mean 'mnist'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def pictures(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def test_one_image_is_called_one(tmp_path, student, capsys):
    for n, said in ((1, "1 image,"), (2, "2 images,")):
        sampling.sample(str(student), sampling.Options(n=n, out=tmp_path / "out", device="cpu"))
        printed = capsys.readouterr()
        assert f"{said} 1 evaluation each, in" in printed.out
        assert f"sample: {n} of {said}" in f"{printed.err.splitlines()[-1]},"
    with pytest.raises(ValueError, match="2 labels for 1 image; give one"):
        DistilledPipeline.from_pretrained(student)(1, labels=[0, 1])


@pytest.mark.parametrize("name", ["recipe.yaml", "settings.json", "checkpoints/step-5", "model", "config.json"])
def test_pictures_are_not_mixed_with_the_files_of_a_run(name, tmp_path, student):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"run is the folder of a run or a model: it holds .*{name}. Choose .* --out"):
        sampling.sample(str(student), sampling.Options(n=1, out=run, device="cpu"))
    assert [path.name for path in run.iterdir()] == [name.partition("/")[0]]
    sampling.sample(str(student), sampling.Options(n=1, out=run / "samples", device="cpu"))


def test_a_sample_call_replaces_the_pictures_of_an_earlier_one_and_no_others(tmp_path, student):
    def sample(n: int, out=tmp_path / "out", seed: int = 0) -> None:
        sampling.sample(str(student), sampling.Options(n=n, seed=seed, out=out, device="cpu"))

    sample(5, seed=1)
    sample(2)
    assert pictures(tmp_path / "out") == ["000000.png", "000001.png", "grid.png"]
    pixels = DistilledPipeline.from_pretrained(student)(2, seed=0).pixels
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "000001.png")), pixels[1, 0].numpy())
    made = read_json(tmp_path / "out" / "sample.json", dict)
    assert (made["n"], made["seed"], made["model"]) == (2, 0, str(student))
    (tmp_path / "out" / "holiday.png").touch()
    sample(1)
    assert pictures(tmp_path / "out") == ["000000.png", "grid.png", "holiday.png"], "what is ours alone goes"
    (tmp_path / "out" / "000007.png").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "grid.png").touch()
    for out, name in ((tmp_path / "out", "000007.png"), (tmp_path / "old", "grid.png")):
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(ValueError, match=f"{out} holds {name}, which is not of the call that sample.json"):
            sample(8, out)
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


class Own(torch.nn.Module):
    """A network that the package does not know."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, noise, cond):
        return self.scale * x


def test_a_network_of_ones_own_is_saved_and_asked_for(tmp_path):
    denoiser = Denoiser(Own(), EDM(), Prediction("edm"))
    torch.nn.init.constant_(denoiser.net.scale, 0.25)
    save_model(tmp_path, denoiser, Info((1, 8, 8), times=(80.0,)))
    with pytest.raises(ValueError, match=r"a network of its owner's, Own; pass one"):
        DistilledPipeline.from_pretrained(tmp_path)
    pipe = DistilledPipeline.from_pretrained(tmp_path, net=Own())
    z = rng.noise(0, range(2), (1, 8, 8))
    assert torch.equal(pipe.sample(z), denoiser(80.0 * z, torch.full((2,), 80.0)))


def test_teacher_and_student_side_by_side_are_of_the_same_noise(student):
    """Rows in turn, whatever the pipelines' own batches: image i of seed 2, of class i modulo 3."""
    fast = DistilledPipeline.from_pretrained(student)
    slow = TeacherPipeline(tiny.teacher(1), Info((1, 8, 8), ("a", "b", "c")), steps=3)
    taught, learnt = (pipe(12, labels=[i % 3 for i in range(12)], seed=2, batch=5).pixels for pipe in (slow, fast))
    rows = [part[3 * row : 3 * row + 3] for row in range(4) for part in (taught, learnt)]
    picture, _ = side_by_side(slow, fast, Classes(3), columns=3)
    assert np.array_equal(picture, grid(torch.cat(rows), columns=3))


def test_side_by_side_without_classes():
    slow = TeacherPipeline(tiny.teacher(1), Info((1, 8, 8)), steps=2)
    fast = DistilledPipeline(tiny.teacher(), Info((1, 8, 8), times=(80.0,)))
    rows = [p.pixels(range(4), None, seed=2)[[i]] for i in range(4) for p in (slow, fast)]
    picture, varied = side_by_side(slow, fast, Classes(0), columns=1)
    assert np.array_equal(picture, grid(torch.cat(rows), columns=1))
    taught, learnt = (p.pixels(range(4), None, seed=2).double() for p in (slow, fast))
    assert varied == pytest.approx((learnt.var(0).mean() / taught.var(0).mean()).sqrt().item(), rel=1e-5)


class Decode(torch.nn.Module):
    """Doubles the side, for one image at a time."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.ConvTranspose2d(1, 1, 2, stride=2)

    def forward(self, x):
        assert len(x) == 1
        return self.layer(x)


def test_a_compiled_student_makes_the_same_images(monkeypatch):
    """Traced only, as inductor takes the suite too long: it gave the same to 2e-7 and needed 14 seconds."""
    tried = []
    monkeypatch.setattr(distmatch.pipeline, "try_compiler", tried.append)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    parts, info = Components(decode=Decode()), Info((1, 8, 8), ("a", "b", "c"), times=(80.0, 5.0))
    plain = DistilledPipeline(tiny.teacher(), info)
    fast = DistilledPipeline(tiny.teacher(), info, parts, compile=True)
    assert tried == [torch.device("cpu")]
    z, cond = rng.noise(5, range(3), (1, 8, 8)), plain.condition(3)
    with torch.inference_mode():
        expected = parts.decode.layer(plain.sample(z, cond))
    torch.testing.assert_close(fast.sample(z, cond), expected, rtol=1e-4, atol=1e-5)
    assert fast.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()


def test_what_a_compiled_network_returned_outlives_the_next_call(monkeypatch):
    """CUDA graphs, imitated: every call writes its answer to the same memory."""
    memory = torch.empty(2, 1, 8, 8)
    monkeypatch.setattr(distmatch.pipeline, "try_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda network, **how: lambda *inputs: memory.copy_(network(*inputs)))
    info = Info((1, 8, 8), ("a", "b", "c"), times=(80.0,))
    fast = DistilledPipeline(Denoiser(tiny.teacher().net, EDM(), Prediction("x0")), info, compile=True)
    plain = DistilledPipeline(fast.denoiser, info)
    z = rng.noise(5, range(2), (1, 8, 8))
    first = fast.sample(z, fast.condition(2))
    fast.sample(-z, fast.condition(2))
    assert torch.equal(first, plain.sample(z, plain.condition(2)))


def test_recorded_images_are_those_of_every_condition_noise_and_batch():
    """Two steps and a decoder, by the stand-in of a GPU: what was recorded gets other inputs, and keeps no answer."""
    torch.manual_seed(0)
    parts, info = Components(decode=Decode().layer), Info((1, 8, 8), ("a", "b", "c"), times=(80.0, 5.0))
    plain = DistilledPipeline(tiny.teacher(), info, parts)
    fast = DistilledPipeline(plain.denoiser, info, parts, cuda_graphs=True)
    made, expected = [], []
    for n, label, seed in ((3, 0, 0), (1, 1, 1), (3, 2, 2), (3, 0, 0)):
        z, cond = rng.noise(seed, range(n), (1, 8, 8)), plain.condition(n, labels=label)
        expected.append(plain.sample(z, cond, plain.noise_of(seed, range(n))))
        with graphs.on_a_cpu():
            made.append(fast.sample(z, cond, fast.noise_of(seed, range(n))))
    assert fast._recorded is not None
    assert [graph.graph.replays for graph in fast._recorded._graphs.values()] == [3, 1]
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recording_goes_on_to_8_bits_and_says_which_images_are_not_finite(precision):
    info = Info((1, 8, 8), ("a", "b", "c"), times=(80.0, 5.0))
    plain, fast = (
        DistilledPipeline(tiny.teacher(), info, cuda_graphs=recorded, precision=precision) for recorded in (False, True)
    )
    z, cond = rng.noise(0, range(4), (1, 8, 8)), plain.condition(4)
    broken = z.clone()
    broken[2:] = torch.nan
    expected = plain.render(z, cond)
    with graphs.on_a_cpu():
        for _ in range(2):
            assert torch.equal(fast.render(z, cond), expected)
            with pytest.raises(UserError, match=r"^2 of 4 images of a batch, first number 2, are not finite"):
                fast.render(broken, cond)
    assert fast._recorded is not None
    (recorded,) = fast._recorded._graphs.values()
    assert recorded.graph.replays == 4
    assert [one.dtype for one in recorded.made] == [torch.float32, torch.uint8, torch.bool]


def test_where_nothing_is_recorded_the_images_are_the_same(student):
    plain, fast = (DistilledPipeline.from_pretrained(student, cuda_graphs=recorded) for recorded in (False, True))
    assert torch.equal(plain(5, labels=1, seed=3).pixels, fast(5, labels=1, seed=3).pixels)


@pytest.mark.parametrize(("recorded", "mode"), [(False, "reduce-overhead"), (True, None)])
def test_a_compiled_pipeline_that_is_recorded_has_no_graphs_within_its_graph(recorded, mode, monkeypatch):
    modes = []
    monkeypatch.setattr(distmatch.pipeline, "try_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda network, mode, dynamic: modes.append(mode) or network)
    plain, somewhere = tiny.teacher(), SimpleNamespace(device=torch.device("cuda"))
    on_gpu: Any = SimpleNamespace(parameters=lambda: iter([somewhere]), **vars(plain), net=plain.net)
    distmatch.pipeline._compiled(on_gpu, Components(), recorded)
    assert modes == [mode]


def test_without_a_compiler_compile_is_refused_at_once(student, monkeypatch):
    def fails(device):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(distmatch.pipeline, "try_compiler", fails)
    with pytest.raises(
        UserError, match=r"needs a C\+\+ compiler.*No working C\+\+ compiler found\. Install.*leave compile"
    ):
        DistilledPipeline.from_pretrained(student, compile=True)


@pytest.mark.parametrize(
    ("beside", "command"),
    [({}, "teach"), ({"cat/1.txt": "a cat"}, "teach-text"), ({"metadata.jsonl": '{"text": "a cat"}'}, "teach-text")],
)
def test_a_folder_of_images_is_told_to_be_taught(tmp_path, beside, command):
    (tmp_path / "cat").mkdir()
    for file, text in {"cat/1.png": "", **beside}.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"holds images, not a model; .*distmatch {command} {tmp_path}"):
        DistilledPipeline.from_pretrained(str(tmp_path))
