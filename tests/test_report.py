"""The page of a run: self-contained, complete, safe with foreign text."""

import base64
import io
import json
import re

import numpy as np
import pytest
import yaml
from markupsafe import escape
from PIL import Image

from distmatch.commands.report_page import COLOURS, STRIP, report, smooth
from distmatch.data import imaging
from distmatch.recipe.loading import dump, load_recipe

PLACES = ("Frechet distance (pixels)", "Frechet distance (pooled)")


def run_folder(folder, *overrides, frames=3, **entries):
    """A run as the commands leave it; `entries` replace top-level entries of its recipe."""
    tree = yaml.safe_load(dump(load_recipe("mnist", ["steps=8", *overrides])))
    (folder / "previews").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**tree, "description": "A run.", **entries}, sort_keys=False))
    lines = [{"step": s, "match": 1 / s, "regress": 2 / s, "fake": 0.5, "seconds": 45.0 * s} for s in range(1, 5)]
    lines.append({"step": 4, "frechet/pixels": 1.25, "frechet/pooled": 0.75, "accuracy": 0.9})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(frames):
        sheet = np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        (folder / "previews" / f"step-{2 * i:08d}.png").write_bytes(imaging.png(sheet))
    (folder / "teacher-student.png").write_bytes(imaging.png(np.arange(24, dtype=np.uint8).reshape(4, 6)))
    rows = [
        {"name": "teacher, 18 Heun steps", "nfe": 35, "images": 5000, "frechet/pixels": 0.2318, "frechet/pooled": 0.3},
        {"name": "student, 1 step", "nfe": 1, "images": 5000, "frechet/pixels": 0.4567, "accuracy": 0.9612},
    ]
    (folder / "eval.json").write_text(json.dumps({"hardware": {"device": "abacus", "threads": 2}, "rows": rows}))
    return folder


def page_of(tmp_path, *folders):
    return report(list(folders), tmp_path / "page.html").read_text()


def section(page, title):
    return re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, flags=re.S)[1]


def table(text):
    """Rows of cells of the first table in `text`."""
    rows = re.findall(r"<tr>(.*?)</tr>", re.search(r"<table.*?</table>", text, flags=re.S)[0])
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def pictures(text):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def test_sections_come_in_order_and_nothing_is_loaded(tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", "seed=1")
    one, two = page_of(tmp_path, a), page_of(tmp_path, a, b)
    common = ["Figures", "Teacher and student", "Samples over training", "Curves"]
    assert re.findall(r"<h2>(.*?)</h2>", one) == [*common, "Recipe"]
    assert re.findall(r"<h2>(.*?)</h2>", two) == ["Ablation", *common, "Recipes", "Where the recipes differ"]
    for page in (one, two):
        assert {target[:22] for target in re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)} == {
            "data:image/png;base64,"
        }
        assert not re.search(r"https?://|@import|url\(", page)


def test_figures_are_formatted_and_gaps_are_dashes(tmp_path):
    page = page_of(tmp_path, run_folder(tmp_path / "run"))
    assert table(section(page, "Figures")) == [
        ["model", "network evaluations", "images", *PLACES, "class accuracy"],
        ["teacher, 18 Heun steps", "35", "5,000", "0.232", "0.300", "–"],
        ["student, 1 step", "1", "5,000", "0.457", "–", "0.961"],
    ]
    assert "device abacus, threads 2" in section(page, "Figures")
    assert "4 of 8 steps in 3.0 minutes" in page


def test_pictures_are_the_files_pixels(tmp_path):
    folder = run_folder(tmp_path / "run", frames=12)
    page = page_of(tmp_path, folder)
    (pair,) = pictures(section(page, "Teacher and student"))
    assert np.array_equal(pair, np.asarray(Image.open(folder / "teacher-student.png")))
    samples = section(page, "Samples over training")
    frames = [np.asarray(Image.open(file)) for file in sorted((folder / "previews").iterdir())]
    shown = pictures(samples)
    assert len(shown) == 13  # every frame, and the last one beside the slider
    for picture, frame in zip(shown, [*frames, frames[-1]], strict=True):
        assert np.array_equal(picture, frame)
    steps = [int(step) for step in re.findall(r"<figure><img[^>]*><figcaption>step (\d+)", samples)]
    assert steps[:-1] == [0, 4, 6, 10, 12, 16, 18, 22]  # eight of 0, 2, .. 22, both ends among them
    assert len(steps[:-1]) == STRIP
    assert steps[-1] == 22
    assert "max=11 value=11" in samples


def test_curves_show_what_was_logged_in_each_runs_colour(tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", "terms=[match]")
    lines = [{"step": s, "match": 2 / s} for s in range(1, 5)]
    # A line that has no value must not spoil the axis, nor a last one that was cut off the page.
    (b / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 5, "match": NaN}\n{"st')
    curves = section(page_of(tmp_path, a, b), "Curves")
    titles = re.findall(r"<h3>(.*?)</h3>", curves)
    assert titles == ["Matching loss", "Regression loss", "Fake-score loss", *PLACES, "Class accuracy"]

    def drawn(picture, colour):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return int(((np.abs(picture[..., :3].astype(int) - rgb) < 3).all(-1) & (picture[..., 3] == 255)).sum())

    by_title = dict(zip(titles, pictures(curves), strict=True))
    assert [drawn(by_title["Matching loss"], colour) > 200 for colour in COLOURS[:3]] == [True, True, False]
    assert [drawn(by_title["Regression loss"], colour) > 200 for colour in COLOURS[:2]] == [True, False]


def test_smoothing_is_a_mean_over_neighbours():
    ramp = np.arange(60.0)  # window 5
    assert smooth(ramp)[2:-2] == pytest.approx(ramp[2:-2])
    assert smooth(ramp)[0] == pytest.approx(1.0)  # of 0, 1, 2: what there is of the window
    impulse = smooth(np.eye(60)[30])
    assert impulse[27:34] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0])
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]


def test_several_runs_differ_where_their_recipes_do(tmp_path):
    a = run_folder(tmp_path / "full")
    b = run_folder(tmp_path / "no-match", "terms=[regress]", "student.optimizer.lr=1e-4")
    c = run_folder(tmp_path / "again", description="Under another name.")
    (c / "eval.json").unlink()
    with (c / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "frechet/pixels": NaN}\n')  # no figure: the one before it counts
    page = page_of(tmp_path, a, b, c)
    both = '["match", "regress"]'.replace('"', "&#34;")
    only = both.replace("&#34;match&#34;, ", "")
    assert table(section(page, "Where the recipes differ")) == [
        ["entry", "full", "no-match", "again"],
        ["description", "A run.", "A run.", "Under another name."],
        ["terms", both, only, both],
        ["student.optimizer.lr", "0.001", "0.0001", "0.001"],
    ]
    head, *rows = table(section(page, "Ablation"))
    assert head[:4] == ["run", "changed", "steps", "minutes"]
    in_training = [f"{heading}, in training" for heading in (*PLACES, "class accuracy")]
    assert head[4:] == [*in_training, PLACES[0], "class accuracy"]
    assert rows == [
        ["full", "–", "4 of 8", "3.0", "1.250", "0.750", "0.900", "0.457", "0.961"],
        [
            "no-match",
            f"terms={only}; student.optimizer.lr=0.0001",
            "4 of 8",
            "3.0",
            "1.250",
            "0.750",
            "0.900",
            "0.457",
            "0.961",
        ],
        ["again", "nothing", "5 of 8", "3.0", "1.250", "0.750", "0.900", "–", "–"],
    ]
    assert [row[0] for row in table(section(page, "Figures"))] == ["run", "full", "full", "no-match", "no-match"]


def test_the_same_recipe_twice_and_the_same_folder_name_twice(tmp_path):
    a, b = run_folder(tmp_path / "x" / "run"), run_folder(tmp_path / "y" / "run")
    page = page_of(tmp_path, a, b)
    assert "The recipes are identical" in section(page, "Where the recipes differ")
    assert [row[0] for row in table(section(page, "Ablation"))] == ["run", str(a), str(b)]


def test_a_run_is_named_once(tmp_path):
    run = run_folder(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ValueError, match=r"run is named more than once; name each run once"):
        report([run, tmp_path / "link"], tmp_path / "page.html")


def test_of_a_folder_of_runs_the_runs_are_named(tmp_path):
    runs = [run_folder(tmp_path / "runs" / name) for name in ("a run", "b")]
    (tmp_path / "runs" / "pairs").mkdir()
    said = f"runs is not a run, but the folder of 2 runs: distmatch report '{runs[0]}' {runs[1]}"
    with pytest.raises(ValueError, match=re.escape(said)):
        report([tmp_path / "runs"], tmp_path / "page.html")


def test_foreign_text_is_text(tmp_path):
    hostile = "<script>alert(1)</script>\"'& $title {body}"
    folder = run_folder(tmp_path / "<b>&", name=hostile, description=hostile, teacher=hostile, steps=hostile)
    other = run_folder(tmp_path / "$x_{")  # matplotlib would take this for mathematics
    (folder / "eval.json").write_text(json.dumps({"hardware": hostile, "rows": [{"name": hostile, "nfe": 1}]}))
    escaped = str(escape(hostile))
    for page in (page_of(tmp_path, folder), page_of(tmp_path, folder, other)):
        assert "<script>alert" not in page
        assert "<b>" not in page
        assert escaped in table(section(page, "Figures"))[1]
        assert page.count(escaped) >= 4


def test_what_is_missing_is_said_or_left_out(tmp_path):
    folder = run_folder(tmp_path / "run", frames=1)
    assert "type=range" not in page_of(tmp_path, folder)  # one picture needs no slider
    for name in ("log.jsonl", "eval.json", "teacher-student.png", "previews/step-00000000.png"):
        (folder / name).unlink()
    bare = page_of(tmp_path, folder)
    assert re.findall(r"<h2>(.*?)</h2>", bare) == ["Figures", "Curves", "Recipe"]
    assert "Not evaluated" in section(bare, "Figures")
    assert "Nothing is logged yet" in section(bare, "Curves")
    assert "0 of 8 steps." in bare
    assert pictures(bare) == []
    (folder / "log.jsonl").write_text("")
    assert "Nothing is logged yet by run." in section(page_of(tmp_path, folder, run_folder(tmp_path / "b")), "Curves")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no runs to report on"):
        report([], tmp_path / "page.html")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is not a run: it has neither recipe.yaml nor"):
        report([tmp_path], tmp_path / "page.html")
    folder = run_folder(tmp_path / "run")
    (folder / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval.json is not valid JSON"):
        report([folder], tmp_path / "page.html")
    (folder / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"recipe.yaml is not valid YAML"):
        report([folder], tmp_path / "page.html")
    (folder / "recipe.yaml").write_text("just text")
    with pytest.raises(ValueError, match=r"recipe.yaml holds no recipe"):
        report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_teachers_run_stands_beside_its_student(tmp_path):
    student, teacher = run_folder(tmp_path / "student"), tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "settings.json").write_text(json.dumps({"images": "digits.tar", "steps": 4, "batch": 7}))
    (teacher / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": 0.5 / s}) + "\n" for s in range(1, 5)))
    assert "A teacher trained on digits.tar: 4 steps" in page_of(tmp_path, teacher)
    page = page_of(tmp_path, teacher, student)
    assert "Denoising loss" in page
    assert "Matching loss" in page
    table = re.search(r"<h2>Where the recipes differ</h2>.*?</table>", page, flags=re.S)[0]
    assert "<tr><td>batch</td><td>7</td><td>–</td></tr>" in table


def test_fid_is_told_apart_from_other_frechet_distances(tmp_path):
    folder = run_folder(tmp_path / "fid")
    (folder / "eval.json").write_text(json.dumps({"rows": [{"name": "student", "nfe": 1, "fid": 2.6604}]}))
    page = page_of(tmp_path, folder, run_folder(tmp_path / "other"))
    table = re.search(r"<h2>Ablation</h2>.*?</table>", page, flags=re.S)[0]
    head, fid, other = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:])
    assert fid[head.index("FID")] == "2.660"
    assert fid[head.index(PLACES[0])] == "–"
    assert (other[head.index("FID")], other[head.index(PLACES[0])]) == ("–", "0.457")


def test_the_row_of_what_real_images_would_score_is_explained(tmp_path):
    folder, said = run_folder(tmp_path / "run"), "Real images, expected: the distances that as many images drawn from "
    assert said not in page_of(tmp_path, folder)
    (folder / "eval.json").write_text(json.dumps({"rows": [{"name": "real images, expected", "frechet/pixels": 0.1}]}))
    assert said in page_of(tmp_path, folder)
