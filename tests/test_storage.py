"""Folders by path and by URL: whole files, one creator, and copies that stay within their bound."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress

import bucket
import pytest
from filelock import FileLock

from distmatch.system import storage
from distmatch.system.files import write_atomic
from distmatch.system.process import identity
from distmatch.system.storage import Folder, local

fork = multiprocessing.get_context("fork")


@pytest.fixture
def home(tmp_path, monkeypatch):
    return bucket.make(tmp_path, monkeypatch)


@pytest.fixture(params=["path", "url"])
def folder(request, home, tmp_path) -> Folder:
    return Folder(tmp_path / "disk" / "a" if request.param == "path" else "bucket://a/b/")


def test_files_come_back_as_they_were_written(folder):
    assert folder.sizes() == {}
    assert not folder.exists("x")
    with pytest.raises(FileNotFoundError):
        folder.read("x")
    folder.write("x", lambda path: path.write_bytes(b"whole"))
    assert folder.read("x") == b"whole"
    assert folder.opened("x", lambda path: path.read_bytes()) == b"whole"
    folder.write("x", lambda path: path.write_bytes(b"another"))
    assert folder.opened("x", lambda path: path.read_bytes()) == b"another"
    folder.change("x", b"third")
    assert folder.sizes() == {"x": 5}
    folder.remove("x")
    folder.remove("x")
    assert folder.sizes() == {}
    with pytest.raises(FileNotFoundError):
        folder.opened("x", lambda path: path.read_bytes())


def test_a_failed_write_leaves_what_was_there(folder):
    folder.write("x", lambda path: path.write_bytes(b"good"))

    def fails(path):
        path.write_bytes(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write("x", fails)
    assert folder.read("x") == b"good"
    assert set(folder.sizes()) == {"x"}


def _create(folder, start, won) -> None:
    start.wait()
    for number in range(50):
        if folder.create(f"{number}", str(os.getpid()).encode()):
            won.put((number, os.getpid()))


def test_of_many_that_create_a_file_one_has_made_it(folder):
    start, won = fork.Event(), fork.Queue()
    processes = [fork.Process(target=_create, args=(folder, start, won)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    makers = dict(won.get(timeout=20) for _ in range(50))
    for process in processes:
        process.join(20)
    assert won.empty()
    assert sorted(makers) == list(range(50))
    assert {n: int(folder.read(str(n))) for n in makers} == makers


def test_a_path_is_a_path_whatever_it_is_called(tmp_path):
    assert Folder(f"file://{tmp_path}").path == tmp_path
    assert str(Folder("runs/pairs")) == "runs/pairs"
    assert local(f"file://{tmp_path}/x") == tmp_path / "x"


@pytest.mark.parametrize("url", ["nowhere://x", "s3://bucket/x"])
def test_a_store_that_cannot_be_reached_is_named(url, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=rf"{url} (cannot be opened: .*not known|needs s3fs)"):
        Folder(url)


# Copies


def test_a_file_is_fetched_once_and_anew_when_it_changes(home):
    folder = Folder("bucket://a")
    folder.write("x", lambda path: path.write_bytes(b"one"))
    for _ in range(3):
        assert folder.opened("x", lambda path: path.read_bytes()) == b"one"
    assert local("bucket://a/x").read_bytes() == b"one"
    assert bucket.fetched(home) == ["x"]
    time.sleep(0.01)
    folder.write("x", lambda path: path.write_bytes(b"two"))
    assert local("bucket://a/x").read_bytes() == b"two"
    assert bucket.fetched(home) == ["x", "x"]


def _fetch(folder, start, results) -> None:
    start.wait()
    results.put([folder.opened(f"{n}", lambda path: len(path.read_bytes())) for n in range(10)])


def test_the_processes_of_a_machine_fetch_a_file_once(home):
    folder = Folder("bucket://a")
    for n in range(10):
        folder.write(f"{n}", lambda path, n=n: path.write_bytes(bytes(1000 + n)))
    start, results = fork.Event(), fork.Queue()
    processes = [fork.Process(target=_fetch, args=(folder, start, results)) for _ in range(5)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=20) for _ in range(5)] == [[1000 + n for n in range(10)]] * 5
    assert sorted(bucket.fetched(home)) == [str(n) for n in range(10)]
    for process in processes:
        process.join(20)


def test_copies_stay_within_their_bound_and_those_used_last_stay(home, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "5e-6")  # five of these files
    folder = Folder("bucket://a")
    for n in range(9):
        folder.write(f"{n}", lambda path, n=n: path.write_bytes(bytes([n]) * 1000))
    for n in range(9):
        for used in (n, 0):  # file 0 all the time
            assert folder.opened(str(used), lambda path: path.read_bytes()) == bytes([used]) * 1000
            assert bucket.taken() <= 5000
            time.sleep(0.005)
    assert bucket.fetched(home) == [str(n) for n in range(9)]
    assert folder.opened("1", lambda path: path.read_bytes()) == bytes([1]) * 1000
    assert bucket.fetched(home)[-1] == "1"


def test_what_is_larger_than_the_bound_is_named(home, monkeypatch):
    Folder("bucket://a").write("x", lambda path: path.write_bytes(bytes(6000)))
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "5e-6")
    with pytest.raises(ValueError, match=r"a/x has 6e-06 GB, .* 5e-06 GB in all; set DISTMATCH_CACHE_GB"):
        local("bucket://a/x")
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "much")
    with pytest.raises(ValueError, match="DISTMATCH_CACHE_GB is 'much'; expected a number"):
        local("bucket://a/x")


def _fetch_slowly(name, started) -> None:
    bucket.Bucket.delay = 0.5
    started.set()
    local(f"bucket://a/{name}")


def test_what_is_being_fetched_counts_too(home, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "2.5e-6")
    for name in "xyz":
        Folder("bucket://a").write(name, lambda path: path.write_bytes(bytes(1000)))
    processes = [fork.Process(target=_fetch_slowly, args=(name, fork.Event())) for name in "xyz"]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        files = [file for file in storage.COPIES.glob("*") if file.suffix not in (".lock", ".reserved")]
        with suppress(FileNotFoundError):
            most = max(most, sum(file.stat().st_size for file in files))
        time.sleep(0.01)
    assert sorted(bucket.fetched(home)) == ["x", "y", "z"]
    assert most == 2000


def test_who_looks_for_room_finds_a_fetched_copy_or_what_was_reserved_for_it(home, monkeypatch):
    """While the copies are counted, none takes the place of its reservation: it would be missed under both names."""
    Folder("bucket://a").write("x", lambda path: path.write_bytes(b"x" * 100))
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "150e-9")
    counting, fetched, get_file = threading.Event(), threading.Event(), bucket.Bucket.get_file

    def fetch(self, *arguments, **named):
        assert counting.wait(10)
        get_file(self, *arguments, **named)
        fetched.set()

    monkeypatch.setattr(bucket.Bucket, "get_file", fetch)
    thread = threading.Thread(target=local, args=("bucket://a/x",))
    thread.start()
    while thread.is_alive() and not list(storage.COPIES.glob(".*.reserved")):
        time.sleep(0.001)
    with FileLock(storage.COPIES / ".lock"):
        counting.set()
        assert fetched.wait(10)
        thread.join(0.3)
        assert [file.stat().st_size for file in storage.COPIES.glob(".*.reserved")] == [100]
        assert storage._make_room(0)
        (there,) = storage.COPIES.glob("[!.]*")
        assert "-" not in there.name, "neither a copy yet, nor deleted to make room"
    thread.join(10)
    assert not list(storage.COPIES.glob(".*.reserved"))
    (there,) = storage.COPIES.glob("[!.]*-*")
    assert there.read_bytes() == b"x" * 100


def test_what_a_killed_fetch_left_goes_and_what_a_living_one_holds_stays(home):
    for name in "xyz":
        Folder("bucket://a").write(name, lambda path: path.write_bytes(bytes(1000)))
    started = [fork.Event(), fork.Event()]
    processes = [fork.Process(target=_fetch_slowly, args=each) for each in zip("xy", started, strict=True)]
    for process, event in zip(processes, started, strict=True):
        process.start()
        event.wait(10)
    while len(list(storage.COPIES.glob(".*.reserved"))) < 2:
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join()
    for file in storage.COPIES.glob(".?*"):
        os.utime(file, (0, 0))  # as after hours
    local("bucket://a/z")
    assert len(list(storage.COPIES.glob(".*.reserved"))) == 1
    local("bucket://a/y")
    processes[1].join(10)
    assert sorted(bucket.fetched(home)) == ["x", "y", "z"]
    local("bucket://a/x")
    assert [file.name for file in storage.COPIES.glob(".*")] == [".lock"]


def test_a_web_server_tells_versions_apart_by_their_tag(home, monkeypatch):
    plain = bucket.Bucket.info
    told = {"ETag": "1"}
    monkeypatch.setattr(bucket.Bucket, "ukey", lambda self, path: path)  # as fsspec's for HTTP
    monkeypatch.setattr(bucket.Bucket, "info", lambda self, path: plain(self, path) | told)
    signed = "bucket://a/x.zip?signature=" + 200 * "a"
    (home / "a").mkdir()
    (home / "a" / signed.rpartition("/")[2]).write_bytes(b"one")
    assert local(signed).read_bytes() == b"one"
    assert local(signed).suffix == ".zip"
    (home / "a" / signed.rpartition("/")[2]).write_bytes(b"two")
    told["ETag"] = "2"
    assert local(signed).read_bytes() == b"two"
    told |= {"ETag": "3", "size": None}
    with pytest.raises(ValueError, match=r"does not say its size, .* download it first"):
        local(signed)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="x is a file; expected a folder"):
        Folder(tmp_path / "x")


def left_by(writer: str, name: str = "x") -> str:
    return f".{name}.{writer}-abcd1234"


def test_what_killed_writers_left_is_swept_when_it_is_old_by_the_disks_clock(tmp_path, monkeypatch):
    elsewhere = "01234567-42-4711"
    old, young, foreign = left_by(elsewhere), left_by(elsewhere, "y"), ".x.abcd1234"
    for name in (old, young, foreign):
        (tmp_path / name).touch()
    past = (tmp_path / old).stat().st_mtime - 60
    for name in (old, foreign):
        os.utime(tmp_path / name, (past, past))
    monkeypatch.setattr(time, "time", lambda: 2e9)  # ours is wrong
    Folder(tmp_path).sweep(30)
    assert {file.name for file in tmp_path.iterdir()} == {foreign, young}


def _killed_while_it_writes(file) -> None:
    def write(path):
        path.write_bytes(b"ha")
        os.kill(os.getpid(), signal.SIGKILL)

    write_atomic(file, write)


def test_the_next_to_write_into_a_folder_sweeps_what_a_killed_one_left(tmp_path):
    process = fork.Process(target=_killed_while_it_writes, args=(tmp_path / "x",))
    process.start()
    process.join()
    (half,) = tmp_path.iterdir()
    mine = tmp_path / left_by(identity())
    mine.touch()
    write_atomic(tmp_path / "y", lambda path: path.write_bytes(b"whole"))
    assert set(tmp_path.iterdir()) == {tmp_path / "y", mine}, "who lives keeps its own"
    half.touch()
    write_atomic(tmp_path / "y", lambda path: path.write_bytes(b"again"))
    assert half.exists(), "a process looks once"
