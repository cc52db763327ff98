"""What would fail late fails before any pair is built, says what to do, and leaves nothing behind."""

import copy
import re
import shutil
import sys
import types
from pathlib import Path
from weakref import WeakSet

import graphs
import pytest
import tiny
import torch
from test_parallel import together
from torch import nn

from distmatch import EDM, Denoiser, Info, Prediction
from distmatch.commands.cli import app
from distmatch.commands.distillation import check, distil
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, fingerprint
from distmatch.models.folder import save_model
from distmatch.planning import preflight, recording
from distmatch.planning.preflight import CHECKS, Flight, checks, compiler, pairs
from distmatch.recipe import subjects
from distmatch.recipe.entries import Recipe
from distmatch.recipe.loading import load_recipe
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.files import scratch, sweep


def recipe(**changes) -> Recipe:
    tree = {"name": "own", "teacher": "mine", "steps": 2, "match": {"batch": 2}, "regress": {"batch": 2}}
    return Recipe.model_validate({**tree, "pairs": {"count": 4, "steps": 2}, "device": "cpu", **changes})


class Scaled(nn.Module):
    """`x0 = a x`, a network of one's own; the subclasses are what goes wrong with such networks."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((), 0.5))

    def forward(self, x, noise, cond):
        return self.a * x


class OtherShape(Scaled):
    def forward(self, x, noise, cond):
        return self.a * x[:, :, :4]


class NotFinite(Scaled):
    def forward(self, x, noise, cond):
        return self.a * x / 0


class Broken(Scaled):
    def forward(self, x, noise, cond):
        return self.a * x @ torch.zeros(3, 3)


class WithoutGraph(Scaled):
    @torch.no_grad()
    def forward(self, x, noise, cond):
        return self.a * x


class NoCopy(Scaled):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'module' object")


class Tied(Scaled):
    """Two names for overlapping numbers, which safetensors cannot hold."""

    def __init__(self):
        super().__init__()
        both = torch.ones(3)
        self.register_buffer("left", both[:2])
        self.register_buffer("right", both[1:])


class ManyBits(Scaled):
    """A counter beyond what a float holds; a model's weights are saved as floats."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(2**24 + 1))


class ExtraState(Scaled):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def mine(net: type[nn.Module] = Scaled, shape: tuple[int, ...] = (1, 8, 8)) -> tuple[Denoiser, Info]:
    return Denoiser(net(), EDM(), Prediction("x0")), Info(shape=shape)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (OtherShape, r"the teacher, one sample, cannot be made: RuntimeError|makes a sample of shape"),
        (NotFinite, r"the teacher makes a sample that is not finite"),
        (Broken, r"the teacher, one sample, cannot be made: RuntimeError: .*8.*3"),
        (WithoutGraph, r"the gradient, of one sample, cannot be made: RuntimeError|no gradient reaches the student"),
        (NoCopy, r"a copy of the network to train, cannot be made: TypeError: cannot pickle 'module' object"),
        (Tied, r"the student's folder, cannot be made: .*[Ss]ome tensors share memory|network Tied"),
        (ManyBits, r"network ManyBits is not the same after it was saved and loaded: net.count differs"),
        (ExtraState, r"the state of ExtraState holds more than tensors"),
    ],
)
def test_networks_that_cannot_be_distilled(net, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distil(recipe(), tmp_path / "run", tmp_path, teacher=mine(net))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "pairs").exists()


def _other_student(folder: Path) -> dict:
    denoiser, info = mine()
    denoiser.net.b = nn.Parameter(torch.ones(()))
    save_model(folder / "other", denoiser, Info(shape=info.shape, times=(80.0,)))
    return {"student": {"init": str(folder / "other")}}


def _other_pairs(folder: Path) -> dict:
    """The second stage's pairs are in a folder that has those of another teacher."""
    theirs = Denoiser(Scaled(), EDM(), Prediction("edm"))
    spec = PairSpec("mine", fingerprint(theirs), "heun", 2, 1.0, 0, 4, 1024, (1, 8, 8), 0, "float32")
    build(folder / "taken", spec, theirs)
    change = {"pairs.path": str(folder / "taken")}
    return {"stages": [{"until": 1}, {"until": 2, "change": change}]}


def _bad_weights(folder: Path) -> dict:
    """LPIPS comes in the second stage, and its file is none."""
    (folder / "weights").mkdir()
    for name in ("vgg16-397923af.pth", "lpips_weights.pt"):
        (folder / "weights" / name).write_bytes(b"no weights")
    change = {"regress.loss": "lpips", "regress.weights": str(folder / "weights")}
    return {"stages": [{"until": 1}, {"until": 2, "change": change}]}


def _a_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file" / "below")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda f: {"match": {"batch": 2}, "accumulate": 3}, r"match.batch 2 is not a multiple of accumulate 3"),
        (_other_student, r"student.init|network of its owner's"),
        (_other_pairs, r"taken holds other pairs \(teacher 'mine' there"),
        (_bad_weights, r"lpips_weights.pt cannot be read"),
        (lambda f: {"student": {"t": 800.0}}, r"student.times is 800; expected times above"),
        (lambda f: {"match": {"batch": 2, "guidance": 3.0}}, r"guidance 3: this model has neither classes nor prompts"),
        (lambda f: {"terms": ["match"], "pairs": {"sampler": "pndm"}}, r"pndm is for the schedules of discrete"),
        (lambda f: {"gradient_checkpointing": True}, r"Scaled has none: use false"),
        (lambda f: {"pairs": {"count": 4, "path": _a_file(f)}}, r"Not a directory: .*below"),
        (lambda f: {"evaluate": {"every": 1, "features": "absent"}}, r"features 'absent'"),
        (lambda f: {"pairs": {"count": 10**12, "steps": 2}}, r"free, and the run writes 256.0 TB: .*pairs.count"),
        (lambda f: {"log": {"track": ["wandb"]}}, r"recipe own needs wandb .*: pip install 'distmatch\[wandb\]'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipes_that_would_fail_late(changes, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    changed = recipe(**changes(tmp_path))
    with pytest.raises((ValueError, OSError), match=message):
        distil(changed, tmp_path / "run", tmp_path / "runs", teacher=mine())
    assert not list((tmp_path / "run").rglob("*")) or list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "runs").exists()


class AsksForANumber(Scaled):
    """As networks do whose texts have several lengths."""

    def forward(self, x, noise, cond):
        return self.a * x if x.mean().item() < 1e6 else x


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded as on a GPU; what of them is still there."""
    made = WeakSet()

    def record(*inputs):
        with graphs.on_a_cpu():
            return recording.record(*inputs)

    def distiller(*inputs):
        one = build_distiller(*inputs)
        made.add(one)
        return one

    build_distiller = recording.build.distiller
    monkeypatch.setattr(recording.build, "distiller", distiller)
    monkeypatch.setattr(preflight, "record", record)
    monkeypatch.setattr(subjects, "records_graphs", lambda recipe, device: recipe.cuda_graphs)
    return made


def test_a_step_that_cannot_be_recorded_is_refused_before_the_pairs(recorded, tmp_path):
    for run in (check, distil):
        with pytest.raises(UserError, match=r"cannot be recorded .* stream is capturing, at .*cuda_graphs=false"):
            run(recipe(cuda_graphs=True), tmp_path / "run", tmp_path / "runs", mine(AsksForANumber))
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_recording_tries_every_objective_changes_nothing_and_leaves_nothing(recorded, tmp_path):
    """The second stage computes the same as the first; the third does not."""
    changes = [{"match.weight": 2}, {"terms": ["match"]}]
    stages = [{"until": 1}, *({"until": 2 + n, "change": change} for n, change in enumerate(changes))]
    teacher = mine()
    stepwise = recipe(cuda_graphs=True, steps=3, stages=stages, fake={"steps": 3})
    flight = Flight(stepwise, tmp_path / "run", tmp_path / "runs", teacher)
    before = copy.deepcopy(teacher[0].state_dict())
    assert dict(checks(flight))["recording"] == "2 steps recorded and replayed"
    assert not len(recorded)
    for network in (teacher[0], flight.student):
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_nothing_is_recorded_on_a_cpu(tmp_path):
    flight = Flight(recipe(cuda_graphs=True), tmp_path / "run", tmp_path / "runs", mine(AsksForANumber))
    assert "recording" not in dict(checks(flight))


def test_a_folder_that_cannot_be_made_and_channels_that_no_picture_has(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"below"):
        check(recipe(), Path(_a_file(tmp_path)), tmp_path / "runs", mine())
    with pytest.raises(ValueError, match="samples have 5 channels; a run shows them as pictures, of 1 or 3"):
        check(recipe(), tmp_path / "run", tmp_path / "runs", mine(shape=(5, 8, 8)))


@pytest.mark.parametrize(
    "command", ["eval mnist -n 20000 --features mnist -o", "report {run} -o"], ids=lambda command: command.split()[0]
)
def test_a_file_that_cannot_be_written_is_found_before_the_work(command, tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("it has begun")

    monkeypatch.setattr("distmatch.commands.eval.find_pipeline", work)
    monkeypatch.setattr("distmatch.commands.report_page._load", work)
    for out, message in (
        (tmp_path, "is a folder; expected the name of a file"),
        (_a_file(tmp_path), "Not a directory"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            app([*command.format(run=tmp_path).split(), str(out)], exit_on_error=False, result_action="return_value")


def test_a_tracker_without_a_key_is_found_at_the_start(tmp_path, monkeypatch):
    def login():
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    with pytest.raises(ValueError, match=r"wandb cannot start: No API key configured\. Run `wandb login`"):
        check(recipe(log={"track": ["wandb"]}), tmp_path / "run", tmp_path / "runs", mine())


def test_a_missing_compiler_is_found_at_the_start(tmp_path, monkeypatch):
    def compiled(function, dynamic):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    flight = Flight(recipe(compile=True), tmp_path / "run", tmp_path / "runs", mine())
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert compiler(flight) == "compiles a first function"
    monkeypatch.setattr(torch, "compile", compiled)
    message = (
        "compile: true, which needs a C.. compiler .*: a first function, cannot be made: .*No working C.. .*found$"
    )
    with pytest.raises(UserError, match=message):
        compiler(flight)


def test_pairs_that_are_fewer_than_a_batch_are_told(tmp_path):
    few = Flight(recipe(pairs={"count": 1, "steps": 2}), tmp_path / "run", tmp_path / "runs", mine())
    assert str(pairs(few)).endswith(
        "0 of 1 shard there, fewer than regress.batch, so some pairs appear twice in a batch"
    )
    enough = Flight(recipe(), tmp_path / "run", tmp_path / "runs", mine())
    assert str(pairs(enough)).endswith("0 of 1 shard there")


def test_the_disk_is_asked_for_what_is_still_to_be_written(tmp_path, monkeypatch):
    """Two states of 5 numbers and 3 of the fake score's ... are nothing beside the pairs: 4 of 8 x 8 x 4 bytes."""
    free = {"bytes": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free["bytes"]))
    asked = recipe()
    pairs = 4 * 8 * 8 * 4
    checkpoints = 3 * (2 + 2 + 3) * 4  # of one weight: student and average, two of Adam, three of the fake score
    free["bytes"] = pairs + checkpoints + 4  # and the student's folder
    check(asked, tmp_path / "run", tmp_path / "runs", mine())
    free["bytes"] -= 1
    with pytest.raises(ValueError, match="free, and the run writes"):
        check(asked, tmp_path / "run", tmp_path / "runs", mine())


def test_check_says_what_it_found_and_leaves_nothing(tmp_path, capsys):
    file = tiny.recipe_file(tmp_path, log={"every": 2, "track": []})
    before = sorted(tmp_path.rglob("*"))
    app(["train", str(file), "--check", "--runs", str(tmp_path / "runs")], result_action="return_value")
    told = capsys.readouterr().out.splitlines()
    found = dict(checks(Flight(load_recipe(str(file)), tmp_path / "runs" / "tiny", tmp_path / "runs")))
    assert [line.split()[:2] for line in told[:-1]] == [["✓", name] for name in found]
    assert found.keys() == {c.__name__ for c in CHECKS} - {
        *("packages", "trackers", "compiler", "recording", "reference", "prompts")
    }
    assert found["saving"].endswith("equal when read")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_the_same_with_its_preflight(tmp_path):
    """The teacher's weights, the random numbers and the student's gradients are as if nothing had been tried."""
    flight = Flight(recipe(), tmp_path / "run", tmp_path / "runs", mine())
    state = torch.get_rng_state()
    list(checks(flight))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in (*flight.student.parameters(), *flight.fake.parameters()))
    assert flight.subject.denoiser.net.a.item() == 0.5


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    with scratch(tmp_path / "not" / "there") as place:
        assert place.parent == tmp_path
        (place / "model.safetensors").touch()
        left = shutil.copytree(place, tmp_path / re.sub(r"-\d+-", "-999999-", place.name))
    assert list(tmp_path.iterdir()) == [left]
    sweep(tmp_path, age=3600)
    assert list(tmp_path.iterdir()) == []


def _one_fails() -> int:
    if parallel.rank() == 1:
        raise UserError("no such file")
    return parallel.rank()


def _agree(folder: Path) -> None:
    with parallel.process_group():
        with pytest.raises(parallel.Agreed, match="process 1 of 2: no such file"):
            parallel.agreed(_one_fails)
        assert parallel.agreed(parallel.rank) == parallel.rank()
        (folder / str(parallel.rank())).touch()


def test_all_processes_stop_where_one_has_a_problem(tmp_path):
    together(2, _agree, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]
