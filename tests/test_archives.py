"""Folders, tars and zips, whole and damaged: the same images, or one message that names the archive and the file."""

import io
import lzma
import shutil
import tarfile
import zipfile
from pathlib import Path

import bucket
import numpy as np
import pytest
import torch
from layouts import CONTAINERS, encoded, pixels, png, write

from distmatch.data.images import Images, load_images

FILES = {f"{kind}/{i}.png": png(5 * k + i) for k, kind in enumerate(("cat", "dog")) for i in range(5)}


def first(images) -> np.ndarray:
    return images.pixels[0].permute(1, 2, 0).numpy()


def attempt(place: Path) -> tuple[Images | None, str]:
    try:
        return load_images(place), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("container", [*CONTAINERS, "tar.gz", "tar.bz2"])
def test_every_container_holds_the_same_images(tmp_path, container):
    images = load_images(write(tmp_path / "set", FILES, container))
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), np.stack([pixels(i) for i in range(10)]))
    assert images.labels.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("suffix", ["tar.xz", "zip"])
def test_an_archive_at_a_url_is_the_archive_on_the_disk(tmp_path, monkeypatch, suffix):
    home = bucket.make(tmp_path, monkeypatch)
    (home / "sets").mkdir()
    shutil.move(write(tmp_path / "set", FILES, suffix), home / "sets")
    there = load_images(f"bucket://sets/set.{suffix}")
    assert torch.equal(there.pixels, load_images(write(tmp_path / "set", FILES)).pixels)
    assert there.classes == ("cat", "dog")
    for nothing in ("bucket://sets/none.tar", "bucket://sets"):
        with pytest.raises(ValueError, match=f"{nothing} is no file; expected one"):
            load_images(nothing)


@pytest.mark.parametrize("container", ["tar", "tar.gz", "tar.xz", "zip"])
def test_a_cut_archive_is_never_a_smaller_data_set(tmp_path, container):
    """At every length: all images, or an error that names the archive."""
    whole = write(tmp_path / "set", FILES, container).read_bytes()
    expected = load_images(tmp_path / f"set.{container}").pixels
    cut, refused = tmp_path / f"cut.{container}", 0
    for length in {*range(0, len(whole), 512), *range(7, len(whole), 701), len(whole) - 1}:
        cut.write_bytes(whole[:length])
        found, message = attempt(cut)
        assert message.startswith(str(cut)) if found is None else torch.equal(found.pixels, expected)
        refused += found is None
    assert refused > len(whole) // 512 // 2


@pytest.mark.parametrize("container", ["tar", "zip"])
def test_a_flipped_bit_is_never_a_smaller_data_set(tmp_path, container):
    """Bits of pictures in a tar have no digest but PNG's own; those of headers and of a zip's contents have one."""
    whole = bytearray(write(tmp_path / "set", FILES, container).read_bytes())
    damaged = tmp_path / f"damaged.{container}"
    random = np.random.default_rng(0)
    for at in random.integers(0, len(whole) if container == "zip" else 512, 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(random.integers(8))
        damaged.write_bytes(flipped)
        found, message = attempt(damaged)
        if found is None:
            assert message.startswith(str(damaged))
        else:  # a suffix that is no picture's any more is counted
            assert len(found) + sum(number for _, number in found.account.left_out) == 10


def test_a_damaged_header_in_the_middle_of_a_tar_is_no_end(tmp_path):
    file = write(tmp_path / "set", FILES, "tar")
    content = bytearray(file.read_bytes())
    content[content.index(b"dog/0.png")] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"set.tar cannot be read as an archive .*: it breaks off after"):
        load_images(file)


def test_archives_in_a_row_are_refused(tmp_path):
    file = write(tmp_path / "set", FILES, "tar")
    file.write_bytes(2 * file.read_bytes())
    with pytest.raises(ValueError, match="more follows after its end"):
        load_images(file)


def test_of_two_files_of_one_name_the_later_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in (0, 1):
            member = tarfile.TarInfo("./x/a.png")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, number in (("x/a.png", 0), ("x\\a.png", 1)):
            archive.writestr(name, png(number))
    for name in ("a.tar", "a.zip"):
        images = load_images(tmp_path / name)
        assert np.array_equal(first(images), pixels(1))
        assert "1 file left out: 1 replaced by later ones of the same name" in str(images)


def test_links_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, link in (("a.png", ""), ("b.png", "a.png"), ("c.png", "/etc/passwd")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            member.size = 0 if link else len(png(0))
            archive.addfile(member, io.BytesIO(png(0)))
    images = load_images(tmp_path / "a.tar")
    assert len(images) == 1
    assert "2 links in the archive" in str(images)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (6, 1, "0.png is encrypted; unpack"),
        (8, 9, "cannot be read: That compression method is not supported; unpack the"),
    ],
)
def test_zips_that_python_cannot_open_name_the_file(tmp_path, place, value, message):
    """Encrypted (bit 0 of the flags) or of Deflate64 (method 9), in the local and in the central header."""
    file = write(tmp_path / "set", {"0.png": png(0)}, "zip")
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\3\4") + place] = value
    content[content.index(b"PK\1\2") + place + 2] = value
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"set.zip: 0.png .*{message}|set.zip: {message}"):
        load_images(file)


@pytest.fixture
def tight(monkeypatch):
    """Limits so low that tests of them are quick."""
    for name, value in (("FILE", 100_000), ("UNPACKED", 200_000)):
        monkeypatch.setattr(f"distmatch.data.archives.{name}", value)
    monkeypatch.setattr("distmatch.data.archives.EXPANSION", 2)


@pytest.mark.usefixtures("tight")
def test_a_tar_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    tar = write(
        tmp_path / "set",
        {"0.png": png(0), "zeros.bin": bytes(90_000), "more.bin": bytes(90_000), "z.bin": bytes(90_000)},
        "tar",
    )
    file = tmp_path / "bomb.tar.xz"
    file.write_bytes(lzma.compress(tar.read_bytes()))
    with pytest.raises(ValueError, match=r"bomb.tar.xz cannot .* it unpacks to more than 2\d\d,\d\d\d bytes"):
        load_images(file)
    assert len(load_images(tar)) == 1


@pytest.mark.usefixtures("tight")
def test_a_zip_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    flat = encoded(np.zeros((170, 170, 3), np.uint8), "BMP")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.bmp", flat)
    with pytest.raises(ValueError, match=r"bomb.zip unpacks to 261,282 bytes"):
        load_images(tmp_path / "bomb.zip")


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("container", ["folder", "tar", "zip"])
def test_a_picture_of_too_many_bytes_is_named(tmp_path, container):
    place = write(tmp_path / "set", {"a.png": png(0), "large.png": bytes(100_001)}, container)
    with pytest.raises(ValueError, match=r"large.png: 100,001 bytes are more than the 100,000 that are read.*LIMITS=2"):
        load_images(place)


def test_a_sparse_member_takes_no_more_than_other_files(tmp_path):
    """A terabyte of nothing in ten kilobytes."""
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a.png",
                          "GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,0"}  # fmt: skip
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"sparse.tar: a.png: 1,099,511,627,776 bytes are more than"):
        load_images(tmp_path / "sparse.tar")


@pytest.mark.usefixtures("tight")
def test_a_header_takes_no_more_than_a_file(tmp_path):
    """Names in pax headers may be of any length."""
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"comment": "x" * 150_000}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"a header or file in it: .* bytes are more than the 100,000"):
        load_images(tmp_path / "a.tar")


def test_what_is_no_archive_is_named(tmp_path):
    for content in (b"", b"no archive", png(0), b"\x1f\x8bx", b"PK\3\4", b"\xfd7zXZ\0"):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.bin cannot be read as an archive \(.tar, .tar.gz, .zip\)"):
            load_images(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_images(tmp_path / "nowhere")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("distmatch.data.archives.os.scandir", refuse)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Permission denied"):
        load_images(tmp_path)
