"""Published EDM checkpoints: what is imported computes what the network in the file computes."""

import json
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import web
from forked import command
from torch import nn

from distmatch.diffusion.denoiser import Cond
from distmatch.diffusion.iddpm import IDDPM
from distmatch.diffusion.schedule import EDM
from distmatch.models import library
from distmatch.models.edm import checkpoints
from distmatch.models.edm.checkpoints import cached_edm, import_edm, read_edm
from distmatch.models.edm.networks import DhariwalUNet, SongUNet
from distmatch.models.folder import load_model
from distmatch.recipe.smoke import random_edm


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader must not call this")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Something that pickles as NVIDIA's modules do."""

    def __init__(self, class_name: str, state: dict):
        self.meta = {"type": "class", "version": 6, "module_src": "raise RuntimeError", "class_name": class_name}
        self.meta["state"] = state

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def stored(module: nn.Module, **kwargs) -> Persistent:
    """`module` and everything in it as a persistent object."""
    parts = OrderedDict((name, stored(child)) for name, child in module.named_children())
    own, buffers = OrderedDict(module._parameters), OrderedDict(module._buffers)
    state = {"training": False, "_parameters": own, "_buffers": buffers, "_modules": parts}
    state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return Persistent(type(module).__name__, {**state, "_init_args": (), "_init_kwargs": kwargs})


def write(file: Path, net: SongUNet | DhariwalUNet, precond: str = "EDMPrecond", **attributes) -> dict:
    """`net` as a published checkpoint; returns the arguments in it."""
    arguments = {k: v for k, v in net.config.items() if k not in ("in_channels", "out_channels")}
    arguments |= {"img_channels": net.config["in_channels"], "model_type": type(net).__name__, "use_fp16": False}
    top = stored(nn.Module(), **arguments)
    top.meta["class_name"] = precond
    top.meta["state"] |= {"_modules": OrderedDict(model=stored(net, **arguments)), **attributes}
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("torch_utils.persistence")
        module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patch.setitem(sys.modules, "torch_utils.persistence", module)
        file.write_bytes(pickle.dumps({"ema": top, "training_set_kwargs": {"path": "x.zip"}}))
    return arguments


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "name", ["edm-cifar10-32x32-cond-vp", "edm-ffhq-64x64-uncond-ve", "edm-imagenet-64x64-cond-adm"]
)
def test_what_is_imported_computes_the_same(tmp_path, name):
    expected, _ = random_edm(name)
    arguments = write(tmp_path / f"{name}.pkl", expected.net, sigma_min=0.0, sigma_max=float("inf"))
    import_edm(str(tmp_path / f"{name}.pkl"), tmp_path / "model")
    denoiser, info = load_model(tmp_path / "model")
    side, classes = arguments["img_resolution"], arguments["label_dim"]
    assert info.shape == (3, side, side)
    assert len(info.classes) == classes
    assert (denoiser.schedule, denoiser.prediction) == (expected.schedule, expected.prediction)
    x, t = torch.randn(2, 3, side, side), torch.tensor([0.1, 40.0])
    cond = Cond(label=torch.tensor([0, classes - 1])) if classes else None
    assert torch.equal(denoiser(x, t, cond), expected(x, t, cond))
    assert info.card["imported"]["class"] == "EDMPrecond"


def test_preconditionings_and_noise_ranges(tmp_path):
    net = random_edm("edm-cifar10-32x32-uncond-vp")[0].net
    for precond, low, high, prediction in (
        ("VPPrecond", 0.0042, 152.0, "vp"),
        ("VEPrecond", 0.02, 100.0, "ve"),
        ("iDDPMPrecond", 0.0064, 20.2, "iddpm"),
    ):
        file = tmp_path / f"{precond}.pkl"
        if prediction == "iddpm":
            net = SongUNet(**{**net.config, "out_channels": 6})
        write(file, net, precond, sigma_min=low, sigma_max=high)
        denoiser, _ = read_edm(file)
        assert denoiser.prediction.name == prediction
        kind = IDDPM if prediction == "iddpm" else EDM
        assert denoiser.schedule == kind(max(low, 0.002), min(high, 80))
        x = torch.randn(1, 3, 32, 32)
        assert denoiser(x, torch.tensor([1.0])).shape == x.shape


def test_teachers_in_recipes_are_imported_once(tmp_path, cache, monkeypatch):
    write(tmp_path / "t.pkl", random_edm("edm-cifar10-32x32-cond-vp")[0].net)
    first, _ = library.find_model(f"edm:{tmp_path / 't.pkl'}", "teacher")
    assert len(list(cache.glob("edm-*/config.json"))) == 1
    monkeypatch.setattr(checkpoints, "read_edm", None)  # a second import would fail
    second, _ = cached_edm(str(tmp_path / "t.pkl"))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_url_is_fetched_once(tmp_path, cache):
    write(tmp_path / "t.pkl", random_edm("edm-cifar10-32x32-cond-vp")[0].net)
    with web.serving({"/t.pkl": (tmp_path / "t.pkl").read_bytes()}) as site:
        import_edm(f"{site.url}/t.pkl", tmp_path / "a")
        import_edm(f"{site.url}/t.pkl", tmp_path / "b")
        assert site.asked == ["/t.pkl"]
        with pytest.raises(
            ValueError, match=r"other.pkl cannot be fetched: HTTP Error 404.*Fetch it elsewhere and give the file"
        ):
            import_edm(f"{site.url}/other.pkl", tmp_path / "c")


def test_files_that_are_no_such_checkpoint_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.pkl is no file here; give an EDM checkpoint"):
        import_edm(str(tmp_path / "nothing.pkl"), tmp_path / "out")
    net = random_edm("edm-cifar10-32x32-uncond-vp")[0].net
    write(tmp_path / "p.pkl", net, "OtherPrecond")
    with pytest.raises(ValueError, match=r"holds OtherPrecond around SongUNet; expected EDMPrecond or"):
        read_edm(tmp_path / "p.pkl")
    net.config |= {"model_channels": 32}
    write(tmp_path / "wide.pkl", net)
    with pytest.raises(ValueError, match=r"wide.pkl: SongUNet cannot be built: "):
        read_edm(tmp_path / "wide.pkl")
    net.config |= {"model_channels": 16, "surprise": 1}
    write(tmp_path / "odd.pkl", net)
    with pytest.raises(ValueError, match=r"odd.pkl: SongUNet cannot be built: .*surprise"):
        read_edm(tmp_path / "odd.pkl")


ABSURD = [
    {"model_channels": 10**12},
    {"label_dim": 10**9},
    {"num_blocks": 10**9},
    {"channel_mult": [1] * 10**4},
    {"augment_dim": "x"},
    {"resample_filter": [1] * 10**4},
]


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: next(iter(change)))
def test_absurd_arguments_cost_nothing(tmp_path, change):
    net = random_edm("edm-cifar10-32x32-uncond-vp")[0].net
    net.config |= change
    write(tmp_path / "x.pkl", net)
    with pytest.raises(ValueError, match=r"x.pkl: SongUNet cannot be built"):
        read_edm(tmp_path / "x.pkl")


def test_the_command_imports_and_refuses(tmp_path):
    write(tmp_path / "t.pkl", random_edm("edm-cifar10-32x32-cond-vp")[0].net)
    done = command("import", "edm", tmp_path / "t.pkl", "-o", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "config.json").read_text())["network"]["type"] == "song"
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    done = command("import", "edm", tmp_path / "bad.pkl", cwd=tmp_path)
    assert done.returncode == 2
    assert "os.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pwned").exists()
