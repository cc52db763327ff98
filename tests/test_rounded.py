"""Bases in 8 bits: how far they are from fp32, what they keep for a backward pass, and what students become of them."""

import pytest
import tiny
import torch
from safetensors import safe_open
from test_adapters import BOTH, NETWORKS, adapted, base, distiller, inputs
from torch import nn

from distmatch.commands.distillation import distil
from distmatch.models.folder import load_adapter, load_model
from distmatch.recipe.loading import load_recipe
from distmatch.training.engine import checkpoint_gradients
from distmatch.training.rounded import hold

INT8 = ("base_weights=int8", "precision=bf16")
LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (5, 3, 24)),
    "convolution": (lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1), (5, 24, 9, 9)),
    "grouped": (lambda: nn.Conv2d(24, 16, 3, groups=4, bias=False), (5, 24, 9, 9)),
}


def layers(kind: str):
    """A layer, the same in 8 bits, and an input in bf16."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    plain = nn.Sequential(make())
    plain[0].weight.data *= torch.logspace(-3, 2, 16).view(-1, *[1] * (plain[0].weight.ndim - 1))
    rounded = nn.Sequential(make())
    rounded.load_state_dict(plain.state_dict())
    hold(rounded.requires_grad_(False), "int8", "cpu")
    return plain, rounded, torch.randn(shape).bfloat16()


@pytest.mark.parametrize("kind", LAYERS)
def test_each_weight_is_within_half_a_step_of_its_output(kind):
    """At any size of the output's weights; zeros stay zeros."""
    plain, rounded, _ = layers(kind)
    weight = plain[0].weight.detach().flatten(1)
    found = rounded.state_dict()["0.weight"].flatten(1)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()
    assert ((found - weight).abs().amax(1, keepdim=True) > 0.3 * step).all()
    empty = nn.Sequential(nn.Linear(3, 2, bias=False)).requires_grad_(False)
    nn.init.zeros_(empty[0].weight)
    hold(empty, "int8", "cpu")
    assert not empty(torch.ones(1, 3)).any()


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_rounded_weight_and_it_is_not_kept(kind):
    _, rounded, x = layers(kind)
    plain = LAYERS[kind][0]().bfloat16()
    plain.load_state_dict({name[2:]: value for name, value in rounded.state_dict().items()})
    kept: list[int] = []

    def run(layer, pack=lambda t: t):
        given = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made = layer(given)
        made.float().square().sum().backward()
        return made, given.grad

    def pack(t):
        kept.append(t.numel())
        return t

    made, gradient = run(rounded, pack)
    expected, theirs = run(plain.requires_grad_(False))
    assert torch.equal(made, expected)
    assert torch.equal(gradient, theirs)
    assert rounded[0].weight.numel() not in kept


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_in_8_bits_is_close_and_takes_a_quarter(kind):
    """Closer to fp32 than 2 %, and its adapters learn as on fp32, also if activations are recomputed."""
    plain, rounded = base(kind), base(kind)
    hold(rounded.net, "int8", "cpu")
    checkpointed = adapted(rounded, 1)
    checkpoint_gradients(checkpointed)
    expected = plain(*inputs())
    assert (rounded(*inputs()) - expected).norm() / expected.norm() < 0.02
    gradients = []
    for network in (adapted(plain, 1), checkpointed):
        network(*inputs()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    plain_bytes, held = (
        sum(t.numel() * t.element_size() for t in (*n.parameters(), *n.buffers())) for n in (plain, rounded)
    )
    assert held < 0.3 * plain_bytes


def test_a_student_on_8_bits_is_saved_as_the_rounded_weights_and_its_updates(tmp_path):
    file = tiny.recipe_file(
        tmp_path, steps=3, terms=["match"], student={"adapter": {"rank": 2}}, fake={"adapter": {"rank": 2}}
    )
    distil(load_recipe(str(file), INT8), tmp_path / "run", tmp_path)
    saved, _ = load_model(tmp_path / "run" / "model")
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    teacher, _ = load_model(tmp_path / "teacher")
    before = teacher.net.state_dict()
    updates = load_adapter(tmp_path / "run" / "model")
    assert any(up.any() for _, up in updates.values())
    hold(teacher.net.requires_grad_(False), "int8", "cpu")
    for name, value in teacher.net.state_dict().items():
        down, up = updates.get(name.removesuffix(".weight"), (None, None))
        if down is not None and name.endswith(".weight"):
            value = value + (up.flatten(1) @ down.flatten(1)).view_as(value)
            assert not torch.equal(value, before[name])
        torch.testing.assert_close(saved.net.state_dict()[name], value.float(), rtol=0, atol=1e-6)


def test_a_step_on_8_bits_trains_the_adapters_alone(tmp_path):
    d, subject = distiller(tmp_path, *BOTH, *INT8, "gradient_checkpointing=true")
    before = {name: value.clone() for name, value in subject.denoiser.net.state_dict().items()}
    start = [[p.clone() for p in network.parameters()] for network in (d.student, d.fake)]
    for index in range(3):
        d.step(index)
    assert all(torch.equal(value, before[name]) for name, value in subject.denoiser.net.state_dict().items())
    for network, was in zip((d.student, d.fake), start, strict=True):
        assert network.base is subject.denoiser
        assert sum(torch.equal(a, b) for a, b in zip(network.parameters(), was, strict=True)) < len(was) / 2


def test_pairs_are_made_by_the_teacher_as_it_is_whatever_its_adapters_share(tmp_path):
    stores = []
    for number, weights in enumerate(("fp32", "int8")):
        folder = tmp_path / weights
        folder.mkdir()
        file = tiny.recipe_file(folder, steps=1, student={"adapter": {"rank": 2}}, fake={"adapter": {"rank": 2}})
        place = tmp_path / f"pairs{number}"
        changes = [f"base_weights={weights}", "precision=bf16", f"pairs.path={place}"]
        distil(load_recipe(str(file), changes), folder / "run", folder)
        stores.append(place)
    one, other = (sorted(place.glob("*.safetensors")) for place in stores)
    assert one
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
