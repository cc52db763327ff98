"""Data sets in array or table files: CIFAR's pickled batches, MNIST's idx files, Parquet."""

import json
import math
import re
import zlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from posixpath import basename, splitext
from typing import Any

import numpy as np

from distmatch.data import parquet
from distmatch.data.archives import Files, printable
from distmatch.data.captions import Captions, captions_of, several
from distmatch.data.decode import SUFFIXES, Decoder
from distmatch.data.layouts import kind
from distmatch.data.prompts import KEYS
from distmatch.data.sidecars import COLUMNS, IMAGES, METADATA, labels_of
from distmatch.system import unpickle
from distmatch.system.errors import UserError
from distmatch.system.limits import FILE, PROMPTS, check

IDX = re.compile(r"(?:.*/)?([^/]*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
CIFAR = re.compile(r"data_batch_\d+|test_batch")


@dataclass(frozen=True)
class Table:
    """A data set of arrays.

    Args:
        pixels: u8[N,C,H,W].
        labels: one per image, or `None`.
        names: of the classes, by number, if known.
        origin: in words, what it was read from.
        used: its files, including those of other splits.
        left_out: those of other splits, by split.
        notes: what was done to the pictures.
        captions: those of the pictures, if there are any.
    """

    pixels: np.ndarray
    labels: list[int] | list[str] | None
    names: tuple[str, ...]
    origin: str
    used: set[str]
    left_out: Counter[str]
    notes: list[str] = field(default_factory=list)
    captions: Captions | None = None


def read_table(files: Files, names: list[str], split: str) -> Table | None:
    """Return the data set in the visible files `names`, if it is of one of these kinds.

    Raises `UserError` if it is damaged or has no such split, and if there are files of several kinds, or pictures
    beside them: we do not guess which of them is the data set.
    """
    pictures = [n for n in names if splitext(n)[1].lower() in SUFFIXES]
    tables = {
        "CIFAR's batches": list(_cifar_batches(names)),
        "MNIST's files": [n for n in names if IDX.fullmatch(n)],
        "Parquet tables": [n for n in names if n.endswith(".parquet") and not (pictures and basename(n) in METADATA)],
    }
    found = {what: those for what, those in {**tables, "pictures": pictures}.items() if those}
    if len(found) > 1:
        seen = " and ".join(f"{what} (e.g. {printable(those[0])})" for what, those in found.items())
        raise UserError(f"{files.path} has {seen}; give one of them by its path, or move the others away")
    readers = zip(tables, (_cifar, _idx, _parquet), strict=True)
    return next((read(files, names, split) for what, read in readers if what in found), None)


def parquet_rows(files: Files, names: list[str], split: str) -> int:
    """Return the number of images of `split` in the Parquet tables among `names`, without decoding them."""
    count = 0
    for name in _parquet_tables(files, names, split)[1]:
        with files.opened(name) as file:
            count += parquet.opened(file, f"{files.path}: {printable(name)}").metadata.num_rows
    return count


def _cifar_batches(names: list[str]) -> dict[str, str]:
    """Return the batches among `names`, with the split of each."""
    known, batches = set(names), {}
    for name in names:
        folder, separator, base = name.rpartition("/")
        if CIFAR.fullmatch(base) or (base in ("train", "test") and f"{folder}{separator}meta" in known):
            batches[name] = "test" if base.startswith("test") else "train"
    return batches


def _cifar(files: Files, names: list[str], split: str) -> Table:
    """Read CIFAR-10 or CIFAR-100, "python version": pickles, read as data. Rows are planes: red, green, blue."""
    batches, metas = _cifar_batches(names), [n for n in names if basename(n) in ("meta", "batches.meta")]
    chosen, left_out = _of_split(files, batches, split)
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
    return Table(np.concatenate(pixels), labels, classes, origin, {*batches, *metas}, left_out)


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


def _idx(files: Files, names: list[str], split: str) -> Table:
    """Read the files of MNIST and of data sets in its format, such as EMNIST."""
    found = {n: match for n in names if (match := IDX.fullmatch(n))}
    if len(sets := {match[1] for match in found.values()}) > 1:
        every = printable(", ".join(sorted(sets)))
        raise UserError(f"{files.path} has idx files of several data sets: {every}; keep those of one")
    splits = {n: "train" if match[2] == "train" else "test" for n, match in found.items()}
    chosen, left_out = _of_split(files, splits, split)
    if other := next((n for n in names if n.removesuffix(".gz").endswith("-labels-idx2-int")), None):
        raise UserError(
            f"{files.path}: {printable(other)} holds QMNIST's labels, of 8 numbers each, which are not read"
        )
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
    pixels, notes = np.concatenate(images), []
    if found[chosen[0]][1].lower().startswith("emnist"):
        pixels, notes = pixels.swapaxes(1, 2), ["rows and columns swapped, as EMNIST's files have them"]
    given = np.concatenate(labels).tolist() if labels else None
    origin = f"from {_bases(chosen)}" if labels else f"no classes: {_bases(chosen)} alone"
    return Table(pixels[:, None], given, (), origin, set(found), left_out, notes)


def _idx_array(where: str, content: bytes, dimensions: int) -> np.ndarray:
    """Return an array of bytes from Y. LeCun's idx format, compressed or not."""
    head = 4 + 4 * dimensions
    if content.startswith(b"\x1f\x8b"):
        try:
            unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: with a gzip header
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


def _parquet(files: Files, names: list[str], split: str) -> Table:
    """Read tables with a column of encoded images, as on Hugging Face: `data/train-00000-of-00001.parquet`."""
    tables, chosen, left_out = _parquet_tables(files, names, split)
    sets = {tuple(kind(part) or part for part in tables[n]): n for n in chosen}
    if len(sets) > 1 and split != "all":
        seen = ", ".join(map(printable, sorted(sets.values())[:6]))
        raise UserError(
            f"{files.path} has tables of {len(sets)} data sets, or of splits that are not known by their names: {seen}."
            " Give one of them by its path, or --split all, which reads them all as one"
        )
    place = str(files.path)
    with ExitStack() as stack:
        opened = {n: parquet.opened(stack.enter_context(files.opened(n)), f"{place}: {printable(n)}") for n in chosen}
        schema = opened[chosen[0]].schema_arrow
        image, label, known = _columns(place, schema)
        text = _texts(schema)
        decoder, row = Decoder(place, sum(t.metadata.num_rows for t in opened.values())), 0
        labels, texts, size = [], [], 0
        for name, table in opened.items():
            where = f"{place}: {printable(name)}"
            if not {image, *label, *text} <= set(table.schema_arrow.names):
                raise UserError(f"{where} has other columns than {printable(chosen[0])}; give one data set at a time")
            for record in parquet.records(table, [image, *label, *text], where):
                content = record[image].get("bytes") if isinstance(record[image], dict) else record[image]
                if not isinstance(content, bytes):
                    raise UserError(f"{where}, row {row}: {image} has no bytes; embed the images in the table")
                check(len(content), FILE, f"{where}, row {row}")
                decoder.add(row, f"{name}, row {row}", content)
                labels += [record[column] for column in label]
                texts += [several(record[column]) for column in text]
                size += sum(len(caption or "") for caption in texts[-1]) if text else 0
                check(size, PROMPTS, f"{where}: captions")
                row += 1
    if row != decoder.count:
        raise UserError(f"{place}: {row:,} rows where {decoder.count:,} were announced; get the tables again")
    pixels, notes = decoder.finish()
    there = f"in {len(chosen)} Parquet {'files' if len(chosen) > 1 else 'file'}"
    captions = None
    if text:
        captions = Captions(captions_of(texts, f"{place}: {text[0]}"), f"from {text[0]} {there}")
    given, origin = None, "no classes: the tables have no column of labels"
    if label:
        given, origin = labels_of(labels, f"{place}: {label[0]}"), f"from {label[0]} {there}"
    return Table(pixels, given, known, origin, set(tables), left_out, notes, captions)


def _parquet_tables(files: Files, names: list[str], split: str) -> tuple[dict[str, list[str]], list[str], Counter[str]]:
    """Return the parts of all tables' paths, the tables of `split`, and how many of other splits are left out."""
    tables = {n: _table_parts(n) for n in names if n.endswith(".parquet")}
    kinds = {n: next(filter(None, map(kind, reversed(parts))), "") for n, parts in tables.items()}
    if not any(kinds.values()):
        kinds = dict.fromkeys(tables, "train")
    return tables, *_of_split(files, kinds, split)


def _columns(place: str, schema: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """Return the column of images, that of labels if there is one, and the names of the classes."""
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
        said = {}  # not written by Hugging Face
    label = next((n for n in (*COLUMNS, *said) if n in types), None)
    return image, [label] if label else [], tuple(map(str, said.get(label, ())))  # pyright: ignore[reportArgumentType]


def _texts(schema: Any) -> list[str]:
    """Return the column of captions, if there is one: of strings, or of lists of strings."""
    types = {field.name: str(field.type) for field in schema}
    text = re.compile(r"((large_)?list<\w+: )?(large_)?string>?|dictionary<values=(large_)?string,.*")
    return [name for name in KEYS if text.fullmatch(types.get(name, ""))][:1]


def _table_parts(name: str) -> list[str]:
    """Return what a table's path says about its data set and split, without its number.

    `data/train-00000-of-00001.parquet` gives data, train; `default/test/0000.parquet` gives default, test and "".
    """
    *folders, base = name.removesuffix(".parquet").split("/")
    return [*folders, re.sub(r"[\d_]+", " ", re.split(r"[-.]", base)[0]).strip()]


def _of_split(files: Files, kinds: dict[str, str], split: str) -> tuple[list[str], Counter[str]]:
    """Return the files in `kinds` that belong to `split`, and how many belong to each other split.

    If there is no `test`, `val` is used for it.
    """
    wanted = kind(split)
    if wanted == "test" and "test" not in kinds.values():
        wanted = "val"
    chosen = [name for name, found in kinds.items() if split == "all" or found == wanted]
    if not chosen:
        raise UserError(f"{files.path} has no split {split!r}; it has {', '.join(sorted(set(kinds.values()) - {''}))}")
    others = Counter(f"in {found}" if found else "of no known split" for n, found in kinds.items() if n not in chosen)
    return sorted(chosen), others
