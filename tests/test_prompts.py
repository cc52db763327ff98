"""Prompt lists: the same prompts from every kind of file, COCO's captions drawn by seed, refusals name the place."""

import csv
import json
import shutil
from collections import Counter

import pyarrow as pa
import pytest
import tiny
from pyarrow import parquet

from distmatch.data.prompts import coco_prompts, read_prompts
from distmatch.recipe import subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError
from distmatch.system.terminal import Notice

PROMPTS = ["a red bus", "Zwölf Boxkämpfer", "“quoted, with a comma”"]
PADDED = ["  a red bus ", "", "Zwölf Boxkämpfer\t", "   ", "“quoted, with a comma”"]


def write_lines(file, lines):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_coco(file, captions):
    entries = [{"image_id": i, "id": i, "caption": caption} for i, caption in enumerate(captions)]
    file.write_text(json.dumps({"info": {}, "annotations": entries}))


def write_table(file, lines, separator):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(
            [["url", "caption"], *([i, line] for i, line in enumerate(lines))]
        )


WRITERS = {
    "p.txt": write_lines,
    "p.jsonl": lambda file, lines: write_lines(file, [json.dumps({"id": 1, "caption": line}) for line in lines]),
    "p.parquet": lambda file, lines: parquet.write_table(pa.table({"url": lines, "text": lines}), file),
    "p.json": write_coco,
    "p.csv": lambda file, lines: write_table(file, lines, ","),
    "p.tsv": lambda file, lines: write_table(file, lines, "\t"),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_every_kind_of_file_gives_the_prompts_stripped_and_without_empty_ones(tmp_path, name):
    WRITERS[name](tmp_path / name, PADDED)
    assert read_prompts(tmp_path / name) == PROMPTS


def test_a_mark_of_byte_order_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


def test_the_key_is_the_first_known_one_or_the_one_that_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    write_lines(
        file, [json.dumps({"text": "t", "prompt": "p", "TEXT": "T"}), "", json.dumps({"prompt": "q", "TEXT": "U"})]
    )
    assert read_prompts(file) == ["p", "q"]
    assert read_prompts(file, "TEXT") == ["T", "U"]
    parquet.write_table(pa.table({"TEXT": ["T"], "caption": ["c"]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["c"]
    assert read_prompts(tmp_path / "p.parquet", "TEXT") == ["T"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.doc",
            b"a",
            r"p.doc: prompts are read from files called .txt, .jsonl, .parquet, .csv, .tsv, .json, and from",
        ),
        ("p.csv", b"a,b\n1,2\n", r"p.csv has none of prompt, caption, text; it has a, b: name a column"),
        ("p.csv", b"caption\n\xff\n", r"p.csv is no table in UTF-8 text"),
        ("p.csv", b'caption\n"' + b"a" * 2_000_000, r"p.csv is no table in UTF-8 text: field larger than field limit"),
        ("p.txt", None, r"p.txt does not exist; expected a file of prompts"),
        ("emojii", None, r"emojii does not exist; expected a file of prompts"),
        ("p.txt", b" \n\n", r"p.txt holds no prompts"),
        ("p.txt", b"fine\n\xff\n", r"p.txt, line 2 is not UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": ', r"p.jsonl, line 3 is not valid JSON"),
        ("p.jsonl", b'["a"]', r"p.jsonl, line 1 has the wrong form: expected `key: value` entries, not \['a'\]"),
        ("p.jsonl", b'{"words": "a"}', r"line 1 has none of prompt, caption, text; it has words"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}', r"line 2 has no 'prompt'; it has text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 7}', r"line 2: expected text, found 7"),
        ("p.jsonl", b'{"prompt": "a \\ud800"}', r"p.jsonl, line 1: character 3, '\\ud800', is not Unicode text"),
        ("p.parquet", b"PAR1 but not really", r"p.parquet cannot be read as Parquet"),
        ("p.json", b"[1", r"p.json is not valid JSON: .* Expected captions of MS-COCO"),
        ("p.json", b'["a"]', r"p.json has the wrong form: .* Expected captions of MS-COCO"),
        ("p.json", b'{"annotations": 1}', r"p.json has no list `annotations`"),
        ("p.json", b'{"annotations": [{"caption": "a"}, {"id": 3}]}', r"annotation 1 has no 'caption': {'id': 3}"),
        ("p.json", b'{"annotations": [{"caption": null}]}', r"p.json holds no prompts"),
    ],
)
def test_refusals_name_the_file_and_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_refusals_of_columns(tmp_path):
    file = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"url": ["a"], "caption": pa.array(["a", None][:1])}), file)
    with pytest.raises(ValueError, match="has no column 'TEXT'; it has url, caption"):
        read_prompts(file, "TEXT")
    parquet.write_table(pa.table({"caption": ["a", None, " ", "b"]}), file)
    assert read_prompts(file) == ["a", "b"]  # rows without a caption are left out, as empty ones are
    parquet.write_table(pa.table({"caption": [1, 2]}), file)
    with pytest.raises(ValueError, match="row 1: expected text, found 1"):
        read_prompts(file)
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(ValueError, match="plain text, which has no column 'TEXT'"):
        read_prompts(tmp_path / "p.txt", "TEXT")


def test_coco_captions_are_drawn_by_seed_without_repetition_until_all_are_used(tmp_path):
    file = tmp_path / "captions_val2014.json"
    captions = [f"caption {i}" for i in range(50)]
    write_coco(file, captions)
    drawn = coco_prompts(file, 120, seed=3)
    assert sorted(drawn[:50]) == sorted(drawn[50:100]) == sorted(captions)
    assert drawn[:50] != captions
    assert drawn[:50] != drawn[50:100]
    assert max(Counter(drawn).values()) == 3
    assert coco_prompts(file, 7, seed=3) == drawn[:7]
    assert coco_prompts(file, 50, seed=4) != drawn[:50]
    with pytest.raises(
        ValueError, match=r"nowhere.json does not exist; expected captions_val2014.json .*annotations_trainval2014.zip"
    ):
        coco_prompts(tmp_path / "nowhere.json", 1, seed=0)


def test_a_list_of_captions_is_as_many_prompts(tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png", "text": ["one", " two "]}\n{"file_name": "b.png", "text": "three"}\n')
    assert read_prompts(file) == ["one", "two", "three"]
    file.write_text('{"text": ["one", 2]}\n')
    with pytest.raises(UserError, match="line 1: expected text, found 2"):
        read_prompts(file)


def test_a_folder_of_a_data_set_gives_its_training_captions(tmp_path):
    """Tables in parts, by the column that is named; without any, the texts beside its pictures."""
    data = tmp_path / "data"
    data.mkdir()
    for name, captions in {"train-00001": ["c"], "train-00000": ["a", "b"], "test-00000": ["x"]}.items():
        table = pa.table(
            {"image": [b"no picture"] * len(captions), "text": captions, "alt": [f"{c}!" for c in captions]}
        )
        parquet.write_table(table, data / f"{name}-of-00002.parquet")
    assert read_prompts(tmp_path) == ["a", "b", "c"]
    assert read_prompts(tmp_path, "alt") == ["a!", "b!", "c!"]
    with pytest.raises(UserError, match=r"train-00000-of-00002.parquet has no column 'nil'; it has image, text, alt"):
        read_prompts(tmp_path, "nil")
    shutil.rmtree(data)
    with pytest.raises(UserError, match=r"holds no prompts; expected tables .*, or a .txt beside each picture"):
        read_prompts(tmp_path)
    for name, text in {"b.txt": "second", "a.txt": "first", "README.txt": "none of them"}.items():
        (tmp_path / name).write_text(text)
    for name in ("a.png", "b.JPG"):
        (tmp_path / name).write_bytes(b"no picture")
    assert read_prompts(tmp_path) == ["first", "second"]


def test_prompts_for_a_teacher_that_takes_none_are_said_to_be_unread(tmp_path):
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)), ["prompts.path=later.txt"])
    with pytest.warns(Notice, match=r"^prompts.path later.txt is not read: the teacher .*teacher takes no prompts$"):
        subjects.subject(recipe)
