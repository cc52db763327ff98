"""Exceptions that end a command early without being a bug, and their messages. Imports nothing, so that every file can
use it.

The command line shows only their message. Any other exception is a bug and is shown with its traceback.
"""


class UserError(ValueError):
    """A mistake in what the user provided: an option, a recipe, a file, a machine that lacks something.

    The message names the thing, its value, what was expected and what to do next.
    """


class Agreed(UserError):
    """A mistake that all processes of a job raise alike, so that one of them can report it for all."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM, after everything was saved."""


class Diverged(Exception):
    """A loss is not finite."""


class Lost(Exception):
    """Another process of the job died."""


def advised(mistake: str, advice: str) -> str:
    """Append `advice`, if there is any, to `mistake`: after a question or an open list it is its own sentence."""
    if not advice:
        return mistake
    if mistake.endswith(("?", "...")):
        return f"{mistake} {advice[0].upper()}{advice[1:]}"
    return f"{mistake.removesuffix('.')}; {advice}"
