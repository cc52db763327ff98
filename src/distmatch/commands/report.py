"""`distmatch report`: one HTML page on one or several runs; `report_page` makes it."""

from distmatch.system.errors import UserError
from distmatch.system.options import File, Out


def report(*runs: File, out: Out = None) -> None:
    """Write one HTML page on one or several runs: curves, pictures over time, recipes side by side.

    Parameters
    ----------
    runs
        Run folders.
    out
        The page; default: report.html in the run, or of several runs comparison.html in the first.
    """
    from distmatch.commands.report_page import report as write

    if not runs:
        raise UserError("no run was named; give one or more run folders, e.g. distmatch report runs/mnist")
    print(write(list(runs), out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")))
