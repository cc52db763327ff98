"""Numbers beyond their range are refused by every command, before it starts, and by recipes."""

import inspect
import typing

import pytest
from cyclopts import ValidationError

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
        ("teach x --label-dropout 1.5", "0 <= number < 1"),
        ("teach x --label-dropout -0.1", "0 <= number < 1"),
        ("teach x --ema 1", "0 <= number < 1"),
        ("teach x --lr 0", "0 < number"),
        ("teach x --lr nan", "0 < number"),
        ("teach x --batch 0", "1 <= number"),
        ("teach x --widths 8 0", "1 <= number"),
        ("classifier x --steps -3", "1 <= number"),
        ("sample mnist -n 0", "1 <= number"),
        ("sample mnist --guidance -1", "0 <= number"),
        ("eval mnist --batch 0", "1 <= number"),
        ("compare x --guidance 0.5", "1 <= number"),
        ("plan mnist --utilisation 1.5", "0 < number <= 1"),
        ("serve mnist --port 70000", "0 <= number <= 65535"),
    ],
)
def test_a_number_beyond_its_range_is_refused(line, message):
    with pytest.raises(ValidationError) as refused:
        app(line.split(), exit_on_error=False, print_error=False)
    assert f"Expected {message}." in str(refused.value)
    assert line.split()[-1] in str(refused.value) or "nan" in line or "widths" in line


def test_the_ends_of_a_range():
    Range(0, 1)(float, 0.0)
    Range(0, 1)(float, 1.0)
    Range(0, 1, open=")")(float, 0.0)
    for wrong in (1.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Expected 0 <= number < 1"):
            Range(0, 1, open=")")(float, wrong)
    with pytest.raises(ValueError, match="Expected 0 < number"):
        Range(0, open="(")(float, 0.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.ema=1", "less than 1"),
        ("student.optimizer.betas=[0.9,1.0]", "less than 1"),
        ("student.optimizer.betas=[-0.1,0.9]", "greater than or equal to 0"),
        ("fake.optimizer.lr=0", "greater than 0"),
        ("fake.optimizer.lr=.inf", "finite"),
        ("match.guidance=-1", "greater than or equal to 0"),
        ("pairs.guidance=-1", "greater than or equal to 0"),
        ("student.guidance=[-1,3]", "greater than or equal to 0"),
        ("student.t=-5", "greater than or equal to 0"),
    ],
)
def test_a_recipes_number_beyond_its_range_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("mnist", [override])
