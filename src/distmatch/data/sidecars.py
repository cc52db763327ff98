"""Reads labels from files beside the pictures: `dataset.json`, `metadata.*`, WebDataset's `.cls`."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from posixpath import basename
from typing import Any

from distmatch.data import parquet
from distmatch.data.archives import Files
from distmatch.system.errors import UserError
from distmatch.system.plain import json_of
from distmatch.system.screen import printable

COLUMNS = ("label", "labels", "class", "class_name", "category")
"""Names for the label of a row; the first that is there is used."""
IMAGES = ("image", "img", "picture", "png", "jpg")
"""Names for the column of images in a table."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Labels:
    """What is known about the classes of some pictures.

    Args:
        labels: one per picture, or `None`.
        origin: where they come from, in words.
        used: the files they were read from.
        final: whether to ignore folders as a source of classes.
        notes: what else there is to say about them.
    """

    labels: list[int] | list[str] | None
    origin: str
    used: set[str] = field(default_factory=set)
    final: bool = True
    notes: tuple[str, ...] = ()


def read_labels(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    """Return the labels of `pictures` from files among `names`; `None` if there are no such files.

    Raises `UserError` if such a file is damaged, or a picture has no label in it, or two different ones.
    """
    for find in (_dataset_json, _metadata, _cls):
        if found := find(files, names, pictures):
            return found
    return None


def _dataset_json(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    known = _Known()
    used, said = set(), False
    for name, content in files.read([n for n in names if basename(n) == "dataset.json"]):
        where = f"{files.path}: {printable(name)}"
        data: Any = json_of(content, where, object)
        if not isinstance(data, dict) or "labels" not in data:
            continue  # from another tool
        used.add(name)
        if data["labels"] is None:
            continue
        said = True
        try:
            rows = [(file, label) for file, label in data["labels"]]
        except (TypeError, ValueError) as error:
            raise UserError(f'{where}: labels are not {{"labels": [["name.png", 0], ...]}}') from error
        for file, label in rows:
            known.add(beside(name, file), label, where)
    if not used:
        return None
    if not said:  # its folders only number the images and are never classes
        return Labels(None, "no classes: dataset.json has none", used)
    labels = known.of(pictures, f"{files.path}: dataset.json")
    return Labels(labels, "from dataset.json", used, notes=known.lost(names))


def _metadata(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    known, used = _Known(), set[str]()
    columns: set[str] = set()
    column = None
    for name, where, rows in metadata(files, names):
        for row in rows:
            columns |= row.keys()
            column = column or next((c for c in COLUMNS if c in row), None)
            if column in row:
                known.add(beside(name, row["file_name"]), row[column], where)
        used.add(name)
    if not used:
        return None
    files_used = " and ".join(sorted({basename(name) for name in used}))
    if column is None:
        seen = printable(", ".join(sorted(map(str, columns))))
        return Labels(None, f"{files_used} has {seen} and no label", used, final=False)
    labels = known.of(pictures, f"{files.path}: {files_used}")
    return Labels(labels, f"from {column} in {files_used}", used, notes=known.lost(names))


def metadata(files: Files, names: list[str]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield each file of metadata among `names`: its name, how messages call it, and its rows, all with `file_name`.

    Raises `UserError` if one is damaged, or some of its rows have no `file_name`.
    """
    for name, content in files.read([n for n in names if basename(n) in METADATA]):
        where = f"{files.path}: {printable(name)}"
        rows = list(_rows(name, content, where))
        if not any(isinstance(row, dict) and "file_name" in row for row in rows):
            continue  # from another tool
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise UserError(f"{where}: {printable(row)} has no file_name")
        yield name, where, rows


def _cls(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    cls = [n for n in names if n.endswith((".cls", ".cls.txt"))]
    if not cls:
        return _json(files, names, pictures)
    keys: dict[str, str] = {}
    for name in pictures:
        if (other := keys.setdefault(_key(name), name)) != name:
            raise UserError(
                f"{files.path}: {printable(other)} and {printable(name)} share one .cls; keep one picture per sample"
            )
    known, where = _Known(), f"{files.path}: the .cls files"
    for name, content in files.read(cls):
        known.add(keys.get(_key(name), name), content.decode("utf-8", "replace").strip(), where)
    return Labels(known.of(pictures, where), "from .cls files", set(cls))


def _json(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    """Return a note if there are labels in a JSON file beside each picture, which we do not read."""
    first = f"{_key(pictures[0])}.json" if pictures else ""
    for name, content in files.read([first] if first in names else []):
        try:
            said: Any = json_of(content, name, object)
        except UserError:
            continue  # from another tool
        if isinstance(said, dict) and (column := next((c for c in COLUMNS if c in said), None)):
            seen = f"{column} in {printable(name)} and its like is not read; write .cls files"
            return Labels(None, seen, final=False)
    return None


def _key(name: str) -> str:
    """Return what the files of one sample share: the path up to the first dot of its last part."""
    folder, separator, base = name.rpartition("/")
    return folder + separator + base.partition(".")[0]


def _rows(name: str, content: bytes, where: str) -> Iterator[Any]:
    if name.endswith(".jsonl"):
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield json_of(line, f"{where}, line {number}", object)
    elif name.endswith(".csv"):
        try:
            table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
            heads = re.split(r"[;\t|]", next(iter(table.fieldnames or ()), ""))
            if len(heads) > 1 and "file_name" in heads:
                raise UserError(f"{where} is separated by something else than commas; expected file_name,label")
            yield from table
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{where} is no CSV: {printable(error)}") from error
    else:
        yield from parquet.rows(io.BytesIO(content), where)


def beside(file: str, name: Any) -> str:
    """Return the path of the file that `file` calls `name`."""
    return str(PurePosixPath(file).parent / PurePosixPath(str(name).replace("\\", "/")))


class _Known:
    """Collects labels by picture, as found in files."""

    def __init__(self) -> None:
        self.labels: dict[str, Any] = {}

    def add(self, picture: str, label: Any, where: str) -> None:
        """Store a label. Raises `UserError` if `picture` already has a different one."""
        before = self.labels.setdefault(picture, label)
        if str(before).strip() != str(label).strip():
            raise UserError(
                f"{where}: {printable(picture)} has the labels {printable(before)!r} and {printable(label)!r}; keep one"
            )

    def of(self, pictures: list[str], where: str) -> list[int] | list[str]:
        return labels_of(map(self.labels.get, pictures), where, pictures)

    def lost(self, names: list[str]) -> tuple[str, ...]:
        """Return a note if there are labels whose pictures are not among `names`."""
        lost = sorted(self.labels.keys() - set(names))
        return (f"labels of pictures that are not there: {len(lost):,}, e.g. {printable(lost[0])}",) if lost else ()


def labels_of(values: Iterable[Any], where: str, names: Sequence[str] = ()) -> list[int] | list[str]:
    """Return labels as whole numbers if all of them are, even if written as text; otherwise as names.

    Raises `UserError` if an image, referred to by name or else by number, has none, and for anything that is not a
    label, such as a list of several.
    """
    values = list(values)
    missing = [row for row, value in enumerate(values) if value is None or str(value).strip() == ""]
    if missing:
        first = names[missing[0]] if names else f"number {missing[0]}"
        raise UserError(f"{where} has no label for {len(missing):,} of {len(values):,} images, e.g. {printable(first)}")
    for value in values:
        if type(value) not in (int, str) or (type(value) is int and value < 0):
            raise UserError(f"{where}: {printable(value)!r} is no label; expected a whole number or a name")
    texts = [str(value).strip() for value in values]
    if all(text.isdecimal() and text.isascii() and len(text) < 10 for text in texts):
        return [int(text) for text in texts]
    return texts
