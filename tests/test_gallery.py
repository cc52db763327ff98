"""Retrieval among real pictures and distances to them: against NumPy, picture by picture."""

import numpy as np
import pytest
import torch

from distmatch.data.images import Images
from distmatch.evaluation.gallery import Gallery, figures, name_of

CAPTIONS = (
    ("red apple, flat style", "red apple"),
    ("bell, flat style", "bell"),
    ("red apple, glossy style", "red apple"),
    ("whale",),
    ("bell, glossy style", "bell"),
)


def pictures(n: int, seed: int, side: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator).to(torch.uint8)


def gallery(features: torch.Tensor, seed: int = 0, side: int = 6) -> Gallery:
    return Gallery(Images(pictures(len(CAPTIONS), seed, side), None, (), captions=CAPTIONS), features)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_name_is_the_shortest_caption():
    assert [name_of(texts) for texts in CAPTIONS] == ["red apple", "bell", "red apple", "whale", "bell"]
    assert list(gallery(normal(5, 4)).names) == ["red apple", "bell", "whale"]


def test_names_are_found_by_any_caption_and_for_held_out_pictures_by_their_own():
    found = gallery(normal(5, 4))
    prompts = ["bell, glossy style", "red apple", "red apple, firefox style", "whale"]
    assert found.find(prompts, None).tolist() == [1, 0, -1, 2]
    theirs = [("bell",), ("red apple",), ("red apple, firefox style", "red apple"), ("narwhal",)]
    assert found.find(prompts, theirs).tolist() == [1, 0, 0, -1]


def test_ranks_count_the_prototypes_that_are_nearer():
    real, fake = 3 + 2 * normal(5, 4), 3 + 2 * normal(40, 4, seed=1)
    own = torch.arange(40) % 3
    own[7] = -1
    x, y = ((f.numpy() - real.numpy().mean(0)) / real.numpy().std(0, ddof=1) for f in (real, fake))
    rows = {"red apple": [0, 2], "bell": [1, 4], "whale": [3]}
    centres = [x[of].mean(0) for of in rows.values()]
    within = np.concatenate([x[of] - x[of].mean(0) for of in rows.values()])
    cov = within.T @ within / 5
    metric = np.linalg.inv(cov + 0.1 * np.trace(cov) / 4 * np.eye(4))
    expected = []
    for feature, number in zip(y, own.tolist(), strict=True):
        cosines = [feature @ metric @ c / np.sqrt(feature @ metric @ feature * (c @ metric @ c)) for c in centres]
        expected.append(-1 if number < 0 else sum(cosine > cosines[number] for cosine in cosines))
    assert gallery(real).ranks(fake, own).tolist() == expected
    assert {-1, 0, 1, 2} == set(expected)


def test_a_pictures_own_features_find_its_name():
    real = torch.eye(5)
    assert gallery(real).ranks(real, torch.tensor([0, 1, 0, 2, 1])).tolist() == [0] * 5
    alone = Images(pictures(3, 0), None, (), captions=(("a",), ("b",), ("c",)))  # nothing varies within a name
    assert Gallery(alone, real[:3]).ranks(real[:3], torch.arange(3)).tolist() == [0] * 3


@pytest.mark.parametrize("chunk", [2, 1000])
def test_the_nearest_picture_is_found_in_the_pixels(chunk):
    found, made = gallery(normal(5, 4)), pictures(7, seed=3)
    made[2] = found.small[4]
    real, fake = (p.numpy() / 127.5 - 1 for p in (found.small, made))
    expected = [min(np.sqrt(np.mean((a - b) ** 2)) for b in real) for a in fake]
    assert found.nearest(made, chunk).numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert expected[2] == 0


def test_large_pictures_are_compared_at_64_pixels():
    found = gallery(normal(5, 4), side=256)
    blocks = pictures(5, seed=9, side=16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert found.small.shape == (5, 3, 64, 64)
    flat = torch.full((1, 3, 256, 256), 10, dtype=torch.uint8)
    one = Gallery(Images(flat.expand(2, -1, -1, -1), None, (), captions=(("a",),) * 2), normal(2, 4))
    assert one.nearest(flat + 51).tolist() == pytest.approx([0.4])
    assert Gallery(Images(blocks, None, (), captions=CAPTIONS), normal(5, 4)).nearest(blocks).max() == 0


def test_a_copy_is_nearer_than_nineteen_of_twenty_unseen_pictures():
    found, unseen = gallery(normal(5, 4)), pictures(101, seed=5)
    near = found.copy(unseen)
    assert near == found.nearest(unseen).sort().values[5]
    assert figures(None, found.nearest(unseen), near)["copies"] == pytest.approx(5 / 101)


def test_figures_leave_out_prompts_without_a_name():
    ranks, nearest = torch.tensor([0, 4, -1, 0, 5, -1]), torch.tensor([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
    found = figures(ranks, nearest, 0.25)
    assert found == {"top1": 0.5, "top5": 0.75, "nearest": pytest.approx(0.3), "copies": pytest.approx(2 / 6)}
    assert figures(torch.tensor([-1]), nearest[:1], None) == {"nearest": pytest.approx(0.1)}
