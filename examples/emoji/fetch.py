"""Fetch captioned pictures: 7,000 emoji in five drawing styles, from npm.

    uv pip install resvg-py
    python examples/emoji/fetch.py data/emoji

Stop it at any time; the same command goes on.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from names import IconSet, in_style, named, styles
from PIL import Image

from distmatch.system.errors import UserError
from distmatch.system.progress import progress

HERE = Path(__file__).parent
SETS = {
    "fluent-emoji": ("1.2.7", "glossy"),
    "fluent-emoji-flat": ("1.2.6", "flat"),
    "noto": ("1.2.9", "noto"),
    "noto-v1": ("1.2.5", "blob"),
    "fxemoji": ("1.2.2", "firefox"),
}
"""npm's @iconify-json/NAME: version, and the word for its style. Names are spelled as in the first that has them."""
LICENCES = {"Apache-2.0": HERE.parent.parent / "LICENSE", "MIT": HERE / "MIT.txt"}
EVERY = 8
"""Of every eighth name that three styles or more draw, one style is held out."""


@dataclass(frozen=True)
class Picture:
    """One icon of a set, what it shows, and whether it is held out."""

    source: str
    icon: str
    name: str
    style: str
    split: str

    @property
    def file(self) -> str:
        return f"{self.style}/{self.name.replace(' ', '-').replace(chr(39), '')}.png"

    @property
    def captions(self) -> list[str]:
        return [in_style(self.name, self.style), self.name]


def fetch(out: Path, size: int = 64, tones: bool = False, most: int | None = None) -> None:
    """Write the folder `out`: `train` and `test` with `metadata.jsonl`, and licences.

    Args:
        size: pixels on a side.
        tones: whether to keep variants in other skin tones.
        most: how many names to keep, those with the most styles first.

    Raises `UserError` if npm or resvg-py is missing, or `out` holds something else.
    """
    versions = {source: version for source, (version, _) in SETS.items()}
    settings = {"sets": versions, "size": size, "tones": tones, "names": most}
    if out.exists():
        if _settings(out) == settings:
            print(f"{out} is complete")
            return
        raise UserError(f"{out} exists already, with other settings or other content; give another folder")
    work = out.with_name(f"{out.name}.part")
    if _settings(work) not in (None, settings):
        raise UserError(f"{work} is of a call with other settings; remove it, or give another folder")
    work.mkdir(parents=True, exist_ok=True)
    _write(work / "fetch.json", json.dumps(settings, indent=1).encode())
    sets = {source: unpacked(download(source, work / ".packages")) for source in SETS}
    pictures = chosen(sets, tones, most)
    with progress("drawing", len(pictures), unit="picture") as advance:
        for picture in pictures:
            file = work / picture.split / picture.file
            if not file.exists():
                _write(file, png(draw(sets[picture.source], picture.icon, size)))
            advance(1)
    for split in ("train", "test"):
        rows = [picture for picture in pictures if picture.split == split]
        if rows:
            _write(work / split / "metadata.jsonl", "".join(map(row, rows)).encode())
    _write(work / "README.md", readme(sets, pictures).encode())
    for source, data in sets.items():
        _write(work / "licences" / f"{source}.json", json.dumps(data["info"], indent=1).encode())
    for name, text in LICENCES.items():
        _write(work / "licences" / f"{name}.txt", text.read_bytes())
    shutil.rmtree(work / ".packages")
    work.rename(out)
    print(f"{out}: {summary(pictures)}")


def download(source: str, folder: Path) -> Path:
    """Return the package of a set, downloaded by npm, which checks it, unless it is in `folder`."""
    version = SETS[source][0]
    file = folder / f"iconify-json-{source}-{version}.tgz"
    if not file.exists():
        if shutil.which("npm") is None:
            raise UserError("npm is missing, which downloads the emoji; install Node.js")
        folder.mkdir(parents=True, exist_ok=True)
        coming = folder / "coming"
        coming.mkdir(exist_ok=True)
        package = f"@iconify-json/{source}@{version}"
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", coming, package], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"npm pack {package} failed: {done.stderr.strip()[-300:] or 'no reason given'}")
        (coming / file.name).rename(file)
    return file


def unpacked(package: Path) -> IconSet:
    """Return the icons in an npm package of iconify, with code points as `chars` and source and licence as `info`."""
    with tarfile.open(package) as archive:
        parts = {}
        for name in ("icons", "chars", "info"):
            member = archive.extractfile(f"package/{name}.json")
            assert member is not None
            parts[name] = json.load(member)
    return {**parts["icons"], "chars": parts["chars"], "info": parts["info"]}


def chosen(sets: Mapping[str, IconSet], tones: bool = False, most: int | None = None) -> list[Picture]:
    """Return the pictures to draw, and which of them are held out."""
    found = named(sets, tones)
    where = styles(found)
    kept = set(sorted(where, key=lambda name: (-len(where[name]), _digest(name)))[:most])
    out = {name: held for name in where if (held := held_out(name, where[name]))}
    return [
        Picture(source, icon, name, SETS[source][1], "test" if out.get(name) == source else "train")
        for source, names in found.items()
        for name, icon in sorted(names.items())
        if name in kept
    ]


def held_out(name: str, sources: list[str]) -> str | None:
    """Return in which set, if in any, the name is held out. It depends on nothing else, such as how many are kept."""
    digest = _digest(name)
    return sources[digest // EVERY % len(sources)] if len(sources) >= 3 and digest % EVERY == 0 else None


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def svg(data: IconSet, icon: str, size: int) -> str:
    """Return an icon of a set as SVG, centred in a square of `size` pixels."""
    flip = False
    while (said := data["icons"].get(icon)) is None:
        flip ^= data["aliases"][icon].get("hFlip", False)
        icon = data["aliases"][icon]["parent"]
    left, top, width, height = (said.get(key, data.get(key, default)) for key, default in DEFAULTS.items())
    body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{said["body"]}</g>' if flip else said["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


DEFAULTS = {"left": 0, "top": 0, "width": 16, "height": 16}


def draw(data: IconSet, icon: str, size: int) -> Image.Image:
    """Return an icon of a set, drawn on white."""
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("resvg-py is missing, which draws the emoji: uv pip install resvg-py") from error
    drawn = resvg_py.svg_to_bytes(svg_string=svg(data, icon, size), background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGB")


def png(image: Image.Image) -> bytes:
    """Return a picture as PNG, made small."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def row(picture: Picture) -> str:
    """Return a picture's line in `metadata.jsonl`."""
    known: dict[str, Any] = {"file_name": picture.file, "text": picture.captions}
    return json.dumps({**known, "name": picture.name, "style": picture.style}) + "\n"


def summary(pictures: Iterable[Picture]) -> str:
    """Return in one line how many pictures there are, of how many names."""
    pictures = list(pictures)
    names = Counter(picture.name for picture in pictures)
    shared = sum(number >= 3 for number in names.values())
    held = sum(picture.split == "test" for picture in pictures)
    return (
        f"{len(pictures):,} pictures of {len(names):,} names, {shared:,} of them in three styles or more; "
        f"{held} held out in test"
    )


def readme(sets: Mapping[str, IconSet], pictures: list[Picture]) -> str:
    """Return what to keep with the pictures: where they are from, and their licences."""
    lines = [
        f"# Captioned emoji\n\n{summary(pictures)}. Captions are in `metadata.jsonl`.",
        "Drawn from SVG, unchanged but for the size and a white background. The licences are in `licences`.\n",
        "| style | pictures | set | by | licence |\n|---|---|---|---|---|",
    ]
    for source, data in sets.items():
        version, style = SETS[source]
        count = sum(picture.source == source for picture in pictures)
        author, licence = data["info"]["author"], data["info"]["license"]
        lines.append(
            f"| {style} | {count:,} | npm @iconify-json/{source} {version} | [{author['name']}]({author['url']}) "
            f"| [{licence['spdx']}]({licence['url']}) |"
        )
    return "\n".join(lines) + "\n"


def _settings(folder: Path) -> Any:
    file = folder / "fetch.json"
    return json.loads(file.read_bytes()) if file.exists() else None


def _write(file: Path, content: bytes) -> None:
    """Write a file so that it is there in full or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default: 64)")
    parser.add_argument("--all", action="store_true", help="keep other skin tones as well")
    parser.add_argument("--names", type=int, help="keep this many names, those with the most styles first")
    given = parser.parse_args()
    if given.size < 8 or (given.names is not None and given.names < 1):
        parser.error("expected a --size of 8 or more, and 1 or more --names")
    try:
        fetch(given.out, given.size, given.all, given.names)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
