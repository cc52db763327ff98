"""Gradients by replaying: the inputs' copies, and autograd's gradients. Real graphs: see benchmarks/gpu.py."""

from dataclasses import dataclass

import graphs
import pytest
import torch
from torch import Tensor

from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError
from distmatch.training.replay import Pool, Replay, mapped, tensors


@dataclass(frozen=True)
class Pair:
    x: Tensor
    name: str
    more: tuple[Tensor | None, ...] = ()


def test_gradients_are_autograds():
    layer = torch.nn.Linear(3, 1)
    x = torch.randn(5, 3)

    def work(x):
        loss = layer(x).square().mean()
        return loss, {"loss": loss}, layer(x)

    losses, made = Replay(work, layer.parameters())(x)
    expected = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
    assert not losses["loss"].requires_grad
    assert torch.equal(made, layer(x))
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_replay_sees_new_inputs_and_weights_and_no_other_number():
    layer, factor = torch.nn.Linear(3, 1), [2.0]

    def work(x):
        loss = factor[0] * layer(x).square().mean()
        return loss, {"loss": loss}, layer(x)

    replay = Replay(work, layer.parameters())
    with graphs.on_a_cpu():
        for size, now in ((5, 2.0), (4, 2.0), (5, 7.0), (5, 7.0)):  # one graph for each shape
            x, factor[0] = torch.randn(size, 3), now
            losses, made = replay(x)
            expected = 2 * layer(x).square().mean()  # the number stays as it was recorded
            assert torch.equal(losses["loss"], expected)
            assert torch.equal(made, layer(x))
            for parameter, gradient in zip(
                layer.parameters(), torch.autograd.grad(expected, [*layer.parameters()]), strict=True
            ):
                torch.testing.assert_close(parameter.grad, gradient)
                parameter.grad = None
                parameter.data.mul_(1.5)
    assert [recorded.graph.replays for recorded in replay._graphs.values()] == [3, 1]


def test_another_precision_of_the_inputs_is_another_graph():
    replay = Replay(lambda x: (None, {}, x / 3), [])
    with graphs.on_a_cpu():
        for x in (torch.ones(2), torch.ones(2, dtype=torch.float64)):
            torch.testing.assert_close(replay(x)[1], x / 3, rtol=0, atol=0)


def test_graphs_of_one_pool_overwrite_no_result_of_another():
    """Each replay spoils all memory of the others: see `graphs.Graph.overwrite`."""
    layer, pool = torch.nn.Linear(3, 1), Pool()
    student = Replay(lambda x: (layer(x).sum(), {"loss": layer(x).sum()}, layer(x)), layer.parameters(), pool)
    fake = Replay(lambda x: (None, {}, x + layer(x)), layer.parameters(), pool)
    alone = Replay(lambda x: (None, {}, 2 * x), layer.parameters())
    with graphs.on_a_cpu():
        x, y = torch.randn(5, 3), torch.randn(4, 3)
        expected = layer(x).detach()
        losses, made = student(x)
        for parameter in layer.parameters():  # used, as an optimizer would
            assert parameter.grad is not None
            parameter.grad = None
        for order in ((x, y), (y, x)):
            twice = alone(y)[1]
            for one in order:
                assert torch.equal(fake(one)[1], one + layer(one))
            assert torch.equal(twice, 2 * y)
        assert torch.equal(made, expected)
        assert torch.equal(losses["loss"], expected.sum())
        shared = [one.graph.sharing for replay in (student, fake) for one in replay._graphs.values()]
        assert [len(graphs) for graphs in shared] == [3, 3, 3]
        student(x)
        with pytest.raises(AssertionError):  # the student's gradients are still to be used
            fake(x)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist()[0],
        lambda x: x.cpu().sum(),
        lambda x: x[x > 0].sum(),
        lambda x: x if x.any() else 2 * x,
    ],
    ids=["item", "tolist", "cpu", "mask", "if"],
)
def test_what_asks_the_gpu_for_a_number_cannot_be_recorded(asks):
    weight = torch.nn.Parameter(torch.ones(3))
    replay = Replay(lambda x: ((weight * x * asks(x)).sum(), {}, None), [weight])
    said = r"cannot be recorded as .*\(RuntimeError: operation not .* capturing, at .*\.py:\d+\); use cuda_graphs=false"
    with graphs.on_a_cpu(), pytest.raises(UserError, match=said):
        replay(torch.ones(3))
    assert torch.ones(1).tolist() == [1.0]


def test_the_first_error_of_a_recording_is_shown_not_that_of_its_end(monkeypatch):
    class Ends(graphs.Recording):
        def __exit__(self, *error):
            super().__exit__(*error)
            raise RuntimeError("operation failed due to a previous error during capture")

    calls = []

    def work(x):
        calls.append(x)
        if len(calls) > 3:  # after the rounds without recording
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore lines")
        return None, {}, x

    with graphs.on_a_cpu():
        monkeypatch.setattr(torch.cuda, "graph", Ends)
        with pytest.raises(UserError, match=r"\(RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED, at ") as caught:
            Replay(work, [])(torch.ones(3))
    assert str(caught.value.__cause__).startswith("CUBLAS_STATUS_NOT_SUPPORTED")


def test_all_tensors_of_a_tree_are_found_in_order_and_nothing_else_changes():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = {"pair": Pair(a, "one", (b, None)), "list": [c, 7]}
    assert [len(tensor) for tensor in tensors(tree)] == [1, 2, 3]
    twice = mapped(tree, lambda tensor: 2 * tensor)
    assert (twice["pair"].name, twice["pair"].more[1], twice["list"][1]) == ("one", None, 7)
    assert [tensor.tolist() for tensor in tensors(twice)] == [[2.0], [2.0, 2.0], [2.0, 2.0, 2.0]]
    assert torch.equal(a, torch.ones(1))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["terms=match,gan", "real.images=x"], "gan"),
        (["match.shared=true"], "match.shared"),
        (["compile=true"], "compile"),
        (["accumulate=2"], "accumulate"),
        (["parallel=fsdp"], "parallel=fsdp"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(overrides, named):
    with pytest.raises(UserError, match=f"cuda_graphs .*{named}"):
        load_recipe("mnist", ["cuda_graphs=true", *overrides])
