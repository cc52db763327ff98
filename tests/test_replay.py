"""Gradients by replaying: the inputs' copies, and autograd's gradients. Graphs need a GPU: see benchmarks/gpu.py."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distmatch.recipe.loading import load_recipe
from distmatch.system.errors import UserError
from distmatch.training.replay import Replay, mapped, tensors


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
