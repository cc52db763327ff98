"""Bases in 8 and 4 bits: how far from fp32, what they keep for a backward pass, and what students become of them."""

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

BITS = ("int8", "int4")
LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (5, 3, 24)),
    "wide": (lambda: nn.Linear(128, 16), (5, 128)),
    "ragged": (lambda: nn.Linear(19, 16, bias=False), (5, 19)),
    "convolution": (lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1), (5, 24, 9, 9)),
    "grouped": (lambda: nn.Conv2d(24, 16, 3, groups=4, bias=False), (5, 24, 9, 9)),
}


class Blocks(nn.Module):
    """A network of one block, one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([layer])

    def forward(self, x):
        return self.blocks[0](x)


def changed(weights: str) -> tuple[str, str]:
    return f"base_weights={weights}", "precision=bf16"


def layers(kind: str, weights: str):
    """A layer, the same in fewer bits, and an input in bf16."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    plain = Blocks(make())
    weight = plain.blocks[0].weight
    weight.data *= torch.logspace(-3, 2, 16).view(-1, *[1] * (weight.ndim - 1))
    rounded = Blocks(make())
    rounded.load_state_dict(plain.state_dict())
    hold(rounded.requires_grad_(False), weights, "cpu")
    return plain, rounded, torch.randn(shape).bfloat16()


@pytest.mark.parametrize("kind", LAYERS)
def test_each_weight_is_within_half_a_step_of_its_output(kind):
    """At any size of the output's weights; zeros stay zeros."""
    plain, rounded, _ = layers(kind, "int8")
    weight = plain.blocks[0].weight.detach().flatten(1)
    found = rounded.state_dict()["blocks.0.weight"].flatten(1)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()
    assert ((found - weight).abs().amax(1, keepdim=True) > 0.3 * step).all()


@pytest.mark.parametrize("kind", ["linear", "wide", "ragged"])
def test_each_weight_of_a_group_is_within_half_a_step_or_clipped_by_less_than_one(kind):
    """A step is an eighth of the largest of 64, by a scale in bf16, which is off by 1/256 at most."""
    plain, rounded, _ = layers(kind, "int4")
    weight, found = (network.state_dict()["blocks.0.weight"].flatten() for network in (plain, rounded))
    for group, made in zip(weight.split(64), found.split(64), strict=True):
        largest = group[group.abs().argmax()]
        steps, to = group / (largest / -8), made / (largest / -8)
        clipped = steps > 7.5
        error = (to - steps).abs()
        assert (error[~clipped] <= 0.5 + 8 / 256).all()
        assert (error[clipped] <= 1 + 8 / 256).all()
        assert error.max() > 0.3
        torch.testing.assert_close(made[group.abs().argmax()], largest, rtol=1 / 256, atol=0)
        assert len(made.unique()) <= 16
    uniform = torch.rand(1000) * 2 - 1  # an error that is uniform within half a step has an rms of 1/12 ** 0.5 of it
    layer = Blocks(nn.Linear(1000, 1, bias=False)).requires_grad_(False)
    layer.blocks[0].weight.data = uniform[None]
    hold(layer, "int4", "cpu")
    error = layer.state_dict()["blocks.0.weight"].flatten() - uniform
    assert error.square().mean().sqrt() == pytest.approx(1 / 8 / 12**0.5, rel=0.15)


def test_every_pair_of_4_bit_integers_is_kept():
    layer = Blocks(nn.Linear(64, 16, bias=False)).requires_grad_(False)
    low, high = torch.meshgrid(torch.arange(-8.0, 8), torch.arange(-8.0, 8), indexing="ij")
    halves = [torch.full((16, 32), -8.0), torch.full((16, 32), -8.0)]
    halves[0][:, :16], halves[1][:, :16] = high, low
    layer.blocks[0].weight.data = torch.cat(halves, 1)
    before = layer.state_dict()["blocks.0.weight"].clone()
    hold(layer, "int4", "cpu")
    assert torch.equal(layer.state_dict()["blocks.0.weight"], before)


@pytest.mark.parametrize("weights", BITS)
def test_zeros_stay_zeros(weights):
    empty = Blocks(nn.Linear(3, 2, bias=False)).requires_grad_(False)
    nn.init.zeros_(empty.blocks[0].weight)
    hold(empty, weights, "cpu")
    assert not empty(torch.ones(1, 3)).any()


def test_4_bits_are_for_the_linear_layers_of_blocks_and_take_half_a_byte_and_their_scales():
    network = nn.ModuleDict({"first": nn.Linear(64, 128), "blocks": nn.ModuleList()}).requires_grad_(False)
    network["blocks"].append(nn.Sequential(nn.Linear(128, 192), nn.Conv2d(4, 8, 3)).requires_grad_(False))
    hold(network, "int4", "cpu")
    weights = 128 * 192
    held = {name: sum(b.numel() * b.element_size() for b in layer.buffers()) for name, layer in network.named_modules()}
    assert held["first"] == 64 * 128 + 4 * 128
    assert held["blocks.0.0"] == weights // 2 + 2 * weights // 64
    assert held["blocks.0.1"] == 4 * 8 * 9 + 4 * 8


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_rounded_weight_and_it_is_not_kept(kind, weights):
    _, rounded, x = layers(kind, weights)
    plain = LAYERS[kind][0]().bfloat16()
    plain.load_state_dict({name.removeprefix("blocks.0."): value for name, value in rounded.state_dict().items()})
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
    assert rounded.blocks[0].weight.numel() not in kept


@pytest.mark.parametrize(("weights", "near"), [("int8", 0.02), ("int4", 0.06)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_rounded_network_is_close_and_takes_a_quarter(kind, weights, near):
    """And its adapters learn as on fp32, also if activations are recomputed."""
    plain, rounded = base(kind), base(kind)
    hold(rounded.net, weights, "cpu")
    checkpointed = adapted(rounded, 1)
    checkpoint_gradients(checkpointed)
    expected = plain(*inputs())
    assert (rounded(*inputs()) - expected).norm() / expected.norm() < near
    gradients = []
    for network in (adapted(plain, 1), checkpointed):
        network(*inputs()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    plain_bytes, held = (
        sum(t.numel() * t.element_size() for t in (*n.parameters(), *n.buffers())) for n in (plain, rounded)
    )
    assert held < 0.3 * plain_bytes


@pytest.mark.parametrize("weights", BITS)
def test_a_student_is_saved_as_the_rounded_weights_and_its_updates(tmp_path, weights):
    file = tiny.recipe_file(
        tmp_path, steps=3, terms=["match"], student={"adapter": {"rank": 2}}, fake={"adapter": {"rank": 2}}
    )
    distil(load_recipe(str(file), changed(weights)), tmp_path / "run", tmp_path)
    saved, _ = load_model(tmp_path / "run" / "model")
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F32"}  # noqa: SIM118
    teacher, _ = load_model(tmp_path / "teacher")
    before = teacher.net.state_dict()
    updates = load_adapter(tmp_path / "run" / "model")
    assert any(up.any() for _, up in updates.values())
    hold(teacher.net.requires_grad_(False), weights, "cpu")
    for name, value in teacher.net.state_dict().items():
        down, up = updates.get(name.removesuffix(".weight"), (None, None))
        if down is not None and name.endswith(".weight"):
            value = value + (up.flatten(1) @ down.flatten(1)).view_as(value)
            assert not torch.equal(value, before[name])
        torch.testing.assert_close(saved.net.state_dict()[name], value.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", BITS)
def test_a_step_on_fewer_bits_trains_the_adapters_alone(tmp_path, weights):
    d, subject = distiller(tmp_path, *BOTH, *changed(weights), "gradient_checkpointing=true")
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
    for number, weights in enumerate(("fp32", *BITS)):
        folder = tmp_path / weights
        folder.mkdir()
        file = tiny.recipe_file(folder, steps=1, student={"adapter": {"rank": 2}}, fake={"adapter": {"rank": 2}})
        place = tmp_path / f"pairs{number}"
        changes = [f"base_weights={weights}", "precision=bf16", f"pairs.path={place}"]
        distil(load_recipe(str(file), changes), folder / "run", folder)
        stores.append(place)
    one, *others = (sorted(place.glob("*.safetensors")) for place in stores)
    assert one
    for other in others:
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


def test_a_run_on_4_bits_goes_on_bit_for_bit(tmp_path):
    roles = {"student": {"adapter": {"rank": 2}}, "fake": {"adapter": {"rank": 2}}}
    recipe = load_recipe(str(tiny.recipe_file(tmp_path, steps=6, terms=["match"], **roles)), changed("int4"))
    distil(recipe, tmp_path / "whole", tmp_path)
    with tiny.stopped_before(5):
        distil(recipe, tmp_path / "run", tmp_path)
    distil(recipe, tmp_path / "run", tmp_path)
    a, b = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "run"))
    assert a == b
