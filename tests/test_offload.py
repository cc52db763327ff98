"""Text encoders and decoders that are on the device only while they compute.

`Tensor.to` also takes a data type, which a test without a GPU can see in a device's place.
"""

from typing import Any

import pytest
import torch
from torch import nn

from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.info import Info
from distmatch.models.library import components
from distmatch.models.offload import Visitor, visiting
from distmatch.recipe import subjects
from distmatch.recipe.loading import load_recipe

THERE: Any = torch.float64


def kinds(*networks):
    return {t.dtype for n in networks for t in (*n.parameters(), *n.buffers()) if t.is_floating_point()}


def test_weights_are_on_the_device_only_inside_even_if_something_fails():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network.append(network[0])
    own = [t.data_ptr() for t in network.parameters()]
    with visiting([network], THERE):
        there = [t.data_ptr() for t in network.parameters()]
        assert kinds(network) == {torch.float64}
        with visiting([network], THERE):
            assert [t.data_ptr() for t in network.parameters()] == there  # copied once
        assert kinds(network) == {torch.float64}
    with pytest.raises(ZeroDivisionError), visiting([network], THERE):
        raise ZeroDivisionError
    assert kinds(network) == {torch.float32}
    assert [t.data_ptr() for t in network.parameters()] == own


def test_encoders_and_decoder_compute_the_same_from_the_hosts_memory(tmp_path, monkeypatch):
    """And prompts that are cached are encoded in one visit."""
    info, prompts = Info((4, 8, 8), source=str(write_tiny_sd(tmp_path / "sd"))), ["a cat", "a dog", "a house"]
    plain, away = components(info), components(info, offload=True)
    expected, visits = plain.encode(prompts).text, []

    def counted(networks, device):
        visits.append(kinds(*networks))
        return visiting(networks, device)

    monkeypatch.setattr("distmatch.models.offload.visiting", counted)
    assert torch.equal(away.encode(prompts).text, expected)
    assert away.encode.fingerprint() == plain.encode.fingerprint()
    assert visits == [{torch.float32}]
    monkeypatch.setattr(subjects, "visiting", counted)
    cached = load_recipe("sd15-laion-6.25", [f"prompts.cache={tmp_path / 'cache'}"])
    assert isinstance(subjects.components_of(cached, info, torch.device("cpu")).encode, Visitor)
    encode = subjects._encode(cached, away.encode, prompts)
    for numbers in ([2, 0], [1], [0]):
        torch.testing.assert_close(encode(numbers).text, expected[numbers], rtol=1e-3, atol=2e-3)  # of 16 bits
    assert len(visits) == 3  # one of all prompts, and one of their only batch within
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8)
        made = Visitor(away.decode.part, THERE)(z.double())
        assert made.dtype == torch.float64
        torch.testing.assert_close(made.float(), plain.decode(z), rtol=1e-3, atol=1e-4)
    assert kinds(*away.decode.networks) == {torch.float32}
    gan = load_recipe("sd15-dmd2", [f"prompts.cache={tmp_path / 'cache'}"])
    assert not subjects.offloaded(gan)  # it encodes captions in every step
