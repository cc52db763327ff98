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
