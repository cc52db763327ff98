"""Labels that stand beside the pictures: `dataset.json`, `metadata.*`, WebDataset's `.cls`."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from posixpath import basename
from typing import Any

from distmatch import parquet
from distmatch.archives import Files
from distmatch.errors import UserError
from distmatch.plain import json_of
from distmatch.screen import printable

COLUMNS = ("label", "labels", "class", "class_name", "category")
"""What the label of a row is called: the first of these that is there."""
IMAGES = ("image", "img", "picture", "png", "jpg")
"""What the column of images in a table is called."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Labels:
    """What is known of the classes of some pictures.

    Args:
        labels: of each picture, or `None`.
        origin: where they come from, in words.
        used: the files that say so.
        final: whether folders say nothing more.
    """

    labels: list[int] | list[str] | None
    origin: str
    used: set[str] = field(default_factory=set)
    final: bool = True


def read_labels(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    """The labels of `pictures` that stand in files among `names`; `None` where there are no such files.

    Raises `UserError` where such a file is damaged, or has no label for one of the pictures.
    """
    for find in (_dataset_json, _metadata, _cls):
        if found := find(files, names, pictures):
            return found
    return None


def _dataset_json(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    known: dict[str, Any] = {}
    used, said = set(), False
    for name, content in files.read([n for n in names if basename(n) == "dataset.json"]):
        where = f"{files.path}: {printable(name)}"
        data: Any = json_of(content, where, object)
        if not isinstance(data, dict) or "labels" not in data:
            continue  # of another tool
        used.add(name)
        if data["labels"] is None:
            continue
        said = True
        try:
            known |= {_beside(name, file): label for file, label in data["labels"]}
        except (TypeError, ValueError) as error:
            raise UserError(f'{where}: labels are not {{"labels": [["name.png", 0], ...]}}') from error
    if not used:
        return None
    if not said:  # its folders are running thousands, never classes
        return Labels(None, "no classes: dataset.json has none", used)
    return Labels(_all_of(known, pictures, f"{files.path}: dataset.json"), "from dataset.json", used)


def _metadata(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    known: dict[str, Any] = {}
    used: set[str] = set()
    columns: set[str] = set()
    column = None
    for name, content in files.read([n for n in names if basename(n) in METADATA]):
        where = f"{files.path}: {printable(name)}"
        rows = list(_rows(name, content, where))
        if not any(isinstance(row, dict) and "file_name" in row for row in rows):
            continue  # of another tool
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise UserError(f"{where}: {printable(row)} has no file_name")
            columns |= row.keys()
            column = column or next((c for c in COLUMNS if c in row), None)
            if column in row:
                known[_beside(name, row["file_name"])] = row[column]
        used.add(name)
    if not used:
        return None
    files_used = " and ".join(sorted({basename(name) for name in used}))
    if column is None:
        seen = printable(", ".join(sorted(map(str, columns))))
        return Labels(None, f"{files_used} has {seen} and no label", used, final=False)
    return Labels(_all_of(known, pictures, f"{files.path}: {files_used}"), f"from {column} in {files_used}", used)


def _cls(files: Files, names: list[str], pictures: list[str]) -> Labels | None:
    cls = {_key(n): n for n in names if n.endswith(".cls")}
    if not cls:
        return None
    keys: dict[str, str] = {}
    for name in pictures:
        if (other := keys.setdefault(_key(name), name)) != name:
            raise UserError(
                f"{files.path}: {printable(other)} and {printable(name)} share one .cls; keep one picture per sample"
            )
    texts = {_key(name): content.decode("utf-8", "replace").strip() for name, content in files.read(cls.values())}
    known = {name: texts[_key(name)] for name in pictures if _key(name) in texts}
    return Labels(_all_of(known, pictures, f"{files.path}: the .cls files"), "from .cls files", set(cls.values()))


def _key(name: str) -> str:
    """What the files of one sample share: the path up to the first dot of its last part."""
    folder, separator, base = name.rpartition("/")
    return folder + separator + base.partition(".")[0]


def _rows(name: str, content: bytes, where: str) -> Iterator[Any]:
    if name.endswith(".jsonl"):
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield json_of(line, f"{where}, line {number}", object)
    elif name.endswith(".csv"):
        try:
            yield from csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{where} is no CSV: {printable(error)}") from error
    else:
        yield from parquet.rows(io.BytesIO(content), where)


def _beside(file: str, name: Any) -> str:
    """The path of what `file` calls `name`."""
    return str(PurePosixPath(file).parent / PurePosixPath(str(name).replace("\\", "/")))


def _all_of(known: dict[str, Any], pictures: list[str], where: str) -> list[int] | list[str]:
    """The label of each picture: whole numbers if all are, else names."""
    missing = [name for name in pictures if known.get(name) is None]
    if missing:
        raise UserError(
            f"{where} has no label for {len(missing):,} of {len(pictures):,} images, e.g. {printable(missing[0])}"
        )
    return labels_of((known[name] for name in pictures), where)


def labels_of(values: Iterable[Any], where: str) -> list[int] | list[str]:
    """Labels as whole numbers if all of them are, written as text or not, else as names.

    Raises `UserError` for anything else, such as a list of several.
    """
    values = list(values)
    for value in values:
        if type(value) not in (int, str) or (type(value) is int and value < 0):
            raise UserError(f"{where}: {printable(value)!r} is no label; expected a whole number or a name")
    texts = [str(value).strip() for value in values]
    if all(text.isdecimal() and text.isascii() and len(text) < 10 for text in texts):
        return [int(text) for text in texts]
    return texts
