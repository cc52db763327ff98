"""Numbers beyond their range are refused by every command, before it starts, and by recipes."""

import inspect
import re
import typing
from dataclasses import is_dataclass

import pytest
from cyclopts import CoercionError, ValidationError
from subcommands import subcommands

from distmatch.commands import classifier, compare, eval, plan, sample, serve, teach
from distmatch.commands.cli import app
from distmatch.recipe.loading import load_recipe
from distmatch.system.options import Range

COMMANDS = (plan.plan, *(command.Options for command in (teach, classifier, sample, eval, compare, serve)))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__module__)
def test_every_number_of_a_command_has_a_range(command):
    numbers = 0
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        if name != "seed" and ("int" in str(hint) or "float" in str(hint)):
            assert "Range(" in str(hint), f"{command.__name__} takes {name} of any size"
            numbers += 1
    assert numbers >= 3
    assert inspect.signature(command).parameters


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("teach x --label-dropout 1.5", "at least 0 and below 1"),
        ("teach x --label-dropout -0.1", "at least 0 and below 1"),
        ("teach x --ema 1", "at least 0 and below 1"),
        ("teach x --lr 0", "above 0"),
        ("teach x --lr nan", "above 0"),
        ("teach x --batch 0", "at least 1"),
        ("teach x --widths 8 0", "at least 1"),
        ("classifier x --steps -3", "at least 1"),
        ("sample mnist -n 0", "at least 1"),
        ("sample mnist --guidance -1", "at least 0"),
        ("eval mnist --batch 0", "at least 1"),
        ("compare x --guidance 0.5", "at least 1"),
        ("plan mnist --utilisation 1.5", "above 0 and at most 1"),
        ("serve mnist --port 70000", "at least 0 and at most 65535"),
    ],
)
def test_a_number_beyond_its_range_is_refused(line, message):
    with pytest.raises(ValidationError) as refused:
        app(line.split(), exit_on_error=False, print_error=False)
    assert f"It must be {message}." in str(refused.value)
    assert line.split()[-1] in str(refused.value) or "nan" in line or "widths" in line


def test_every_whole_number_of_a_command_is_read_as_one():
    """By cyclopts, 1.5 images would be two."""
    for name, function in subcommands(app):
        options = [kind for kind in _kinds(function).values() if is_dataclass(kind)]
        kinds = [item for command in (function, *options) for item in _kinds(command).items()]
        for parameter, kind in kinds:
            if re.search(r"\bint\b", str(kind)):
                assert "function whole" in str(kind), f"{name} rounds {parameter}"


def _kinds(command) -> dict:
    return typing.get_type_hints(command, include_extras=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample mnist -n 1.5", "-n: Expected a whole number, not 1.5."),
        ("sample mnist --seed -0.5", "--seed: Expected a whole number, not -0.5."),
        ("sample mnist -n inf", "-n: Expected a whole number, not inf."),
        ("sample mnist -n nan", "-n: Expected a whole number, not nan."),
        ("teach x --widths 8 16.5", "--widths: Expected a whole number, not 16.5."),
        ("checkpoints x --keep 1.5", "--keep: Expected a whole number, not 1.5."),
        ("eval mnist --workers 1.5", "--workers: Expected a whole number, not 1.5."),
    ],
)
def test_a_fraction_is_no_whole_number(line, said):
    with pytest.raises(CoercionError) as refused:
        app(line.split(), exit_on_error=False, print_error=False)
    assert said in str(refused.value)


def test_whole_numbers_may_be_written_in_any_way_that_is_exact():
    read = app.parse_args("sample mnist -n 2.0 --seed 0x10 --batch 1_000", exit_on_error=False)[1].arguments["options"]
    assert (read.n, read.seed, read.batch) == (2, 16, 1000)
    assert app.parse_args("eval mnist --workers auto", exit_on_error=False)[1].arguments["options"].workers == "auto"


def test_the_ends_of_a_range():
    Range(0, 1)(float, 0.0)
    Range(0, 1)(float, 1.0)
    Range(0, 1, open=")")(float, 0.0)
    for wrong in (1.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="It must be at least 0 and below 1"):
            Range(0, 1, open=")")(float, wrong)
    with pytest.raises(ValueError, match="It must be above 0"):
        Range(0, open="(")(float, 0.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.ema=1", "less than 1"),
        ("student.optimizer.betas=[0.9,1.0]", "less than 1"),
        ("student.optimizer.betas=[-0.1,0.9]", "expected 0 or more"),
        ("fake.optimizer.lr=0", "expected more than 0"),
        ("fake.optimizer.lr=.inf", "finite"),
        ("match.guidance=-1", "expected 0 or more"),
        ("pairs.guidance=-1", "expected 0 or more"),
        ("student.guidance=[-1,3]", "expected 0 or more"),
        ("student.t=-5", "expected 0 or more"),
    ],
)
def test_a_recipes_number_beyond_its_range_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("mnist", [override])


def test_a_card_is_named_in_any_case():
    read = [app.parse_args(f"plan mnist --gpu {name}", exit_on_error=False)[1] for name in ("RTX4090", "rtx4090")]
    assert [bound.arguments["gpu"] for bound in read] == ["rtx4090", "rtx4090"]
