"""Pickles that ask for more than data, or for more memory than they are worth: refused, and nothing is executed."""

import collections
import copyreg
import functools
import io
import os
import pickle
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch
from pickles import PROTOCOLS, Call, EasyDict, EDMPrecond, legacy, name, obj, raw, tensor_of
from torch import nn

from distmatch.system.unpickle import load, network, read_state

pytestmark = pytest.mark.usefixtures("published_modules")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_tests_own_pickles_are_what_they_are_taken_for(sentinel):
    numbers = struct.pack("<3f", 1, 2, 3)
    assert torch.load(io.BytesIO(legacy(torch.FloatStorage, 3, numbers)), weights_only=True).tolist() == [1, 2, 3]
    assert pickle.loads(raw(obj({"a": [1, (2.5, "x")]}))) == {"a": [1, (2.5, "x")]}
    pickle.loads(pickle.dumps(Call(os.system, f"touch {sentinel}")))
    assert sentinel.exists()


PYTHON_2 = {"builtins": "__builtin__", "copyreg": "copy_reg", "subprocess": "commands"}
"""What protocol 2 calls modules."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_are_refused_by_name(sentinel, tmp_path, protocol):
    touch = f"open({str(sentinel)!r}, 'w')"
    calls = {
        "posix.system": Call(os.system, f"touch {sentinel}"),
        "builtins.eval": Call(eval, touch),
        "builtins.exec": Call(exec, touch),
        f"{open.__module__}.open": Call(open, str(sentinel), "w"),  # `io` or, from Python 3.12 on, `_io`
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(sentinel)]),
        "functools.partial": functools.partial(os.system, f"touch {sentinel}"),
        "torch.hub.load": Call(torch.hub.load, "x", "y"),
        "torch.serialization.load": Call(torch.load, str(sentinel)),
        "numpy.load": Call(np.load, str(sentinel)),
        "copyreg._reconstructor": Call(copyreg._reconstructor, EasyDict, dict, {}),
    }
    file = tmp_path / "hostile.pkl"
    for asked, call in calls.items():
        for content in (call, {"ema": [call]}, collections.OrderedDict(a=call), EasyDict(a=call)):
            file.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(ValueError, match="nothing in the file was executed") as caught:
                load(file)
            names = {asked, *(asked.replace(new, old) for new, old in PYTHON_2.items())}
            assert any(str(caught.value).startswith(f"{file} asks for {name}: ") for name in names)
    assert not sentinel.exists()


def test_instructions_that_reach_outside_are_refused(monkeypatch, sentinel):
    copyreg.add_extension("os", "system", 240)
    try:
        command = f"touch {sentinel}"
        inst = b"(" + obj(command) + b"ios\nsystem\n"
        programs = {
            "INST": raw(inst),
            "OBJ": raw(b"(", name("os", "system").replace(b"cos\nsystem\n", b"N"), obj(command), b"o"),
            "EXT1": raw(b"\x82\xf0", obj((command,)), b"R"),
            "EXT2": raw(b"\x83\xf0\0", obj((command,)), b"R"),
            "EXT4": raw(b"\x84\xf0\0\0\0", obj((command,)), b"R"),
            "PERSID": raw(b"Pos.system\n"),
            "NEWOBJ_EX": raw(name("collections", "OrderedDict"), b")}\x92"),
            "NEXT_BUFFER": raw(b"\x97"),
            "DUP": raw(b"]2"),
        }
        for instruction, program in programs.items():
            with pytest.raises(ValueError, match=f"asks for the instruction {instruction}: "):
                load(program)
        with pytest.raises(ValueError, match="asks for something that is not in the file"):
            load(raw(obj("os.system"), b"Q"))
        assert not sentinel.exists()
        pickle.loads(programs["EXT1"])
        assert sentinel.exists()
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_allowed_functions_cannot_be_turned_against_the_reader(sentinel):
    ordered = name("collections", "OrderedDict")
    dtype = name("numpy", "dtype") + obj(("f8", False, True)) + b"R"
    storage = name("torch.storage", "_load_from_bytes")
    hostile = pickle.dumps(Call(os.system, f"touch {sentinel}"), 2)
    programs = {
        # attributes of shared functions and classes
        r"attributes for a Name": raw(ordered, obj({"__init__": None}), b"b"),
        r"attributes for a dtype": raw(name("torch", "float32"), obj({"x": 1}), b"b"),
        r"attributes for a list": raw(b"]", obj({"x": 1}), b"b"),
        r"attributes for a Stub": raw(
            name("torch.nn.modules.linear", "Linear"), b")\x81", obj({"a": 1}), b"b", obj({"a": 2}), b"b"
        ),
        # objects that are no functions of ours, or with arguments that are none of theirs
        r"expected Name, got str": raw(obj("os.system"), obj(("x",)), b"R"),
        r"expected Name, got dtype": raw(name("torch", "float32"), b")R"),
        r"takes 0 positional arguments but 1": raw(ordered, obj(([[1, 2]],)), b"R"),
        r"expected tuple, got list": raw(ordered, b"]R"),
        r"expected bytes, got str": raw(storage, obj(("x",)), b"R"),
        r"_codecs.encode to other": raw(name("_codecs", "encode"), obj(("x", "rot13")), b"R"),
        r"expected Tensor, got int": raw(name("torch._utils", "_rebuild_parameter"), obj((1, True, None)), b"R"),
        r"expected Storage, got int": raw(name("torch._utils", "_rebuild_tensor_v2"), obj((1,) * 6), b"R"),
        r"expected str, got list": raw(
            name("torch_utils.persistence", "_reconstruct_persistent_obj"), obj(({"class_name": []},)), b"R"
        ),
        # NumPy's own pickles inside of pickles
        r"asks for numpy.dtype O8": raw(name("numpy", "dtype"), obj(("O8", False, True)), b"R"),
        r"asks for numpy.dtype V8": raw(name("numpy", "dtype"), obj(("V8", False, True)), b"R"),
        r"other than plain numbers": raw(dtype, obj((3, "|", None, ("x",), {}, 8, 1, 0)), b"b"),
        r"NumPy array of other": raw(name("numpy._core.multiarray", "scalar"), b"(", dtype, obj(hostile), b"tR"),
        # storages inside of pickles
        r"damaged.*not enough values|posix.system": raw(storage, obj((hostile,)), b"R"),
        r"asks for posix.system": raw(storage, obj((legacy(os.system, 1, b""),)), b"R"),
        r"asks for collections.OrderedDict": raw(storage, obj((legacy(collections.OrderedDict, 1, b""),)), b"R"),
        r"more than 4 times its own size|exhausted|asks for torch": raw(
            storage, obj((raw(storage, obj((hostile,)), b"R"),)), b"R"
        ),
    }
    for message, program in programs.items():
        with pytest.raises(ValueError, match=message):
            load(program)
    assert not sentinel.exists()
    assert load(raw(ordered, b")R")) == {}  # and works as before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_objects_are_refused(sentinel, protocol):
    call = Call(os.system, f"touch {sentinel}")
    for content in (
        np.array([call], dtype=object),
        np.array([(call, 1)], dtype=[("a", object), ("b", int)]),
        np.array(["text"]),
        np.datetime64("2020-01-01"),
        np.ma.array([1]),
    ):
        with pytest.raises(ValueError, match="asks for numpy"):
            load(pickle.dumps(content, protocol))
    assert not sentinel.exists()


def test_claims_of_size_allocate_nothing(tmp_path):
    huge = 2**40
    claims = {
        "bytes": b"\x8e" + struct.pack("<q", huge),
        "text": b"\x8d" + struct.pack("<q", huge),
        "bytearray": b"\x96" + struct.pack("<q", huge),
        "negative": b"\x8e" + struct.pack("<q", -1),
        "number": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "frame": b"\x95" + struct.pack("<q", huge) + b"\x8e" + struct.pack("<q", huge),
        "memo": b"]r\xff\xff\xff\xffj\xff\xff\xff\xfe",
    }
    storages = {
        "storage": legacy(torch.FloatStorage, huge, b"\0" * 12),
        "count": legacy(torch.FloatStorage, 3, b"\0" * 12, announced=huge),
        "negative storage": legacy(torch.FloatStorage, -1, b"\0" * 12),
        "short storage": legacy(torch.FloatStorage, 3, b"\0" * 11),
        "long storage": legacy(torch.FloatStorage, 3, b"\0" * 13),
        "other magic": legacy(torch.FloatStorage, 3, b"\0" * 12).replace(b"\xfc\x9c", b"\xfc\x9d"),
    }
    programs = {what: raw(claim) for what, claim in claims.items()}
    programs |= {what: tensor_of(storage) for what, storage in storages.items()}
    tracemalloc.start()
    file = tmp_path / "claims.pkl"
    for program in programs.values():
        file.write_bytes(program)
        with pytest.raises(ValueError, match=r"claims.pkl is damaged at byte"):
            load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_tensors_stay_inside_of_their_storage_and_no_larger():
    storage = legacy(torch.FloatStorage, 6, np.arange(6, dtype="<f4").tobytes())
    assert load(tensor_of(storage, 1, (2, 2), (1, 2))).tolist() == [[1, 3], [2, 4]]
    assert load(tensor_of(storage, 5, (), ())).item() == 5
    assert load(tensor_of(storage, 0, (2, 3), (1, 1))).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert load(tensor_of(storage, 0, (0, 2**30), (1, 1))).shape == (0, 2**30)
    outside = [
        (0, (7,), (1,)),
        (4, (3,), (1,)),
        (6, (1,), (1,)),
        (0, (2, 2), (5, 1)),
        (0, (7,), (0,)),
        (0, (2**39,), (0,)),
    ]
    for offset, size, stride in outside:
        with pytest.raises(ValueError, match=r"asks for a tensor of .* of a storage of 6"):
            load(tensor_of(storage, offset, size, stride))
    no_sizes = [(0, (2**70,), (0,)), (2**62, (2,), (2**62,)), (-1, (2,), (1,)), (0, (-2,), (1,)), (3, (3,), (-1,))]
    no_sizes += [(0, (True,), (1,)), (0, (2.0,), (1,)), (0, [2], (1,)), (0, (1,) * 40, (1,) * 40)]
    for offset, size, stride in no_sizes:
        with pytest.raises(ValueError, match="asks for a size that"):
            load(tensor_of(storage, offset, size, stride))
    for offset, size, stride in [(0, (2, 2), (1,)), (0, (0, 2**39, 2**39), (1, 1, 1))]:
        with pytest.raises(ValueError, match="is damaged"):
            load(tensor_of(storage, offset, size, stride))
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        load(tensor_of(legacy(torch.BoolStorage, 3, b"\0\1\2")))
    data = pickle.dumps(np.array([True, False]), 4)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        load(data.replace(b"\1\0\x94t", b"\2\0\x94t"))


def test_repetition_is_held_against_the_size_of_the_file():
    storage = obj(legacy(torch.ByteStorage, 4000, b"\0" * 4000))
    again = b"h\0\x85R"
    loads = [name("torch.storage", "_load_from_bytes"), b"q\1", storage, b"q\0", b"\x85R", *[b"h\1" + again] * 100]
    with pytest.raises(ValueError, match="asks for more than 4 times its own size"):
        load(raw(*loads))
    view = [name("torch._utils", "_rebuild_tensor_v2"), b"q\2(h\3", obj(0), obj((4000,)), obj((1,)), b"NNtR"]
    views = [loads[0], storage, b"\x85Rq\3", *view, *[b"h\2(h\3" + b"".join(view[2:5]) + b"NNtR"] * 100]
    with pytest.raises(ValueError, match="asks for more than 4 times its own size"):
        load(raw(*views))
    sets = [name("builtins", "set"), b"q\1", obj(list(range(1000))), b"q\0", b"\x85R", *[b"h\1" + again] * 100]
    with pytest.raises(ValueError, match="asks for more than 4 times its own size"):
        load(raw(*sets))
    texts = [name("_codecs", "encode"), b"q\1", obj(("x" * 4000, "latin1")), b"q\0", b"R", *[b"h\1h\0R"] * 100]
    with pytest.raises(ValueError, match="asks for more than 4 times its own size"):
        load(raw(*texts))


def test_programs_without_end_end(monkeypatch):
    monkeypatch.setattr("distmatch.system.unpickle.INSTRUCTIONS", 5000)
    with pytest.raises(ValueError, match="asks for more than 5,000 instructions"):
        load(raw(b"\x8f" * 6000))


def test_keys_that_collide_or_nest_are_refused():
    nested = raw(b"}", b")" + b"\x85" * 200_000, b"Ns")
    for program in (nested, raw(obj({2**61: 1})), raw(obj({0.5: 1})), raw(b"\x8f(", b")" + b"\x85" * 200_000, b"\x90")):
        with pytest.raises(ValueError, match="asks for a key of type"):
            load(program)


def test_a_network_of_endless_parts_is_refused(tmp_path):
    """Cycles and repeated references are short in a file and long to walk."""
    file = tmp_path / "edm.pkl"
    doubled, nested = [], []
    for _ in range(12):
        doubled = [doubled, doubled, doubled]
    for _ in range(20):
        nested = [nested]
    shared = nn.ModuleDict()
    for _ in range(60):
        shared = nn.ModuleDict({"a": shared, "b": shared})
    cycle = nn.ModuleDict()
    cycle._modules["again"] = cycle
    tied = nn.Module()
    tied._parameters = dict.fromkeys(map(str, range(20)), torch.zeros(300))
    for message, content in {
        "more than 4 times its own size": [EDMPrecond(img_resolution=doubled), shared, cycle, tied],
        "settings nested without end": [EDMPrecond(img_resolution=nested)],
        "_parameters of Module of type dict with 1": [with_attribute("_parameters", {1: None})],
        "_modules of Module of type list": [with_attribute("_modules", [])],
        "a module child of type int": [with_attribute("_modules", {"child": 1})],
        "a parameter scale of type int": [with_attribute("_buffers", {"scale": 1})],
    }.items():
        for network_ in content:
            file.write_bytes(pickle.dumps(network_))
            for read in (read_state, functools.partial(network, key=None)):
                with pytest.raises(ValueError, match=f"edm.pkl holds {message}"):
                    read(file)


def test_names_of_names_take_no_memory(tmp_path):
    cycle = nn.ModuleDict()
    cycle._modules["x" * 1000] = cycle
    file = tmp_path / "edm.pkl"
    file.write_bytes(pickle.dumps(cycle))
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 4 times its own size"):
        read_state(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def with_attribute(key: str, value) -> nn.Module:
    module = nn.Module()
    module.__dict__[key] = value
    return module
