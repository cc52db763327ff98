"""Pickles as data: published networks come out whole, and nothing that a file asks for is done."""

import collections
import copyreg
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distmatch.system.unpickle import Stub, load, network, read_state

PROTOCOLS = (2, 3, 4, 5)


class EasyDict(dict):
    """As in NVIDIA's `dnnlib.util`, whose name the pickles hold."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader must not call this")


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@pytest.fixture(autouse=True)
def publisher(monkeypatch):
    """The modules that the pickles refer to, for the pickler to find."""
    for function in (EasyDict, _reconstruct_persistent_obj):
        name = function.__module__
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def sentinel(tmp_path):
    """A file that comes into being when anything in a pickle is executed."""
    return tmp_path / "executed"


class Persistent(nn.Module):
    """Pickled as NVIDIA's persistent classes are: by source text and attributes."""

    source = ""

    def __init__(self, **kwargs):
        super().__init__()
        self._init_args = ()
        self._init_kwargs = EasyDict(kwargs)

    def __reduce__(self):
        meta = EasyDict(
            type="class",
            version=6,
            module_src=self.source,
            class_name=type(self).__name__,
            state=dict(self.__dict__),
        )
        return _reconstruct_persistent_obj, (meta,), None


class Conv2d(Persistent):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
        self.bias = None
        self.register_parameter("offset", None)
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2, dtype=torch.float16))


class SongUNet(Persistent):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        init = {"init_weight": np.sqrt(1 / 3), "init_bias": np.float32(0.1), "count": np.int64(3)}
        self.map_noise = nn.Linear(3, 2)
        self.enc = nn.ModuleDict({"8x8_conv": Conv2d(kernel=3, **init), "8x8_norm": nn.GroupNorm(1, 4)})
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("steps", torch.tensor(7))
        self.scale = nn.Parameter(torch.tensor([1.5, -2.5], dtype=torch.bfloat16))
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 5))
        self.part = nn.Parameter(torch.arange(20.0)[3:9].reshape(2, 3).T)


class EDMPrecond(Persistent):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.img_resolution = kwargs["img_resolution"]
        self.sigma_data = 0.5
        self.sigma_max = float("inf")
        self.wavelet = np.arange(6.0).reshape(2, 3).T
        self.shape = torch.Size([3, 8, 8])
        self.type, self.device = torch.float16, torch.device("cuda", 1)
        self.model = SongUNet(img_resolution=8, channel_mult=[1, 2], embedding_type="positional")


class EDMLoss:
    """Not a module; its attributes are numbers."""

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src="", class_name="EDMLoss", state={"P_mean": -1.2})
        return _reconstruct_persistent_obj, (meta,), None


def published() -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet", dropout=np.float64(0.25))


def checkpoint(protocol: int) -> bytes:
    return pickle.dumps({"ema": published(), "loss_fn": EDMLoss(), "dataset_kwargs": EasyDict(path="x")}, protocol)


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


# Published networks


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


# Files that ask for more


def raw(*parts: bytes) -> bytes:
    """A pickle put together by hand: instructions and single objects."""
    return b"\x80\x02" + b"".join(parts) + b"."


def obj(value) -> bytes:
    """The instructions that put `value` onto the stack, without memo."""
    pickler = pickle._Pickler(buffer := io.BytesIO(), 4)
    pickler.framer.start_framing = lambda: None
    pickler.memoize = lambda obj: None
    pickler.fast = True
    pickler.save(value)
    return buffer.getvalue()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


class _Tokens(pickle.Pickler):
    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) else None


def legacy(kind, count: int, numbers: bytes, location: str = "cpu", announced: int | None = None) -> bytes:
    """A storage in torch's older format."""
    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, buffer, 2)
    _Tokens(buffer, 2).dump(("storage", kind, "7", location, count, None))
    pickle.dump(["7"], buffer, 2)
    return buffer.getvalue() + struct.pack("<q", count if announced is None else announced) + numbers


def tensor_of(storage: bytes, offset=0, size=(3,), stride=(1,)) -> bytes:
    loaded = name("torch.storage", "_load_from_bytes") + obj(storage) + b"\x85R"
    rest = b"".join(map(obj, (offset, size, stride, False, None)))
    return raw(name("torch._utils", "_rebuild_tensor_v2"), b"(", loaded, rest, b"tR")


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


# Damage


def content(value, depth: int = 0):
    """What a loaded object holds, as something that can be compared."""
    assert depth < 50
    if isinstance(value, Stub):
        return value.class_name, content(value.state, depth + 1)
    if isinstance(value, dict):
        return {key: content(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content(item, depth + 1) for item in value]
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture
def small(monkeypatch, sentinel) -> bytes:
    monkeypatch.setattr(Persistent, "source", f"open({str(sentinel)!r}, 'w')")
    return pickle.dumps({"ema": Conv2d(scale=np.float64(0.5)), "array": np.arange(3)}, 4)


def test_every_truncation_says_that_the_file_is_damaged(small, sentinel):
    for length in range(len(small)):
        with pytest.raises(ValueError, match=r"the pickle is damaged at byte \d+, .*get it again"):
            load(small[:length])
    assert content(load(small + b"rest")) == content(load(small))
    assert not sentinel.exists()
    with pytest.raises(ValueError, match=r"damaged at byte 1, or no pickle of protocol 2 to 5 \(ValueError: .*unknown"):
        load(b"<html>")


def test_random_damage_gives_a_clear_error_or_data(small, sentinel, tmp_path):
    file = tmp_path / "edm.pkl"
    interesting = st.sampled_from([ord(c) for c in "RbcioQP}](.tu0e\x81\x82\x93\x94\x85"]) | st.integers(0, 255)
    messages = []

    @seed(0)
    @settings(max_examples=800, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(st.integers(0, len(small) - 1), interesting), min_size=1, max_size=4), st.booleans())
    def run(flips, insert):
        data = bytearray(small)
        for position, byte in flips:
            data[position : position + (not insert)] = bytes([byte])
        file.write_bytes(data)
        for read in (load, network, read_state):
            try:
                read(file)
                messages.append(f"{file} can be read")
            except ValueError as error:
                messages.append(str(error))

    run()
    assert not sentinel.exists()
    assert all(message.startswith(str(file)) for message in messages)
    for kind in ("can be read", "is damaged", "asks for"):
        assert sum(kind in message for message in messages) > 100
