"""The captioned emoji of examples/emoji: names that sets share, what is held out, the drawing, the folder."""

import json
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))

import fetch
import names
import prompts

from distmatch.data.images import load_images
from distmatch.data.prompts import read_prompts
from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError


def icons(*known: str, **more: Any) -> dict[str, Any]:
    """A set of squares, each of its own grey, with these icons."""
    greys = {icon: 10 + 3 * i for i, icon in enumerate(known)}
    body = {icon: {"body": f'<path fill="rgb({g},{g},{g})" d="M0 0h8v8H0z"/>'} for icon, g in greys.items()}
    return {"icons": body, "width": 8, "height": 8, "info": INFO, **more}


INFO = {"author": {"name": "A. Nyone", "url": "here"}, "license": {"spdx": "MIT", "url": "there"}}
SPELLED = icons(
    "tiger-face", "tiger", "mans-shoe", "t-shirt", "red-heart", "bullseye", "light-bulb", "person-genie", "old-one",
    "artist", "artist-dark", "artist-medium-dark", "man-cook-light-skin-tone", "wave-tone3",
    aliases={
        "shoe-of-man": {"parent": "mans-shoe"},
        "red-heart-left": {"parent": "red-heart", "hFlip": True},
    },
    chars={"2764-fe0f": "red-heart", "1f4a1": "light-bulb"},
)  # fmt: skip
SPELLED["icons"]["old-one"]["hidden"] = True
OTHER = icons("flag-for-flag-japan", "direct-hit", "genie", "fog-bank", chars={})
JOINED = icons(
    "heavyblackheart", "electriclightbulb", "tiger", "tigerside", "shoeofman", "japanflag", "fog", "ballotscriptx"
)


def test_a_thing_has_one_name_in_all_sets():
    assert names.named({"a": SPELLED, "b": OTHER, "fxemoji": JOINED}) == {
        "a": {
            "artist": "artist", "bullseye": "bullseye", "genie": "person-genie", "light bulb": "light-bulb",
            "man's shoe": "mans-shoe", "red heart": "red-heart", "red heart left": "red-heart-left",
            "t-shirt": "t-shirt", "tiger": "tiger", "tiger face": "tiger-face",
        },
        "b": {
            "bullseye": "direct-hit", "flag japan": "flag-for-flag-japan", "fog bank": "fog-bank", "genie": "genie",
        },
        "fxemoji": {
            "flag japan": "japanflag", "light bulb": "electriclightbulb", "man's shoe": "shoeofman",
            "red heart": "heavyblackheart", "tiger": "tigerside", "tiger face": "tiger",
        },
    }  # fmt: skip
    tones = names.named({"a": SPELLED}, tones=True)["a"]
    assert tones["artist medium dark skin tone"] == "artist-medium-dark"
    assert tones["man cook light skin tone"] == "man-cook-light-skin-tone"
    lamps = icons("horizontal-traffic-light", "artist-light", "artist")  # one of them is no tone
    assert names.named({"a": lamps})["a"] == {
        "artist": "artist",
        "horizontal traffic light": "horizontal-traffic-light",
    }
    assert set(names.named({"a": lamps}, tones=True)["a"]) == {
        "artist", "artist light skin tone", "horizontal traffic light",
    }  # fmt: skip


def test_every_eighth_shared_name_is_held_out_in_one_style():
    things = [f"thing-{i}" for i in range(400)]
    sets = dict.fromkeys(["noto", "fxemoji", "noto-v1"], icons(*things))
    sets["fluent-emoji"] = icons(*things[:10], "rare-one")
    pictures = fetch.chosen(sets)
    assert len(pictures) == 1211
    test, train = ([p for p in pictures if p.split == split] for split in ("test", "train"))
    assert len({p.name for p in test}) == len(test)
    assert {p.name for p in test} < {p.name for p in train}
    assert 30 < len(test) < 70
    assert {p.style for p in test} >= {"noto", "firefox", "blob"}
    fewer = fetch.chosen(sets, most=100)
    assert {p.name for p in fewer} >= {f"thing {i}" for i in range(10)}  # four styles
    assert len({p.name for p in fewer}) == 100
    assert set(fewer) < set(pictures)  # the split does not depend on how many are kept


def svg_set() -> dict[str, Any]:
    """Two icons, one of them twice as wide as high: red on the left, blue on the right."""
    halves = '<path fill="#f00" d="M0 0h8v8H0z"/><path fill="#00f" d="M8 0h8v8H8z"/>'
    return {
        "icons": {"wide": {"body": halves, "width": 16, "height": 8}, "dot": {"body": halves, "left": 4, "width": 8}},
        "aliases": {"ediw": {"parent": "wide", "hFlip": True}},
        "width": 8,
        "height": 8,
    }


def test_icons_are_drawn_whole_in_the_middle_on_white():
    pytest.importorskip("resvg_py")
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    expected = np.full((16, 16, 3), white, np.uint8)
    expected[4:12, :8], expected[4:12, 8:] = red, blue
    assert np.array_equal(fetch.draw(svg_set(), "wide", 16), expected)
    assert np.array_equal(fetch.draw(svg_set(), "ediw", 16), expected[:, ::-1])
    expected[:, :8], expected[:, 8:] = red, blue
    assert np.array_equal(fetch.draw(svg_set(), "dot", 16), expected)


def test_the_folder_is_a_captioned_set(tmp_path, monkeypatch):
    """Interrupted and gone on with; each picture has the caption of its own icon and style."""
    things = [f"thing-{i}" for i in range(60)]
    drawn: list[str] = []

    def draw(data: dict[str, Any], icon: str, size: int) -> Image.Image:
        if len(drawn) == 100:
            drawn.append("")
            raise KeyboardInterrupt
        drawn.append(icon)
        return Image.new("RGB", (size, size), (3 * int(icon.split("-")[1]), 0, data["width"]))

    def package(source: str, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        data = {**icons(*things), "width": 10 * list(fetch.SETS).index(source)}
        with tarfile.open(folder / source, "w") as archive:
            for name, content in {"icons": data, "chars": {}, "info": INFO}.items():
                text = json.dumps(content).encode()
                entry = tarfile.TarInfo(f"package/{name}.json")
                entry.size = len(text)
                archive.addfile(entry, BytesIO(text))
        return folder / source

    monkeypatch.setattr(fetch, "draw", draw)
    monkeypatch.setattr(fetch, "download", package)
    out = tmp_path / "emoji"
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(out, size=8)
    assert not out.exists()
    with pytest.raises(UserError, match=r"emoji\.part is of a call with other settings"):
        fetch.fetch(out, size=16)
    fetch.fetch(out, size=8)
    assert len(drawn) == 301  # none twice, and the interruption
    fetch.fetch(out, size=8)
    with pytest.raises(UserError, match="exists already, with other settings"):
        fetch.fetch(out, size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji"]
    styles = [style for _, style in fetch.SETS.values()]
    seen = []
    for split in ("train", "test"):
        images = load_images(out, split)
        assert images.labels is None
        assert images.captions is not None
        for pixels, captions in zip(images.pixels, images.captions, strict=True):
            thing, style = int(pixels[0, 0, 0]) // 3, styles[int(pixels[2, 0, 0]) // 10]
            assert captions == (f"thing {thing}, {style} style", f"thing {thing}")
            seen.append(captions[0])
    assert len(set(seen)) == len(seen) == 300
    assert "60 names, 60 of them in three styles or more" in (out / "README.md").read_text()
    assert {path.name for path in (out / "licences").iterdir()} == {
        "Apache-2.0.txt",
        "MIT.txt",
        *(f"{source}.json" for source in fetch.SETS),
    }


def test_prompts_are_captions_and_every_name_in_every_style_but_what_is_held_out(tmp_path, monkeypatch, capsys):
    def split(name: str, *pairs: tuple[str, str]) -> None:
        (tmp_path / name).mkdir()
        lines = [
            {
                "file_name": f"{style}/{thing}.png",
                "text": [f"{thing}, {style} style", thing],
                "name": thing,
                "style": style,
            }
            for thing, style in pairs
        ]
        (tmp_path / name / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    split("train", ("cat", "noto"), ("cat", "flat"), ("dog", "noto"), ("sun", "blob"))
    split("test", ("dog", "flat"))
    unseen = ["cat, blob style", "dog, blob style", "sun, flat style", "sun, noto style"]
    captions = ["sun, blob style", "sun", "cat, flat style", "cat", "cat, noto style", "dog, noto style", "dog"]
    out = tmp_path / "prompts.txt"
    monkeypatch.setattr(sys, "argv", ["prompts.py", str(tmp_path), str(out)])
    prompts.main()
    assert read_prompts(out) == unseen + captions
    assert "4 prompts that no picture has, 7 captions" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--captions", "2"])
    prompts.main()
    new, few = read_prompts(out)[:4], read_prompts(out)[4:]
    assert new == unseen
    assert len(set(few)) == 2
    assert set(few) < set(captions)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "8"])
    with pytest.raises(SystemExit):
        prompts.main()
    assert "expected 0 to 7" in capsys.readouterr().err


def test_the_packages_prompts_are_those():
    ours = read_prompts("emoji")
    assert len(ours) == len(set(ours)) == 10_039
    assert ours[1532:1534] == ["1st place medal, blob style", "1st place medal"]
    assert load_recipe("emoji").pairs.count >= len(ours)  # or the last ones, all of one style, would have no pairs
