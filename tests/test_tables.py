"""Data sets that are no files of pictures: CIFAR's pickles, MNIST's idx files, Parquet."""

import gzip
import json
import pickle
import struct

import numpy as np
import pytest
from layouts import encoded, lines, pixels, png, write

from distmatch.data import decode
from distmatch.data.images import count_images, load_images
from distmatch.system.errors import UserError

random = np.random.default_rng(0)
BATCHES = [(random.integers(0, 256, (4, 3072), dtype=np.uint8), [3, 0, 1, int(i)]) for i in range(3)]
NAMES = ["airplane", "automobile", "bird", "cat"]


def python2(data: np.ndarray, labels: list[int], key: str = "labels") -> bytes:
    """The batch as Python 2 and NumPy of 2009 pickled it by protocol 2: strings are bytes, and so are the pixels."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
        b"(K\1J" + struct.pack("<i", len(data)) + b"J" + struct.pack("<i", 3072) + b"\x86"
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89T" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(key.encode()) + listed + b"u."


def python3(data: np.ndarray, labels: list[int], key: str = "labels", protocol: int = 4) -> bytes:
    return pickle.dumps({b"data": data, key.encode(): labels}, protocol=protocol)


def planes(rows: np.ndarray) -> np.ndarray:
    """As CIFAR's page says: the first 1024 entries of a row are its red values, then green, then blue."""
    return np.stack([rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]], axis=1).reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("container", ["folder", "tar.gz"])
@pytest.mark.parametrize("write_batch", [python2, python3, lambda d, k: python3(d, k, protocol=2)])
def test_cifar_as_it_is_downloaded(tmp_path, write_batch, container):
    names = ("data_batch_1", "data_batch_2", "test_batch")
    files = {f"cifar-10-batches-py/{n}": write_batch(*batch) for n, batch in zip(names, BATCHES, strict=True)}
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": NAMES, "num_vis": 3072}, protocol=2)
    files["cifar-10-batches-py/readme.html"] = b""
    place = write(tmp_path / "cifar-10-python", files, container)
    train, test = load_images(place), load_images(place, "test")
    assert np.array_equal(train.pixels.numpy(), planes(np.concatenate([BATCHES[0][0], BATCHES[1][0]])))
    assert train.labels.tolist() == [3, 0, 1, 0, 3, 0, 1, 1]
    assert train.classes == test.classes == tuple(NAMES)
    assert np.array_equal(test.pixels.numpy(), planes(BATCHES[2][0]))
    assert "4 classes from CIFAR's data_batch_1, data_batch_2: airplane, " in str(train)
    assert "2 files left out: 1 in test, 1 .html" in str(train)


def test_cifar_100_has_fine_labels(tmp_path):
    files = {"train": python2(*BATCHES[0], "fine_labels"), "test": python2(*BATCHES[1], "fine_labels")}
    files["meta"] = pickle.dumps({"fine_label_names": NAMES, "coarse_label_names": ["x"]}, protocol=2)
    images = load_images(write(tmp_path / "cifar-100-python", files))
    assert (images.labels.tolist(), images.classes) == (BATCHES[0][1], tuple(NAMES))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system: this is refused"),
        (pickle.dumps([1], protocol=2), "is no dictionary"),
        (pickle.dumps({b"data": BATCHES[0][0][:, :9], b"labels": [1]}), "expected data as uint8"),
        (pickle.dumps({b"data": BATCHES[0][0], b"labels": [1, 2, 3]}), "as many labels"),
        (python2(*BATCHES[0])[:-500], "is damaged at byte"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"data_batch_1.*{message}"):
        load_images(write(tmp_path / "set", {"cifar-10-batches-py/data_batch_1": content}))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


DIGITS, KINDS = random.integers(0, 256, (6, 5, 4), dtype=np.uint8), np.array([7, 2, 1, 0, 4, 7], np.uint8)
MNIST = {
    "train-images-idx3-ubyte": idx(DIGITS[:4]), "train-labels-idx1-ubyte": idx(KINDS[:4]),
    "t10k-images-idx3-ubyte": idx(DIGITS[4:]), "t10k-labels-idx1-ubyte": idx(KINDS[4:]),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_as_it_is_downloaded(tmp_path, compressed):
    files = {f"raw/{n}.gz": gzip.compress(c, mtime=0) for n, c in MNIST.items()} if compressed else MNIST
    folder = write(tmp_path / "MNIST", files)
    train, test = load_images(folder), load_images(folder, "test")
    assert np.array_equal(train.pixels[:, 0].numpy(), DIGITS[:4])
    assert np.array_equal(test.pixels[:, 0].numpy(), DIGITS[4:])
    assert [train.classes[i] for i in train.labels] == ["7", "2", "1", "0"]
    assert [test.classes[i] for i in test.labels] == ["4", "7"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", MNIST["train-images-idx3-ubyte"][:-1], r"79 bytes for \(4, 5, 4\)"),
        ("train-images-idx3-ubyte.gz", gzip.compress(MNIST["train-images-idx3-ubyte"], mtime=0)[:-9], "damaged"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(MNIST["train-images-idx3-ubyte"] + bytes(10**6), mtime=0),
            "longer or shorter",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**31] * 3), mtime=0),
            "are more than",
        ),
        ("train-images-idx3-ubyte", idx(KINDS), "is no idx file of bytes in 3 dimensions"),
        ("train-labels-idx1-ubyte", idx(KINDS[:3]), "4 images and 3 labels"),
        ("fashion-train-labels-idx1-ubyte", idx(KINDS), "several data sets: , fashion-"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, name, content, message):
    files = {k: v for k, v in MNIST.items() if k != name.removesuffix(".gz")}
    with pytest.raises(ValueError, match=message):
        load_images(write(tmp_path / "set", {**files, name: content}))


def test_emnist_is_turned_upright_and_qmnist_refused(tmp_path):
    images = load_images(write(tmp_path / "set", {f"emnist-letters-{n}": content for n, content in MNIST.items()}))
    assert np.array_equal(images.pixels[:, 0].numpy(), DIGITS[:4].swapaxes(1, 2))
    assert "rows and columns swapped, as EMNIST's" in str(images)
    files = {"qmnist-test-images-idx3-ubyte": MNIST["t10k-images-idx3-ubyte"], "qmnist-test-labels-idx2-int": b""}
    with pytest.raises(UserError, match="qmnist-test-labels-idx2-int holds QMNIST's labels"):
        load_images(write(tmp_path / "q", files), "test")


def parquet(rows: list[tuple[bytes | None, object]], label: str = "label", names: list[str] | None = None) -> bytes:
    """A table as Hugging Face's hub keeps them."""
    import io

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": content, "path": None} for content, _ in rows]
    table = pa.table({"image": images, label: [said for _, said in rows], "id": list(range(len(rows)))})
    if names:
        features = {
            "image": {"_type": "Image"},
            label: {"names": names, "_type": "ClassLabel"},
            "id": {"_type": "Value"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def test_parquet_as_hugging_face_keeps_it(tmp_path):
    names = ["cat", "dog", "eel"]
    files = {
        "data/train-00000-of-00002.parquet": parquet([(png(0), 1), (png(1), 2)], names=names),
        "data/train-00001-of-00002.parquet": parquet([(encoded(pixels(2, 1)), 0)], names=names),
        "data/test-00000-of-00001.parquet": parquet([(png(3), 2)], names=names),
        "README.md": b"",
    }
    folder = write(tmp_path / "set", files)
    train, test = load_images(folder), load_images(folder, "test")
    expected = np.stack([pixels(0), pixels(1), np.stack([pixels(2, 1)] * 3, axis=2)])
    assert np.array_equal(train.pixels.permute(0, 2, 3, 1).numpy(), expected)
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 2, 0], [2])
    assert train.classes == test.classes == ("cat", "dog", "eel")
    assert "3 classes from label in 2 Parquet files: cat, dog, eel; 2 files left out: 1 in test, 1 .md; 1 grey" in str(
        train
    )
    one = load_images(folder / "data" / "test-00000-of-00001.parquet", "test")
    assert np.array_equal(one.pixels[0].permute(1, 2, 0).numpy(), pixels(3))


CATS = parquet([(png(0), "cat"), (png(1), "dog")])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"assets/banner.png": png(9), "data/train-0.parquet": CATS}, r"/train-0.parquet\) and pictures \(e.g. assets"),
        ({"preview.png": png(9), **MNIST}, r"MNIST's files \(e.g. .*-ubyte\) and pictures"),
        ({"0.png": png(9), "data_batch_1": python3(*BATCHES[0])}, r"CIFAR's batches \(e.g. data_batch_1\) and pict"),
        ({"data_batch_1": python3(*BATCHES[0]), "0.parquet": CATS}, r"batches \(.*\) and Parquet tables \(e.g. 0"),
        ({"small/train-0.parquet": CATS, "full/train-0.parquet": CATS}, "2 data sets.*: full/train-0.*, small/train"),
        ({"cats/0.parquet": CATS, "dogs/0.parquet": CATS}, "2 data sets.*: cats/0.parquet, dogs/0.parquet.*split all"),
        ({"lesson.parquet": CATS, "holdout.parquet": CATS}, "splits that are not known.*: holdout.parquet, lesson"),
    ],
)  # fmt: skip
def test_what_may_be_two_data_sets_is_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        load_images(write(tmp_path / "set", files))


def test_tables_of_other_splits_are_counted(tmp_path):
    files = {
        "train_dir/part-00000-0f.snappy.parquet": CATS, "train_dir/part-00001-9a.snappy.parquet": CATS,
        "holdout/part-0.parquet": CATS, "test/part-0.parquet": CATS, "test/part-1.parquet": CATS,
    }  # fmt: skip
    folder = write(tmp_path / "set", files)
    images = load_images(folder)
    assert (len(images), images.account.left_out) == (4, (("in test", 2), ("of no known split", 1)))
    assert len(load_images(folder, "all")) == 10
    with pytest.raises(UserError, match=r"no label for 1 of 2 images, e\.g\. number 1"):
        load_images(write(tmp_path / "empty", {"0.parquet": parquet([(png(0), "cat"), (png(1), " ")])}))
    digits = load_images(write(tmp_path / "MNIST", MNIST))
    assert digits.account.left_out == (("in test", 2),)


def test_parquet_of_other_columns(tmp_path):
    named = load_images(write(tmp_path / "a", {"0.parquet": parquet([(png(0), "b"), (png(1), "a")], "class")}))
    assert [named.classes[i] for i in named.labels] == ["b", "a"]
    none = load_images(write(tmp_path / "b", {"0.parquet": parquet([(png(0), "a cat")], "text")}))
    assert none.labels is None
    assert "no classes: the tables have no column of labels" in str(none)
    with pytest.raises(ValueError, match="row 1: image has no bytes"):
        load_images(write(tmp_path / "c", {"0.parquet": parquet([(png(0), 1), (None, 1)])}))
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read: 0.parquet, row 1 \(no picture"):
        load_images(write(tmp_path / "d", {"0.parquet": parquet([(png(0), 1), (b"x", 1)])}))
    with pytest.raises(ValueError, match="label 5 of 2 classes"):
        load_images(write(tmp_path / "e", {"0.parquet": parquet([(png(0), 5)], names=["a", "b"])}))


@pytest.mark.parametrize("container", ["folder", "tar", "zip"])
@pytest.mark.parametrize(
    "files",
    [
        {f"{split}/{name}/{i}.png": png(i) for split in ("train", "test") for name in "ab" for i in range(len(split))},
        {"train-0.parquet": CATS, "train-1.parquet": CATS, "test-0.parquet": CATS},
        {"metadata.jsonl": lines({"file_name": "0.png", "text": "a cat"}), "0.png": png(0)},
    ],
)
def test_images_are_counted_without_being_decoded(tmp_path, monkeypatch, container, files):
    place = write(tmp_path / "set", files, container)
    expected = {split: len(load_images(place, split)) for split in ("train", "all")}

    def decoded(*_):
        raise AssertionError

    monkeypatch.setattr(decode.Decoder, "add", decoded)
    assert {split: count_images(place, split) for split in expected} == expected


def test_what_cannot_be_counted_without_reading_it_is_not(tmp_path):
    assert count_images(write(tmp_path / "a", {"train-images-idx3-ubyte": idx(np.zeros((2, 4, 4), np.uint8))})) is None
    assert count_images("https://images.example/set.tar") is None
    with pytest.raises(ValueError, match="does not exist"):
        count_images(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no split 'val'"):
        count_images(write(tmp_path / "b", {"train-0.parquet": CATS, "test-0.parquet": CATS}), "val")


def test_damaged_parquet_is_named(tmp_path):
    whole = parquet([(png(i), i) for i in range(3)])
    for content in (b"", whole[:-9], whole[: len(whole) // 2], whole.replace(whole[4:400], bytes(396))):
        with pytest.raises(ValueError, match=r"0\.parquet"):
            load_images(write(tmp_path / "set", {"0.parquet": content}))


def test_metadata_as_parquet(tmp_path):
    import io

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["b.png", "a.png"], "label": [0, 1]}), file)
    images = load_images(
        write(tmp_path / "set", {"a.png": png(0), "b.png": png(1), "metadata.parquet": file.getvalue()})
    )
    assert images.labels.tolist() == [1, 0]
