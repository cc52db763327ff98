"""Wrong calls end with one message that helps and code 2. `~` is the home folder wherever a path is given."""

import inspect
import re
import shlex
import signal
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import tiny
from subcommands import subcommands

from distmatch.commands import cli
from distmatch.evaluation.features import load_real
from distmatch.models.library import find_model
from distmatch.recipe import subjects
from distmatch.recipe.loading import entries, load_recipe, meant
from distmatch.system import options
from distmatch.system.errors import UserError
from distmatch.system.paths import expand
from distmatch.system.storage import Folder
from distmatch.system.terminal import command


def run(monkeypatch, capsys, *argv: object) -> tuple[int, str]:
    """`distmatch ARGV` in this process: its exit code and what it said on standard error."""
    monkeypatch.setattr(sys, "argv", ["distmatch", *map(str, argv)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


WRONG = {
    # What is meant is an entry of the recipe.
    "train mnist --steps 100": "Unknown option: --steps. Entries of a recipe have no dashes: steps=100",
    "train mnist --match.weighting=eq8": "no dashes: match.weighting=eq8",
    "train mnist --match-weighting eq8": "no dashes: match.weighting=eq8",
    "train mnist --lr 3e-4": "no dashes: student.optimizer.lr=3e-4 or gan.optimizer.lr=3e-4 or fake.optimizer.lr=3e-4",
    "plan mnist --steps 5": "no dashes: steps=5",
    "pairs build mnist --count 5": "no dashes: pairs.count=5",
    "train mnist --frobnicate 3": "Unknown option: --frobnicate; see `distmatch train --help`",
    "sample mnist steps=5": "Unexpected 'steps=5': write --steps 5",
    "sample mnist --steps 5": "5 steps: this student was trained for 1, at t = 80",
    "sample mnist 5": "Unexpected '5': options have names",
    "eval mnist n=5": "Unexpected 'n=5'",
    # The command line is to blame, not the packaged file.
    "train mnist terms=mtach": "terms=mtach on the command line: unknown term 'mtach' in terms; expected match",
    "train mnist match.wieghting=eq8": "match.wieghting=eq8 on the command line: unknown key 'match.wieghting'; did",
    "train mnist mtach.weighting=eq8": "mtach.weighting=eq8 on the command line: unknown key 'mtach'; did you mean",
    "train mnist steps=": "distmatch: a value is missing after steps=",
    "train mnist student.times=": "a value is missing after student.times=; null means none",
    "train mnist steps.x=8": "steps.x: steps is a value, not a group of entries",
    "train mnist match=5": "match=5 on the command line: match = 5: expected a group of entries",
    "train mnist image_size=[64]": "image_size = [64]: expected more values than these",
    "train mnist student.times=399": "student.times = 399: expected a list of values, [399]",
    "train mnist log.track=wandb": "log.track = 'wandb': expected a list of values, [wandb]",
    "train mnist student.optimizer.betas=0.9": "student.optimizer.betas = 0.9: expected a list of values",
    "train mnist match.max_step=2000": "match.max_step=2000 on the command line: expected min_step < max_step <= bins",
    "train mnist stages=[{until:_500}]": "stages=[{until: 500}] on the command line: stages end at [500]",
    "train mnist stages=[{until:_600,_chnage:_{}}]": "unknown key 'chnage' in stage 1; did you mean 'change'?",
    # Words in another's place.
    "train steps=5 mnist": "'steps=5' is no recipe; the recipe comes first",
    "train mnits": "recipe 'mnits' is unknown; did you mean 'mnist'?",
    "train": 'Command "train" parameter RECIPE requires an argument; see `distmatch train --help`',
    "train mnist -o": "parameter -o requires an argument",
    "train mnist --scale cpu": 'Invalid value "cpu" for --scale. Choose from: "full", "cpu-smoke"',
    "frobnicate": 'Unknown command "frobnicate". Available commands: demo, recipes, train,',
    "sampel mnist": "checkpoints, ... See `distmatch --help`",
    "demo toy3d": 'Did you mean "toy2d"? See `distmatch demo --help`',
    "sample mnist -n x": 'Invalid value for -n: unable to convert "x" into int',
    "sample cifar10-cond": "cifar10-cond is a recipe",
    "train runs/mnist": "runs/mnist is neither a recipe of the package nor a file called .yaml",
    "train mnist.yaml": "recipe file mnist.yaml does not exist",
    "sample nobody": "neither a model folder nor a run; the package ships emoji, mnist",
    # Conditions that are needed, or not taken.
    "sample emoji": "this model makes images of prompts; give one (-p of distmatch sample)",
    "sample emoji -p x\udcff": r"the prompt: character 2, '\udcff', is not Unicode text",
    "sample mnist -p cat": "this model takes no prompts; give labels (--label of distmatch sample)",
    "compare mnist mnist": "mnist makes no images of prompts, which a comparison is about; measure it",
    "compare emoji mnist": "measure it with distmatch eval mnist",
    "compare emoji": "no prompts: name a file or a folder of captioned pictures, --prompts FILE_OR_FOLDER, or",
    "compare emoji emoji": "`distmatch demo emoji` has its own; --prompts emoji are those that it was trained on",
    # What is not there.
    "sample mnist -n 100000000000": "free, and 100,000,000,000 images may take 488.0 TB. Make room",
    "pairs build mnist pairs.count=1000000000000": "free, and the pairs take 3,136.0 TB. Make room",
    "sample mnist --device mps": "device 'mps' is not available here; use auto or cpu",
    "sample mnist --device meta": "device 'meta' is not available here; use auto or cpu",
    "sample edm: --teacher": "edm: is no file here",
    "sample diffusers:/no/such/model --teacher": "'/no/such/model' is neither a folder here nor a model id",
    "teach nothing.zip": "nothing.zip does not exist",
    "train ~nobody-of-this-name/x.yaml": "~nobody-of-this-name is no user's home here",
}


def mistake(said: str) -> str:
    """Without the line that says what a command loads first."""
    return re.sub(r"^Loading PyTorch.* \.\.\.\n", "", said)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_is_told_what_is_wrong_with_it(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = run(monkeypatch, capsys, *(word.replace("_", " ") if "{" in word else word for word in line.split()))
    assert code == 2, said
    assert WRONG[line] in " ".join(said.split())
    assert mistake(said).startswith("distmatch: ")
    assert not re.search(r"[.?!][;,]|(?<!\.)\.\.(?!\.)", said)  # of parts that were joined
    assert "Traceback" not in said
    assert "site-packages" not in said
    assert len(said) < 600
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("line", ["sample @", "compare emoji @", "train @", "report @", "train mnist --out @"])
def test_an_empty_name_is_said_to_be_empty(line, monkeypatch, capsys, tmp_path):
    """It would be the folder here, whose contents the messages would then be about."""
    monkeypatch.chdir(tmp_path)
    Path("000000.png").touch()
    for empty in ("", " "):
        code, said = run(monkeypatch, capsys, *(word.replace("@", empty) for word in line.split()))
        assert code == 2
        assert f"Expected a name or a path, not {empty!r}, which is empty; . is the folder here; see" in said
        assert ("for --out: " in said) == ("--out" in line)


def test_a_model_of_no_name_is_none():
    with pytest.raises(UserError, match="the name of the student is empty"):
        find_model("", "student")


def test_a_mistake_of_the_file_is_not_blamed_on_the_command_line(tmp_path):
    file = tiny.recipe_file(tmp_path, match={"batch": 4, "min_step": 900, "max_step": 100})
    with pytest.raises(ValueError, match=r"tiny\.yaml: expected min_step < max_step") as error:
        load_recipe(str(file), ["match.weight=2", "steps=5"])
    assert "command line" not in str(error.value)


def test_entries_are_the_recipes_own():
    resolved = load_recipe("mnist")
    for entry in entries():
        value = resolved
        for name in entry.split("."):
            value = value and getattr(value, name)
    assert {"steps", "match.weighting", "student.network.width", "stages", "own_terms"} <= set(entries())
    assert meant("lr") == ["student.optimizer.lr", "gan.optimizer.lr", "fake.optimizer.lr"]
    assert meant("fake.steps") == ["fake.steps"]
    assert meant("steps") == ["steps"]
    assert meant("guidence") == [f"{group}.guidance" for group in ("student", "match", "guide", "pairs")]
    assert meant("zzz") == []


# `~`


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_behind_any_scheme_and_nowhere_else(home):
    assert expand("~") == str(home)
    assert expand("~/a b/c") == f"{home}/a b/c"
    assert expand("edm:~/net.pkl") == f"edm:{home}/net.pkl"
    assert expand("diffusers:~/sd") == f"diffusers:{home}/sd"
    assert expand("inception:~/i.pt") == f"inception:{home}/i.pt"
    assert expand("file://~/x") == f"file://{home}/x"
    for other in ("s3://bucket/~/x", "a/~/b", "mnist", "./~/x", "edm:a~b", "org/model", ""):
        assert expand(other) == other


def test_every_recipe_entry_that_is_a_path_knows_the_home_folder(home):
    overrides = {
        "teacher": "edm:~/t.pkl",
        "student.init": "~/init",
        "pairs.path": "~/pairs",
        "prompts.path": "~/p.txt",
        "prompts.cache": "~/cache",
        "regress.weights": "~/w",
        "regress.tiny": "~/tiny",
        "evaluate.features": "inception:~/i.pt",
        "evaluate.reference": "~/r.npz",
    }
    recipe = load_recipe("mnist", [f"{key}={value}" for key, value in overrides.items()])
    for key, value in overrides.items():
        found = recipe
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value.replace("~", str(home))


def test_a_recipe_in_the_home_folder_and_its_base_there_are_found(home):
    tiny.recipe_file(home)
    (home / "own.yaml").write_text("base: ~/tiny.yaml\nsteps: 7\n")
    assert load_recipe("~/own.yaml").steps == 7


def test_python_knows_the_home_folder_too(home):
    tiny.teacher_folder(home / "teacher")
    assert find_model("~/teacher", kind="teacher")[1].shape == (1, 8, 8)
    tiny.image_folder(home / "images")
    assert len(load_real(Path(expand("~/images")))) == 16
    Folder("~/store").write("a", lambda p: p.write_bytes(b"1"))
    assert (home / "store" / "a").read_bytes() == b"1"
    assert not Path("~").exists()


def test_what_commands_are_given_is_expanded_but_for_words_that_are_no_paths(home):
    def arguments(*argv: str) -> dict:
        return cli.app.parse_args(list(argv), exit_on_error=False, print_error=False)[1].arguments

    assert arguments("report", "~/a", "b", "--out=~/c") == {"runs": (home / "a", Path("b")), "out": home / "c"}
    found = arguments("sample", "edm:~/a", "-p", "~/said", "-o", "~/o")
    said = found["options"]
    assert (found["model"], said.prompt, said.out) == (f"edm:{home}/a", ["~/said"], home / "o")
    given = [
        "diffusers:~/sd",
        "~/student",
        "--prompts=~/p",
        "--coco=~/c",
        "--clip=~/k",
        "--lora=~/l",
        "--reference=~/r",
    ]
    found = arguments("compare", *given, "--features=inception:~/i")
    assert "~" not in str(found.values())
    said = found["options"]
    assert (found["teacher"], said.coco, said.lora) == (f"diffusers:{home}/sd", home / "c", f"{home}/l")


NO_PATHS = {"overrides", "label", "prompt", "column", "clip_model", "split", "device", "host", "gpu"}


def test_every_word_that_a_command_takes_is_a_path_or_known_to_be_none():
    """A new command's paths are expanded as well: a bare `str` or `Path` has to be named above."""
    for name, function in subcommands(cli.app):
        for parameter in _parameters(function):
            kinds = [parameter.annotation, *get_args(parameter.annotation)]
            bare = {str, Path, str | None, Path | None, list[str] | None} & {k for k in kinds if _hashable(k)}
            marks = [mark for kind in kinds for mark in _marks(kind)]
            marked = any(getattr(mark, "converter", None) is options.place for mark in marks)
            assert marked or not bare or parameter.name in NO_PATHS, f"{name} {parameter.name}"


def _parameters(function) -> list[inspect.Parameter]:
    """What a command takes, the fields of its `Options` among them."""
    own = list(inspect.signature(function).parameters.values())
    inside = [inspect.signature(p.annotation).parameters.values() for p in own if is_dataclass(p.annotation)]
    return [*own, *(parameter for parameters in inside for parameter in parameters)]


def _marks(kind) -> list:
    return [mark for part in (kind, *get_args(kind)) for mark in (part, *get_args(part))]


def _hashable(kind) -> bool:
    try:
        hash(kind)
    except TypeError:
        return False
    return True


# What is said at the end, and when it is stopped.


def test_a_next_step_can_be_pasted(tmp_path):
    assert command("sample", Path("my runs/a"), "-n", 3) == "distmatch sample 'my runs/a' -n 3"


def test_no_message_builds_a_command_line_with_bare_paths():
    """`Next: distmatch sample {out}` breaks at the first space: `terminal.command` quotes."""
    for file in Path(cli.__file__).parent.parent.rglob("*.py"):
        assert not re.findall(r'distmatch [a-z]+ [^"`\n]*\{', file.read_text()), file


CONTINUED = ("teach somewhere", "pairs build mnist", "demo", "train mnist -o 'my run'", "compare emoji")
BEGUN_AGAIN = ("sample mnist", "serve mnist", "plan mnist", "demo toy2d", "train mnist --check", "classifier somewhere")


@pytest.mark.parametrize("line", [*CONTINUED, *BEGUN_AGAIN])
def test_ctrl_c_says_how_to_go_on_if_the_command_does(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: object, **__: object):
        signal.raise_signal(signal.SIGINT)

    for work in (
        "sample.find_pipeline",
        "teach.train_teacher",
        "serve.find_student",
        "demo.mnist",
        "distillation.distil",
        "distillation.check",
        "compare.need",
        "toy2d.demo",
        "classifier.read_images",
    ):
        monkeypatch.setattr(f"distmatch.commands.{work}", interrupted)
    monkeypatch.setattr("distmatch.planning.plan.show", interrupted)
    monkeypatch.setattr("distmatch.recipe.build.pair_store", interrupted)
    code, said = run(monkeypatch, capsys, *shlex.split(line))
    assert code == 130
    assert mistake(said) == "distmatch: stopped" + (f"; to go on: distmatch {line}\n" if line in CONTINUED else "\n")


def test_a_device_that_is_there_is_taken():
    assert subjects.device("cpu").type == "cpu"
    assert subjects.device("auto").type in ("cpu", "cuda")


def test_an_error_of_ours_shows_where_it_is_and_how_to_report_it(monkeypatch, capsys):
    """A `ValueError` that is no `UserError`, as Python raises it within the package."""

    def broken(*_: object) -> None:
        dict(zip([1], [], strict=True))

    monkeypatch.setattr("distmatch.recipe.loading.recipes", broken)
    monkeypatch.setattr("sys.argv", ["distmatch", "recipes"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "Traceback" in said
    assert "zip() argument 2 is shorter than argument 1" in said
    assert "the ValueError above is a bug" in said
    assert said.rstrip().endswith("distmatch recipes")
