"""Adapters: student and fake score as low-rank updates of one frozen network."""

import copy
import threading

import pytest
import tiny
import torch
from torch import nn

from distmatch.commands import distillation
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.folder import load_adapter, load_model, save_model
from distmatch.models.mlp import MLP
from distmatch.models.unet import UNet
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.training.adapters import Adapted, Adapter, with_adapter
from distmatch.training.ema import draw_towards
from distmatch.training.engine import checkpoint_gradients
from distmatch.training.rounded import hold

SMALL = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "model_channels": 8, "num_blocks": 1}
NETWORKS = {
    "unet": lambda: UNet(1, 3, widths=(8, 8), patch=1),
    "song": lambda: SongUNet(**SMALL, channel_mult=[1, 2], attn_resolutions=[4]),
    "dhariwal": lambda: DhariwalUNet(**SMALL, channel_mult=[1, 2], attn_resolutions=[4]),
}


def base(kind: str = "unet") -> Denoiser:
    torch.manual_seed(0)
    net = NETWORKS[kind]()
    for parameter in net.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:  # layers that start at zero
            nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, EDM(), Prediction("edm")).eval().requires_grad_(False)


def adapted(denoiser: Denoiser, seed: int, rank: int = 2) -> Adapted:
    torch.manual_seed(seed)
    made = Adapted(denoiser, Adapter(denoiser.net, rank, 2.0 * rank))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    return x, torch.tensor([0.5, 2.0, 20.0]), Cond(label=torch.arange(3))


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_adapter_begins_at_the_base_and_amounts_to_its_merged_weights(kind, tmp_path):
    teacher = base(kind)
    plain = teacher(*inputs())
    assert torch.equal(Adapted(teacher, Adapter(teacher.net, 2, 2.0))(*inputs()), plain)
    student = adapted(teacher, 1)
    made = student(*inputs())
    assert (made - plain).abs().max() > 0.01
    assert torch.equal(teacher(*inputs()), plain)
    save_model(tmp_path, student, tiny.INFO)
    loaded, _ = load_model(tmp_path)
    assert type(loaded) is Denoiser
    torch.testing.assert_close(loaded(*inputs()), made, rtol=1e-5, atol=1e-5)
    updates, before = load_adapter(tmp_path), teacher.net.state_dict()
    for name, value in loaded.net.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in updates and name.endswith(".weight"):
            down, up = updates[layer]
            assert torch.allclose(value, before[name] + (up.flatten(1) @ down.flatten(1)).view_as(value), atol=1e-6)
        else:
            assert torch.equal(value, before[name])


def test_a_convolution_that_pads_by_repeating_is_merged_as_it_was_trained():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"))
    adapter = Adapter(net, 2, 2.0)
    nn.init.normal_(adapter.layers["0"].up.weight)
    x, merged = inputs()[0], copy.deepcopy(net)
    merged[0].weight.data += adapter.update("0")
    with with_adapter(adapter):
        made = net(x)
    torch.testing.assert_close(made, merged(x))
    assert (made - net(x)).abs().max() > 0.1


def test_layers_that_are_never_called_get_no_adapter():
    """Multi-head attention uses the weights of its last layer without calling it."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "last": nn.Linear(4, 4)})
    assert list(Adapter(net, 2, 2.0).updates()) == ["last.down", "last.up"]


def test_each_pass_uses_its_own_adapter_in_any_thread_and_any_order():
    teacher = base()
    roles = [teacher, adapted(teacher, 1), adapted(teacher, 2)]
    alone = [role(*inputs()) for role in roles]
    found: list[list[torch.Tensor]] = [[], [], []]

    def work(k: int) -> None:
        for _ in range(30):
            found[k].append(roles[k](*inputs()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        assert len(found[k]) == 30
        assert all(torch.equal(one, alone[k]) for one in found[k])


def test_what_is_recomputed_uses_the_adapter_that_it_used_first():
    """Even where another one is in use, and in another thread, as in the backward pass on a GPU."""
    gradients = []
    for recomputed in (False, True):
        teacher = base()
        first, second = adapted(teacher, 1), adapted(teacher, 2)
        if recomputed:
            checkpoint_gradients(first)
        loss = first(*inputs()).square().sum() - second(*inputs()).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        gradients.append([p.grad for role in (first, second) for p in role.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0][:4])


def test_full_rank_adapters_step_as_whole_networks_do():
    """With `down` the identity and fixed, `up` has the gradient of the weight, and AdamW moves both alike."""
    torch.manual_seed(0)
    teacher = Denoiser(MLP(2, width=8, depth=2), EDM(), Prediction("edm")).eval().requires_grad_(False)
    names = [name for name, layer in teacher.net.named_modules() if isinstance(layer, nn.Linear)]
    roles = []
    for _ in range(2):
        role = Adapted(teacher, Adapter(teacher.net, 64, 64.0))
        for low in role.adapter.layers.values():
            assert low.down.weight.shape[0] == min(low.down.weight.shape[1], low.up.weight.shape[0])
        roles.append(role)
    wide = {name: layer for name, layer in teacher.net.named_modules() if name in names}
    wholes = [copy.deepcopy(teacher) for _ in range(2)]
    optimizers = []
    for role, whole in zip(roles, wholes, strict=True):
        trained, theirs = [], []
        for name, layer in wide.items():
            low = role.adapter.layers[name.replace(".", "/")]
            if layer.weight.shape[0] < layer.weight.shape[1]:  # of the smaller rank: `up` is the identity instead
                low.up.weight.data, low.down.weight.data = torch.eye(len(low.up.weight)), torch.zeros_like(layer.weight)
                trained.append(low.down.weight)
            else:
                low.down.weight.data, low.up.weight.data = (
                    torch.eye(len(low.down.weight)),
                    torch.zeros_like(layer.weight),
                )
                trained.append(low.up.weight)
            theirs.append(whole.net.get_submodule(name).weight.requires_grad_(True))
        optimizers += [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0) for parameters in (trained, theirs)]
    x, t = torch.randn(16, 2), torch.rand(16) * 5 + 0.1
    for student, fake in (roles, wholes):
        # One step of Algorithm 1: the student towards the teacher against the fake score, the fake score to its images.
        z = torch.full((16,), 80.0)
        for _ in range(3):
            made = student(80 * x, z)
            noisy = made + t[:, None] * x
            with torch.no_grad():
                gradient = fake(noisy, t) - teacher(noisy, t) + 0.1 * made
            (made * gradient).mean().backward()
            (fake(noisy.detach(), t) - made.detach()).square().mean().backward()
            for optimizer in optimizers[0::2] if student is roles[0] else optimizers[1::2]:
                optimizer.step()
                optimizer.zero_grad()
    for role, whole in zip(roles, wholes, strict=True):
        for name, value in role.merged():
            torch.testing.assert_close(value, whole.net.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(whole.net.stem.weight, teacher.net.stem.weight)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_base_in_bf16_computes_what_autocast_does_and_takes_half(kind):
    teacher, halved = base(kind), base(kind)
    hold(halved.net, "bf16", "cpu")
    for network, other in ((teacher, halved), (adapted(teacher, 1), adapted(halved, 1))):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            plain = network(*inputs())
        assert torch.equal(other(*inputs()), plain)
        assert not torch.equal(network(*inputs()), plain)
    bytes_of = [sum(p.numel() * p.element_size() for p in n.parameters()) for n in (teacher, halved)]
    assert bytes_of[1] < 0.53 * bytes_of[0]


def distiller(folder, *changes: str):
    tiny.teacher_folder(folder / "teacher")
    recipe = load_recipe(
        "mnist", [f"teacher={folder / 'teacher'}", "terms=match", "match.batch=4", "evaluate.every=0", *changes]
    )
    subject = subjects.subject(recipe)
    return build.distiller(recipe, subject, None), subject


BOTH = ("student.adapter.rank=2", "fake.adapter.rank=2")


@pytest.mark.parametrize("changes", [BOTH, BOTH[:1], BOTH[1:], (*BOTH, "fake.ida=0.1"), (*BOTH, "workers=2")])
def test_a_step_trains_the_adapters_alone(tmp_path, changes):
    d, subject = distiller(tmp_path, *changes)
    before = copy.deepcopy(subject.denoiser.state_dict())
    start = [[p.clone() for p in network.parameters()] for network in (d.student, d.fake)]
    for index in range(3):
        d.step(index)
    assert all(torch.equal(value, before[name]) for name, value in subject.denoiser.state_dict().items())
    for network, was in zip((d.student, d.fake), start, strict=True):
        assert sum(torch.equal(a, b) for a, b in zip(network.parameters(), was, strict=True)) < len(was) / 2
        if isinstance(network, Adapted):
            assert network.base is subject.denoiser
            assert sum(p.numel() for p in network.parameters()) < sum(v.numel() for v in before.values())
    assert isinstance(d.student, Adapted) == (BOTH[0] in changes)
    assert isinstance(d.fake, Adapted) == (BOTH[1] in changes)


def test_both_scores_begin_equal_and_ida_draws_the_fake_scores_adapter(tmp_path):
    d, _ = distiller(tmp_path, *BOTH)
    assert d.step(0)["match/student"] == 0
    assert d.step(1)["match/student"] != 0
    a, b = (copy.deepcopy(network) for network in (d.fake, d.student))
    draw_towards(d.fake, d.student, 0.25)
    for now, fake, student in zip(d.fake.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(now, fake + 0.25 * (student - fake))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("student.adapter.targets=[conv1, nothing]", "student.adapter.rank=2"),
            r"\['nothing'\] name no linear layer or convolution of a UNet",
        ),
        (("student.adapter.rank=2", "student.init=mnist"), "student.init has others; use one of them"),
        (("student.adapter.rank=2", "fake.ida=0.1"), "fake.ida needs a student and a fake score of one kind"),
        (("student.adapter.rank=2", "compile=true"), "compile does not work with adapters"),
        (("student.adapter.alpha=2",), "adapter.alpha and adapter.targets are for adapters"),
        (("base_weights=bf16", "precision=bf16", "student.adapter.rank=2"), "give student and fake score adapters"),
        ((*BOTH, "base_weights=bf16"), "base_weights=bf16 needs precision=bf16, not fp32"),
        ((*BOTH, "base_weights=int8", "precision=bf16", "match.sid=1"), "base_weights=int8 does not go with match.sid"),
        ((*BOTH, "base_weights=int8", "precision=bf16", "parallel=fsdp"), "does not go with parallel=fsdp"),
        ((*BOTH, "base_weights=int4", "precision=bf16", "match.sid=1"), "base_weights=int4 does not go with match.sid"),
        ((*BOTH, "base_weights=int4", "precision=bf16", "parallel=fsdp"), "does not go with parallel=fsdp"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distiller(tmp_path, *changes)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_base_that_takes_a_guidance_scale_is_the_teachers(tmp_path, weights):
    """But for its new input, which an adapter trains in fp32."""
    d, subject = distiller(tmp_path, *BOTH, "student.guidance=[1, 4]", f"base_weights={weights}", "precision=bf16")
    theirs = dict(subject.denoiser.net.named_parameters())
    ours = dict(d.student.base.net.named_parameters())
    assert d.student.base is d.fake.base
    assert [name for name, value in ours.items() if theirs.get(name) is not value] == ["guidance.weight"]
    assert {p.dtype for p in d.student.parameters()} == {torch.float32}
    d.step(0)
    d.step(1)
    assert d.student.adapter.whole()["guidance.weight"].any()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    file = tiny.recipe_file(
        tmp_path, steps=6, terms=["match"], student={"adapter": {"rank": 2}}, fake={"adapter": {"rank": 3}, "ida": 0.0}
    )
    distillation.distil(load_recipe(str(file)), tmp_path / "whole", tmp_path)
    with tiny.stopped_before(5):
        distillation.distil(load_recipe(str(file)), tmp_path / "run", tmp_path)
    distillation.distil(load_recipe(str(file)), tmp_path / "run", tmp_path)
    a, b = (load_adapter(tmp_path / run / "model") for run in ("whole", "run"))
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))
    assert any(up.any() for _, up in a.values())
