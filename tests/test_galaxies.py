"""examples/galaxies.py, on random weights: no network connection, and none of the published weights, which have no
licence.
"""

import importlib.util
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import script
from PIL import Image

from distmatch import EDM, Denoiser, Prediction
from distmatch.system.errors import UserError

FILE = Path(__file__).parent.parent / "examples" / "galaxies.py"


@pytest.fixture(scope="module")
def galaxies():
    spec = importlib.util.spec_from_file_location("galaxies", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layout(side: int, width: int, hidden: int, blocks: int) -> list[tuple[int, ...]]:
    """The shapes of the arrays in a published file: two convolutions, blocks, a norm, the last time."""
    patches = (side // 4) ** 2
    mixers = [[(hidden, n), (hidden,), (n, hidden), (n,)] for n in (patches, width)]
    norms = [(width, patches)] * 2 + [(patches, width)] * 2
    block = [*mixers[0], *mixers[1], *norms]
    into, out = [(width, 2, 4, 4), (width, 1, 1)], [(1, width, 4, 4), (1, 1, 1)]
    return [*into, *out, *block * blocks, (width, patches), (width, patches), ()]


def score(arrays: list[np.ndarray], x: np.ndarray, t: float) -> np.ndarray:
    """The published formula for one image x f[H,W], patch by patch, without convolutions."""
    into, into_bias, out, out_bias, *rest = arrays
    side = len(x) // 4

    def norm(h, scale, shift):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5) * scale + shift

    def mlp(h, first, first_bias, last, last_bias):
        return np.maximum(h @ first.T + first_bias, 0) @ last.T + last_bias

    h = np.empty((len(into), side * side))
    for row in range(side):
        for column in range(side):
            patch = x[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            h[:, row * side + column] = (into * np.stack([patch, np.full((4, 4), t / 10)])).sum((1, 2, 3))
    h = h + into_bias.reshape(-1, 1)
    while len(rest) > 3:
        block, rest = rest[:12], rest[12:]
        h = h + mlp(norm(h, *block[8:10]), *block[:4])
        h = (h.T + mlp(norm(h.T, *block[10:12]), *block[4:8])).T
    h = norm(h, *rest[:2])
    image = np.empty_like(x)
    for row in range(side):
        for column in range(side):
            # A transposed convolution in JAX's sense correlates the dilated input with the kernel: flipped in a patch.
            patch = np.einsum("c,chw->hw", h[:, row * side + column], out[0, :, ::-1, ::-1])
            image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = patch + out_bias.item()
    return image


def test_the_wrapped_network_is_the_published_formula(galaxies):
    """(x0 - x) / sigma^2 is the score of data with added noise, alpha times that of the variance-preserving one."""
    sizes = (8, 6, 5, 2)
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape) for shape in layout(*sizes)]
    file = io.BytesIO()
    for array in arrays:
        np.save(file, array)
    net = galaxies.ScoreNet(*sizes).double()
    net.load(file.getvalue())
    denoiser = Denoiser(net, EDM(0.03, 80), Prediction("vp"))
    sigmas = np.array([0.03, 0.5, 3.0, 80.0])
    x = np.stack([random.normal(size=(8, 8)) * (1 + sigma) for sigma in sigmas])
    with torch.no_grad():
        x0 = denoiser(torch.from_numpy(x)[:, None], torch.from_numpy(sigmas))[:, 0].numpy()
    for noisy, clean, sigma in zip(x, x0, sigmas, strict=True):
        alpha, t = 1 / np.sqrt(1 + sigma**2), np.log1p(sigma**2)
        expected = alpha * score(arrays, alpha * noisy, t)
        np.testing.assert_allclose((clean - noisy) / sigma**2, expected, rtol=1e-6, atol=1e-9)


def test_the_published_size_has_the_arrays_of_the_file(galaxies):
    shapes = layout(64, 64, 512, 4)
    assert len(shapes) == 55
    sizes = [parameter.numel() for parameter in galaxies.ScoreNet().parameters()]
    assert sizes == [int(np.prod(shape)) for shape in shapes[:-1]]


def test_a_pickle_in_the_weights_is_refused(galaxies):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        galaxies.ScoreNet(8, 6, 5, 2).load(file.getvalue())


def test_another_wheel_is_refused(galaxies, tmp_path):
    with zipfile.ZipFile(tmp_path / galaxies.WHEEL, "w") as wheel:
        wheel.writestr(galaxies.WEIGHTS, b"")
    with pytest.raises(UserError, match="its SHA-256 is not"):
        galaxies.published(tmp_path)


def test_statistics_of_a_tilted_gaussian(galaxies):
    """Moments in closed form: covariance (9, 2; 2, 4), with little below the threshold; then a point."""
    rows, columns = np.mgrid[:64, :64] - 31.0
    covariance = np.array([[9.0, 2.0], [2.0, 4.0]])
    at = np.stack([columns, rows], -1)
    flux = 1000 * np.exp(-0.5 * np.einsum("yxi,ij,yxj->yx", at, np.linalg.inv(covariance), at))
    point = np.zeros((64, 64))
    point[20, 40] = 1.5
    found = galaxies.statistics(torch.from_numpy(10 * np.log1p(np.stack([flux, point])))[:, None])
    xx, yy = 9 + 1 / 12, 4 + 1 / 12
    assert found["total flux"].tolist() == pytest.approx([1000 * 2 * np.pi * np.sqrt(32), 1.5], rel=1e-6)
    assert found["size"].tolist() == pytest.approx([np.sqrt((xx + yy) / 2), np.sqrt(1 / 12)], rel=1e-3)
    assert found["e1"].tolist() == pytest.approx([(xx - yy) / (xx + yy), 0], rel=1e-3)
    assert found["e2"].tolist() == pytest.approx([2 * 2 / (xx + yy), 0], rel=1e-3)


def test_kolmogorov_smirnov_is_scipys(galaxies):
    from scipy.stats import ks_2samp  # seconds, which only the process of this test need spend

    generator = torch.Generator().manual_seed(0)
    a, b = ((mean + torch.randn(n, generator=generator)).round(decimals=1) for mean, n in ((0, 50), (0.3, 70)))
    # in double precision: newer releases of SciPy return the statistic in the precision of the samples
    assert galaxies.kolmogorov_smirnov(a, b) == pytest.approx(ks_2samp(a.double(), b.double()).statistic, abs=1e-12)


def test_a_trial_trains_and_measures(tmp_path):
    done = script(FILE, "--tiny", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ") and "EfficientNet" not in line]
    rows = [line.split(" | ") for line in lines]
    assert [row[0].lstrip("| ") for row in rows[:6]] == [
        "12 images each",
        "Frechet, pixels, 6 components",
        *(f"Kolmogorov-Smirnov, {name}" for name in ("total flux", "size", "e1", "e2")),
    ]
    assert Image.open(tmp_path / "run" / "galaxies.png").size == (12 * 18 + 2, 2 * 18 + 2)
