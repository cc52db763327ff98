"""Recipes: strict keys, overrides, errors that name the nearest neighbour."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distmatch.recipe.build import pair_spec
from distmatch.recipe.entries import Pairs, Recipe, parse_recipe
from distmatch.recipe.entry import marked, walk
from distmatch.recipe.loading import dump, load_recipe, recipes
from distmatch.system.errors import UserError


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_complete_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.description
    assert parse_recipe(yaml.safe_load(dump(recipe)), "dump") == recipe


def test_every_number_of_the_demo_stands_in_its_file():
    """But for what is of text-to-image models, of guidance and of a GAN alone."""
    latent = {
        "base_weights",
        "distilled_teacher",
        "image_size",
        "teacher_lora",
        "gan",
        "guide",
        "memory",
        "offload",
        "prompts",
        "real",
        "stages",
        "adapter",
        "decoder",
        "tiny",
        "own_terms",
    }
    written = yaml.safe_load(recipes()["mnist"].read_text())
    fields = set(Recipe.model_fields) - {"name"} - latent
    assert fields <= set(written)
    for group in ("student", "match", "regress", "pairs", "fake", "log", "checkpoint", "evaluate"):
        assert set(Recipe.model_fields[group].annotation.model_fields) - latent <= set(written[group]), group


def test_overrides_reach_nested_entries_with_yaml_types():
    recipe = load_recipe(
        "mnist", ["terms=[match]", "match.weighting=dreamfusion", "student.optimizer.lr=1e-4", "seed=7"]
    )
    assert recipe.terms == ["match"]
    assert recipe.match.weighting == "dreamfusion"
    assert recipe.student.optimizer.lr == pytest.approx(1e-4)
    assert recipe.seed == 7
    assert load_recipe("mnist", ["terms=regress"]).terms == ["regress"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("match.wieghting=eq8", r"unknown key 'match.wieghting'; did you mean 'match.weighting'\? In match there are "),
        ("step=10", r"unknown key 'step'; did you mean 'steps'\?"),
        ("matching.guidance=3", r"unknown key 'matching'; did you mean 'match.guidance'\?"),
        ("matching=3", r"unknown key 'matching'; did you mean 'match'\?"),
        ("match_guidance=3", r"unknown key 'match_guidance'; did you mean 'match.guidance'\?"),
        ("batch=3", r"unknown key 'batch'; did you mean 'match.batch', 'regress.batch' or 'pairs.batch'\? At the top "),
        ("optimizer.lr=3", r"did you mean 'student.optimizer.lr', 'gan.optimizer.lr' or 'fake.optimizer.lr'\?"),
        ("student.lr=3", r"unknown key 'student.lr'; did you mean 'student.optimizer.lr'\? In student there are "),
        ("student.optimiser.lr=3", r"unknown key 'student.optimiser'; did you mean 'student.optimizer.lr'\?"),
        ("evry=3", r"unknown key 'evry'; did you mean 'log.every', 'checkpoint.every' or 'evaluate.every'\?"),
        ("zzz=3", r"unknown key 'zzz'; at the top level there are \d+, listed by `distmatch train RECIPE --dry"),
        ("stepz=3", r"did you mean 'steps', 'pairs.steps' or 'fake.steps'\? At .* in docs/recipe.md$"),
        ("match.weighting=eq9", r"match.weighting = 'eq9'.*'algorithm2', 'eq8', 'dreamfusion' or 'prolificdreamer'"),
        ("steps=0", r"steps = 0: expected more than 0"),
        ("pairs.path=''", r"pairs.path = '': expected a text that is not empty"),  # which would be the folder here
        ("pairs.path='  '", r"pairs.path = '  ': expected a text that is not empty"),
        ("steps", r"override 'steps' is not of the form key=value"),
        ("seed.x=1", r"seed is a value, not a group"),
        ("student.optimizer.lr=fast", r"student.optimizer.lr = 'fast'"),
        ("terms=[]", r"terms = \[\]: expected 1 or more values"),
        ("terms=match,match", r"a term is named twice: match, match"),
        ("match.bins=100", r"expected min_step < max_step <= bins, not 20, 980, 100"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("mnist", [override])


def test_what_holds_for_several_mistakes_is_said_once(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: mnist\nfoo: 1\nmatchh: {weight: 2}\nstudent: {bar: 2, baz: 3}\n")
    with pytest.raises(ValueError, match="unknown key") as found:
        load_recipe(str(tmp_path / "mine.yaml"))
    top, *lines = str(found.value).splitlines()
    assert top == f"{tmp_path / 'mine.yaml'}:"
    heads = [line.strip().partition(" there are ")[0] for line in lines]
    assert heads == [
        "unknown key 'student.bar'; in student",
        "unknown key 'student.baz'",
        "unknown key 'foo'; at the top level",
        "unknown key 'matchh'; did you mean 'match.weight'?",
    ]


def test_a_mistake_names_where_the_value_stands_that_an_override_does_not_go_with(tmp_path):
    """In the recipe's file, or in its base's; what the command line itself sets stands there."""
    (tmp_path / "below.yaml").write_text("base: mnist\ncuda_graphs: true\n")
    (tmp_path / "mine.yaml").write_text(f"base: {tmp_path / 'below.yaml'}\nsteps: 9\n")
    said = "terms=match,gan on the command line: cuda_graphs works with the terms match, guide and regress, not with"
    for name, place in (("emoji", "recipe emoji"), (str(tmp_path / "mine.yaml"), str(tmp_path / "below.yaml"))):
        with pytest.raises(UserError) as told:
            load_recipe(name, ["terms=match,gan"])
        assert str(told.value).startswith(f"cuda_graphs: true in {place}, with {said}")
    with pytest.raises(UserError, match=rf"^cuda_graphs=true {said} gan; use cuda_graphs=false$"):
        load_recipe("mnist", ["cuda_graphs=true", "terms=match,gan"])
    # A list of stages would fill the screen.
    with pytest.raises(UserError, match=r"^stages in recipe emoji, with steps=10 on the command line: stages end at "):
        load_recipe("emoji", ["steps=10"])


def test_unknown_and_broken_recipes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"recipe 'mnits' is unknown; did you mean 'mnist'\? See `distmatch recipes`"):
        load_recipe("mnits")
    with pytest.raises(ValueError, match=r"recipe file .*nowhere.yaml does not exist"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML: .*\n.* in line 1, column 4:"):
        load_recipe(str(broken))
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="holds no recipe"):
        load_recipe(str(broken))
    broken.write_text("steps: 3")
    with pytest.raises(ValueError, match="'teacher' is missing"):
        load_recipe(str(broken))


def test_a_recipe_file_is_named_after_itself(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: mnist\nsteps: 3\n")
    assert load_recipe(str(file)).name == "mine"


OTHER_PAIRS = {
    "path": "elsewhere",
    "count": 7,
    "sampler": "euler",
    "steps": 7,
    "taken": 7,
    "guidance": 7.0,
    "seed": 7,
    "dtype": "float16",
    "precision": "bf16",
    "shard": 7,
    "batch": 7,
}


def test_the_pairs_depend_on_the_entries_that_are_marked_so():
    subject: Any = SimpleNamespace(
        fingerprint="", encoders="", prompts=(), info=SimpleNamespace(shape=(1, 8, 8), classes=(), scheduler={})
    )
    entries = [name for name, _, _ in walk(Pairs)]
    few = ["student.nfe=2", "pairs.taken=1"]  # what only a student of several steps may have
    changed = {
        name
        for name in entries
        if pair_spec(load_recipe("mnist", [*few, f"pairs.{name}={OTHER_PAIRS[name]}"]), subject)
        != pair_spec(load_recipe("mnist", few), subject)
    }
    assert changed == set(marked(Pairs, "pairs"))
    assert changed == set(entries) - {"path", "batch"}
    spec = pair_spec(load_recipe("mnist", ["student.guidance=[1, 4]", "pairs.shard=7"]), subject)
    assert (spec.guidance, spec.guidances, spec.shard_size) == (None, (1.0, 4.0), 7)


def test_entries_by_their_earlier_names_are_the_same(tmp_path):
    now = load_recipe("mnist", ["student.optimizer.lr=0.5", "fake.optimizer.betas=[0, 0.9]", "fake.steps=3"])
    assert load_recipe("mnist", ["generator.lr=0.5", "critic.betas=[0, 0.9]", "critic.steps=3"]) == now
    tree = now.model_dump(mode="json")
    fake = tree.pop("fake")
    tree |= {
        "generator": tree["student"].pop("optimizer"),
        "critic": {**fake.pop("optimizer"), "steps": fake.pop("steps")},
        "fake": fake,
    }
    earlier = deepcopy(tree)
    assert parse_recipe(tree, "a run of an earlier version") == now
    assert tree == earlier
    reals = ["images=photos.zip", "split=all", "classes=number"]
    now, before = (load_recipe("cifar10-dmd2", [f"{group}.{one}" for one in reals]) for group in ("real", "gan"))
    assert now == before
    tree = now.model_dump(mode="json")
    tree["gan"] |= tree.pop("real")
    assert parse_recipe(tree, "a run of an earlier version") == now
    now = load_recipe("mnist", ["student.optimizer.lr=0.5", "fake.optimizer.betas=[0, 0.9]", "fake.steps=3"])
    tree = earlier
    said = {"name": "mnist", "description": now.description, "expected": now.expected}
    variant = {"base": "mnist", **said, "generator": {"lr": 0.5}}
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump({**variant, "critic": {"betas": [0, 0.9], "steps": 3}}))
    assert load_recipe(str(tmp_path / "variant.yaml")) == now
    with pytest.raises(ValueError, match=r"generator.lr is the earlier name of student.optimizer.lr, which is given"):
        parse_recipe(tree | {"student": {"optimizer": {"lr": 1}}}, "both")
    with pytest.raises(ValueError, match=r"both: unknown key 'fake.optimizer.lrr'; did you mean 'fake.optimizer.lr'\?"):
        parse_recipe(tree | {"critic": {"lrr": 1}}, "both")


def test_a_folder_that_is_called_like_a_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mnist").teacher == "mnist"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["stages=[{unitl: 9}]"],
            ["'until' is missing in stage 1", "unknown key 'unitl' in stage 1; did you mean"],
        ),
        (["stages=[{until: 600, match.weight: 3}]"], ["a stage takes until, its last step, and change"]),
        (["stages=[{until: 600, change: {match: {bins: 2}}}]"], ["expected one value", "as match.bins"]),
        (["precision=fp17"], ["expected 'fp32', 'bf16' or 'auto'; did you mean 'fp32'?"]),
        (["workers=atuo"], ["workers = 'atuo'", "did you mean 'auto'?"]),
    ],
    ids=lambda given: given[0],
)
def test_a_mistake_is_told_once_with_what_was_meant(overrides, said):
    with pytest.raises(UserError) as told:
        load_recipe("mnist", overrides)
    for words in said:
        assert str(told.value).count(words) == 1
    assert str(told.value).count(overrides[0]) == 1
