"""Data sets of images, from folders, archives, tables or Python, as one uint8 tensor with labels and captions."""

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distmatch.data.archives import Files, OneFile, open_files
from distmatch.data.captions import Captions, captions_of, several
from distmatch.data.collect import as_pixels, collected, plain
from distmatch.data.decode import SUFFIXES, Decoder, dark
from distmatch.data.layouts import arrange, choose, visible
from distmatch.data.sidecars import labels_of
from distmatch.data.tables import parquet_rows, read_table
from distmatch.system.errors import UserError
from distmatch.system.screen import counted, printable
from distmatch.system.storage import is_url, local


@dataclass(frozen=True)
class Account:
    """How a data set was interpreted.

    Args:
        labels: where classes and split come from, in words.
        left_out: files that do not belong to it, by reason.
        notes: what was done to the pixels.
        bits: how many bits of each pixel are used, of which the upper 8 were kept.
        captions: how many there are, and where they come from, in words.
    """

    labels: str = ""
    left_out: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    bits: int = 8
    captions: str = ""

    def __str__(self) -> str:
        total = sum(number for _, number in self.left_out)
        left_out = ", ".join(f"{number:,} {printable(what, 40)}" for what, number in self.left_out[:8])
        parts = [
            self.labels,
            self.captions,
            f"{counted(total, 'file')} left out: {left_out}" if total else "",
            *self.notes,
        ]
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Images:
    """Pictures, and what is known about them.

    Args:
        pixels: u8[N,C,H,W].
        labels: i64[N], numbers of `classes`, or `None`.
        classes: their names, or `()`.
        account: how they were read.
        captions: for each image, one or more, of which one is drawn each time that it is shown; or `None`.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    account: Account = Account()
    captions: tuple[tuple[str, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __str__(self) -> str:
        """Return one line: how many, of what size, of which classes, what was left out."""
        _, channels, height, width = self.pixels.shape
        account = f": {self.account}" if str(self.account) else ""
        return f"{counted(len(self), 'image')} {height}x{width}, {'grey' if channels == 1 else 'RGB'}{account}"

    @classmethod
    def of(
        cls,
        data: Any,
        labels: Any = None,
        *,
        classes: Sequence[str] = (),
        captions: Sequence[str | Sequence[str]] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> "Images":
        """Return your own data as images.

        Args:
            data: one of
                a tensor or array [N,C,H,W] or [N,H,W], C of 1 or 3: uint8 in 0..255, or floats in `value_range`;
                a `torch.utils.data.Dataset` or list of images, or of `(image, label)`;
                one split of a Hugging Face data set with a column `image` and perhaps `label` and `text`.
                An image is a Pillow image, or a tensor or array [C,H,W] or [H,W].
            labels: for a tensor's images, numbers or names.
            classes: names of the classes by number (default: those of the data set, else the numbers).
            captions: for each image a caption, or a list of several.
            value_range: black and white for floats, e.g. `(-1, 1)` or `(0, 1)`.

        Raises `UserError` for anything else, for values outside the range, and if the numbers of images and of
        labels or captions differ.
        """
        if isinstance(data, Images):
            return data
        notes: list[str] = []
        own = None
        if not isinstance(data, Tensor | np.ndarray):
            if labels is not None:
                raise UserError("labels are given beside a data set; give them in it, as (image, label)")
            data, labels, classes, own, notes = collected(data, tuple(classes), value_range)
        pixels = as_pixels(torch.as_tensor(data), value_range)
        notes = list(dict.fromkeys([*notes, *dark(pixels.numpy())]))
        if captions is not None:
            own = _given(captions, len(pixels), own)
        said = Captions(own, "given in Python")
        if labels is None:
            account = Account("no classes: no labels were given", (), tuple(notes), captions=str(said))
            return cls(pixels, None, (), account, own)
        given = list(map(plain, plain(labels)))
        if len(given) != len(pixels):
            raise UserError(
                f"{counted(len(pixels), 'image')} and {counted(len(given), 'label')}; expected as many of both"
            )
        numbers, names = _numbered(labels_of(given, "labels"), tuple(map(str, classes)))
        return cls(pixels, numbers, names, _account(names, "given in Python", Counter(), notes, said), own)


def load_images(
    place: str | Path,
    split: str = "train",
    *,
    without: Path | None = None,
    fit: Callable[[Image.Image], Image.Image] | None = None,
) -> Images:
    """Read the images of one split in `place`, with their labels and captions.

    Args:
        place: a folder or an archive (.tar, .tar.gz, .tar.xz, .zip) of pictures, of CIFAR's batches, of MNIST's files
            or of Parquet tables, or one such table; an archive or table may be at a URL. For which files count, what a
            split is and where classes come from, see `data.layouts`; for what is done to pixels, `data.decode`.
        split: `train`, `test`, `val`, the name of a folder, or `all`, which treats no folder as a split.
        without: a folder to skip, such as the one for results.
        fit: brings a picture to its size; without it, all pictures must have one size.

    Raises `UserError` for data that is missing, damaged, too large (`system.limits`) or ambiguous.
    """
    path = local(place)
    files, names, left_out = _listed(path, without)
    if (table := read_table(files, names, split)) is not None:
        left_out += table.left_out + _suffixes(set(names) - table.used)
        numbers, classes = (None, ()) if table.labels is None else _numbered(table.labels, table.names)
        return Images(
            torch.from_numpy(np.ascontiguousarray(table.pixels)), numbers, classes,
            _account(classes, table.origin, left_out, table.notes, table.captions),
            table.captions and table.captions.captions,
        )  # fmt: skip
    if not any(name.lower().endswith(tuple(SUFFIXES)) for name in names):
        raise UserError(_nothing(files, names, left_out))
    layout = arrange(files, names, split, left_out)
    rows = {name: row for row, name in enumerate(layout.names)}
    decoder = Decoder(path, len(rows), fit)
    for name, content in files.read(layout.names):
        decoder.add(rows[name], name, content)
    pixels, notes = decoder.finish()
    numbers, classes = (None, ()) if layout.labels is None else _numbered(layout.labels, ())
    account = _account(classes, layout.origin, layout.left_out, [*layout.notes, *notes], layout.captions)
    captions = layout.captions and layout.captions.captions
    return Images(torch.from_numpy(pixels), numbers, classes, replace(account, bits=decoder.bits), captions)


def count_images(place: str | Path, split: str = "train") -> int | None:
    """Return how many images `load_images(place, split)` reads, without decoding them.

    `None` if that takes reading them all: of arrays, and of files at a URL.

    Raises `UserError` as `load_images` does for what is missing or ambiguous.
    """
    if is_url(place):
        return None
    files, names, _ = _listed(local(place))
    pictures = [name for name in names if name.lower().endswith(tuple(SUFFIXES))]
    if pictures:
        return len(choose(str(files.path), pictures, split).names)
    tables = any(name.endswith(".parquet") for name in names)
    return parquet_rows(files, names, split) if tables else None


def _listed(path: Path, without: Path | None = None) -> tuple[Files, list[str], Counter[str]]:
    """Return the files in `path`, the names of those that belong to a data set, and how many are left out."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder or an archive of images")
    files = OneFile(path) if path.suffix == ".parquet" else open_files(path, without)
    names, left_out = visible(files.sizes)
    return files, names, left_out + files.left_out


def _given(captions: Sequence[Any], count: int, own: object) -> tuple[tuple[str, ...], ...] | None:
    """Return the captions that are given for `count` images in Python, which may not have their `own`."""
    if own is not None:
        raise UserError("captions are given beside a data set that has captions; give them in one place")
    if isinstance(captions, str) or len(captions) != count:
        found = "one text" if isinstance(captions, str) else counted(len(captions), "caption")
        raise UserError(f"{counted(count, 'image')} and {found}; expected as many of both")
    return captions_of(map(several, captions), "captions")


def _account(
    classes: Sequence[str], origin: str, left_out: Counter[str], notes: Sequence[str], captions: Captions | None
) -> Account:
    if classes:
        names = ", ".join(printable(name, 30) for name in classes[:6]) + (", ..." if len(classes) > 6 else "")
        origin = f"{len(classes):,} {'classes' if len(classes) > 1 else 'class'} {origin}: {names}"
    return Account(origin, tuple(left_out.most_common()), tuple(notes), captions=str(captions or ""))


def _numbered(labels: list[int] | list[str], names: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
    """Return `i64[N]` into the classes: `names` by number if known, else the labels that occur, in order."""
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{printable(twice[0])!r} is the name of two classes; give classes=[...] of names that differ")
    if names and all(type(label) is int for label in labels):
        numbers = torch.tensor(labels)
        if numbers.max() >= len(names):
            raise UserError(f"label {numbers.max()} of {len(names)} classes, which have the numbers from 0 on")
        return numbers, names
    order: tuple[Any, ...] = names or _ordered(set(labels))
    number = {label: i for i, label in enumerate(order)}
    if strange := [label for label in labels if label not in number]:
        raise UserError(f"label {printable(strange[0])!r} is none of the classes {', '.join(map(str, order[:6]))}")
    return torch.tensor([number[label] for label in labels]), tuple(map(str, order))


def _ordered(labels: Set[Any]) -> tuple[Any, ...]:
    """Sort labels: numbers, written as text or not, by value; names alphabetically."""
    if all(type(label) is int or label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), str(label))))
    return tuple(sorted(labels))


def _nothing(files: Files, names: list[str], left_out: Counter[str]) -> str:
    seen = {**_suffixes(names), **left_out}
    found = ", ".join(f"{number:,} {printable(what, 40)}" for what, number in list(seen.items())[:8]) or "no files"
    hint = ""
    if "dataset_info.json" in names or any(name.endswith(".arrow") for name in names):
        hint = ". A data set saved by Hugging Face's `datasets`: load it there and give it to Images.of (docs/data.md)"
    elif any(name.endswith(".npy") for name in names):
        hint = ". Arrays are taken in Python: Images.of(numpy.load(FILE)[NAME], labels) (docs/data.md)"
    elif any(name.endswith((".tar", ".zip", ".tar.gz", ".tgz")) for name in names):
        hint = ". Give one of the archives, or unpack them into one folder"
    expected = f"{', '.join(sorted(SUFFIXES))}, CIFAR's python batches, MNIST's idx files or Parquet tables"
    return f"{files.path} holds no images; it has {found}, expected {expected}{hint}"


def _suffixes(names: Any) -> Counter[str]:
    return Counter(Path(name).suffix.lower() or "without suffix" for name in names)
