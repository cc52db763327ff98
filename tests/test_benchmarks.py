"""The command that measures on a GPU, at tiny sizes on the CPU: what it records, what it skips, what a cut costs."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import base_weights
import forked
import gpu
import gpu_rows
import gpu_smoke
import gpu_steps
import step
from gpu_job import NEEDS_GPU, Job, Results, Target

from distmatch.diffusion.denoiser import Cond
from distmatch.pipeline import TeacherPipeline
from distmatch.system.errors import UserError
from distmatch.training.replay import mapped

QUICK = ("matrix", "agreement", "processes", "step-cifar10", "cifar10")
"""Parts without diffusers, which takes longer to import than all of these take to run."""


@pytest.fixture
def measure(tmp_path):
    """The command in this process, with its results so far."""

    def run(*only, **options):
        options = {"out": tmp_path / "out", "work": tmp_path / "work", "tiny": True, "only": only, **options}
        status = gpu.main(**options)
        return status, Results(options["out"] / "results.json").read()["parts"]

    return run


def part(run, most=60.0):
    return gpu.Part(run, 0.0, most)


PATIENT = """
import sys
from dataclasses import replace
from pathlib import Path
benchmarks, out, *only = sys.argv[1:]
sys.path.insert(0, benchmarks)
import gpu
gpu.PARTS = {name: replace(found, least=0.0, most=600.0) for name, found in gpu.PARTS.items()}
sys.exit(gpu.main(out=Path(out), work=Path(out) / "work", tiny=True, only=tuple(only)))
"""
"""The command with all the time that parts need. It forks, which a process whose threads have computed may not."""


def test_the_tiny_command_measures_and_a_second_call_skips_it_all(tmp_path):
    def call():
        command = [sys.executable, "-c", PATIENT, gpu.__file__.removesuffix("gpu.py"), tmp_path, *QUICK]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, Results(tmp_path / "results.json").read()["parts"]

    shown, parts = call()
    assert {name: found["status"] for name, found in parts.items()} == dict.fromkeys(QUICK, "done")
    eager = parts["step-cifar10"]["rows"]["eager"]["figures"]
    seconds = eager["ms per step"] / 1000
    assert eager["TFLOP/s"] == pytest.approx(eager["counted TFLOP"] / seconds)
    assert eager["images per second"] == pytest.approx(4 / seconds)
    rate = parts["matrix"]["rows"]["fp32"]["figures"]["TFLOP/s"]
    assert eager["share of the matrix rate"] == pytest.approx(eager["counted TFLOP"] / seconds / rate)
    for graphs in ("false", "true"):
        for what in ("mnist", "mnist terms=match student.nfe=4"):
            row = parts["agreement"]["rows"][f"{what}, fp32, cuda_graphs={graphs}, against fp32 on the CPU"]
            assert row["figures"]["of the tolerance"] <= 1
    for name, row in (
        ("matrix", "tf32"),
        ("step-cifar10", "compiled"),
        ("processes", "torchrun cifar10-cond parallel=fsdp"),
    ):
        assert parts[name]["rows"][row]["figures"] == {"": NEEDS_GPU}  # never passed in silence
    assert "step / bare passes" in shown
    shown, again = call()
    assert again == parts  # times and all
    assert "at most" not in shown.split("part")[0]  # nothing was begun


@pytest.fixture
def job(tmp_path):
    """A part of this process, with a minute left."""
    device, ends = torch.device("cpu"), time.time() + 60
    return Job("part", Results(tmp_path / "results.json"), tmp_path, tmp_path, device, True, ends, os.getpid())


def test_recipes_that_ran_are_not_tried_again(job, tmp_path, monkeypatch):
    def trained(job, *words):
        with (tmp_path / "tried").open("a") as file:
            file.write(" ".join(words))
        return {"s": 1.0}

    monkeypatch.setattr(gpu_smoke, "trained", trained)
    for _ in range(2):
        gpu_smoke.smoke(job)
        assert (tmp_path / "tried").read_text() == "toy2d"


def test_rows_side_by_side_do_not_wait_for_nor_reach_each_other(job, tmp_path):
    """One is slow, one fails, one dies, one never ends: the others' figures are there before theirs."""
    first = tmp_path / "first"

    def quick():
        first.touch()
        return {"threads": torch.get_num_threads()}

    def slow():
        while not first.exists():
            time.sleep(0.01)
        return {"s": 1.0}

    def fails():
        raise ZeroDivisionError("injected")

    rows = {
        "slow": slow,
        "fails": fails,
        "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(60),
        "quick": quick,
    }
    targets: dict[str, Target] = {"s": ("at most", 2.0)}
    gpu_rows.side_by_side(job, rows, together=3, limit=5.0, targets=targets, threads=3)
    found = job.results.part("part")["rows"]
    assert {row: content.get("figures") for row, content in found.items()} == {
        **dict.fromkeys(rows),
        "slow": {"s": 1.0},
        "quick": {"threads": 3},
    }
    assert list(found)[-1] == "hangs"
    assert found["slow"]["targets"] == {"s": ["at most", 2.0]}
    assert "ZeroDivisionError: injected" in found["fails"]["error"]
    assert found["dies"]["error"] == "exit status -9"
    assert "time.sleep(60)" in found["hangs"]["error"]
    assert "TimeoutError: not done after 5 s" in found["hangs"]["error"]


def test_a_row_that_cannot_even_say_where_it_is_is_killed(job, monkeypatch):
    def deaf():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

    monkeypatch.setattr(gpu_rows, "GRACE", 0.1)
    gpu_rows.side_by_side(job, {"deaf": deaf}, together=1, limit=1.0)
    assert job.results.part("part")["rows"]["deaf"]["error"] == "exit status -9"


def test_a_row_over_its_limit_fails_where_it_is_and_the_next_one_has_none(job):
    assert not job.measure("over", lambda: time.sleep(60), limit=0.1)
    assert "TimeoutError: not done after 0 s" in job.results.part("part")["rows"]["over"]["error"]
    assert job.measure("next", lambda: time.sleep(0.3) or {"s": 0.3})


def test_graphs_that_do_not_fit_are_not_used_by_what_follows():
    made: Any = gpu_steps.Steps.__new__(gpu_steps.Steps)
    made.distiller = SimpleNamespace(clock=None, optimizer=SimpleNamespace(parameters=[]), fake_optimizers=[])
    made.distiller.gradients = made.step = eager = Mock(side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        made.recorded()
    assert made.distiller.gradients is eager


def test_the_bare_passes_are_those_of_the_recipe(tmp_path, monkeypatch):
    """Guidance makes the teacher's pass two; `match.pairs` makes the scores see both streams."""
    recipe = step.ready("mnist", ["match.batch=2", "regress.batch=3", "match.guidance=2", "match.pairs=true"], tmp_path)
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, t, cond):
            seen.append((self.out_features, len(x), torch.is_grad_enabled()))
            return super().forward(x)

    class Of:
        device, precision, images_per_step, terms = torch.device("cpu"), "fp32", 5, ()

        def __init__(self):
            self.student, self.fake = Named(1), Named(2)

    class Named:
        def __init__(self, number):
            self.net = Net(8, number)

    class Shape:
        shape, classes = (8,), ()

    step.bare(Of(), Named(3), Shape(), recipe)()
    assert seen == [(1, 5, True), (3, 5, False), (3, 5, False), (2, 5, False), (2, 5, True)]


def test_a_failure_is_recorded_turns_the_status_and_is_tried_again(measure, monkeypatch, tmp_path):
    flag = tmp_path / "mended"

    def fails():
        if not flag.exists():
            raise ZeroDivisionError("injected")
        return {"s": 2.0}

    def rows(job):
        job.measure("good", lambda: {"s": 1.0}, {"s": ("at most", 0.5)})
        job.measure("bad", fails)
        job.measure("after", lambda: {"s": 3.0})

    def dies(job):
        job.measure("first", lambda: {"s": 1.0})
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(gpu, "PARTS", {"rows": part(rows), "dies": part(dies), "last": part(lambda job: None)})
    status, parts = measure()
    assert status == 1
    assert {name: found["status"] for name, found in parts.items()} == {
        "rows": "failed",
        "dies": "failed",
        "last": "done",
    }
    assert "ZeroDivisionError: injected" in parts["rows"]["rows"]["bad"]["error"]
    assert parts["rows"]["rows"]["after"]["figures"] == {"s": 3.0}
    assert parts["dies"]["rows"]["first"]["figures"] == {"s": 1.0}
    assert "last words\nexit status -9" in parts["dies"]["error"]
    flag.touch()
    status, parts = measure("rows")
    assert status == 1  # `dies` still stands
    assert parts["rows"]["status"] == "done"
    assert parts["rows"]["rows"]["bad"]["figures"] == {"s": 2.0}


def test_a_missed_target_is_shown_and_no_failure(measure, monkeypatch, tmp_path):
    def slow(job):
        job.measure("row", lambda: {"ms": 25.0}, {"ms": ("at most", 10.0)})
        job.measure(
            "fine", lambda: {"share": 0.5, "GB": 1.05}, {"share": ("at least", 0.4), "GB": ("within 10 % of", 1.0)}
        )

    monkeypatch.setattr(gpu, "PARTS", {"slow": part(slow)})
    assert measure()[0] == 0
    columns = [list(column.cells) for column in gpu.table(Results(tmp_path / "out" / "results.json").read()).columns]
    assert columns[3:] == [
        ["25", "0.5", "1.05"],
        ["at most 10", "at least 0.4", "within 10 % of 1"],
        ["[red]2.500[/]", "[green]1.250[/]", "[green]1.050[/]"],
    ]


def test_a_part_that_takes_too_long_is_cut_and_goes_on(measure, monkeypatch, tmp_path):
    def slow(job):
        job.measure("first", lambda: {"number": float(os.getpid())})
        job.measure("second", lambda: {"s": 1.0} if (tmp_path / "fast").exists() else time.sleep(60))

    monkeypatch.setattr(gpu, "PARTS", {"slow": part(slow, most=2.0), "next": part(lambda job: None)})
    status, parts = measure()
    assert (status, parts["slow"]["status"], parts["next"]["status"]) == (0, "cut", "done")
    assert parts["slow"]["error"].endswith("== second")  # what it was at
    first = parts["slow"]["rows"]["first"]
    (tmp_path / "fast").touch()
    monkeypatch.setattr(gpu, "PARTS", {"slow": part(slow)})  # with time enough, also on a busy machine
    _, parts = measure()
    assert parts["slow"]["status"] == "done"
    assert parts["slow"]["rows"]["first"] == first  # not measured again


def test_a_killed_command_loses_only_what_it_was_measuring(measure, monkeypatch, tmp_path):
    """SIGKILL to the command alone: its part notices at its next figure, writes no more, and a new call goes on."""
    gate = tmp_path / "gate"

    def waits(job):
        job.measure("first", lambda: {"number": float(os.getpid())})
        while not gate.exists():
            time.sleep(0.01)
        job.measure("second", lambda: {"s": 1.0})
        job.measure("third", lambda: {"number": float(os.getpid())})

    monkeypatch.setattr(gpu, "PARTS", {"waits": part(waits)})
    command = gpu.fork.Process(target=partial(measure))
    command.start()
    results = Results(tmp_path / "out" / "results.json")
    while "first" not in results.part("waits")["rows"]:
        time.sleep(0.01)
    first = results.part("waits")["rows"]["first"]
    os.kill(command.pid, signal.SIGKILL)
    command.join()
    gate.touch()
    orphan = int(first["figures"]["number"])
    while Path(f"/proc/{orphan}").exists() and " Z " not in Path(f"/proc/{orphan}/stat").read_text():
        time.sleep(0.01)
    assert "third" not in results.part("waits")["rows"]
    status, parts = measure()
    assert (status, parts["waits"]["status"]) == (0, "done")
    assert parts["waits"]["rows"]["first"] == first
    assert parts["waits"]["rows"]["third"]["figures"]["number"] != orphan


def test_results_of_another_size_or_without_a_gpu_are_refused(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", {"none": part(lambda job: None)})
    measure()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"'cuda' is not available here; `--tiny`"):
            measure(tiny=False)
    with pytest.raises(UserError, match="another machine or size"):
        measure(tiny=False, device="cpu")
    with pytest.raises(UserError, match="--only nothing is unknown; expected some of none"):
        measure("nothing")


def test_the_devices_are_compared_by_the_worst_loss():
    there = [{"regress/student": 1.0, "match/student": 0.0}, {"regress/student": 2.0, "match/student": 1.0}]
    here = [{"regress/student": 1.0 + 5e-5, "match/student": 0.0}, {"regress/student": 2.0, "match/student": 1.1}]
    allowed = gpu_smoke.FLOOR + 0.01 * 1.1
    assert gpu_smoke.of_the_tolerance(here, there, "fp32") == pytest.approx(0.1 / allowed)
    assert gpu_smoke.of_the_tolerance(here[:1], there[:1], "fp32") == pytest.approx(5e-5 / (1e-6 + 1e-4 * (1 + 5e-5)))
    assert gpu_smoke.of_the_tolerance(here, there, "bf16") == pytest.approx(5e-5 / (1e-6 + 0.05 * (1 + 5e-5)))


def test_everything_that_was_drawn_moves():
    cond = Cond(label=torch.zeros(2), extra={"guidance": torch.ones(2)})
    found = mapped({"a": [cond, (torch.ones(1), "name")]}, lambda tensor: tensor.to("meta"))
    moved, (tensor, name) = found["a"]
    assert (moved.label.device.type, moved.extra["guidance"].device.type, tensor.device.type) == ("meta",) * 3
    assert (moved.text, name) == (None, "name")


def test_a_base_in_fewer_bits_takes_less_and_moves_the_estimates_further():
    pipe = TeacherPipeline.from_pretrained("mnist", steps=8)
    head, _, *rows = (line.split() for line in base_weights.table(pipe, None, 4, 1.0))
    assert [row[0] for row in rows] == ["fp32", "bf16", "int8", "int4"]
    assert {len(row) for row in rows} == {len(head)} == {6}
    assert all(share == "0.00%" for share in rows[0][2:])
    moved = [[float(share.removesuffix("%")) for share in row[4:]] for row in rows]  # too little at lower levels
    for column in zip(*moved, strict=True):
        assert 0 == column[0] < column[1] < column[2] < column[3] < 20
    held = [float(row[1]) for row in rows]
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("name", ["sample", "serve"])
def test_help_needs_no_further_packages(name, monkeypatch):
    for package in ("playwright", "uvicorn", "fastapi"):
        monkeypatch.setitem(sys.modules, package, None)
    shown = forked.script(Path(__file__).parent.parent / "benchmarks" / f"{name}.py", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"usage: {name}.py [-h]" in shown.stdout
