"""Text encoders and decoders that are on the device only while they compute, and very large ones in half the bytes.

`Tensor.to` also takes a data type, which a test without a GPU can see in a device's place. So it can `cpu:0`.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from test_plan import peak, planned, size
from torch import nn

from distmatch.data import embeddings
from distmatch.diffusion.denoiser import Denoiser
from distmatch.models.diffusers.families import FAMILIES, family_in
from distmatch.models.diffusers.text import TextEncoder
from distmatch.models.diffusers.tiny import write_tiny_sd
from distmatch.models.info import Info
from distmatch.models.library import components
from distmatch.models.offload import Visitor, visiting
from distmatch.planning.preflight import Flight
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
    encode = subjects._encode(cached, away.encode, prompts, tiny.teacher())
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


def recipe_of(root, kind, *changes):
    """A recipe of adapters on a tiny model, in the folder `root/kind`, whose prompts are cached."""
    (root / "prompts.txt").write_text("a cat\na dog\na house\n")
    own = (
        f"teacher=diffusers:{root / kind}",
        f"prompts.path={root / 'prompts.txt'}",
        f"prompts.cache={root / 'cache'}",
    )
    adapters = ("terms=match", "match.batch=1", "student.adapter.rank=2", "fake.adapter.rank=2")
    return str(tiny.recipe_file(root)), [*own, *adapters, *changes]


def test_cached_prompts_are_encoded_while_the_teacher_waits_in_the_hosts_memory(tmp_path, monkeypatch):
    """The one prompt of the checks, too. Where all states are there, nothing is moved."""
    write_tiny_sd(tmp_path / "sd")
    file, changes = recipe_of(tmp_path, "sd", "device=cpu:0")
    recipe, events = load_recipe(file, changes), []
    move, encode = Denoiser.to, TextEncoder.__call__

    @contextmanager
    def seen(networks, device):
        events.append(f"encoders on {device}")
        with visiting(networks, device):
            yield
        events.append("encoders home")

    monkeypatch.setattr(subjects, "visiting", seen)
    monkeypatch.setattr(Denoiser, "to", lambda self, place: events.append(f"teacher on {place}") or move(self, place))
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: events.append(len(texts)) or encode(self, texts))
    turn = ["teacher on cpu", "encoders on cpu:0", "encoders home", "teacher on cpu:0"]
    flight = Flight(recipe, tmp_path / "out", tmp_path)
    subject = flight.subject
    assert events == ["teacher on cpu:0"]
    events.clear()
    assert flight.cond.text.shape[0] == 1
    assert events == [*turn[:2], 1, *turn[2:]]
    events.clear()
    subjects.encode_prompts(recipe, subject)
    assert events == [*turn[:2], 3, *turn[2:]]
    events.clear()
    subjects.encode_prompts(recipe, subject)
    subjects.encode_prompts(recipe, subjects.subject(recipe))
    assert events == ["teacher on cpu:0"]  # which the second subject's must reach


@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.text))
def test_encoders_in_bf16_make_nearly_the_same_states_under_a_name_of_their_own(tmp_path, kind):
    source = str(FAMILIES[kind].write_tiny(tmp_path / "model"))
    plain, low = (family_in(source).text_encoder(source, precision=one) for one in ("fp32", "bf16"))
    prompts = ["a cat", "two dogs on a sofa"]
    expected, found = plain(prompts), low(prompts)
    assert {v.dtype for v in (found.text, *found.extra.values(), low.null().text)} == {torch.float32}
    for here, there in zip((found.text, *found.extra.values()), (expected.text, *expected.extra.values()), strict=True):
        assert (here - there).square().mean().sqrt() < 0.02 * there.square().mean().sqrt()
    assert not torch.equal(found.text, expected.text)
    held = sum(p.numel() for one in family_in(source).encoders(source) for p in one.parameters())
    assert plain.weights() == low.weights() == held
    with torch.no_grad():  # as in models that are stored in bf16
        for name, part in plain.pipeline.components.items():
            for value in part.state_dict().values() if name.startswith("text_encoder") and part is not None else ():
                value.copy_(value.bfloat16())
    assert plain.fingerprint() != low.fingerprint()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ZImagePipeline", "FluxPipeline"])
def test_encoders_alone_on_the_device_are_planned(planner, tmp_path, kind, precision):
    """To 10 %, for texts as long as they may be: here they take more than a step does."""
    FAMILIES[kind].write_tiny(tmp_path / "model")
    file, changes = recipe_of(tmp_path, "model", "device=cpu", f"prompts.precision={precision}", "pairs.sampler=flow")
    made = planner(planned, file, changes)
    recipe = load_recipe(file, changes)
    encoder = subjects.components_of(recipe, subjects.subject(recipe).info, torch.device("cpu")).encode
    assert kinds(*encoder.networks) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    taken = peak(lambda: encoder(["two dogs " * 300] * embeddings.per_pass(encoder.weights())))
    assert made.peak == pytest.approx(size(*encoder.networks) + taken, rel=0.1)
    assert made.memory["previews, prompts"] > 0
    assert made.memory["text encoder, decoder"] == 0


def test_large_encoders_take_few_prompts_at_once(tmp_path):
    assert (embeddings.per_pass(embeddings.LARGE), embeddings.per_pass(embeddings.LARGE + 1)) == (64, 4)
    parts = []
    encoder = tiny.text_encoder(str(write_tiny_sd(tmp_path / "sd")))
    embeddings.embed(
        tmp_path / "cache",
        [f"{i} cats" for i in range(10)],
        lambda texts: parts.append(len(texts)) or encoder(texts),
        batch=4,
    )
    assert parts == [4, 4, 2]
    assert embeddings.embedded(tmp_path / "cache", 10)
    assert not embeddings.embedded(tmp_path / "cache", 1025)
