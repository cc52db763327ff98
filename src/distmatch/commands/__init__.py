"""One file per command: its options, its help, its work.

What is slow to import is imported when a command runs, so that `--help` answers at once.
"""
