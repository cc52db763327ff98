"""A disk that is full, whoever writes: one message, no file half written, nothing lost, and room is all it takes."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from distmatch.commands import binding, cli, distillation
from distmatch.commands.report_page import report
from distmatch.commands.sample import Options, sample
from distmatch.data import pair_builder
from distmatch.data.embeddings import embed
from distmatch.data.pairs import PairSpec, PairStore, fingerprint
from distmatch.diffusion.denoiser import Cond
from distmatch.evaluation.features import Reference
from distmatch.models.classifier import Classifier
from distmatch.models.folder import save_model
from distmatch.recipe.loading import load_recipe
from distmatch.system import storage
from distmatch.system.disk import explained
from distmatch.system.files import write_atomic, write_json
from distmatch.training import log
from distmatch.training.checkpoint import Checkpoints

SIZE = 8 * 2**20


class Disk:
    """A small file system or, where none can be mounted, a limit on the size of every file."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def full(self, room: int = 0):
        """Within it, `room` bytes are free, in pages of 4096."""
        if self.mounted:
            filler = self.folder / "filler"
            free = os.statvfs(self.folder)
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
            try:
                yield
            finally:
                filler.unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def close(self):
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(work) -> str:
    """What the command line would say of what `work()` raises."""
    with pytest.raises((OSError, ValueError)) as found:
        work()
    return str(found.value) if isinstance(found.value, ValueError) else str(explained(found.value))


def _reference(folder: Path):
    Reference(torch.zeros(64), torch.eye(64), torch.zeros(9, 64), 9, "it", "", "").save(folder / "r.safetensors")


def _checkpoint(folder: Path):
    checkpoints = Checkpoints(folder, {"network": torch.nn.Linear(100, 100)})
    checkpoints.save(3)
    checkpoints.close()


def _log(folder: Path):
    lines = log.JsonLines(folder / "log.jsonl", 10**6)
    try:
        lines.scalars(1, {"loss": 0.5})
    finally:
        lines.close()


def _tensorboard(folder: Path):
    board = log.TensorBoard(folder, {}, 0)
    try:
        for step in range(200):
            board.scalars(step, {"loss" * 99: 0.5})
    finally:
        board.close()


def _pairs(folder: Path):
    teacher = tiny.teacher()
    spec = PairSpec("tiny", fingerprint(teacher), "euler", 1, 1.0, 0, 8, 4, (1, 8, 8), 3, "float32")
    pair_builder.build(folder, spec, teacher)
    PairStore.open(folder).verify()


def _embeddings(folder: Path):
    embed(folder, ["a", "b"], lambda prompts: Cond(text=torch.ones(len(prompts), 7, 99)))


def _report(folder: Path):
    source = folder.parent.parent / "run"
    source.mkdir(exist_ok=True)
    (source / "settings.json").write_text("{}")
    report([source], folder / "report.html")


def _copy(folder: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/a.bin", b"x" * 20_000)
    before, storage.COPIES = storage.COPIES, folder
    try:
        assert storage.local("memory://a.bin").read_bytes() == b"x" * 20_000
    finally:
        storage.COPIES = before


def _figure(folder: Path):
    write_atomic(folder / "figure.png", lambda file: Figure().savefig(file, format="png"))


def _sample(folder: Path):
    sample("mnist", Options(n=2, out=folder, device="cpu"))


def _torch(folder: Path):
    write_atomic(folder / "weights.pth", lambda file: torch.save(torch.zeros(9999), file))


WRITERS = {
    "json": lambda folder: write_json(folder / "eval.json", {"rows": ["x" * 9999]}),
    "text": lambda folder: write_atomic(folder / "recipe.yaml", lambda file: file.write_text("x" * 9999)),
    "torch": _torch,
    "figure": _figure,
    "model": lambda folder: save_model(folder, tiny.teacher(), tiny.INFO),
    "classifier": lambda folder: Classifier(1, (8, 8), ["a", "b"], (4, 4, 4)).save(folder),
    "reference": _reference,
    "checkpoint": _checkpoint,
    "log": _log,
    "tensorboard": _tensorboard,
    "pairs": _pairs,
    "embeddings": _embeddings,
    "report": _report,
    "copy": _copy,
    "sample": _sample,
    "settings": lambda folder: binding.same_settings({"a": "x" * 9999}, folder / "settings.json"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_that_the_disk_is_full_and_leaves_nothing(name, disk):
    write, folder = WRITERS[name], disk.folder / "out"
    folder.mkdir()
    with disk.full():
        said = refusal(lambda: write(folder))
        left = {name: content for name, content in contents(folder).items() if content}
    assert str(folder) in said
    assert "File too large" in said or "No space left on device" in said or "Input/output error" in said
    assert len(said.splitlines()) == 1
    assert not left
    write(folder)
    if name in ("log", "tensorboard", "pairs", "embeddings", "copy"):
        return  # these add, or have all that they need
    before = contents(folder)
    assert before
    with disk.full():
        refusal(lambda: write(folder))
        assert contents(folder) == before


ROOMS = [8_192, 400_000]


def test_a_run_whose_disk_fills_at_any_moment_goes_on_when_there_is_room(disk, tmp_path, monkeypatch, capsys):
    """By the command line: status 2 and one line; every file there is whole; the end is an undisturbed run's."""
    recipe = tiny.recipe_file(tmp_path, steps=3, log={"every": 1, "preview": 2}, checkpoint={"every": 2, "keep": 1})
    distillation.distil(load_recipe(str(recipe)), tmp_path / "whole", tmp_path / "runs")
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    codes = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))  # it fills after it was looked at
    for room in ROOMS:
        out = disk.folder / f"run-{room}"
        monkeypatch.setattr(sys, "argv", ["distmatch", "train", str(recipe), "-o", str(out), "--runs", str(out)])
        with disk.full(room):
            codes.append(called(capsys))
            whole(out)
        assert called(capsys) == (0, "")
        found = load_file(out / "model" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert [line["step"] for line in log.read(out / "log.jsonl")] == [1, 2, 3]
        shutil.rmtree(out)
    assert [code for code, _ in codes] == [2, 2]
    assert all(len(said.splitlines()) == 1 for _, said in codes)
    assert "No space left on device" in codes[0][1]
    assert "step-00000002 could not be saved" in codes[1][1]


def called(capsys) -> tuple[int, str]:
    """Exit status of the command line, and what it says on standard error, without lines of progress."""
    capsys.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, "".join(line for line in capsys.readouterr().err.splitlines(True) if line.startswith("distmatch: "))


def whole(folder: Path) -> None:
    """Every file below `folder` can be read, and none is a temporary one."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        assert not file.name.startswith(".")
        assert ".claim-" not in file.name
        match file.suffix:
            case ".json":
                json.loads(file.read_text())
            case ".safetensors":
                load_file(file)
            case ".png":
                Image.open(file).load()
            case ".jsonl":
                log.read(file)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "Read-only file system; choose another place, e.g. with --out"),
        (errno.EACCES, "Permission denied; give yourself the right to it"),
        (errno.ENOTDIR, "Not a directory; a file is where a folder is wanted"),
        (errno.EMFILE, "Too many open files; allow more open files: ulimit -n 65536"),
        (errno.EDQUOT, "MB are free). Make room"),
        (errno.ENOMEM, "the memory does not suffice ("),
        (errno.ELOOP, "Too many levels of symbolic links"),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(number, advice, tmp_path):
    error = OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert advice in str(explained(error))
    assert str(tmp_path) in str(explained(error))
    assert explained(KeyError("x")) is explained(RuntimeError("shape '[2]' is invalid")) is None


def test_memory_that_cannot_be_had_is_said_with_what_to_do():
    def refused(work) -> str:
        with pytest.raises((MemoryError, RuntimeError)) as found:
            work()
        return str(explained(found.value))

    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    said = [refused(lambda: torch.empty(10**15)), refused(lambda: np.empty(10**15)), refused(lambda: bytes(10**15))]
    for message in (*said, str(explained(cuda))):
        assert message.startswith("the memory does not suffice (")
        assert "accumulate=N, gradient_checkpointing=true" in message
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "mnist", "-n", "1", "-o", "FILE"], "FILE is a file; expected a folder"),
        (["sample", "mnist", "-n", "1", "-o", "FILE/below"], "a file is where a folder is wanted"),
        (["train", "mnist", "-o", "FILE"], "FILE"),
        (["report", "FILE/nowhere"], "a file is where a folder is wanted"),
        (["train", "FILE/x.yaml"], "does not exist"),
        (["sample", "FILE"], "neither a model folder nor a run"),
    ],
)
def test_a_file_where_a_folder_is_wanted_is_one_message(arguments, said, tmp_path, monkeypatch, capsys):
    file = tmp_path / "taken"
    file.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["distmatch", *(part.replace("FILE", str(file)) for part in arguments)])
    code, message = called(capsys)
    assert code == 2
    assert said.replace("FILE", str(file)) in message
    assert len(message.splitlines()) == 1
    assert file.read_text() == "mine"


def test_an_output_that_no_one_reads_or_that_is_full_ends_the_command():
    """As with `| head`, and with `> FILE` on a full disk; the second is an error, although all was printed."""
    recipes = [sys.executable, "-m", "distmatch", "recipes"]
    unread = subprocess.Popen(recipes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    unread.stdout.close()
    assert unread.stderr.read() == ""
    assert unread.wait(60) == 141
    with open("/dev/full", "w") as full:
        done = subprocess.run(recipes, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "distmatch: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_benchmarks_list_of_commands_may_be_read_in_part(tmp_path):
    folder = Path(__file__).parent.parent / "benchmarks"
    words = [folder / "table.py", folder / "tables" / "mnist-table2.yaml", "--out", tmp_path, "--dry-run"]
    unread = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    unread.stdout.close()
    assert unread.stderr.read() == ""
    assert unread.wait(60) == 141
