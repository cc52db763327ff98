"""Models by their id, OWNER/NAME: Hugging Face's cache, and the hub, which is asked only if it answers."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from distmatch.system import parallel
from distmatch.system.errors import UserError
from distmatch.system.extras import need
from distmatch.system.progress import console


def folder_with(source: str, files: Iterable[str]) -> Path | None:
    """Return the cache's folder of the model `source` if all of `files` are there.

    The first of them must lie in the folder itself.
    """
    need("huggingface_hub", by=source)
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(source, file) for file in files]
    there = [file for file in found if isinstance(file, str)]
    return Path(there[0]).parent if len(there) == len(found) else None


def place_of(source: str) -> str:
    """Return where to read the model `source`: the cache's folder if the hub is not to be asked or does not answer;
    otherwise `source` itself, for which diffusers asks the hub, file by file.

    Raises `UserError` for a model that neither has.
    """
    need("huggingface_hub", by=source)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:  # what only looks like an id: ./FOLDER
        return source
    if constants.HF_HUB_OFFLINE:
        silent = "HF_HUB_OFFLINE forbids to ask the hub"
    else:
        _say(f"Asking {constants.ENDPOINT} for {source}; with HF_HUB_OFFLINE=1 only the cache is looked at")
        silent = _unreachable()
        if silent is None:
            return source
        _say(f"{silent}: looking at the cache alone")
    try:
        return snapshot_download(source, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"diffusers model {source!r} cannot be loaded: the cache does not have it, and {silent}. Get it where "
            f"there is a network, by `hf download {source}`, or give a folder in diffusers' format"
        ) from error


@cache
def _say(line: str) -> None:
    """Print `line`, once."""
    if parallel.rank() == 0:
        console.print(line, soft_wrap=True)


@cache
def _unreachable() -> str | None:
    """Return why the hub does not answer, in words; None if it does, whatever it says.

    Asked once: diffusers asks for one file after the other, and its library tries six times for each.
    """
    need("huggingface_hub", by="a model's id")
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the HTTP library, which is another one in other versions
        return f"{constants.ENDPOINT} cannot be reached ({str(error).strip() or type(error).__name__:.200})"
    return None
