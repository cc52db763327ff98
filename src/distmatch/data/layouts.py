"""Finds the pictures of a data set, which of them belong to a split, and what their classes are.

**Left out**, and counted: hidden files and folders (`.thumbnails`, `.ipynb_checkpoints`), those left by tools
(`@eaDir`, `__MACOSX`), output of distmatch runs, and files that are not pictures.

**Splits** are folders called `train`, `training`, `trn`, `train2017`, `train_images` and the like; `test`, `testing`,
`tst`; `val`, `valid`, `validation`, `dev`. If there are any, only the one asked for is read. If there is no `test`,
`val` is used for it. If there are no splits, everything is `train`.

**Classes** come from the first of these that exists:

1. `dataset.json` of NVlabs' `dataset_tool.py`: `{"labels": [["00000/img00000000.png", 6], ...]}`,
2. `metadata.jsonl`, `metadata.csv` or `metadata.parquet` of Hugging Face's imagefolder: `file_name` and `label`,
3. WebDataset's `.cls` beside each picture: `000000.png`, `000000.cls`,
4. the first folder below the split in which the paths differ; deeper folders are ignored.

**Captions** come from `metadata.*` or `.txt` files (`data.captions`). Folders of a captioned set are not classes.

Whole-number classes are ordered by value, names alphabetically. Ambiguous layouts are refused.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from posixpath import basename, splitext

from distmatch.data.archives import Files
from distmatch.data.captions import Captions, read_captions
from distmatch.data.decode import SUFFIXES
from distmatch.data.sidecars import Labels, read_labels
from distmatch.system.errors import UserError
from distmatch.system.screen import counted, printable

KINDS = {
    "train": ("train", "training", "trainset", "trn"),
    "test": ("test", "testing", "testset", "tst"),
    "val": ("val", "valid", "validation", "valset", "dev"),
}
FILLERS = {"set", "data", "dataset", "images", "image", "imgs", "img", "seg", "split", "dir", "folder"}
"""Words that appear beside the split's name, as in `train_images` or `seg_test`."""
LISTS = {".txt", ".lst", ".list"}
TOOLS = {"__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "lost+found", "$RECYCLE.BIN"}
RUN = {"log.jsonl", "settings.json", "recipe.yaml"}
"""Files of a run; two of them, or one beside a folder of `RESULTS`, identify one."""
RESULTS = {"previews", "checkpoints"}


@dataclass(frozen=True)
class Layout:
    """The pictures of one split.

    Args:
        names: sorted.
        labels: a number or a name for each; `None` if there are none.
        origin: in words, where classes and split come from.
        left_out: files that do not belong to it, by reason.
        notes: what else there is to say about the labels and captions.
        captions: those of the pictures, if there are files of captions.
    """

    names: list[str]
    labels: list[int] | list[str] | None
    origin: str
    left_out: Counter[str]
    notes: tuple[str, ...] = ()
    captions: Captions | None = None


def kind(folder: str) -> str | None:
    """Return which split a folder's name stands for, if any."""
    words = [word for word in re.findall("[a-z]+", folder.lower()) if word not in FILLERS]
    return next((name for name, known in KINDS.items() if len(words) == 1 and words[0] in known), None)


def visible(names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the files that belong to a data set, and how many others there are."""
    names, left_out = list(names), Counter[str]()
    hidden = {n for n in names if any(part.startswith(".") or part in TOOLS for part in n.split("/"))}
    own = tuple(f"{folder}/" if folder else "" for folder in _own_folders(n for n in names if n not in hidden))
    kept = []
    for name in names:
        if name in hidden:
            left_out["hidden"] += 1
        elif name.startswith(own):
            left_out["of runs of distmatch"] += 1
        else:
            kept.append(name)
    return kept, left_out


def arrange(files: Files, names: list[str], split: str, left_out: Counter[str]) -> Layout:
    """Return the pictures among the visible `names` that belong to `split`, and their labels and captions.

    Args:
        split: `train`, `test`, `val`, the name of a folder, or `all`, which treats no folder as a split.

    Raises `UserError` if there are no pictures or no such split, or if the layout is ambiguous.
    """
    pictures = [n for n in names if splitext(n)[1].lower() in SUFFIXES]
    place = str(files.path)
    part = choose(place, pictures, split)
    if not part.settled:
        _check_deeper(place, part.names)
        _check_lists(place, names, {splitext(picture)[0] for picture in pictures})
    left_out = left_out + part.left_out
    found = read_labels(files, names, part.names)
    captions = read_captions(files, names, part.names)
    used = (found.used if found else set()) | (captions.used if captions else set())
    notes = (*(found.notes if found else ()), *(captions.notes if captions else ()))
    for name in set(names) - set(pictures) - used:
        left_out[splitext(name)[1].lower() or "without suffix"] += 1
    if found is not None and found.final:
        return Layout(part.names, found.labels, f"{found.origin}{part.where}", left_out, notes, captions)
    if captions is not None and captions.captions is not None:
        return Layout(part.names, None, f"no classes: captions, but no labels{part.where}", left_out, notes, captions)
    folders = _folders(place, part)
    seen = "" if found is None else f" ({found.origin})"
    return Layout(part.names, folders.labels, f"{folders.origin}{part.where}{seen}", left_out, notes, captions)


@dataclass(frozen=True)
class Part:
    """The pictures of one split, and how many leading folders their paths share."""

    names: list[str]
    depth: int
    where: str
    left_out: Counter[str]
    settled: bool
    """Whether splits were found, or `all` was asked for: a folder called `train` further down is then a class."""


def choose(place: str, pictures: list[str], split: str) -> Part:
    """Follow the folders that all pictures share down to the splits, and enter the one asked for."""
    parts = {name: name.split("/") for name in pictures}
    for depth in range(max(map(len, parts.values()), default=0)):
        folders = Counter(p[depth] for p in parts.values() if len(p) > depth + 1)
        chosen = None if split == "all" else _chosen(place, folders, split)
        if chosen is not None:
            names = [n for n, p in parts.items() if len(p) > depth + 1 and p[depth] in chosen]
            left_out = Counter({f"in {printable(f)}": n for f, n in folders.items() if f not in chosen})
            if loose := len(pictures) - folders.total():
                left_out["beside the splits"] = loose
            names, depth = _shared(names, depth + 1)
            return Part(names, depth, f" below {', '.join(map(printable, chosen))}", left_out, settled=True)
        if len(folders) != 1 or folders.total() < len(pictures):
            break
    if kind(split) != "train" and split != "all":
        first = Counter(p[0] for p in parts.values() if len(p) > 1)
        seen = ", ".join(map(printable, sorted(first)[:12])) or "none"
        raise UserError(f"{place} has no split {split!r}; its folders are: {seen}")
    names, depth = _shared(pictures, 0)
    return Part(names, depth, "", Counter(), settled=split == "all")


def _chosen(place: str, folders: Mapping[str, int], split: str) -> list[str] | None:
    """Return those of the sibling `folders` that make up `split`; `None` if they are not splits."""
    wanted = kind(split)
    if wanted is None:
        return [split] if split in folders else None
    kinds = {folder: kind(folder) for folder in sorted(folders)}
    found = {k for k in kinds.values() if k}
    every = ", ".join(map(printable, list(kinds)[:12]))
    if not found:
        low = [folder.lower() for folder in folders]
        if any("train" in f for f in low) and any("test" in f or "val" in f for f in low):
            raise UserError(
                f"{place}: {every} may be splits or classes. Give one of them by its path, or --split all, which takes "
                "them all as classes"
            )
        return None
    if None in kinds.values() and len(found) == 1:
        name = next(folder for folder, k in kinds.items() if k)
        raise UserError(
            f"{place}: {printable(name)} may be a split or a class, beside {every}. Give {place}/{printable(name)} to "
            "read it alone, or --split all, which takes them all as classes"
        )
    if wanted == "test" and "test" not in found:
        wanted = "val"
    chosen = [folder for folder, k in kinds.items() if k == wanted]
    if not chosen:
        raise UserError(f"{place} has no split {split!r}; it has {every}. Give one of them by its path or --split")
    return chosen


def _shared(names: list[str], depth: int) -> tuple[list[str], int]:
    """Descend while all pictures are in one folder."""
    parts = [name.split("/") for name in names]
    while parts and all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return sorted(names), depth


def _folders(place: str, part: Part) -> Labels:
    """Return classes by folder."""
    parts = {name: name.split("/")[part.depth :] for name in part.names}
    heads = Counter(p[0] for p in parts.values() if len(p) > 1)
    loose = [name for name, p in parts.items() if len(p) == 1]
    if len(heads) > 1 and loose:
        raise UserError(
            f"{place} holds {counted(len(loose), 'image')} beside the folders "
            f"{', '.join(map(printable, sorted(heads)[:6]))}, e.g. {printable(loose[0])}. Are the folders classes? "
            "Then move these away or into one; else put all images into one folder"
        )
    if len(heads) < 2:
        return Labels(None, "no classes: all in one folder")
    if _running(parts.values()):
        return Labels(None, "no classes: the folders count the images")
    return Labels([p[0] for p in parts.values()], "from the first folder")


def _running(parts: Iterable[list[str]]) -> bool:
    """Return whether folders just number the images by thousands: `01000/01234.png`, `00001/img00001234.png`."""
    for folder, *_, name in parts:
        number = re.search(r"(\d{5,})\D*$", name)
        if not (re.fullmatch(r"\d{5,}", folder) and number):
            return False
        if int(number[1]) // 1000 not in (int(folder), int(folder) / 1000):
            return False
    return True


def _check_deeper(place: str, names: Iterable[str]) -> None:
    """Refuse splits inside other folders, so that no test image is ever trained on."""
    for name in names:
        if inner := next((folder for folder in name.split("/")[:-1] if kind(folder)), None):
            raise UserError(
                f"{place}: {printable(name)} stands in {printable(inner)} inside of other folders; splits are read "
                "above the classes. Move them there (train/CLASS/...), or give --split all, which reads them all"
            )


def _check_lists(place: str, names: Iterable[str], stems: Set[str]) -> None:
    """Refuse files such as `meta/test.txt` or `train_test_split.txt`, which assign pictures of one folder to splits.

    `train.txt` beside `train.png` is its caption: `stems` are the names of pictures without their suffix.
    """
    for name in names:
        stem, suffix = splitext(basename(name))
        if splitext(name)[0] in stems:
            continue
        if suffix.lower() in LISTS and (kind(stem) or {"train", "test"} <= set(re.findall("[a-z]+", stem.lower()))):
            raise UserError(
                f"{place}: {printable(name)} says which pictures are of a split, and such lists are not read. Put the "
                "pictures into folders called train and test, or give --split all, which reads them all"
            )


def _own_folders(names: Iterable[str]) -> set[str]:
    """Return folders that distmatch wrote: runs, comparisons, samples."""
    inside: dict[str, set[str]] = {}
    for name in names:
        while name:
            folder, _, base = name.rpartition("/")
            known = folder in inside
            inside.setdefault(folder, set()).add(base)
            name = "" if known else folder  # if a folder is known, its parents are too
    return {folder for folder, content in inside.items() if _is_own(content)}


def _is_own(content: set[str]) -> bool:
    run = bool(content & RUN) and len(content & (RUN | RESULTS)) > 1
    comparison = {"settings.json", "compare.json"} <= content
    sample = "000000.png" in content and bool(content & {"grid.png", "sample.json"})
    return run or comparison or sample
