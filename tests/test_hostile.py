"""Files that were made to do harm, or have the wrong form: one clear refusal, in bounded time and memory."""

import io
import json
import re
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import tiny
import yaml
from pyarrow import parquet
from rich.table import Table

from distmatch.commands import cli
from distmatch.commands.binding import same_settings
from distmatch.commands.report_page import report
from distmatch.data.prompts import read_prompts
from distmatch.evaluation.features import load_real, load_statistics
from distmatch.models.classifier import Classifier
from distmatch.models.diffusers.families import family_in
from distmatch.models.diffusers.hub import fetched
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import load_model
from distmatch.recipe.loading import load_recipe
from distmatch.system import limits
from distmatch.system.plain import json_of, read_json, read_yaml, yaml_of
from distmatch.system.progress import progress
from distmatch.system.screen import Screen, printable
from distmatch.training import log

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Under 500 bytes that stand for 9^9 words."""

WRONG_JSON = {
    b"[]": "has the wrong form: expected `key: value` entries, not []",
    b"null": "has the wrong form: expected `key: value` entries, not None",
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
        ("stages: [5]", "stages has the wrong form: 0: expected `key: value` entries, not 5"),
        ("stages: [{until: 9, change: 5}]", "change has the wrong form: expected `key: value` entries, not 5"),
        ("stages: [{until: 9, chnage: {}}]", "unknown key 'chnage' in stage 1; did you mean 'change'?"),
        ("match: 5", "match.batch: match is a value, not a group of entries"),
        ("match: {guidance: .nan}", "match.guidance = nan: expected a finite number"),
        ("generator: {betas: [1, .inf]}", "student.optimizer.betas.1 = inf"),
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


@contextmanager
def little_memory(most: int = 50 * limits.MB):
    """Within it, Python's objects and NumPy's arrays take `most` bytes at most."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": 5}, "config.json has the wrong form: network: expected `key: value` entries, not 5"),
        (
            {"network": {"type": "unet", "widths": [10**9, 10**9]}},
            "cannot be built: widths is 1000000000, and all",
        ),
        ({"network": {"type": "unet", "blocks": 10**9}}, "cannot be built: blocks is 1000000000, and all"),
        ({"network": {"type": "unet", "blocks": 500}}, r"its network cannot be built: it has more weights of shape"),
        ({"network": {"type": "mlp", "depth": 10**4}}, "its network cannot be built: it has more"),
        ({"network": {"type": "dhariwal", "num_blocks": 10**4}}, "its network cannot be built: it has more"),
        ({"network": {"type": "unet", "widths": "ab"}}, "its network cannot be built"),
        ({"network": {"type": "unet", "surprise": 1}}, "its network cannot be built: .*surprise"),
        ({"shape": [1, 10**6, 10**6]}, r"shape \(1, 1000000, 1000000\): 1,000,000,000,000 numbers are more than"),
        ({"shape": []}, r"config.json: shape is \(\); expected"),
        ({"shape": [1, -8, 8]}, r"config.json: shape is \(1, -8, 8\); expected"),
        ({"shape": "abc"}, "config.json has the wrong form: shape"),
        ({"classes": [1, 2, 3]}, "config.json has the wrong form: classes.0"),
        ({"classes": ["a", "b"]}, "config.json: its network is for 3 classes, and it says 2 of them"),
        ({"classes": ["a", "b", "c", "d"]}, "its network is for 3 classes, and it says 4"),
        ({"shape": [3, 8, 8]}, "its network is for 1 channels, and it says 3"),
        (
            {"network": "unet"},
            "config.json has the wrong form: network: expected `key: value` entries, not 'unet'",
        ),
        ({"schedule": "edm"}, "config.json has the wrong form: schedule: expected `key: value` entries"),
        ({"prediction": None}, "config.json has the wrong form: prediction"),
        ({"prediction": {"sigma_data": "x"}}, "config.json: prediction: sigma_data is 'x'; expected a number"),
        ({"prediction": {"sigma_data": 0}}, "config.json: prediction: sigma_data is 0; expected a positive number"),
        ({"schedule": {"type": "edm", "sigma_min": 100}}, "config.json: EDM: sigma_min is 100 and sigma_max 80.0"),
        ({"schedule": {"type": "edm", "sigma_min": "a"}}, "EDM: sigma_min is 'a'; expected a number"),
        ({"schedule": {"type": "edm", "rho": 0}}, "EDM: rho is 0; expected 0.1 to 100"),
        (
            {"schedule": {"type": "vp", "steps": 10**11}},
            "VP: steps is 100000000000; expected a whole number up to 100,000",
        ),
        ({"card": {"recipe": [1]}}, "config.json: card has the wrong form: recipe"),
        ({"card": {"recipe": {"match": 3}}}, "config.json: card.recipe.match has the wrong form"),
        ({"card": {"teach": "x"}}, "config.json: card has the wrong form: teach"),
        ({"t": float("nan")}, "config.json: t is nan; expected a time"),
        ({"t": 1e9}, "config.json: t is 1000000000.0; expected a time"),
    ],
)
def test_a_model_that_says_something_absurd_is_refused_before_memory_is_taken(change, message, tmp_path):
    file = tiny.teacher_folder(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    config.pop("sha256", None)
    if "network" in change and isinstance(change["network"], dict):
        change = {"network": {**config["network"], **change["network"]}}
        if change["network"]["type"] != "unet":
            change["network"] = {k: v for k, v in change["network"].items() if k in ("type", "depth", "num_blocks")}
    file.write_text(json.dumps(config | change))
    with little_memory(), pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_classifier_that_says_something_absurd_is_refused_before_memory_is_taken(tmp_path):
    Classifier(1, (8, 8), ["a", "b"], (4, 4, 4)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("sha256", None)
    for change in ({"widths": [10**9] * 3}, {"channels": 10**12}, {"widths": 5}, {"classes": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with little_memory(), pytest.raises(ValueError, match=f"{tmp_path} is damaged"):
            Classifier.load(tmp_path)


def test_a_model_in_diffusers_format_of_the_wrong_form_is_named(tmp_path):
    source = write_tiny_sd(tmp_path)
    for name, content in (
        ("model_index.json", "[]"),
        ("unet/config.json", "null"),
        ("scheduler/scheduler_config.json", '{"a": '),
        ("text_encoder/config.json", "[" * 5000),
    ):
        before = (source / name).read_text()
        (source / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} "):
            family_in(str(source)).settings(str(source))
        (source / name).write_text(before)

    def endless():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(source, subfolder="unet")

    config = json.loads((source / "unet/config.json").read_text())
    (source / "unet/config.json").write_text(json.dumps(config | {"layers_per_block": 10**6}))
    with pytest.raises(ValueError, match="cannot be loaded: it has more than 20 weights"):
        limits_of(limits.TENSORS, 20, lambda: fetched(str(source), endless))


def limits_of(most, lowered, work):
    """`work()` with the limit `most` lowered to `lowered`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(limits.VARIABLE, str(lowered / most))
        return work()


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(dtype: str, shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """An array of any shape that the header may say."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_arrays_that_are_not_what_they_say_are_refused_before_memory_is_taken(tmp_path):
    file = tmp_path / "x.npz"
    small = {"mu": npy("<f8", (2,), bytes(16)), "sigma": npy("<f8", (2, 2), bytes(32))}
    bomb = npy("|u1", (100_000, 32, 32, 1), bytes(102_400_000))
    with little_memory(300 * limits.MB):
        bombs = {"bomb": npz(arr_0=bomb)}
    assert len(bombs["bomb"]) < 200_000
    for content, read, message in (
        (npz(arr_0=npy("|u1", (10**12, 64, 64, 3))), load_real, "is damaged"),
        (npz(arr_0=npy("<f8", (5, 4, 4, 3), bytes(5 * 48 * 8))), load_real, "arr_0 is float64"),
        (npz(mu=npy("<f8", (10**9,)), sigma=npy("<f8", (10**9, 10**9))), load_statistics, "is damaged"),
        (npz(mu=small["mu"], sigma=npy("<f8", (10**6, 10**6))), load_statistics, "is damaged"),
        (npz(mu=npy("|O", (2,), b"cos\nsystem\n"), sigma=small["sigma"]), load_statistics, "mu is object"),
        (npz(arr_0=b"\x93NUMPY\x01\x00\xff\xff{"), load_real, "is damaged"),
    ):
        file.write_bytes(content)
        with little_memory(), pytest.raises(ValueError, match=message):
            read(file)
    file.write_bytes(bombs["bomb"])
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"x.npz: arr_0: 102,400,000 bytes are more than the 81,920,000"),
    ):
        limits_of(1, 0.01, lambda: load_real(file))
    file.write_bytes(npz(**small))
    assert load_statistics(file).mu.tolist() == [0, 0]
    (tmp_path / "x.npy").write_bytes(npy("|u1", (10**12, 64, 64, 3)))
    with little_memory(), pytest.raises(ValueError, match="is damaged"):
        load_real(tmp_path / "x.npy")


def test_prompts_without_end_are_refused_before_they_are_read(tmp_path):
    long = tmp_path / "long.txt"
    with long.open("wb") as file:
        file.write(b"short\n")
        file.truncate(100 * limits.MB)
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"long.txt, line 2: 99,999,994 bytes are more than"),
    ):
        read_prompts(long)
    with long.open("wb") as file:
        file.truncate(5000 * limits.MB)
    with pytest.raises(ValueError, match=r"long.txt: 5,000,000,000 bytes are more than .*DISTMATCH_LIMITS=2"):
        read_prompts(long)
    long.write_bytes(b"x" * 2 * limits.MB + b"\nlast")
    assert [len(prompt) for prompt in limits_of(1, 3, lambda: read_prompts(long))] == [2 * limits.MB, 4]


def test_a_table_that_unpacks_without_end_is_refused(tmp_path):
    """A text that all rows share takes the memory of one; a text or a table that is too long is refused."""
    file = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"caption": ["x" * 40_000] * 5_000 + [None, "y"]}), file)  # 200 MB of text
    with little_memory():
        prompts = read_prompts(file)
    assert len(prompts) == 5_001
    assert set(prompts) == {"x" * 40_000, "y"}
    parquet.write_table(pa.table({"caption": ["a", "x" * (limits.MB + 1)]}), file)
    with pytest.raises(ValueError, match=r"column 'caption', rows from 1: 1,000,001 bytes are more than"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"column 'caption': [\d,]+ bytes are more than the 409,600"):
        limits_of(1, 1e-4, lambda: read_prompts(file))
    parquet.write_table(pa.table({"caption": [["a"]]}), file)
    with pytest.raises(ValueError, match="expected text, found list"):
        read_prompts(file)


NAME = "\x1b]0;owned\x07\x1b[2J\u202egnp\r[red]" + "x" * 1000


def test_no_name_takes_hold_of_the_terminal(capsys, monkeypatch):
    screen, table = Screen(file=io.StringIO(), force_terminal=True, width=200, soft_wrap=True), Table(NAME, box=None)
    table.add_row(NAME, style="dim")
    screen.print(NAME)
    screen.print(table)
    with screen.status(NAME), progress(NAME, 2) as advance:
        advance(2)
    monkeypatch.setattr(sys, "argv", ["distmatch", "sample", NAME])
    with pytest.raises(SystemExit):
        cli.main()
    for shown in (screen.file.getvalue(), *capsys.readouterr()):
        assert not [part for part in ("\x07", "\u202e", "\x1b[2J", "\x1b]", "gnp\r") if part in shown]
    assert "\\x1b]0;owned\\x07\\x1b[2J\\u202egnp\\r[red]" in screen.file.getvalue()
    assert printable(NAME) == f"\\x1b]0;owned\\x07\\x1b[2J\\u202egnp\\r[red]{'x' * 999}"[:120] + "..."
    assert printable("ünïcödé 猫 \ud800\n") == "ünïcödé 猫 \\ud800\\n"
