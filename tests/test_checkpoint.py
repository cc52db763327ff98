"""Checkpoints: atomic, exact, written while the run goes on, pruned, and clear about damage."""

import json
import resource
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import tiny
import torch
from forked import command
from test_parallel import together

from distmatch.system import parallel
from distmatch.system.digests import known_digest, load_file, read_file, save_file
from distmatch.system.files import write_atomic, write_json
from distmatch.system.plain import read_json
from distmatch.training import checkpoint, engine, shards, single
from distmatch.training.checkpoint import Checkpoints
from distmatch.training.optim import Optimizer


def trained(steps: int):
    network = tiny.teacher().requires_grad_(True)
    optimizer = Optimizer(network.parameters(), lr=1e-2, warmup=3)
    for i in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        network(x, torch.ones(4)).square().mean().backward()
        optimizer.step(i)
    return network, optimizer


def test_loading_continues_bit_for_bit(tmp_path):
    network, optimizer = trained(3)
    saved = Checkpoints(tmp_path, {"network": network, "optimizer": optimizer})
    saved.save(3, {"seconds": 1.5})
    saved.wait()
    other, other_optimizer = trained(0)
    loaded = Checkpoints(tmp_path, {"network": other, "optimizer": other_optimizer}).load()
    assert loaded == (3, {"seconds": 1.5})
    for pair in ((network, optimizer), (other, other_optimizer)):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
        pair[0](x, torch.ones(4)).square().mean().backward()
        pair[1].step(3)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_n_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(1, 1)}, keep=2)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0)):
        checkpoints.save(step, best=score if checkpoints.improves(score) else None)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == {"step": 2, "score": 1.0}
    shutil.rmtree(checkpoints.path(2))  # a best one that is gone does not stand in the way of the next
    assert checkpoints.improves(9.0)


def test_what_the_user_has_put_beside_them_stays(tmp_path):
    kept = [tmp_path / name for name in ("step-00000001.bak", "step-notes", ".step-list.swp")]
    for folder in (*kept[:2], tmp_path / ".step-00000001" / "stray"):  # in the last, a save was killed
        folder.mkdir(parents=True)
    kept[2].touch()
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(1, 1)}, keep=1)
    for step in (1, 2):
        checkpoints.save(step)
    checkpoints.wait()
    assert set(tmp_path.iterdir()) == {*kept, checkpoints.path(2)}


def test_damage_is_named_with_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    checkpoints.save(7)
    checkpoints.wait()
    (shard,) = checkpoints.path(7).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"step-00000007 is damaged.*Delete it to continue"):
        checkpoints.load()
    shard.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load()
    checkpoints.save(8)
    checkpoints.wait()
    (checkpoints.path(8) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load()


def test_what_is_missing_in_a_checkpoint_without_digests_is_damage(tmp_path):
    """As earlier versions wrote them: no tensor may stay as it is."""
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    checkpoints.save(7)
    checkpoints.wait()
    header = read_json(checkpoints.path(7) / "state.json", dict)
    write_json(checkpoints.path(7) / "state.json", {name: header[name] for name in ("step", "meta", "tree", "shapes")})
    assert checkpoints.load() == (7, {})
    (shard,) = checkpoints.path(7).glob("*.safetensors")
    save_file({"network/weight": load_file(shard)["network/weight"]}, shard)
    with pytest.raises(ValueError, match=r"is damaged \(network/bias is missing\)"):
        checkpoints.load()
    shard.unlink()
    for read in (checkpoints.load, lambda: checkpoints.verify(7)):
        with pytest.raises(ValueError, match=r"is damaged \(its tensors are missing\)"):
            read()


def test_every_type_and_form_of_tensor_goes_through_either_way(tmp_path, monkeypatch):
    """Written by one process alone or by a group, and read by either."""
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        **{str(dtype): torch.arange(3).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.uint8, torch.bool)},
        **{"number": torch.tensor(3.5), "none": torch.empty(0, 4), "view": whole[2:], "turned": whole.t()},
        "tied": whole[2:],
    }
    for writes in (False, True):
        monkeypatch.setattr(parallel, "grouped", lambda writes=writes: writes)
        saved = Checkpoints(tmp_path / str(writes), {"part": Held(tensors)})
        saved.save(1)
        saved.close()
        for reads in (False, True):
            monkeypatch.setattr(parallel, "grouped", lambda reads=reads: reads)
            found = Held({name: torch.zeros_like(value) for name, value in tensors.items()})
            Checkpoints(tmp_path / str(writes), {"part": found}).load()
            assert equal(found.tensors, tensors)


class Held:
    """A part of a checkpoint that is nothing but its tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, tensors):
        self.tensors = tensors


def test_a_save_that_was_killed_is_none(tmp_path):
    """What lies there of it, at any point, is neither found nor in the way."""
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    checkpoints.save(3)
    checkpoints.wait()
    unfinished = tmp_path / ".step-00000004"
    unfinished.mkdir()
    (unfinished / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [3]
    (tmp_path / ".step-00000009").mkdir()  # of a save at another step
    (tmp_path / "step-00000002").mkdir()  # half deleted
    assert checkpoints.steps() == [3]
    assert checkpoints.load() == (3, {})
    checkpoints.save(4)
    assert checkpoints.steps() == [3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}
    assert json.loads((checkpoints.path(4) / "state.json").read_text())["step"] == 4


def test_parts_of_another_run_are_refused(tmp_path):
    saved = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    saved.save(1)
    saved.wait()
    with pytest.raises(ValueError, match="holds network; this run needs fake, network"):
        Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4), "fake": torch.nn.Linear(4, 4)}).load()
    with pytest.raises(ValueError, match="does not fit this run"):
        Checkpoints(tmp_path, {"network": torch.nn.Linear(5, 4)}).load()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    write_atomic(file, lambda p: p.write_text("old"))

    def fail(path):
        path.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_atomic(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_verify_reads_every_byte_and_prune_keeps_the_best(tmp_path):
    network = torch.nn.Linear(4, 4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"network": network}, keep=9)
    checkpoints.save(1)
    checkpoints.wait()
    assert len(command("checkpoints", tmp_path).stdout.splitlines()[1].split("┃")) == 6  # four columns, none empty
    for step in (2, 3, 4):
        checkpoints.save(step, best=0.5 if step == 2 else None)
    checkpoints.wait()
    with torch.no_grad():
        network.weight[1, 1] = float("nan")
    checkpoints.save(5)
    checkpoints.wait()
    checkpoints.verify(4)
    with pytest.raises(ValueError, match=r"network/weight is not finite"):
        checkpoints.verify(5)
    next(checkpoints.path(3).glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"step-00000003 is damaged \(shard-\S+ is missing\)"):
        checkpoints.verify(3)

    listed = command("checkpoints", tmp_path, "--verify")
    assert listed.returncode == 2
    assert "2 of 5 checkpoints cannot be used" in listed.stderr
    assert listed.stdout.count("complete and finite") == 3
    pruned = command("checkpoints", tmp_path, "--keep", 1)
    assert pruned.returncode == 0
    assert "best, 0.500" in pruned.stdout
    assert checkpoints.steps() == [2, 5]
    assert command("checkpoints", tmp_path / "none").returncode == 2


@contextmanager
def held(monkeypatch):
    """Whatever is saved within it is not written before its end."""
    go, write = threading.Event(), single.save_file

    def waiting(*arguments):
        assert go.wait(30)
        write(*arguments)

    monkeypatch.setattr(single, "save_file", waiting)
    try:
        yield
    finally:
        go.set()


class Parts(dict):
    """Tensors by name."""

    def state_dict(self):
        return self

    def load_state_dict(self, state):
        self.update(state)


def clones(part) -> dict[str, torch.Tensor]:
    """The tensors of a part's state, whole, as they are now."""
    found: dict[str, torch.Tensor] = {}
    checkpoint._flatten(part.state_dict(), "", found)
    return {name: engine.whole(value).clone() for name, value in found.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    """Training goes on, in place, before the thread has written a byte; twice, since the copies' memory is reused."""
    network, optimizer = trained(3)
    checkpoints = Checkpoints(tmp_path, {"network": network, "optimizer": optimizer}, keep=9)
    states = []
    for step in (3, 4):
        states.append({"network": clones(network), "optimizer": clones(optimizer)})
        with held(monkeypatch):
            checkpoints.save(step)
            network(torch.ones(4, 1, 8, 8), torch.ones(4)).square().mean().backward()
            optimizer.step(step)
            with torch.no_grad():
                for value in (*network.parameters(), *network.buffers()):
                    value.mul_(3)
            assert checkpoints._steps() == [3][: step - 3]
            assert not equal(clones(network), states[-1]["network"])
            assert not equal(clones(optimizer), states[-1]["optimizer"])
        checkpoints.wait()
    for step, state in zip((3, 4), states, strict=True):
        other, other_optimizer = trained(1)
        assert Checkpoints(tmp_path, {"network": other, "optimizer": other_optimizer}).load(step) == (step, {})
        if step == 4:  # the one before it is older than its own
            assert not equal(states[0]["network"], clones(other))
        assert equal(state["network"], clones(other))
        assert equal(state["optimizer"], clones(other_optimizer))


def test_slices_and_tied_weights_are_tensors_of_their_own(tmp_path):
    whole = torch.arange(12.0)
    parts = Parts(slice=whole[3:5], first=whole, second=whole, turned=whole.view(3, 4).T, none=torch.zeros(0, 3))
    checkpoints = Checkpoints(tmp_path, {"network": parts})
    checkpoints.save(1)
    checkpoints.wait()
    checkpoints.verify(1)
    (shard,) = checkpoints.path(1).glob("*.safetensors")
    assert shard.stat().st_mode & 0o777 == 0o644
    assert shard.stat().st_size < 1500  # the slice is not saved with what it is of
    found = Parts({name: torch.full_like(value, -1).contiguous() for name, value in parts.items()})
    Checkpoints(tmp_path, {"network": found}).load()
    assert equal(parts, found)


def test_a_single_process_writes_what_pytorch_would_and_reads_it(tmp_path):
    """All of it, metadata included: a run goes on in a group of processes, and the other way round."""
    network, optimizer = trained(2)
    tensors, _ = Checkpoints(tmp_path, {"network": network, "optimizer": optimizer})._state()
    files = []
    for how in (single, shards):
        how.save(tensors, tmp_path / how.__name__ / ".step-00000002", lambda: None).result()
        (file,) = (tmp_path / how.__name__ / ".step-00000002").iterdir()
        files.append(file)
    assert files[0].name == files[1].name
    assert read_file(files[0])[1] == read_file(files[1])[1]
    assert known_digest(files[0]) == known_digest(files[1]) is not None
    found = [{name: torch.full_like(value, 7) for name, value in tensors.items()} for _ in files]
    single.read(found[0], files[1], None)
    shards.read(found[1], files[0].parent)
    assert equal(found[0], tensors)
    assert equal(found[1], tensors)


def _slowly(seconds: float) -> None:
    write = single.save_file

    def slow(*arguments):
        time.sleep(seconds)
        write(*arguments)

    single.save_file = slow


def _sharded(folder, how: str) -> None:
    """Save, go on at once with collectives in the main thread, and compare what is loaded to the bit."""
    _slowly(0.2)
    with parallel.process_group():
        network = tiny.teacher().requires_grad_(True)
        spread = engine.spread(network, how, "fp32", (torch.ones(1, 1, 8, 8), torch.ones(1)))
        optimizer = Optimizer(network.parameters(), lr=1e-2, warmup=3)
        counter = torch.arange(1000.0)
        parts = {"network": network, "optimizer": optimizer, "counter": Parts(counter=counter)}
        checkpoints = Checkpoints(folder, parts, keep=9)

        def step(i: int) -> None:
            spread(torch.full((2, 1, 8, 8), parallel.rank() + 1.0), torch.ones(2)).square().mean().backward()
            optimizer.step(i)
            counter.add_(1)

        states, steps = [], 4
        for i in range(steps):
            step(i)
            if i % 2:
                states.append({name: clones(part) for name, part in parts.items()})
                checkpoints.save(i + 1)
                assert checkpoints._saving is not None
                assert not checkpoints._saving[1].done()
        checkpoints.close()
        assert checkpoints.steps() == [2, 4]
        for i, state in zip((2, 4), states, strict=True):
            checkpoints.verify(i)
            checkpoints.load(i)
            assert {name: clones(part) for name, part in parts.items()}.keys() == state.keys()
            assert all(equal(state[name], clones(part)) for name, part in parts.items())
            assert counter[0] == i
        sizes = [file.stat().st_size for file in sorted(checkpoints.path(4).glob("*.safetensors"))]
        assert len(sizes) == 2
        assert max(sizes) < 1.3 * min(sizes)  # each has written its half
        parallel.barrier()
        if parallel.rank() == 0:
            shard = max(checkpoints.path(4).glob("*.safetensors"))
            content = bytearray(shard.read_bytes())
            content[-3] ^= 4
            shard.write_bytes(content)
        parallel.barrier()
        with pytest.raises(ValueError, match=r"step-00000004 is damaged .*shard-.* its digest is not that"):
            checkpoints.load(4)  # each compares one of them; all are told
        checkpoints.load(2)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_two_processes_save_is_the_state_at_the_call(tmp_path, how):
    together(2, _sharded, tmp_path, how)


@contextmanager
def full_disk():
    """No file can become longer than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_the_writing_thread_is_raised_at_the_next_call(tmp_path):
    network = torch.nn.Linear(4, 4)
    checkpoints = Checkpoints(tmp_path / "run", {"network": network})
    before = clones(network)
    checkpoints.save(1)
    checkpoints.wait()
    torch.nn.init.zeros_(network.weight)
    message = r"step-00000002 could not be saved \(.*too large.*\). Make room in .*run, .* from step 1, which is kept"
    for ask in (checkpoints.wait, lambda: checkpoints.save(3), checkpoints.load, checkpoints.steps, checkpoints.close):
        with full_disk():
            checkpoints.save(2)
            assert checkpoints._saving is not None
            assert checkpoints._saving[1].exception() is not None  # by now it has happened
        with pytest.raises(ValueError, match=message):
            ask()
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000001"]  # its room is free again
    checkpoints.verify(1)
    assert checkpoints.load() == (1, {})
    assert equal(before, clones(network))


def test_an_error_behind_the_shards_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Not even one that has all of its shards: `state.json`, which the first process writes, is the last of it."""
    checkpoints = Checkpoints(tmp_path / "run", {"network": torch.nn.Linear(4, 4)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    checkpoints.save(2)
    with pytest.raises(ValueError, match=r"No space left on device\). Make room in .* goes on from the beginning"):
        checkpoints.wait()
    assert checkpoints.steps() == []
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "run", {"network": torch.nn.Linear(4, 4)})
    checkpoints.save(1)
    with pytest.raises(ValueError, match=r"Not a directory.*Make room in .*run, or make it writable"):
        checkpoints.steps()


def _one_disk_is_full(folder) -> None:
    with parallel.process_group():
        checkpoints = Checkpoints(folder, {"network": torch.nn.Linear(4, 4)})
        checkpoints.save(1)
        if parallel.rank() == 1:
            checkpoints.wait()
            single.save_file = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        checkpoints.save(2)
        with pytest.raises(ValueError, match=r"step-00000002 could not be saved \(.*No space left"):
            checkpoints.save(3)
        assert checkpoints.steps() == [1]
        checkpoints.close()


def test_an_error_of_one_process_is_raised_in_all(tmp_path):
    together(2, _one_disk_is_full, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
