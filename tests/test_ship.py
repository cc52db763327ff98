"""examples/emoji/ship.py: a run's student becomes one that names the package's teacher and nothing of its machine.

`distmatch demo emoji` then draws with it.
"""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch import DistilledPipeline
from distmatch.commands import demo
from distmatch.evaluation import baselines, measure
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.folder import load_model, save_model
from distmatch.models.library import find_model
from distmatch.system import paths
from distmatch.system.errors import UserError
from distmatch.system.paths import located

FILE = Path(__file__).parent.parent / "examples" / "emoji" / "ship.py"


@pytest.fixture(scope="module")
def ship():
    spec = importlib.util.spec_from_file_location("ship", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(teacher: Path, folder: Path) -> None:
    """Write what a run leaves: a student whose card has the recipe with the places on this machine."""
    denoiser, info = find_model(f"diffusers:{teacher}", "teacher")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1 + 1e-4)  # no longer a number of half precision
    recipe = {
        "teacher": f"diffusers:{teacher}",
        "prompts": {"path": str(folder / "p.txt"), "cache": str(folder)},
        "pairs": {"path": str(folder / "pairs"), "count": 8},
        "regress": {"weights": str(folder)},
        "student": {"init": str(folder / "first")},
        "match": {"guidance": 3.0},
    }
    card = {"recipe": recipe}
    save_model(folder / "model", denoiser, replace(info, times=(denoiser.schedule.t_max,), card=card))


def test_the_student_draws_the_same_with_the_packages_teacher(ship, tmp_path, monkeypatch, capsys):
    elsewhere = shutil.copytree(located("emoji"), tmp_path / "elsewhere")
    run_of(elsewhere, tmp_path / "run")
    before = DistilledPipeline.from_pretrained(tmp_path / "run")(prompts="red apple, flat style", seed=4).pixels
    ship.ship(str(tmp_path / "run"), tmp_path / "student")
    assert "MB with its teacher" in capsys.readouterr().out

    shutil.rmtree(elsewhere)  # nothing of the machine that made it is needed
    shutil.rmtree(tmp_path / "run")
    after = DistilledPipeline.from_pretrained(tmp_path / "student")(prompts="red apple, flat style", seed=4).pixels
    assert (after.int() - before.int()).abs().max() <= 4
    assert after.float().std() > 10
    written = (tmp_path / "student" / "config.json").read_text()
    assert str(tmp_path) not in written
    assert '"source": "emoji"' in written
    _, info = load_model(tmp_path / "student")
    assert info.source == located("emoji")
    assert info.card["recipe"] == {
        "teacher": "emoji",
        "prompts": {"path": "emoji", "cache": None},
        "pairs": {"path": None, "count": 8},
        "regress": {"weights": None},
        "student": {"init": None},
        "match": {"guidance": 3.0},
    }
    _demo(tmp_path, monkeypatch, capsys)
    files = [*(tmp_path / "student").rglob("*.*"), *Path(located("emoji")).rglob("*.*")]
    assert sum(file.stat().st_size for file in files) <= 32_000_000


def _demo(tmp_path, monkeypatch, capsys) -> None:
    """The student as the package's: its column is what it draws, beside its teacher's."""
    (tmp_path / "assets" / "emoji").mkdir(parents=True)
    shutil.copytree(tmp_path / "student", tmp_path / "assets" / "emoji" / "student")
    (tmp_path / "assets" / "emoji" / "teacher").symlink_to(located("emoji"))
    monkeypatch.setattr(paths, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(baselines, "PNDM_STEPS", 2)
    monkeypatch.setattr(baselines, "SOLVERS", {})
    demo.emoji(tmp_path / "demo")
    assert "distmatch serve emoji --teacher emoji" in capsys.readouterr().out
    direct = DistilledPipeline.from_pretrained("emoji")(prompts=demo.PROMPTS, seed=1).images
    for i, image in enumerate(direct):
        drawn = np.asarray(Image.open(tmp_path / "demo" / "methods" / "student-1" / f"{i:06d}.png"))
        assert np.abs(drawn.astype(int) - np.asarray(image)).max() <= 1
    assert len(list((tmp_path / "demo" / "methods" / "pndm-2").glob("*.png"))) == len(direct) == 2


def test_a_student_of_another_teacher_is_refused(ship, tmp_path):
    run_of(write_tiny_sd(tmp_path / "other"), tmp_path / "run")
    with pytest.raises(UserError, match="whose text encoder is not that of emoji"):
        ship.ship(str(tmp_path / "run"), tmp_path / "student")
    assert not (tmp_path / "student").exists()
