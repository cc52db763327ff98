"""Every family of networks in two processes against one; in bf16; compiled; with recomputed activations."""

import copy
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch._dynamo
import yaml
from diffusers import UNet2DConditionModel
from test_parallel import Collectives, together
from torch._dynamo.utils import counters

from distmatch.diffusion.conditions import WHOLE
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.folder import Info, save_model
from distmatch.models.unet import UNet
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.system import parallel
from distmatch.training.ema import EMA, draw_towards, frozen_copy
from distmatch.training.engine import blocks, compile_blocks, idle, shard, unwrapped, whole
from distmatch.training.optim import Optimizer

CLASSES = ("a", "b", "c")
SMALL = {"img_resolution": 8, "label_dim": 3, "augment_dim": 9, "model_channels": 16, "num_blocks": 1}
WIDTHS = {"channel_mult": [1, 2], "attn_resolutions": [4]}
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
TREE = {
    "steps": 2,
    "match": {"batch": 4, "pairs": True},
    "regress": {"batch": 4, "weight": 1.0},
    "generator": {"lr": 1e-3},
    "critic": {"lr": 1e-3},
    "pairs": {"count": 8, "steps": 2, "batch": 8},
}
FAMILIES = {
    "ncsn": (),
    "dhariwal": (),
    "sd-lora-guidance": ("student.adapter.rank=2", "student.guidance=[1, 4]"),
    "unet-bf16": ("precision=bf16",),
    "sdxl-bf16": ("precision=bf16",),
}


def edm(net: torch.nn.Module, folder: Path) -> None:
    """`net` as a teacher in `folder`, its layers that start at zero filled."""
    for parameter in net.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.xavier_uniform_(parameter)
    save_model(folder, Denoiser(net, EDM(), Prediction("edm")), Info((3, 8, 8), CLASSES))


def one_level(folder: Path) -> None:
    """Cut the U-Net of a model in diffusers' format: what FSDP does at first grows with the square of its tensors."""
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    for name in ("block_out_channels", "down_block_types"):
        config[name] = config[name][:1]
    config["up_block_types"] = config["up_block_types"][-1:]
    if isinstance(config["attention_head_dim"], list):
        config["attention_head_dim"] = config["attention_head_dim"][:1]
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe for each kind of teacher, and what they need."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tiny.teacher_folder(root / "unet")
    save_model(root / "flat", Denoiser(UNet(1, 3, widths=(8,), patch=2), EDM(), Prediction("edm")), tiny.INFO)
    edm(SongUNet(**SMALL, **WIDTHS, **NCSN), root / "ncsn")
    edm(DhariwalUNet(**SMALL, **WIDTHS), root / "dhariwal")
    one_level(write_tiny_sd(root / "sd"))
    one_level(write_tiny_sd(root / "sdxl", kind="sdxl"))
    (root / "prompts.txt").write_text("a cat\na dog\na house\n")
    for kind in ("unet", "flat", "ncsn", "dhariwal"):
        (root / f"{kind}.yaml").write_text(yaml.safe_dump({"teacher": str(root / kind), **TREE}))
    for kind in ("sd", "sdxl"):
        text = {"teacher": f"diffusers:{root / kind}", "prompts": {"path": str(root / "prompts.txt")}, **TREE}
        text["match"] = {**text["match"], "guidance": 3.0}
        text["pairs"] = {**text["pairs"], "sampler": "pndm", "steps": 3, "guidance": 3.0}
        (root / f"{kind}.yaml").write_text(yaml.safe_dump(text))
    distiller(root, "sd-lora-guidance").step(0)  # the processes, forked, need not import what this does
    return root


def distiller(folder: Path, family: str, *changes: str) -> build.Distiller:
    recipe = load_recipe(str(folder / f"{family.split('-')[0]}.yaml"), [*FAMILIES.get(family, ()), *changes])
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, folder)
    return build.distiller(recipe, subject, pairs)


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([whole(v.detach()).flatten().double() for v in network.state_dict().values()])


def train(d: build.Distiller, count: int = 2) -> dict:
    """The losses of `count` steps, and all weights before and after."""
    networks = {"student": d.student, "average": d.ema.network, "fake": unwrapped(d.fake)}
    # Gathering shards takes longer than a step; of several processes only the end is compared.
    start = {name: flat(network) for name, network in networks.items() if parallel.world() == 1}
    found = [d.step(index) for index in range(count)]
    # A process's loss is that of its share, all of equal size.
    losses = [{name: parallel.mean(value.clone()).item() for name, value in line.items()} for line in found]
    end = {name: flat(network) for name, network in networks.items()}
    return {"losses": losses, "start": start, "end": end}


def kept_in(d: build.Distiller) -> set[torch.dtype]:
    """What a process keeps of the trained networks between two steps, and what the network's wrapper computes in."""
    optimizers = [d.optimizer.adamw, d.fake_optimizer.adamw]
    found = {p.dtype for optimizer in optimizers for p in optimizer.state}
    found |= {
        value.dtype for optimizer in optimizers for moments in optimizer.state.values() for value in moments.values()
    }

    def seen(_, inputs, output):
        found.update({inputs[0].dtype, inputs[1].dtype, output.dtype})

    for network in (d.student, unwrapped(d.fake), d.terms[0].teacher):
        network.register_forward_hook(seen)
        network.net.register_forward_pre_hook(lambda _, inputs: found.update({inputs[0].dtype, inputs[1].dtype}))
    return found


def _all(folder: Path, how: str, out: Path) -> None:
    torch.set_num_threads(1)  # before there are threads: PyTorch makes its pool anew after a fork, and not safely
    with parallel.process_group():
        results = {}
        for family in FAMILIES:
            d = distiller(folder, family, f"parallel={how}")
            dtypes = kept_in(d)
            results[family] = {**train(d), "dtypes": dtypes}
        if parallel.rank() == 0:
            torch.save(results, out)


@pytest.fixture(scope="module")
def results(folder):
    """`results(how, world)`: what two steps of every family give."""

    def run(how: str, world: int) -> dict:
        out = folder / f"{how}{world}.pt"
        if not out.exists():
            together(world, _all, folder, how, out)
        return torch.load(out)

    return run


def same(one: dict, other: dict, rel: float, moved: float) -> None:
    """Every loss of every step within `rel`; the weights' difference within the part `moved` of their way."""
    for a, b in zip(one["losses"], other["losses"], strict=True):
        assert b == pytest.approx(a, rel=rel, abs=1e-6)
    for name, start in one["start"].items():
        way = (one["end"][name] - start).norm()
        assert way > 0
        assert (one["end"][name] - other["end"][name]).norm() < moved * way, name


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_follow_one(results, family, how):
    """To rounding: fp32's, or in bf16 that of the other order of sums and, sharded, of norms' weights too.

    Whatever the precision, weights, moments, noise levels and the arithmetic around a network stay fp32.
    """
    rel, moved = (0.03, 0.2) if "bf16" in family else (1e-4, 2e-3)
    same(results("ddp", 1)[family], results(how, 2)[family], rel, moved)
    assert results(how, 2)[family]["dtypes"] == {torch.float32}


def _collectives(folder: Path, how: str, out: Path) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        found = {}
        for accumulate in (1, 3):
            changes = (f"parallel={how}", f"accumulate={accumulate}", "match.batch=6", "regress.batch=6")
            d = distiller(folder, "unet", *changes)
            for index in range(2):  # DDP sorts its buckets anew after the first
                d.step(index)
            with Collectives() as collectives:
                d.step(2)
            found[accumulate] = {"calls": dict(collectives.calls), "groups": len(blocks(d.student)) + 1}
        if parallel.rank() == 0:
            torch.save(found, out)


INT4 = ("student.adapter.rank=2", "fake.adapter.rank=2", "precision=bf16", "base_weights=int4")


def _on_4_bits(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        found = train(distiller(folder, "sd", *INT4))
        if parallel.rank() == 0:
            torch.save(found, out)


def test_two_processes_on_a_base_in_4_bits_follow_one(folder):
    together(2, _on_4_bits, folder, folder / "on-4-bits.pt")
    same(train(distiller(folder, "sd", *INT4)), torch.load(folder / "on-4-bits.pt"), rel=0.03, moved=0.2)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulation_reduces_gradients_once(folder, how):
    together(2, _collectives, folder, how, folder / "calls.pt")
    found = torch.load(folder / "calls.pt")
    calls, groups = found[1]["calls"], found[1]["groups"]
    if how == "ddp":  # a bucket of each of the two networks, and nothing else
        assert found[3]["calls"] == calls == {"c10d::allreduce_": 2}
    else:  # every group of both; a norm of each; weights are gathered for every part of the batch
        assert calls["c10d::_reduce_scatter_base_"] == 2 * groups
        gathered = "c10d::_allgather_base_"
        assert found[3]["calls"] == {**calls, gathered: 3 * calls[gathered]}
        assert calls.keys() == {gathered, "c10d::_reduce_scatter_base_", "c10d::allreduce_"}
        assert calls["c10d::allreduce_"] == 2


class Uneven(torch.nn.Module):
    """Weights that three processes cannot share equally, fewer than there are processes, and idle ones."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)])
        self.last, self.idle = torch.nn.Linear(5, 1), torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.blocks[1](self.blocks[0](x).tanh()))


def _uneven(clip: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole_one, batches = Uneven(), torch.randn(3, 6, 5)
    with parallel.process_group():
        parts = copy.deepcopy(whole_one)
        found = []
        for network, spread in ((parts, True), (whole_one, False)):
            average, follower = frozen_copy(network), frozen_copy(network)
            if spread:
                for one in (network, average, follower):
                    shard(one)
            optimizer = Optimizer(network.parameters(), lr=1e-2, weight_decay=0.1, clip=clip)
            ema, norms = EMA(network, 0.99, average), []
            for index, x in enumerate(batches):
                network(x.chunk(3)[parallel.rank()] if spread else x).square().mean().backward()
                norms.append(optimizer.step(index))
                ema.update()
                draw_towards(follower, network, 0.3)
            weights = [whole(p.detach()) for one in (network, average, follower) for p in one.parameters()]
            found.append([*norms, *weights])
        assert min(found[1][:3]) > 0.05
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_uneven_parts_are_clipped_updated_and_averaged_as_the_whole(clip):
    together(3, _uneven, clip)


def test_idle_weights_are_found(folder):
    for family, expected in {"unet": [], "ncsn": ["net.map_augment.weight"], "sd-lora-guidance": []}.items():
        d = distiller(folder, family)
        recipe = load_recipe(str(folder / f"{family.split('-')[0]}.yaml"), FAMILIES.get(family, ()))
        example = build.example(subjects.subject(recipe), recipe.student.guidance is not None)
        assert idle(d.student, *example) == expected


# Recomputed activations


def kept(d: build.Distiller) -> int:
    """Bytes that autograd keeps of the student's forward pass, without the weights."""
    own, found = {p.untyped_storage().data_ptr() for p in d.student.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = d.start(d.objective.streams["noise"], 0, 0, WHOLE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = d.generate_all({"noise": batch})  # while it lives no storage is used twice
    del alive
    return sum(found.values())


KEPT = {"unet": 0.34, "ncsn": 0.18, "dhariwal": 0.21, "sd-lora-guidance": 0.15}
"""What autograd still keeps, as a part of what it keeps otherwise: measured, rounded up."""


@pytest.mark.parametrize("family", KEPT)
def test_recomputed_activations_change_no_bit_and_are_not_kept(folder, family):
    plain, frugal = (distiller(folder, family, f"gradient_checkpointing={flag}") for flag in ("false", "true"))
    assert kept(frugal) < KEPT[family] * kept(plain)
    one, other = train(plain), train(frugal)
    assert one["losses"] == other["losses"]
    assert all(torch.equal(one["end"][name], other["end"][name]) for name in one["end"])
    assert plain.student.state_dict().keys() == frugal.student.state_dict().keys()


def test_a_copy_recomputes_with_its_own_weights(folder):
    student = distiller(folder, "ncsn", "gradient_checkpointing=true").student
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    plain = Denoiser(SongUNet(**student.net.config), student.schedule, student.prediction).eval()
    plain.load_state_dict(other.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)
    gradients = []
    for network in (plain, other):
        output = network(x, t)
        output.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)
    assert gradients[0].any()
    assert all(p.grad is None for p in student.parameters())


# Compilation. The tests stop before code is generated, which takes a minute; by hand, inductor's differs by 3e-6.


def test_compiled_steps_follow_plain_ones(folder, monkeypatch):
    """All blocks of student, fake score and teacher are compiled, around recomputed activations too, and none fell back
    for having too many forms.
    """
    monkeypatch.setattr(build, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    counters.clear()
    d = distiller(folder, "flat", "compile=true", "gradient_checkpointing=true")
    same(train(distiller(folder, "flat")), train(d), rel=1e-4, moved=2e-3)
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    # A form for the student, one for the fake score, one for both scores without gradients; like blocks share theirs.
    assert counters["stats"]["unique_graphs"] > 2 * len(blocks(d.student))
    assert d.student.state_dict().keys() == d.ema.network.state_dict().keys()


def _compiled(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    build.compile_blocks = partial(compile_blocks, backend="aot_eager")
    with parallel.process_group():
        result = train(distiller(folder, "flat", "compile=true", "parallel=fsdp", "gradient_checkpointing=true"), 1)
        if parallel.rank() == 0:
            torch.save({**result, "frames": dict(counters["frames"])}, out)


def test_compiled_shards_follow_one_process(folder):
    together(2, _compiled, folder, folder / "compiled.pt")
    found = torch.load(folder / "compiled.pt")
    same(train(distiller(folder, "flat"), 1), found, rel=1e-4, moved=2e-3)
    assert found["frames"]["ok"] == found["frames"]["total"] > 4


def test_a_network_without_blocks_is_named(folder):
    class Bare(torch.nn.Conv2d):
        def forward(self, x, noise, cond):
            return super().forward(x)

    own = Denoiser(Bare(1, 1, 1), EDM(), Prediction("edm")), tiny.INFO
    for entry in ("compile=true", "gradient_checkpointing=true"):
        recipe = load_recipe(str(folder / "unet.yaml"), ["terms=match", "match.pairs=false", entry])
        with pytest.raises(ValueError, match=r"are for networks of blocks, in nn.ModuleList; Bare has none: use false"):
            build.distiller(recipe, subjects.subject(recipe, own), None)
