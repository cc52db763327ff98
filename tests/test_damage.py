"""Every kind of file that we write, with bits flipped, cut, deleted and swapped: an error, or the right result."""

import os
import random
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import bucket
import pytest
import tiny
import torch
import web
from test_published import write as write_edm

from distmatch.commands import binding, comparison
from distmatch.data.embeddings import embed
from distmatch.data.imaging import Images, png
from distmatch.data.pair_builder import build
from distmatch.data.pairs import PairSpec, PairStore, fingerprint, prompts_digest
from distmatch.diffusion.conditions import Classes
from distmatch.diffusion.denoiser import Cond
from distmatch.evaluation import spaces
from distmatch.evaluation.features import load_reference, reference
from distmatch.models.classifier import Classifier
from distmatch.models.diffusers.export import _write, export_diffusers
from distmatch.models.edm import checkpoints
from distmatch.models.folder import load_model
from distmatch.models.pixels import Pixels, principal_components
from distmatch.recipe.smoke import random_edm
from distmatch.system import download, storage
from distmatch.system.digests import Damaged, load_file, read_file, save_file
from distmatch.system.files import together, write_atomic, write_json
from distmatch.system.plain import read_json
from distmatch.system.storage import Folder, kept, local
from distmatch.training.checkpoint import Checkpoints


def flat(value) -> list:
    """Tensors as lists: results to compare by `==`."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [[str(k), flat(v)] for k, v in value.items()]
    return [flat(v) for v in value] if isinstance(value, list | tuple) else value


class Model:
    def make(self, folder: Path, seed: int) -> None:
        tiny.teacher_folder(folder, seed)

    def read(self, folder: Path):
        denoiser, info = load_model(folder)
        return flat([denoiser.state_dict(), asdict(info), str(denoiser.schedule), str(denoiser.prediction)])


class Checkpoint:
    """Two of them, since each is named by its step."""

    def make(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        network = torch.nn.Linear(5, 5)
        saved = Checkpoints(folder, {"network": network}, keep=2)
        for step in (3, 4):
            network.weight.data.mul_(3)
            saved.save(step, {"seconds": 1.5 * step + seed}, best=0.25 if step == 3 else None)
            saved.wait()

    def read(self, folder: Path):
        network = torch.nn.Linear(5, 5)
        found = Checkpoints(folder, {"network": network})
        step, best = found.load(4), found.best() or {"step": 3, "score": 0.25}
        return flat([step, network.state_dict(), found.load(3), network.state_dict(), best["step"], best["score"]])


class Pairs:
    def make(self, folder: Path, seed: int) -> None:
        teacher, shape, prompts = tiny.teacher(), (1, 8, 8), ["a", "b", str(seed)]
        spec = PairSpec("tiny", fingerprint(teacher), "heun", 2, 1.0, seed, 10, 4, shape, 3, "float32")
        build(folder, replace(spec, prompts=prompts_digest(prompts)), teacher, Classes(3), prompts=prompts)

    def read(self, folder: Path):
        store = PairStore.open(folder, fingerprint(tiny.teacher()))
        return flat([store.batch(range(10)).y, store.batch(range(10)).z, store.prompts()])


class Evaluation:
    """Feature spaces, their references, and figures of real images."""

    def make(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        net = Classifier(1, (8, 8), ("a", "b"), (4, 8, 8)).eval()
        made = {"pixels": principal_components(images(seed), 4), "classifier": net}
        test = Images(images().pixels, torch.arange(24) % 2, ("a", "b"))
        spaces.save_spaces(made, images(seed), test, folder, "noise")

    def read(self, folder: Path):
        found = [Pixels.load(folder / "pixels"), Classifier.load(folder / "classifier")]
        names = ("reference-pixels.safetensors", "reference.safetensors")
        real = [load_reference(folder / name, space) for name, space in zip(names, found, strict=True)]
        if not (folder / "figures.json").exists():
            raise ValueError(f"{folder} has no figures of real images, as those of earlier versions")
        rows = spaces.known_rows(str(folder), tiny.INFO, list(zip(found, real, strict=True)), 24)
        return flat([[space.state_dict() for space in found], [list(vars(one).values()) for one in real], rows[:-1]])


class Settings:
    """What a run was started with; figures that are read again."""

    def make(self, folder: Path, seed: int) -> None:
        binding.same_settings({"lr": 1e-3 + seed, "steps": 30}, folder / "settings.json")
        write_json(folder / "eval.json", {"rows": [{"name": "student", "fid": 12.5}]})

    def read(self, folder: Path):
        binding.same_settings({"lr": 1e-3, "steps": 30}, folder / "settings.json")
        file, rows = folder / "eval.json", [{"name": "student", "fid": 12.5}]
        return read_json(file, dict).get("rows", rows) if file.exists() else rows


def images(seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (24, 1, 8, 8), generator=generator).to(torch.uint8), None, ())


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def damages(content: bytes, generator: random.Random, flips: int):
    """Damaged versions of a file's content; every other flip is in its first 300 bytes, where headers are."""
    for number in range(flips):
        position = generator.randrange(min(300, len(content)) if number % 2 else len(content))
        yield content[:position] + bytes([content[position] ^ 1 << generator.randrange(8)]) + content[position + 1 :]
    for _ in range(4):
        yield content[: generator.randrange(len(content))]
    yield b""
    yield None


def refusal(read, right) -> str:
    """What `read()` says against reading, which otherwise gives what is `right`."""
    try:
        assert read() == right
    except ValueError as error:
        return str(error) or "?"
    return ""


@pytest.mark.parametrize("kind", [Model, Checkpoint, Pairs, Evaluation, Settings])
def test_damage_is_an_error_or_changes_nothing(tmp_path, kind):
    kind, folder, other = kind(), tmp_path / "a", tmp_path / "b"
    kind.make(folder, 0)
    kind.make(other, 1)
    right, generator, refused = kind.read(folder), random.Random(0), 0
    there = files(folder)
    for file in there:
        content = file.read_bytes()
        swaps = [f.read_bytes() for f in [*there, *files(other)] if f.suffix == file.suffix]
        for damaged in [*damages(content, generator, 16), *swaps]:
            file.unlink() if damaged is None else file.write_bytes(damaged)
            error = refusal(lambda: kind.read(folder), right)
            assert str(folder) in (error or str(folder))
            refused += bool(error)
            file.write_bytes(content)
    assert refused > 16 * len(there)
    assert kind.read(folder) == right


def test_any_bit_of_numbers_counts(tmp_path):
    """Each bit of a file of a few hundred bytes: what can still be read is what was written."""
    tensors = {"a": torch.arange(3.0), "b": torch.tensor([[7]], dtype=torch.int16), "none": torch.zeros(0, 2)}
    file, metadata = tmp_path / "x.safetensors", {"source": "noise"}
    save_file(tensors, file, metadata)
    content, accepted = file.read_bytes(), 0
    for position in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        try:
            found, said = read_file(file)
        except Damaged:
            continue
        accepted += 1
        assert flat(found) == flat({name: tensors[name] for name in found})
        assert found.keys() == tensors.keys()
        assert said.get("source") == "noise"
    assert accepted <= 8 * (len("sha256") + 7)  # the digest's own name, and the spaces behind the header
    file.write_bytes(content)
    assert flat(dict(sorted(load_file(file).items()))) == flat(tensors)


# What can be made again


def test_damaged_references_are_made_again(tmp_path, capsys):
    torch.manual_seed(0)
    net = Classifier(1, (8, 8), ("a", "b"), (4, 8, 8)).eval()
    right = flat(list(vars(reference(images(), net, cache=None)).values()))
    first = reference(images(), net, tmp_path)
    reference(images(1), net, tmp_path)
    (file,) = (f for f in files(tmp_path) if load_reference(f).images == first.images)
    (another,) = (f for f in files(tmp_path) if f != file)
    for damaged in [*damages(file.read_bytes(), random.Random(1), 16), another.read_bytes()]:
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert flat(list(vars(reference(images(), net, tmp_path)).values())) == right
    assert "it is made again" in capsys.readouterr().err


def test_damaged_embeddings_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distmatch.data.computed.SHARD", 4)
    texts, made = [str(i) for i in range(10)], []

    def encode(part):
        made.append(list(part))
        return Cond(text=torch.tensor([[[float(text), 0.5]] for text in part]))

    def read():
        return flat(embed(tmp_path / "key", texts, encode)(range(10)).text)

    right = read()
    assert right == [[[float(i), 0.5]] for i in range(10)]
    first, second, _ = files(tmp_path)
    for damaged in [*damages(first.read_bytes(), random.Random(2), 16), second.read_bytes()]:
        first.unlink() if damaged is None else first.write_bytes(damaged)
        assert read() == right
    assert len(made) > 16
    assert made[3:] == [texts[:4]] * len(made[3:])
    assert capsys.readouterr().err.count("It is made again") >= len(made) - 4


def test_damaged_imports_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    write_edm(tmp_path / "t.pkl", random_edm("edm-cifar10-32x32-uncond-vp")[0].net)
    right = checkpoints.cached_edm(str(tmp_path / "t.pkl"))[0].state_dict()
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    found = checkpoints.cached_edm(str(tmp_path / "t.pkl"))[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in right.items())
    assert capsys.readouterr().err.count("It is imported again") == 1


def test_damaged_figures_of_a_method_are_measured_again(tmp_path, capsys):
    def make(folder: Path, name: str) -> None:
        picture = png(torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy())
        write_atomic(folder / "000000.png", lambda p: p.write_bytes(picture))
        write_json(folder / "figures.json", {"name": name, "fid": 12.5})

    make(tmp_path / "euler", "Euler")
    make(tmp_path / "other", "Other")
    for file in files(tmp_path / "euler"):
        content = file.read_bytes()
        for damaged in [*damages(content, random.Random(3), 16), (tmp_path / "other" / file.name).read_bytes()]:
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert comparison.finished(tmp_path / "euler", "Euler", 1) in (None, {"name": "Euler", "fid": 12.5})
            file.write_bytes(content)
    assert "Euler is measured again" in capsys.readouterr().out


def test_damaged_copies_of_remote_files_are_fetched_again(tmp_path, monkeypatch, capsys):
    home = bucket.make(tmp_path, monkeypatch)
    Folder("bucket://a").write("x.bin", lambda path: path.write_bytes(bytes(range(200))))
    copy = local("bucket://a/x.bin")
    assert local("bucket://a/x.bin") == copy
    for damaged in damages(bytes(range(200)), random.Random(4), 20):
        copy.unlink() if damaged is None else copy.write_bytes(damaged)
        monkeypatch.setattr(storage, "_compared", set())  # as in another process
        assert local("bucket://a/x.bin").read_bytes() == bytes(range(200))
    assert len(bucket.fetched(home)) == 27
    assert capsys.readouterr().err.count("it is fetched again") == 25


# What does not arrive whole


def test_a_download_that_ends_early_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    whole = bytes(range(256)) * 5000
    with web.serving({"/t.pkl": whole}, cut={"/t.pkl": 700_000}) as site:
        with pytest.raises(ValueError, match=r"t.pkl cannot be fetched: 700,000 of 1,280,000 bytes arrived.*elsewhere"):
            checkpoints._local(f"{site.url}/t.pkl")
        assert not files(tmp_path)
        site.cut.clear()
        file = checkpoints._local(f"{site.url}/t.pkl")
        assert file.read_bytes() == whole
        file.write_bytes(whole[:-9])
        storage._compared.clear()
        assert checkpoints._local(f"{site.url}/t.pkl").read_bytes() == whole
        assert len(site.asked) == 3


def test_a_download_is_compared_with_the_hash_in_its_name(tmp_path):
    digest = "e3b0c442"  # of nothing
    with web.serving({f"/a-{digest}.pth": b"", f"/b-{digest}.pth": b"x"}) as site:
        download.download(f"{site.url}/a-{digest}.pth", tmp_path / "a")
        with pytest.raises(ValueError, match=rf"what arrived is not the file whose SHA-256 begins {digest}"):
            download.download(f"{site.url}/b-{digest}.pth", tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": 9}, "x did not arrive whole: 3 of 9 bytes"),
        ({"md5Hash": "AAAA"}, "its md5 is 900150983cd24fb0d6963f7d28e17f72, not 000000"),
        (
            {"lfs": {"sha256": "00"}},
            "its sha256 is ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad, not 00",
        ),
    ],
)
def test_a_remote_file_must_arrive_as_its_store_describes_it(tmp_path, monkeypatch, said, message):
    bucket.make(tmp_path, monkeypatch)
    Folder("bucket://a").write("x", lambda path: path.write_bytes(b"abc"))
    plain = bucket.Bucket.info
    monkeypatch.setattr(bucket.Bucket, "info", lambda self, path: plain(self, path) | said)
    with pytest.raises(ValueError, match=message):
        local("bucket://a/x")
    assert kept(next(iter([storage.COPIES / "x"]))) is None
    assert not files(storage.COPIES)


# Killed between two files


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """`killed(n)`: from the n-th change of a folder on, this process does nothing more."""
    left = [10**9]

    def dying(change):
        def changed(*arguments, **keywords):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*arguments, **keywords)

        return changed

    for name in ("mkdir", "unlink", "rmdir", "rename", "replace", "fsync", "chmod"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))

    def start(changes: int) -> None:
        left[0] = changes

    return start


OLD = {"a": "1", "part/x": "1", "part/y": "1", "last": "1"}
NEW = {"a": "2", "b": "2", "part/x": "2", "part/z": "2", "last": "2"}


def write_tree(folder: Path, content: dict[str, str]) -> None:
    with together(folder, "last") as beside:
        for name, text in content.items():
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    found = {file.relative_to(folder).as_posix(): file.read_text() for file in files(folder)}
    return {name: text for name, text in found.items() if not name.startswith(".")}


def test_files_that_are_one_thing_are_replaced_together(tmp_path, killed):
    outcomes, changes = set(), 0
    while True:
        folder = tmp_path / str(changes)
        write_tree(folder, OLD)
        (folder / "own").write_text("stays")
        killed(changes)
        try:
            write_tree(folder, NEW)
            finished = True
        except Killed:
            finished = False
        killed(10**9)
        found = tree(folder)
        assert found.pop("own") == "stays"
        outcomes.add(found.get("last", "none"))
        if "last" in found:
            assert found in (OLD, NEW)
        write_tree(folder, NEW)
        assert tree(folder) == {**NEW, "own": "stays"}
        if finished:
            break
        changes += 1
    assert outcomes == {"1", "none", "2"}
    assert changes > 15


def test_a_model_is_the_old_one_or_the_new_one_or_none(tmp_path, killed):
    right = [flat(tiny.teacher(seed).state_dict()) for seed in (0, 1)]
    seen = set()
    for changes in range(0, 30, 2):
        folder = tiny.teacher_folder(tmp_path / str(changes), seed=0)
        killed(changes)
        with suppress(Killed):
            tiny.teacher_folder(folder, seed=1)
        killed(10**9)
        if (folder / "config.json").exists():
            seen.add(right.index(flat(load_model(folder)[0].state_dict())))
    assert seen == {0, 1}


def test_an_export_over_an_older_one_is_one_of_them_or_none(tmp_path, killed):
    def export(value: str) -> None:
        def write(folder: Path) -> None:
            for part in ("unet", "vae", value):
                (folder / part).mkdir()
                (folder / part / "weights").write_text(value)
            (folder / "model_index.json").write_text(value)

        _write(tmp_path / "out", "diffusers", "model_index.json", write, {})

    def state() -> set[str]:
        """The values of the parts that the index names; nothing without an index."""
        out = tmp_path / "out"
        if not (out / "model_index.json").exists():
            return set()
        value = (out / "model_index.json").read_text()
        return {value, *((out / part / "weights").read_text() for part in ("unet", "vae", value))}

    seen = set()
    for changes in range(0, 60, 2):
        export("1")
        assert state() == {"1"}
        killed(changes)
        with suppress(Killed):
            export("2")
        killed(10**9)
        assert len(state()) < 2
        seen |= state() or {"none"}
    assert seen == {"1", "2", "none"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        *("2", "distmatch.json", "model_index.json", "unet", "vae")
    ]


def test_an_export_replaces_nothing_but_an_export(tmp_path):
    def write(folder: Path) -> None:
        (folder / "last").touch()

    (tmp_path / "model_index.json").touch()  # a model of someone's
    with pytest.raises(ValueError, match=r"holds model_index.json; only an older export diffusers of distmatch is"):
        export_diffusers("mnist", tmp_path)
    _write(tmp_path / "out", "lora", "last", write, {})
    _write(tmp_path / "out", "lora", "last", write, {})
    with pytest.raises(ValueError, match=r"holds distmatch.json, last; only an older export diffusers"):
        export_diffusers("mnist", tmp_path / "out")
