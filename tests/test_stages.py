"""Stages: each changes the terms for a part of the run, and a continued run lands where it was."""

import json

import pytest
import tiny
from safetensors.torch import load_file

from distmatch.commands import distillation
from distmatch.models.folder import load_model
from distmatch.recipe.loading import load_recipe

STAGES = [
    {"until": 4, "change": {"pairs.count": 10, "regress.weight": 0.5}},
    {"until": 7, "change": {"match.max_step": 500, "match.batch": 2, "pairs.count": 20, "student.optimizer.lr": 2e-4}},
    {"until": 12, "change": {"regress.batch": 2, "regress.loss": "huber", "critic.lr": 3e-4}},
]


def recipe(folder, **changes):
    return load_recipe(str(tiny.recipe_file(folder, stages=STAGES, **changes)))


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("stages")
    distillation.distil(recipe(folder), folder / "whole", folder)
    return folder


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 11])
def test_a_run_stopped_anywhere_ends_as_the_undisturbed(whole, stop):
    """Within a stage, and between two: the same weights to the last bit."""
    out = whole / f"stopped-{stop}"
    with tiny.stopped_before(stop):
        distillation.distil(recipe(whole), out, whole)
    distillation.distil(recipe(whole), out, whole)
    expected, found = (load_model(run / "model")[0].state_dict() for run in (whole / "whole", out))
    assert all(found[name].equal(value) for name, value in expected.items())


def test_an_override_holds_in_every_stage(tmp_path):
    file = str(tiny.recipe_file(tmp_path, stages=STAGES))
    changed = load_recipe(file, ["match.max_step=300", "pairs.count=15"])
    assert [changed.stage(i).match.max_step for i in range(3)] == [300, 300, 300]
    assert [changed.stage(i).pairs.count for i in range(3)] == [15, 15, 15]
    assert [changed.stage(i).match.batch for i in range(3)] == [4, 2, 4]


def test_batches_of_later_stages_are_checked_before_anything_runs(tmp_path):
    stages = [{"until": 4}, {"until": 12, "change": {"regress.batch": 3}}]
    with pytest.raises(ValueError, match=r"regress.batch 3 is not a multiple of accumulate 2"):
        distillation.distil(
            load_recipe(str(tiny.recipe_file(tmp_path, stages=stages, accumulate=2))), tmp_path / "run", tmp_path
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


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


def test_impossible_stages_are_named(tmp_path):
    for stages, message in (
        (
            [{"until": 3}],
            r"stages end at \[3\]; expected rising step numbers, ending at steps \(12\).*, or stages=\[\]",
        ),
        ([{"until": 5}, {"until": 5}, {"until": 12}], r"stages end at \[5, 5, 12\]"),
        (
            [{"until": 12, "change": {"student.ema": 0.5}}],
            "stage 1 changes 'student.ema'; a stage can change terms, entries of match",
        ),
        ([{"until": 12, "change": {"match.bach": 1}}], "unknown key 'match.bach'; did you mean 'batch'"),
        ([{"until": 12, "change": {"match.batch": "a"}}], "stage 1: match.batch = 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(str(tiny.recipe_file(tmp_path, stages=stages)))
