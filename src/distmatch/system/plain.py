"""Reads untrusted JSON and YAML: bounded in size and validated, or refused with a message that names the file.

JSON files written by `files.write_json` carry a digest of their content, which is verified.
"""

import json
import re
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from distmatch.system import limits
from distmatch.system.errors import UserError

T = TypeVar("T")
SEAL = "sha256"
"""The entry with the digest of all other entries."""

EXPECTED = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected a text",
    "string_too_short": "expected a text that is not empty",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected {ge:g} or more",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected {le:g} or less",
    "too_short": "expected {min_length} or more values",
    "too_long": "expected at most {max_length} values",
    "literal_error": "expected {expected}",
    "dict_type": "expected `key: value` entries",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
}
"""Plain words for pydantic's errors about a value, by the type of error; `{...}` is what its context says."""


def read_json(file: Path, kind: type[T], remedy: str = "") -> T:
    """Read a JSON file as `kind`: `dict[str, Any]`, or any other type that pydantic can validate.

    Raises `FileNotFoundError`, and `UserError` that names the file and what is wrong with it, and ends with `remedy`.
    """
    found = _parsed(_content(file, limits.SETTINGS), str(file), remedy)
    if isinstance(found, dict) and SEAL in found:
        known = found.pop(SEAL)
        if known != json_digest(found):
            problem = f"{file} is damaged: its digest is not that of its content. If you edited it, delete its {SEAL!r}"
            raise UserError(_joined(problem, remedy))
    return fitting(found, str(file), kind, remedy)


def json_of(content: bytes | str, where: str, kind: type[T], remedy: str = "") -> T:
    """Parse the JSON text `content` as `kind`. Raises `UserError` that begins with `where` and ends with `remedy`."""
    return fitting(_parsed(content, where, remedy), where, kind, remedy)


def json_digest(data: Any) -> str:
    """Return the SHA-256 of plain data, independent of the order of its keys."""
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def fitting(found: Any, where: str, kind: type[T], remedy: str = "") -> T:
    """Validate `found` as `kind`. Raises `UserError` that begins with `where` and ends with `remedy`."""
    try:
        return _adapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        reason = f"{place}{expected_by(first)}, not {first['input']!r:.80}"
        raise UserError(_joined(f"{where} has the wrong form: {reason}", remedy)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the `key: value` lines of a YAML file.

    Raises `FileNotFoundError`, and `UserError` that names the file and what is wrong with it.
    """
    found = yaml_of(_content(file, limits.RECIPE), str(file))
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no recipe: expected `key: value` lines, not {found!r:.80}")
    return found


def yaml_of(text: bytes | str, where: str) -> Any:
    """Parse the YAML `text` into plain data. Raises `UserError` that begins with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (RecursionError, yaml.YAMLError, ValueError) as error:
        said = re.sub('"<(byte|unicode) string>", ', "", str(error))  # PyYAML's name of what has none
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else said
        raise UserError(f"{where} is not valid YAML: {reason}") from error


def expected_by(error: Any) -> str:
    """Return what one of pydantic's errors says was expected."""
    words = EXPECTED.get(error["type"])
    return words.format(**error.get("ctx", {})) if words else f"{error['msg'][0].lower()}{error['msg'][1:]}"


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _parsed(content: bytes | str, where: str, remedy: str) -> Any:
    try:
        return json.loads(content)
    except (RecursionError, ValueError) as error:  # also text that is not UTF-8, numbers of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(_joined(f"{where} is not valid JSON: {reason}", remedy)) from error


def _joined(problem: str, remedy: str) -> str:
    return f"{problem}. {remedy}" if remedy else problem


def _content(file: Path, most: int) -> bytes:
    limits.check(file.stat().st_size, most, str(file))
    return file.read_bytes()


class _Loader(yaml.SafeLoader):
    """YAML without aliases, with which a few hundred bytes expand to gigabytes, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"aliases (*{event.anchor:.80}) are not read; write out what it stands for"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if keys and keys.most_common(1)[0][1] > 1:
                problem = f"the key {keys.most_common(1)[0][0]!r:.80} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def check_text(text: str, where: str) -> None:
    """Raise `UserError` that names `where` if `text` is no Unicode: of bytes, or a JSON file, that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start + 1}, {text[error.start]!r}, is not Unicode text") from None
