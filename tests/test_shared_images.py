"""One copy of the real images for all processes of a machine: who decodes it, who holds it, what is left of it."""

import errno
import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Forked
from PIL import Image
from test_gan import real_folder, recipe
from test_parallel import together

from distmatch.data import shared_images
from distmatch.data.images import Images, load_images
from distmatch.data.shared_images import FILE
from distmatch.diffusion.conditions import WHOLE
from distmatch.recipe import subjects
from distmatch.system import parallel
from distmatch.system.errors import UserError

SIZE = 32 * 2**20
"""Bytes of the images that memory is measured with: many times what else comes and goes."""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """`reads()`: the processes that have read and decoded images, in order."""
    noted = tmp_path / "reads"
    noted.touch()

    def load(place: str, split: str) -> Images:
        with noted.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return load_images(place, split)

    monkeypatch.setattr(shared_images, "load_images", load)
    return lambda: [int(line) for line in noted.read_text().split()]


def large(folder: Path) -> Path:
    """MNIST's files in `folder`, of `SIZE` bytes."""
    count = SIZE // 64**2
    folder.mkdir()
    pixels = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 64, 64))
    (folder / "train-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
    labels = (torch.arange(count) % 10).to(torch.uint8)
    head = b"".join(number.to_bytes(4, "big") for number in (0x801, count))
    (folder / "train-labels-idx1-ubyte").write_bytes(head + labels.numpy().tobytes())
    return folder


def own() -> int:
    """Bytes in memory that belong to this process alone, and not to files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _hold(place: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        before = own()
        images = shared_images.shared_images(str(place), "train")
        total = images.pixels.sum(dtype=torch.int64)  # touches every page
        found = {"pid": os.getpid(), "own": own() - before, "total": total, "labels": images.labels}
        maps = Path("/proc/self/maps").read_text()
        torch.save({**found, "classes": images.classes, "mapped": FILE in maps}, out / f"{parallel.rank()}.pt")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory is counted as Linux does")
def test_one_process_decodes_and_none_holds_a_copy_of_its_own(tmp_path, temporary, reads):
    place = large(tmp_path / "images")
    together(2, _hold, place, tmp_path)
    assert len(set(reads())) == len(reads()) == 1
    alone = load_images(place)
    assert alone.labels is not None
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["mapped"]
        assert found["own"] < SIZE / 4
        assert found["total"] == alone.pixels.sum(dtype=torch.int64)
        assert torch.equal(found["labels"], alone.labels)
        assert found["classes"] == alone.classes
    assert not list(temporary.iterdir())


def _drawn(changed, out: Path) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        torch.save(_draw(changed), out / f"{parallel.rank()}.pt")


def _draw(changed) -> dict:
    real = subjects.subject(changed).real
    assert real is not None
    x, cond = real.draw(64, torch.Generator().manual_seed(0), WHOLE)
    assert cond is not None
    return {"print": real.fingerprint, "x": x, "label": cond.label}


def test_samples_and_fingerprint_are_those_of_one_process(tmp_path, reads):
    changed = recipe(tmp_path)
    alone = _draw(changed)
    together(2, _drawn, changed, tmp_path)
    assert len(reads()) == 2  # once here, once by one of the two
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["print"] == alone["print"]
        assert torch.equal(found["x"], alone["x"])
        assert torch.equal(found["label"], alone["label"])


def test_captions_are_shared_too(tmp_path, monkeypatch):
    real_folder(tmp_path / "images")
    for number, file in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        file.with_suffix(".txt").write_text(f"picture {number}")
    alone = load_images(tmp_path / "images")
    among_others(monkeypatch)
    found = shared_images.shared_images(str(tmp_path / "images"), "train")
    assert alone.captions is not None
    assert found.captions == alone.captions
    assert torch.equal(found.pixels, alone.pixels)


def test_one_process_needs_no_disk(tmp_path, temporary):
    place = real_folder(tmp_path / "images")
    found, alone = shared_images.shared_images(str(place), "train"), load_images(place)
    assert torch.equal(found.pixels, alone.pixels)
    assert found.account == alone.account
    assert not list(temporary.iterdir())


# What can go wrong; here without a group of processes


def among_others(monkeypatch) -> None:
    """Let this process, and those that it forks, take themselves for some of a job's."""
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "start", lambda: "the start")


def in_child(task: Callable[[], object], **options) -> int:
    """Call `task` in a process of this one's and return its exit status."""
    return Forked(task, "test", **options).end()


def test_the_next_process_takes_over_from_one_that_was_killed(tmp_path, temporary, monkeypatch):
    place = str(real_folder(tmp_path / "images"))
    among_others(monkeypatch)

    def killed(place: str, split: str) -> Images:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def dies() -> None:
        shared_images.load_images = killed
        shared_images.shared_images(place, "train")

    def goes_on() -> None:
        assert torch.equal(shared_images.shared_images(place, "train").pixels, load_images(place).pixels)

    assert in_child(dies) == -signal.SIGKILL
    assert list(temporary.rglob("*.claim-0"))
    assert in_child(goes_on) == 0
    assert [file.name for file in temporary.rglob("*") if file.is_file()] == [FILE]


def test_what_a_dead_job_has_left_is_deleted(tmp_path, temporary, monkeypatch):
    place = str(real_folder(tmp_path / "images"))
    among_others(monkeypatch)

    def job() -> None:
        """A torchrun whose processes were all killed."""
        assert in_child(lambda: shared_images.shared_images(place, "train")) == 0

    assert in_child(job, alone=True) == 0
    (left,) = temporary.iterdir()
    shared_images.shared_images(place, "train")
    (now,) = temporary.iterdir()
    assert now != left


def test_what_an_earlier_start_of_the_same_torchrun_has_left_is_deleted(tmp_path, temporary, monkeypatch):
    place = str(real_folder(tmp_path / "images"))
    among_others(monkeypatch)
    shared_images.shared_images(place, "train")
    (left,) = temporary.iterdir()
    monkeypatch.setattr(parallel, "start", lambda: "another start")
    shared_images.shared_images(place, "train")
    assert left in temporary.iterdir()  # of a job beside this one, for all that is known
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    found = shared_images.shared_images(place, "train")
    (now,) = temporary.iterdir()
    assert now != left
    assert torch.equal(found.pixels, load_images(place).pixels)


def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, temporary, monkeypatch):
    place, other = (str(real_folder(tmp_path / name)) for name in ("images", "other"))
    among_others(monkeypatch)
    shared_images.shared_images(place, "train")
    (file,) = temporary.rglob(FILE)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{file} is damaged"):
        shared_images.shared_images(place, "train")
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        shared_images.shared_images(place, "train")
    file.unlink()
    shared_images.shared_images(other, "train")
    (foreign,) = temporary.rglob(FILE)
    foreign.rename(file)
    with pytest.raises(UserError, match=f"{file} holds other images"):
        shared_images.shared_images(place, "train")


def test_all_processes_say_what_is_wrong_with_the_images_though_one_reads_them(tmp_path, reads, monkeypatch):
    place = real_folder(tmp_path / "images")
    Image.new("RGB", (9, 9)).save(next(place.rglob("*.png")))
    among_others(monkeypatch)
    for _ in range(2):
        with pytest.raises(UserError, match="images of 2 sizes"):
            shared_images.shared_images(str(place), "train")
    assert len(reads()) == 1


def test_a_full_disk_is_named_with_what_to_do(tmp_path, temporary, monkeypatch):
    place = str(real_folder(tmp_path / "images"))
    among_others(monkeypatch)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared_images, "save_file", full)
    with pytest.raises(UserError, match=rf"{temporary}.* has no room for the decoded images of {place}.* Set TMPDIR"):
        shared_images.shared_images(place, "train")


def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    among_others(monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UserError, match="belongs to another user"):
        shared_images.shared_images(str(tmp_path), "train")
