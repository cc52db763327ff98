"""Files that were made to do harm, or have the wrong form: one clear refusal, in bounded time and memory."""

import json
import re

import pytest
import yaml

from distmatch import log
from distmatch.config import load_recipe
from distmatch.plain import json_of, read_json, read_yaml, yaml_of
from distmatch.report import report
from distmatch.run import same_settings

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Under 500 bytes that stand for 9^9 words."""

WRONG_JSON = {
    b"[]": "has the wrong form: input should be a valid dictionary, not []",
    b"null": "has the wrong form: input should be a valid dictionary, not None",
    b"": "is not valid JSON",
    b"\xff\xfe{": "is not valid JSON",
    b"{" * 100_000: "is not valid JSON",
    b"[" * 100_000: "is not valid JSON: it is nested too deeply",
    b'{"a": ' + b"9" * 10_000 + b"}": "is not valid JSON: Exceeds the limit",
}


@pytest.mark.parametrize(("content", "message"), WRONG_JSON.items(), ids=range(len(WRONG_JSON)))
def test_json_of_the_wrong_form_is_named(content, message, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        read_json(file, dict[str, object], "Write it again")
    assert str(found.value).startswith(str(file))
    assert str(found.value).endswith(". Write it again")
    assert len(str(found.value)) < 400


WRONG_YAML = {
    LAUGHS: "aliases (*a) are not read; write out what it stands for",
    "a: 1\nb: 2\na: 3": "the key 'a' is given twice",
    "[" * 1_000: "is nested too deeply",
    "a: " + "9" * 10_000: "Exceeds the limit",
    "a: !!python/object/apply:os.system [id]": "could not determine a constructor",
    "- 1": "holds no recipe: expected `key: value` lines, not [1]",
    "\x00": "is not valid YAML",
    "#" * 300_000: "300,000 bytes are more than the 250,000 that are read. If that is meant, set DISTMATCH_LIMITS=2",
}


@pytest.mark.parametrize(("content", "message"), WRONG_YAML.items(), ids=range(len(WRONG_YAML)))
def test_yaml_of_the_wrong_form_is_named(content, message, tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        read_yaml(file)
    assert str(found.value).startswith(str(file))


def test_yaml_is_otherwise_what_it_was():
    text = "a: [1, 2.5, x, null, true]\nb: &unused {c: 2020-01-02}\n? d\n: e"
    assert yaml_of(text, "it") == yaml.safe_load(text)
    with pytest.raises(ValueError, match="override 'a=\\[': the value is not valid YAML"):
        load_recipe("mnist", ["a=["])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("stages: 5", "stages has the wrong form"),
        ("stages: [5]", "stages has the wrong form: 0: input should be a valid dictionary, not 5"),
        ("stages: [{until: 9, change: 5}]", "change has the wrong form: input should be a valid dictionary, not 5"),
        ("stages: [{until: 9, chnage: {}}]", "unknown key 'stages.0.chnage'; did you mean 'change'?"),
        ("match: 5", "match.batch: match is a value, not a group of entries"),
        ("match: {guidance: .nan}", "match.guidance = nan: input should be a finite number"),
        ("generator: {betas: [1, .inf]}", "generator.betas.1 = inf"),
        ("pairs: null", "pairs = None"),
        ("1: 2", "1 = 1: keys should be strings"),
        ("base: [x]", "recipe"),
    ],
)
def test_a_recipe_of_the_wrong_form_is_named(entry, message, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"teacher: mnist\nsteps: 9\n{entry}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(str(file), ["match.batch=4"])


def test_log_lines_of_the_wrong_form_are_named_and_a_cut_one_is_dropped(tmp_path):
    file = tmp_path / "log.jsonl"
    good = '{"step": 1, "loss": 0.5}\n'
    for bad in ("[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 2, "loss": {}}', "oops", '{"step": 2.5}', ""):
        file.write_text(good + bad + "\n" + good)
        with pytest.raises(ValueError, match=r"log.jsonl, line 2 .*Delete the line"):
            log.read(file)
    file.write_text(good + "[1]")  # whole, and not of a log
    with pytest.raises(ValueError, match="line 2"):
        log.read(file)
    for cut in ("", '{"step": 2, "lo', '{"step": 2'):
        file.write_text(good + cut)
        assert log.read(file) == [{"step": 1, "loss": 0.5}]
    file.write_text(good + '{"step": 2}')
    assert log.read(file)[1] == {"step": 2}


def test_a_run_with_files_of_the_wrong_form_is_named_by_the_report(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    for content, message in (
        ("[]", "eval.json has the wrong form"),
        ('{"rows": 5}', "eval.json, rows has the wrong form"),
        ('{"rows": [5]}', "eval.json, rows has the wrong form"),
        ('{"rows": [{"frechet": "low"}]}', "eval.json, row 0 has the wrong form: frechet"),
    ):
        (tmp_path / "eval.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            report([tmp_path], tmp_path / "report.html")
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings.json has the wrong form"):
        report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"settings.json has the wrong form"):
        same_settings({"a": 1}, tmp_path / "settings.json")


def test_limits_are_raised_by_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "some.yaml"
    file.write_text("#" * 300_000 + "\na: 1")
    monkeypatch.setenv("DISTMATCH_LIMITS", "2")
    assert read_yaml(file) == {"a": 1}
    for wrong in ("x", "nan", "inf"):
        monkeypatch.setenv("DISTMATCH_LIMITS", wrong)
        with pytest.raises(ValueError, match="DISTMATCH_LIMITS is"):
            read_yaml(file)


def test_json_may_hold_what_python_writes():
    assert json_of(json.dumps({"a": [float("inf")]}), "it", dict[str, object]) == {"a": [float("inf")]}
