"""Prompts of text-to-image models: lists of them in files of several kinds, and random captions of MS-COCO."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distmatch import rng
from distmatch.extras import need

KEYS = ("prompt", "caption", "text")
"""What the prompt of a record is called unless told: the first of these that the first record has."""


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts in `path` in their order, without white space around them; empty and missing ones are left out.

    Args:
        path: one of
            .txt: one prompt per line, UTF-8;
            .jsonl: one JSON object per line;
            .parquet: a table with a column of strings;
            .json: captions of MS-COCO, `{"annotations": [{"caption": ...}, ...]}`.
        column: the key of a JSON object or the name of a table's column; `prompt`, `caption` or `text` unless told.

    Raises `ValueError` that names the file and the line where it is missing, damaged, without prompts, or holds
    something other than text.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path}: prompts are read from files called {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file of prompts ({', '.join(READERS)})")
    if column is not None and path.suffix == ".txt":
        raise ValueError(f"{path} is plain text, which has no column {column!r}; leave the column out")
    prompts = []
    for place, value in READERS[path.suffix](path, column):
        if not isinstance(value, str | None):
            raise ValueError(f"{path}, {place}: expected text, found {value!r:.80}")
        if value and value.strip():
            prompts.append(value.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def coco_prompts(path: Path, n: int, seed: int) -> list[str]:
    """`n` random captions of the MS-COCO captions file `path`, a function of `seed` (DMD, Appendix D).

    Drawn one by one without repetition until all are used, then all over again.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected captions_val2014.json of MS-COCO, which is in "
            "annotations_trainval2014.zip (images.cocodataset.org/annotations, 241 MB)"
        )
    captions = read_prompts(path)
    return [captions[i] for i in rng.shuffled(seed, len(captions), 0, n)]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 text: {error.reason}") from error


def _plain(path: Path, _: None) -> Iterator[tuple[str, Any]]:
    yield from _lines(path)


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, {place} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {place}: expected a JSON object, found {line.strip():.80}")
        column = column or _key(record, f"{path}, {place}")
        if column not in record:
            raise ValueError(f"{path}, {place} has no {column!r}; it has {', '.join(record) or 'nothing'}")
        yield place, record[column]


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    need("pyarrow", by=str(path))
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            column = column or _key(names, str(path))
            if column not in names:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(names)}")
            row = 0
            for part in table.iter_batches(columns=[column]):
                for value in part.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _coco(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    expected = 'expected captions of MS-COCO, {"annotations": [{"caption": ...}, ...]}; JSON lines are called .jsonl'
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {expected}") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f"{path} has no list `annotations`; {expected}")
    column = column or "caption"
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict) or column not in entry:
            raise ValueError(f"{path}, annotation {number} has no {column!r}: {entry!s:.80}; {expected}")
        yield f"annotation {number}", entry[column]


def _key(names: Any, place: str) -> str:
    found = next((key for key in KEYS if key in names), None)
    if found is None:
        raise ValueError(
            f"{place} has none of {', '.join(KEYS)}; it has {', '.join(names) or 'nothing'}: name a column"
        )
    return found


READERS: dict[str, Callable[[Path, Any], Iterator[tuple[str, Any]]]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".json": _coco,
}
