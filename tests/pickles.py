"""Pickles for the tests of the reader: a network as NVIDIA publishes them, and programs put together by hand."""

import io
import pickle
import struct
import sys
import types

import numpy as np
import torch
from torch import nn

PROTOCOLS = (2, 3, 4, 5)


class EasyDict(dict):
    """As in NVIDIA's `dnnlib.util`, whose name the pickles hold."""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader must not call this")


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


def publish(monkeypatch):
    """Make the modules that the pickles refer to, for the pickler to find."""
    for function in (EasyDict, _reconstruct_persistent_obj):
        name = function.__module__
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)


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
