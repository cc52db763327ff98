"""Messages for users besides results: notices, and command lines to paste into a shell."""

import shlex
import warnings

from distmatch.system import parallel


class Notice(UserWarning):
    """Something a user should know that is not an error. The command line shows it as one line."""


def notice(text: str) -> None:
    """Warn with `text`, once, in the first of several processes."""
    if parallel.rank() == 0:
        warnings.warn(text, Notice, stacklevel=3)


def command(*words: object) -> str:
    """Return `distmatch WORDS` as typed into a shell: words with spaces are quoted."""
    return shlex.join(["distmatch", *map(str, words)])
