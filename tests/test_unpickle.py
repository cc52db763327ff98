"""Pickles as data: published networks come out whole, and their source text is never executed."""

import collections
import pickle
import struct

import numpy as np
import pytest
import torch
from pickles import PROTOCOLS, Conv2d, EDMLoss, Persistent, checkpoint, legacy, published, tensor_of
from torch import Tensor, nn

from distmatch.system.unpickle import load, network, read_state

pytestmark = pytest.mark.usefixtures("published_modules")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_network_comes_out_as_it_was_stored(tmp_path, protocol):
    file = tmp_path / "edm.pkl"
    file.write_bytes(checkpoint(protocol))
    read, expected = network(file), published().state_dict()
    assert list(read.state) == list(expected)
    for name, tensor in expected.items():
        assert read.state[name].dtype == tensor.dtype, name
        assert read.state[name].stride() == tensor.stride(), name
        assert torch.equal(read.state[name], tensor), name
    assert list(read.modules) == [name for name, _ in published().named_modules()]
    assert all(type(t) is Tensor and not t.requires_grad for t in read.state.values())
    assert {n: t.tolist() for n, t in read_state(file).items()} == {n: t.tolist() for n, t in read.state.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_classes_settings_and_attributes_come_as_plain_data(tmp_path, protocol):
    file = tmp_path / "edm.pkl"
    file.write_bytes(checkpoint(protocol))
    modules = network(file).modules
    top, model, conv = modules[""], modules["model"], modules["model.enc.8x8_conv"]
    assert (top.class_name, model.class_name, conv.class_name) == ("EDMPrecond", "SongUNet", "Conv2d")
    assert modules["model.map_noise"].class_name == "Linear"
    assert modules["model.enc"].class_name == "ModuleDict"
    kwargs = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "dropout": 0.25}
    assert top.kwargs == kwargs
    assert top.args == ()
    assert model.kwargs == {"img_resolution": 8, "channel_mult": [1, 2], "embedding_type": "positional"}
    attributes = {"img_resolution": 8, "sigma_data": 0.5, "sigma_max": float("inf"), "training": True}
    assert top.attributes == attributes
    assert conv.kwargs["init_weight"] == float(np.sqrt(1 / 3))
    assert [type(conv.kwargs[k]) for k in ("init_weight", "init_bias", "count")] == [float, float, int]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_no_module_comes_as_it_was(protocol):
    top = load(checkpoint(protocol))
    state = top["ema"].state
    assert isinstance(state["wavelet"], np.ndarray)
    assert np.array_equal(state["wavelet"], published().wavelet)
    assert (state["shape"], state["type"], state["device"]) == (
        torch.Size([3, 8, 8]),
        torch.float16,
        torch.device("cuda", 1),
    )
    assert top["loss_fn"].class_name == "EDMLoss"
    assert top["loss_fn"].state == {"P_mean": -1.2}
    assert top["dataset_kwargs"] == {"path": "x"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("code", ["?", "i1", "u2", "<i4", ">i4", "u8", "f2", ">f4", "f8", "c8", "c16"])
def test_numpy_arrays_and_scalars(protocol, code):
    array = (np.arange(24) % 2 if code == "?" else np.arange(24)).astype(code).reshape(2, 3, 4)
    cases = [array, array.T, array[:, ::2], array[:0], np.asfortranarray(array), array[1], array.max(keepdims=True)]
    for case in cases:
        for value in (case, case.flat[-1] if case.size else case):
            data = pickle.dumps([value, value], protocol)
            expected = pickle.loads(data)[0]
            read, again = load(data)
            assert read is again
            if isinstance(expected, np.ndarray):
                assert read.dtype == expected.dtype
                assert np.array_equal(read, expected)
            else:
                assert read == expected
                assert type(read) in (int, float, bool, complex)
            if protocol == 2:  # names of NumPy 1 are lines of text there
                assert np.array_equal(load(data.replace(b"numpy._core.", b"numpy.core."))[0], read)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_is_what_pickle_reads(protocol):
    shared = [1, 2]
    data = {
        "ints": [0, 255, 256, -1, 2**31, -(2**31), 2**200, -(2**200)],
        "floats": [0.5, float("inf")],
        "text": ["", "ünï\ud800", "x" * 300],
        "bytes": [b"", b"\x00\xff" * 200],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "other": [None, True, False, set(), {1, "a"}],
        "shared": [shared, shared],
        "ordered": collections.OrderedDict(b=1, a=2),
        3: {},
    }
    read = load(pickle.dumps(data, protocol))
    assert read == pickle.loads(pickle.dumps(data, protocol))
    assert list(read["ordered"]) == ["b", "a"]
    assert read["shared"][0] is read["shared"][1]
    cycle = []
    cycle.append((cycle,))
    read = load(pickle.dumps(cycle, protocol))
    assert read[0][0] is read


def test_storages_of_every_type_and_of_another_device():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        tensor = torch.tensor([0.0, 1.0, 3.0]).to(dtype)
        read = load(pickle.dumps(tensor))
        assert read.dtype == dtype
        assert torch.equal(read, tensor)
        read += read  # memory of its own, that can be written to
    numbers = struct.pack("<3f", 1, 2, 3)
    on_gpu = load(tensor_of(legacy(torch.FloatStorage, 3, numbers, location="cuda:0")))
    assert on_gpu.device == torch.device("cpu")
    assert on_gpu.tolist() == [1, 2, 3]


def test_the_one_network_of_a_file_is_found(tmp_path):
    file = tmp_path / "inception.pkl"
    for content in (nn.Linear(3, 2), Conv2d(), {"net": Conv2d(), "note": "text", "loss": EDMLoss()}):
        file.write_bytes(pickle.dumps(content))
        module = content["net"] if isinstance(content, dict) else content
        read = read_state(file)
        assert list(read) == list(module.state_dict())
        assert all(torch.equal(read[k], v) for k, v in module.state_dict().items())
    for content, message in (
        ({"a": Conv2d(), "b": Conv2d()}, "holds 2 networks.*of type dict with a, b"),
        ({"loss": EDMLoss()}, "holds 0 networks.*of type dict with loss"),
        (EDMLoss(), "holds 0 networks.*of class EDMLoss"),
        ([1], "holds 0 networks.*of type list"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"inception.pkl {message}"):
            read_state(file)
    file.write_bytes(checkpoint(4))
    with pytest.raises(ValueError, match="no entry 'net': it is of type dict with ema, loss_fn"):
        network(file, "net")
    with pytest.raises(ValueError, match="no network there, but something of class EDMLoss"):
        network(file, "loss_fn")
    for missing in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(ValueError, match=f"{missing.name} cannot be read"):
            load(missing)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_source_text_is_never_executed(monkeypatch, sentinel, tmp_path, protocol):
    monkeypatch.setattr(Persistent, "source", f"open({str(sentinel)!r}, 'w')")
    file = tmp_path / "edm.pkl"
    file.write_bytes(checkpoint(protocol))
    assert "open(" in load(file)["ema"].meta["module_src"]
    network(file)
    read_state(file)
    assert not sentinel.exists()
    exec(Persistent.source)
    assert sentinel.exists()  # the text would have left its mark
