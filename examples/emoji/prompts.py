"""Write prompts for distillation: names in styles in which no set draws them, then the captions of training pictures.

    python examples/emoji/prompts.py data/emoji src/distmatch/assets/emoji/prompts.txt
    python examples/emoji/prompts.py data/emoji mixed.txt --captions 1532

Pairs and distribution matching need the teacher and a prompt, but no picture, so a student can learn what the teacher
draws for "video camera, firefox style" though no set has that. What is held out in `test` is left out here, too.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from names import in_style

from distmatch.system.errors import UserError

Records = list[dict[str, Any]]


def unseen(train: Records, test: Records) -> list[str]:
    """Return the prompts of each name of `train` in each style of which neither split has a picture, sorted."""
    drawn = {(record["name"], record["style"]) for record in train + test}
    names, styles = sorted({record["name"] for record in train}), sorted({record["style"] for record in train})
    return [in_style(name, style) for name in names for style in styles if (name, style) not in drawn]


def captions(train: Records) -> list[str]:
    """Return the different captions of `train`, in the order of the pictures' files."""
    in_order = sorted(train, key=lambda record: record["file_name"])
    return list(dict.fromkeys(caption for record in in_order for caption in record["text"]))


def records(split: Path) -> Records:
    file = split / "metadata.jsonl"
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a folder that examples/emoji/fetch.py has made")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that fetch.py has made")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--captions", type=int, help="how many captions to draw at random; default: all, in order")
    given = parser.parse_args()
    try:
        train, test = records(given.data / "train"), records(given.data / "test")
        new, old = unseen(train, test), captions(train)
        if given.captions is not None:
            if not 0 <= given.captions <= len(old):
                raise UserError(f"--captions {given.captions}: expected 0 to {len(old):,}, as many as there are")
            old = random.Random(0).sample(old, given.captions)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    given.out.write_text("".join(f"{prompt}\n" for prompt in new + old), encoding="utf-8")
    print(f"{given.out}: {len(new):,} prompts that no picture has, {len(old):,} captions")


if __name__ == "__main__":
    main()
