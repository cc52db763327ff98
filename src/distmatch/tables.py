"""Data sets that are not files of pictures: CIFAR's pickled batches, MNIST's idx files, Parquet."""

import json
import math
import re
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distmatch import parquet, unpickle
from distmatch.archives import Files, printable
from distmatch.decode import Decoder
from distmatch.errors import UserError
from distmatch.layouts import kind
from distmatch.limits import FILE, check
from distmatch.sidecars import COLUMNS, IMAGES, labels_of

IDX = re.compile(r"(?:.*/)?([^/]*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
CIFAR = re.compile(r"data_batch_\d+|test_batch")


@dataclass(frozen=True)
class Table:
    """A data set of arrays.

    Args:
        pixels: u8[N,C,H,W].
        labels: of each, or `None`.
        names: of the classes, by number, if they have some.
        origin: in words, what it was read from.
        notes: what was done to the pictures.
        used: its files, those of other splits included.
    """

    pixels: np.ndarray
    labels: list[int] | list[str] | None
    names: tuple[str, ...]
    origin: str
    used: set[str]
    notes: list[str] = field(default_factory=list)


def read_table(files: Files, names: list[str], split: str) -> Table | None:
    """The data set in the visible files `names`, if it is of one of these kinds.

    Raises `UserError` where it is damaged or has no such split.
    """
    for read in (_cifar, _idx, _parquet):
        if found := read(files, names, split):
            return found
    return None


def _cifar(files: Files, names: list[str], split: str) -> Table | None:
    """CIFAR-10 and CIFAR-100, "python version": pickles, read as data. Rows are planes: red, green, blue."""
    known, batches, metas = set(names), {}, []
    for name in names:
        folder, separator, base = name.rpartition("/")
        if CIFAR.fullmatch(base) or (base in ("train", "test") and f"{folder}{separator}meta" in known):
            batches[name] = "test" if base.startswith("test") else "train"
        elif base in ("meta", "batches.meta"):
            metas.append(name)
    if not batches:
        return None
    chosen = _of_split(files, batches, split)
    pixels, labels, key = [], [], ""
    for name, content in sorted(files.read(chosen)):
        where, batch = f"{files.path}: {printable(name)}", _pickled(files, name, content)
        key = next((k for k in ("labels", "fine_labels") if k in batch), "")
        data, given = batch.get("data"), batch.get(key)
        planes = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(data), 3072)
        if not isinstance(data, np.ndarray) or not planes or not isinstance(given, list) or len(given) != len(data):
            raise UserError(f"{where} is no batch of CIFAR: expected data as uint8 (N, 3072) and as many labels")
        pixels.append(data.reshape(-1, 3, 32, 32))
        labels += labels_of(given, where)
    classes: tuple[str, ...] = ()
    for name, content in files.read(metas):
        said = _pickled(files, name, content).get("fine_label_names" if key == "fine_labels" else "label_names", [])
        classes = tuple(map(_text, said)) if isinstance(said, list) else ()
    origin = f"from CIFAR's {_bases(chosen)}"
    return Table(np.concatenate(pixels), labels, classes, origin, {*batches, *metas})


def _pickled(files: Files, name: str, content: bytes) -> dict[str, Any]:
    try:
        found = unpickle.load(content)
    except UserError as error:
        raise UserError(f"{files.path}: {printable(name)}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{files.path}: {printable(name)} is no batch of CIFAR: it is no dictionary")
    return {_text(key): value for key, value in found.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _bases(names: list[str]) -> str:
    return ", ".join(PurePosixPath(name).name for name in sorted(names))


def _idx(files: Files, names: list[str], split: str) -> Table | None:
    """MNIST's files, and those of the sets made after it."""
    found = {n: match for n in names if (match := IDX.fullmatch(n))}
    if not found:
        return None
    if len(sets := {match[1] for match in found.values()}) > 1:
        every = printable(", ".join(sorted(sets)))
        raise UserError(f"{files.path} has idx files of several data sets: {every}; keep those of one")
    splits = {n: "train" if match[2] == "train" else "test" for n, match in found.items()}
    chosen = _of_split(files, splits, split)
    arrays: dict[str, list[np.ndarray]] = {"images": [], "labels": []}
    for name, content in sorted(files.read(chosen)):
        dimensions = 3 if found[name][3] == "images" else 1
        arrays[found[name][3]].append(_idx_array(f"{files.path}: {printable(name)}", content, dimensions))
    images, labels = arrays["images"], arrays["labels"]
    if not images or (labels and list(map(len, labels)) != list(map(len, images))):
        raise UserError(
            f"{files.path}: {sum(map(len, images)):,} images and {sum(map(len, labels)):,} labels in "
            f"{printable(_bases(chosen))}; expected as many of both"
        )
    given = np.concatenate(labels).tolist() if labels else None
    origin = f"from {_bases(chosen)}" if labels else f"no classes: {_bases(chosen)} alone"
    return Table(np.concatenate(images)[:, None], given, (), origin, set(found))


def _idx_array(where: str, content: bytes, dimensions: int) -> np.ndarray:
    """An array of bytes in Y. LeCun's idx format, perhaps compressed."""
    head = 4 + 4 * dimensions
    if content.startswith(b"\x1f\x8b"):
        try:
            unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16)
            start = unpacked.decompress(content, head)
            size = math.prod(_idx_shape(where, start, dimensions))
            check(size, 16 * FILE, where)
            content = start + unpacked.decompress(unpacked.unconsumed_tail, size + 1)
        except zlib.error as error:
            raise UserError(f"{where} is damaged: {printable(error)}; get it again") from error
        if not unpacked.eof:
            raise UserError(f"{where} is damaged: it is longer or shorter than it says; get it again")
    shape = _idx_shape(where, content, dimensions)
    if len(content) - head != math.prod(shape):
        raise UserError(f"{where} is damaged: {len(content) - head:,} bytes for {shape}; get it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _idx_shape(where: str, content: bytes, dimensions: int) -> tuple[int, ...]:
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < 4 + 4 * dimensions:
        raise UserError(f"{where} is no idx file of bytes in {dimensions} dimensions")
    return tuple(int.from_bytes(content[i : i + 4]) for i in range(4, 4 + 4 * dimensions, 4))


def _parquet(files: Files, names: list[str], split: str) -> Table | None:
    """Tables with a column of encoded images, as Hugging Face keeps data sets: `data/train-00000-of-00001.parquet`."""
    tables = [n for n in names if n.endswith(".parquet")]
    if not tables:
        return None
    kinds = {n: _kind_of_file(n) for n in tables}
    if not any(kinds.values()):
        kinds = dict.fromkeys(tables, "train")
    chosen, place = sorted(_of_split(files, kinds, split)), str(files.path)
    with ExitStack() as stack:
        opened = {n: parquet.opened(stack.enter_context(files.opened(n)), f"{place}: {printable(n)}") for n in chosen}
        image, label, known = _columns(place, opened[chosen[0]].schema_arrow)
        decoder, row, labels = Decoder(place, sum(t.metadata.num_rows for t in opened.values())), 0, []
        for name, table in opened.items():
            where = f"{place}: {printable(name)}"
            if not {image, *label} <= set(table.schema_arrow.names):
                raise UserError(f"{where} has other columns than {printable(chosen[0])}; give one data set at a time")
            for record in parquet.records(table, [image, *label], where):
                content = record[image].get("bytes") if isinstance(record[image], dict) else record[image]
                if not isinstance(content, bytes):
                    raise UserError(f"{where}, row {row}: {image} has no bytes; embed the images in the table")
                check(len(content), FILE, f"{where}, row {row}")
                decoder.add(row, f"{name}, row {row}", content)
                labels += [record[column] for column in label]
                row += 1
    if row != decoder.count:
        raise UserError(f"{place}: {row:,} rows where {decoder.count:,} were announced; get the tables again")
    pixels, notes = decoder.finish()
    if not label:
        return Table(pixels, None, (), "no classes: the tables have no column of labels", set(tables), notes)
    origin = f"from {label[0]} in {len(chosen)} Parquet file{'s' * (len(chosen) > 1)}"
    return Table(pixels, labels_of(labels, f"{place}: {label[0]}"), known, origin, set(tables), notes)


def _columns(place: str, schema: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """The column of images, that of labels if there is one, and what its numbers are called."""
    types = {field.name: str(field.type) for field in schema}
    encoded = [n for n, t in types.items() if "binary" in t]
    image = next((n for n in IMAGES if n in encoded), encoded[0] if len(encoded) == 1 else None)
    if image is None:
        raise UserError(
            f"{place}: no column of encoded images, called {', '.join(IMAGES)}, in the tables; they have "
            f"{printable(', '.join(f'{n} ({t})' for n, t in types.items()), 400)}"
        )
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        said = {n: tuple(f["names"]) for n, f in features.items() if f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        said = {}  # not of Hugging Face
    label = next((n for n in (*COLUMNS, *said) if n in types), None)
    return image, [label] if label else [], tuple(map(str, said.get(label, ())))  # pyright: ignore[reportArgumentType]


def _kind_of_file(name: str) -> str:
    """The split in a path such as `data/train-00000-of-00001.parquet` or `default/test/0000.parquet`."""
    *folders, base = name.removesuffix(".parquet").split("/")
    return next((found for part in (re.split(r"[-.]", base)[0], *reversed(folders)) if (found := kind(part))), "")


def _of_split(files: Files, kinds: dict[str, str], split: str) -> list[str]:
    """Those of the files in `kinds` that belong to `split`; `test` is met by `val` where there is no `test`."""
    wanted = kind(split)
    if wanted == "test" and "test" not in kinds.values():
        wanted = "val"
    chosen = [name for name, found in kinds.items() if split == "all" or found == wanted]
    if not chosen:
        raise UserError(f"{files.path} has no split {split!r}; it has {', '.join(sorted(set(kinds.values())))}")
    return chosen
