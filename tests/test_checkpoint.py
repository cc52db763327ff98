"""Checkpoints: atomic, exact, pruned, and clear about damage."""

import json
import shutil

import pytest
import tiny
import torch

from distmatch.checkpoint import Checkpoints, write_atomic
from distmatch.optim import Optimizer


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
    Checkpoints(tmp_path, {"network": network, "optimizer": optimizer}).save(3, {"seconds": 1.5})
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
        checkpoints.save(step)
        if checkpoints.improves(score):
            checkpoints.mark_best(step, score)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == {"step": 2, "score": 1.0}
    shutil.rmtree(checkpoints.path(2))  # a best one that is gone does not stand in the way of the next
    assert checkpoints.improves(9.0)


def test_damage_is_named_with_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    path = checkpoints.save(7)
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"step-00000007 is damaged.*Delete it to continue"):
        checkpoints.load()
    shard.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load()
    checkpoints.save(8)
    (checkpoints.path(8) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load()


def test_a_save_that_was_killed_is_none(tmp_path):
    """What lies there of it, at any point, is neither found nor in the way."""
    checkpoints = Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)})
    checkpoints.save(3)
    unfinished = tmp_path / ".step-00000004"
    unfinished.mkdir()
    (unfinished / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [3]
    (tmp_path / "step-00000002").mkdir()  # half deleted
    assert checkpoints.steps() == [3]
    assert checkpoints.load()[0] == 3
    checkpoints.save(4)
    assert checkpoints.steps() == [3, 4]
    assert not unfinished.exists()
    assert json.loads((checkpoints.path(4) / "state.json").read_text())["step"] == 4


def test_parts_of_another_run_are_refused(tmp_path):
    Checkpoints(tmp_path, {"network": torch.nn.Linear(4, 4)}).save(1)
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
    for step in (1, 2, 3, 4):
        checkpoints.save(step)
    checkpoints.mark_best(2, 0.5)
    with torch.no_grad():
        network.weight[1, 1] = float("nan")
    checkpoints.save(5)
    checkpoints.verify(4)
    with pytest.raises(ValueError, match=r"network/weight is not finite"):
        checkpoints.verify(5)
    next(checkpoints.path(3).glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"step-00000003 is not complete: network/weight has 0 of 16 numbers"):
        checkpoints.verify(3)

    listed = tiny.command("checkpoints", tmp_path, "--verify")
    assert listed.returncode == 2
    assert "2 of 5 checkpoints cannot be used" in listed.stderr
    assert listed.stdout.count("complete and finite") == 3
    pruned = tiny.command("checkpoints", tmp_path, "--keep", 1)
    assert pruned.returncode == 0
    assert "best, 0.500" in pruned.stdout
    assert checkpoints.steps() == [2, 5]
    assert tiny.command("checkpoints", tmp_path / "none").returncode == 2
