"""Distances between two sets of images, given their features: pure functions and streaming statistics.

Everything is computed in float64 on the CPU, whatever the type and device of the features.
"""

import torch
from torch import Tensor

from distmatch.system import rng
from distmatch.system.errors import UserError


class Moments:
    """Mean and covariance of features that arrive in batches, without the cancellation of summed squares.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): except for rounding, the result does
    not depend on how the features were split into batches.
    """

    def __init__(self):
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Add `features f[B,F]`. Raises `UserError` if their shape differs from earlier ones."""
        if features.ndim != 2:
            raise UserError(f"features are {tuple(features.shape)}; expected (batch, features)")
        if len(features) == 0:
            return
        batch = Moments()
        x = _double(features)
        batch.count, batch._mean = len(x), x.mean(0)
        batch._scatter = (x - batch._mean).T @ (x - batch._mean)
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Add everything that `other` has seen."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self._mean, self._scatter = other.count, other._mean, other._scatter
            return
        if self._mean.shape != other._mean.shape:
            raise UserError(f"features have {len(other._mean)} entries, those before had {len(self._mean)}")
        total = self.count + other.count
        gap = other._mean - self._mean
        self._scatter = self._scatter + other._scatter + gap.outer(gap) * (self.count * other.count / total)
        self._mean = self._mean + gap * (other.count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """The mean, f64[F]. Raises `UserError` before the first sample."""
        if self.count == 0:
            raise UserError("the mean of 0 samples was asked for; at least 1 is needed")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance, f64[F,F]. Raises `UserError` for fewer than 2 samples."""
        if self.count < 2:
            raise UserError(f"the covariance of {self.count} samples was asked for; at least 2 are needed")
        return self._scatter / (self.count - 1)


def frechet(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Return `|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, the squared Frechet distance of two Gaussians, at least
    0.

    `tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2)`, and the latter is symmetric: its eigenvalues are real and need
    no general matrix root (Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    Args:
        mu1, mu2: f[F].
        cov1, cov2: f[F,F], positive semidefinite.
    """
    mu1, cov1, mu2, cov2 = (_double(v) for v in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def frechet_bias(cov: Tensor, n: int) -> float:
    """Return the expected `frechet` between `n` samples of a Gaussian and that same Gaussian.

    With the eigenvalues l of its covariance, to first order in 1 / n:

        (1 / n) (sum_i l_i + sum_ij l_i l_j / (2 (l_i + l_j)) + sum_i l_i / 4)

    These are the errors of the mean and, by the second derivative of the matrix root, of the covariance (1 / n times F
    (F + 5) / 4 for F equal eigenvalues of 1).
    """
    values = torch.linalg.eigvalsh(_double(cov)).clamp(min=0)
    pairs = values.outer(values) / (values[:, None] + values).clamp(min=torch.finfo(values.dtype).tiny)
    return float((1.25 * values.sum() + pairs.sum() / 2) / n)


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return mean and std over subsets of the kernel distance (Binkowski et al. 2018, arXiv 1801.01401; on Inception:
    KID).

    It is the unbiased estimate of the squared MMD with the kernel `(x.y / F + 1)^3` and may be negative. Each subset
    draws `size` rows (or all of the smaller set, if it has fewer) from `x` and from `y`, without replacement, as a
    function of `(seed, subset)`.

    Args:
        x, y: f[N,F], f[M,F].

    Raises `UserError` for fewer than 2 rows.
    """
    _same_features(x, y)
    x, y = _double(x), _double(y)
    size = min(size, len(x), len(y))
    if size < 2:
        raise UserError(f"the kernel distance of {len(x)} and {len(y)} samples was asked for; at least 2 are needed")
    values = []
    for subset in range(subsets):
        generator = rng.stream("cpu", seed, "kernel", subset)
        a = x[torch.randperm(len(x), generator=generator)[:size]]
        b = y[torch.randperm(len(y), generator=generator)[:size]]
        same = _kernel(a, a).fill_diagonal_(0).sum() + _kernel(b, b).fill_diagonal_(0).sum()
        values.append(same / (size * (size - 1)) - 2 * _kernel(a, b).mean())
    all_values = torch.stack(values)
    return float(all_values.mean()), float(all_values.std(correction=0))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 1000) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), each in 0..1.

    A set's manifold is the union of balls around its points, each reaching to the k-th nearest other point. Precision
    is the share of `fake` inside the manifold of `real`; recall is the share of `real` inside that of `fake`. Both
    depend on the number of points: only compare sets of equal size.

    Args:
        real, fake: f[N,F], f[M,F].
        chunk: rows of the distance matrix held at a time.

    Raises `UserError` if a set has no more than `k` points.
    """
    _same_features(real, fake)
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise UserError(f"the {name} set has {len(points)} points; a {k}-th neighbour needs at least {k + 1}")
    real, fake = _double(real), _double(fake)
    real_radius, fake_radius = _radius(real, k, chunk), _radius(fake, k, chunk)
    in_real = torch.zeros(len(fake), dtype=torch.bool)
    in_fake = []
    for rows, radius in zip(real.split(chunk), real_radius.split(chunk), strict=True):
        distance = torch.cdist(rows, fake)
        in_real |= (distance <= radius[:, None]).any(0)
        in_fake.append((distance <= fake_radius).any(1))
    return float(in_real.double().mean()), float(torch.cat(in_fake).double().mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _radius(x: Tensor, k: int, chunk: int) -> Tensor:
    """Return each point's distance to its k-th nearest other one, f64[N]; the nearest of all is the point itself."""
    return torch.cat([torch.cdist(rows, x).topk(k + 1, largest=False).values[:, k] for rows in x.split(chunk)])


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _same_features(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"features are {tuple(x.shape)} and {tuple(y.shape)}; expected (N, F) and (M, F)")
