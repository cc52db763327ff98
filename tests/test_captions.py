"""Captions of pictures, in every place where people keep them: which pictures have which, compared text for text."""

import io

import numpy as np
import pytest
import torch
from layouts import lines, pixels, png, write
from PIL import Image

from distmatch.data.images import Images, load_images

PETS = {"train/cat/b.png": png(0), "train/dog/a.png": png(1), "test/cat/c.png": png(2)}
WORDS = {"train/cat/b": "a cat", "train/dog/a": "a dög", "test/cat/c": "another cat"}


def texts(words: dict[str, str]) -> dict[str, bytes]:
    return {f"{name}.txt": text.encode() for name, text in words.items()}


# name -> files, the split asked for, {number of the picture: its captions}, labels, words of the account
CAPTIONED = {
    "metadata.jsonl": (
        {**PETS, "metadata.jsonl": lines(*({"file_name": f"{n}.png", "text": t} for n, t in WORDS.items()))},
        "train", {0: ("a cat",), 1: ("a dög",)}, None,
        "RGB: no classes: captions, but no labels below train; 2 captions from text in metadata.jsonl, e.g. 'a cat'; "
        "1 file left out: 1 in test",
    ),
    "that of the test": (
        {**PETS, "metadata.jsonl": lines(*({"file_name": f"{n}.png", "text": t} for n, t in WORDS.items()))},
        "test", {2: ("another cat",)}, None, "1 caption from text in metadata.jsonl, e.g. 'another cat'",
    ),
    "several per picture": (
        {"a.png": png(0), "b.png": png(1), "metadata.jsonl": lines(
            {"file_name": "b.png", "text": ["one ", "two", "one"]}, {"file_name": "a.png", "text": "three"})},
        "train", {0: ("three",), 1: ("one", "two")}, None, "3 captions from text",
    ),
    "several rows of a picture": (
        {"a.png": png(0), "metadata.csv": b'file_name,caption\na.png,one\na.png,"two, three"\na.png,one\n'},
        "train", {0: ("one", "two, three")}, None, "2 captions from caption in metadata.csv, e.g. 'one'",
    ),
    "prompt before text": (
        {"a.png": png(0), "metadata.csv": b"file_name,text,prompt\na.png,one,two\n"}, "train", {0: ("two",)}, None,
        "1 caption from prompt in metadata.csv",
    ),
    "labels as well": (
        {**PETS, "train/metadata.csv": b"file_name,label,text\ndog/a.png,3,a dog\ncat/b.png,7,a cat\n"}, "train",
        {0: ("a cat",), 1: ("a dog",)}, ["7", "3"],
        "2 classes from label in metadata.csv below train: 3, 7; 2 captions from text in metadata.csv",
    ),
    "labels of .cls": (
        {"a.png": png(0), "a.cls": b"dog", "a.txt": b"a dog"}, "train", {0: ("a dog",)}, ["dog"],
        "1 class from .cls files: dog; 1 caption from .txt files",
    ),
    ".txt": (
        {**PETS, **texts(WORDS), "README.txt": b"Pets.", "train/cat/LICENSE.txt": b"Apache-2.0"}, "train",
        {0: ("a cat",), 1: ("a dög",)}, None,
        "2 captions from .txt files, e.g. 'a cat'; 4 files left out: 3 .txt, 1 in test",
    ),
    ".txt of pictures called train and test": (
        {"test.png": png(0), "train.png": png(1), "test.txt": b"an exam\n", "train.txt": "\ufeff a train ".encode()},
        "train", {0: ("an exam",), 1: ("a train",)}, None, "2 captions from .txt files",
    ),
    "metadata before .txt": (
        {"a.png": png(0), "a.txt": b"other", "metadata.csv": b"file_name,text\na.png,one\n"}, "train", {0: ("one",)},
        None, "from text in metadata.csv, e.g. 'one'; 1 file left out: 1 .txt",
    ),
    ".txt beside metadata without captions": (
        {"a.png": png(0), "a.txt": b"one", "metadata.csv": b"file_name,label\na.png,3\n"}, "train", {0: ("one",)},
        ["3"], "1 class from label in metadata.csv: 3; 1 caption from .txt files",
    ),
    "boxes in .txt are none": (
        {**PETS, **texts(dict.fromkeys(WORDS, "0 0.5 0.5 1e-1 0.25".replace("e", "")))}, "train",
        {0: None, 1: None}, ["cat", "dog"], "2 classes from the first folder below train: cat, dog; 4 files left",
    ),
    "an empty column is none": (
        {**PETS, "train/metadata.csv": b"file_name,text\ndog/a.png,\ncat/b.png, \n"}, "train", {0: None, 1: None},
        ["cat", "dog"], "2 classes from the first folder",
    ),
    "of pictures that are not there": (
        {"a.png": png(0), "metadata.csv": b"file_name,text\na.png,one\nb.png,two\n"}, "train", {0: ("one",)}, None,
        "captions of pictures that are not there: 1, e.g. b.png",
    ),
    "all of other pictures": (
        {"a.png": png(0), "metadata.csv": b"file_name,text\nimages/a.png,one\n"}, "train", {0: None}, [None],
        "captions of pictures that are not there: 1, e.g. images/a.png",
    ),
}  # fmt: skip


@pytest.mark.parametrize("container", ["folder", "tar", "zip"])
@pytest.mark.parametrize("name", CAPTIONED)
def test_every_picture_has_its_captions(tmp_path, name, container):
    files, split, expected, labels, words = CAPTIONED[name]
    images = load_images(write(tmp_path / "set", files, container), split)
    assert torch.equal(images.pixels, torch.from_numpy(np.stack([pixels(i) for i in expected])).permute(0, 3, 1, 2))
    assert images.captions == (None if None in expected.values() else tuple(expected.values()))
    found = None if images.labels is None else [images.classes[i] for i in images.labels]
    assert (found or [None]) == (labels or [None])
    assert words in str(images)


REFUSED = {
    "a picture without a row": (
        {**PETS, "train/metadata.csv": b"file_name,text\ndog/a.png,one\n"},
        r"text in metadata.csv has no caption, or an empty one, for 1 of 2 images, e.g. train/cat/b.png; give every",
    ),
    "an empty one": (
        {**PETS, "train/metadata.csv": b"file_name,text\ndog/a.png,one\ncat/b.png, \n"}, "1 of 2 images.* train/cat/b"
    ),
    "an empty one of several": (
        {"a.png": png(0), "metadata.jsonl": lines({"file_name": "a.png", "text": ["one", ""]})}, "1 of 1 images.* a.png"
    ),
    "a picture without .txt": (
        {**PETS, "train/dog/a.txt": b"one"}, "the .txt files has no caption.* 1 of 2 images, e.g. train/cat/b.png"
    ),
    "a number": (
        {"a.png": png(0), "metadata.jsonl": lines({"file_name": "a.png", "text": 3})}, "'3' is no caption; expected"
    ),
    "no UTF-8": ({"a.png": png(0), "a.txt": "chat très".encode("latin-1")}, "a.txt is no caption: it is not UTF-8"),
    "two pictures of a .txt": (
        {"a.png": png(0), "a.bmp": png(1), "a.txt": b"one"}, "a.bmp and a.png share one .txt; keep one picture per"
    ),
    "too long": ({"a.png": png(0), "a.txt": b"a" * 10**6 + b"b"}, "caption of a.png: 1,000,001 characters are"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_caption_is_refused_by_name(tmp_path, name):
    files, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load_images(write(tmp_path / "set", files))


@pytest.mark.parametrize("kind", ["string", "list", "dictionary"])
def test_captions_in_parquet(tmp_path, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = {"list": [["one", "two"], ["three"]]}.get(kind, ["one", "three"])
    column = pa.array(said).dictionary_encode() if kind == "dictionary" else pa.array(said)
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [png(0), png(1)], "text": column, "label": [1, 0]}), file)
    images = load_images(write(tmp_path / "set", {"0.parquet": file.getvalue()}))
    assert images.captions == ((("one", "two") if kind == "list" else ("one",)), ("three",))
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]
    assert "from text in 1 Parquet file, e.g. 'one'" in str(images)


def test_a_column_of_numbers_called_text_is_no_caption(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [png(0)], "text": [3], "caption": ["one"]}), file)
    assert load_images(write(tmp_path / "set", {"0.parquet": file.getvalue()})).captions == (("one",),)
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [png(0), png(1)], "text": ["one", None]}), file)
    with pytest.raises(ValueError, match=r"text has no caption, .* 1 of 2 images, e\.g\. number 1"):
        load_images(write(tmp_path / "two", {"0.parquet": file.getvalue()}))


STACK = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)


def test_captions_from_python():
    images = Images.of(STACK, [1, 0], captions=["one", ["two", "three"]])
    assert images.captions == (("one",), ("two", "three"))
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]
    assert "3 captions given in Python, e.g. 'one'" in str(images)
    assert Images.of(STACK).captions is None
    pictures = [Image.fromarray(pixels(i)) for i in (0, 1)]
    rows = [{"image": picture, "text": text} for picture, text in zip(pictures, ("one", "two"), strict=True)]
    assert Images.of(rows).captions == (("one",), ("two",))
    assert Images.of(pictures, captions=["one", "two"]).captions == (("one",), ("two",))
    for data, captions, message in (
        (STACK, ["one"], "2 images and 1 caption;"),
        (STACK, "ab", "2 images and one text"),
        (STACK, ["one", 2], "'2' is no caption"),
        (STACK, ["one", ""], r"1 of 2 images, e\.g\. number 1"),
        (rows, ["one", "two"], "a data set that has captions; give them in one place"),
    ):
        with pytest.raises(ValueError, match=message):
            Images.of(data, captions=captions)
