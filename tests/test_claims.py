"""Work without a coordinator: processes that are killed at random, and stop, and come back."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import bucket
import pytest

from distmatch.system.claims import Claims, latest, make_together
from distmatch.system.storage import Folder

fork = multiprocessing.get_context("fork")
EXPIRY = 1.0


@pytest.fixture(params=["path", "url"])
def folder(request, tmp_path, monkeypatch) -> Folder:
    home = bucket.make(tmp_path, monkeypatch)
    return Folder(home / "a" if request.param == "path" else "bucket://a")


@pytest.fixture
def none_stays():
    """Where the test fails, no process is left, not even a stopped one: a reader of our output would wait for it."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def present(name, sizes) -> bool:
    return name in sizes


def test_a_claim_is_one_process_alone_and_leaves_nothing(folder):
    one, other = Claims(folder, EXPIRY), Claims(folder, EXPIRY)
    with one.held("x") as mine:
        assert mine
        assert latest(folder.sizes()) == {"x": 0}
        with other.held("x") as theirs:
            assert not theirs
        assert latest(folder.sizes()) == {"x": 0}, "who was refused removes nothing"
        began = time.monotonic()
        while time.monotonic() - began < 2 * EXPIRY:  # it lives as long as its work takes
            assert not other.expired("x.claim-0")
            time.sleep(0.05)
    assert folder.sizes() == {}


def test_a_dead_claim_is_taken_over_by_one(folder):
    folder.create("x.claim-0", b"whoever 7")
    claims = [Claims(folder, 0.2) for _ in range(3)]
    assert not any(c.expired("x.claim-0") for c in claims), "seen for the first time"
    time.sleep(0.3)
    assert all(c.expired("x.claim-0") for c in claims)
    with claims[0].held("x", 1) as first, claims[1].held("x", 1) as second:
        assert (first, second) == (True, False)
        assert not claims[2].expired("x.claim-1")
    assert folder.sizes() == {}


def _work(folder, names, seed, seconds, enough) -> None:
    def make(name):
        while name in names[-6:] and not enough.exists():
            time.sleep(0.01)
        time.sleep(random.Random(f"{seed}{name}").uniform(0.5, 1.5) * seconds)
        folder.write(name, lambda path: path.write_text(f"{name} {os.getpid()}"))

    make_together(folder, names, present, make, expiry=EXPIRY)


def test_many_processes_of_which_some_are_killed_at_random(folder, none_stays, tmp_path):
    """Six at a time until all is made; every 0.15 s one is killed or stands still, and another comes in its place.

    The last six wait until there were enough of them.
    """
    names, fate, enough = [f"part-{n:03d}" for n in range(150)], random.Random(0), tmp_path / "enough"

    def start(seed):
        process = fork.Process(target=_work, args=(folder, names, seed, 0.1, enough))
        process.start()
        return process

    running = [start(seed) for seed in range(6)]
    stopped, killed, at_rest, began = [], 0, {}, time.monotonic()
    while any(process.is_alive() for process in running):
        assert time.monotonic() - began < 60
        if killed < 12:
            victim = running.pop(fate.randrange(len(running)))
            if victim.is_alive():
                os.kill(victim.pid, signal.SIGSTOP if killed % 4 == 3 else signal.SIGKILL)
                if killed % 4 == 3:
                    stopped.append(victim)
                killed += 1
            running.append(start(100 + killed))
        else:
            enough.touch()
        time.sleep(0.15)
        for name in set(names) & set(folder.sizes()):
            content = folder.read(name)
            assert at_rest.setdefault(name, content) == content, "what is at rest is never made again"
    assert killed == 12
    assert sorted(folder.sizes()) == names, "all is there, and no claim"
    for process in stopped:  # they find their work done by others
        os.kill(process.pid, signal.SIGCONT)
        process.join(20)
        assert process.exitcode == 0
    assert sorted(folder.sizes()) == names
    assert all(folder.read(name).decode().split()[0] == name for name in names)
    assert len({folder.read(name).split()[1] for name in names}) >= 6, "many took part"


def test_who_stood_still_while_writing_finds_it_done_by_others(tmp_path):
    folder = Folder(tmp_path)

    def make(name):
        def write(path):
            path.write_text("late")
            os.utime(path, (0, 0))
            Folder(tmp_path).write(name, lambda path: path.write_text("by others"))
            Folder(tmp_path).sweep(EXPIRY)

        folder.write(name, write)

    make_together(folder, ["x"], present, make, expiry=EXPIRY)
    assert folder.read("x") == b"by others"
    with pytest.raises(FileNotFoundError, match="theirs"):
        make_together(folder, ["y"], present, lambda _: Path("theirs").read_text(), expiry=EXPIRY)


def test_what_the_dead_left_is_removed_and_what_the_living_hold_stays(folder):
    for name in ("x", "y"):
        folder.write(name, lambda path: path.write_text("done"))
    folder.create("y.claim-0", b"whoever 7")  # killed between its last two acts
    with Claims(folder, EXPIRY).held("x"):  # it makes a larger version
        make_together(folder, ["x", "y"], present, pytest.fail, expiry=EXPIRY)
        assert sorted(folder.sizes()) == ["x", "x.claim-0", "y"]
    assert sorted(folder.sizes()) == ["x", "y"]


def test_an_error_frees_the_claim_at_once(folder):
    def fails(name):
        raise ValueError("no such teacher")

    with pytest.raises(ValueError, match="no such teacher"):
        make_together(folder, ["x"], present, fails)
    assert folder.sizes() == {}
