"""Stages: each changes the terms for a part of the run, and a continued run lands where it was."""

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from distmatch.commands import distillation
from distmatch.methods.distill import Distiller
from distmatch.models.folder import load_model
from distmatch.planning import preflight
from distmatch.planning.preflight import Flight
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import parallel
from distmatch.system.errors import Stopped
from distmatch.training.optim import Optimizer

STAGES = [
    {"until": 4, "change": {"pairs.count": 10, "regress.weight": 0.5}},
    {"until": 7, "change": {"match.max_step": 500, "match.batch": 2, "pairs.count": 20, "student.optimizer.lr": 2e-4}},
    {"until": 12, "change": {"regress.batch": 2, "regress.loss": "huber", "critic.lr": 3e-4}},
]

SCHEDULED = [
    {"until": 4, "change": {"terms": ["regress"], "student.optimizer.decay": 0.5}},
    {
        "until": 9,
        "change": {
            "student.optimizer.lr": 2e-4,
            "student.ema": 0.3,
            "fake.optimizer.warmup": 2,
            "fake.alone": 2,
        },
    },
    {"until": 12, "change": {"match.batch": 2}},
]
"""The second stage has all rates for itself, the first the student's; the third goes on with those of the run."""


def recipe(folder, stages=STAGES, **changes):
    return load_recipe(str(tiny.recipe_file(folder, stages=stages, **changes)))


def test_each_stage_has_its_terms_and_its_pairs(tmp_path, monkeypatch):
    seen, rates = [], []

    def spy(recipe, subject, distiller, spaces, out, steps, title, watch):
        match, regress = distiller.terms
        noise, pairs = distiller.objective.streams.values()
        rates.append((distiller.optimizer.rate(5), distiller.fake_optimizer.rate(5)))
        seen.append((steps, title, regress.weight, match.max_step, noise.batch, pairs.batch, len(pairs.store)))
        return train(recipe, subject, distiller, spaces, out, steps, title, watch)

    train = distillation._train
    monkeypatch.setattr(distillation, "_train", spy)
    distillation.distil(recipe(tmp_path), tmp_path / "run", tmp_path)
    assert seen == [
        (4, "tiny, stage 1 of 3", 0.5, 980, 4, 4, 10),
        (7, "tiny, stage 2 of 3", 1.0, 500, 2, 4, 20),
        (12, "tiny, stage 3 of 3", 1.0, 980, 4, 2, 24),
    ]
    first, second, third = rates
    assert second == (2e-4, first[1])
    assert third == (first[0], 3e-4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [s for s in steps if s in (4, 7, 12)] == [4, 7, 12]


@pytest.fixture(scope="module", params=[STAGES, SCHEDULED], ids=["terms", "schedules"])
def whole(request, tmp_path_factory):
    """The undisturbed run: its folder and its stages."""
    folder = tmp_path_factory.mktemp("stages")
    distillation.distil(recipe(folder, request.param), folder / "whole", folder)
    return folder, request.param


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 11])
def test_a_run_stopped_anywhere_ends_as_the_undisturbed(whole, stop):
    """Within a stage, and between two: the same weights to the last bit."""
    whole, stages = whole
    out = whole / f"stopped-{stop}"
    with tiny.stopped_before(stop):
        distillation.distil(recipe(whole, stages), out, whole)
    distillation.distil(recipe(whole, stages), out, whole)
    expected, found = (load_model(run / "model")[0].state_dict() for run in (whole / "whole", out))
    assert all(found[name].equal(value) for name, value in expected.items())


def test_the_model_that_an_earlier_stage_left_is_not_the_students(tmp_path, monkeypatch):
    """A run of points, killed when only the last stage's model was missing."""
    stages = [{"until": 2, "change": {"terms": ["regress"]}}, {"until": 4}]
    small = ["steps=4", "pairs.count=8", "match.batch=2", "regress.batch=2", f"stages={json.dumps(stages)}"]
    recipe, export, begun = load_recipe("toy2d", small), Distiller.export, []
    distillation.distil(recipe, tmp_path / "whole", tmp_path)

    def killed(self, folder):
        begun.append(folder)
        if len(begun) == 2:  # of the last stage, in the first start
            raise Stopped("by the test")
        export(self, folder)

    monkeypatch.setattr(Distiller, "export", killed)
    with pytest.raises(Stopped):
        distillation.distil(recipe, tmp_path / "run", tmp_path)
    distillation.distil(recipe, tmp_path / "run", tmp_path)
    expected, found = (load_model(tmp_path / run / "model")[0].state_dict() for run in ("whole", "run"))
    assert all(found[name].equal(value) for name, value in expected.items())


def rates_of_a_run(recipe, folder, monkeypatch):
    """The student's learning rate at each step, and the fake score's at each update, of a run that trains nothing."""
    student, fake, updates = [], [], recipe.fake.steps

    def spy(recipe, subject, distiller, spaces, out, end, title, watch):
        student.extend(distiller.optimizer.rate(step) for step in range(len(student), end))
        fake.extend(distiller.fake_optimizer.rate(index) for index in range(len(fake), end * updates))

    monkeypatch.setattr(distillation, "_train", spy)
    monkeypatch.setattr(distillation, "_say_next", lambda *_: None)  # there is no student to say anything of
    distillation.distil(recipe, folder / "run", folder)
    return student, fake


def test_a_stages_own_schedules_are_those_of_a_run_of_its_own(tmp_path, monkeypatch):
    """Also of three updates of the fake score per step; between two stages that state none."""
    change = {"student.optimizer.warmup": 2, "student.optimizer.decay": 0.6, "fake.optimizer.decay": 0.5}
    change |= {"fake.alone": 3, "student.optimizer.lr": 2e-4, "fake.optimizer.lr": 4e-4}
    stages = [{"until": 6}, {"until": 16, "change": change}, {"until": 20}]
    file = str(tiny.recipe_file(tmp_path, steps=20, fake={"steps": 3, "optimizer": {"warmup": 4}}, critic={}))
    plain = ["terms=match", "fake.alone=0", "student.optimizer.decay=0.5"]
    staged = load_recipe(file, [*plain, f"stages={json.dumps(stages)}"])
    whole = load_recipe(file, plain)
    alone = load_recipe(file, [*plain, *(f"{name}={value}" for name, value in change.items()), "steps=10"])
    found, run, own = (
        rates_of_a_run(one, tmp_path / name, monkeypatch)
        for name, one in (("staged", staged), ("whole", whole), ("alone", alone))
    )
    for (mine, all_steps, of_stage), updates in zip(zip(found, run, own, strict=True), (1, 3), strict=True):
        first, end = 6 * updates, 16 * updates
        assert mine == all_steps[:first] + of_stage + all_steps[end:]
    assert found[0][6:16] == pytest.approx([2e-4 * k for k in (0, 0, 0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def rates(recipe):
    """The learning rates of student and fake score at each step of a staged recipe, with a weight in place of both."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    student, fake = Optimizer(weights, lr=1), Optimizer(weights, lr=1)
    distiller: Any = SimpleNamespace(optimizer=student, fake_optimizers=[fake], ema=SimpleNamespace())
    found = []
    for number, stage in enumerate(recipe.stages):
        build.schedule(distiller, recipe, number)
        found += [(student.rate(step), fake.rate(step)) for step in range(len(found), stage.until)]
    return found


def test_stages_that_state_no_schedule_go_on_with_the_runs():
    """The demo's rates: one warm-up, and one fall at the end of all."""
    shape = [min((step + 1) / 20, (2500 - step) / 250, 1) for step in range(2500)]
    recipe = load_recipe("mnist-demo")
    lr, fake = recipe.student.optimizer.lr, recipe.fake.optimizer.lr
    expected = [((lr if step < 1200 else 2e-4) * factor, fake * factor) for step, factor in enumerate(shape)]
    assert rates(recipe) == expected  # to the last bit


def test_the_stages_of_emoji_are_the_runs_that_were_measured():
    """Their commands are in docs/results.md."""
    first = [3e-4 * min((step + 1) / 20, (500 - step) / 150, 1) for step in range(500)]
    second = [1e-4 * max(0, min((step - 39) / 20, (500 - step) / 300, 1)) for step in range(500)]
    third = [3e-5 * min((step + 1) / 5, (25 - step) / 17.5, 1) for step in range(25)]
    fake = [4e-4 * min((step + 1) / 20, (500 - step) / 250, 1) for step in range(500)]
    found = rates(load_recipe("emoji"))
    assert [student for student, _ in found] == pytest.approx(first + second + third, rel=1e-12)
    assert [score for _, score in found[500:1000]] == pytest.approx(fake, rel=1e-12)


def test_a_stage_may_have_an_average_of_its_own(tmp_path):
    """Without decay it is the weights themselves; a later stage averages again, as the run does."""
    stages = [{"until": 3}, {"until": 6, "change": {"student.ema": 0.0}}, {"until": 8}]
    file = tiny.recipe_file(tmp_path, stages=stages, steps=8, checkpoint={"every": 1, "keep": 8})
    distillation.distil(load_recipe(str(file)), tmp_path / "run", tmp_path)
    for step in range(1, 9):
        saved = _shard(tmp_path / "run", step)
        weights = {name.removeprefix("student/"): value for name, value in saved.items() if name.startswith("student/")}
        average = {name.removeprefix("ema/network/"): value for name, value in saved.items() if name.startswith("ema/")}
        same = [value.equal(average[name]) for name, value in weights.items()]
        assert same
        assert all(same) == (step in (4, 5, 6)), step


def test_a_stage_may_begin_with_the_fake_score_alone(tmp_path):
    """Three steps in which the student stands still and the fake score does not, in the middle of a run."""
    stages = [{"until": 4, "change": {"terms": ["regress"]}}, {"until": 9, "change": {"fake.alone": 3}}]
    file = tiny.recipe_file(tmp_path, stages=stages, steps=9, checkpoint={"every": 1, "keep": 9})
    distillation.distil(load_recipe(str(file)), tmp_path / "run", tmp_path)
    saved = [_shard(tmp_path / "run", step) for step in range(1, 10)]
    for role, moves in (("student", [1] * 3 + [0] * 3 + [1] * 2), ("fake", [0] * 3 + [1] * 5)):
        weights = [{name: value for name, value in one.items() if name.startswith(f"{role}/")} for one in saved]
        assert all(weights)
        moved = [any(not now[name].equal(value) for name, value in before.items()) for before, now in pairwise(weights)]
        assert moved == [bool(one) for one in moves], role


def test_an_override_of_a_schedule_leaves_it_the_stages_own(tmp_path):
    file = str(tiny.recipe_file(tmp_path, stages=SCHEDULED))
    changed = load_recipe(file, ["fake.optimizer.warmup=3", "fake.alone=1", "student.optimizer.decay=0.2"])
    assert [changed.span(i, "student.optimizer") for i in range(3)] == [(0, 4), (4, 9), None]
    assert [changed.span(i, "fake.optimizer") for i in range(3)] == [None, (4, 9), None]
    entries = [(one.fake.optimizer.warmup, one.fake.alone, one.student.optimizer.decay) for one in changed.parts]
    assert entries == [(3, 1, 0.2)] * 3
    # Regression has no use for steps that train only the fake score.
    assert rates(changed)[0][0] > 0
    assert [student > 0 for student, _ in rates(changed)[4:6]] == [False, True]


def test_a_stage_of_regression_does_not_wait_for_a_fake_score(tmp_path):
    """Nor with the schedule of the whole run, whose first steps train the fake score alone if there is one."""
    stages = [{"until": 2, "change": {"terms": ["regress"]}}, {"until": 6}]
    waiting = load_recipe(str(tiny.recipe_file(tmp_path, stages=stages, steps=6)), ["fake.alone=4"])
    assert [student > 0 for student, _ in rates(waiting)] == [True, True, False, False, True, True]


def test_an_entry_of_a_file_holds_in_every_stage_of_its_base(tmp_path):
    """As an override does; stages of the file's own say what they change."""
    base = tiny.recipe_file(tmp_path, stages=STAGES)
    (tmp_path / "own.yaml").write_text(f"base: {base}\nregress: {{weight: 2.0}}\ncritic: {{lr: 1.0e-5}}\n")
    own = load_recipe(str(tmp_path / "own.yaml"))
    assert [stage.regress.weight for stage in own.parts] == [2.0] * 3
    assert [stage.fake.optimizer.lr for stage in own.parts] == [1e-5] * 3
    assert [stage.regress.batch for stage in own.parts] == [4, 4, 2]
    stages = "stages: [{until: 5, change: {regress.weight: 4.0}}, {until: 12}]"
    (tmp_path / "staged.yaml").write_text(f"base: {tmp_path / 'own.yaml'}\nregress: {{weight: 3.0}}\n{stages}\n")
    assert [stage.regress.weight for stage in load_recipe(str(tmp_path / "staged.yaml")).parts] == [4.0, 3.0]


def test_an_override_holds_in_every_stage(tmp_path):
    file = str(tiny.recipe_file(tmp_path, stages=STAGES))
    changed = load_recipe(file, ["match.max_step=300", "pairs.count=15", "fake.optimizer.lr=5e-4"])
    assert [changed.stage(i).fake.optimizer.lr for i in range(3)] == [5e-4] * 3  # also under its earlier name
    assert [changed.stage(i).match.max_step for i in range(3)] == [300, 300, 300]
    assert [changed.stage(i).pairs.count for i in range(3)] == [15, 15, 15]
    assert [changed.stage(i).match.batch for i in range(3)] == [4, 2, 4]
    changed = load_recipe(file, ["fake.optimizer={lr: 1e-5}", "regress={weight: 3.0, batch: 4}"])  # groups, too
    assert [(one.fake.optimizer.lr, one.regress.weight, one.regress.batch) for one in changed.parts] == [
        (1e-5, 3, 4)
    ] * 3


def test_batches_of_later_stages_are_checked_before_anything_runs(tmp_path):
    stages = [{"until": 4}, {"until": 12, "change": {"regress.batch": 3}}]
    with pytest.raises(ValueError, match=r"regress.batch 3 is not a multiple of accumulate 2"):
        distillation.distil(
            load_recipe(str(tiny.recipe_file(tmp_path, stages=stages, accumulate=2))), tmp_path / "run", tmp_path
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_later_stage_for_one_process_is_refused_before_anything_runs(tmp_path, monkeypatch):
    stages = [{"until": 4}, {"until": 12, "change": {"match.shared": True}}]
    flight = Flight(load_recipe(str(tiny.recipe_file(tmp_path, stages=stages))), tmp_path / "run", tmp_path)
    preflight.batches(flight)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match=r"match.shared is for one process, not for 2; use false"):
        preflight.batches(flight)


def test_the_fake_score_can_wait_for_a_later_stage(tmp_path):
    """Regression alone, then matching too: the fake score is the teacher until then, and a run goes on bit for bit."""
    stages = [{"until": 4, "change": {"terms": ["regress"]}}, {"until": 8}]
    file = str(tiny.recipe_file(tmp_path, stages=stages, steps=8))
    alone = load_recipe(file, ["stages=[]", "steps=4", "terms=regress", "student.optimizer.decay=0"])
    both = load_recipe(file, ["student.optimizer.decay=0"])
    distillation.distil(alone, tmp_path / "alone", tmp_path)
    distillation.distil(both, tmp_path / "both", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "match/student" in line] == [6, 8]
    teacher = load_file(tmp_path / "teacher" / "model.safetensors")
    saved = {step: _shard(tmp_path / "both", step) for step in (4, 8)}
    assert all(saved[4][f"fake/net.{name}"].equal(value) for name, value in teacher.items())
    assert not all(saved[8][f"fake/net.{name}"].equal(value) for name, value in teacher.items())
    student = {name: value for name, value in _shard(tmp_path / "alone", 4).items() if name.startswith("student/")}
    assert student
    assert all(saved[4][name].equal(value) for name, value in student.items())


def _shard(run, step):
    """All tensors of a checkpoint."""
    found = {}
    for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_the_fake_score_is_not_drawn_to_the_student_in_a_stage_without_it(tmp_path):
    stages = [{"until": 2, "change": {"terms": ["regress"]}}, {"until": 4}]
    found = load_recipe(str(tiny.recipe_file(tmp_path, stages=stages, steps=4)), ["fake.ida=0.25"])
    subject = subjects.subject(found)
    pairs = build.pair_store(found, subject, tmp_path)
    d = build.distiller(found.parts[0], subject, pairs, fake_score=True)
    before = [weight.clone() for weight in d.fake.parameters()]
    d.step(0)
    assert all(map(torch.equal, before, d.fake.parameters()))
    assert not all(map(torch.equal, before, d.student.parameters()))


def test_impossible_stages_are_named(tmp_path):
    for stages, message in (
        (
            [{"until": 3}],
            r"stages end at \[3\]; expected rising step numbers, ending at steps \(12\).*, or stages=\[\]",
        ),
        ([{"until": 5}, {"until": 5}, {"until": 12}], r"stages end at \[5, 5, 12\]"),
        (
            [{"until": 12, "change": {"student.nfe": 2}}],
            "stage 1 changes 'student.nfe'; a stage can change terms, entries of match",
        ),
        (
            [{"until": 5}, {"until": 12, "change": {"fake.alone": 7}}],
            "stage 2 has 7 steps, no more than those that train only the fake score, fake.alone 7",
        ),
        ([{"until": 12, "change": {"fake.alone": -1}}], "stage 1: fake.alone = -1: expected 0 or more"),
        (
            [{"until": 12, "change": {"student.optimizer.decay": 2}}],
            "stage 1: student.optimizer.decay = 2: expected 1 or",
        ),
        ([{"until": 12, "change": {"match.bach": 1}}], "unknown key 'match.bach'; did you mean 'match.batch'"),
        ([{"until": 12, "change": {"match.batch": "a"}}], "stage 1: match.batch = 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(str(tiny.recipe_file(tmp_path, stages=stages)))
