"""The ways in which a command ends early that are no error of ours. This file imports nothing, so that all can use it.

The command line shows their message alone. Any other exception is a bug and is shown with its traceback.
"""


class UserError(ValueError):
    """A mistake in what the user gave: an option, a recipe, a file, a machine that lacks something.

    The message names the thing, its value, what was expected and what to do next.
    """


class Agreed(UserError):
    """A mistake that all processes of a job raise alike, so that one of them can tell it for all."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM, after everything was saved."""


class Diverged(Exception):
    """A loss is not finite."""


class Lost(Exception):
    """Another process of the job died."""
