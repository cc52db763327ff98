"""What is finished is read where nothing can be written, and beside files that others have left there."""

import errno
import os
import sys
from pathlib import Path

import pytest
import tiny

from distmatch.commands.distillation import distil
from distmatch.data.embeddings import embed
from distmatch.data.pairs import PairStore
from distmatch.pipeline import DistilledPipeline
from distmatch.recipe.loading import load_recipe
from distmatch.system.files import sweep
from distmatch.system.process import identity
from distmatch.training.checkpoint import Checkpoints

frozen: list[Path] = []
"""The folders in which this process can change nothing."""

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "os.link"}


def _refuse(event: str, arguments: tuple) -> None:
    """As a read-only disk does: the tests run as root, which permissions don't stop."""
    if not frozen or (event != "open" and event not in CHANGES):
        return
    writes = event in CHANGES or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for place in arguments[:2] if writes else ():
        if isinstance(place, str | os.PathLike) and any(Path(place).is_relative_to(folder) for folder in frozen):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))


sys.addaudithook(_refuse)

STRAY = [
    *("shard-00000.safetensors.claim-0~", "manifest.json.claim-1.swp", ".DS_Store", "Thumbs.db", "desktop.ini"),
    *("._shard-00000.safetensors", "shard-00001.safetensors~", "#manifest.json#", ".nfs0000000000000001", "x.claim-"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its pairs, in folders where other programs have left files of theirs."""
    folder = tmp_path_factory.mktemp("finished")
    file = tiny.recipe_file(folder, steps=2, match={"batch": 2}, regress={"batch": 2}, pairs={"count": 4, "shard": 2})
    distil(load_recipe(str(file), [f"pairs.path={folder / 'pairs'}"]), folder / "run")
    for place in (folder / "pairs", folder / "run", folder / "run" / "checkpoints", folder / "run" / "model"):
        for name in STRAY:
            (place / name).write_bytes(b"other")
    # What a killed builder leaves, of a process that is dead and of one of which nothing is known.
    host = identity().partition("-")[0]
    (folder / "pairs" / "shard-00000.safetensors.claim-0").write_text(f"{host}-1-0-abc 00000000 ")
    (folder / "pairs" / f".shard-00000.safetensors.{host}-1-0-abcd1234").write_bytes(b"half")
    (folder / "pairs" / ".shard-00001.safetensors.01234567-1-0-abcd1234").write_bytes(b"half")
    return folder


@pytest.fixture
def read_only(finished):
    frozen.append(finished)
    yield finished
    frozen.clear()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_read_only_folder_is_one(read_only):
    for change in (
        lambda: (read_only / "new").touch(),
        lambda: (read_only / "run" / "recipe.yaml").unlink(),
        lambda: (read_only / "run" / "recipe.yaml").write_text(""),
        lambda: (read_only / "run").rename(read_only / "other"),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            change()


def test_a_finished_store_and_run_are_read_verified_and_trained_from(read_only, tmp_path):
    store = PairStore.open(read_only / "pairs")
    store.verify()
    assert len(store) == 4
    assert Checkpoints(read_only / "run" / "checkpoints", {}).steps() == [2]
    Checkpoints(read_only / "run" / "checkpoints", {}).verify(2)
    before = DistilledPipeline.from_pretrained(read_only / "run")(3, seed=1).pixels
    changes = [
        f"pairs.path={read_only / 'pairs'}",
        f"student.init={read_only / 'run'}",
        "steps=1",
        "student.optimizer.lr=1e-9",
    ]
    distil(load_recipe(str(read_only / "tiny.yaml"), changes), tmp_path / "run")
    after = DistilledPipeline.from_pretrained(tmp_path / "run")(3, seed=1).pixels
    assert (before.int() - after.int()).abs().max() <= 1, "it began where the other ended"


def test_a_run_that_cannot_be_written_is_named(read_only):
    with pytest.raises((ValueError, OSError), match="run"):
        distil(load_recipe(str(read_only / "tiny.yaml"), [f"pairs.path={read_only / 'pairs'}"]), read_only / "run")


def test_files_of_others_stay_and_are_no_claims(finished):
    """Where it can be written, what killed builders left goes, and nothing else does."""
    store = finished / "pairs"
    foreign = names(store) & {*STRAY, ".shard-00001.safetensors.01234567-1-0-abcd1234"}
    distil(load_recipe(str(finished / "tiny.yaml"), [f"pairs.path={store}"]), finished / "another")
    assert names(store) == {"manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"} | foreign


def test_text_that_is_cached_is_read_from_a_read_only_folder(tmp_path):
    import torch

    from distmatch.diffusion.denoiser import Cond

    texts = ["a", "b", "c"]
    embed(tmp_path / "cache", texts, lambda part: Cond(text=torch.ones(len(part), 2, 3)))
    frozen.append(tmp_path / "cache")
    try:
        cached = embed(tmp_path / "cache", texts, lambda part: pytest.fail("encoded again"))
        assert torch.equal(cached([2]).text, torch.ones(1, 2, 3))
        sweep(tmp_path / "cache", 0)
    finally:
        frozen.clear()
