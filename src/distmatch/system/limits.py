"""Limits on what is read from untrusted files. DISTMATCH_LIMITS=10 multiplies all of them by ten."""

import os

from distmatch.system.errors import UserError

VARIABLE = "DISTMATCH_LIMITS"
MB = 10**6

RECIPE = MB // 4
"""Bytes of a recipe; YAML parses slowly."""

SETTINGS = 64 * MB
"""Bytes of a JSON file of ours or of diffusers."""

LOG = 1024 * MB
"""Bytes of a run's log."""

PROMPT = MB
"""Bytes of one prompt: a line, or an entry of a table."""

PROMPTS = 4096 * MB
"""Bytes of a file of prompts, unpacked."""

STATISTICS = 2048 * MB
"""Bytes of the mean and the covariance in an .npz."""

ARRAY = 8192 * MB
"""Bytes of an array of images, unpacked."""

FILE = 256 * MB
"""Bytes of one picture or label file, and of one file in an archive of them."""

UNPACKED = 1024 * MB
"""Bytes that an archive may unpack to, in addition to a hundred times its own size."""

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 64_000 * MB
"""Bytes of all decoded pictures of a data set: the memory of the machine."""

PIXELS = 100 * MB
"""Pixels of one picture."""

SAMPLE = 64 * MB
"""Numbers in one image or latent of a model."""

TENSORS = 20_000
"""Named weights of a network that is built from its settings; SDXL has 1,680."""


def check(size: float, most: int, what: str, unit: str = "bytes") -> None:
    """Raise `UserError` if `what` needs more than the limit `most` of these units, scaled by DISTMATCH_LIMITS."""
    if size > (allowed := limit(most)):
        raise UserError(
            f"{what}: {size:,.0f} {unit} are more than the {allowed:,} that are read. If that is meant, set "
            f"{VARIABLE}={-(-size // most):.0f} in the environment, which raises every limit so many times"
        )


def limit(most: int) -> int:
    """Return the limit `most`, scaled by DISTMATCH_LIMITS."""
    given = os.environ.get(VARIABLE, "1")
    try:
        factor = float(given)
        return int(most * factor)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{VARIABLE} is {given!r}; expected a number, e.g. 10") from error
