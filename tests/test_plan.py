"""The planner against real steps: arithmetic counted in them, memory that the allocator gave out, bytes passed on.

What is planned is planned in a process of its own (`planner`): once a process has been through a backward pass of
tensors without numbers, PyTorch's autograd does not work in those that it forks, of which other tests make use.
"""

import json
import re
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import graphs
import pytest
import tiny
import torch
from cyclopts import CycloptsError
from test_gan import real_folder
from test_parallel import Collectives, together
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from distmatch.commands.cli import app
from distmatch.data.images import load_images
from distmatch.diffusion.conditions import WHOLE
from distmatch.diffusion.denoiser import Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.models.attention import attention
from distmatch.models.diffusers.autoencoder import Decoder, tiny_decoder
from distmatch.models.diffusers.hub import without_weights
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.edm.networks import SongUNet
from distmatch.models.folder import Info, save_model
from distmatch.models.library import family_of, outline
from distmatch.models.perceptual import write_random_weights
from distmatch.planning import preflight, rehearsal
from distmatch.planning.cost import Cost, Traffic, cost, numel
from distmatch.planning.gpus import GPUS, Gpu
from distmatch.planning.ladder import Ladder
from distmatch.planning.plan import Cluster, pace, verdict
from distmatch.planning.rehearsal import _gpu_autocast
from distmatch.recipe import build, objectives, subjects
from distmatch.recipe.loading import load_recipe
from distmatch.recipe.real_images import latents_bytes
from distmatch.system import parallel, rng
from distmatch.system.digests import load_file
from distmatch.system.precision import autocast
from distmatch.system.screen import size as shown
from distmatch.training.gradients import Adder

EDM_NETWORK = {
    "img_resolution": 16,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 3,
    "augment_dim": 9,
    "model_channels": 16,
    "num_blocks": 1,
    "channel_mult": [1, 2],
    "attn_resolutions": [8],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny recipe, and teachers and frozen networks that it can be told to take."""
    root = tmp_path_factory.mktemp("plan")
    pairs = {"count": 32, "steps": 1, "shard": 32, "batch": 32}
    tiny.recipe_file(root, match={"batch": 24}, regress={"batch": 24}, pairs=pairs, device="cpu")
    song = Denoiser(SongUNet(**EDM_NETWORK), EDM(), Prediction("edm"))
    save_model(root / "song", song, Info((3, 16, 16), ("a", "b", "c")))
    real_folder(root / "images", shape=(16, 16, 3))
    real_folder(root / "grey", shape=(8, 8))
    write_tiny_sd(root / "sd")
    write_random_weights(root / "weights")
    (root / "prompts.txt").write_text("a cat\na dog\na house\n")
    return root


def planned(file: str, changes: tuple[str, ...], processes: int = 1) -> Cost:
    recipe = load_recipe(file, changes)
    return cost(recipe, *outline(recipe.teacher), processes)


def distiller(folder, changes):
    """The real thing, and the teacher."""
    recipe = load_recipe(str(folder / "tiny.yaml"), changes)
    subject = subjects.subject(recipe)
    pairs = build.pair_store(recipe, subject, folder) if objectives.reads_pairs(recipe) else None
    return build.distiller(recipe, subject, pairs), subject.denoiser


def peak(run) -> int:
    """The most bytes that `run` had from the allocator at once, besides those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    profiler: Any = found.profiler
    now = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def size(*networks, trained=False) -> int:
    held = [p for n in networks for p in n.parameters() if p.requires_grad or not trained]
    integers = [b for n in networks for b in n.buffers() if getattr(getattr(n, "net", n), "is_rounded", False)]
    return sum(t.numel() * t.element_size() for t in (*held, *([] if trained else integers)))


SD = ("teacher=diffusers:{0}/sd", "prompts.path={0}/prompts.txt", "pairs.sampler=pndm", "match.batch=8")
ANCHORED = ("pairs.sampler=euler", "pairs.steps=4", "pairs.taken=2", "terms=match,regress")
GAN = ("teacher={0}/song", "terms=match,gan", "real.images={0}/images")
SETTINGS = [
    ("terms=regress", "student.guidance=[1, 4]"),
    ("match.pairs=true", "accumulate=4", "fake.steps=3", "match.guidance=3"),
    ("regress.loss=lpips", "regress.size=32", "regress.weights={0}/weights"),
    ("teacher={0}/song",),
    # Not in bf16: what convolutions then take for themselves depends on the CPU.
    ("teacher={0}/song", "gradient_checkpointing=true", "terms=match"),
    # Not the tiny decoder: CPU convolutions of eight channels copy what they are given.
    (*SD, "regress.decoder=full", "gradient_checkpointing=true"),
    ("teacher={0}/song", "terms=match", "student.adapter.rank=4", "fake.adapter.rank=4"),
    (*SD, "terms=match", "student.adapter.rank=2", "fake.adapter.rank=4", "gradient_checkpointing=true"),
    (*SD, "terms=match", "student.adapter.rank=2", "fake.adapter.rank=4", "base_weights=int8", "precision=bf16"),
    (*SD, "terms=match", "student.adapter.rank=2", "fake.adapter.rank=4", "base_weights=int4", "precision=bf16"),
    (*GAN, "gan.r1=1", "gan.balance=1", "match.divergence=js", "fake.steps=2"),
    (*GAN, "gan.features=teacher", "match.sid=1.2", "gradient_checkpointing=true"),
    (*GAN, "student.adapter.rank=4"),
]


def decoding_each(file: str, changes: tuple[str, ...]) -> Cost:
    each = Decoder.one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "_alike", lambda ledger: each)
        return planned(file, changes)


def test_images_decoded_one_by_one_cost_the_same_if_only_two_are(folder, planner):
    """Exactly, for a decoder that takes most of the memory."""
    changes = (*(change.format(folder) for change in SD), "regress.decoder=full", "match.batch=6", "regress.batch=6")
    file = str(folder / "tiny.yaml")
    assert planner(planned, file, changes) == planner(decoding_each, file, changes)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: " ".join(changes).replace("{0}/", ""))
def test_arithmetic_and_memory_are_those_of_a_real_step(folder, planner, changes):
    """Of the third step, to 2 % and 10 %: FLOPs; what autograd, optimizer and average take besides what is held."""
    changes = tuple(change.format(folder) for change in changes)
    made = planner(planned, str(folder / "tiny.yaml"), changes)
    real, teacher = distiller(folder, changes)
    real.step(0)
    with FlopCounterMode(display=False) as counter:
        real.step(1)
    assert made.step_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    measured = peak(lambda: real.step(2))
    temporary = made.memory["gradients"] + made.memory["activations"]
    assert temporary == pytest.approx(measured, rel=0.1)
    heads = [one.network for one in real.objective.trained.values()]
    trained = [n for n in (real.student, real.fake, *heads) if n is not None]
    assert made.memory["optimizer"] == 2 * size(*trained, trained=True)
    networks = {"student": real.student, "teacher": teacher, "average": real.ema.network}
    assert {name: made.memory[name] for name in networks} == {name: size(n) for name, n in networks.items()}
    saved = sum(t.numel() * t.element_size() for part in real.parts.values() for t in _tensors(part.state_dict()))
    assert made.checkpoint == pytest.approx(saved, rel=0.02)


def test_graphs_are_planned_where_a_run_records_them(folder, planner):
    """Memory with graphs differs from that without on a GPU of CUDA, and on no other device."""
    differs = {}
    for device in ("auto", "cuda:1", "mps", "cpu"):
        made = [
            planner(
                planned, str(folder / "tiny.yaml"), ("terms=match", f"device={device}", f"cuda_graphs={graphs}")
            ).memory
            for graphs in (False, True)
        ]
        differs[device] = made[0] != made[1]
    assert differs == {"auto": True, "cuda:1": True, "mps": False, "cpu": False}


@pytest.mark.parametrize("changes", [("pairs.count=8",), ("student.nfe=2", "terms=match")])
def test_graphs_keep_the_planned_gradients_and_what_is_between_them_once(folder, planner, changes):
    plain, made = (
        planner(planned, str(folder / "tiny.yaml"), (*changes, "device=cuda", f"cuda_graphs={recorded}"))
        for recorded in (False, True)
    )
    real, _ = distiller(folder, changes)
    real.gradients = Adder(real.clock, recorded=[real.optimizer, *real.fake_optimizers])
    with graphs.on_a_cpu():
        for index in range(6):  # each of the student's steps is drawn
            real.step(index)
    recorded = [one for replay in real.gradients._replays.values() for one in replay._graphs.values()]
    assert made.memory["gradients"] == sum(4 * g.numel() for one in recorded for g in one.gradients if g is not None)
    together = [made.memory["activations"] + gradients for gradients in (0, made.memory["gradients"])]
    assert together[0] <= plain.memory["gradients"] + plain.memory["activations"] <= together[1]
    assert {id(one.graph.sharing) for one in recorded} == {id(recorded[0].graph.sharing)}


@pytest.mark.parametrize("offload", [False, True])
def test_previews_are_planned_with_a_decoder_that_comes_for_them(folder, planner, offload):
    """Where a step is small, they are what takes the most. All that can be off a card is off it."""
    small = ("terms=match", "match.batch=1", "student.adapter.rank=2", "fake.adapter.rank=2")
    changes = (*(change.format(folder) for change in SD), *small, f"offload={offload}")
    made = planner(planned, str(folder / "tiny.yaml"), changes)
    real, _ = distiller(folder, changes)
    temporary = made.memory["gradients"] + made.memory["activations"]
    decoder = size(real.decode.part if offload else real.decode)  # on a CPU it need not come
    shown = peak(real.preview) + offload * decoder
    assert temporary + made.memory["previews, prompts"] == pytest.approx(shown, rel=0.1)
    assert made.memory["previews, prompts"] > 0
    held = 4 * family_of(real.info).component_weights(real.info.source)
    assert made.memory["text encoder, decoder"] == (0 if offload else held)


@pytest.mark.parametrize(
    "changes",
    [
        ("student.nfe=3", "terms=match"),
        ("student.times=[80,10,1]", "terms=match", "match.intervals=true"),
        ("terms=match,guide", "guide.guidance=2", "match.batch=4"),
    ],
)
def test_options_that_compute_levels_are_planned(folder, planner, changes):
    """FLOPs are those of real steps: of all of a student's steps, the average."""
    made = planner(planned, str(folder / "tiny.yaml"), changes)
    real, _ = distiller(folder, changes)
    counts: dict[int, int] = {}
    for index in range(40):
        k = rng.key(real.seed, "student step", index, 0) % len(real.steps)
        if k not in counts:
            with FlopCounterMode(display=False) as counter:
                real.step(index)
            counts[k] = counter.get_total_flops()
    assert len(counts) == len(real.steps)
    assert made.step_flops == pytest.approx(sum(counts.values()) / len(counts), rel=0.02)


@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.6), ("int8", 0.4), ("int4", 0.24)])
def test_a_rounded_base_is_planned_as_it_is_held(folder, planner, weights, share):
    teacher = SD if weights == "int4" else ("teacher={0}/song",)  # whose weights are in convolutions
    changes = (*teacher, "terms=match", "student.adapter.rank=4", "fake.adapter.rank=4")
    changes = tuple(change.format(folder) for change in changes)
    rounded = ("precision=bf16", f"base_weights={weights}")
    plain = planner(planned, str(folder / "tiny.yaml"), (*changes, rounded[0]))
    made = planner(planned, str(folder / "tiny.yaml"), (*changes, *rounded))
    _, teacher = distiller(folder, (*changes, *rounded))
    assert made.memory["teacher"] == size(teacher) < share * plain.memory["teacher"]
    assert made.step_flops == plain.step_flops
    # Autocast keeps the rounded weights that a backward pass needs, which the base already is, or makes anew.
    assert made.memory["activations"] <= plain.memory["activations"]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_base_that_takes_a_guidance_scale_is_planned_unless_it_is_the_teachers(folder, planner, way):
    adapters = ("student.adapter.rank=2", "fake.adapter.rank=2", "student.guidance=[1, 4]")
    changes = ("terms=match", f"parallel={way}", *adapters)
    made = planner(planned, str(folder / "tiny.yaml"), changes)
    real, teacher = distiller(folder, changes)
    more = {*map(id, real.student.base.parameters())} - {*map(id, teacher.parameters())}
    assert len(more) == (1 if way == "ddp" else len(list(real.student.base.parameters())))
    held = sum(t.numel() * t.element_size() for t in (*real.student.base.parameters(), *real.student.base.buffers()))
    assert made.memory.get("base of adapters", 0) == (0 if way == "ddp" else held)


def _tensors(state):
    return [t for t in tree_iter(state) if isinstance(t, torch.Tensor)]


def _spread(folder, changes, out) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        real, _ = distiller(folder, changes)
        for index in range(2):  # DDP sorts its buckets anew after the first
            real.step(index)
        chosen = _each_as_often(real)
        with Collectives() as collectives:
            for index in chosen:
                real.step(index)
        # What gloo's threads let go of late may be counted in one step, but not in each.
        most = min(peak(partial(real.step, index)) for index in (3, 4, 5))
        if parallel.rank() == 0:
            each = {name: count / len(chosen) for name, count in collectives.bytes.items()}
            out.write_text(json.dumps({"bytes": each, "peak": most}))


def _each_as_often(real: build.Distiller) -> list[int]:
    """Steps of a training in which each of the student's steps is trained equally often in each update."""
    if len(real.steps) == 1:
        return [2]
    count, found = len(real.steps) - ("pairs" in real.objective.streams), {}
    for index in range(2, 200):
        ks = [rng.key(real.seed, "student step", index, turn) % count for turn in range(real.fake_updates)]
        if all(k == (ks[0] + turn) % count for turn, k in enumerate(ks)):
            found.setdefault(ks[0], index)
    assert len(found) == count
    return list(found.values())


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, ("teacher={0}/song", "parallel=ddp", "accumulate=2", "fake.steps=2")),
        (2, ("parallel=fsdp", "accumulate=2", "fake.steps=2", "match.guidance=2")),
        (2, ("parallel=fsdp", "terms=match", "fake.steps=2", "student.adapter.rank=2", "fake.adapter.rank=4")),
        (2, (*GAN, "parallel=fsdp", "fake.steps=2", "match.divergence=js")),
        (2, (*GAN, "gan.features=teacher", "match.sid=1.2")),
        (2, (*GAN, "parallel=fsdp", "match.sid=1.2", "student.adapter.rank=2", "fake.adapter.rank=4")),
        (2, ("parallel=ddp", "terms=match", "match.sid=1.2")),
        (2, ("parallel=fsdp", "terms=match", "student.nfe=3", "fake.steps=2", "accumulate=2")),
        (2, (*ANCHORED, "parallel=fsdp", "student.nfe=4")),
        (2, ("parallel=fsdp", "terms=match", "student.nfe=3", "student.inputs=data", "real.images={0}/grey")),
        (2, ("parallel=fsdp", "terms=match", "match.sid=1.2", "student.adapter.rank=2", "fake.adapter.rank=4")),
        (3, ("parallel=fsdp", "precision=bf16", "gradient_checkpointing=true", "match.pairs=true")),  # 8 rows by three
    ],
    ids=lambda value: " ".join(value).replace("{0}/", "") if isinstance(value, tuple) else str(value),
)
def test_traffic_and_memory_are_those_of_real_processes(folder, planner, processes, changes):
    changes = tuple(change.format(folder) for change in changes)
    out = folder / "found.json"
    together(processes, _spread, folder, changes, out)
    found = json.loads(out.read_text())
    made = planner(planned, str(folder / "tiny.yaml"), changes, processes)
    sharded = "parallel=fsdp" in changes
    names = {"gathered": "_allgather_base_", "scattered": "_reduce_scatter_base_", "reduced": "allreduce_"}
    for ours, theirs in names.items():
        # DDP says besides which weights were idle, an integer for each.
        assert getattr(made.traffic, ours) == pytest.approx(found["bytes"].get(f"c10d::{theirs}", 0), rel=0.005), ours
    assert found["bytes"].keys() <= {f"c10d::{name}" for name in names.values()}
    assert made.traffic.processes == processes
    # DDP's buckets were there before the step.
    buckets = 0 if sharded else made.memory["optimizer"] / 2
    temporary = {"gradients", "gathered blocks", "activations", "previews, prompts"}
    held = sum(value for part, value in made.memory.items() if part not in temporary)
    # What FSDP2 has gathered is planned as a bound.
    planned_peak = made.peak - made.memory["previews, prompts"]
    assert planned_peak == pytest.approx(held + buckets + found["peak"], rel=0.15 if sharded else 0.03)


def _planned_among_others(file, out) -> None:
    torch.set_num_threads(1)
    with parallel.process_group():
        found = parallel.on_first(planned)(file, ("parallel=fsdp",), 2).peak
        if parallel.rank() == 0:
            out.write_text(str(found))


def test_the_first_of_several_processes_can_plan_while_the_others_wait(folder, planner, tmp_path):
    file = str(folder / "tiny.yaml")
    together(2, _planned_among_others, file, tmp_path / "peak")
    assert float((tmp_path / "peak").read_text()) == planner(planned, file, ("parallel=fsdp",), 2).peak


def test_a_ring_sends_what_the_closed_form_says():
    assert Traffic(4, reduced=100).sent == 150  # 2 (N - 1) / N
    assert Traffic(4, gathered=100, scattered=20).sent == 90
    assert Traffic(1, gathered=100).sent == 0
    h100, slow = GPUS["h100"], Gpu(80e9, 1e15, 5e14, 450e9)
    assert Cluster(8, h100, 1e9, 0.4).bandwidth == 450e9  # within a machine
    assert Cluster(72, h100, 50e9, 0.4).bandwidth == 400e9  # eight cards of a machine for one ring
    assert Cluster(12, h100, 50e9, 0.4).bandwidth == 200e9  # four cards of the last machine
    assert Cluster(9, h100, 50e9, 0.4).bandwidth == 50e9
    made = Cost(1, {"student": 8e15}, {}, Traffic(8, reduced=450e9), 0)
    found = pace(made, load_recipe("cifar10-cond", ["precision=bf16"]), Cluster(8, slow, 1e9, 0.5))
    assert (found.arithmetic, found.traffic) == pytest.approx((2.0, 1.75))
    assert (found.in_turn, found.at_once) == pytest.approx((3.75, 2.0))


def test_normalisations_weights_and_attention_are_as_on_gpus():
    """And as they were afterwards."""
    x, own = torch.randn(2, 4, 3), F.group_norm
    with torch.autocast("cpu", torch.bfloat16):
        assert F.group_norm(x.bfloat16(), 2).dtype == torch.bfloat16
        with _gpu_autocast():
            assert torch.nn.GroupNorm(2, 4)(x.bfloat16()).dtype == torch.float32
            assert torch.nn.LayerNorm(3)(x.bfloat16()).dtype == torch.float32
            assert torch.nn.RMSNorm(3)(x.bfloat16()).dtype == torch.float32
            with autocast(torch.device("cpu"), "bf16"):
                assert torch.is_autocast_cache_enabled()  # weights are cast once
            assert torch.is_autocast_cache_enabled()
            q, k, v = torch.randn(3, 2, 8, 16).bfloat16()
            assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
        assert not torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
        with autocast(torch.device("cpu"), "bf16"):
            assert not torch.is_autocast_cache_enabled()
    with _gpu_autocast():
        assert F.group_norm(x.bfloat16(), 2).dtype == torch.bfloat16  # there is no autocast
    assert F.group_norm is own


def test_published_networks_are_known_without_their_weights():
    denoiser, info = outline(load_recipe("imagenet64-cond").teacher)
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}
    assert abs(sum(p.numel() for p in denoiser.parameters()) - 295.9e6) < 0.1e6
    assert (info.shape, len(info.classes)) == ((3, 64, 64), 1000)


def told(file: str, share: float, changes: tuple[str, ...], gpus: int) -> tuple[str, float]:
    """The verdict on GPUs with room for `share` of the recipe's peak, and this room."""
    recipe = load_recipe(file, changes)
    denoiser, info = outline(recipe.teacher)
    made = cost(recipe, denoiser, info, gpus)
    return verdict(Ladder(recipe, denoiser, info, gpus), share * made.peak / 0.9), share * made.peak


def test_the_nearest_setting_that_fits_is_told(folder, planner):
    file, changes = str(folder / "tiny.yaml"), ("terms=regress", "regress.batch=192")
    half, room = planner(told, file, 0.6, changes, 1)
    accumulate = int(half.partition("accumulate=")[2].split()[0])
    assert planner(planned, file, (*changes, f"accumulate={accumulate}")).peak < room
    fewer = max(n for n in range(1, accumulate) if 192 % n == 0)
    assert planner(planned, file, (*changes, f"accumulate={fewer}")).peak > room
    assert "larger GPUs" in planner(told, file, 0.01, changes, 1)[0]
    # Where weights are most of it, slices are what helps.
    assert "parallel=fsdp" in planner(told, file, 0.85, ("terms=regress", "regress.batch=2"), 2)[0]


def published(source: str) -> tuple[list[int], str]:
    """Weights in millions of a model's network, of its other parts and of TAESD's decoder; the source of its parts."""
    denoiser, info = outline(f"diffusers:{source}")
    tiny = tiny_decoder(without_weights("madebyollin/taesd"), weights=False)
    counts = numel(denoiser), family_of(info).component_weights(info.source), numel(tiny)
    return [round(count / 1e4) for count in counts], info.source


def test_published_settings_need_no_network(monkeypatch):
    """Weights as published: a U-Net of 859.5 M; CLIP's text encoder, 123.1 M, and the decoder, 49.5 M; 1.2 M."""

    def ask(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", ask)
    for source in ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        counts, found = published(source)
        assert counts == [85952, 17255, 122]
        assert found.endswith("sd15")
    assert published("stabilityai/stable-diffusion-xl-base-1.0")[0][0] == 256746


def test_a_folder_and_a_cached_model_win_over_published_settings(tmp_path, monkeypatch):
    source, folder = "runwayml/stable-diffusion-v1-5", tmp_path / "runwayml" / "stable-diffusion-v1-5"
    packaged = Path(without_weights(source))
    assert (packaged / "unet" / "config.json").exists()
    have = set()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file: "path" if file in have else None)
    have |= {str(file.relative_to(packaged)) for file in packaged.rglob("*.json")}
    assert without_weights(source) == source
    have.remove("vae/config.json")
    assert without_weights(source) == str(packaged)
    monkeypatch.chdir(tmp_path)
    folder.mkdir(parents=True)
    assert without_weights(source) == source


def said(*arguments: str) -> str:
    with redirect_stdout(StringIO()) as out:
        app(arguments, result_action="return_value")
    return out.getvalue()


def test_latents_in_a_cache_take_what_is_planned(folder, planner, tmp_path):
    place = real_folder(tmp_path / "images", shape=(64, 64, 3))
    for file in place.rglob("*.png"):
        file.with_suffix(".txt").write_text("a cat")
    cache = tmp_path / "latents"
    changes = [change.format(folder) for change in (*SD, "terms=match", "student.nfe=2", "student.inputs=data")]
    changes += [f"real.images={place}", f"real.cache={cache}"]
    flight = preflight.Flight(load_recipe(str(folder / "tiny.yaml"), changes), tmp_path / "run", tmp_path)
    subject = flight.subject
    assert subject.real is not None
    wanted = dict(preflight._sizes(flight))
    subject.real.draw(1, torch.Generator(), WHOLE)
    held = sum(tensor.nbytes for file in cache.rglob("*.safetensors") for tensor in load_file(file).values())
    count = len(load_images(place))
    assert held == latents_bytes(subject.info, count) == 2 * 4 * 8 * 8 * count
    assert (wanted[subject.real.cache], dict(preflight._sizes(flight))[subject.real.cache]) == (held, 0)
    text = planner(said, "plan", str(folder / "tiny.yaml"), *changes).replace("\n", " ")
    assert f"latents of real images take 512 bytes each on the disk, {shown(held)} for {count}" in text
    later = planner(said, "plan", str(folder / "tiny.yaml"), *changes, f"real.images={tmp_path / 'later'}")
    assert "latents of real images take 512 bytes each on the disk\n" in later
    without = planner(said, "plan", str(folder / "tiny.yaml"), *changes, "real.cache=null")
    assert "latents of real images" not in without


def test_the_command_says_what_it_takes(folder, planner):
    text = planner(said, "plan", str(folder / "tiny.yaml"), "--gpus", "8", "--gpu", "h100", "--price", "2.5")
    for part in ("8 x h100, ddp", "recomputed", "traffic: ", "efficiency: ", "checkpoints: ", "pairs: ", "it fits"):
        assert part in text
    assert "at $2.50 per GPU-hour" in text
    assert not re.search(r"(?<![\d.,])0(\.0+)? [A-Za-z]", text)  # "0.0 hours"
    with pytest.raises(ValueError, match=r"match\.batch 24 is not a multiple of accumulate 1 times 7 GPUs"):
        said("plan", str(folder / "tiny.yaml"), "--gpus", "7")
    for option, value in (("--gpus", "0"), ("--utilisation", "0"), ("--utilisation", "40"), ("--network", "0")):
        with pytest.raises(CycloptsError, match=rf'"{value}(\.0)?" for {option}'):
            app(["plan", str(folder / "tiny.yaml"), option, value], exit_on_error=False, print_error=False)
