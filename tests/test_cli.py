"""The command line: help that teaches, mistakes without tracebacks, commands that fit together."""

import importlib
import json
from pathlib import Path

import pytest
import tiny
import yaml
from forked import command

from distmatch.commands.cli import app
from distmatch.commands.train import train

COMMANDS = ["demo", "recipes", "train", "teach", "classifier", "pairs", "sample", "compare", "eval", "serve", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        app([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"distmatch {command}" in out
    assert len(out.splitlines()) > 3
    assert "[ARGS" not in out
    assert "--no-" not in out  # every switch is off unless it is given


def test_the_first_screen_names_every_command(capsys):
    with pytest.raises(SystemExit):
        app(["--help"])
    out = capsys.readouterr().out
    assert all(f"│ {command} " in out for command in COMMANDS)


def test_dry_run_prints_the_resolved_recipe_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("mnist", "match.weighting=eq8", "steps=7", dry_run=True)
    out = capsys.readouterr().out
    assert "\n# Updates of the student. " in out
    first = out.partition("\n\n")[0]
    assert first.startswith(
        "# mnist: 7 steps with match, regress, of the teacher mnist\n#   changed: steps is 7, was 600\n"
    )
    assert "#   changed: match.weighting is eq8, was algorithm2\n#   written: the run to runs/mnist-steps=7-m" in first
    assert "#   written: noise-image pairs to a folder in runs/pairs, unless they are there\n# All 1" in first
    printed = yaml.safe_load(out)
    assert printed["steps"] == 7
    assert printed["match"]["weighting"] == "eq8"
    assert printed["student"]["optimizer"]["betas"] == [0.9, 0.999]
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_a_message_and_code_2(tmp_path):
    for arguments, message in (
        (["train", "mnist", "match.wieghting=eq8"], "did you mean 'match.weighting'?"),
        (["train", "mnist", "teacher=nobody", "--runs", tmp_path], "teacher 'nobody' is neither a model folder nor"),
        (["pairs", "verify", tmp_path], "is not a store of pairs"),
    ):
        done = command(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_pairs_train_report_in_a_row(tmp_path):
    """The stores meet: pairs built ahead are found by training; a flipped byte is found by verify."""
    recipe = tiny.recipe_file(tmp_path, steps=2)
    runs = tmp_path / "runs"
    built = command("pairs", "build", recipe, "--runs", runs)
    assert built.returncode == 0, built.stderr
    (store,) = (runs / "pairs").iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in store.iterdir()}
    trained = command("train", recipe, "--runs", runs)
    assert trained.returncode == 0, trained.stderr
    assert {file: file.stat().st_mtime_ns for file in store.iterdir()} == stamps
    assert json.loads((runs / "tiny" / "model" / "config.json").read_text())["times"] == [80.0]
    assert command("report", runs / "tiny").stdout.strip() == str(runs / "tiny" / "report.html")
    shard = next(store.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    broken = command("pairs", "verify", store)
    assert broken.returncode == 2
    assert shard.name in broken.stderr
    assert "is damaged" in broken.stderr


@pytest.mark.parametrize("name", ["train", "demo", "teach", "teach_text", "eval", "serve"])
def test_a_command_says_first_what_it_loads(name, monkeypatch, capsys):

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    module = importlib.import_module(f"distmatch.commands.{name}")
    real = module.starting
    monkeypatch.setattr(module, "starting", lambda work: (real(work), reached()))
    called = {"eval": "evaluate"}.get(name, name)
    with pytest.raises(Reached):
        getattr(module, called)("mnist")
    assert "Loading PyTorch" in capsys.readouterr().err
    if name == "train":
        for out, named in ((None, "mnist-terms=match"), (Path("elsewhere"), "elsewhere")):
            with pytest.raises(Reached):
                train("mnist", "terms=match", out=out)
            assert capsys.readouterr().err == f"Loading PyTorch, then checking what {named} needs ...\n"
