"""Python's search for unreachable objects, put off while it would only cost time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage inside the with block."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            # What was made inside counts as old. As new it would all be looked through at once, half a second for a
            # million objects, at which a plan is over.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
