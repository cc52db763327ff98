"""The page of a run: self-contained, complete, safe with foreign text."""

import base64
import json
import re

import numpy as np
import pytest
import yaml

from distmatch import data
from distmatch.config import dump, load_recipe
from distmatch.report import report


def run_folder(folder, *overrides, description="A run."):
    tree = yaml.safe_load(dump(load_recipe("mnist", list(overrides))))
    (folder / "previews").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**tree, "description": description}, sort_keys=False))
    lines = [{"step": s, "match": 1 / s, "regress": 2 / s, "fake": 0.5, "outside": 0.1} for s in range(1, 5)]
    lines.append({"step": 4, "frechet": 1.25, "accuracy": 0.9})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 2, 4):
        sheet = np.full((4, 4, 3), 10 * step, dtype=np.uint8)
        (folder / "previews" / f"step-{step:08d}.png").write_bytes(data.png(sheet))
    rows = [{"name": "student, 1 step", "nfe": 1, "images": 5000, "frechet": 0.4567, "accuracy": 0.9612}]
    (folder / "eval.json").write_text(json.dumps({"hardware": {"device": "abacus"}, "rows": rows}))
    return folder


def test_one_run_is_on_the_page_with_its_own_pictures(tmp_path):
    folder = run_folder(tmp_path / "run")
    page = report([folder], tmp_path / "page.html").read_text()
    assert "<td>0.457</td>" in page
    assert "<td>5,000</td>" in page
    assert "<td>0.961</td>" in page
    assert "abacus" in page
    assert "algorithm2" in page
    pictures = {base64.b64decode(b) for b in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert {file.read_bytes() for file in (folder / "previews").iterdir()} <= pictures
    assert "Matching loss" in page
    assert "Gradient norms" not in page  # the log has none
    assert set(re.findall(r"(?:src|href)\s*=\s*[\"']?(\w+)", page)) == {"data"}


def test_several_runs_differ_where_their_recipes_do(tmp_path):
    a = run_folder(tmp_path / "full")
    b = run_folder(tmp_path / "no-match", "terms=[regress]", "generator.lr=1e-4")
    page = report([a, b], tmp_path / "page.html").read_text()
    table = re.search(r"<h2>Recipes</h2>.*?</table>", page, flags=re.S)[0]
    assert re.findall(r"<tr><td>([\w.]+)</td>", table) == ["terms", "generator.lr"]
    assert "<td>0.001</td><td>0.0001</td>" in table
    assert page.count("student, 1 step") == 2


def test_foreign_text_is_text(tmp_path):
    folder = run_folder(tmp_path / "run", description="<script>alert(1)</script>")
    page = report([folder], tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_what_is_missing_is_said_or_left_out(tmp_path):
    folder = run_folder(tmp_path / "run")
    for name in ("log.jsonl", "eval.json"):
        (folder / name).unlink()
    page = report([folder], tmp_path / "page.html").read_text()
    assert "Nothing is logged yet" in page
    assert "Not evaluated" in page
    with pytest.raises(ValueError, match=r"is not a run: it has no recipe.yaml"):
        report([tmp_path], tmp_path / "page.html")
