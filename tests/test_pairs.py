"""Noise-image pairs: exact, shared between processes, safe against interruption, and clear about damage."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from forked import fork
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, PairStore, fingerprint
from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.sampler import euler, heun
from distmatch.diffusion.schedule import EDM, Flow
from distmatch.models.unet import UNet
from distmatch.system import rng
from distmatch.system.process import identity


def spec(of: Denoiser, **changes) -> PairSpec:
    """24 pairs in shards of 10, 10 and 4."""
    settings = {
        "teacher": "tiny",
        "fingerprint": fingerprint(of),
        "sampler": "heun",
        "steps": 3,
        "guidance": 1.0,
        "seed": 5,
        "count": 24,
        "shard_size": 10,
        "shape": (1, 8, 8),
        "classes": 3,
        "dtype": "float32",
    }
    return PairSpec(**{**settings, **changes})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes started here: sums over several threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def teacher() -> Denoiser:
    return tiny.teacher()


@pytest.fixture
def store(teacher, tmp_path) -> Path:
    build(tmp_path / "store", spec(teacher), teacher, batch=4)
    return tmp_path / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {p.name: p.stat() for p in folder.glob("shard-*.safetensors")}
    return {name: (s.st_ino, s.st_mtime_ns) for name, s in stats.items()}


def flip(file: Path, position: int, mask: int = 0xFF) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


def check(folder: Path) -> None:
    PairStore.open(folder).verify()


# What is stored


@pytest.mark.parametrize(("sampler", "sample"), [("heun", heun), ("euler", euler)])
def test_pairs_are_what_the_sampler_makes_of_the_noise(teacher, tmp_path, sampler, sample):
    build(tmp_path, spec(teacher, sampler=sampler), teacher, batch=4)
    pairs = PairStore.open(tmp_path).batch(range(24))
    assert torch.equal(pairs.z, rng.noise(5, range(24), (1, 8, 8)))
    for shard in range(0, 24, 10):
        for start in range(shard, min(shard + 10, 24), 4):
            cut = slice(start, min(start + 4, shard + 10, 24))
            with torch.no_grad():
                y = sample(teacher, teacher.schedule, pairs.z[cut], Cond(label=torch.arange(24)[cut] % 3), 3)
            assert torch.equal(pairs.y[cut], y)


def test_guided_pairs(teacher, tmp_path):
    build(tmp_path, spec(teacher, guidance=2.5, count=8), teacher, batch=8)
    pairs = PairStore.open(tmp_path).batch(range(8))
    with torch.no_grad():
        y = heun(guided(teacher, 2.5), teacher.schedule, pairs.z, Cond(label=torch.arange(8) % 3), 3)
    assert torch.equal(pairs.y, y)


def test_unconditional_pairs(tmp_path):
    torch.manual_seed(0)
    net = UNet(widths=(8,))
    torch.nn.init.normal_(net.head.weight, std=0.1)
    teacher = Denoiser(net, Flow(), Prediction("velocity"))  # in training mode: the build must not mind
    build(tmp_path, spec(teacher, classes=0, count=4), teacher)
    pairs = PairStore.open(tmp_path).batch(range(4))
    with torch.no_grad():
        assert torch.equal(pairs.y, heun(teacher.eval(), teacher.schedule, pairs.z, None, 3))


def test_batch_size_changes_nothing_but_rounding(teacher, store, tmp_path):
    build(tmp_path / "other", spec(teacher), teacher, batch=7)
    y, other = (PairStore.open(folder).images(0, 24) for folder in (store, tmp_path / "other"))
    assert y.abs().max() > 0.5
    assert (other - y).abs().max() < 1e-5


def test_noise_is_not_stored(store):
    sizes = []
    for shard, rows in enumerate((10, 10, 4)):
        file = store / f"shard-{shard:05d}.safetensors"
        assert set(load_file(file)) == {"y"}
        sizes.append(file.stat().st_size - rows * 64 * 4)
        for z in rng.noise(5, range(10 * shard, 10 * shard + rows), (1, 8, 8)):
            assert z.numpy().tobytes() not in file.read_bytes()
    assert max(sizes) < 1000  # images, and a header


def test_noises_are_distinct(store):
    pairs = PairStore.open(store).batch(range(24))
    assert len(pairs.z.flatten(1).unique(dim=0)) == 24


def test_float16_stores_the_rounded_images(teacher, store, tmp_path):
    build(tmp_path / "half", spec(teacher, dtype="float16"), teacher, batch=4)
    half, full = PairStore.open(tmp_path / "half").batch(range(24)), PairStore.open(store).batch(range(24))
    assert half.y.dtype == torch.float32
    assert torch.equal(half.y, full.y.half().float())
    assert torch.equal(half.z, full.z)
    size = {f: (f / "shard-00000.safetensors").stat().st_size for f in (store, tmp_path / "half")}
    assert size[store] - size[tmp_path / "half"] == 10 * 64 * 2
    check(tmp_path / "half")


def test_manifest_names_everything(teacher, store):
    manifest = json.loads((store / "manifest.json").read_text())
    assert PairSpec(**{**manifest["spec"], "shape": (1, 8, 8)}) == spec(teacher)
    assert manifest["versions"] == {"distmatch": version("distmatch"), "torch": version("torch")}


def test_fingerprint_sees_weights_schedule_and_prediction_but_not_layout(teacher):
    known = fingerprint(teacher)
    assert fingerprint(tiny.teacher()) == known
    assert fingerprint(tiny.teacher().to(memory_format=torch.contiguous_format)) == known
    changed = tiny.teacher()
    with torch.no_grad():
        changed.net.get_parameter("head.bias")[0] += 1e-7
    others = [
        changed,
        tiny.teacher().double(),
        Denoiser(teacher.net, EDM(sigma_max=40.0), teacher.prediction),
        Denoiser(teacher.net, teacher.schedule, Prediction("edm", sigma_data=0.6)),
        Denoiser(teacher.net, teacher.schedule, Prediction("x0")),
    ]
    assert len({known, *map(fingerprint, others)}) == 6


# Reading


def test_draw_covers_every_pair_once_per_pass_and_continues_by_position(store):
    pairs = PairStore.open(store)
    everything = pairs.batch(range(24))
    number = {y.numpy().tobytes(): i for i, y in enumerate(everything.y)}
    passes = []
    for epoch in range(2):
        drawn = [pairs.draw(1, 24 * epoch + start, 8) for start in (0, 8, 16)]
        order = [number[y.numpy().tobytes()] for part in drawn for y in part.y]
        assert sorted(order) == list(range(24))
        assert torch.equal(torch.cat([part.z for part in drawn]), everything.z[order])
        assert [i for part in drawn for i in part.index] == order
        passes.append(order)
    assert passes[0] != passes[1]
    across = PairStore.open(store).draw(1, 20, 10)  # a new process, in the middle, over the end of a pass
    assert [number[y.numpy().tobytes()] for y in across.y] == passes[0][20:] + passes[1][:6]


def test_images_are_the_pairs_own(store):
    pairs = PairStore.open(store)
    assert torch.equal(pairs.images(7, 23), pairs.batch(range(7, 23)).y)


@pytest.mark.parametrize("index", [-1, 24])
def test_no_pair_beyond_the_ends(store, index):
    with pytest.raises(IndexError, match=r"numbered 0\.\.23"):
        PairStore.open(store).batch([index])


# Building


def test_finished_builds_write_nothing(teacher, store):
    before, ids = contents(store), identities(store)
    ready = []
    assert set(before) == {"manifest.json", *ids}, "no locks, no remnants"
    assert build(store, spec(teacher), teacher, progress=ready.append) == 0
    assert ready == [24]
    assert contents(store) == before
    assert identities(store) == ids


def test_a_store_grows(teacher, store, tmp_path):
    ids, drawn = identities(store), PairStore.open(store).draw(0, 0, 24)
    ready = []
    assert build(store, spec(teacher, count=37), teacher, batch=4, progress=ready.append) == 10 + 7
    assert (ready[0], sum(ready)) == (20, 37)
    now = identities(store)
    assert {n for n in ids if now[n] == ids[n]} == {"shard-00000.safetensors", "shard-00001.safetensors"}
    build(tmp_path / "whole", spec(teacher, count=37), teacher, batch=4)
    assert contents(store) == contents(tmp_path / "whole")
    # A run that was told 24 goes on with the same pairs, and its build has nothing to do.
    assert build(store, spec(teacher), teacher) == 0
    again = PairStore.open(store, count=24).draw(0, 0, 24)
    assert torch.equal(again.z, drawn.z)
    assert torch.equal(again.y, drawn.y)


def slow_build(folder: Path, settings: PairSpec) -> tuple[int, int]:
    """Return how many pairs this process sampled, and how many it saw finished."""
    torch.set_num_threads(1)
    teacher, ready = tiny.teacher(), []
    teacher.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    return build(folder, settings, teacher, batch=4, progress=ready.append), sum(ready)


@pytest.fixture
def settings(teacher) -> PairSpec:
    """64 pairs in 16 shards; a slow teacher takes at least 50 ms for each."""
    return spec(teacher, count=64, shard_size=4)


@pytest.fixture
def undisturbed(teacher, settings, tmp_path) -> dict[str, bytes]:
    build(tmp_path / "undisturbed", settings, teacher, batch=4)
    return contents(tmp_path / "undisturbed")


def test_two_processes_share_one_store(settings, undisturbed, tmp_path):
    with ProcessPoolExecutor(1, fork) as pool:
        other = pool.submit(slow_build, tmp_path / "store", settings)
        here, ready = slow_build(tmp_path / "store", settings)
        there, ready_there = other.result(60)
    assert here + there == 64, "each shard is built exactly once"
    assert min(here, there) > 0, "both took part"
    assert ready == ready_there == 64, "each saw all of it finished"
    assert contents(tmp_path / "store") == undisturbed


def test_a_killed_build_continues(teacher, settings, undisturbed, tmp_path):
    store = tmp_path / "store"
    process = fork.Process(target=slow_build, args=(store, settings))
    process.start()
    while not (store / "shard-00002.safetensors").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    writer = f"{identity().partition('-')[0]}-{process.pid}-0"  # had it been writing this one
    (store / f".shard-00009.safetensors.{writer}-k1ll3d00").write_bytes(b"half")
    finished = identities(store)
    assert 3 <= len(finished) < 16
    with pytest.raises(ValueError, match=rf"incomplete: {len(finished)} of 16 shards .* run the same build command"):
        PairStore.open(store)
    assert build(store, settings, teacher, batch=4, expiry=1.0) == 64 - 4 * len(finished)
    now = identities(store)
    assert {name: now[name] for name in finished} == finished
    assert contents(store) == undisturbed


def test_an_exception_keeps_finished_shards_and_frees_the_claim(teacher, settings, undisturbed, tmp_path):
    store = tmp_path / "store"

    def stop(_: int) -> None:
        if (store / "shard-00001.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, settings, teacher, batch=4, progress=stop)
    finished = identities(store)
    assert sorted(finished) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert build(store, settings, teacher, batch=4) == 56
    now = identities(store)
    assert {name: now[name] for name in finished} == finished
    assert contents(store) == undisturbed


def test_an_image_that_is_not_finite_stops_the_build(teacher, tmp_path):
    with torch.no_grad():
        teacher.net.get_parameter("head.bias").fill_(1e6)
    build(tmp_path / "full", spec(teacher), teacher)
    with pytest.raises(ValueError, match=r"pairs 0\.\.9: .* not finite in float16.* choose float32"):
        build(tmp_path / "half", spec(teacher, dtype="float16", sampler="euler", steps=1), teacher)
    assert not list((tmp_path / "half").glob("shard-*.safetensors"))


# Refusals


def test_another_teacher_is_named(teacher, store):
    other = tiny.teacher(seed=1)
    a, b = fingerprint(teacher)[:12], fingerprint(other)[:12]
    with pytest.raises(ValueError, match=rf"another teacher: by 'tiny' with fingerprint {a}; .* has {b}"):
        PairStore.open(store, fingerprint(other))
    assert len(PairStore.open(store, fingerprint(teacher))) == 24
    with pytest.raises(ValueError, match=r"teacher 'tiny' there, 'huge' here") as error:
        build(store, spec(other, teacher="huge"), other)
    assert a in str(error.value)
    assert b in str(error.value)


def test_every_changed_setting_is_named(teacher, store):
    before = contents(store)
    changed = spec(teacher, steps=4, guidance=2.0, seed=6, dtype="float16", shard_size=12)
    with pytest.raises(ValueError, match="holds other pairs") as error:
        build(store, changed, teacher)
    assert str(error.value).splitlines()[1:] == [
        "  steps: 3 there, 4 here",
        "  guidance: 1.0 there, 2.0 here",
        "  seed: 5 there, 6 here",
        "  shard_size: 10 there, 12 here",
        "  dtype: 'float32' there, 'float16' here",
        "Choose another folder, or delete this one if its pairs are no longer needed",
    ]
    assert contents(store) == before


def test_a_renamed_teacher_is_the_same_teacher(teacher, store):
    assert build(store, spec(teacher, teacher="/elsewhere/tiny", guidance=1), teacher) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "dopri"}, "sampler 'dopri' is unknown; expected euler or heun"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; expected float32 or float16"),
        ({"count": 0}, "count is 0; expected at least 1"),
    ],
)
def test_impossible_settings(teacher, change, message):
    with pytest.raises(ValueError, match=message):
        spec(teacher, **change)


def test_missing_manifest(teacher, store):
    before = contents(store)
    (store / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"not a store of pairs: it has no manifest\.json"):
        PairStore.open(store)
    assert build(store, spec(teacher), teacher) == 0  # the shards know where they belong
    assert contents(store) == before


def test_changed_manifest(teacher, store):
    file = store / "manifest.json"
    file.write_text(file.read_text().replace('"count": 24', '"count": 14'))
    with pytest.raises(ValueError, match=r"manifest\.json cannot be used: its digest is not that of its content"):
        PairStore.open(store)


def test_more_pairs_than_there_are(store):
    with pytest.raises(ValueError, match="holds 24 pairs, not 25"):
        PairStore.open(store, count=25)


def test_deleted_shard_is_rebuilt_alone(teacher, store):
    before, ids = contents(store), identities(store)
    (store / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"incomplete: 2 of 3 shards are there; run the same build command again"):
        PairStore.open(store)
    assert build(store, spec(teacher), teacher, batch=4) == 10
    assert contents(store) == before
    assert {n for n, i in identities(store).items() if ids[n] == i} == set(ids) - {"shard-00001.safetensors"}


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_shard(teacher, store, length):
    file = store / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    before = contents(store)
    message = r"shard-00001\.safetensors is damaged .*Delete it and run the same build command again"
    with pytest.raises(ValueError, match=message):
        PairStore.open(store)
    with pytest.raises(ValueError, match=message):
        build(store, spec(teacher), teacher)
    assert contents(store) == before


def test_every_flipped_byte_is_found(teacher, tmp_path):
    """One bit, in turn, of every byte of the header and of a spread of those of the images."""
    build(tmp_path, spec(teacher, count=4), teacher)
    file = tmp_path / "shard-00000.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in [*range(header), *range(header, len(good), 17), len(good) - 1]:
        flip(file, position, 1 << position % 8)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors"):
            check(tmp_path)
        file.write_bytes(good)
    check(tmp_path)


def test_verify_lists_every_bad_shard(store):
    pairs = PairStore.open(store)
    for shard in (0, 2):
        flip(store / f"shard-{shard:05d}.safetensors", -1, 0x01)
    checked = []
    with pytest.raises(ValueError, match="damaged") as error:
        PairStore.open(store).verify(checked.append)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "shard-00000.safetensors is damaged (its images are not those that were written)" in lines[0]
    assert "shard-00002.safetensors is damaged" in lines[1]
    assert "Delete it and run the same build command again: it rebuilds just this shard" in lines[1]
    assert checked == [10]
    assert len(pairs) == 24


def test_opening_lists_every_bad_shard(store):
    for shard in (0, 2):
        (store / f"shard-{shard:05d}.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"(?s)shard-00000\.safetensors is damaged.*shard-00002\.safetensors is damaged"
    ):
        PairStore.open(store)


@pytest.mark.parametrize("foreign", ["another seed", "another place"])
def test_foreign_shard(teacher, store, tmp_path, foreign):
    target = store / "shard-00001.safetensors"
    if foreign == "another seed":
        build(tmp_path / "other", spec(teacher, seed=6), teacher, batch=4)
        target.write_bytes((tmp_path / "other" / target.name).read_bytes())
    else:
        target.write_bytes((store / "shard-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is of another store, or of another place"):
        PairStore.open(store)


def test_a_changed_random_generator_is_found_on_opening(teacher, store, monkeypatch):
    real = rng.noise

    def changed(seed, indices, shape):
        z = real(seed, indices, shape)
        z[0, 0, 0, 0] += 1e-6
        return z

    monkeypatch.setattr(rng, "noise", changed)
    with pytest.raises(ValueError, match=r"noise regenerated for it is not what the teacher saw.*made with torch 2"):
        PairStore.open(store)


def test_verify_regenerates_the_noise_of_every_shard(store):
    pairs = PairStore.open(store)
    file = store / "shard-00002.safetensors"
    with safe_open(file, framework="pt") as opened:
        meta = json.loads(opened.metadata()["distmatch"])
    meta["noise_sha256"] = "0" * 64
    save_file(load_file(file), file, metadata={"distmatch": json.dumps(meta)})
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: the noise regenerated for it is not what"):
        pairs.verify()


def test_the_specification_must_be_the_teachers(teacher, tmp_path):
    with pytest.raises(ValueError, match="of another teacher"):
        build(tmp_path, replace(spec(teacher), fingerprint="0" * 64), teacher)
