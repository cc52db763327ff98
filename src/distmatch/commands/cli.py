"""The command line: registers the commands and shows the errors that end one."""

import inspect
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.help import DefaultFormatter, InlineText
from rich.text import Text

from distmatch.commands import export, fetch, import_edm, pairs
from distmatch.commands.checkpoints import checkpoints
from distmatch.commands.classifier import classifier
from distmatch.commands.compare import compare
from distmatch.commands.demo import demo
from distmatch.commands.eval import evaluate
from distmatch.commands.mistakes import explain
from distmatch.commands.plan import plan
from distmatch.commands.recipes import recipes
from distmatch.commands.report import report
from distmatch.commands.sample import sample
from distmatch.commands.serve import serve
from distmatch.commands.teach import teach
from distmatch.commands.teach_text import teach_text
from distmatch.commands.train import train
from distmatch.system.errors import Agreed, Diverged, Lost, Stopped, UserError
from distmatch.system.interrupt import Terminated, ends_unread, raises_terminated

ARGUMENTS = {"overrides": "KEY=VALUE"}
"""How usage lines name arguments of several words, if not by their own name."""

LONGEST = 4000
"""Maximum number of characters shown of an error message."""


class Flowing(DefaultFormatter):
    """Help text that wraps at the width of the terminal instead of where the source does."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        for entry in panel.entries:
            if isinstance(entry.description, InlineText):
                text = entry.description.primary_renderable
                flowing = " ".join(str(getattr(text, "markup", text)).split())
                entry.description.primary_renderable = Text(flowing)
        super().__call__(console, options, panel)


app = App(
    # An empty list is no answer to any option, and every switch is off unless it is given.
    default_parameter=Parameter(negative_iterable=(), negative_bool=()),
    name="distmatch",
    help="""Turn a pretrained diffusion model into a one-step generator (Distribution Matching Distillation).

First look:  distmatch demo            the main job on MNIST, minutes on a CPU
             distmatch sample mnist    images from the student in the package
Own model:   distmatch teach IMAGES    a small teacher from a folder of images
             distmatch teach-text IMAGES    a small Stable Diffusion from images with captions
             distmatch train RECIPE    distil a teacher
""",
    help_format="plaintext",
    help_formatter=Flowing(),
    suppress_keyboard_interrupt=False,  # it would exit silently; see `main`
)
for command in (demo, recipes, train, plan, teach, teach_text, classifier, checkpoints, sample, compare, serve, report):
    app.command(command, help_format="markdown")
app.command(evaluate, name="eval", help_format="markdown")
for group in (pairs, import_edm, export, fetch):
    app.command(group.app)


def _name_arguments(commands: App, called: str) -> None:
    """Name each argument in the usage lines, which would otherwise say [ARGS] for all that have a default."""
    for name in commands:
        if name.startswith("-"):
            continue
        command = commands[name]
        _name_arguments(command, f"{called} {name}")
        if command.default_command is not None:
            command.usage = f"Usage: {called} {name} [OPTIONS]{_arguments(command.default_command)}"


def _arguments(command: Callable[..., Any]) -> str:
    found = ""
    for one in inspect.signature(command).parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            found += f" [{ARGUMENTS.get(one.name, one.name.upper())}...]"
        elif one.kind is one.POSITIONAL_ONLY:
            optional = one.default is not one.empty
            found += f" [{one.name.upper()}]" if optional else f" {one.name.upper()}"
    return found


_name_arguments(app, "distmatch")


def main() -> None:
    """Entry point. A user error is shown as one message (DISTMATCH_DEBUG=1: traceback), a bug with its traceback."""
    # OpenMP threads that spin while they wait cost a busy CPU more than they save; torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if os.environ.get("DISTMATCH_DEBUG"):
        app()
        return
    try:
        with ends_unread(), warnings.catch_warnings(), raises_terminated():
            warnings.showwarning = _show_once()
            app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(explain(error), 2)
    except UserError as error:
        if isinstance(error, Agreed) and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None  # the first process reports it
        _fail(str(error), 2)
    except (Diverged, Lost) as error:
        _fail(str(error), 1)
    except Stopped as error:
        _fail(f"{error}; to go on: {_command()}", 130)
    except KeyboardInterrupt as error:  # wherever it comes from: an import, building pairs, an evaluation
        again = f"; to go on: {_command()}" if _continues() else ""
        _fail(f"stopped{again}", 143 if isinstance(error, Terminated) else 130)
    except Exception as error:
        from distmatch.system.disk import explained

        if (message := explained(error)) is not None:
            _fail(message, 2)
        traceback.print_exc()
        _fail(
            f"the {type(error).__name__} above is a bug in distmatch or in a package that it uses, not a mistake of "
            f"yours. Please report it, including everything above and this command: {_command()}",
            1,
        )


def _show_once() -> Callable[..., None]:
    """Return what shows our notices as one line, each of them once, and warnings of other packages as Python does.

    Python itself forgets what it has shown whenever filters of warnings change, as they do in many imports.
    """
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        if category.__name__ != "Notice":
            print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")
        elif str(message) not in shown:
            from distmatch.system.screen import escaped

            shown.add(str(message))
            print(f"distmatch: {escaped(message)[:LONGEST]}", file=sys.stderr)

    return show


def _command() -> str:
    """Return the command line as the user typed it."""
    name = Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m", "distmatch"] if name == "__main__.py" else [name]), *sys.argv[1:]])


def _continues() -> bool:
    """Return whether the command of this process, if run again, goes on from where it was stopped."""
    try:
        command, bound, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError:
        return False
    if command is demo:
        return bound.arguments.get("which") != "toy2d"
    if command is train:
        return not (bound.arguments.get("check") or bound.arguments.get("dry_run"))
    return command in (teach, teach_text, compare, pairs.build)


def _fail(message: str, code: int) -> None:
    from distmatch.system.screen import escaped

    print(f"distmatch: {escaped(message)[:LONGEST]}", file=sys.stderr)
    raise SystemExit(code)
