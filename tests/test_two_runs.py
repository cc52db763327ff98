"""Two jobs and one folder: one has it, the other is told who does, and what is left by the dead is in nobody's way."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from forked import Forked, fork

from distmatch.commands import cli, compare, distillation
from distmatch.commands.distillation import distil
from distmatch.data import pair_builder
from distmatch.models.folder import load_model
from distmatch.recipe.loading import load_recipe, run_name
from distmatch.system import claims, ownership
from distmatch.system.claims import latest
from distmatch.system.ownership import owned
from distmatch.system.process import identity, is_dead
from distmatch.system.storage import Folder
from distmatch.training.log import read

SHORT = {
    "steps": 4,
    "match": {"batch": 4},
    "regress": {"batch": 2, "weight": 1.0},
    "pairs": {"count": 12, "steps": 2, "shard": 6},
    "log": {"every": 1},
    "checkpoint": {"every": 2},
}
ELSEWHERE = "01234567-42-4711"
"""The identity of a process of which nothing can be known here."""


MOMENTS = {
    "pairs": (pair_builder, "_make"),
    "step": (distillation.Distiller, "step"),
    "end": (distillation, "_teacher_student"),
}
"""What a job is about to call."""


def _pause(folder: Path, moment: str) -> None:
    """Have this process, when it comes to `moment`, say so and wait for `folder/go`."""
    holder, name = MOMENTS[moment]
    original = getattr(holder, name)

    def paused(*arguments):
        (folder / f"reached-{os.getpid()}").touch()
        while not (folder / "go").exists():
            time.sleep(0.002)
        return original(*arguments)

    setattr(holder, name, paused)


class Job(Forked):
    """`distmatch train` into `folder/out`, in a forked process that stops at `moment` until `go`."""

    def __init__(self, folder: Path, out: str, *changes: str, moment: str = "", patient: bool = True):
        self.folder = folder
        pairs = f"pairs.path={folder / out}-pairs"

        def run() -> None:
            if moment:
                _pause(folder, moment)
            if not patient:
                ownership.time = claims.time = SimpleNamespace(monotonic=time.monotonic)  # whoever sleeps fails
            cli.main()

        super().__init__(run, "distmatch", "train", folder / "tiny.yaml", pairs, *changes, "-o", folder / out)

    def reached(self) -> None:
        self.wait(lambda: (self.folder / f"reached-{self.pid}").exists())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe and the runs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two")
    tiny.recipe_file(folder, **SHORT)
    for out, change in (("alone", []), ("alone-other", ["seed=1"])):
        distil(load_recipe(str(folder / "tiny.yaml"), [f"pairs.path={folder / 'pairs'}", *change]), folder / out)
    return folder


@pytest.fixture
def folder(home):
    yield home
    (home / "go").unlink(missing_ok=True)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def same(folder: Path, out: str, undisturbed: str = "alone") -> None:
    """The run ended as the undisturbed one: weights to the bit, each line of the log once, nothing left over."""
    nets = [load_model(folder / name / "model")[0].state_dict() for name in (out, undisturbed)]
    assert all(torch.equal(nets[0][key], value) for key, value in nets[1].items())
    logs = [
        [(d["step"], d["match/student"], d["match/fake"]) for d in read(folder / name / "log.jsonl")]
        for name in (out, undisturbed)
    ]
    assert logs[0] == logs[1]
    assert [step for step, *_ in logs[0]] == [1, 2, 3, 4]
    assert not list((folder / out).rglob(".*"))
    assert not latest(Folder(folder / f"{out}-pairs").sizes())


def _owner(folder: Path) -> str:
    """The identity of the owner of `folder`, which has one."""
    return claims.owner((folder / ".owner.claim-0").read_bytes())


@pytest.mark.parametrize(
    ("moment", "change"),
    [("pairs", ("seed=1",)), ("step", ()), ("end", ("seed=1",))],
)
def test_the_second_of_two_is_told_who_has_the_folder(folder, moment, change):
    out = f"{moment}{len(change)}"
    first = Job(folder, out, moment=moment)
    first.reached()
    second = Job(folder, out, *change, patient=False)
    assert second.end() == 2
    assert f"{folder / out} belongs to another job that is running: `distmatch train " in second.stderr
    assert f"process {first.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
    (folder / "go").touch()
    assert first.end() == 0, first.stderr
    same(folder, out)


def test_of_two_that_start_at_once_one_has_the_folder(folder):
    out = "at-once"
    jobs = [Job(folder, out, *change, moment="pairs") for change in ((), ("seed=1",))]
    while all(job.process.is_alive() for job in jobs):
        time.sleep(0.002)
    loser, winner = sorted(jobs, key=lambda job: job.process.is_alive())
    assert loser.end() == 2, loser.stderr
    assert f"process {winner.pid} on " in loser.stderr
    (folder / "go").touch()
    assert winner.end() == 0, winner.stderr
    same(folder, out, "alone" if winner is jobs[0] else "alone-other")


@pytest.mark.parametrize("moment", ["pairs", "step"])
def test_after_a_kill_the_same_command_goes_on_without_waiting(folder, moment):
    """Also while nobody has yet collected the dead process."""
    out = f"killed-{moment}"
    first = Job(folder, out, moment=moment)
    first.reached()
    first.kill()
    while not is_dead(_owner(folder / out)):
        time.sleep(0.002)
    (folder / "go").touch()
    again = Job(folder, out, patient=False)
    assert again.end() == 0, again.stderr
    same(folder, out)


def test_a_run_that_has_saved_nothing_is_replaced_by_another(folder):
    first = Job(folder, "replaced", moment="step")
    first.reached()
    first.kill()
    assert first.end() == -signal.SIGKILL
    assert load_recipe(str(folder / "replaced" / "recipe.yaml")).seed == 0, "written before the pairs are built"
    other = Job(folder, "replaced", "seed=1")
    assert other.end() == 0, other.stderr
    same(folder, "replaced", "alone-other")
    third = Job(folder, "replaced")
    assert third.end() == 2
    assert "seed: 1 there, 0 here" in third.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_says_so_and_leaves_the_folder_to_the_next(folder, number, status):
    out = f"interrupted{status}"
    first = Job(folder, out, moment="pairs")
    first.reached()
    first.kill(number)
    assert first.end() == status
    assert "distmatch: stopped; to go on: distmatch train " in first.stderr
    assert not latest(Folder(folder / out).sizes())
    assert not latest(Folder(folder / f"{out}-pairs").sizes())


def test_what_was_not_made_by_train_is_not_taken_for_a_run(folder):
    (folder / "foreign").mkdir()
    tiny.teacher_folder(folder / "foreign" / "model")
    before = (folder / "foreign" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"foreign holds .*model of something else: it has no recipe.yaml"):
        distil(load_recipe(str(folder / "tiny.yaml"), [f"pairs.path={folder / 'pairs'}"]), folder / "foreign")
    assert (folder / "foreign" / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["teacher-student.png", "log.jsonl", "previews/holiday.png", "report.html"])
def test_a_file_that_no_run_made_is_not_written_over(folder, name):
    out = folder / f"foreign-{name.partition('/')[0]}"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=r"of something else: it has no recipe.yaml. Choose another folder"):
        distil(load_recipe(str(folder / "tiny.yaml"), [f"pairs.path={folder / 'pairs'}"]), out)
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    assert (out / name).read_text() == "mine"


COMMANDS = [
    "train mnist",
    "teach anything",
    "classifier anything",
    "import edm anything",
    "sample mnist",
    "demo",
    "demo toy2d",
    "export diffusers anything",
    "export lora anything",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_fills_a_folder_needs_it_for_itself(tmp_path, command):
    with owned(tmp_path), pytest.raises(ValueError, match=rf"belongs to another job .*process {os.getpid()} on "):
        cli.app([*command.split(), "-o", str(tmp_path)], exit_on_error=False, result_action="return_value")


def test_a_comparison_needs_its_folder_for_itself(tmp_path):
    options = compare.Options(n=1, guidance=3.0, out=tmp_path)
    with owned(tmp_path), pytest.raises(ValueError, match=rf"belongs to another job .*process {os.getpid()} on "):
        compare.compare_on([], "anything", None, options)


# Owners on other hosts, of which only silence tells


def _claim(folder: Path, beat: int = 0, **about) -> None:
    told = {"command": "distmatch train x", "host": "far\x1b[31m", "process": 42, "since": "noon", "job": None} | about
    content = f"{ELSEWHERE}-abc {beat:08d} {json.dumps(told)}".encode()
    if not Folder(folder).create(".owner.claim-0", content):
        Folder(folder).change(".owner.claim-0", content)


def test_a_silent_owner_elsewhere_is_succeeded_after_a_while(tmp_path, capsys):
    _claim(tmp_path)
    with owned(tmp_path, expiry=0.2):
        assert latest(Folder(tmp_path).sizes()) == {".owner": 1}
        (tmp_path / "x").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    said = capsys.readouterr().err
    assert "`distmatch train x`, process 42 on far?[31m, since noon" in said
    assert "silent for 0 seconds" in said


def _living(folder: Path, done: threading.Event, **about) -> threading.Thread:
    """An owner elsewhere that shows life until `done`."""

    def live() -> None:
        beat = 0
        while not done.wait(0.02):
            beat += 1
            _claim(folder, beat, **about)
        (folder / ".owner.claim-0").unlink()

    _claim(folder, **about)
    thread = threading.Thread(target=live)
    thread.start()
    return thread


def test_a_living_owner_elsewhere_is_named(tmp_path):
    done = threading.Event()
    thread = _living(tmp_path, done)
    with (
        pytest.raises(ValueError, match=r"belongs to another job .*process 42 on far"),
        owned(tmp_path),
    ):
        pass
    done.set()
    thread.join()


def test_a_restarted_torchrun_waits_for_its_own_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    done = threading.Event()
    thread = _living(tmp_path, done, job="mine")
    threading.Timer(0.5, done.set).start()
    with owned(tmp_path):
        assert done.is_set()
    thread.join()


def test_who_lost_its_folder_ends_before_it_writes_again(tmp_path):
    """It stood still, was taken for dead by another host, and wakes up."""

    def sleeper() -> None:
        os.dup2(os.open(tmp_path / "said", os.O_CREAT | os.O_WRONLY), 2)
        with owned(tmp_path / "out", expiry=0.2):
            (tmp_path / "out" / "mine").touch()
            time.sleep(60)

    process = fork.Process(target=sleeper, daemon=True)
    process.start()
    while not (tmp_path / "out" / "mine").exists():
        time.sleep(0.002)
    Folder(tmp_path / "out").create(".owner.claim-1", b"another")
    process.join(10)
    assert process.exitcode == 1
    assert "no longer belongs to this job" in (tmp_path / "said").read_text()


def test_an_old_death_is_not_taken_for_news(tmp_path, monkeypatch):
    """Between the look at a dead owner and the new claim, another job has come and gone and a third one has begun."""
    look = ownership._without_owner

    def late(folder, claims):
        found = look(folder, claims)
        if not (tmp_path / "third").exists():
            (tmp_path / "third").touch()
            (folder / ".owner.claim-0").unlink()
            _claim(folder, beat=9)
        return found

    monkeypatch.setattr(ownership, "_without_owner", late)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".owner.claim-0").write_text(f"{identity().partition('-')[0]}-1-0-abc 00000000 {{}}")
    with owned(tmp_path / "out", expiry=0.2):
        assert latest(Folder(tmp_path / "out").sizes()) == {".owner": 1}, "only after the third was silent, too"
        assert "00000009" in (tmp_path / "out" / ".owner.claim-0").read_text()


def test_a_process_is_dead_when_its_number_is_anothers_or_nobodys():
    host, pid, started = identity().split("-")
    assert not is_dead(identity())
    assert is_dead(f"{host}-{pid}-{int(started) - 1}"), "the number was given again"
    process = fork.Process(target=int)
    process.start()
    process.join()
    assert is_dead(f"{host}-{process.pid}-{started}")
    assert not is_dead(f"00000000-{process.pid}-{started}"), "nothing is known of other hosts"


def test_an_empty_folder_does_not_stay_and_a_file_is_named(tmp_path):
    with owned(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match="b is a file; expected a folder"), owned(tmp_path / "b"):
        pass


# Names


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "mnist"),
        (["terms=match"], "mnist-terms=match"),
        (["terms=match,regress", "log.every=3", "device=cpu", "pairs.path=/x", "accumulate=2"], "mnist"),
        (["student.optimizer.lr=2e-4", "terms=match"], "mnist-terms=match-student.optimizer.lr=0.0002"),
        (
            ["teacher=runs/cats/", "student.optimizer.betas=[0, 0.9]"],
            "mnist-teacher=cats-student.optimizer.betas=0.0,0.9",
        ),
        (["student.init=edm:a b"], "mnist-student.init=edm_a_b"),
        (["name=mine", "seed=3"], "mine-seed=3"),
    ],
)
def test_the_default_folder_says_what_was_overridden(overrides, name):
    assert run_name(load_recipe("mnist"), load_recipe("mnist", overrides)) == name


def test_a_long_name_is_cut_and_stays_apart_from_others():
    long = ["teacher=" + 150 * "a", "teacher=" + 149 * "a" + "b"]
    names = [run_name(load_recipe("mnist"), load_recipe("mnist", [override])) for override in long]
    assert names[0][:111] == names[1][:111] == "mnist-teacher=" + 97 * "a"
    assert names[0] != names[1]
    assert [len(name) for name in names] == [120, 120]
