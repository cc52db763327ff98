"""What users are told besides results: command lines that can be pasted into a shell, notices."""

import shlex
import warnings

from distmatch.system import parallel


class Notice(UserWarning):
    """Something that a user should know and that is no error. The command line shows it as one line."""


def notice(text: str) -> None:
    """Warn of `text`, once, by the first of several processes."""
    if parallel.rank() == 0:
        warnings.warn(text, Notice, stacklevel=3)


def command(*words: object) -> str:
    """Return `distmatch WORDS` as one types it into a shell: words with spaces are quoted."""
    return shlex.join(["distmatch", *map(str, words)])
