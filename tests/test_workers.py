"""Workers: threads that share a batch. The result is that of one thread, and nothing of one part meets another's."""

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_terms import JUDGE, distiller, recipe
from torch import nn

from distmatch import Images, Info
from distmatch.commands import distillation
from distmatch.data.pair_builder import build
from distmatch.evaluation.measure import score
from distmatch.evaluation.spaces import find_spaces
from distmatch.methods import teach
from distmatch.recipe import settle
from distmatch.recipe.loading import load_recipe
from distmatch.system import machine
from distmatch.system.errors import UserError
from distmatch.system.plain import read_yaml
from distmatch.system.workers import Workers, current, using
from distmatch.training.clock import Clock
from distmatch.training.engine import features
from distmatch.training.gradients import Adder
from distmatch.training.optim import Optimizer

DIGITS = tuple("0123456789")


def test_results_come_in_order_and_few_jobs_are_begun_ahead():
    begun, waits = [], [0.02, 0.0, 0.01, 0.0, 0.0, 0.0]

    def jobs():
        for number in range(6):
            begun.append(number)
            yield number

    def work(number):
        time.sleep(waits[number])
        return number, threading.current_thread().name.startswith("worker"), torch.get_num_threads()

    for expected, (number, in_worker, threads) in enumerate(Workers(2).map(work, jobs())):
        assert (number, in_worker, threads) == (expected, True, 1)
        assert len(begun) <= expected + 3
    assert list(Workers(1).map(lambda n: threading.current_thread() is threading.main_thread(), [0])) == [True]


def test_workers_share_the_cores_evenly(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert list(Workers(2).map(abs, [-1, 2])) == [1, 2]
    assert {*given} == {2}
    list(Workers(8).map(abs, [-1]))
    assert {*given} == {1, 2}  # at least one thread each


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_no_job_begins_and_those_that_run_are_waited_for(error):
    """Whether a job fails or the user interrupts: nothing goes on in the background."""
    running, ended = set(), set()

    def work(number):
        running.add(number)
        time.sleep(0.05)
        if number == 1 and error is ValueError:
            raise error("of job 1")
        ended.add(number)
        return number

    def all_of_them():
        for number in Workers(2).map(work, range(100)):
            if number == 0 and error is KeyboardInterrupt:
                raise error

    with pytest.raises(error):
        all_of_them()
    assert len(running) <= 4
    assert running - ended <= {1}


@pytest.mark.parametrize("own", [(), JUDGE], ids=["paper", "own term with features"])
def test_two_workers_train_as_accumulation_in_two_parts_does(tmp_path, own):
    """To the last bit: the same parts, summed in the same order."""
    changes = ("fake.steps=2", *own)
    two = distiller(tmp_path, "workers=2", *changes)
    parts = distiller(tmp_path, "accumulate=2", *changes)
    for index in range(3):
        assert two.step(index).items() == parts.step(index).items()
    for name, part in two.parts.items():
        assert flat(part.state_dict()) == flat(parts.parts[name].state_dict()), name


def flat(tree):
    """Nested state as plain data, which compares to the last bit."""
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [flat(value) for value in tree]
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def test_more_workers_than_two_give_the_same_each_time_and_one_threads_result_nearly(tmp_path):
    once, again, one = (distiller(tmp_path, f"workers={count}") for count in (4, 4, 1))
    for index in range(2):
        once.step(index), again.step(index), one.step(index)
    for a, b, c in zip(once.student.parameters(), again.student.parameters(), one.student.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-3, atol=1e-5)


def test_gradients_have_their_weights_layout_and_none_is_shared():
    """Two weights can get the very same tensor as gradient; clipping would then scale it twice."""
    network = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    x = torch.randn(4, 4, 8, 8)

    def loss(part):
        return network(part).square().mean() / 2 + (a + b).sum() / 2, {}, None

    parameters = [*network.parameters(), a, b]
    Adder(Clock([], torch.device("cpu"), 2), Workers(2)).add("loss", x.chunk(2), loss, network, parameters)
    expected = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert a.grad.tolist() == b.grad.tolist() == [1.0, 1.0, 1.0]
    assert a.grad.data_ptr() != b.grad.data_ptr()


def test_each_worker_sees_the_features_of_its_own_part():
    network = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    layer = network[0][0]
    barrier = threading.Barrier(2)

    def work(value):
        with features(network, [0]) as found:
            barrier.wait()  # both hooks are registered before either part runs
            output = layer(torch.full((1, 1), value))
            barrier.wait()
            return torch.equal(found[0], output)

    assert list(Workers(2).map(work, [1.0, 2.0])) == [True, True]


def test_network_time_of_workers_counts_as_their_share(monkeypatch):
    """Each thread has a time of its own, which passes only in the network: no pass waits for a core."""
    own = threading.local()

    class Slow(nn.Module):
        def forward(self, x):
            own.seconds = seconds() + 1.0
            return x

    def seconds():
        return getattr(own, "seconds", 0.0)

    monkeypatch.setattr("distmatch.training.clock.time", SimpleNamespace(perf_counter=seconds))
    network = Slow()
    clock = Clock([network], torch.device("cpu"), workers=2)
    list(Workers(2).map(network, [0, 1]))
    assert clock.read()[0] == 1.0
    network(0)
    assert clock.read()[0] == 1.0


def test_pairs_are_the_same_file_for_file(tmp_path):
    from test_pair_builder import contents, spec

    teacher = tiny.teacher()
    settings = spec(teacher, count=40, shard_size=20)
    for count in (1, 2):
        with using(Workers(count)):
            build(tmp_path / f"{count}", settings, teacher, batch=5)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_figures_are_the_same_to_the_last_bit():
    pixels = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spaces, labels = find_spaces("mnist"), torch.arange(300) % 10
    found = []
    for workers in (Workers(1), Workers(2)):
        with using(workers):
            assert current() is workers
            found.append(score(lambda a, b: pixels[a:b], labels, 300, spaces, classes=DIGITS, batch=50, full=False))
        assert current().count == 1
    one, two = found
    assert one == two
    assert len(one) == 4


def test_a_teacher_learns_the_same_but_for_rounding():
    images = Images.of(torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8), torch.arange(30) % 3)
    taught = []
    for workers in (Workers(1), Workers(2)):
        denoiser = tiny.teacher().train()
        optimizer = Optimizer(denoiser.parameters(), lr=1e-3, steps=3)
        settings = teach.Settings(batch=9, label_dropout=0.5)  # 9 does not split evenly
        task = teach.Teaching(denoiser, images, optimizer, Info((1, 8, 8), ("a", "b", "c")), settings, workers)
        losses = [task.step(index)["loss"].item() for index in range(3)]
        taught.append((losses, [p.detach().clone() for p in denoiser.parameters()]))
    (one, weights), (two, others) = taught
    assert one == pytest.approx(two, rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in zip(weights, others, strict=True))


@pytest.fixture
def four_cores(monkeypatch):
    """A machine of four cores on which more workers are better, and bf16 is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(machine, "workers_gain", float)
    monkeypatch.setattr(machine, "bf16_gain", lambda device: 1.6)


def test_auto_is_what_is_faster_and_fits(tmp_path, four_cores, monkeypatch):
    auto = ("precision=auto", "pairs.precision=auto", "device=cpu")
    found = settle.settled(recipe(tmp_path, *auto))
    assert (found.recipe.precision, found.recipe.pairs.precision, found.recipe.workers) == ("bf16", "bf16", 4)
    assert found.said == "bf16 (bf16 is 1.6 times as fast as fp32), 4 workers on 4 cores (4 times as fast as one)"
    assert settle.settled(recipe(tmp_path, "accumulate=2", "device=cpu")).recipe.workers == 2  # batches of 4
    assert settle.settled(recipe(tmp_path, *JUDGE, "device=cpu")).recipe.workers == 1  # not known to be safe
    assert settle.settled(recipe(tmp_path, "workers=3", "device=cpu")).recipe.workers == 3
    monkeypatch.setattr(machine, "workers_gain", lambda count: 1.05)
    monkeypatch.setattr(machine, "bf16_gain", lambda device: 0.05)
    found = settle.settled(recipe(tmp_path, *auto))
    assert (found.recipe.precision, found.recipe.workers) == ("fp32", 1)


def test_each_choice_of_a_run_that_goes_on_is_its_own(tmp_path, four_cores):
    auto = recipe(tmp_path, "precision=auto", "pairs.precision=auto", "device=cpu")
    began = recipe(tmp_path, "precision=fp32", "pairs.precision=fp16", "workers=2", "device=cpu")
    found = settle.settled(auto, began)
    assert (found.recipe.precision, found.recipe.pairs.precision, found.recipe.workers) == ("fp32", "fp16", 2)
    assert found.said == ""


def test_a_precision_that_is_of_the_pairs_alone_is_called_so(tmp_path, four_cores):
    found = settle.settled(recipe(tmp_path, "pairs.precision=auto", "workers=1", "device=cpu"))
    assert (found.recipe.precision, found.recipe.pairs.precision) == ("fp32", "bf16")
    assert found.said == "pairs in bf16 (bf16 is 1.6 times as fast as fp32)"


@pytest.mark.parametrize(
    ("has", "chosen", "said"),
    [(True, "bf16", "bf16 (this GPU has it)"), (False, "fp32", "fp32 (this GPU has no bf16)")],
)
def test_what_is_chosen_for_a_gpu_is_said_too(has, chosen, said, monkeypatch):
    monkeypatch.setattr(machine, "bf16_gain", inspect.unwrap(machine.bf16_gain))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert machine.faster_precision(torch.device("cuda")) == machine.Choice(chosen, said)
    assert machine.faster_precision(torch.device("mps")) == machine.Choice("fp32")


def test_workers_divide_batch_and_cores_and_the_less_plain_way_must_be_worth_it(four_cores, monkeypatch):
    assert [machine.faster_workers(most).value for most in (12, 6, 3, 1)] == [4, 2, 1, 1]
    monkeypatch.setattr(machine, "bf16_gain", lambda device: 1.05)
    assert machine.faster_precision(torch.device("cpu")).value == "fp32"
    monkeypatch.setattr(machine, "workers_gain", lambda count: 1.05)
    assert machine.faster_workers(12) == machine.Choice(1, "one worker on all 4 cores (4 are no faster)")


def test_a_busy_machine_chooses_the_same_precision(monkeypatch):
    """What waits for a core is not slower: bf16 computes less here, and takes longer by the clock on the wall."""
    threads = []

    def backward(network, x):
        threads.append(torch.get_num_threads())
        if torch.is_autocast_enabled("cpu"):
            time.sleep(0.02)
        else:
            until = time.thread_time() + 0.002
            while time.thread_time() < until:
                pass

    monkeypatch.setattr(machine, "_backward", backward)
    counts = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert inspect.unwrap(machine.bf16_gain)(torch.device("cpu")) > 1
    assert {*threads} == {1}
    assert counts == [3, 1, 3]


def test_workers_are_refused_where_there_can_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(settle.parallel, "world", lambda: 2)
    on_first = inspect.unwrap(settle.settled)
    assert on_first(recipe(tmp_path)).recipe.workers == 1
    with pytest.raises(UserError, match="workers=2: workers share the cores of a CPU within one process"):
        on_first(recipe(tmp_path, "workers=2"))


def test_a_batch_that_the_workers_cannot_share_is_named(tmp_path):
    with pytest.raises(UserError, match=r"match\.batch 4 is not a multiple of accumulate 1 times 3 workers"):
        distillation.distil(recipe(tmp_path, "workers=3"), tmp_path / "run", tmp_path)


def test_a_run_goes_on_as_it_began_whatever_is_faster_now(tmp_path, monkeypatch, four_cores):
    """The same weights to the last bit as without the interruption, though the machine's answer has changed."""
    file = str(tiny.recipe_file(tmp_path, steps=6))
    auto = load_recipe(file, [f"pairs.path={tmp_path / 'pairs'}", "device=cpu"])
    distillation.distil(auto, tmp_path / "whole", tmp_path)
    with tiny.stopped_before(5):
        distillation.distil(auto, tmp_path / "parts", tmp_path)
    monkeypatch.setattr(machine, "workers_gain", lambda count: 0.5)
    distillation.distil(auto, tmp_path / "parts", tmp_path)
    assert read_yaml(tmp_path / "parts" / "recipe.yaml")["workers"] == 4
    whole, parts = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_stages_share_what_all_their_batches_allow(tmp_path, four_cores):
    stages = [{"until": 4}, {"until": 12, "change": {"match.batch": 6}}]
    found = settle.settled(recipe(tmp_path, "device=cpu", stages=stages))
    assert found.recipe.workers == 2  # batches of 4 and 6
