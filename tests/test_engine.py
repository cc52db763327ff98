"""Several processes against one: the same losses and weights, from any checkpoint, replicated or sharded."""

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from forked import Forked
from test_parallel import together
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distmatch.commands import cli, distillation
from distmatch.models.diffusers.stable import StableUNet
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.edm.networks import SongUNet
from distmatch.models.folder import load_model
from distmatch.models.library import find_model
from distmatch.recipe.loading import load_recipe
from distmatch.system import parallel
from distmatch.training.engine import blocks

STEPS = 4
FULL = {
    "match": {"batch": 12, "pairs": True},
    "regress": {"batch": 6, "weight": 1.0},
    "critic": {"lr": 1e-3, "steps": 2},
    "log": {"every": 1},
    "checkpoint": {"every": STEPS},
    "generator": {"lr": 1e-3},
}


def _train(file: str, runs: list[tuple[tuple[str, ...], Path, int | None]]) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        for changes, out, stop in runs:
            with nullcontext() if stop is None else tiny.stopped_before(stop):
                distillation.distil(load_recipe(file, changes), out, out.parent)


def train(folder: Path, *runs: tuple, world: int = 1) -> None:
    """Runs of the tiny recipe, one after another in forked processes: name, changes, the step before which it stops."""
    file = folder / "tiny.yaml"
    if not file.exists():
        tiny.recipe_file(folder, **FULL, steps=STEPS)
    pairs = f"pairs.path={folder / 'pairs'}"
    together(world, _train, str(file), [((pairs, *changes), folder / name, stop) for name, changes, stop in runs])


def losses(out) -> list[dict]:
    keys = ("step", "match/student", "regress/student", "match/fake", "gradient_norm", "fake_gradient_norm")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys} for line in lines]


def weights(out) -> torch.Tensor:
    return torch.cat([p.flatten() for p in load_model(out / "model")[0].state_dict().values()])


def same(a, b, rel: float, atol: float) -> None:
    """The same run but for rounding: every logged figure of every step, and the final weights."""
    assert [line["step"] for line in losses(a)] == [line["step"] for line in losses(b)] == list(range(1, STEPS + 1))
    for one, other in zip(losses(a), losses(b), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6), one["step"]
    assert (weights(a) - weights(b)).abs().max() < atol
    start = load_model(a.parent / "teacher")[0].state_dict()
    assert (weights(a) - torch.cat([p.flatten() for p in start.values()])).abs().max() > 100 * atol


OFTEN, LONGER = "checkpoint.every=1", ("steps=9", "checkpoint.every=3", "log.every=3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run `alone` in one process."""
    folder = tmp_path_factory.mktemp("engine")
    train(folder, ("alone", (), None))
    return folder


@pytest.fixture(scope="module")
def two(alone):
    """Besides, runs in two processes."""
    hows = ("ddp", "fsdp")
    train(
        alone,
        *((how, (f"parallel={how}",), None) for how in hows),
        *((f"{how}3", (f"parallel={how}", "accumulate=3"), None) for how in hows),
        ("moving", ("parallel=fsdp", OFTEN), 2),
        ("straight", LONGER, None),
        world=2,
    )
    return alone


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_follow_one(two, how):
    """Half of each batch each, both terms and `concat(x, x_ref)`, two updates of the fake score: four steps."""
    same(two / "alone", two / how, rel=2e-3, atol=3e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulation_in_two_processes(two, how):
    same(two / "alone", two / f"{how}3", rel=2e-3, atol=3e-5)


def test_a_run_goes_on_with_other_processes_and_another_way_of_spreading(two):
    """Two sharded, one alone, three replicated: as the undisturbed run."""
    out = two / "moving"
    assert max(distillation.Checkpoints(out / "checkpoints", {}).steps()) == 2
    assert len(list((out / "checkpoints" / "step-00000002").glob("*.safetensors"))) == 2
    train(two, ("moving", ("parallel=ddp", OFTEN), 3))
    assert max(distillation.Checkpoints(out / "checkpoints", {}).steps()) == 3
    train(two, ("moving", ("parallel=ddp", OFTEN), None), world=3)
    same(two / "alone", out, rel=2e-3, atol=3e-5)


def test_batches_that_cannot_be_shared_are_named(alone):
    with pytest.raises(Exception, match=r"regress.batch 6 is not a multiple of accumulate 1 times 4 processes"):
        train(alone, ("four", (), None), world=4)


def test_blocks_are_the_networks_own(tmp_path):
    song = SongUNet(img_resolution=8, in_channels=3, out_channels=3, model_channels=16, num_blocks=1)
    assert len(blocks(song)) == len([m for m in (*song.enc.values(), *song.dec.values()) if list(m.parameters())])
    write_tiny_sd(tmp_path)
    net = find_model(f"diffusers:{tmp_path}", "teacher")[0].net
    assert type(net) is StableUNet
    middle = net.unet.mid_block
    assert set(blocks(net)) == {*net.unet.down_blocks, *net.unet.up_blocks, *middle.resnets, *middle.attentions}


def launch(folder, out, changes, restarts: int) -> Forked:
    """`distmatch train` in two processes, forked by what `torchrun` is made of, without waiting."""

    def work() -> None:
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise

    def run() -> None:
        about = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": out.name, "start_method": "fork"}
        elastic_launch(LaunchConfig(1, 1, 2, max_restarts=restarts, monitor_interval=0.2, **about), work)()

    arguments = ("distmatch", "train", folder / "tiny.yaml", f"pairs.path={folder / 'pairs'}", *changes, "-o", out)
    return Forked(run, *arguments, alone=True)


def workers(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
def test_a_killed_process_ends_the_job_with_a_message_and_a_restart_finishes_it(two):
    """Without restarts the job is down at once; with one it goes on from the checkpoint to the undisturbed weights."""
    for restarts in (0, 1):
        out = two / f"killed{restarts}"
        job = launch(two, out, LONGER, restarts)
        job.wait(lambda out=out: list((out / "checkpoints").glob("step-*/state.json")))
        os.kill(workers(job.pid)[-1], signal.SIGKILL)
        began = time.monotonic()
        status, errors = job.end(), job.stderr
        if restarts:
            assert status == 0, errors
            assert torch.equal(weights(out), weights(two / "straight"))
        else:
            assert status != 0
            assert time.monotonic() - began < 60
            assert "lost another process of this job" in errors or "SIGKILL" in errors
            assert not (out / "model").exists()
