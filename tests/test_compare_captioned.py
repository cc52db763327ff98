"""`distmatch compare` with the prompts of captioned pictures: distances, retrieval and copies, computed again here."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.commands import compare, references
from distmatch.commands.comparison import with_ratios
from distmatch.data.images import Images
from distmatch.evaluation import baselines, measure
from distmatch.evaluation.baselines import load_teacher, methods
from distmatch.evaluation.gallery import Gallery
from distmatch.evaluation.metrics import Moments, frechet, precision_recall
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.system import rng

THINGS = ("ant", "tin hat", "island")
STYLES = ("thin", "dotted", "inky")


class Tones:
    """A feature space of a picture's parts, in place of EfficientNet's."""

    classes = ()

    def __init__(self, part: str):
        self.name, self.distance, self.identity = part, f"frechet/{part}", {"tones": part}

    def state_dict(self):
        return {}

    def to(self, _):
        return self

    def both(self, pixels: torch.Tensor):
        parts = 1 if self.name == "pooled" else 2
        return torch.nn.functional.adaptive_avg_pool2d(pixels[:, :2].float() / 50, (1, parts)).flatten(1), None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(write_tiny_sd(tmp_path_factory.mktemp("models") / "sd"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Nine pictures of three things in three styles, of which one of each thing is in `test`."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(references, "EfficientNet", Tones)
    monkeypatch.setattr(references, "reference", partial(references.reference, cache=None))
    monkeypatch.setattr(baselines, "PNDM_STEPS", 2)
    monkeypatch.setattr(baselines, "SOLVERS", {})
    random = np.random.default_rng(0)
    for split, styles in (("train", (0, 1)), ("test", (2,))):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = []
        for number, thing in enumerate(THINGS):
            for style in styles:
                said = STYLES[(number + style) % 3]
                pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                file = f"{said}-{number}.png"
                Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "set" / split / file)
                lines.append(json.dumps({"file_name": file, "text": [f"{thing}, {said} style", thing]}))
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "set"


def read(folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["file_name"])
    pixels = np.stack([np.asarray(Image.open(folder / row["file_name"])) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [row["text"] for row in rows]


def test_prompts_of_held_out_pictures(teacher, folder, tmp_path, capsys):
    out, n = tmp_path / "out", 12
    options = compare.Options(
        prompts=str(folder), n=n, seed=3, guidance=3.0, features="efficientnet", reference=folder, batch=5, picture=2,
        out=out, device="cpu",
    )  # fmt: skip
    compare.compare(teacher, options=options)
    table = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert list(rows) == ["PNDM 2", "real"]

    real, known = read(folder / "train")
    unseen, captions = read(folder / "test")
    order = rng.shuffled(3, 3, 0, 3)
    prompts = [captions[i][0] for i in order]
    said = [prompts[i % 3] for i in range(n)]
    pipe = load_teacher(teacher, torch.device("cpu"), torch.float32)
    made = methods(pipe, None, None, 3.0)[-1].make(said, rng.noise(3, range(n), (4, 8, 8)))
    spaces = [Tones("positions"), Tones("pooled")]
    both = torch.cat([space.both(real)[0].half().float() for space in spaces], 1)
    gallery = Gallery(Images(real, None, (), captions=tuple(map(tuple, known))), both)
    things = torch.tensor([list(gallery.names).index(captions[i][1]) for i in order])
    near = gallery.copy(unseen)
    for name, pictures, own in (("PNDM 2", made, things.repeat(4)), ("real", unseen[torch.from_numpy(order)], things)):
        row, seen = rows[name], [space.both(pictures)[0] for space in spaces]
        ranks, nearest = gallery.ranks(torch.cat(seen, 1), own), gallery.nearest(pictures)
        assert row["top1"] == pytest.approx(float((ranks == 0).double().mean()))
        assert row["nearest"] == pytest.approx(float(nearest.median()), abs=2e-3)
        assert row["copies"] == pytest.approx(float((nearest < near).double().mean()))
        each = json.loads((out / "methods" / name.lower().replace(" ", "-") / "images.json").read_text())
        assert each["rank"] == ranks.tolist()
        assert each["prompt"] == (said if name != "real" else prompts)
    for space in spaces:
        ours, theirs = Moments(), Moments()
        ours.update(space.both(made)[0])
        theirs.update(space.both(real)[0])
        expected = frechet(ours.mean, ours.cov, theirs.mean, theirs.cov)
        assert rows["PNDM 2"][space.distance] == pytest.approx(expected, rel=0.02)
        kept = space.both(real)[0]
        assert rows["PNDM 2"][f"precision/{space.name}"] == pytest.approx(
            precision_recall(kept, space.both(made[:6])[0])[0]
        )
    assert "frechet/positions" not in rows["real"]  # three pictures are too few for four features
    assert "ms_per_image" not in rows["real"]
    assert (rows["PNDM 2"]["images"], rows["real"]["images"]) == (n, 3)
    assert "Names are looked for among 3" in table.replace("\n", " ")
    shown = np.asarray(Image.open(out / "methods" / "real" / "000001.png"))
    assert np.array_equal(shown, unseen[order[1]].permute(1, 2, 0))


def test_ratios_are_to_the_last_method():
    rows = [
        {"name": "student 1", "frechet/pooled": 3.0, "ms_per_image": 4.0},
        {"name": "PNDM 50", "frechet/pooled": 2.0, "ms_per_image": 120.0},
        {"name": "real", "frechet/pooled": 1.0},
    ]
    found = with_ratios(rows)
    assert [row["ratio/pooled"] for row in found] == [1.5, 1.0, 0.5]
    assert [row.get("speedup") for row in found] == [30.0, 1.0, None]
    assert with_ratios(rows[:1]) == rows[:1]  # a student alone


def test_refusals(teacher, folder, tmp_path):
    def refused(message: str, **changes):
        options = {"prompts": str(folder), "out": tmp_path / "out", "device": "cpu", "picture": 1, **changes}
        with pytest.raises(ValueError, match=message):
            compare.compare(teacher, options=compare.Options(**options))

    refused(
        "'efficientnet' come without a reference; name the training images with --reference", features="efficientnet"
    )
    refused("has no split 'val'", split="val")
    for file in folder.rglob("metadata.jsonl"):
        file.unlink()
    refused("its pictures have no captions, which would be the prompts")
