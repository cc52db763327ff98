"""Reads lists of prompts from several kinds of file, and draws random captions of MS-COCO."""

import csv
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distmatch.data.decode import SUFFIXES
from distmatch.system import limits, rng
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.paths import shipped
from distmatch.system.plain import check_text, json_of
from distmatch.system.screen import printable
from distmatch.system.terminal import notice

KEYS = ("prompt", "caption", "text")
"""The default key of a record's prompt: the first of these that the first record has."""


def shipped_prompts(name: str | Path) -> Path | None:
    """Return the file of the package's prompts called `name`; `None` if it has none, or if `name` is a path."""
    package = shipped(str(name))
    return package / "prompts.txt" if package and (package / "prompts.txt").is_file() else None


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Return the prompts in `path` in order, stripped of surrounding white space; empty or missing ones are left out.

    Args:
        path: one of
            .txt: one prompt per line, UTF-8;
            .jsonl: one JSON object per line, with a text or a list of texts;
            .parquet: a table with a column of strings;
            .csv, .tsv: a table with a header, separated by commas or tabs;
            .json: captions of MS-COCO, `{"annotations": [{"caption": ...}, ...]}`;
            a folder of a data set: its tables, else the .txt files beside its pictures; see `in_folder`;
            or the name of a text-to-image teacher in the package, for the prompts that ship with it: the captions that
            it was trained on, after others (assets/emoji/README.md); of a folder with the same name, the text ./NAME.
        column: the key of a JSON object or the name of a table's column (default: `prompt`, `caption` or `text`).

    Raises `UserError` that names the file and the line if it is missing, damaged, without prompts, holds something
    other than text, or exceeds `limits.PROMPT` or `limits.PROMPTS`.
    """
    package = shipped_prompts(path)
    if package and Path(path).is_dir():
        notice(f"prompts {path}: those of the package, not of the folder {path} here, which is ./{path}")
    path = package or Path(path)
    if path.is_dir():
        found = in_folder(path)
        whole = sum(file.stat().st_size for file in found if file.suffix != ".parquet")
        limits.check(whole, limits.PROMPTS, str(path))
        return [prompt for file in found for prompt in read_prompts(file, column)]
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a file of prompts ({', '.join(READERS)}), or a folder")
    if path.suffix not in READERS:
        raise UserError(f"{path}: prompts are read from files called {', '.join(READERS)}, and from folders of them")
    if column is not None and path.suffix == ".txt":
        raise UserError(f"{path} is plain text, which has no column {column!r}; leave the column out")
    if path.suffix != ".parquet":  # of which only one column is read
        limits.check(path.stat().st_size, limits.PROMPTS, str(path))
    prompts = []
    for place, value in READERS[path.suffix](path, column):
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | None):
                raise UserError(f"{path}, {place}: expected text, found {text!r:.80}")
            if text and text.strip():
                check_text(text, f"{path}, {place}")
                prompts.append(text.strip())
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def in_folder(folder: Path) -> list[Path]:
    """Return the files with the captions of the data set in `folder`, sorted: its tables, else its pictures' texts.

    If some of the tables are called after the split `train`, only these. Pictures are not opened. Raises `UserError` if
    there are neither.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix in TABLES]
    training = [file for file in tables if "train" in str(file.relative_to(folder)).lower()]
    pictures = {file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES}
    texts = [file for file in files if file.suffix == ".txt" and file.with_suffix("") in pictures]
    found = training or tables or texts
    if not found:
        raise UserError(
            f"{folder} holds no prompts; expected tables ({', '.join(TABLES)}), or a .txt beside each picture"
        )
    return found


def coco_prompts(path: Path, n: int, seed: int) -> list[str]:
    """Return `n` random captions of the MS-COCO captions file `path`, a function of `seed` (DMD, Appendix D).

    Drawn without repetition until all are used, then all over again.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected captions_val2014.json of MS-COCO, which is in "
            "annotations_trainval2014.zip (images.cocodataset.org/annotations, 241 MB)"
        )
    captions = read_prompts(path)
    return [captions[i] for i in rng.shuffled(seed, len(captions), 0, n)]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        most = limits.limit(limits.PROMPT)
        for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
            if len(line) > most:
                limits.check(_rest(file, len(line)), limits.PROMPT, f"{path}, line {number}")
            try:
                yield f"line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number} is not UTF-8 text: {error.reason}") from error


def _rest(file: BinaryIO, length: int) -> int:
    """Return the length of the line whose first `length` bytes were read, without storing the rest."""
    while not (part := file.readline(2**20)).endswith(b"\n") and part:
        length += len(part)
    return length + len(part)


def _plain(path: Path, _: None) -> Iterator[tuple[str, Any]]:
    yield from _lines(path)


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        if not line.strip():
            continue
        record = json_of(line, f"{path}, {place}", dict[str, Any])
        column = column or _key(record, f"{path}, {place}")
        if column not in record:
            raise UserError(f"{path}, {place} has no {column!r}; it has {_names(record)}")
        yield place, record[column]


def _separated(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(limits.limit(limits.PROMPT))
        try:
            table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            names = [name for name in table.fieldnames or () if name]
            column = column or _key(names, str(path))
            if column not in names:
                raise UserError(f"{path} has no column {column!r}; it has {_names(names)}")
            for row in table:
                yield f"line {table.line_num}", row[column]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no table in UTF-8 text: {printable(error)}") from error


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    need("pyarrow", by=str(path))
    from pyarrow import ArrowException, types
    from pyarrow.compute import binary_length as value_lengths  # type: ignore[reportAttributeAccessIssue]
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names, kinds = table.schema_arrow.names, table.schema_arrow.types
        column = column or _key(names, str(path))
        if column not in names:
            raise UserError(f"{path} has no column {column!r}; it has {_names(names)}")
        kind = kinds[names.index(column)]
        if types.is_nested(kind):
            raise UserError(f"{path}, column {column!r}: expected text, found {kind!s:.80}")
        # With `read_dictionary`, a value that a million rows share is unpacked only once.
        with ParquetFile(path, read_dictionary=[column]) as table:
            where, row = f"{path}, column {column!r}", 0
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
            unpacked = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            limits.check(unpacked, limits.PROMPTS, where)
            for part in table.iter_batches(columns=[column]):
                values: Any = part.column(0)
                if types.is_dictionary(values.type):
                    for size in value_lengths(values.dictionary).to_pylist():
                        limits.check(size or 0, limits.PROMPT, f"{where}, rows from {row + 1}")
                    texts = values.dictionary.to_pylist()
                    values = [None if number is None else texts[number] for number in values.indices.to_pylist()]
                else:
                    values = values.to_pylist()
                for value in values:
                    row += 1
                    yield f"row {row}", value
    except ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _coco(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    expected = 'expected captions of MS-COCO, {"annotations": [{"caption": ...}, ...]}; JSON lines are called .jsonl'
    content = json_of(path.read_bytes(), str(path), dict[str, Any], expected[0].upper() + expected[1:])
    if not isinstance(content.get("annotations"), list):
        raise UserError(f"{path} has no list `annotations`; {expected}")
    column = column or "caption"
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, dict) or column not in entry:
            raise UserError(f"{path}, annotation {number} has no {column!r}: {entry!s:.80}; {expected}")
        yield f"annotation {number}", entry[column]


def _key(names: Any, place: str) -> str:
    found = next((key for key in KEYS if key in names), None)
    if found is None:
        raise UserError(f"{place} has none of {', '.join(KEYS)}; it has {_names(names)}: name a column")
    return found


def _names(names: Collection[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in list(names)[:12]) or "nothing"
    return f"{shown}, ..." if len(names) > 12 else shown


READERS: dict[str, Callable[[Path, Any], Iterator[tuple[str, Any]]]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".csv": _separated,
    ".tsv": _separated,
    ".json": _coco,
}
TABLES = (".parquet", ".jsonl", ".csv", ".tsv")
