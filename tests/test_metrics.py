"""Metrics against scipy, numpy, brute force and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch

from distmatch.evaluation.metrics import Moments, frechet, kernel_distance, precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    x = normal(size, rank, seed=seed)
    return x @ x.T / rank


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_frechet_agrees_with_a_general_matrix_root(size):
    mu1, mu2 = normal(2, size, seed=1)
    cov1, cov2 = covariance(size, 2 * size, seed=2), covariance(size, 2 * size, seed=3)
    root = np.real(scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()))
    expected = float(((mu1 - mu2) ** 2).sum()) + np.trace(cov1.numpy() + cov2.numpy() - 2 * root)
    assert frechet(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-10)
    assert frechet(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-10)


def test_frechet_in_one_dimension_and_for_commuting_covariances():
    one = torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[25.0]])
    assert frechet(*one) == pytest.approx(3**2 + (2 - 5) ** 2, abs=1e-12)
    a, b = normal(2, 8, seed=1).abs()
    mu1, mu2 = normal(2, 8, seed=2)
    expected = float(((mu1 - mu2) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum())
    assert frechet(mu1, a.diag(), mu2, b.diag()) == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(normal(8, 8, seed=3)).Q
    turned = frechet(mu1, turn @ a.diag() @ turn.T, mu2, turn @ b.diag() @ turn.T)
    assert turned == pytest.approx(expected, rel=1e-12)


def test_frechet_of_singular_covariances():
    """Dead features and fewer images than features: orthogonal ranges share nothing, equal ones everything."""
    mu = torch.zeros(4)
    first, second = torch.tensor([1.0, 2, 0, 0]).diag(), torch.tensor([0.0, 0, 3, 4]).diag()
    assert frechet(mu, first, mu, second) == pytest.approx(10, abs=1e-12)
    low = covariance(16, 3, seed=1)
    assert 0 <= frechet(torch.ones(16), low, torch.ones(16), low) < 1e-6


@pytest.mark.parametrize("cuts", [[1] * 60, [60], [7, 0, 13, 1, 39], [59, 1]])
def test_moments_do_not_depend_on_the_chunking(cuts):
    """The offset is what a running sum of squares would lose all digits to."""
    x = normal(60, 5) * torch.tensor([1, 2, 3, 4, 0.1]) + 1e6
    moments = Moments()
    for part in x.split(cuts):
        moments.update(part)
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-7, atol=1e-9)


def test_merged_moments_are_those_of_one_pass():
    x = normal(50, 4)
    whole, left, right = Moments(), Moments(), Moments()
    whole.update(x)
    for part in x[:20].split(6):
        left.update(part)
    right.update(x[20:])
    before = right.mean.clone(), right.cov.clone()
    merged = Moments()
    merged.merge(right)
    merged.merge(left)
    merged.merge(Moments())
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-12, atol=1e-14)
    assert torch.equal(right.mean, before[0])
    assert torch.equal(right.cov, before[1])


def test_moments_of_too_little_and_of_other_shapes_are_refused():
    moments = Moments()
    with pytest.raises(ValueError, match="mean of 0 samples"):
        _ = moments.mean
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="covariance of 1 samples"):
        _ = moments.cov
    with pytest.raises(ValueError, match="have 4 entries, those before had 3"):
        moments.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"expected \(batch, features\)"):
        moments.update(torch.ones(2, 3, 1))


def mmd(x: np.ndarray, y: np.ndarray, biased: bool = False) -> float:
    """Squared MMD, pair by pair."""

    def k(a, b):
        return (sum(a * b) / len(a) + 1) ** 3

    def within(v):
        pairs = [k(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if biased or i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * float(np.mean([k(a, b) for a in x for b in y]))


def test_kernel_distance_agrees_with_the_sum_over_pairs():
    x, y = normal(12, 5, seed=1), normal(12, 5, seed=2) + 0.3
    mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(mmd(x.numpy(), y.numpy()), rel=1e-12)
    assert std < 1e-12  # every subset is the whole
    assert mean != pytest.approx(mmd(x.numpy(), y.numpy(), biased=True), rel=1e-2)


@pytest.mark.parametrize(("m", "expected", "diagonal"), [(0.0, 0.0, 2.4), (1.0, 22.0, 5.25)])
def test_kernel_distance_is_unbiased(m, expected, diagonal):
    """N(0, 1) against N(m, 1) in one dimension: sum_i binom(3, i) (E x^i - E y^i)^2.

    `diagonal` is what k(x, x) and k(y, y), if they were counted among the 20 * 20 pairs, would add: the test sees it.
    """
    draws = normal(600, 2, 20, 1, seed=5)
    values = np.array([kernel_distance(x, y + m, subsets=1)[0] for x, y in draws])
    tolerance = 4 * values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < tolerance < diagonal


def test_kernel_distance_depends_on_its_seed_only_through_the_subsets():
    x, y = normal(200, 3, seed=1), normal(150, 3, seed=2) + 0.5
    first = kernel_distance(x, y, subsets=20, size=50, seed=1)
    assert kernel_distance(x, y, subsets=20, size=50, seed=1) == first
    other = kernel_distance(x, y, subsets=20, size=50, seed=2)
    assert other != first
    assert other[0] == pytest.approx(first[0], abs=4 * first[1] / 20**0.5)


def brute_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def share(inside: np.ndarray, manifold: np.ndarray) -> float:
        hits = 0
        for point in inside:
            for i, centre in enumerate(manifold):
                others = sorted(np.linalg.norm(centre - o) for j, o in enumerate(manifold) if j != i)
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(inside)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize(("k", "chunk"), [(1, 7), (3, 1000), (3, 10)])
def test_precision_and_recall_agree_with_brute_force(k, chunk):
    real, fake = normal(40, 3, seed=1), 0.6 * normal(30, 3, seed=2) + 0.4
    precision, recall = precision_recall(real, fake, k=k, chunk=chunk)
    assert (precision, recall) == pytest.approx(brute_precision_recall(real.numpy(), fake.numpy(), k), abs=1e-12)
    assert 0.1 < recall < precision < 1  # a narrower set: nothing here is at an end of the scale


def test_precision_and_recall_of_constructed_sets():
    mode = normal(50, 4)
    real = torch.cat([mode, mode + 100])
    assert precision_recall(real, mode) == (1.0, 0.5)  # half of the modes, all of it real
    assert precision_recall(mode, real) == (0.5, 1.0)  # all of the modes, half of it real
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(mode, mode + 100) == (0.0, 0.0)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"the fake set has 3 points; a 3-th neighbour needs at least 4"):
        precision_recall(torch.ones(9, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"expected \(N, F\) and \(M, F\)"):
        precision_recall(torch.ones(9, 2), torch.ones(9, 3))
    with pytest.raises(ValueError, match="kernel distance of 9 and 1 samples"):
        kernel_distance(torch.ones(9, 2), torch.ones(1, 2))
