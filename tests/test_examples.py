"""The scripts in examples/ and the code in the README run as they stand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from forked import script
from PIL import Image

from distmatch import EDM, VP, Cond, Denoiser, DistilledPipeline, Flow, Info, Prediction, Recipe, distil
from distmatch.models.diffusers.export import export_diffusers
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import load_model, save_model
from distmatch.models.library import find_model
from distmatch.recipe.loading import load_recipe

ROOT = Path(__file__).parent.parent


def run(file: Path, cwd: Path) -> str:
    done = script(file, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_algorithm_1_in_one_file_finds_both_modes(tmp_path):
    script = ROOT / "examples" / "dmd_in_one_file.py"
    assert len(script.read_text().splitlines()) <= 80
    shares = [float(share) for share in re.findall(r"mode \d: ([\d.]+)%", run(script, cwd=tmp_path))]
    assert shares == pytest.approx([75, 25], abs=6)


def test_a_term_of_ones_own_makes_smoother_images(tmp_path):
    """The example trains; with a large weight the student's images differ less from pixel to pixel than without."""
    script = ROOT / "examples" / "own_term.py"
    assert len(script.read_text().splitlines()) < 60
    rough = []
    for weight in (0.0, 50.0):
        changes = [
            f"own_terms={{smooth: {{source: '{script}:TotalVariation', weight: {weight}}}}}",
            "terms=match,smooth",
        ]
        recipe = load_recipe(str(tiny.recipe_file(tmp_path)), [*changes, "student.optimizer.lr=3e-3"])
        distil(recipe, tmp_path / f"run{weight}", tmp_path)
        images = DistilledPipeline.from_pretrained(tmp_path / f"run{weight}")(16).pixels.float()
        rough.append(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())
    assert rough[1] < 0.8 * rough[0]


def test_own_teacher(tmp_path):
    script = ROOT / "examples" / "own_teacher.py"
    assert len(script.read_text().splitlines()) < 25
    said = run(script, cwd=tmp_path)
    assert "Next: DistilledPipeline.from_pretrained('runs/own', net=MyNetwork(...))(n=16) in Python" in said
    assert Image.open(tmp_path / "runs" / "own" / "first.png").size == (16, 16)
    log = [json.loads(line) for line in (tmp_path / "runs" / "own" / "log.jsonl").read_text().splitlines()]
    assert {"match/student", "regress/student", "match/fake"} <= log[-1].keys()
    assert log[-1]["step"] == 20
    again = run(script, cwd=tmp_path)  # with the same random teacher
    assert "The run in runs/own is finished" in again
    assert "Next: DistilledPipeline.from_pretrained('runs/own', net=MyNetwork(...))(n=16) in Python, " in again


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow(t_max=0.98)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity", "edm"])
def test_any_prediction_on_any_schedule(tmp_path, schedule, prediction):
    """Two updates after its start as the teacher at t_max, the student is another function, and not far off.

    Flow ends before alpha = 0, where eps says nothing of x0.
    """
    torch.manual_seed(0)
    net = tiny.teacher().net
    teacher = Denoiser(net, schedule, Prediction(prediction)), Info(shape=(1, 8, 8), classes=("a", "b", "c"))
    recipe = Recipe.model_validate(
        {"name": "own", "teacher": "mine", "steps": 2, "match": {"batch": 4}, "regress": {"batch": 4}}
        | {"pairs": {"count": 6, "steps": 3}, "log": {"every": 1}, "student": {"ema": 0.0}}
    )
    distil(recipe, tmp_path / "run", tmp_path, teacher=teacher)
    student, info = load_model(tmp_path / "run" / "model")
    assert info.times == (schedule.t_max,)
    assert (student.schedule, student.prediction.name) == (schedule, prediction)
    x, t = schedule.prior_std * torch.randn(2, 1, 8, 8), torch.full((2,), schedule.t_max)
    cond = Cond(label=torch.tensor([0, 2]))
    with torch.no_grad():
        change = (student(x, t, cond) - teacher[0](x, t, cond)).abs().max()
    assert 0 < change < 1e4


def test_the_readmes_python(tmp_path):
    """In a folder where `runs/pipeline` is an exported student, as the text before the block says."""
    denoiser, info = find_model(f"diffusers:{write_tiny_sd(tmp_path / 'sd')}", "teacher")
    save_model(tmp_path / "student", denoiser, replace(info, times=(999.0,)))
    export_diffusers(str(tmp_path / "student"), tmp_path / "runs" / "pipeline")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    own = (ROOT / "examples" / "own_teacher.py").read_text().partition("\n\n")[2]  # run by `test_own_teacher`
    assert own.split() in [block.split() for block in blocks]
    for i, block in enumerate(block for block in blocks if block.split() != own.split()):
        (tmp_path / f"block{i}.py").write_text(block)
        run(tmp_path / f"block{i}.py", cwd=tmp_path)
