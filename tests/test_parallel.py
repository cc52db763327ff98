"""Two processes for one: results in order, and figures that are the same to the last bit."""

import json
import os
import socket
from collections import Counter
from functools import partial

import pytest
import tiny
import torch
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distmatch.commands.eval import Options, evaluate
from distmatch.evaluation import measure, spaces
from distmatch.models.classifier import Classifier
from distmatch.models.folder import Info, save_model
from distmatch.system import parallel
from distmatch.system.errors import UserError


def _enter(rank: int, world: int, port: int, task, *arguments) -> None:
    torch.set_num_threads(1)  # a forked child cannot use its parent's thread pool
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    task(*arguments)


def together(world: int, task, *arguments) -> None:
    """Call `task(*arguments)` in `world` processes, with the variables that `torchrun` sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, they know what the test has patched and need not import torch again.
    start_processes(_enter, (world, port, task, *arguments), nprocs=world, start_method="fork")


class Collectives(TorchDispatchMode):
    """The collectives that are called, by name: how often, and the bytes, but for single numbers, that they give or
    take whole."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("c10d::") and "barrier" not in name:
            tensors = args[1] if "scatter" in name else args[0]  # (output, input); (tensors); (output, input)
            self.calls[name] += 1
            sizes = (t.numel() * t.element_size() for t in tree_iter(tensors) if t.dim())  # a norm has no dimension
            self.bytes[name] += sum(sizes)
        return func(*args, **(kwargs or {}))


def _mistaken() -> None:
    raise UserError(f"a mistake of {parallel.rank()}")


def _work(folder, count: int) -> None:
    with parallel.process_group():
        done = []

        def task(job: int) -> tuple[int, int, torch.Tensor]:
            done.append(job)
            return job, parallel.rank(), torch.full((job,), job)

        results = list(parallel.shared(task, range(count)))
        chosen = parallel.on_first(lambda: [parallel.broadcast(parallel.rank()), torch.ones(3)])()  # one in another
        with pytest.raises(ValueError, match="mistake of 0"):
            parallel.on_first(_mistaken)()
        assert parallel.world() == int(os.environ["WORLD_SIZE"])
        torch.save({"done": done, "results": results, "chosen": chosen}, folder / f"{parallel.rank()}.pt")
    assert (parallel.rank(), parallel.world()) == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_jobs_are_shared_and_their_results_come_to_the_first_in_order(tmp_path, count):
    together(3, _work, tmp_path, count)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [f["done"] for f in found] == [list(range(rank, count, 3)) for rank in range(3)]
    assert [(job, rank) for job, rank, _ in found[0]["results"]] == [(job, job % 3) for job in range(count)]
    assert all(torch.equal(value, torch.full((job,), job)) for job, _, value in found[0]["results"])
    assert found[1]["results"] == found[2]["results"] == []
    assert all(f["chosen"][0] == 0 for f in found)


def _meet(folder, own: bool) -> None:
    with parallel.process_group():
        out = folder / (str(parallel.rank()) if own else "one") / "run"
        if own:
            with pytest.raises(ValueError, match=f"{out} is not the same folder for all 2 processes"):
                parallel.same_folder(out)
        else:
            parallel.same_folder(out)
            parallel.barrier()
            assert list(out.iterdir()) == []


@pytest.mark.parametrize("own", [True, False])
def test_processes_notice_that_each_has_a_folder_of_its_own(tmp_path, own):
    together(2, _meet, tmp_path, own)


def test_one_process_does_it_all():
    assert list(parallel.shared(lambda job: job**2, range(4))) == [0, 1, 4, 9]
    assert parallel.on_first(lambda: 3)() == 3
    with parallel.process_group():
        assert (parallel.rank(), parallel.world()) == (0, 1)


def test_any_number_of_processes_measure_what_one_does_to_the_last_bit(tmp_path, monkeypatch, capfd):
    torch.manual_seed(0)
    Classifier(1, (8, 8), ("a", "b", "c"), (8, 12, 16)).eval().save(tmp_path / "c" / "classifier")
    save_model(tmp_path / "student", tiny.teacher(), Info((1, 8, 8), ("a", "b", "c"), times=(80.0,)))
    images = tiny.image_folder(tmp_path / "images", per_class=30)
    monkeypatch.setattr(measure, "speed", lambda *_: {})
    monkeypatch.setattr(spaces, "reference", partial(spaces.reference, cache=None))
    rows = []
    for world in (1, 2, 3):
        out = tmp_path / f"{world}.json"
        # 110 images are batches of 16 and one of 14, seven in all: no process count here divides them.
        options = Options(
            n=110, guidance=1.0, features=str(tmp_path / "c"), reference=str(images), batch=16, out=out, device="cpu"
        )
        together(world, evaluate, str(tmp_path / "student"), options)
        rows += json.loads(out.read_text())["rows"]
        assert capfd.readouterr().out.count("Frechet distance (pooled)") == 1
    assert rows[:2] == rows[2:4] == rows[4:]
    kinds = ("frechet", "kernel_distance", "precision", "recall")
    assert {f"{kind}/{space}" for kind in kinds for space in ("pooled", "pixels")} | {"accuracy"} <= rows[0].keys()
    assert 0 < rows[0]["accuracy"] < 1
    assert rows[0]["frechet/pooled"] > 0
