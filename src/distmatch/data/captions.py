"""Reads captions from files beside the pictures: a column of `metadata.*`, else `NAME.txt` beside `NAME.png`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from posixpath import basename, splitext
from typing import Any

from distmatch.data.archives import Files
from distmatch.data.prompts import KEYS
from distmatch.data.sidecars import beside, metadata
from distmatch.system.errors import UserError
from distmatch.system.limits import PROMPT, check
from distmatch.system.screen import counted, printable


@dataclass(frozen=True)
class Captions:
    """The captions of some pictures.

    Args:
        captions: for each picture, one or more; `None` if none of the pictures has any.
        origin: where they come from, in words.
        used: the files they were read from.
        notes: what else there is to say about them.
    """

    captions: tuple[tuple[str, ...], ...] | None
    origin: str
    used: set[str] = field(default_factory=set)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.captions:
            return ""
        first = printable(self.captions[0][0], 60)
        count = sum(map(len, self.captions))
        return f"{counted(count, 'caption')} {self.origin}, e.g. {first!r}"


def read_captions(files: Files, names: list[str], pictures: list[str]) -> Captions | None:
    """Return the captions of `pictures` from files among `names`; `None` if there are no such files.

    Raises `UserError` if such a file is damaged, or some of the pictures have a caption in it and others have none.
    """
    return _metadata(files, names, pictures) or _texts(files, names, pictures)


def _metadata(files: Files, names: list[str], pictures: list[str]) -> Captions | None:
    """Read the first column of `KEYS` that is there. Several rows of one picture are several captions."""
    known: dict[str, list[Any]] = {}
    used, column = set[str](), None
    for name, _, rows in metadata(files, names):
        used.add(name)
        for row in rows:
            column = column or next((key for key in KEYS if key in row), None)
            if column in row:
                known.setdefault(beside(name, row["file_name"]), []).extend(several(row[column]))
    if column is None:
        return None
    origin = f"{column} in {' and '.join(sorted({basename(name) for name in used}))}"
    captions = captions_of((known.get(picture, ()) for picture in pictures), f"{files.path}: {origin}", pictures)
    lost = sorted(known.keys() - set(names))
    note = (f"captions of pictures that are not there: {len(lost):,}, e.g. {printable(lost[0])}",) if lost else ()
    return Captions(captions, f"from {origin}", used, note)


def _texts(files: Files, names: list[str], pictures: list[str]) -> Captions | None:
    """Read `NAME.txt`. Files without a single letter are no captions, but for example boxes of objects."""
    stems: dict[str, str] = {}
    twins = {splitext(n)[0]: (stems[splitext(n)[0]], n) for n in pictures if stems.setdefault(splitext(n)[0], n) != n}
    known: dict[str, str] = {}
    for name, content in files.read([n for n in names if n.endswith(".txt") and splitext(n)[0] in stems]):
        try:
            known[name] = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{files.path}: {printable(name)} is no caption: it is not UTF-8 text") from error
    if not any(character.isalpha() for text in known.values() for character in text):
        return None
    if shared := next((twins[splitext(n)[0]] for n in known if splitext(n)[0] in twins), None):
        first, second = map(printable, shared)
        raise UserError(f"{files.path}: {first} and {second} share one .txt; keep one picture per caption")
    captions = captions_of(
        ([known.get(f"{splitext(n)[0]}.txt", "")] for n in pictures), f"{files.path}: the .txt files", pictures
    )
    return Captions(captions, "from .txt files", set(known))


def several(value: Any) -> Sequence[Any]:
    """Return the captions in one value: a text, or a list of texts."""
    return value if isinstance(value, list | tuple) else [value]


def captions_of(
    values: Iterable[Sequence[Any]], where: str, names: Sequence[str] = ()
) -> tuple[tuple[str, ...], ...] | None:
    """Return each image's captions, stripped and each once; `None` if no image has any.

    Raises `UserError` if an image, referred to by name or else by number, has none while others have, or an empty one
    beside others, and for anything that is not text, or longer than `limits.PROMPT`.
    """
    found, missing = [], []
    for row, value in enumerate(values):
        for text in value:
            if not isinstance(text, str | None):
                raise UserError(f"{where}: {printable(text)!r} is no caption; expected text, or a list of texts")
            check(
                len(text or ""), PROMPT, f"{where}: caption of {printable(names[row]) if names else row}", "characters"
            )
        texts = tuple(dict.fromkeys((text or "").strip() for text in value))
        found.append(texts)
        if not texts or "" in texts:
            missing.append(names[row] if names else f"number {row}")
    if not any(text for texts in found for text in texts):
        return None
    if missing:
        raise UserError(
            f"{where} has no caption, or an empty one, for {len(missing):,} of {len(found):,} images, e.g. "
            f"{printable(missing[0])}; give every image one, or none"
        )
    return tuple(found)
