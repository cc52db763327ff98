"""Objectives and weightings against their formulas, written out with numpy."""

import numpy as np
import pytest
import torch

from distmatch.diffusion.losses import REGRESSIONS, WEIGHTINGS, matching_loss

x, fake, real = (
    torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
)
alpha, sigma = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.2, 0.8, 2.0]).double()


@pytest.mark.parametrize(
    ("name", "w_t"),
    [
        ("eq8", lambda a, s, d: s**2 / a / d),
        ("dreamfusion", lambda a, s, d: s / a),
        ("prolificdreamer", lambda a, s, d: s**3 / a),
    ],
)
def test_weightings_are_w_t_of_equation_7(name, w_t):
    """The factor on `mu_fake - mu_real` is `w_t alpha` times the scores' factor `alpha / sigma^2` (Eq. 4, 5, 7)."""
    d = (x - real).abs().numpy().mean(axis=(1, 2, 3))
    a, s = alpha.numpy(), sigma.numpy()
    assert np.allclose(WEIGHTINGS[name](x, real, alpha, sigma).numpy(), w_t(a, s, d) * a * a / s**2, rtol=1e-12)


def test_algorithm_2_has_no_alpha():
    expected = WEIGHTINGS["eq8"](x, real, alpha, sigma) / alpha
    assert torch.allclose(WEIGHTINGS["algorithm2"](x, real, alpha, sigma), expected, rtol=1e-12)


def test_the_matching_loss_has_algorithm_2s_value_and_gradient():
    w = WEIGHTINGS["algorithm2"](x, real, alpha, sigma)
    leaf = x.clone().requires_grad_(True)
    loss = matching_loss(leaf, fake, real, w)
    loss.backward()
    gradient = (fake - real).numpy() / (x - real).abs().numpy().mean(axis=(1, 2, 3), keepdims=True)
    assert loss.item() == pytest.approx(0.5 * (gradient**2).mean(), rel=1e-12)
    assert np.allclose(leaf.grad.numpy(), gradient / gradient.size, rtol=1e-12)


def test_regressions():
    difference = (x - fake).numpy()
    assert REGRESSIONS["mse"](x, fake).item() == pytest.approx((difference**2).mean())
    assert REGRESSIONS["huber"](x, fake).item() == pytest.approx((np.sqrt(difference**2 + 0.03**2) - 0.03).mean())
