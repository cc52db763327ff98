"""The command that makes a table of docs/results.md: what it runs and in which order, what it skips, what it prints."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import Forked

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import table
import table_rows

from distmatch.system.errors import UserError

TABLES = sorted((Path(table.__file__).parent / "tables").glob("*.yaml"))

ROWS = [
    {"name": "first", "title": "first of all", "overrides": "terms=regress", "seeds": 2},
    {"name": "second", "overrides": "SLOW", "after": "first", "seeds": 2},
    {"name": "teacher", "measure": "mnist --teacher"},
]
PLAIN = {
    "recipe": "mnist",
    "common": "steps=10",
    "words": {"SLOW": "student.optimizer.lr=1e-4 steps=20"},
    "prepare": ["pairs build mnist COMMON", "teach images"],
    "evaluate": "-n 100",
    "rows": ROWS,
    "tiny": {
        "overrides": "steps=2 match.batch=2 regress.batch=2 pairs.count=8 pairs.steps=2 pairs.shard=8 evaluate.every=0",
        "prepare": [],
        "evaluate": "-n 1200",
    },
}

INSTEAD = """
import json, os, sys, time
from pathlib import Path
command, *rest = sys.argv[1:]
run = rest[-1].removesuffix("/figures.json") if command in ("train", "eval") else command
with open("calls", "a") as file:
    file.write(f"{command} {run} {os.environ['OMP_NUM_THREADS']}\\n")
if command == "train" and Path(run + ".hangs").exists():
    import signal
    signal.signal(signal.SIGTERM, lambda *_: (Path(run + ".saved").touch(), sys.exit(143)))
    Path(run + ".begun").touch()
    time.sleep(60)
if command == "train" and Path(run + ".fails").exists():
    sys.exit(f"{run} is broken")
if command == "eval":
    seed = int(run[-1])
    row = {"frechet/pooled": 0.5 + seed / 4, "frechet/pixels": 2 + seed, "precision/pixels": 0.25, "recall/pixels": 1.0}
    Path(rest[-1]).write_text(json.dumps({"rows": [{**row, "accuracy": 0.5 + seed / 10}, {"frechet/pixels": -1.0}]}))
    Path(run, "log.jsonl").write_text('{"step": 1, "seconds": 30.0}\\n{"step": 2, "seconds": 90.0}\\n')
"""
"""Stands for `distmatch`: notes what it is asked for."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The command on the table `PLAIN`, in this process, with `INSTEAD`; returns its status and what it has run."""
    instead, out = tmp_path / "instead.py", tmp_path / "out"
    instead.write_text(INSTEAD)
    out.mkdir()
    monkeypatch.setattr(table, "DISTMATCH", [sys.executable, str(instead)])

    def run(**options):
        file = tmp_path / "table.yaml"
        file.write_text(yaml.safe_dump({**PLAIN, **options.pop("change", {})}))
        (out / "calls").write_text("")
        status = table.main(file, out=out, **options)
        return status, [line.rpartition(" ")[0] for line in (out / "calls").read_text().splitlines()]

    return run


ALL = [
    *("pairs pairs", "teach teach"),
    *(f"{command} {run}" for run in ("first-0", "first-1", "second-0", "second-1") for command in ("train", "eval")),
    "eval teacher-0",
]


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_the_tables_of_the_results_are_of_recipes(file, tiny):
    found = table_rows.load_table(file, tiny)
    tasks = table_rows.plan(found, Path("out"))
    assert len({task.name for task in tasks}) == len(tasks) > len(found.rows)


def test_a_tiny_table_end_to_end(tmp_path, capsys):
    """Real commands: a row, one that goes on with its student, one that fails and one after that."""
    broken = [
        {"name": "broken", "overrides": "student.init=nowhere"},
        {"name": "never", "after": "broken"},
    ]
    file, out = tmp_path / "table.yaml", tmp_path / "out"
    rows = [{**row, "seeds": 1} for row in ROWS[:2]]
    file.write_text(yaml.safe_dump({**PLAIN, "rows": [*broken, *rows]}))
    assert table.main(file, out=out, jobs=2, tiny=True) == 1
    said = capsys.readouterr().out
    assert f"broken-0-train: failed with exit status 2, see {out / 'logs' / 'broken-0-train.log'}: distmatch: " in said
    assert "never-0-train: not begun" in said
    assert "nowhere" in (out / "logs" / "broken-0-train.log").read_text()
    lines = (out / "table.md").read_text().splitlines()
    head, (_, _, first, second) = lines[0].strip("| ").split(" | "), lines[2:6]
    assert second.startswith("| second | after first: `SLOW` | 2 + 2 |")
    for name, line in (("first", first), ("second", second)):
        figures = json.loads((out / f"{name}-0" / "figures.json").read_text())["rows"][0]
        shown = dict(zip(head, line.strip("| ").split(" | "), strict=True))
        for space in ("pixels", "3x3 positions", "pooled"):
            assert float(shown[f"Frechet: {space}"]) == pytest.approx(figures[f"frechet/{space}"], abs=0.0051)
            both = [float(part) for part in shown[f"precision, recall: {space}"].split(", ")]
            assert both == pytest.approx([figures[f"precision/{space}"], figures[f"recall/{space}"]], abs=0.00051)
        assert float(shown["class accuracy"].removesuffix(" %")) == pytest.approx(100 * figures["accuracy"], abs=0.051)
        assert shown["seeds"] == "1"
    recipe = yaml.safe_load((out / "second-0" / "recipe.yaml").read_text())
    assert (recipe["student"]["init"], recipe["student"]["optimizer"]["lr"], recipe["steps"]) == ("first-0", 1e-4, 2)
    assert table.main(file, out=out, tiny=True, only=("second",)) == 0
    assert "distmatch" not in capsys.readouterr().out.partition("|")[0]  # nothing was begun


def test_the_commands_come_in_order_and_only_once(make, tmp_path, capsys):
    assert make() == (0, ALL)
    assert make() == (0, [])
    (tmp_path / "out" / "second-1" / "figures.json").unlink()
    assert make(jobs=3) == (0, ["eval second-1"])
    assert (
        "| second | after first: `SLOW` | 10 + 20 | 2.50 (2.00 to 3.00) | 0.625 (0.500 to 0.750) | .250, 1.000 | "
        "55.0 % | 1.5 | 2 |\n"
    ) in capsys.readouterr().out


def test_the_dry_run_is_a_script_of_the_same_commands(make, tmp_path, capsys):
    assert make(dry_run=True, change={"files": ["a.tar"]}, data=tmp_path / "my data") == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"mkdir -p {tmp_path / 'out'} && cd {tmp_path / 'out'}",
        f"test -e a.tar || ln -s '{tmp_path / 'my data' / 'a.tar'}' a.tar",
        "distmatch pairs build mnist steps=10",
    ]
    assert lines[-3:] == [
        "distmatch train mnist steps=10 student.optimizer.lr=1e-4 steps=20 student.init=first-1 seed=1 -o second-1",
        "distmatch eval second-1 -n 100 --out second-1/figures.json",
        "distmatch eval mnist --teacher -n 100 --out teacher-0/figures.json",
    ]


def test_the_dry_run_may_be_run_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    found = table_rows.load_table(TABLES[0]).model_copy(update={"files": ["a.tar"]})
    lines = table.script(found, [], Path("out"), Path())
    for _ in range(2):
        subprocess.run(["sh", "-ec", f"{lines}\n{lines}"], check=True)
    assert (tmp_path / "out" / "a.tar").resolve() == tmp_path / "a.tar"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]


def test_a_tiny_table_says_that_its_figures_mean_nothing(make, tmp_path, capsys):
    assert make(tiny=True)[0] == 0
    shown = (tmp_path / "out" / "table.md").read_text()
    assert shown.splitlines()[-1] == table.NOTHING
    assert "mean nothing" in table.NOTHING
    assert shown in capsys.readouterr().out
    make(tiny=True, dry_run=True)
    assert capsys.readouterr().out.startswith(f"# {table.NOTHING}\nmkdir ")
    make(dry_run=True)
    assert "mean nothing" not in capsys.readouterr().out


def test_rows_that_were_left_out_are_named_once(make, tmp_path):
    def shown():
        lines = (tmp_path / "out" / "table.md").read_text().splitlines()
        return [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")][2:], lines[-1]

    make(only=("teacher",))
    assert shown() == (["teacher"], "Not run: first, second")
    make(only=("second",), seeds=1)
    rows, last = shown()
    assert rows == ["first of all", "second", "teacher"]  # the last is measured, from before
    assert "Not run" not in last


def test_only_some_rows_with_what_they_come_after_and_fewer_seeds(make):
    assert make(only=("teacher",))[1] == ["pairs pairs", "teach teach", "eval teacher-0"]
    assert make(only=("second",), seeds=1)[1] == ALL[2:4] + ALL[6:8]


def test_several_at_once_share_the_cores_and_what_prepares_runs_alone(make, tmp_path, monkeypatch):
    monkeypatch.setattr(table.os, "sched_getaffinity", lambda _: set(range(8)))
    status, calls = make(jobs=4)
    assert (status, sorted(calls)) == (0, sorted(ALL))
    assert calls[:2] == ALL[:2]
    for before, after in (("train first-0", "train second-0"), ("train second-1", "eval second-1")):
        assert calls.index(before) < calls.index(after)
    threads = [line.rpartition(" ")[2] for line in (tmp_path / "out" / "calls").read_text().splitlines()]
    assert threads == ["8", "8", *["2"] * 9]


def test_a_failure_leaves_the_others_and_is_tried_again(make, tmp_path, capsys):
    fails = tmp_path / "out" / "first-0.fails"
    fails.touch()
    status, calls = make()
    assert status == 1
    assert calls == [call for call in ALL if call not in ("eval first-0", "train second-0", "eval second-0")]
    said = capsys.readouterr().out
    assert (
        f"failed with exit status 1, see {tmp_path / 'out' / 'logs' / 'first-0-train.log'}: first-0 is broken" in said
    )
    assert "second-0-train: not begun" in said
    fails.unlink()
    assert make() == (0, [*ALL[2:4], *ALL[6:8]])


def test_after_its_time_it_starts_nothing(make, capsys):
    assert make(seconds=0.0) == (0, [])
    assert "first-0-train: not begun" in capsys.readouterr().out
    assert make() == (0, ALL)


def test_what_another_command_made_is_not_taken_for_it(make):
    make()
    with pytest.raises(
        UserError, match=r"made by another command: distmatch .* -n 100 .*\n.* -n 200 .*\nDelete .*figures.json, or"
    ):
        make(change={"evaluate": "-n 200"})
    with pytest.raises(UserError, match=r"first-0/trained was made by another command.*\n.*\nDelete .*first-0, or"):
        make(change={"common": "steps=11", "prepare": []})
    edited = [*ROWS[:2], {**ROWS[2], "measure": "emoji --teacher"}]
    with pytest.raises(UserError, match=r"teacher-0/figures\.json was made by another command"):
        make(change={"rows": edited}, only=("first",))  # the table shows all rows


def test_data_sets_are_linked_and_never_deleted(make, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data, out):
        folder.mkdir(exist_ok=True)
        (folder / "a.tar").write_text(folder.name)
    change = {"files": ["a.tar"], "rows": ROWS[2:], "prepare": []}
    with pytest.raises(UserError, match=r"a\.tar is there already; delete it, or say --data .*out to use it"):
        make(change=change, data=data)
    assert make(change=change, data=out)[0] == 0
    assert (out / "a.tar").read_text() == "out"
    (out / "a.tar").unlink()
    for _ in range(2):
        assert make(change=change, data=data)[0] == 0
        assert (out / "a.tar").is_symlink()
        assert (out / "a.tar").read_text() == "data"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_stops_its_commands_and_goes_on_later(make, tmp_path, number):
    """Forked, with the handlers that the script sets."""
    hangs = tmp_path / "out" / "first-1.hangs"
    hangs.touch()

    def script():
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, table.interrupt)
        sys.exit(make()[0])

    process = Forked(script, "table.py")
    process.wait(lambda: (tmp_path / "out" / "first-1.begun").exists())
    process.kill(number)
    assert process.end() == 130
    assert (tmp_path / "out" / "first-1.saved").exists()
    hangs.unlink()
    assert make() == (0, ALL[4:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": []}, "row: extra inputs are not permitted"),
        ({"rows": [{"name": "a", "overrides": "stepz=3"}]}, "row a: .*stepz.*steps"),
        ({"rows": [{"name": "a", "overrides": "terms='match"}]}, "row a: .*: No closing quotation"),
        ({"rows": [{"name": "a", "after": "b"}]}, "row a: after b must be a row above"),
        ({"rows": [ROWS[0], {**ROWS[1], "seeds": 3}]}, "row second: after first must be a row above, with as many"),
        ({"rows": [ROWS[0], {**ROWS[0]}]}, "two rows are called first"),
        ({"files": ["a.tar"]}, "a.tar does not exist; say with --data FOLDER where a.tar is"),
    ],
)
def test_mistakes_are_named_before_anything_starts(make, change, message):
    with pytest.raises(UserError, match=message):
        make(change=change)


def test_an_unknown_row_is_named(make):
    with pytest.raises(UserError, match="--only third is unknown; expected some of first, second, teacher"):
        make(only=("third",))
