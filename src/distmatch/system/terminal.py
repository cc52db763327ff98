"""Messages for users besides results: notices, and command lines to paste into a shell."""

import inspect
import shlex
import warnings


class Notice(UserWarning):
    """Something a user should know that is not an error. The command line shows it as one line."""


PASSED_THROUGH = ("distmatch", "contextlib", "torch")
"""Packages between a notice and the line of the user's that it is about: ours, and those of our functions' wrappers."""


def notice(text: str) -> None:
    """Warn with `text`, once, in the first of several processes. The warning names the line that called the package."""
    from distmatch.system import parallel  # imports torch, which a recipe that is only printed does without

    if parallel.rank() == 0:
        warnings.warn(text, Notice, stacklevel=1 + _depth())


def _depth() -> int:
    """Return how many calls within the package led to the one of `notice`, itself included."""
    # `skip_file_prefixes` of `warnings.warn` would do this from Python 3.12 on.
    frame, depth = inspect.currentframe(), -1  # this function's own frame does not count
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in PASSED_THROUGH:
        frame, depth = frame.f_back, depth + 1
    return depth


def command(*words: object) -> str:
    """Return `distmatch WORDS` as typed into a shell: words with spaces are quoted."""
    return shlex.join(["distmatch", *map(str, words)])
