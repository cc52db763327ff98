"""What the entries of a recipe say of themselves: the page, the schema, the comments of `--dry-run`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distmatch.commands.cli import recipes as command
from distmatch.recipe.docs import commented, page, schema
from distmatch.recipe.entries import Recipe, Stage
from distmatch.recipe.entry import walk
from distmatch.recipe.loading import load_recipe, recipes

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
