"""Damaged pickles: a clear error or data, and nothing is executed."""

import pickle

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from pickles import Conv2d, Persistent
from torch import Tensor

from distmatch.system.unpickle import Stub, load, network, read_state

pytestmark = pytest.mark.usefixtures("published_modules")


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
