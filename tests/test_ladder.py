"""Settings that make a recipe fit a card: in their order, no more than are needed, and kept by a run that continues.

Memory is that of a made-up network here, of which each setting saves a known part; `test_plan.py` is about real steps.
"""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from test_parallel import together

from distmatch.commands.memory import in_memory
from distmatch.commands.train import train
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.library import outline
from distmatch.planning import ladder
from distmatch.planning.cost import Cost, Traffic
from distmatch.planning.ladder import CACHE
from distmatch.planning.plan import next_step, rungs, verdict
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.subjects import offloaded
from distmatch.system.errors import UserError
from distmatch.system.screen import console, size

RUNGS = [
    {"gradient_checkpointing": True},
    {"prompts.cache": "runs/prompts"},
    {"student.adapter.rank": 64, "fake.adapter.rank": 64},
    {"precision": "bf16", "base_weights": "bf16"},
    {"parallel": "ddp", "precision": "bf16", "base_weights": "int8"},
    {"student.adapter.rank": 32, "fake.adapter.rank": 32},
    {"parallel": "ddp", "precision": "bf16", "base_weights": "int4"},
    {"student.adapter.rank": 16, "fake.adapter.rank": 16},
]
LEAST = [176, 152, 142, 52, 32, 22, 20, 15, 14]
"""Bytes at each rung, with parts of one image."""


def formula(recipe, denoiser, info, processes=1, once=False):
    """Networks of 40 bytes, adapters of few, encoders of 10, and for each image of a part 32 bytes of activations."""
    teacher = {"fp32": 40, "bf16": 20, "int8": 10, "int4": 5}[recipe.base_weights]
    adapters = {0: 47, 16: 0.5, 32: 1}
    trained = sum(adapters.get(role.adapter.rank, 2) for role in (recipe.student, recipe.fake))
    activations = recipe.match.batch / recipe.accumulate / processes * (8 if recipe.gradient_checkpointing else 32)
    if recipe.parallel == "fsdp":
        teacher, trained = teacher / processes, trained / processes
    memory = {"networks": teacher + trained, "encoders": 0 if offloaded(recipe) else 10, "activations": activations}
    return Cost(1, {}, memory, Traffic(processes), 0)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "cost", formula)
    made = tiny.recipe_file(tmp_path, terms=["match"], match={"batch": 8})
    tree = yaml.safe_load(made.read_text()) | {"teacher": f"diffusers:{write_tiny_sd(tmp_path / 'sd')}"}
    made.write_text(yaml.safe_dump(tree))
    return str(made)


def steps_of(file, *changes, **how):
    recipe = load_recipe(file, changes)
    return ladder.Ladder(recipe, *outline(recipe.teacher), **how)


def test_each_rung_is_tried_after_those_below_it_with_no_smaller_parts_than_it_takes(file):
    steps, changes = steps_of(file), {}
    assert steps.rungs[:4] == RUNGS[:4]
    for rung, least in zip(({}, *RUNGS), LEAST, strict=True):
        changes |= rung
        found = steps.fitting((least + 0.1) / 0.9)
        assert found.changes == {"accumulate": 8} | {k: v for k, v in changes.items() if k != "parallel"}  # as it was
        assert found.cost.peak == least
    for parts, peak in ((4, 60), (2, 76)):  # of two and four images, with adapters
        found = steps.fitting((peak + 0.1) / 0.9)
        assert (found.changes["accumulate"], found.cost.peak) == (parts, peak)
    assert steps.fitting((LEAST[-1] - 0.1) / 0.9) is None
    assert steps.fitting(1000).changes == {}


def test_where_a_part_of_a_step_does_not_shrink_the_same_is_found_as_by_trying_all(file, monkeypatch):
    """Memory is convex in the size of a part: the largest of several moments of a step."""
    tried = []

    def convex(recipe, *_, **__):
        tried.append(recipe.accumulate)
        part = 64 / recipe.accumulate
        return Cost(1, {}, {"networks": 40, "activations": max(30 + part, 4 * part)}, Traffic(1), 0)

    monkeypatch.setattr(ladder, "cost", convex)
    peaks = {n: convex(load_recipe(file, [f"accumulate={n}"])).peak for n in (1, 2, 4, 8, 16, 32, 64)}
    monkeypatch.setattr(ladder.Ladder, "rungs", [])
    steps = steps_of(file, "match.batch=64")
    for room in range(60, 300, 5):
        tried.clear()
        steps.known.clear()
        found = steps.fitting(room / 0.9)
        expected = next((n for n, peak in peaks.items() if peak < room), None)
        assert (found and found.changes.get("accumulate", 1)) == expected, room
        assert len(tried) <= 4


def test_the_verdict_names_the_first_that_fits_and_what_its_cache_takes(file, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\n")
    assert verdict(steps_of(file), 1000) == "it fits"
    assert verdict(steps_of(file), 240).startswith("it does not fit; accumulate=4 does, with 208 bytes")
    said = verdict(steps_of(file), 60)
    assert said.startswith(
        "it does not fit; accumulate=8 gradient_checkpointing=true prompts.cache=runs/prompts student.adapter"
    )
    each = 2 * 77 * 32  # bytes in half precision of the tiny model's texts
    assert f"adapters learn at rates of their own; states of prompts take {size(each)} each on the disk; off" in said
    assert "each on the disk, 14.8 kB for 3; offload=true" in verdict(steps_of(file, f"prompts.path={prompts}"), 60)
    assert "each on the disk; offload=true" in verdict(steps_of(file, f"prompts.path={tmp_path / 'later.txt'}"), 60)
    assert verdict(steps_of(file), 15) == "it fits with no setting that is tried here; take more or larger GPUs"
    # Several GPUs share networks before any are replaced.
    found = steps_of(file, gpus=4).fitting(50)
    assert found.changes == {"accumulate": 2, "gradient_checkpointing": True, **RUNGS[1], "parallel": "fsdp"}
    # A GAN encodes the captions of its images in every step.
    gan = steps_of(file, "terms=match,gan", "real.images=images")
    assert gan.rungs[1] == {"offload": True}
    # And its adapters, too, may have a base that is shared by several GPUs.
    shared = steps_of(file, "terms=match,gan", "real.images=images", gpus=4).rungs
    assert {"parallel": "fsdp"} in shared
    assert RUNGS[2] in shared


def test_settings_that_make_another_student_are_told_from_those_that_only_save_memory(file, monkeypatch):
    ranks, base = "student.adapter.rank, fake.adapter.rank", "base_weights"
    monkeypatch.setattr("distmatch.planning.plan.SIZES", (15e-9, 25e-9, 60e-9, 240e-9, 1000e-9))
    with console.capture() as screen:
        console.print(rungs(steps_of(file)))
    rows = [line.split() for line in screen.get().splitlines()]
    students = {float(row[0]): " ".join(row[2:4]) for row in rows if row[0].startswith(("1", "2", "6"))}
    assert students == {1.5e-8: "- nothing", 2.5e-8: "another accumulate=8"} | {
        6e-8: "another accumulate=8",
        2.4e-7: "the same",
        1e-6: "the same",
    }
    assert f"another student than the recipe's, by {ranks}, {base}" in screen.get()
    assert "another student" not in verdict(steps_of(file), 240)
    assert f"; another student than the recipe's, by {ranks}; adapters learn" in verdict(steps_of(file), 60)
    rounded = steps_of(file, "student.adapter.rank=16", "fake.adapter.rank=16", "precision=bf16", "base_weights=bf16")
    assert f"another student than the recipe's, by {base}; states" in verdict(rounded, 30)


def test_where_a_step_does_not_fit_the_next_step_is_named(file):
    listing, choosing = "--ladder lists what fits on cards of 12 to 80 GB", "makes such a choice when a run begins"
    steps = steps_of(file)
    assert next_step(steps, 1000, False) == ""
    assert next_step(steps, 240, False) == f"memory=fit {choosing}; {listing}"
    assert next_step(steps_of(file, "memory=fit"), 240, True) == f"the recipe's memory=fit {choosing}"
    for memory in (60, 15):  # adapters, which only you choose; nothing
        assert next_step(steps, memory, False) == listing
        assert next_step(steps, memory, True) == ""
    # And it is true: what is chosen from the same memory is the same.
    chosen, _ = ladder.fitted(load_recipe(file, ["memory=fit"]), None, 240)
    assert steps.fitting(240).changes == {"accumulate": chosen.accumulate}


def test_what_a_recipe_has_already_is_no_rung(file, monkeypatch):
    adapters = ["student.adapter.rank=32", "fake.adapter.rank=64", "precision=bf16", "base_weights=int8"]
    steps = steps_of(file, *adapters, "offload=true", "gradient_checkpointing=true")
    expected = [{CACHE: "runs/prompts"}, {"fake.adapter.rank": 32}, *RUNGS[-2:]]  # the cache saves the visits
    assert steps.rungs == expected
    assert steps_of(file, *adapters, f"{CACHE}=states", "gradient_checkpointing=true").rungs == expected[1:]
    # With an alpha of its own, an adapter of fewer ranks would move its weights further.
    given = steps_of(file, *adapters, f"{CACHE}=states", "gradient_checkpointing=true", "student.adapter.alpha=32")
    assert given.rungs == [{"fake.adapter.rank": 32}, RUNGS[-2], {"fake.adapter.rank": 16}]
    monkeypatch.setattr(ladder, "LARGE", 1000)
    assert steps.rungs == expected
    assert steps_of(file, *adapters, "gradient_checkpointing=true").rungs[1] == {"prompts.precision": "bf16"}
    assert "adapters learn" not in verdict(steps_of(file, *adapters), 20)


def test_what_is_trained_stays_where_a_recipe_leaves_the_choice_to_the_memory(file):
    recipe = load_recipe(file, ["memory=1.7e-7"])
    found, said = ladder.fitted(recipe, None, 0)
    assert (found.accumulate, found.gradient_checkpointing, found.offload) == (8, True, False)
    assert said == "152 bytes of 170 bytes planned: accumulate=8 gradient_checkpointing=true"
    with pytest.raises(UserError, match=r"memory 5e-08: a step takes 142 bytes .*90% of 50 bytes; train adapt"):
        ladder.fitted(load_recipe(file, ["memory=5e-8"]), None, 0)
    adapters = ["student.adapter.rank=2", "fake.adapter.rank=2", "precision=bf16", "memory=fit"]
    found, _ = ladder.fitted(load_recipe(file, adapters), None, 25)
    assert (found.base_weights, found.student.adapter.rank) == ("int8", 2)
    found, _ = ladder.fitted(load_recipe(file, [*adapters, "base_weights=int8"]), None, 20)
    assert (found.base_weights, found.student.adapter.rank) == ("int4", 2)
    with pytest.raises(UserError, match="a step takes 17 bytes or more, and may take 90% of 15 bytes; take a larger"):
        ladder.fitted(load_recipe(file, [*adapters, "base_weights=int4"]), None, 15)
    with pytest.raises(UserError, match="take a machine with more memory"):
        ladder.fitted(load_recipe(file, [*adapters, "base_weights=int4"]), None, 15, on_cpu=True)
    with pytest.raises(UserError, match=r"or give more, memory=1\.59e-07\."):  # whatever it is of
        ladder.fitted(load_recipe(file, ["memory=5e-8"]), None, 0)
    assert ladder.fitted(load_recipe(file, ["memory=1.59e-7"]), None, 0)[0].accumulate == 8
    no_bf16 = [change for change in adapters if "precision" not in change]
    with pytest.raises(UserError, match="a step takes 52 bytes or more"):
        ladder.fitted(load_recipe(file, no_bf16), None, 25)


def test_adapters_are_proposed_only_where_a_step_takes_less_with_them(file, monkeypatch):
    recipe = load_recipe(file, ["memory=1e-8"])
    with pytest.raises(UserError, match=r"10 bytes; train adapters, .*, or give more, memory="):
        ladder.fitted(recipe, None, 0)
    large = {"networks": 40, "activations": 0}  # with adapters, too
    monkeypatch.setattr(ladder, "cost", lambda *args, **how: Cost(1, {}, large, Traffic(1), 0))
    with pytest.raises(UserError, match="10 bytes; give more, memory="):
        ladder.fitted(recipe, None, 0)


def test_the_choice_is_shown_saved_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "cost", formula)
    file = str(tiny.recipe_file(tmp_path, terms=["match"], match={"batch": 4}, steps=1))
    out, memory = tmp_path / "run", "memory=2.4e-7"
    with pytest.warns(UserWarning, match="208 bytes of 240 bytes planned: accumulate=2"):
        train(file, memory, out=out, dry_run=True)
    assert yaml.safe_load(capsys.readouterr().out)["accumulate"] == 2
    train(file, memory, out=out, runs=tmp_path)
    assert "On this machine: 208 bytes of 240 bytes planned: accumulate=2" in capsys.readouterr().out
    assert yaml.safe_load((out / "recipe.yaml").read_text())["accumulate"] == 2
    monkeypatch.setattr(ladder, "cost", None)  # nothing is planned again
    train(file, "memory=9e-7", out=out, runs=tmp_path)
    assert "memory as when the run began: accumulate=2" in capsys.readouterr().out
    assert yaml.safe_load((out / "recipe.yaml").read_text())["accumulate"] == 2


def test_cuda_graphs_are_left_where_a_batch_is_split(file):
    steps = steps_of(file, "cuda_graphs=true")
    assert steps.fitting(1000).changes == {}
    assert steps.fitting(270).changes == {"accumulate": 4, "cuda_graphs": False}
    began, _ = ladder.fitted(load_recipe(file, ["memory=2.7e-7", "cuda_graphs=true"]), None, 0)
    found, _ = ladder.fitted(load_recipe(file, ["memory=fit", "cuda_graphs=true"]), began, 1000)
    assert (found.accumulate, found.cuda_graphs) == (began.accumulate, began.cuda_graphs) == (4, False)
    with pytest.raises(UserError, match="memory 5e-08: a step takes 142 bytes"):
        ladder.fitted(load_recipe(file, ["memory=5e-8", "cuda_graphs=true"]), None, 0)


def test_an_automatic_precision_is_settled_before_the_memory_is_planned(tmp_path, monkeypatch):
    monkeypatch.setattr("distmatch.system.machine.bf16_gain", lambda device: 2.0)
    recipe = load_recipe(str(tiny.recipe_file(tmp_path, terms=["match"])), ["memory=1", "precision=auto"])
    found, said = in_memory(recipe, None)
    assert found.precision == "bf16"
    assert said.startswith("bf16 (bf16 is 2 times as fast as fp32), ")
    began = recipe.model_copy(update={"memory": None, "precision": "fp32"})
    found, said = in_memory(recipe, began)
    assert found.precision == "fp32"
    assert "bf16" not in said


def _train_among_others(file: str, memory: str, out: Path) -> None:
    torch.set_num_threads(1)
    train(file, memory, out=out, runs=out.parent)


def test_several_processes_take_the_choice_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "cost", formula)
    file = str(tiny.recipe_file(tmp_path, terms=["match"], match={"batch": 4}, steps=1))
    together(2, _train_among_others, file, "memory=2e-7", tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["accumulate"] == 2
