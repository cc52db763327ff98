"""Where things lie that belong to no run."""

import os
from importlib import resources
from pathlib import Path

ASSETS = Path(str(resources.files("distmatch"))) / "assets"
"""Models, classifiers and references of the package."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distmatch"
"""What can be made again: references, imported checkpoints."""
