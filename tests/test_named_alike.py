"""Folders here that are called like models of the package: which is taken, what is said, where pictures are written."""

import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from forked import command
from PIL import Image

from distmatch.commands import cli
from distmatch.commands import compare as comparing
from distmatch.commands import eval as measuring
from distmatch.commands import sample as sampling
from distmatch.data.prompts import read_prompts
from distmatch.evaluation.spaces import features_folder
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import Info, save_model
from distmatch.models.library import diffusers_source, find_model, model_folder, source_of, takes_prompts
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.subjects import recipe_spaces
from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.files import write_json
from distmatch.system.paths import ASSETS, shipped
from distmatch.system.plain import read_json
from distmatch.system.terminal import Notice

STUDENT = Info((1, 8, 8), ("a", "b", "c"), times=(80.0,))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory; whatever is said without being expected fails a test."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        yield folder


def run_of_a_student(folder: str) -> Path:
    """What a distillation leaves, as far as it is looked at."""
    save_model(Path(folder) / "model", tiny.teacher(), STUDENT)
    (Path(folder) / "recipe.yaml").write_text("name: own\n")
    return Path(folder)


def test_without_a_folder_a_name_is_the_packages_and_a_path_is_nothing():
    assert shipped("mnist") == ASSETS / "mnist"
    assert not any(map(shipped, ("./mnist", "mnist/", "runs/mnist", str(ASSETS / "mnist"), "", "..")))
    assert model_folder("mnist", "student") == ASSETS / "mnist" / "student"
    for path in ("./mnist", "mnist/", "./emoji", str(ASSETS / "mnist")):
        for kind in ("student", "teacher"):
            with pytest.raises(UserError, match="is neither a model folder nor a run"):
                find_model(path, kind)
    with pytest.raises(UserError, match="neither a folder made by `distmatch classifier` nor one of the package"):
        features_folder("./mnist")


def test_a_run_called_like_a_student_is_taken_and_its_teacher_is_the_packages():
    run_of_a_student("mnist")
    with pytest.warns(Notice, match=r"^mnist: the student in the folder of this name here, not that of the package$"):
        assert find_model("mnist", "student")[1].shape == (1, 8, 8)
    with pytest.warns(Notice, match=r"^mnist: the teacher of the package; .* has none \(./mnist names the folder\)$"):
        assert find_model("mnist", "teacher")[1].shape == (1, 28, 28)
    for path in ("./mnist", "mnist/", "mnist/model"):
        assert find_model(path, "student")[1].shape == (1, 8, 8)
        with pytest.raises(UserError, match="is a student; a teacher is needed here"):
            find_model(path, "teacher")


def test_an_unfinished_run_is_not_mistaken_for_the_package():
    (Path("mnist") / "checkpoints").mkdir(parents=True)
    (Path("mnist") / "recipe.yaml").write_text("name: own\n")
    with pytest.raises(UserError, match="mnist is an unfinished run"):
        find_model("mnist", "student")
    with pytest.warns(Notice, match="the teacher of the package"):  # with which the run goes on
        assert model_folder("mnist", "teacher") == ASSETS / "mnist" / "teacher"
    (Path("mnist") / "recipe.yaml").rename("mnist/settings.json")  # of `distmatch teach`
    with pytest.raises(UserError, match="mnist is an unfinished run"):
        find_model("mnist", "teacher")


def test_a_folder_of_pictures_leaves_the_name_to_the_package():
    tiny.image_folder(Path("mnist"), per_class=2)
    with pytest.warns(Notice, match="^mnist: the student of the package; the folder of this name here has none"):
        assert model_folder("mnist", "student") == ASSETS / "mnist" / "student"
    with pytest.raises(UserError, match=r"\./mnist holds images, not a model"):
        find_model("./mnist", "student")
    # And the spaces of the package are not for other teachers' images, even then.
    evaluation = load_recipe("mnist").evaluate.model_copy(update={"every": 1, "features": "mnist"})
    with pytest.raises(UserError, match="is not known to be of the same images"):
        recipe_spaces(evaluation, "own", tiny.INFO, torch.device("cpu"))


def test_a_taught_model_is_taken_for_the_teacher_of_its_name():
    write_tiny_sd(Path("emoji/model"))
    with pytest.warns(Notice, match="^emoji: the teacher in the folder of this name here, not that of the package$"):
        assert takes_prompts("emoji", "teacher")
    with pytest.warns(Notice), pytest.raises(UserError, match="emoji is a teacher; a student is needed here"):
        find_model("emoji", "student")
    Path("emoji/model").rename("model")
    Path("emoji").rmdir()
    Path("model").rename("emoji")
    assert diffusers_source("diffusers:emoji") == "emoji"
    shutil.rmtree("emoji")
    assert diffusers_source("diffusers:emoji") == str(ASSETS / "emoji" / "teacher")


def test_prompts_are_the_packages_unless_they_are_named_as_a_path():
    Path("emoji").mkdir()
    Path("emoji/metadata.jsonl").write_text('{"text": "my own"}\n')
    with pytest.warns(Notice, match=r"^prompts emoji: those of the package, .* here, which is ./emoji$"):
        assert len(read_prompts("emoji")) > 1000
    assert read_prompts("./emoji") == ["my own"]


def test_a_comparison_takes_the_same_prompts_as_training(monkeypatch):
    calls = []
    monkeypatch.setattr(comparing, "compare_on", lambda prompts, *_: calls.append(prompts))
    run_of_a_student("emoji")
    with pytest.warns(Notice):
        comparing.compare("emoji", options=comparing.Options(prompts="emoji"))
    assert calls == [read_prompts(ASSETS / "emoji" / "prompts.txt")]


def test_pictures_of_a_folder_do_not_replace_those_of_the_package():
    sampling.sample("mnist", sampling.Options(n=1))
    run_of_a_student("mnist")
    run_of_a_student("runs/mnist")
    run_of_a_student("runs/other")
    with pytest.warns(Notice):
        sampling.sample("mnist", sampling.Options(n=1))
    for model in ("runs/mnist", "runs/mnist/model", "runs/other/"):
        sampling.sample(model, sampling.Options(n=1))
    with pytest.warns(Notice):
        sampling.sample("mnist", sampling.Options(n=1, teacher=True, steps=1))
    sizes = {file.parent.name: Image.open(file).size[0] for file in Path("samples").glob("*/000000.png")}
    assert sizes == {"mnist": 28, "mnist-teacher": 28, "project-mnist": 8, "runs-mnist": 8, "other": 8}


def test_a_command_says_once_which_is_taken():
    warnings.simplefilter("default", Notice)
    run_of_a_student("mnist")
    done = command("sample", "mnist", "-n", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("distmatch: mnist: the student in the folder of this name here, not that of the pack") == 1
    assert "in samples/project-mnist; see" in done.stdout


def test_a_notice_is_shown_once_though_filters_change(monkeypatch, capsys):
    """As imports of packages change them, on the way from the first look at a model to its weights."""
    warnings.simplefilter("default", Notice)
    Path("emoji").mkdir()

    def look(*_, **__):
        warnings.simplefilter("default", FutureWarning)
        source_of("emoji", "teacher")
        raise UserError("enough")

    monkeypatch.setattr(sampling, "find_pipeline", look)
    monkeypatch.setattr("sys.argv", ["distmatch", "sample", "emoji", "--teacher", "-p", "pizza"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.count("distmatch: emoji: the teacher of the package; the folder of this name") == 1


def test_a_notice_names_the_line_that_called_the_package():
    """Not the package's own, nor that of a wrapper around its function: here contextlib's and PyTorch's."""
    run_of_a_student("mnist")
    inner = partial(model_folder, "mnist", "student")
    wrapped = (partial(find_model, "mnist", "student"), parallel.process_group()(inner), torch.no_grad()(inner))
    for call in wrapped:
        with pytest.warns(Notice) as said:
            call()
        assert [one.filename for one in said] == [__file__]
    exec("call()", {"__name__": None, "call": wrapped[0]})  # code that is no module: Python drops its warnings, no more


@pytest.mark.parametrize(("model", "name"), [(".", "other"), ("model", "other"), ("../other", "other")])
def test_pictures_of_a_run_are_called_like_it_from_wherever_it_is_named(monkeypatch, model, name):
    monkeypatch.chdir(run_of_a_student("other"))
    sampling.sample(model, sampling.Options(n=1))
    assert [folder.name for folder in Path("samples").iterdir()] == [name]


def test_what_a_model_cannot_draw_is_said_before_its_weights_are_read():
    """Here it has none."""
    folder = run_of_a_student("own") / "model"
    (folder / "model.safetensors").unlink()
    config = read_json(folder / "config.json", dict)
    with pytest.raises(UserError, match="own is a student; a teacher is needed here"):
        find_model("own", "teacher")
    with pytest.raises(UserError, match="this model takes no prompts"):
        sampling.sample("own", sampling.Options(prompt=["a cat"]))
    for text in ({"text": True}, {"source": "some/model"}):  # the second as in earlier versions
        plain = {name: value for name, value in config.items() if name not in ("text", "source")}
        write_json(folder / "config.json", plain | text)
        with pytest.raises(UserError, match="this model makes images of prompts; give one"):
            sampling.sample("own", sampling.Options())
        with pytest.raises(UserError, match="label 'a': this model has no classes"):
            sampling.sample("own", sampling.Options(prompt=["a cat"], label="a"))
        with pytest.raises(UserError, match="own makes images of prompts; `distmatch compare` measures such models"):
            measuring.evaluate("own", measuring.Options())
    assert not Path("samples").exists()
