"""`python -m distmatch`."""

from distmatch.commands.cli import main

main()
