"""The commands of the command line, one by one."""

from collections.abc import Callable, Iterator

from cyclopts import App


def subcommands(app: App, above: str = "") -> Iterator[tuple[str, Callable]]:
    """Yield the full name and the function of every command of `app`."""
    for name in app:
        if not name.startswith("-"):
            yield from subcommands(app[name], f"{above} {name}")
    if app.default_command is not None:
        yield above, app.default_command
