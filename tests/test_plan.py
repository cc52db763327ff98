"""The planner against real steps: arithmetic counted in them, memory tracked in them."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmatch import build
from distmatch.config import load_recipe
from distmatch.perceptual import write_random_weights
from distmatch.plan import abstract, plan
from distmatch.smoke import random_edm


def made(folder, *changes):
    recipe = load_recipe(str(tiny.recipe_file(folder)), changes)
    return recipe, plan(recipe, *abstract(recipe)[:2], 1, abstract(recipe)[2])


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("terms=match",),
        ("terms=regress",),
        ("critic.steps=3",),
        ("match.pairs=true", "accumulate=2"),
        ("match.guidance=3",),
    ],
    ids=" ".join,
)
def test_the_arithmetic_is_that_of_a_real_step(tmp_path, changes):
    recipe, planned = made(tmp_path, *changes)
    subject = build.subject(recipe)
    pairs = build.pair_store(recipe, subject, tmp_path) if "regress" in recipe.terms else None
    distiller = build.distiller(recipe, subject, pairs)
    with FlopCounterMode(display=False) as counter:
        distiller.step(0)
    assert planned.step_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_lpips_is_counted(tmp_path):
    write_random_weights(tmp_path / "weights")
    changes = ["regress.loss=lpips", "regress.size=32", f"regress.weights={tmp_path / 'weights'}"]
    recipe, planned = made(tmp_path, *changes)
    subject = build.subject(recipe)
    distiller = build.distiller(recipe, subject, build.pair_store(recipe, subject, tmp_path))
    with FlopCounterMode(display=False) as counter:
        distiller.step(0)
    assert planned.step_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_published_networks_are_counted_without_their_weights():
    recipe = load_recipe("imagenet64-cond")
    denoiser, info, losses = abstract(recipe)
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}
    planned = plan(recipe, denoiser, info, 7, losses)
    assert abs(planned.parameters - 295.9e6) < 0.1e6
    assert len(info.classes) == 1000
    # Each of seven holds four copies of the weights besides LPIPS's, two gradients and two pairs of moments.
    assert planned.memory["gradients"] == 2 * 4 * planned.parameters
    assert planned.memory["optimizer"] == 4 * 4 * planned.parameters
    sharded = plan(recipe.model_copy(update={"parallel": "fsdp"}), denoiser, info, 7, losses)
    assert sharded.memory["optimizer"] == pytest.approx(planned.memory["optimizer"] / 7)
    assert sharded.step_flops == planned.step_flops


def test_activations_are_what_autograd_keeps(tmp_path):
    """At CIFAR-10's full size: the bytes that a real forward pass saves. On meta, attention keeps its matrix."""
    recipe = load_recipe("cifar10-cond", ["match.batch=4", "regress.batch=4", "terms=match", "match.pairs=false"])
    denoiser, info, _ = abstract(recipe)
    planned = plan(recipe, denoiser, info, 1, [])
    real, _ = random_edm("edm-cifar10-32x32-cond-vp", small=False)
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    real.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = real(torch.randn(4, 3, 32, 32), torch.ones(4), build.Cond(label=torch.arange(4)))
    assert alive.shape == (4, 3, 32, 32)
    assert planned.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.15)


def test_the_command_says_whether_it_fits():
    told = tiny.command("plan", "cifar10-cond", "--gpus", 1, "--gpu", "rtx4090")
    assert told.returncode == 0, told.stderr
    assert "55.7 M parameters" in told.stdout
    assert "it does not fit; accumulate=" in told.stdout
    assert "pairs: 1.2 GB" in told.stdout
    wrong = tiny.command("plan", "cifar10-con")
    assert wrong.returncode == 2
