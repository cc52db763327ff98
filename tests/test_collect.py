"""Data in Python: tensors, PyTorch's data sets and Hugging Face's, recognised by what they offer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import pixels
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from distmatch.data.images import Images

STACK = torch.from_numpy(np.stack([pixels(i) for i in range(4)])).permute(0, 3, 1, 2).contiguous()


class Pictures(Dataset):
    """As torchvision's: Pillow images with their number, and the names of the classes."""

    classes = ("cat", "dog", "eel")

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.fromarray(pixels(i)), (2, 0, 0, 2)[i]


class HuggingFace(list):
    """As `datasets.Dataset`: items are dictionaries, and `features` knows the classes' names."""

    @property
    def features(self):
        return {"text": SimpleNamespace(), "label": SimpleNamespace(names=["cat", "dog"])}


ITEMS = HuggingFace({"text": "a", "image": Image.fromarray(pixels(i)), "label": i % 2} for i in range(4))


def test_bytes_stay_as_they_are():
    given = STACK.clone()
    images = Images.of(given, torch.tensor([0, 2, 2, 0]), classes=("a", "b", "c"))
    given.zero_()
    assert torch.equal(images.pixels, STACK)
    assert (images.labels.tolist(), images.classes) == ([0, 2, 2, 0], ("a", "b", "c"))
    assert str(images) == "4 images 5x6, RGB: 3 classes given in Python: a, b, c"
    assert Images.of(images) is images
    grey = Images.of(STACK[:, 0].numpy())
    assert torch.equal(grey.pixels, STACK[:, :1])
    assert grey.labels is None


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (1.0, -1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_the_bytes_they_came_from(value_range, dtype):
    black, white = value_range
    if black > white:
        with pytest.raises(ValueError, match="value_range"):
            Images.of(STACK.to(dtype), value_range=value_range)
        return
    floats = black + STACK.to(dtype) / 255 * (white - black)
    assert torch.equal(Images.of(floats, value_range=value_range).pixels, STACK)


def test_labels_without_names_are_numbered_in_order():
    assert Images.of(STACK, [7, 10, 7, 9]).classes == ("7", "9", "10")
    named = Images.of(STACK, ["dog", "cat", "dog", "ant"])
    assert (named.classes, named.labels.tolist()) == (("ant", "cat", "dog"), [2, 1, 2, 0])

    ours = [np.int64(1), torch.tensor(0), np.int64(1), 0]
    assert Images.of(STACK, ours, classes=("a", "b")).labels.tolist() == [1, 0, 1, 0]
    assert Images.of(STACK, np.array(["b", "a", "b", "b"])).labels.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("data", "labels", "classes"),
    [
        (Pictures(), [2, 0, 0, 2], ("cat", "dog", "eel")),
        (Subset(Pictures(), range(4)), [1, 0, 0, 1], ("0", "2")),
        (TensorDataset(STACK, torch.tensor([1, 0, 1, 0])), [1, 0, 1, 0], ("0", "1")),
        (TensorDataset(STACK), None, ()),
        ([Image.fromarray(pixels(i)) for i in range(4)], None, ()),
        ([(pixels(i).transpose(2, 0, 1), np.int64(i % 2)) for i in range(4)], [0, 1, 0, 1], ("0", "1")),
        (ITEMS, [0, 1, 0, 1], ("cat", "dog")),
        ([{"img": Image.fromarray(pixels(i))} for i in range(4)], None, ()),
    ],
)
def test_data_sets_are_read_image_by_image(data, labels, classes):
    images = Images.of(data)
    assert torch.equal(images.pixels, STACK)
    assert (None if images.labels is None else images.labels.tolist()) == labels
    assert images.classes == classes


def test_pictures_are_treated_as_those_of_files():
    mixed = [Image.fromarray(pixels(0, 1)), Image.fromarray(pixels(1)), Image.new("RGBA", (6, 5))]
    images = Images.of(mixed)
    assert images.pixels.shape == (3, 3, 5, 6)
    assert (images.pixels[2] == 255).all()
    assert images.account.notes == ("1 with transparency, put on white", "1 grey as RGB")


REFUSED = [
    (STACK.float(), {}, r"floats in 0..255; give black and white"),
    (STACK.float(), {"value_range": (0, 1)}, r"are in 0..255, outside of value_range=\(0, 1\)"),
    (STACK.float() * torch.nan, {"value_range": (0, 255)}, "are in nan"),
    (STACK.int(), {}, "images are torch.int32; expected uint8"),
    (STACK.permute(0, 2, 3, 1), {}, r"are \(4, 5, 6, 3\); .*\.permute\(0, 3, 1, 2\)"),
    (STACK[0, 0], {}, r"images are \(5, 6\)"),
    (STACK[:0], {}, r"images are \(0, 3, 5, 6\)"),
    (STACK, {"labels": [1]}, "4 images and 1 label;"),
    (STACK, {"labels": [0, 1, 2, -1]}, "'-1' is no label"),
    (STACK, {"labels": [0.5] * 4}, "'0.5' is no label"),
    (STACK, {"labels": [3] * 4, "classes": ("a", "b")}, "label 3 of 2 classes"),
    (STACK, {"labels": ["c"] * 4, "classes": ("a", "b")}, "label 'c' is none of the classes a, b"),
    ({"train": ITEMS, "test": ITEMS}, {}, "has the splits train, test; give one of them"),
    (iter([1]), {}, "is no data set of known length"),
    ([], {}, "is empty"),
    ([1, 2], {}, "number 0 is a int; expected a Pillow image"),
    ([(1, 2, 3)], {}, "an item has 3 parts"),
    ([{"a": 1}], {}, "items have a; expected one called image"),
    ([(STACK[0], 1), (STACK[1], None)], {}, "some images have a label and some have none"),
    ([{"image": STACK[0]}, {"image": STACK[1], "label": "a"}], {}, "some images have a label and some have none"),
    ([{"image": STACK[0], "class": 1}, {"image": STACK[1], "label": 1}], {}, "some images have a label and some have"),
    ([{"image": STACK[0]}, (STACK[1], 1)], {}, "some images have a label and some have none"),
    ([(STACK[0], torch.eye(3)[0])], {}, r"'\[1.0, 0.0, 0.0\]' is no label"),
    (STACK, {"labels": torch.eye(4).long()}, r"'\[1, 0, 0, 0\]' is no label"),
    (STACK, {"labels": ["", "a", "a", None]}, "labels has no label for 2 of 4 images, e.g. number 0"),
    (STACK, {"labels": ["", "a", "a", "a"], "classes": ("a", "b")}, "no label for 1 of 4 images"),
    (STACK, {"labels": ["a"] * 4, "classes": ("a", "b", "a")}, "'a' is the name of two classes"),
    (STACK.float(), {"value_range": (0, 0)}, r"value_range=\(0, 0\) is no range; expected black below white"),
    (STACK.float(), {"value_range": (0, float("inf"))}, r"value_range=\(0, inf\) is no range"),
    ([STACK[0], STACK[1, :, :3]], {}, r"shapes \(3, 3, 6\), \(3, 5, 6\)"),
    (Pictures(), {"labels": [0]}, "labels are given beside a data set"),
]


@pytest.mark.parametrize(("data", "options", "message"), REFUSED)
def test_what_is_no_data_is_refused_with_a_reason(data, options, message):
    with pytest.raises(ValueError, match=message):
        Images.of(data, **options)
