"""Data sets as people have them: layout -> classes, labels and pixels, compared label for label and pixel for pixel."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import lines, pixels, png, write

from distmatch.data.images import load_images
from distmatch.data.layouts import arrange, kind, visible

NVLABS = {f"{i // 3:05d}/img{i:08d}.png": png(i) for i in range(6)}
ODD = [[name, i % 2] for i, name in enumerate(NVLABS)]
CATS = {"cat/0.png": png(0), "cat/1.png": png(1), "dog/0.png": png(2), "dog/1.png": png(3)}
CATS_HERE = {0: "cat", 1: "cat", 2: "dog", 3: "dog"}
RUN = {"runs/teach-set/settings.json": b"{}", "runs/teach-set/previews/step-00000000.png": png(9)}


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


# name -> files, the split asked for, {number of the picture: its class} in the result's order, words of the account
LAYOUTS: dict[str, tuple[dict[str, bytes], str, dict[int, str | None], str]] = {
    "flat": ({"b.png": png(1), "a.png": png(0)}, "train", {0: None, 1: None}, "no classes: all in one folder"),
    "one folder": (below("x", {"a.png": png(0)}), "train", {0: None}, "no classes: all in one folder"),
    "class folders": (CATS, "train", CATS_HERE, "2 classes from the first folder: cat, dog"),
    "in folders around": (below("a/b", CATS), "train", CATS_HERE, "2 classes from the first folder: cat, dog"),
    "train, test": (
        {**below("train", CATS), **below("test", {"cat/9.png": png(9)})}, "train", CATS_HERE,
        "2 classes from the first folder below train: cat, dog; 1 file left out: 1 in test",
    ),
    "the test of these": ({"train/cat/0.png": png(9), **below("test", CATS)}, "test", CATS_HERE, "below test"),
    "trn, tst": ({**below("trn", CATS), **below("tst", {"cat/9.png": png(9)})}, "train", CATS_HERE, "below trn"),
    "train_dir, test-folder": (
        {**below("train_dir", CATS), **below("test-folder", {"cat/9.png": png(9)})}, "train", CATS_HERE, "train_dir"
    ),
    "training, testing": (
        {**below("training", CATS), **below("testing", {"cat/9.png": png(9)})}, "train", CATS_HERE, "below training"
    ),
    "Train, Valid, called by another name": (
        {"Train/cat/0.png": png(9), **below("Valid", CATS)}, "validation", CATS_HERE, "below Valid"
    ),
    "val in place of test": ({"train/cat/0.png": png(9), **below("val", CATS)}, "test", CATS_HERE, "below val"),
    "val is not test": (
        {"train/a/0.png": png(8), "val/a/0.png": png(9), **below("test", CATS)}, "test", CATS_HERE,
        "1 in train, 1 in val",
    ),
    "train2017": ({**below("coco/train2017", CATS), "coco/val2017/9.png": png(9)}, "train", CATS_HERE, "train2017"),
    "seg_train/seg_train": (
        {**below("seg_train/seg_train", CATS), "seg_test/seg_test/cat/9.png": png(9), "seg_pred/9.png": png(9)},
        "train", CATS_HERE, "2 files left out: 1 in seg_pred, 1 in seg_test",
    ),
    "a folder by its name": ({"train/0.png": png(9), **below("extra", CATS), "test/1.png": png(8)}, "extra", CATS_HERE,
                            "1 in test, 1 in train"),
    "no folder is a split": (
        {"train/0.png": png(0), "bus/0.png": png(1)}, "all", {1: "bus", 0: "train"},
        "2 classes from the first folder: bus, train",
    ),
    "a class called train": (
        {"train/bus/0.png": png(0), "train/train/0.png": png(1), "test/bus/0.png": png(9)}, "train",
        {0: "bus", 1: "train"}, "bus, train",
    ),
    "Tiny ImageNet": (
        {**{f"tiny/train/n0{k}/images/n0{k}_{i}.png": png(2 * k + i) for k in (1, 2) for i in (0, 1)},
         "tiny/train/n01/n01_boxes.txt": b"", "tiny/val/images/val_0.png": png(9), "tiny/wnids.txt": b""},
        "train", {2: "n01", 3: "n01", 4: "n02", 5: "n02"}, "2 classes from the first folder below train: n01, n02",
    ),
    "deeper folders": (
        {"cat/in/0.png": png(0), "cat/out/0.png": png(1), "dog/in/0.png": png(2)}, "train",
        {0: "cat", 1: "cat", 2: "dog"},
        "2 classes from the first folder: cat, dog",
    ),
    "numbers as folders": (
        {f"{k}/0.png": png(k) for k in (0, 2, 10)}, "train", {0: "0", 10: "10", 2: "2"}, "3 classes"
    ),
    "dataset.json": ({**NVLABS, "dataset.json": json.dumps({"labels": ODD}).encode()}, "train",
                     {i: str(i % 2) for i in range(6)}, "2 classes from dataset.json: 0, 1"),
    "dataset.json in a split": (
        {**below("train", {**NVLABS, "dataset.json": json.dumps({"labels": ODD}).encode()}), "val/0.png": png(9)},
        "train", {i: str(i % 2) for i in range(6)}, "2 classes from dataset.json below train",
    ),
    "dataset.json without labels": (
        {**NVLABS, "dataset.json": b'{"labels": null}'}, "train", dict.fromkeys(range(6)), "no classes: dataset.json"
    ),
    "dataset.json of another tool": ({**CATS, "dataset.json": b'{"name": "pets"}'}, "train", CATS_HERE, "1 .json"),
    "classes in the order of their numbers": (
        {**NVLABS, "dataset.json": json.dumps({"labels": [[n, 10 - 2 * i] for i, n in enumerate(NVLABS)]}).encode()},
        "train", {i: str(10 - 2 * i) for i in range(6)}, "6 classes from dataset.json: 0, 2, 4, 6, 8, 10",
    ),
    "thousands without dataset.json": (
        {f"{1000 * (i // 3):05d}/{1000 * (i // 3) + i:05d}.png": png(i) for i in range(6)}, "train",
        dict.fromkeys(range(6)), "no classes: the folders count the images",
    ),
    "metadata.jsonl": (
        {"train/0.png": png(0), "train/1.png": png(1), "train/metadata.jsonl": lines(
            {"file_name": "1.png", "label": 3}, {"file_name": "0.png", "label": 12}), "test/2.png": png(2)},
        "train", {0: "12", 1: "3"}, "2 classes from label in metadata.jsonl below train: 3, 12",
    ),
    "metadata.csv above the splits": (
        {"metadata.csv": b"file_name,text,label\ntrain/0.png,a,dog\ntrain/1.png,b,cat\ntest/2.png,c,dog\n",
         "train/0.png": png(0), "train/1.png": png(1), "test/2.png": png(2)},
        "train", {0: "dog", 1: "cat"}, "2 classes from label in metadata.csv below train: cat, dog",
    ),
    "metadata without labels": (
        {**CATS, "metadata.jsonl": lines(*({"file_name": n, "note": "a pet"} for n in CATS))}, "train", CATS_HERE,
        "from the first folder (metadata.jsonl has file_name, note and no label)",
    ),
    "metadata.csv of another tool": ({**CATS, "metadata.csv": b"id,age\n0,9\n"}, "train", CATS_HERE, "1 .csv"),
    ".cls": (
        {**{f"{i:06d}.png": png(i) for i in range(4)}, **{f"{i:06d}.cls": str(i % 2).encode() for i in range(4)},
         **{f"{i:06d}.json": b"{}" for i in range(4)}},
        "train", {i: str(i % 2) for i in range(4)}, "2 classes from .cls files: 0, 1; 4 files left out: 4 .json",
    ),
    ".cls of names": (
        {"a.jpg.png": png(0), "a.cls": b"dog\n", "b.png": png(1), "b.cls": b"cat"}, "train",
        {0: "dog", 1: "cat"}, "cat, dog",
    ),
    ".cls.txt": ({"a.png": png(0), "a.cls.txt": b"3", "b.png": png(1), "b.cls.txt": b"1"}, "train", {0: "3", 1: "1"},
                 "2 classes from .cls files: 1, 3"),
    "labels in JSON": ({"a.png": png(0), "a.json": b'{"label": 3}'}, "train", {0: None},
                       "all in one folder (label in a.json and its like is not read; write .cls files)"),
    "hidden and of tools": (
        {**CATS, **{f"{f}/0.png": png(9) for f in (".thumbnails", "@eaDir", "__MACOSX", "cat/.ipynb_checkpoints")},
         "cat/._0.png": b"AppleDouble", "cat/.DS_Store": b""},
        "train", CATS_HERE, "6 files left out: 6 hidden",
    ),
    "no pictures": (
        {**CATS, "cat/a.heic": b"", "dog/b.heic": b"", "README": b""}, "train", CATS_HERE,
        "3 files left out: 2 .heic, 1 without suffix",
    ),
    "beside a run": ({**CATS, **RUN}, "train", CATS_HERE, "2 files left out: 2 of runs of distmatch"),
    "beside a comparison": (
        {**CATS, "sd/settings.json": b"{}", "sd/compare.json": b"{}", "sd/teacher/000000.png": png(9)}, "train",
        CATS_HERE, "3 of runs of distmatch",
    ),
    "beside samples": ({**CATS, "out/grid.png": png(8), "out/000000.png": png(9)}, "train", CATS_HERE, "2 of runs"),
    "beside samples without a grid": (
        {**CATS, "out/sample.json": b"{}", "out/000000.png": png(9)}, "train", CATS_HERE, "2 of runs"
    ),
    "labels of pictures that are not there": (
        {"0.png": png(0), "metadata.jsonl": lines(*({"file_name": f"{i}.png", "label": i} for i in (2, 0, 1)))},
        "train", {0: "0"}, "jsonl: 0; labels of pictures that are not there: 2, e.g. 1.png",
    ),
    "stray beside splits": ({"logo.png": png(9), **below("train", CATS), "test/cat/1.png": png(8)}, "train", CATS_HERE,
                            "1 beside the splits"),
}  # fmt: skip


@pytest.mark.parametrize("container", ["folder", "tar", "zip"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_its_classes_labels_and_pixels(tmp_path, name, container):
    files, split, expected, words = LAYOUTS[name]
    images = load_images(write(tmp_path / "set", files, container), split)
    classes = {c for c in expected.values() if c}
    numbers = all(c.isdecimal() for c in classes)
    assert images.classes == tuple(sorted(classes, key=int if numbers else str))
    labels = [None] * len(images) if images.labels is None else [images.classes[i] for i in images.labels]
    assert labels == list(expected.values())
    assert torch.equal(images.pixels, torch.from_numpy(np.stack([pixels(i) for i in expected])).permute(0, 3, 1, 2))
    assert words in str(images)


REFUSED = {
    "stray": ({**CATS, "preview.png": png(9)}, "holds 1 image beside the folders cat, dog, e.g. preview.png"),
    "held out": (
        {"train_dir/0.png": png(0), "holdout/1.png": png(1)}, "train_dir may be a split or a class, beside holdout"
    ),
    "train may be a class": ({"bus/0.png": png(0), "train/0.png": png(1)}, "train may be a split or a class"),
    "names like splits": ({"trainA/0.png": png(0), "testA/0.png": png(1)}, "testA, trainA may be splits or classes"),
    "splits in classes": (
        {"cat/train/0.png": png(0), "cat/test/1.png": png(1), "dog/train/0.png": png(2)},
        "cat/test/1.png stands in test inside of other folders",
    ),
    "splits in one of several folders": ({"0.png": png(0), "cat/val/1.png": png(1)}, "cat/val/1.png stands in val"),
    "no training images": (below("test", CATS), "has no split 'train'; it has test"),
    "no pictures": ({"a.txt": b"", "b.mat": b"", "c.mat": b""}, "holds no images; it has 1 .txt, 2 .mat, exp"),
    "a run": ({"log.jsonl": b"", "settings.json": b"", "previews/step-0.png": png(9)}, "it has 3 of runs of distmatch"),
    "archives": ({"a-000.tar": b"", "a-001.tar": b""}, "2 .tar.* Give one of the archives, or unpack them"),
    "arrays": ({"pixels.npy": b""}, "Arrays are taken in Python: Images.of"),
    "saved by datasets": ({"dataset_info.json": b"{}", "data-00000-of-00001.arrow": b""}, "give it to Images.of"),
    "labels missing": (
        {**NVLABS, "dataset.json": json.dumps({"labels": ODD[2:]}).encode()},
        "dataset.json has no label for 2 of 6 images, e.g. 00000/img00000000.png",
    ),
    "one label missing": (
        {"0.png": png(0), "metadata.jsonl": lines({"file_name": "0.png", "label": None})}, "has no label for 1 of 1"
    ),
    "vectors": ({"0.png": png(0), "dataset.json": b'{"labels": [["0.png", [0, 1]]]}'}, r"'\[0, 1\]' is no label"),
    "of no class": ({"0.png": png(0), "dataset.json": b'{"labels": [["0.png", -1]]}'}, "'-1' is no label"),
    "no pairs": ({"0.png": png(0), "dataset.json": b'{"labels": [3]}'}, r"dataset.json: labels are not \{"),
    "no JSON": ({"0.png": png(0), "dataset.json": b'{"labels'}, "dataset.json is not valid JSON"),
    "nested without end": ({"0.png": png(0), "dataset.json": b"[" * 100_000}, "dataset.json is not valid JSON"),
    "a line is not valid JSON": (
        {"0.png": png(0), "metadata.jsonl": b'{"file_name": "0.png"}\n{'}, "metadata.jsonl, line 2 is not valid JSON"
    ),
    "a row without a file": (
        {"0.png": png(0), "metadata.jsonl": lines({"file_name": "0.png", "label": 1}, {"label": 2})}, "has no file_name"
    ),
    "an empty label": (
        {**CATS, "metadata.csv": b"file_name,label\ncat/0.png,x\ncat/1.png,x\ndog/0.png, \ndog/1.png,\n"},
        "metadata.csv has no label for 2 of 4 images, e.g. dog/0.png",
    ),
    "an empty .cls": ({"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.cls": b"\n"}, "no label for 1 of 2.* 1.png"),
    "two labels in one file": (
        {"0.png": png(0), "metadata.csv": b"file_name,label\n0.png,cat\n0.png,cat\n0.png,dog\n"},
        "metadata.csv: 0.png has the labels 'cat' and 'dog'; keep one",
    ),
    "two labels in two files": (
        {"a/0.png": png(0), "a/metadata.csv": b"file_name,label\n0.png,1\n",
         "metadata.jsonl": lines({"file_name": "a/0.png", "label": 2})}, "a/0.png has the labels '1' and '2'",
    ),
    "two numbers": ({"0.png": png(0), "dataset.json": b'{"labels": [["0.png", 0], ["0.png", 1]]}'}, "0.png has the"),
    "two .cls": ({"0.png": png(0), "0.cls": b"1", "0.x.cls": b"2"}, "0.png has the labels '1' and '2'"),
    "a list of a split": ({**CATS, "meta/test.txt": b"cat/1"}, "meta/test.txt says which pictures are of a split"),
    "a list of both": ({**CATS, "train_test_split.txt": b"1 0"}, "train_test_split.txt says which pictures are of a"),
    "semicolons": ({"0.png": png(0), "metadata.csv": b"file_name;label\n0.png;cat\n"}, "something else than commas"),
    "two pictures of a sample": (
        {"0.png": png(0), "0.mask.png": png(1), "0.cls": b"1"}, "0.mask.png and 0.png share one .cls"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_by_name(tmp_path, name):
    files, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load_images(write(tmp_path / "set", files))


@pytest.mark.parametrize("split", ["valid", "nothing"])
def test_a_split_that_is_not_there_is_refused(tmp_path, split):
    folder = write(tmp_path / "set", {**below("train", CATS), "test/9.png": png(9)})
    with pytest.raises(ValueError, match=f"no split '{split}'; it(s folders are:| has) test, train"):
        load_images(folder, split)
    with pytest.raises(ValueError, match="no split 'test'; its folders are: cat, dog"):
        load_images(folder / "train", "test")
    assert load_images(folder / "train").classes == ("cat", "dog")


FOLDERS = st.sampled_from(
    ["train", "Training", "test", "val", "valid", "cat", "dog", "train_images", "x", ".x", "00001"]
)
PATHS = st.lists(st.tuples(st.lists(FOLDERS, max_size=4), st.sampled_from(["0.png", "1.png"])), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(PATHS, st.sampled_from(["train", "test", "val"]))
def test_no_picture_of_another_split_is_ever_read(paths, split):
    """Whatever the folders: the first one that is a split's is that of the split asked for, or nothing is read."""
    names, _ = visible(sorted({"/".join([*folders, name]) for folders, name in paths}))
    assume(names)
    files: Any = SimpleNamespace(path="set", read=lambda names: iter(()))
    try:
        layout = arrange(files, names, split, Counter())
    except ValueError:
        return
    first = [next(filter(None, map(kind, name.split("/")[:-1])), None) for name in layout.names]
    allowed = {"train": [{"train"}, {None}], "test": [{"test"}, {"val"}], "val": [{"val"}]}[split]
    assert set(first) in allowed
    assert set(layout.names) <= set(names)
    assert len(layout.names) + layout.left_out.total() == len(names)


def test_links_are_followed_once(tmp_path):
    pool = write(tmp_path / "pool", {**CATS, "cat/deep/4.png": png(4)})
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "cat").symlink_to(pool / "cat")
    (folder / "dog").symlink_to(pool / "dog")
    (pool / "cat" / "deep" / "up").symlink_to(pool / "cat")
    (pool / "cat" / "deep" / "self").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    images = load_images(folder)
    assert [images.classes[i] for i in images.labels] == ["cat", "cat", "cat", "dog", "dog"]
    assert dict(images.account.left_out) == {"links that lead in a circle": 2, "broken links": 1}


def test_many_links_to_one_another_end(tmp_path):
    """Each of five folders links to all: paths through all of them, in any order, would be many."""
    for i in range(5):
        write(tmp_path / "set", {f"c{i}/0.png": png(i)})
    for i in range(5):
        for j in range(5):
            (tmp_path / "set" / f"c{i}" / f"to{j}").symlink_to(tmp_path / "set" / f"c{j}")
    images = load_images(tmp_path / "set")
    assert len(images) == 5 + 5 * 4 + 5 * 4 * 3 + 5 * 4 * 3 * 2  # through no link, one, two, three
    assert len(images.classes) == 5


def test_the_folder_of_results_is_passed_over(tmp_path):
    folder = write(tmp_path / "set", {**CATS, "here/9.png": png(9)})
    assert load_images(folder, without=folder / "here").classes == ("cat", "dog")
    assert load_images(folder).classes == ("cat", "dog", "here")
