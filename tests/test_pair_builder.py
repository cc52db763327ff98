"""Pairs at scale: built by processes that come and go, read from a URL in windows of shards."""

import itertools
import multiprocessing
import os
import random
import shutil
import time

import bucket
import numpy as np
import pytest
import tiny
import torch
from test_pairs import contents, spec
from test_parallel import together

from distmatch.commands import distillation
from distmatch.commands.pairs import build as build_pairs
from distmatch.data import pairs
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairStore
from distmatch.models.folder import load_model
from distmatch.recipe import build as recipe_build
from distmatch.recipe import subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import rng
from distmatch.system.storage import Folder

fork = multiprocessing.get_context("fork")


@pytest.fixture
def teacher():
    return tiny.teacher()


@pytest.fixture
def home(tmp_path, monkeypatch):
    return bucket.make(tmp_path, monkeypatch)


def _build(place, settings) -> None:
    torch.set_num_threads(1)
    teacher = tiny.teacher()
    teacher.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    build(place, settings, teacher, batch=4, expiry=1.0)


@pytest.mark.parametrize("where", ["path", "url"])
def test_processes_that_are_killed_at_random_leave_a_complete_store(home, tmp_path, teacher, where):
    """160 pairs in 40 shards; four processes at a time, of which one dies every 0.2 s until eight have."""
    settings, place = spec(teacher, count=160, shard_size=4), tmp_path / "a" if where == "path" else "bucket://a"
    together(1, _build, tmp_path / "undisturbed", settings)
    expected = contents(tmp_path / "undisturbed")
    fate, killed, at_rest, began = random.Random(1), 0, {}, time.monotonic()

    def start():
        process = fork.Process(target=_build, args=(place, settings))
        process.start()
        return process

    running = [start() for _ in range(4)]
    while any(process.is_alive() for process in running):
        assert time.monotonic() - began < 60
        if killed < 8:
            victim = fate.choice([process for process in running if process.is_alive()] or running)
            killed += victim.is_alive()
            victim.kill()
            running[running.index(victim)] = start()
        time.sleep(0.2)
        folder = tmp_path / "a" if where == "path" else home / "a"
        for file in folder.glob("shard-*.safetensors"):
            known = at_rest.setdefault(file.name, file.stat().st_ino)
            assert known == file.stat().st_ino, "what is at rest is never made again"
    assert killed >= 4, "a fast machine is done before the eighth"
    assert all(process.exitcode == 0 for process in running)
    left = set(contents(folder)) - set(expected)
    assert all(name.startswith(".") for name in left), "no claims; what killed writers left is swept after a while"
    for name in left:
        os.utime(folder / name, (time.time() - 100, time.time() - 100))
    _build(place, settings)
    assert contents(folder) == expected
    PairStore.open(place).verify()


def _pairs(file, path) -> None:
    torch.set_num_threads(1)
    build_pairs(file, f"pairs.path={path}", runs=path.parent)


def test_one_two_and_three_processes_build_the_same_store(tmp_path):
    file = str(tiny.recipe_file(tmp_path))
    for world in (1, 2, 3):
        together(world, _pairs, file, tmp_path / f"{world}")
    assert len(contents(tmp_path / "1")) == 4
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_windows_use_few_shards_at_a_time_and_have_every_pair_once():
    size, block, window = 10 * 7 + 3, 7, 3  # eleven blocks, the last one short: windows of 3, 3, 3 and 2
    passes = [rng.shuffled(5, size, epoch * size, size, window, block) for epoch in range(2)]
    assert [sorted(order) for order in passes] == [list(range(size))] * 2
    assert (passes[0] != passes[1]).any()
    for order in passes:
        short = next(i for i, entry in enumerate(order) if entry // block == 10) // (block * window)
        ends = np.cumsum([0, *(min(block * window, 14 if i == 3 else 21) - 4 * (i == short) for i in range(4))])
        used = [set(order[a:b] // block) for a, b in itertools.pairwise(ends)]
        assert [len(blocks) for blocks in used] == [3, 3, 3, 2]
        assert len(set.union(*used)) == 11
    middle = rng.shuffled(5, size, 40, 60, window, block)  # by position alone, over the end of a pass
    assert middle.tolist() == [*passes[0][40:], *passes[1][:27]]
    assert rng.shuffled(5, size, 0, size, 11, block).tolist() == rng.shuffled(5, size, 0, size).tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """96 pairs in 24 shards."""
    teacher, folder = tiny.teacher(), tmp_path_factory.mktemp("pairs") / "disk"
    build(folder, spec(teacher, count=96, shard_size=4), teacher, batch=4)
    return folder


@pytest.fixture
def remote(home, store, monkeypatch):
    """The store in the bucket as well, in windows of 3 shards; room for 8 copies."""
    shutil.copytree(store, home / "a")
    monkeypatch.setattr(pairs, "WINDOW", 3)
    size = Folder("bucket://a").sizes()["shard-00003.safetensors"]
    monkeypatch.setenv("DISTMATCH_CACHE_GB", str(8 * size / 1e9))
    return home, size


def test_a_store_at_a_url_gives_what_the_one_on_the_disk_gives(remote, store):
    home, size = remote
    here, there = PairStore.open(store), PairStore.open("bucket://a")
    for position in range(0, 192, 6):
        one, other = here.draw(7, position, 6), there.draw(7, position, 6)
        assert one.index == other.index
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.z, other.z)
        assert bucket.taken() <= 8 * size
    # Two passes of 24 shards: each fetched about once a pass, where a shuffle of all pairs would fetch one for each.
    assert 24 <= len(bucket.fetched(home)) <= 60
    again = PairStore.open("bucket://a").draw(7, 100, 6)  # another process, in the middle
    assert torch.equal(again.y, here.draw(7, 100, 6).y)


def test_shards_of_the_next_window_are_fetched_ahead(remote):
    home, _ = remote
    store = PairStore.open("bucket://a")
    store.draw(7, 0, 1)
    ahead = {f"shard-{shard:05d}.safetensors" for shard in rng.shuffled(7, 96, 0, 12, 3, 4) // 4}
    waited = time.monotonic()
    while not ahead <= set(bucket.fetched(home)):
        assert time.monotonic() - waited < 10
        time.sleep(0.01)
    assert len(ahead) == 3


def _draw_once() -> None:
    store = PairStore.open("bucket://a")
    needed, fetch = set((rng.shuffled(7, 96, 0, 1, 3, 4) // 4).tolist()), bucket.Bucket.get_file

    def slow(self, path, *rest, **named):
        if int(path.removesuffix(".safetensors").rpartition("-")[2]) not in needed:
            time.sleep(60)
        fetch(self, path, *rest, **named)

    bucket.Bucket.get_file = slow
    store.draw(7, 0, 1)


def test_a_process_ends_without_what_it_fetches_ahead(remote):
    process = fork.Process(target=_draw_once)
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_damage_at_a_url_is_found_where_it_is_read(remote):
    home, _ = remote
    file = home / "a" / "shard-00005.safetensors"
    file.write_bytes(file.read_bytes()[:200] + bytes(len(file.read_bytes()) - 200))
    with pytest.raises(ValueError, match=r"bucket://a/shard-00005\.safetensors is damaged"):
        PairStore.open("bucket://a").images(20, 24)
    file.unlink()
    with pytest.raises(ValueError, match="bucket://a is incomplete: 23 of 24 shards are there"):
        PairStore.open("bucket://a")


def test_too_small_a_bound_for_the_shards_in_use_is_named(remote, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE_GB", "1e-6")
    with pytest.raises(ValueError, match=r"bucket://a: the shards in use have .*set DISTMATCH_CACHE_GB"):
        PairStore.open("bucket://a")


def test_a_run_with_pairs_at_a_url_is_the_run_with_pairs_on_the_disk(home, tmp_path):
    file = str(tiny.recipe_file(tmp_path, steps=4))
    models = []
    for name, place in (("disk", str(tmp_path / "pairs")), ("url", "bucket://pairs")):
        distillation.distil(load_recipe(file, [f"pairs.path={place}"]), tmp_path / name, tmp_path)
        models.append(torch.cat([p.flatten() for p in load_model(tmp_path / name / "model")[0].parameters()]))
    assert torch.equal(*models)
    assert len(Folder("bucket://pairs").sizes()) == 4


def test_pairs_that_are_all_there_are_told_in_one_line(tmp_path, capsys):
    recipe = load_recipe(str(tiny.recipe_file(tmp_path)))
    subject = subjects.subject(recipe)
    recipe_build.pair_store(recipe, subject, tmp_path)
    capsys.readouterr()
    recipe_build.pair_store(recipe, subject, tmp_path)
    told = capsys.readouterr().err
    assert told.startswith(f"pairs: all {recipe.pairs.count} are there, in ")
    assert "/s" not in told
