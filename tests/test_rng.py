"""Randomness as a function of position."""

import numpy as np
import torch

from distmatch.system import rng


def test_noise_of_an_index_does_not_depend_on_its_neighbours():
    whole = rng.noise(3, range(10), (2, 5))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(whole[[7, 2]], rng.noise(3, [7, 2], (2, 5)))
    assert torch.equal(whole[4:6], rng.noise(3, torch.tensor([4, 5]), (2, 5)))
    assert not torch.equal(whole, rng.noise(4, range(10), (2, 5)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither read nor moved
    flat = rng.noise(0, range(2000), (50,)).double()
    assert abs(flat.mean()) < 0.01
    assert abs(flat.std() - 1) < 0.01
    assert (flat @ flat.T / 50 - torch.eye(2000)).abs().mean() < 0.15  # rows are unrelated


def test_a_shuffle_has_everything_once_per_pass_and_continues_by_position():
    passes = rng.shuffled(1, 10, 0, 30).reshape(3, 10)
    for row in passes:
        assert sorted(row) == list(range(10))
    assert not np.array_equal(passes[0], passes[1])
    pieces = np.concatenate([rng.shuffled(1, 10, start, 3) for start in range(0, 30, 3)])
    assert np.array_equal(pieces, passes.ravel())
    assert np.array_equal(rng.shuffled(1, 10, 17, 8), passes.ravel()[17:25])


def test_looking_into_the_next_pass_makes_no_permutation_twice(monkeypatch):
    made, permute = [], rng._permute
    monkeypatch.setattr(rng, "_cache", {})
    monkeypatch.setattr(rng, "_permute", lambda *arguments: made.append(1) or permute(*arguments))
    for start in range(0, 30, 2):
        rng.shuffled(1, 10, start, 6)
        rng.shuffled(1, 10, start, 2)
    assert len(made) == 4  # passes 0, 1, 2 and, from 28 on, 3


def test_streams_differ_by_every_part_and_repeat():
    def draw(*parts):
        return torch.randn(4, generator=rng.stream("cpu", *parts)).tolist()

    assert draw(0, "match", 1) == draw(0, "match", 1)
    assert len({tuple(draw(*p)) for p in ((0, "match", 1), (1, "match", 1), (0, "fake", 1), (0, "match", 11))}) == 4
    assert rng.key(1, 23) != rng.key(12, 3)
