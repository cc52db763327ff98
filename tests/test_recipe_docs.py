"""What the entries of a recipe say of themselves: the page, the schema, the comments of `--dry-run`."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from distmatch.commands.cli import recipes as command
from distmatch.commands.train import train
from distmatch.recipe.docs import commented, heading, page, schema
from distmatch.recipe.entries import Recipe, Stage
from distmatch.recipe.entry import walk
from distmatch.recipe.loading import load_recipe, overridden, recipes
from distmatch.recipe.unread import told
from distmatch.system.terminal import Notice

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"


def test_the_page_is_what_the_entries_say():
    assert PAGE.read_text() == page(), "write it again: python -m distmatch.recipe.docs > docs/recipe.md"


def test_every_entry_names_its_source():
    for name, field, _ in (*walk(Recipe), *walk(Stage)):
        assert re.fullmatch(r".+\. \[.+\]", field.description or ""), name


def test_a_row_of_the_page_has_range_default_and_when_it_may_change():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert "| `seed` | whole number | `0` | Seed of the pairs' noise. [ours] | in a stage |" in rows
    checkpoint = "| `every` | whole number > 0 | `500` | Steps between two checkpoints. [ours] | when a run continues |"
    assert checkpoint in rows
    assert any(row.startswith("| `ema` | number >= 0, < 1 | `0.999` | ") for row in rows)
    assert any(row.startswith("| `betas` | list of 2: number >= 0, < 1 | `[0.9, 0.999]` | ") for row in rows)
    assert any(row.startswith("| `decoder` | none, tiny or full | `none` | ") for row in rows)
    assert any(row.startswith("| `steps` | whole number > 0 | required | ") for row in rows)


@pytest.mark.parametrize("name", recipes())
def test_comments_leave_a_recipe_as_it_is(name):
    recipe = load_recipe(name)
    assert yaml.safe_load(commented(recipe)) == recipe.model_dump(mode="json")


def test_comments_leave_any_text_as_it_is():
    odd = "# a: 'b'\n\n  - \"c\" | " + "long " * 40 + "\n"
    recipe = load_recipe("mnist")
    changes = {"description": odd, "prompts": recipe.prompts.model_copy(update={"column": odd})}
    recipe = recipe.model_copy(update=changes)
    assert yaml.safe_load(commented(recipe)) == recipe.model_dump(mode="json")


def test_every_entry_is_below_its_comment():
    lines = commented(load_recipe("mnist", ["student.network={type: mlp}"])).splitlines()
    keys = [number for number, line in enumerate(lines) if line.partition(":")[1] and line.lstrip()[0] not in "#-"]
    assert all(lines[number - 1].lstrip().startswith("# ") for number in keys)
    assert {len(line) for line in lines if line.lstrip().startswith("#")} <= set(range(101))
    place = lines.index("  every: 200")
    assert lines[place - 1] == "  # Steps between two checkpoints. [ours] Expected: whole number > 0."


def test_the_schema_knows_what_a_file_may_hold(capsys):
    command(schema=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema()
    for file in recipes().values():
        _check(yaml.safe_load(file.read_text()), printed, printed)
    assert printed["anyOf"] == [{"required": ["base"]}, {"required": ["teacher", "steps"]}]
    for wrong in ({"fake": {"optimizer": {"clipp": 1}}}, {"step": 3}):
        with pytest.raises(AssertionError):
            _check(wrong, printed, printed)


def _check(value: Any, spec: dict[str, Any], root: dict[str, Any]) -> None:
    """Assert that every key of `value` stands in the schema `spec`, with a description."""
    if "$ref" in spec:
        spec = root["$defs"][spec["$ref"].rpartition("/")[2]]
    if not isinstance(value, dict) or "properties" not in spec:
        return
    assert spec["additionalProperties"] is False
    for key, inner in value.items():
        assert key in spec["properties"]
        _check(inner, spec["properties"][key], root)


def marked(*overrides):
    """The groups of a variant of the recipe `mnist` that their comments say are not read."""
    lines = commented(load_recipe("mnist", overrides)).splitlines()
    top = [(number, line.rstrip(":")) for number, line in enumerate(lines) if re.fullmatch(r"\w+:", line)]
    comments = {}
    for number, name in top:
        start = next(n for n in range(number, -1, -1) if n == 0 or not lines[n - 1].startswith("#"))
        comments[name] = " ".join(line.lstrip("# ") for line in lines[start:number])
    return {name for name, said in comments.items() if said.endswith(("reads these.", "in its picture."))}


STAGE = "{until: 5, change: {terms: [regress]}}"
OWN = "own_terms={mine: {source: nowhere:Mine}}"


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ([], {"guide", "gan", "real"}),
        (["terms=match"], {"guide", "regress", "gan", "real", "pairs"}),
        (["terms=regress"], {"match", "guide", "gan", "real", "fake"}),
        (["terms=match,gan", "real.images=photos"], {"guide", "regress", "pairs"}),
        (["terms=match", "student.nfe=2", "student.inputs=data"], {"guide", "regress", "gan", "pairs"}),
        # A stage may add a term; one of your own may read any stream, and is not imported to ask.
        (["terms=match", f"stages=[{STAGE}, {{until: 9}}]", "steps=9"], {"guide", "gan", "real"}),
        (["terms=match,mine", OWN], {"guide", "gan", "real"}),
    ],
)
def test_the_groups_that_nothing_in_a_recipe_reads_are_marked(overrides, groups):
    assert marked(*overrides) == groups


def test_above_a_printed_recipe_stands_what_was_changed_and_what_is_written():
    def above(*overrides, out="run"):
        return heading(load_recipe("mnist", overrides), load_recipe("mnist"), Path(out), Path("runs"))

    assert "changed" not in above()
    assert "to a folder in runs/pairs, unless" in above()
    assert "noise-image pairs" not in above("terms=match")
    assert "pairs to my/pairs, unless" in above("pairs.path=my/pairs")
    stages = ["stages=[{until: 4, change: {terms: [match]}}, {until: 9}]", "steps=9"]
    assert "changed: stages is [{change: {terms: [match]}, until: 4}" in above(*stages)
    text = above('prompts.path="a\\nsteps: 5"', out="run\nsteps: 5")  # no line of it is an entry
    assert all(line.startswith("# ") for line in text.rstrip("\n").split("\n"))
    assert yaml.safe_load(text + commented(load_recipe("mnist"))) == load_recipe("mnist").model_dump(mode="json")


def test_entries_that_were_given_and_that_nothing_reads_are_named_when_a_run_begins(tmp_path):
    said = r"^with the terms match nothing reads gan.r1 \(for the term gan\), real.images \(for the term gan or student"
    file = tiny.recipe_file(tmp_path, terms=["match"], real={"images": "photos.zip"})
    with pytest.warns(Notice, match=said), redirect_stdout(StringIO()):
        train(str(file), "gan.r1=1", "match.weight=2", dry_run=True)
    for quiet in (["terms=match,gan", "real.images=a"], ["terms=match", "pairs.steps=5", "steps=9"], ["terms=regress"]):
        assert told(load_recipe("mnist", quiet), overridden(quiet)) == ""
    group = ["terms=match", "pairs={steps: 5}"]  # its steps are read, for the picture
    assert told(load_recipe("mnist", group), overridden(group)) == ""
    stages = ["real.images=a", "steps=9", "stages=[{until: 4, change: {terms: [regress]}}, {until: 9}]", "terms=match"]
    assert told(load_recipe("mnist", stages), []).startswith("with the terms regress, match nothing reads real.images")
    paired = ["terms=match", "match.pairs=true"]
    assert told(load_recipe("mnist", paired), overridden(paired)).endswith("reads match.pairs (for the term regress)")
    assert told(load_recipe("mnist", paired), overridden(paired[:1])) == ""
    earlier = ["terms=regress", "critic.steps=3", "gan.images=photos"]
    names = told(load_recipe("mnist", earlier), overridden(earlier))
    assert re.findall(r"[a-z]+\.[a-z]+(?= \()", names) == ["fake.steps", "real.images"]
