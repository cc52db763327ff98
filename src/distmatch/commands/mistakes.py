"""Explains a command line that cannot be parsed: what is wrong, and how to write it."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from cyclopts import CycloptsError
from cyclopts.exceptions import UnknownOptionError, UnusedCliTokensError

from distmatch.system.errors import advised


def explain(error: CycloptsError) -> str:
    """Return one message about the mistake, naming the option or recipe entry that was probably meant."""
    error.verbose = False  # omit the Python signature
    parameters = _parameters(error.target) if error.target else []
    said = str(error).strip()
    if isinstance(error, UnknownOptionError) and "overrides" in parameters:
        said = _entry(error, said)
    elif isinstance(error, UnusedCliTokensError):
        said = _surplus(error.unused_tokens or [], parameters)
    called = " ".join(["distmatch", *(error.command_chain or ())])
    return advised(said, f"see `{called} --help`")


def _parameters(command: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of `command`, including those in its `Options`."""
    found = []
    for parameter in inspect.signature(command).parameters.values():
        found += [field.name for field in fields(parameter.annotation)] if is_dataclass(parameter.annotation) else []
        found.append(parameter.name)
    return found


def _entry(error: UnknownOptionError, said: str) -> str:
    """Explain `--steps 100` where a recipe entry is meant: `steps=100`."""
    from distmatch.recipe.loading import meant  # imported late to keep --help fast

    option, _, value = (error.token.keyword or error.token.value).partition("=")
    if not value:
        words = error.root_input_tokens or []
        behind = words[words.index(option) + 1 :][:1] if option in words else []
        value = next((word for word in behind if not word.startswith("--")), "VALUE")
    entries = meant(option.lstrip("-").replace("-", "_"))
    if not entries:
        return said
    written = " or ".join(f"{entry}={value}" for entry in entries)
    return f"Unknown option: {option}. Entries of a recipe have no dashes: {written}"


def _surplus(tokens: list[str], options: list[str]) -> str:
    """Explain surplus words; for `steps=5` where an option is meant: `--steps 5`."""
    key, equals, value = tokens[0].partition("=") if tokens else ("", "", "")
    if equals and key.lstrip("-") in options:
        return f"Unexpected {tokens[0]!r}: write --{key.lstrip('-').replace('_', '-')} {value}"
    return f"Unexpected {', '.join(map(repr, tokens))}: options have names, e.g. --seed 3"
